"""
One training by `GSPOTrainer.train` for each [`Case`], on the same weights and rollouts whatever the engine: what the
processes of test_engines.py run, and what tells two of their results apart.

After the tests, the table of docs/engines.md: `python tests/engines.py BASETEMP/engines`, with pytest's `--basetemp`.
"""

import json
import math
import os
import random
import sys
from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from test_trainer import build
from tiny import sorting_rows
from torch.distributed.tensor import DTensor
from trl.trainer import grpo_trainer

from trl_gspo import GSPOTrainer, token_reward, turn_reward


UNITS = ("sequence", "sequence_token", "turn")


class Case(NamedTuple):
    """
    One training.

    Args:
        engine (`str`): of `ENGINES`.
        model (`str`): `"dense"` (Qwen3) or `"moe"` (Qwen3-MoE).
        unit (`str`): `importance_sampling_level`.
        rollout (`str`): `"mixed"` or `"dead"`, see [`Rollout`].
        is_packed (`bool`): `pack_live_tokens`.
        is_adapter (`bool`): trains a LoRA adapter in place of the weights.
        option (`str`): of `OPTIONS`.
    """

    engine: str
    model: str
    unit: str
    rollout: str = "mixed"
    is_packed: bool = False
    is_adapter: bool = False
    option: str = ""

    def __str__(self) -> str:
        names = [self.engine, "lora" if self.is_adapter else "", self.model, self.unit, self.rollout, self.option]
        return "-".join([*filter(None, names), "packed" if self.is_packed else "whole"])

    @property
    def reference(self) -> "Case":
        """The training that this one must equal: on one process, nothing left out of the forward passes."""
        # The loss of the routers is of a micro-batch: there one process has to have those of the ranks, one by one.
        engine = "one_accumulating" if self.option == "router" else "one"
        return self._replace(engine="cuda_one" if self.engine.startswith("cuda") else engine, is_packed=False)


class Engine(NamedTuple):
    """The trainer's options, and how many processes, on how many machines; 0 is one without `torchrun`."""

    options: dict[str, Any]
    launched: int = 2
    machines: int = 1

    @property
    def ranks(self) -> int:
        return max(self.launched, 1)


def _zero(stage: int) -> dict[str, Any]:
    config = {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    return {"deepspeed": config}


# Each optimizer step is of 12 rows: in two micro-batches of 3 on each of two ranks, of 6 on one process, or on that in
# four of 3.
ROWS, RANKS, STEPS = 3, 2, 4
_ALL_ROWS = dict(per_device_train_batch_size=RANKS * ROWS)
# A mesh of one GPU goes through the same code.
_GPUS = 1 if torch.cuda.device_count() == 1 else 2
ENGINES = {
    "one": Engine(_ALL_ROWS, launched=0),
    "one_accumulating": Engine(dict(gradient_accumulation_steps=4, steps_per_generation=8), launched=0),
    "ddp": Engine({}),
    "zero_1": Engine(_zero(1)),
    "zero_2": Engine(_zero(2)),
    "zero_3": Engine(_zero(3)),
    # `fully_shard` on the CPU. Accelerate's own is for accelerators: on a CPU it falls back to DDP without a word.
    "fsdp_2": Engine({}),
    "two_machines": Engine({}, machines=2),
    "two_machines_zero_3": Engine(_zero(3), machines=2),
    "cuda_one": Engine(_ALL_ROWS | dict(use_cpu=False), launched=0),
    "cuda_fsdp_2": Engine(
        dict(
            use_cpu=False,
            fsdp="full_shard",
            fsdp_config={"version": 2},
            per_device_train_batch_size=RANKS * ROWS // _GPUS,
        ),
        launched=_GPUS,
    ),
}
OPTIONS = {
    "": {},
    "kl": dict(beta=0.05),
    "router": dict(router_aux_loss_coef=0.1),
    "target": dict(clip_fraction_target=0.15),
    "twice": dict(num_iterations=2, max_grad_norm=0.3),
}
# Adam, because engines differ in where they keep its moments; with an epsilon of the size of the gradients: with the
# default of 1e-8 it makes whole steps of gradients that are nothing but rounding. The gradient's norm is above its
# bound in some steps.
SCRIPT = dict(
    per_device_train_batch_size=ROWS,
    gradient_accumulation_steps=2,
    steps_per_generation=4,
    max_steps=STEPS,
    num_generations=8,
    mask_truncated_completions=True,
    optim="adamw_torch",
    adam_epsilon=1e-3,
    learning_rate=5e-3,
    weight_decay=0.1,
    max_grad_norm=0.4,
    lr_scheduler_type="constant",
    router_aux_loss_coef=0.0,
    step_discount=0.9,
)


# ---- the rollouts


class Rollout:
    """
    Completions of one to four turns with an environment's tokens between them, fixed by the place of a row in the
    rollout batch of all ranks. The first token says whether the group is live.

    `"mixed"`: three groups of eight of which one is dead and the middle one is on both ranks; some rows are truncated,
    and so masked, others are all of the environment's. `"dead"`: six groups of four of which one is live. Of its rows
    one is not masked in the first rollout batch, so that one rank has a live row in the first optimizer step and none
    has in the next two; in the last all its rows are live, on the other rank, whose rows have two turns at most.
    """

    def __init__(self, name: str):
        self.name = name

    def __call__(self, prompts: list[str], trainer: GSPOTrainer) -> dict[str, list]:
        number = rollout_number(trainer)
        first = trainer.accelerator.process_index * len(prompts)
        places = range(first, first + len(prompts))
        rows = [self._row(number, place, trainer.num_generations, trainer.processing_class) for place in places]
        return {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [ids for ids, _ in rows],
            "env_mask": [mask for _, mask in rows],
            "logprobs": [[-4.6] * len(ids) for ids, _ in rows],
        }

    def _row(self, number: int, place: int, num_generations: int, tokenizer: Any) -> tuple[list[int], list[int]]:
        generator, group = random.Random(f"{self.name} {number} {place}"), place // num_generations
        mask = [0] * generator.randint(0, 1)
        most = 2 if self.name == "dead" and place >= 4 * ROWS else 4
        for _ in range(generator.randint(1, most)):
            mask += [1] * generator.randint(1, 8) + [0] * generator.randint(1, 2)
        if self.name == "dead":
            is_live = group == 5 * number
            is_masked, is_truncated = number == 0 and place in (1, 2, 3), False
        else:
            is_live = group != 1 - number
            is_masked, is_truncated = generator.random() < 0.1, generator.random() < 0.15
        first = generator.randint(*((60, 100) if is_live else (7, 50)))
        ids = [first, *(generator.randint(7, 100) for _ in mask[1:])]
        ids.append(ids[-1] if is_truncated else tokenizer.eos_token_id)
        mask.append(mask[-1])
        return ids, [0] * len(mask) if is_masked else mask

    def order(self, number: int, rank: int | None) -> torch.Tensor:
        """
        How the rows of the rollout batch are put into micro-batches. TRL has each rank shuffle its own; one process,
        `None`, would shuffle those of all of them. Here it gets the micro-batches of both ranks, in turns.
        """
        size = ROWS * 4
        if rank is not None:
            rows = torch.arange(size)
            # With "dead", groups stay together: which of them meet is then as the docstring says.
            generator = torch.Generator().manual_seed(10 * number + rank)
            return rows if self.name == "dead" else rows[torch.randperm(size, generator=generator)]
        of_ranks = [self.order(number, rank).view(-1, ROWS) + rank * size for rank in range(RANKS)]
        return torch.stack(of_ranks, 1).flatten()


def rollout_number(trainer: GSPOTrainer) -> int:
    """How many rollout batches came before: each is of two optimizer steps, once or `num_iterations` times."""
    return trainer.state.global_step // (2 * trainer.num_iterations)


def _is_live(ids: list[int]) -> bool:
    return ids[0] > 55


async def outcome(completion_ids, **_):
    return [None if ids[0] % 9 == 5 else _is_live(ids) * (sum(ids) % 7) / 7 for ids in completion_ids]


@turn_reward
def turns(completion_ids, num_turns, **_):
    return [
        None if ids[0] % 7 == 5 else [_is_live(ids) * ((sum(ids) + 7 * turn) % 5) / 2 for turn in range(count)]
        for ids, count in zip(completion_ids, num_turns, strict=True)
    ]


@token_reward
def tokens(completion_ids, **_):
    return [None if ids[0] % 7 == 5 else [_is_live(ids) * (token % 3) / 10 for token in ids] for ids in completion_ids]


REWARDS = {"sequence": [outcome], "sequence_token": [outcome, tokens], "turn": [outcome, turns]}


def prompts_of_many_lengths() -> Dataset:
    """TRL pads prompts to the longest of a rank's rollout batch, which is then another on each rank."""
    return Dataset.from_list([sorting_rows(1, seed=row, digits=3 + row % 7)[0] for row in range(64)])


# ---- the training


def _rows_of(batch: dict[str, Any]) -> list[tuple]:
    """Of each row of a micro-batch, or of TRL's rollout batch: its prompt, its trained tokens and their columns."""
    rows = []
    for index, mask in enumerate((batch["completion_mask"] * batch["tool_mask"]).bool()):
        prompt = batch["prompt_ids"][index][batch["prompt_mask"][index].bool()]
        columns = mask.nonzero().flatten()
        rows.append((tuple(prompt.tolist()), tuple(batch["completion_ids"][index][mask].tolist()), columns.tolist()))
    return rows


class RecordingTrainer(GSPOTrainer):
    """
    Puts rows into micro-batches as `rollout.order` says; keeps the rows that this process has sampled and those that
    it has trained on, losses, the tokens of each forward, and how many tokens live rows have before their last one.
    """

    def __init__(self, *args, rollout: Rollout, **kwargs):
        super().__init__(*args, rollout_func=rollout, **kwargs)
        self.rollout = rollout
        self.sampled, self.rows, self.losses, self.tokens, self.needed = [], [], [0.0] * STEPS, [], 0
        self.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        if self._loss_inputs is not None:
            self.tokens.append(kwargs["input_ids"].numel())

    def _prepare_inputs(self, generation_batch):
        def shuffle(rows):
            rank = self.accelerator.process_index if self.accelerator.num_processes > 1 else None
            self.sampled += [row[:2] for row in _rows_of(rows)]
            order = self.rollout.order(rollout_number(self), rank)
            with mock.patch("torch.randperm", return_value=order):
                return trl_shuffle(rows)

        trl_shuffle = grpo_trainer.shuffle_sequence_dict
        with mock.patch.object(grpo_trainer, "shuffle_sequence_dict", shuffle):
            return super()._prepare_inputs(generation_batch)

    def _compute_loss(self, model, inputs):
        for (prompt, ids, columns), advantages in zip(_rows_of(inputs), inputs["advantages"], strict=True):
            advantages = advantages.expand(inputs["completion_ids"].size(1))[columns]
            is_live = bool((advantages != 0).any())
            self.needed += len(prompt) + columns[-1] if is_live else 0
            self.rows.append((self.state.global_step, is_live, (prompt, ids, round(advantages.sum().item(), 4))))
        loss = super()._compute_loss(model, inputs)
        self.losses[self.state.global_step] += loss.item()
        return loss


def train(case: Case, models: Path, output_dir: Path) -> dict[str, Any]:
    """What `case` came to on this process."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    engine, rollout = ENGINES[case.engine], Rollout(case.rollout)
    script = SCRIPT | OPTIONS[case.option] | engine.options
    script |= dict(
        importance_sampling_level=case.unit,
        pack_live_tokens=case.is_packed,
        log_expert_change=case.model == "moe",
        num_generations=4 if case.rollout == "dead" else 8,
        reward_weights=[1.0, 0.5][: len(REWARDS[case.unit])],
    )
    if case.is_adapter:
        # Alphas that let the adapter move the ratio as far as whole weights do.
        script["peft_config"] = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "o_proj"])
    try:
        trainer = build(
            lambda *args, **kwargs: RecordingTrainer(*args, rollout=rollout, **kwargs),
            output_dir,
            model=str(models / case.model),
            train_dataset=prompts_of_many_lengths(),
            reward_funcs=REWARDS[case.unit],
            **script,
        )
        if case.engine == "fsdp_2":
            _shard(trainer)
        start = _whole_weights(trainer)
        trainer.train()
        return dict(
            start=start,
            moved=_whole_weights(trainer) - start,
            logs=[entry for entry in trainer.state.log_history if "loss" in entry],
            losses=trainer.losses,
            sampled=trainer.sampled,
            rows=trainer.rows,
            tokens=trainer.tokens,
            needed=trainer.needed,
            way=trainer._scorer.way,
            most_turns=trainer._max_units.get(True),
            engine=_engine_of(trainer),
        )
    finally:
        unset_hf_deepspeed_config()
        _forget_accelerator()


def _shard(trainer: GSPOTrainer) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in trainer.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(trainer.model, mesh=mesh)
    trainer.accelerator.prepare_model = lambda model, **_: model  # which would wrap it in DDP


def _whole_weights(trainer: GSPOTrainer) -> torch.Tensor:
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = [one.full_tensor() if isinstance(one, DTensor) else one for one in model.parameters()]
    gathering = nullcontext()
    sharded = [one for one in parameters if hasattr(one, "ds_id")]
    if sharded:
        import deepspeed

        gathering = deepspeed.zero.GatheredParameters(sharded)
    with gathering:
        return torch.cat([parameter.detach().flatten().cpu() for parameter in parameters])


def _engine_of(trainer: GSPOTrainer) -> str:
    """What has trained, as found in it: `"one"`, `"ddp"`, `"zero_1"` to `"zero_3"` or `"fsdp_2"`."""
    wrapped = trainer.model_wrapped
    if hasattr(wrapped, "zero_optimization_stage"):
        return f"zero_{wrapped.zero_optimization_stage()}"
    if isinstance(next(trainer.model.parameters()), DTensor):
        return "fsdp_2"
    return "ddp" if isinstance(wrapped, torch.nn.parallel.DistributedDataParallel) else "one"


def _forget_accelerator() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_USE_", "FSDP_"))]:
        del os.environ[name]


def run_cases(folder: str, models: str) -> None:
    """Run by each process of a launch: every case of `folder/cases.json`, one after the other."""
    if "RANK" in os.environ:
        import deepspeed

        # Of DeepSpeed's groups too. A rank that waits for one that never comes then says where it stood.
        torch.distributed.distributed_c10d.default_pg_timeout = timedelta(seconds=120)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.comm.init_distributed(backend, timeout=timedelta(seconds=120))
    folder, rank = Path(folder), os.environ.get("RANK", "0")
    for fields in json.loads((folder / "cases.json").read_text()):
        case = Case(*fields)
        (folder / f"at_{rank}.txt").write_text(str(case))
        result = train(case, Path(models), folder / "output")
        torch.save(result, folder / f"{case}.{rank}.part")
        (folder / f"{case}.{rank}.part").rename(folder / f"{case}.{rank}.pt")


# ---- the comparison


# float32 has 6e-8; a gradient is a sum of thousands of such terms in another order, and Adam divides by its size.
WEIGHTS, LOSS, GRAD_NORM = 1e-5, 1e-6, 1e-5
METRIC = dict(rel=1e-4, abs=1e-6)  # of a metric
# Rounding of the ratios over their spread, which is a few thousandths.
CORRELATION = 1e-4

CLOCKS = ("step_time", "runtime", "_per_second")


def differences(case: Case, results: list[dict], references: list[dict]) -> dict[str, float]:
    """
    How far a training lies from its reference, each of all ranks: the largest over the steps.

    Returns:
        `dict[str, float]`: `weights`, the norm of the difference as a share of how far the reference moved; `loss`, of
        the loss of an optimizer step, absolute; `grad_norm`, relative; and each metric as logged, where 1 is the
        tolerance.
    """
    expected = references[0]["moved"]
    found = {"weights": _largest((one["moved"] - expected).norm() / expected.norm() for one in results)}
    losses, expected_losses = (
        [sum(of_ranks) / len(of_ranks) for of_ranks in zip(*(one["losses"] for one in ranks), strict=True)]
        for ranks in (results, references)
    )
    found["loss"] = _largest(one - other for one, other in zip(losses, expected_losses, strict=True))
    pairs = list(zip(results[0]["logs"], references[0]["logs"], strict=True))
    norms = [(entry["grad_norm"], expected["grad_norm"]) for entry, expected in pairs]
    found["grad_norm"] = _largest((one - other) / max(other, 1e-6) for one, other in norms)
    distances = defaultdict(list)
    for entry, expected in pairs:
        for key in (entry.keys() | expected.keys()) - _legitimate(case, expected):
            if key not in found and not any(name in key for name in CLOCKS):
                distances[key].append(_distance(key, entry.get(key), expected.get(key)))
    return found | {key: _largest(values) for key, values in distances.items()}


def _largest(values: Iterable[float]) -> float:
    # NaN, which Python's `max` may lose, is as far off as can be.
    return max(math.inf if math.isnan(value) else abs(float(value)) for value in values)


def _distance(key: str, value: float | None, expected: float | None) -> float:
    # A metric without a value in a window is None there, or absent.
    if value is None or expected is None:
        return 0.0 if value is expected else math.inf
    least = CORRELATION if key.endswith("_correlation") else METRIC["abs"]
    return (value - expected) / (least + METRIC["rel"] * abs(expected))


def _legitimate(case: Case, expected: dict[str, float]) -> set[str]:
    """Metrics of one log that may differ from those of the reference."""
    keys = set()
    if expected["gspo/ratio/std"] is None or expected["gspo/ratio/std"] < 1e-6:
        keys.add("gspo/ratio/length_correlation")  # of rounding
    if case.is_packed or "one_accumulating" in (case.engine, case.reference.engine):
        # TRL averages over micro-batches, and these have other rows: packing moves rows between those of an optimizer
        # step. In one that is packed, the entropy of dead rows is also taken to be that of live ones.
        keys |= {"entropy", "clip_ratio/low_min", "clip_ratio/high_max"}
        if case.unit != "sequence":  # weighted by tokens
            keys |= {"kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
        if case.option == "kl":
            keys.add("kl")
    return keys


def table(folder: Path) -> str:
    """Markdown: for each engine and model, the largest differences of the cases that ran."""
    found, counts = defaultdict(dict), defaultdict(int)
    for path in sorted(folder.glob("*/cases.json")):
        for fields in json.loads(path.read_text()):
            case = Case(*fields)
            if case == case.reference:
                continue
            measured = differences(case, load(folder, case), load(folder, case.reference))
            name = f"{case.engine}{'-lora' * case.is_adapter}-{case.model}"
            counts[name] += 1
            grouped = {key: measured.pop(key) for key in ("weights", "loss", "grad_norm")}
            grouped["metrics"] = max(measured.values())
            for key, value in grouped.items():
                found[name][key] = max(found[name].get(key, 0.0), value)
    lines = ["| cases | number | weights | loss | gradient norm | metrics |", "| --- | --- | --- | --- | --- | --- |"]
    for name, values in sorted(found.items()):
        lines.append(f"| `{name}-*` | {counts[name]} | " + " | ".join(f"{one:.1e}" for one in values.values()) + " |")
    return "\n".join(lines)


def place(case: Case) -> str:
    """Which launch `case` belongs to."""
    engine = ENGINES[case.engine]
    device = "cuda_" * case.engine.startswith("cuda")
    return f"{device}{engine.launched}_launched_on_{engine.machines}"


def load(folder: Path, case: Case) -> list[dict]:
    """The results of all ranks."""
    ranks = range(ENGINES[case.engine].ranks)
    return [torch.load(folder / place(case) / f"{case}.{rank}.pt") for rank in ranks]


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
