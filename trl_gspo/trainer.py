"""`GSPOTrainer`: TRL's `GRPOTrainer`, whose own loss at sequence level is GSPO. Glue, and no copy of that loss."""

import copy
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)

from .checkpoints import delete_old, fault_of, last_good, list_checkpoints, save, warn_of_space
from .checks import check_before_loading, check_prompt_ids
from .clip_range import ClipRangeController
from .config import GSPOConfig
from .credit import StepCredit, check_advantages, step_kind
from .diagnostics import RatioStatistics, noise_warning
from .host import HAS_FUSED_HEAD, GRPOConfig, GRPOTrainer, disable_gradient_checkpointing, nanstd
from .objective import at_tokens, sum_by_unit, token_log_ratio, turn_ids, unit_ids
from .packing import Cut, Pack, Skip, balance, row_tokens
from .resume import RunState
from .reward_calls import guard
from .routing import RoutingRecorder, changed_slots, find_routers
from .scorer import VISION, Scorer, has_images


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig
    from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc


logger = get_logger(__name__)


class GSPOTrainer(GRPOTrainer):
    """
    Trainer for Group Sequence Policy Optimization, https://huggingface.co/papers/2507.18071.

    Takes the arguments of TRL's `GRPOTrainer`, in the same order; generation, rewards, datasets, PEFT, DeepSpeed and
    checkpoints are TRL's. The loss is the parent's with `importance_sampling_level="sequence"`, which [`GSPOConfig`]
    sets with the rest of what the method needs. Logs `gspo/*` beside TRL's keys (see [`RatioStatistics`]).

    Args:
        args ([`GSPOConfig`] or `GRPOConfig`, *optional*):
            A `GRPOConfig` is converted by [`GSPOConfig.from_grpo`] and left as it is.
        reward_funcs:
            As TRL's; functions marked by [`~trl_gspo.credit.turn_reward`] or [`~trl_gspo.credit.token_reward`] may
            stand among them. Their credit is added to the advantage of the outcome, token by token.
        advantage_func (`Callable`, *optional*):
            Credit of one's own, called once a rollout batch on each rank with its rows, by keyword: `advantages`
            (`(B,)`, group-normalised, or `(B, T)` with step rewards), `rewards` (by function, each `(B,)`, NaN for
            `None`), `completions`, `completion_ids`, `completion_mask` and `tool_mask` (`(B, T)`, `tool_mask` may be
            `None`) and `turn_ids` (`(B, T)`, -1 off trained tokens). Returns advantages, `(B,)` or `(B, T)`.

    Raises:
        ImportError: before a model is loaded, if a package that `args` names is not installed.
        ValueError: before a model is loaded, if data, tokenizer and model do not go together
            ([`~trl_gspo.checks.check_before_loading`]), or step rewards are given at level `"sequence"`; in the loss,
            if advantages at that level are not one for each sequence; in a rollout, if reward functions or
            `advantage_func` return what does not fit.
        TimeoutError: in a rollout, if a reward function takes longer than `reward_timeout`.

    Example:

    ```python
    from datasets import load_dataset
    from trl.rewards import accuracy_reward
    from trl_gspo import GSPOTrainer

    trainer = GSPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "gspo"]
    _name = "GSPO"
    _paper = {
        "title": "Group Sequence Policy Optimization",
        "id": "2507.18071",
        "citation": textwrap.dedent("""\
            @article{zheng2025gspo,
                title        = {{Group Sequence Policy Optimization}},
                author       = {Chujie Zheng and Shixuan Liu and Mingze Li and Xiong-Hui Chen and Bowen Yu and Chang Gao and Kai Dang and Yuqiong Liu and Rui Men and An Yang and Jingren Zhou and Junyang Lin},
                year         = 2025,
                eprint       = {arXiv:2507.18071},
            }"""),  # noqa: E501 - a BibTeX field is one line
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: "RewardFunc | list[RewardFunc] | None" = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        tools: list[Callable] | None = None,
        rollout_func: "RolloutFunc | None" = None,
        environment_factory: "EnvironmentFactory | dict[str, EnvironmentFactory] | None" = None,
        *,
        advantage_func: Callable[..., Tensor] | None = None,
    ) -> None:
        if args is None:
            model_id = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            args = GSPOConfig(f"{model_id.split('/')[-1]}-GSPO")
        elif not isinstance(args, GSPOConfig):
            args = GSPOConfig.from_grpo(args)
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        steps = [getattr(function, "__name__", repr(function)) for function in functions if step_kind(function)]
        if steps and args.importance_sampling_level == "sequence":
            raise ValueError(
                f"The step reward {steps[0]!r} gives credit to single tokens, which "
                "`importance_sampling_level='sequence'` spreads evenly over all of them: set it to 'turn' or "
                "'sequence_token'."
            )
        check_before_loading(model, args, train_dataset, eval_dataset, processing_class)
        if args.disable_dropout and getattr(peft_config, "lora_dropout", 0):
            # Over the fused experts of a mixture PEFT refuses dropout, before there is a model to turn it off in.
            peft_config = copy.copy(peft_config)
            peft_config.lora_dropout = 0.0
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        self.advantage_func = advantage_func
        self._step_credit = StepCredit(self.reward_funcs)
        self.reward_funcs = [
            guard(function, name, args.reward_timeout)
            for function, name in zip(self._step_credit.wrap(self.reward_funcs), self.reward_func_names, strict=True)
        ]
        if args.disable_dropout:
            for network in filter(None, (self.model, self.ref_model)):
                _disable_functional_dropout(network)
        self._ratio_statistics = {mode: RatioStatistics(args.use_rollout_logps) for mode in ("train", "eval")}
        self._per_token_logps = self._loss_inputs = self._loss_mask = None
        self._rollout_step, self._max_units, self._warned_of_noise = 0, {}, False
        self._scorer = Scorer(
            super()._get_per_token_logps_and_entropies,
            reason=_why_whole(args),
            is_half=self.accelerator.mixed_precision != "no" or self.model.dtype != torch.float32,
            routing=RoutingRecorder(find_routers(self.model)) if args.log_expert_change else None,
        )
        self._is_new_rollout = self._awaits_old = self._said_way = False
        self._experts = self._mean_entropy = None
        self._train_sampler, self._is_restored, self._is_loaded_in_part = None, False, False
        self._run_state = RunState(self)
        self.add_callback(self._run_state)
        if args.clip_fraction_target is not None:
            self.add_callback(
                ClipRangeController(
                    self.epsilon_low,
                    self.epsilon_high,
                    args.clip_fraction_target,
                    args.clip_epsilon_min,
                    args.clip_epsilon_max,
                )
            )
        if args.importance_sampling_level != "sequence":
            self.importance_sampling_level = "token"  # of the parent's loss: see `_as_gspo_token`

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As the parent's, and exact where it resumes: [`~trl_gspo.resume.RunState`] says what comes back.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint, or `True` for the newest one in
                `output_dir` that is whole and was not saved near an alarm of the health watch.

        Raises:
            ValueError: if the checkpoint is not whole, or there is none.
            SavingError: if a checkpoint cannot be written. Those before it are as they were.
        """
        if resume_from_checkpoint is True:
            checkpoints = list_checkpoints(self.args.output_dir)
            good = last_good(checkpoints)
            if good is None:
                raise ValueError(f"`output_dir={self.args.output_dir}` holds no checkpoint to resume from.")
            for path in checkpoints[: checkpoints.index(good)]:
                logger.warning(f"{path} is passed over: {fault_of(path) or 'it was saved near an alarm'}.")
            resume_from_checkpoint = str(good)
        elif resume_from_checkpoint:
            fault = fault_of(resume_from_checkpoint)
            if fault is not None:
                raise ValueError(f"`resume_from_checkpoint={resume_from_checkpoint}` is not whole: {fault}.")
        self._run_state.checkpoint = resume_from_checkpoint or None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        self._is_loaded_in_part = bool(load_result.missing_keys and load_result.unexpected_keys)
        if not self._is_loaded_in_part:
            super()._issue_warnings_after_load(load_result)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_the_rest(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_the_rest(self.state.best_model_checkpoint)

    def _load_the_rest(self, checkpoint: str) -> None:
        """
        Loads weights that have other names in a file than in the model. transformers saves the experts of a mixture
        one by one, has them in one tensor in the model, and does not translate where it resumes (transformers#48805):
        the run would go on with the experts that it began with.
        """
        if self._is_loaded_in_part:
            self._is_loaded_in_part = False
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            model.load_state_dict(type(model).from_pretrained(checkpoint, dtype="auto").state_dict())

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, *args: Any) -> tuple:
        # A checkpoint that is the end of its run: transformers would train a step more before it looks.
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, *args)

    def _get_train_sampler(self, *args: Any) -> Any:
        self._train_sampler = super()._get_train_sampler(*args)
        return self._train_sampler

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = self._get_output_dir(trial=trial)
        folder = Path(output_dir, f"checkpoint-{self.state.global_step}")
        write_host = super()._save_checkpoint

        def write() -> None:
            write_host(model, trial)
            self._run_state.save(folder)

        # transformers would delete an old checkpoint before this one is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            save(folder, write, self.accelerator, self.args.should_save, self._run_state.options())
        finally:
            self.args.save_total_limit = limit
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(folder))
        if self.args.should_save:
            if limit:
                delete_old(output_dir, self.state.global_step, limit, self.state.best_model_checkpoint)
            warn_of_space(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Leaves it to `_save_checkpoint`: what is pushed must not say that it is being written."""

    @property
    def _clip_range(self) -> ClipRangeController | None:
        # Not an attribute: transformers makes new callbacks of the old where it restores them from a checkpoint.
        controllers = (call for call in self.callback_handler.callbacks if isinstance(call, ClipRangeController))
        return next(controllers, None)

    def _generate(self, prompts: list) -> tuple:
        rollout = super()._generate(prompts)
        _, completion_ids, tool_mask, self._completions, *_ = rollout
        if self._step_credit.kinds:
            self._step_credit.begin(completion_ids, tool_mask)
        return rollout

    def _tokenize_prompts(self, prompts: list) -> tuple:
        tokenized = super()._tokenize_prompts(prompts)
        if not self._is_vlm:
            check_prompt_ids(tokenized[0], self.model.config, self.args)
        return tokenized

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        # TRL normalises outcomes of the functions that gave one: a step reward is none.
        outcomes = self._rewards_per_func.clone()
        outcomes[:, list(self._step_credit.kinds)] = torch.nan
        return outcomes

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._find_way()
        self._awaits_old, self._experts = self._has_old_logps, None
        output = super()._generate_and_score_completions(inputs)
        self._is_new_rollout = True
        if self.args.use_rollout_logps and "old_per_token_logps" in output:
            if "sampling_per_token_logps" not in output:
                raise ValueError(
                    "`use_rollout_logps=True` needs a rollout engine that returns the log-probabilities of what it "
                    "samples, and transformers' generation does not: set `use_vllm=True`, give a `rollout_func`, or "
                    "set `use_rollout_logps=False`."
                )
            output["old_per_token_logps"] = output["sampling_per_token_logps"]
        if self._experts is not None:
            output["old_experts"] = self._experts
        mask = _trained_tokens(output)
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._rollout_step = self.state.global_step
        rewards = self._rewards_per_func
        is_unscored = rewards.isnan().all(1) | rewards.isinf().any(1)
        self._metrics[mode]["gspo/unscored_fraction"].append(is_unscored.float().mean().item())
        if self._step_credit.kinds:
            num_generations = self.num_generations if mode == "train" else self.num_generations_eval
            credit = self._step_credit.advantages(
                self.reward_weights,
                mask.size(1),
                num_generations,
                self.scale_rewards,
                self.args.step_discount,
                self.accelerator.gather,
                self.accelerator.process_index,
                mask.device,
            )
            output["advantages"] = (output["advantages"].unsqueeze(1) + credit).float()
            self._log_step_rewards(mode, num_generations)
        if self.advantage_func is not None:
            rank = self.accelerator.process_index
            rewards = self._rewards_per_func[rank * len(mask) : (rank + 1) * len(mask)]
            output["advantages"] = check_advantages(
                self.advantage_func(
                    advantages=output["advantages"],
                    rewards=dict(zip(self.reward_func_names, rewards.unbind(1), strict=True)),
                    completions=self._completions,
                    completion_ids=output["completion_ids"],
                    completion_mask=output["completion_mask"],
                    tool_mask=output.get("tool_mask"),
                    turn_ids=turn_ids(mask),
                ),
                mask,
            )
        return output

    def _log_step_rewards(self, mode: str, num_generations: int) -> None:
        """Puts the totals of step rewards into TRL's logs, which saw no outcome of those functions."""
        rewards, metrics = self._rewards_per_func, self._metrics[mode]
        for index in self._step_credit.kinds:
            name, column = self.reward_func_names[index], rewards[:, index]
            metrics[f"rewards/{name}/mean"][-1] = column.nanmean().item()
            metrics[f"rewards/{name}/std"][-1] = nanstd(column).item()
            table = self._logs["rewards"][name]
            for _ in range(min(len(column), len(table))):
                table.pop()
            table.extend(column.tolist())
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        total[rewards.isnan().all(1)] = torch.nan
        metrics["reward"][-1] = total.nanmean().item()
        metrics["reward_std"][-1] = nanstd(total).item()
        spread = nanstd(total.view(-1, num_generations), dim=1)
        metrics["frac_reward_zero_std"][-1] = torch.isclose(spread, torch.zeros_like(spread)).float().mean().item()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with _config_dropout_off(self.model.config) if self.args.disable_dropout else nullcontext():
            loss = super().training_step(*args, **kwargs)
        if self._clip_range is not None and self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            # With the last micro-batch of a rollout batch, and so before a checkpoint at its end.
            self._clip_range.update(self.accelerator.gather, self._pad_units)
        return loss

    def _pad_units(self, units: Tensor) -> Tensor:
        # Ranks have as many sequences, but not as many turns.
        if self.args.importance_sampling_level != "turn":
            return units
        return self.accelerator.pad_across_processes(units, dim=0, pad_index=-1)

    @property
    def _has_old_logps(self) -> bool:
        """Whether TRL scores a rollout with the weights that sampled it: where one is trained on in several steps."""
        generate_every = self.args.steps_per_generation * self.num_iterations
        is_corrected = self.use_vllm and self.args.vllm_importance_sampling_correction
        return self.args.gradient_accumulation_steps % generate_every != 0 or is_corrected

    def _find_way(self) -> None:
        if self._scorer.way is None:
            self._scorer.prove(self.model)
        if not self._said_way:
            self._said_way = True
            way = {
                "packed": "only live tokens go through the model, packed without padding",
                "cut": "rows are not packed, and padding is cut in each micro-batch",
                "whole": "all tokens go through the model, padding and dead sequences too",
            }[self._scorer.way]
            is_expected = self._scorer.way == "packed" or not self.args.pack_live_tokens
            log = logger.info if is_expected else logger.warning
            log(f"Loss step: {way} ({self._scorer.reason}).")

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self._is_restored and self.model.training:
            self._is_restored = False
            self._find_way()
            if self._scorer.way != "whole":
                self._lay_out(self._buffered_inputs, scores=False)
        inputs = super()._prepare_inputs(generation_batch)
        if not self._is_new_rollout:
            return inputs
        self._is_new_rollout = False
        batches = self._buffered_inputs if self.model.training else [inputs]
        if self._scorer.way != "whole":
            if self.model.training:
                batches = self._buffered_inputs = self._balanced(batches)
                inputs = batches[self._step % self.args.steps_per_generation]
            self._lay_out(batches)
        if self.args.importance_sampling_level == "turn":
            # On the host once a rollout, so that the statistics keep no slots for turns that no row has.
            most = max(int(turn_ids(_trained_tokens(batch)).max()) + 1 for batch in batches)
            self._max_units[self.model.training] = max(most, 1)
        return inputs

    def _balanced(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Moves rows between the micro-batches of an optimizer step, on all ranks, so that each has about as many tokens
        to score: a step lasts as long as its slowest rank. The rows of an optimizer step stay those that TRL drew.
        """
        steps, ranks = self.args.gradient_accumulation_steps, self.accelerator.num_processes
        # Means and quantiles over the tokens of a micro-batch are in these losses: which rows stand together matters.
        is_of_micro_batch = self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0 or self.aux_loss_enabled
        if steps * ranks == 1 or len(batches) % steps or is_of_micro_batch or has_images(batches[0]):
            return batches
        size, windows = len(batches[0]["completion_ids"]), len(batches) // steps
        names = sorted(name for name, value in batches[0].items() if torch.is_tensor(value) and value.dim())
        rows = {name: self._of_all_ranks(name, torch.cat([batch[name] for batch in batches])) for name in names}
        lengths = row_tokens(_attention_mask(rows).cpu(), self._wanted(rows).cpu())
        balanced = []
        for window in range(windows):
            members = [
                (other * windows + window) * steps * size + row
                for other in range(ranks)
                for row in range(steps * size)
            ]
            order = balance([lengths[row] for row in members], steps * ranks)
            # The fullest first: of about as many tokens on all ranks at each forward.
            for part in range(self.accelerator.process_index, steps * ranks, ranks):
                mine = [members[place] for place in order[part * size : (part + 1) * size]]
                balanced.append(batches[0] | {name: value[mine] for name, value in rows.items()})
        return balanced

    def _of_all_ranks(self, name: str, rows: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return rows
        is_prompt, is_bool = name.startswith("prompt"), rows.dtype == torch.bool
        padding = self._tokenizer.pad_token_id if name in ("prompt_ids", "completion_ids") else 0
        rows = rows.to(torch.uint8) if is_bool else rows
        rows = self.accelerator.pad_across_processes(rows, dim=1, pad_index=padding, pad_first=is_prompt)
        rows = self.accelerator.gather(rows.contiguous())
        return rows.bool() if is_bool else rows

    @torch.no_grad()
    def _lay_out(self, batches: list[dict[str, Any]], scores: bool = True) -> None:
        """
        Decides what of each micro-batch goes through the model, and scores just that under the policy that sampled,
        unless a checkpoint brought the scores.

        TRL scores a whole rollout batch, before there are advantages. Here the same tokens in the same order give the
        old log-probabilities and, before the first update, the new ones: in half precision, another shape of the
        batch alone moves the ratio past the clip range.
        """
        layouts, entropies = [self._layout(batch) for batch in batches], []
        # The backward pass of a stub writes a 0 for each weight: dear, and for other processes that wait for it alone.
        is_alone = self.accelerator.distributed_type == DistributedType.NO and not self.aux_loss_enabled
        for batch, layout in zip(batches, layouts, strict=True):
            if is_alone and layout is not None and layout.is_stub:
                layout = Skip()
            batch["layout"] = layout
            if not scores or not self._has_old_logps or self.args.use_rollout_logps:
                continue
            with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                logps, entropy, _, experts = self._scorer(
                    self.model,
                    _input_ids(batch),
                    _attention_mask(batch),
                    batch["completion_ids"].size(1),
                    layout,
                    compute_entropy=True,
                    records=self.args.log_expert_change and self.model.training,
                    **_image_arguments(batch),
                )
            batch["old_per_token_logps"] = _at_least_float32(logps)
            if experts is not None:
                batch["old_experts"] = experts
            if layout is not None and not layout.is_stub:
                entropies.append(entropy.mean())
        if scores:
            # Of all ranks: one may have no live row.
            total = torch.stack(entropies).sum() if entropies else torch.zeros((), device=self.accelerator.device)
            total = torch.stack([total, torch.full_like(total, len(entropies))])
            total = self.accelerator.reduce(total, reduction="sum")
            if total[1] > 0:
                self._mean_entropy = total[0] / total[1]
        steps = self.args.gradient_accumulation_steps
        steps = steps if len(batches) % steps == 0 else 1
        for first in range(0, len(batches) if self.model.training else 0, steps):
            # An optimizer that finds no gradient does nothing, one that finds 0 decays weights and moments, as TRL's.
            if all(isinstance(batch["layout"], Skip) for batch in batches[first : first + steps]):
                batches[first]["layout"] = layouts[first]

    def _layout(self, inputs: dict[str, Any]) -> Pack | Cut | None:
        if self._scorer.way == "whole":
            return None
        needs_all = self.aux_loss_enabled  # the loss of the routers is of all tokens
        return self._scorer.layout(_attention_mask(inputs), self._wanted(inputs), has_images(inputs), needs_all)

    def _wanted(self, inputs: dict[str, Any]) -> Tensor:
        """`(B, T)`, bool: tokens whose log-probability or entropy the loss needs."""
        of_every_row = self.beta != 0.0 or self.top_entropy_quantile < 1.0
        if of_every_row or self._entropy_bonus_enabled or self.aux_loss_enabled:
            return _trained_tokens(inputs).bool()
        # The off-policy mask is of whole sequences.
        is_masked = self.off_policy_mask_threshold is not None
        return _live_tokens(inputs, "sequence" if is_masked else self.args.importance_sampling_level)

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **kwargs: Any
    ) -> tuple:
        if self._loss_inputs is not None:
            return self._score_for_loss(model, input_ids, attention_mask, logits_to_keep, **kwargs)
        is_old, self._awaits_old = self._awaits_old, False
        is_whole = self._scorer.way == "whole"
        is_corrected = self.use_vllm and self.args.vllm_importance_sampling_correction
        if is_old and not is_corrected and (self.args.use_rollout_logps or not is_whole):
            # Others take their place: the engine's, or those of `_lay_out`.
            return torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device), None, None
        is_packed = self._scorer.way == "packed" and not has_images(kwargs)
        # TRL's chunks, and so as many forwards on each rank. Rows that are not packed it takes apart itself.
        size = kwargs.pop("batch_size", None) if is_packed else None
        records = is_old and is_whole and self.args.log_expert_change and self.model.training
        logps = []
        for rows in torch.arange(len(input_ids)).split(size or len(input_ids)):
            mask = attention_mask[rows]
            layout = self._scorer.layout(mask, mask[:, -logits_to_keep:], has_images(kwargs), not is_packed)
            scored = self._scorer(model, input_ids[rows], mask, logits_to_keep, layout, records=records, **kwargs)
            logps.append(scored[0])
        if records:
            self._experts = scored[-1]
        return _at_least_float32(torch.cat(logps)), None, None

    def _score_for_loss(self, model: nn.Module, *arguments: Any, **kwargs: Any) -> tuple:
        inputs = self._loss_inputs
        old = inputs.get("old_per_token_logps")
        logps, entropies, aux_loss, self._experts = self._scorer(
            model,
            *arguments,
            inputs["layout"],
            logps=old if old is None else old.nan_to_num(nan=0.0),
            entropy=self._mean_entropy,
            records="old_experts" in inputs,
            **kwargs,
        )
        logps = _at_least_float32(logps)
        if self.args.use_rollout_logps and old is not None:
            inputs["old_per_token_logps"] = torch.where(old.isnan(), logps.detach().to(old.dtype), old)
        self._old_per_token_logps = inputs.get("old_per_token_logps", logps.detach())
        # The parent does not hand its log-probabilities out, and reads the old ones after it has these.
        self._per_token_logps = logps.detach()
        if self.args.importance_sampling_level != "sequence":
            logps = self._as_gspo_token(logps)
        return logps, entropies, aux_loss

    def _as_gspo_token(self, logps: Tensor) -> Tensor:
        """
        Makes the parent's token-level loss GSPO-token, and returns the log-probabilities for it.

        The parent takes `exp(logp - old)` at each token. With `old = sg[logp] - sg[log s]`, `s` the ratio of the
        token's unit, that is `s_t` of GSPO-token: the unit's value, the token's gradient. In float64, because the
        difference of the two would lose a log-ratio of 1e-4 to float32's rounding.
        """
        inputs = self._loss_inputs
        true_old = inputs.get("old_per_token_logps", logps.detach())
        # The off-policy mask falls back on the old log-probabilities, and must see the true ones.
        inputs.setdefault("sampling_per_token_logps", true_old)
        log_ratio = token_log_ratio(logps.detach(), true_old, self._loss_mask, self.args.importance_sampling_level)
        logps = logps.to(log_ratio.dtype)
        inputs["old_per_token_logps"] = logps.detach() - log_ratio
        return logps

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        mask = _trained_tokens(inputs)
        level = self.args.importance_sampling_level
        if level == "sequence" and inputs["advantages"].dim() != 1:
            raise ValueError(
                f"`advantages` must be (B,), one for each sequence, got {tuple(inputs['advantages'].shape)}: at "
                "`importance_sampling_level='sequence'` the ratio spreads an advantage evenly over the tokens, and "
                "credit for single tokens would be lost. Set it to 'sequence_token' or 'turn'."
            )
        controller = self._clip_range
        if controller is not None:
            self.epsilon_low, self.epsilon_high = controller.epsilon_low, controller.epsilon_high
        self._find_way()
        self._loss_inputs, self._loss_mask = dict(inputs), mask
        if "layout" not in inputs:
            self._loss_inputs["layout"] = self._layout(inputs)
        try:
            loss = super()._compute_loss(model, self._loss_inputs)
            logps, old_logps = self._per_token_logps, self._old_per_token_logps
        finally:
            self._loss_inputs = self._loss_mask = self._per_token_logps = self._old_per_token_logps = None
        expert_changes = None
        if "old_experts" in inputs:
            is_compared = _live_tokens(inputs, level)
            expert_changes = torch.stack(changed_slots(self._experts, inputs["old_experts"], is_compared))
        self._experts = None
        is_training = self.model.training
        rows = self._ratio_statistics["train" if is_training else "eval"].update(
            logps,
            old_logps,
            inputs["advantages"],
            mask,
            self.epsilon_low,
            self.epsilon_high,
            level,
            minibatch=self.state.global_step - self._rollout_step if is_training else 0,
            max_units=self._max_units.get(is_training),
            expert_changes=expert_changes,
        )
        if controller is not None and is_training:
            controller.observe(rows)
        return loss if level == "sequence" else loss.float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        statistics = self._ratio_statistics[mode]
        # The reduction needs all ranks. The Trainer's own logs reach all of them and hold a loss; a user's call of
        # `log` may not.
        if statistics and any(key.endswith("loss") for key in logs):
            self._log_ratio(mode, statistics.compute(self.accelerator.gather, self._pad_units))
        super().log(logs, start_time)

    def _log_ratio(self, mode: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        # Without a controller too: whoever reads the logs of a run sees its clip range in them.
        self._metrics[mode]["gspo/epsilon_low"].append(self.epsilon_low)
        self._metrics[mode]["gspo/epsilon_high"].append(self.epsilon_high)
        message = noise_warning(metrics, self.epsilon_low, self.epsilon_high)
        if mode == "train" and message is not None and not self._warned_of_noise:
            logger.warning(message)
            self._warned_of_noise = True
        if "wandb" in self.args.report_to and self.accelerator.is_main_process:
            _log_histogram(mode, self._ratio_statistics[mode].ratios)


def _log_histogram(mode: str, ratios: np.ndarray) -> None:
    import wandb

    ratios = ratios[np.isfinite(ratios)]
    if wandb.run is not None and len(ratios):
        # Not committed: the Trainer's own log of this step follows, and carries the step that they share.
        histogram = wandb.Histogram(np_histogram=np.histogram(ratios, bins=64))
        wandb.log({f"{mode}/gspo/ratio/histogram": histogram}, commit=False)


def _trained_tokens(inputs: dict[str, Any]) -> Tensor:
    """`(B, T)`, 1 on the tokens that the model wrote and trains on: not on padding, nor on tools' answers."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _live_tokens(inputs: dict[str, Any], level: str) -> Tensor:
    """`(B, T)`, bool: the trained tokens of live units."""
    mask, advantages = _trained_tokens(inputs).bool(), inputs["advantages"]
    has_gradient = (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages) != 0
    ids, units = unit_ids(mask, level)
    return at_tokens(sum_by_unit((has_gradient & mask).long(), ids, units), ids) > 0


def _input_ids(inputs: dict[str, Any]) -> Tensor:
    return torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)


def _attention_mask(inputs: dict[str, Any]) -> Tensor:
    return torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)


def _image_arguments(inputs: dict[str, Any]) -> dict[str, Any]:
    names = (*VISION, "num_images", "num_tiles", "spatial_shapes")
    return {name: inputs[name] for name in names if inputs.get(name) is not None}


def _at_least_float32(logps: Tensor) -> Tensor:
    # TRL 1.14 returns the model's dtype, and in bfloat16 the ratio would round to 1.
    return logps.to(torch.promote_types(logps.dtype, torch.float32))


def _why_whole(args: GSPOConfig) -> str | None:
    """Why all tokens have to go through the model, if something says so before it is asked."""
    if not args.pack_live_tokens:
        return "`pack_live_tokens=False`"
    if not HAS_FUSED_HEAD:
        return "TRL 1.15 is the first whose head takes packed rows"
    if args.torch_compile:
        return "`torch_compile=True` would compile anew for each length"
    return None


@contextmanager
def _config_dropout_off(config: PretrainedConfig) -> Iterator[None]:
    # Some models, Falcon and Persimmon among them, read a dropout from their config in each forward. It is put back
    # because the config is saved with the model.
    config = config.get_text_config()
    found = {
        name: value
        for name, value in vars(config).items()
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float)
    }
    vars(config).update(dict.fromkeys(found, 0.0))
    try:
        yield
    finally:
        vars(config).update(found)


def _disable_functional_dropout(model: nn.Module) -> None:
    # TRL's `disable_dropout` reaches `nn.Dropout`. Attention dropout is a plain number in the attention module, which
    # transformers hands to the kernel in train mode, where it moves the ratio as any other dropout does.
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
