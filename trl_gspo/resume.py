"""
What a run needs to go on from a checkpoint as if it had not been stopped, and transformers and TRL do not keep.

They bring back weights, optimizer, scheduler, random states and the logs; the position in the data within an epoch
too. They do not bring back the rollout batch that is being trained on: TRL samples it anew, by other weights, from
where it stands in the data, and all later rollout batches begin there. Nor the order of the prompts in a later epoch,
which is that of the first again, nor what was measured since the last log.
"""

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from .checkpoints import options_of


if TYPE_CHECKING:
    from .trainer import GSPOTrainer


logger = get_logger(__name__)

# Where a rollout batch begins and how it is dealt out; then what else its tensors depend on.
_BATCHES = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations",
    "num_generations",
)  # fmt: skip
_ROLLOUT = (
    "importance_sampling_level", "beta", "use_vllm", "vllm_importance_sampling_correction", "use_rollout_logps",
    "log_expert_change",
)  # fmt: skip
_ORDER = ("seed", "shuffle_dataset")


class RunState(TrainerCallback):
    """
    Keeps in a checkpoint, one file a rank, `gspo_state_RANK.pt`: the rollout batch if it is not used up, what was
    measured and summed since the last log, and what the clip-range controller saw since it last moved.

    It is a callback for its moment: `on_train_begin` comes after transformers has loaded its part and before the first
    batch is drawn.

    Args:
        trainer ([`GSPOTrainer`]): whose state it is.

    Attributes:
        checkpoint (`str` or `None`): where the next training goes on from.
    """

    def __init__(self, trainer: "GSPOTrainer"):
        self._trainer = trainer
        self.checkpoint: str | None = None

    def options(self) -> dict[str, Any]:
        """What must be the same when the run goes on, or else prompts are repeated and a rollout batch is lost."""
        trainer, args = self._trainer, self._trainer.args
        rows = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None
        named = {name: getattr(args, name) for name in (*_BATCHES, *_ROLLOUT, *_ORDER)}
        return {"num_processes": trainer.accelerator.num_processes, "rows of train_dataset": rows} | named

    def save(self, folder: Path) -> None:
        """Writes this rank's file into a checkpoint."""
        trainer = self._trainer
        if trainer.args.save_only_model:
            return
        controller = trainer._clip_range
        loss = getattr(trainer, "_tr_loss", None)  # old versions of transformers keep it to themselves
        state = {
            "rollout": None,
            "rollout_step": trainer._rollout_step,
            "max_units": trainer._max_units,
            "mean_entropy": trainer._mean_entropy,
            "clip_range": [] if controller is None else controller.rows,
            "ratios": trainer._ratio_statistics["train"].state_dict(),
            "metrics": {
                name: [float(value) for value in values] for name, values in trainer._metrics["train"].items()
            },
            "loss": loss,
            "mean_loss": loss if loss is None else trainer.accelerator.reduce(loss, reduction="mean").item(),
            "last_logged": trainer._globalstep_last_logged,
            "completions": self._completions(),
        }
        if trainer._step % self._generate_every:
            batches = [{name: batch[name] for name in batch if name != "layout"} for batch in trainer._buffered_inputs]
            if _is_plain(batches):
                state["rollout"] = batches
        os.makedirs(folder, exist_ok=True)
        torch.save(state, self._file(folder))

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        checkpoint, self.checkpoint = self.checkpoint, None
        if checkpoint is None:
            return
        trainer = self._trainer
        # transformers would log, evaluate and save as often as the checkpoint says, and only warn of it.
        state.compute_steps(args, state.max_steps)
        # As transformers counts them; a stream has no length.
        is_stream = not has_length(train_dataloader)
        batches = state.max_steps if is_stream else len(train_dataloader) / args.gradient_accumulation_steps
        updates = max(math.ceil(batches), 1)
        if is_stream and math.ceil(state.epoch or 0) > 1:
            logger.warning(
                "The stream of prompts ended and began anew before this checkpoint: where it stood is not known, and "
                "the run goes on from its beginning."
            )
        if args.sync_ref_model:
            logger.warning(
                "`sync_ref_model=True`: no checkpoint holds the reference model, and it starts from the original "
                "weights again."
            )
        # One order for each epoch, drawn where it begins.
        sampler = trainer._train_sampler
        if getattr(sampler, "shuffle", False):
            for _ in range(state.global_step // updates):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        trainer._step = state.global_step % updates * args.gradient_accumulation_steps
        is_lost = self._restore(checkpoint) and trainer._step % self._generate_every
        if is_lost:
            left = self._generate_every - trainer._step % self._generate_every
            last = state.global_step + math.ceil(left / args.gradient_accumulation_steps)
            logger.warning(
                f"The rollout batch of steps {state.global_step + 1} to {last} is sampled anew, from the same place "
                "in the data, by the weights of the checkpoint."
            )

    def _restore(self, checkpoint: str) -> bool:
        """Brings back what [`RunState.save`] wrote; returns whether the rollout batch is missing."""
        trainer, before, now = self._trainer, options_of(checkpoint), self.options()
        changed = [name for name in now if name in before and before[name] != now[name]]
        if changed:
            values = ", ".join(f"`{name}` {before[name]} in the checkpoint and {now[name]} now" for name in changed)
            is_moved = not {*changed} <= {*_ROLLOUT}
            effect = "The place in the data is counted in them: some prompts come again or are left out."
            logger.warning(f"The run does not go on as it was: {values}.{f' {effect}' if is_moved else ''}")
        path = self._file(Path(checkpoint))
        if not path.is_file():
            logger.warning(
                f"{checkpoint} has no {path.name}: it was saved by another trainer, by fewer processes or with "
                "`save_only_model=True`. What it does not hold starts anew."
            )
            return True
        if {*changed} & {"num_processes", *_BATCHES, *_ROLLOUT}:
            return True
        # Not straight to the device: torch takes "cpu:0", which a rank without a GPU has, for none.
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved = send_to_device(saved, trainer.accelerator.device)
        trainer._rollout_step, trainer._max_units = saved["rollout_step"], saved["max_units"]
        trainer._mean_entropy = saved["mean_entropy"]
        trainer._metrics["train"].update(saved["metrics"])
        trainer._ratio_statistics["train"].load_state_dict(saved["ratios"])
        if trainer._clip_range is not None:
            trainer._clip_range.rows = saved["clip_range"]
        if saved["loss"] is not None:
            trainer._tr_loss += saved["loss"]
            # transformers reports the mean loss of this call's steps at the end.
            trainer._total_loss_scalar -= saved["mean_loss"]
            trainer._globalstep_last_logged = saved["last_logged"]
        for name, values in json.loads(saved["completions"] or "{}").items():
            for column, cells in values.items() if isinstance(values, dict) else [(None, values)]:
                (trainer._logs[name] if column is None else trainer._logs[name][column]).extend(cells)
        trainer._buffered_inputs = saved["rollout"]
        trainer._is_restored = saved["rollout"] is not None
        return saved["rollout"] is None

    @property
    def _generate_every(self) -> int:
        """Micro-batches that a rollout batch lasts."""
        return self._trainer.args.steps_per_generation * self._trainer.num_iterations

    def _file(self, folder: Path) -> Path:
        return folder / f"gspo_state_{self._trainer.accelerator.process_index}.pt"

    def _completions(self) -> str | None:
        """The table of completions that the next log writes, as JSON; `None` if there is none that JSON can hold."""
        if not self._trainer.log_completions:
            return None
        logs = self._trainer._logs
        table = {name: list(logs[name]) for name in ("prompt", "completion", "advantages")}
        for name in ("rewards", "extra"):
            table[name] = {column: list(cells) for column, cells in logs[name].items()}
        try:
            return json.dumps(table)
        except TypeError:  # images
            return None


def _is_plain(value: Any) -> bool:
    """Whether torch loads it with weights only."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(entry) for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (torch.Tensor, bool, int, float, str))
