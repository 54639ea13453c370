"""`GSPOTrainer`: TRL's `GRPOTrainer`, whose own loss at sequence level is GSPO. Glue, and no copy of that loss."""

import functools
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from transformers import PretrainedConfig

from .config import GSPOConfig
from .diagnostics import RatioStatistics
from .host import GRPOTrainer


class GSPOTrainer(GRPOTrainer):
    """
    Trainer for Group Sequence Policy Optimization, https://huggingface.co/papers/2507.18071.

    Takes the arguments of TRL's `GRPOTrainer`, in the same order; generation, rewards, datasets, PEFT, DeepSpeed and
    checkpoints are TRL's. The loss is the parent's with `importance_sampling_level="sequence"`, which [`GSPOConfig`]
    sets with the rest of what the method needs. Logs `gspo/*` beside TRL's keys (see [`RatioStatistics`]).

    Args:
        args ([`GSPOConfig`] or `GRPOConfig`, *optional*):
            A `GRPOConfig` is converted by [`GSPOConfig.from_grpo`] and left as it is.

    Raises:
        ValueError: before a model is loaded, if the dataset holds too few prompts for one rollout batch; in the loss,
            if advantages are not one for each sequence.

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

    @functools.wraps(GRPOTrainer.__init__)
    def __init__(self, model, reward_funcs=None, args=None, train_dataset=None, *others, **named_others):
        if args is None:
            model_id = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            args = GSPOConfig(f"{model_id.split('/')[-1]}-GSPO")
        elif not isinstance(args, GSPOConfig):
            args = GSPOConfig.from_grpo(args)
        _check_rollout_batch(args, train_dataset)
        super().__init__(model, reward_funcs, args, train_dataset, *others, **named_others)
        if args.disable_dropout:
            for network in filter(None, (self.model, self.ref_model)):
                _disable_functional_dropout(network)
        self._ratio_statistics = {"train": RatioStatistics(), "eval": RatioStatistics()}
        self._per_token_logps = None

    def training_step(self, *args, **kwargs):
        with _config_dropout_off(self.model.config) if self.args.disable_dropout else nullcontext():
            return super().training_step(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        # TRL 1.14 returns the model's dtype, and in bfloat16 the ratio would round to 1.
        logps = logps.float()
        # The parent does not hand its log-probabilities out. The last ones it asks for in the loss are the policy's.
        self._per_token_logps = logps.detach()
        return logps, *others

    def _compute_loss(self, model, inputs):
        advantages = inputs["advantages"]
        if advantages.dim() != 1:
            raise ValueError(
                f"`advantages` must be (B,), one for each sequence, got {tuple(advantages.shape)}: at "
                "`importance_sampling_level='sequence'` the ratio spreads an advantage evenly over the tokens, and "
                "credit for single tokens would be lost."
            )
        loss = super()._compute_loss(model, inputs)
        logps, self._per_token_logps = self._per_token_logps, None
        mask = inputs["completion_mask"]
        self._ratio_statistics["train" if self.model.training else "eval"].update(
            logps,
            inputs.get("old_per_token_logps", logps),
            advantages,
            mask * inputs["tool_mask"] if "tool_mask" in inputs else mask,
            self.epsilon_low,
            self.epsilon_high,
        )
        return loss

    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        statistics = self._ratio_statistics[mode]
        # The reduction needs all ranks. The Trainer's own logs reach all of them and hold a loss; a user's call of
        # `log` may not.
        if statistics and any(key.endswith("loss") for key in logs):
            for name, value in statistics.compute(self.accelerator.gather).items():
                self._metrics[mode][name].append(value)
        super().log(logs, start_time)


def _check_rollout_batch(args: GSPOConfig, train_dataset) -> None:
    """Raises `ValueError` if TRL's sampler, which drops an incomplete rollout batch, would be left without any."""
    prompts = args.generation_batch_size // args.num_generations
    if hasattr(train_dataset, "__len__") and len(train_dataset) < prompts:
        raise ValueError(
            f"`train_dataset` has {len(train_dataset)} prompts, and one rollout batch takes {prompts} "
            f"(per_device_train_batch_size {args.per_device_train_batch_size} x processes {args.world_size} x "
            f"steps_per_generation {args.steps_per_generation} / num_generations {args.num_generations}). Set a "
            "smaller `steps_per_generation` or `per_device_train_batch_size`, or add prompts."
        )


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
