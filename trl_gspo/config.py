"""`GSPOConfig`: TRL's `GRPOConfig` with GSPO's defaults, what is refused, and what is warned of."""

import copy
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from accelerate.logging import get_logger

from .host import GRPOConfig
from .objective import EPSILON_HIGH, EPSILON_LOW, LEVELS, check_epsilon
from .secrets import is_secret, placeholder, without_secrets


logger = get_logger(__name__)

# Minibatches for each rollout batch: GSPO, section 5.1.
MINIBATCHES_PER_ROLLOUT = 4

# The spread of the sequence ratio falls with the square root of the length. Above both of these a clip range is a
# token-level one, and never clips.
_WIDE_EPSILON = 0.01
_LONG_COMPLETION = 128

_LOSS_TYPES = ("grpo", "luspo")
_REFUSED_LOSS_TYPES = {
    "dapo": "divides by the tokens of the batch, which weights each sequence by its length",
    "bnpo": "divides by the tokens of the batch, which weights each sequence by its length",
    "dr_grpo": "divides by a constant number of tokens, which weights each sequence by its length",
    "cispo": "clips the weight of a policy gradient, not the objective",
    "sapo": "replaces the clip with a soft gate for each token",
    "vespo": "replaces the clip with a weight on the product of the token ratios, not on their geometric mean",
}

# Read by TRL under the loss types that are refused here, and by nothing else.
_FOREIGN_LOSS_FIELDS = (
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "vespo_k_neg",
    "vespo_k_pos",
    "vespo_lambda_neg",
    "vespo_lambda_pos",
)

# What a host's `__post_init__` derives one field from, where the inherited other would undo a change of the one.
_IMPLIED_BY = {
    "activation_checkpointing": ("gradient_checkpointing",),
    "activation_checkpointing_kwargs": ("gradient_checkpointing_kwargs",),
    "gradient_checkpointing": ("activation_checkpointing",),
    "gradient_checkpointing_kwargs": ("activation_checkpointing_kwargs",),
    "torch_compile": ("torch_compile_backend", "torch_compile_mode"),
    "use_transformers_continuous_batching": ("use_transformers_paged",),
    "vllm_importance_sampling_clip_max": ("vllm_importance_sampling_cap",),
}


def _shown(value: Any) -> str:
    return repr(without_secrets(value))


def _trl_default(name: str) -> Any:
    return GRPOConfig.__dataclass_fields__[name].default


@dataclass
class GSPOConfig(GRPOConfig):
    r"""
    Configuration of [`GSPOTrainer`].

    All parameters of TRL's `GRPOConfig`, of which only the defaults below change. The paper is Group Sequence Policy
    Optimization, https://huggingface.co/papers/2507.18071.

    Parameters:
        importance_sampling_level (`str`, *optional*, defaults to `"sequence"`):
            Unit of the importance ratio, the geometric mean of the token ratios over it. `"sequence"`: the completion
            (equation 7 of the paper), with one advantage for each. `"sequence_token"`: the same value with each
            token's own gradient (GSPO-token, equation 14), for advantages that differ from token to token. `"turn"`:
            one ratio, clip decision and length normaliser for each turn that the model wrote between the answers of
            tools or an environment.
        loss_type (`str`, *optional*, defaults to `"grpo"`):
            How sequences are averaged. `"grpo"`: each sequence counts the same (equation 5 of the paper). `"luspo"`:
            each sequence is weighted by its length on purpose (https://huggingface.co/papers/2602.05261).
        epsilon (`float`, *optional*, defaults to `3e-4`):
            Width of the clip range of the sequence ratio below 1 (section 5.1 of the paper). Completions of a few
            tokens need a wider one: the spread of the ratio falls with the square root of the length.
        epsilon_high (`float` or `None`, *optional*, defaults to `4e-4`):
            Width of the clip range above 1 (section 5.1 of the paper). `None` takes `epsilon`.
        beta (`float`, *optional*, defaults to `0.0`):
            KL coefficient. The objective of the paper (equation 5) is stated without a KL term; as in TRL, the
            reference model is then not loaded.
        steps_per_generation (`int`, *optional*):
            Micro-batches for each rollout batch. If neither it nor `generation_batch_size` is set, four times
            `gradient_accumulation_steps`, so that a rollout batch gives four optimizer steps (section 5.1 of the
            paper). With one optimizer step the ratio is exactly 1 and nothing is ever clipped.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to turn dropout off. Under dropout the same weights give other log-probabilities on each forward,
            which moves the ratio past the clip range (section 5.1 of the paper) before any update.
        step_discount (`float`, *optional*, defaults to `1.0`):
            Discount of step rewards for each step between a token and the reward, in (0, 1]. DeepSeekMath
            (https://huggingface.co/papers/2402.03300, section 4.1.3) has 1.
        clip_fraction_target (`float` or `None`, *optional*):
            Share of the live sequences (turns, at level `"turn"`) to be clipped, over all minibatches of a rollout
            batch. If set, `epsilon` and `epsilon_high` are where the clip range starts, and it is moved after each
            rollout batch ([`~trl_gspo.clip_range.ClipRangeController`]). 0.15 is about what the paper reports.
        clip_epsilon_min (`float`, *optional*, defaults to `1e-6`):
            Least width that `clip_fraction_target` gives either side of the clip range.
        clip_epsilon_max (`float`, *optional*, defaults to `0.5`):
            Largest width that `clip_fraction_target` gives either side of the clip range.
        pack_live_tokens (`bool`, *optional*, defaults to `True`):
            Whether only tokens that carry gradient go through the model in the loss step, packed without padding:
            the same loss and gradient for less. `False` runs it on padding and on sequences with advantage 0 too, as
            TRL does.
        use_rollout_logps (`bool`, *optional*, defaults to `False`):
            Whether the log-probabilities that the rollout engine returned with what it sampled (vLLM, or a
            `rollout_func`) are the old ones (section 5.4 of the paper), in place of a forward of the model over each
            rollout. The mismatch between the two then counts as drift of the policy; `gspo/rollout_logp_difference`
            measures it. A token that the engine gave no value counts as not drifted.
        log_expert_change (`bool`, *optional*, defaults to `False`):
            Whether to log `gspo/expert_change_fraction`: for a mixture of experts, the share of routed experts that
            differ between the old policy and the one in training, on the same tokens.
        reward_timeout (`float`, *optional*, defaults to `1500.0`):
            Seconds that one call of one reward function, for one rollout batch, may take before the run ends with an
            error that names it ([`~trl_gspo.reward_calls.guard`]). Infinity for no limit. 25 minutes, because after 30
            (`ddp_timeout`) torch ends the ranks that wait for this one, with an error that names nobody.

    Raises:
        ImportError: if `deepspeed` is set and not installed.
        ValueError: if an epsilon is not finite or not in (0, 1), if `step_discount` is not in (0, 1], if `loss_type`
            or `importance_sampling_level` is not GSPO's, if an option is set that only a refused loss type reads;
            if `num_generations` is below 2, or `reward_timeout` not above 0;
            if `clip_fraction_target` is not in (0, 1), or is set where the ratio is always 1; if `use_rollout_logps`
            and vLLM's correction, which needs the model's own, are both on.
    """

    importance_sampling_level: str = field(
        default="sequence",
        metadata={
            "help": "Unit of the importance ratio. 'sequence': the geometric mean of the token ratios, one value for "
            "each completion (GSPO paper, equation 7). 'sequence_token': the same value with each token's own "
            "gradient (GSPO-token, equation 14). 'turn': one value for each turn of the model."
        },
    )
    loss_type: str = field(
        default="grpo",
        metadata={
            "help": "How sequences are averaged. 'grpo': each sequence counts the same (GSPO paper, equation 5). "
            "'luspo': each sequence is weighted by its length on purpose "
            "(https://huggingface.co/papers/2602.05261). The others are refused."
        },
    )
    epsilon: float = field(
        default=EPSILON_LOW,
        metadata={
            "help": "Width of the clip range of the sequence ratio below 1 (GSPO paper, section 5.1: 3e-4). "
            "Completions of a few tokens need a wider one."
        },
    )
    epsilon_high: float | None = field(
        default=EPSILON_HIGH,
        metadata={
            "help": "Width of the clip range of the sequence ratio above 1 (GSPO paper, section 5.1: 4e-4). None "
            "takes `epsilon`."
        },
    )
    beta: float = field(
        default=0.0,
        metadata={
            "help": "KL coefficient. The objective of the GSPO paper (equation 5) is stated without a KL term; the "
            "reference model is then not loaded."
        },
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "Micro-batches for each rollout batch. If neither it nor `generation_batch_size` is set, four "
            "times `gradient_accumulation_steps`: four optimizer steps a rollout (GSPO paper, section 5.1). With one "
            "optimizer step the ratio is exactly 1."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Whether to turn dropout off. Dropout alone moves the sequence ratio past the clip range (GSPO "
            "paper, section 5.1: 3e-4 and 4e-4)."
        },
    )

    step_discount: float = field(
        default=1.0,
        metadata={
            "help": "Discount of step rewards for each step between a token and the reward, in (0, 1]. 1 as in "
            "DeepSeekMath, section 4.1.3 (https://huggingface.co/papers/2402.03300)."
        },
    )
    clip_fraction_target: float | None = field(
        default=None,
        metadata={
            "help": "Share of the live sequences to be clipped over a rollout batch. If set, the clip range starts at "
            "`epsilon` and `epsilon_high` and is moved to it. The GSPO paper reports about 0.15."
        },
    )
    clip_epsilon_min: float = field(
        default=1e-6,
        metadata={"help": "Least width that `clip_fraction_target` gives either side of the clip range."},
    )
    clip_epsilon_max: float = field(
        default=0.5,
        metadata={"help": "Largest width that `clip_fraction_target` gives either side of the clip range."},
    )
    pack_live_tokens: bool = field(
        default=True,
        metadata={
            "help": "Whether only tokens that carry gradient go through the model in the loss step, packed without "
            "padding. False runs it on padding and on sequences with advantage 0 too, as TRL does."
        },
    )
    use_rollout_logps: bool = field(
        default=False,
        metadata={
            "help": "Whether the log-probabilities that the rollout engine returned with what it sampled are the old "
            "ones (GSPO paper, section 5.4). Saves the forward that scores each rollout; the mismatch between engine "
            "and model then counts as drift of the policy, and is logged."
        },
    )
    log_expert_change: bool = field(
        default=False,
        metadata={
            "help": "Whether to log `gspo/expert_change_fraction`, for a mixture of experts: the share of routed "
            "experts that differ between the old policy and the one in training."
        },
    )
    reward_timeout: float = field(
        default=1500.0,
        metadata={
            "help": "Seconds that one call of one reward function, for one rollout batch, may take before the run "
            "ends with an error that names it; inf for no limit."
        },
    )

    def __post_init__(self):
        self._refuse()
        if self.steps_per_generation is None and self.generation_batch_size is None:
            self.steps_per_generation = MINIBATCHES_PER_ROLLOUT * self.gradient_accumulation_steps
        super().__post_init__()
        self._refuse_additions()
        for message in self._doubts():
            logger.warning_once(message)

    def _refuse(self) -> None:
        """Raises `ValueError` for what is not GSPO, and `ImportError` for what is not installed."""
        check_epsilon("epsilon", self.epsilon)
        if self.epsilon_high is not None:
            check_epsilon("epsilon_high", self.epsilon_high)
        if self.loss_type not in _LOSS_TYPES:
            reason = _REFUSED_LOSS_TYPES.get(self.loss_type, "is not known")
            raise ValueError(
                f"`loss_type={self.loss_type!r}` is refused: it {reason}. GSPO averages over sequences: set "
                "`loss_type='grpo'`, or `'luspo'` to weight by length on purpose."
            )
        if self.importance_sampling_level not in LEVELS:
            reason = "is GRPO" if self.importance_sampling_level == "token" else "is not known"
            raise ValueError(
                f"`importance_sampling_level={self.importance_sampling_level!r}` is refused: it {reason}. Set it to "
                f"one of {', '.join(map(repr, LEVELS))}, or use TRL's `GRPOTrainer`."
            )
        is_number = isinstance(self.step_discount, (int, float)) and not isinstance(self.step_discount, bool)
        if not (is_number and 0 < self.step_discount <= 1):
            raise ValueError(f"`step_discount` must be a number in (0, 1], got {self.step_discount!r}.")
        if self.deepspeed and importlib.util.find_spec("deepspeed") is None:
            raise ImportError(
                "`deepspeed` is set, and DeepSpeed is not installed: `pip install deepspeed`, or take a configuration "
                "without it."
            )
        if self.hub_token == placeholder("hub_token"):
            raise ValueError(
                f"`hub_token={self.hub_token!r}` is what logs show in place of a token: give the token itself, or "
                "none and set `HF_TOKEN`."
            )
        for name in (
            "gradient_accumulation_steps",
            "steps_per_generation",
            "num_iterations",
            "per_device_train_batch_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value!r}.")
        if self.num_generations < 2:
            raise ValueError(
                f"`num_generations={self.num_generations}` is refused: the advantage of a completion is against the "
                "others of its group, so a group has at least 2. The default is 8."
            )
        is_number = isinstance(self.reward_timeout, (int, float)) and not isinstance(self.reward_timeout, bool)
        if not (is_number and self.reward_timeout > 0):
            raise ValueError(
                f"`reward_timeout` must be a number of seconds above 0, got {self.reward_timeout!r}; infinity (`.inf` "
                "in YAML) for no limit."
            )
        for name in _FOREIGN_LOSS_FIELDS:
            if getattr(self, name) != _trl_default(name):
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is refused: only `loss_type={name.split('_')[0]!r}` reads it, "
                    "which is not GSPO. Remove it."
                )

    def _refuse_additions(self) -> None:
        if self.use_rollout_logps and self.use_vllm and self.vllm_importance_sampling_correction:
            raise ValueError(
                "`use_rollout_logps=True` takes vLLM's log-probabilities as the old ones, and "
                "`vllm_importance_sampling_correction=True` corrects for their mismatch with the model's, which needs "
                "both: set one of the two to False."
            )
        for name in ("clip_epsilon_min", "clip_epsilon_max"):
            check_epsilon(name, getattr(self, name))
        target = self.clip_fraction_target
        if target is None:
            return
        is_number = isinstance(target, (int, float)) and not isinstance(target, bool)
        if not (is_number and 0 < target < 1):
            raise ValueError(f"`clip_fraction_target` must be a number in (0, 1), got {target!r}: 0.15, say, or None.")
        if self.clip_epsilon_min >= self.clip_epsilon_max:
            raise ValueError(
                f"`clip_epsilon_min={self.clip_epsilon_min}` must be below `clip_epsilon_max={self.clip_epsilon_max}`."
            )
        if self._takes_one_step:
            raise ValueError(
                f"`clip_fraction_target={target}` is refused with one optimizer step for each rollout batch "
                f"(`steps_per_generation={self.steps_per_generation}`, `gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}`): the ratio is exactly 1, and no range clips it. Set "
                f"`steps_per_generation={MINIBATCHES_PER_ROLLOUT * self.gradient_accumulation_steps}`."
            )

    def to_dict(self) -> dict[str, Any]:
        """As transformers', which hides `hub_token`; here secrets inside of `model_init_kwargs` and its like too."""
        return without_secrets(super().to_dict())

    def __repr__(self) -> str:
        # That of a dataclass, which TRL's is by inheritance, shows `hub_token`.
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    __str__ = __repr__

    # The Trainer pickles the arguments into `training_args.bin`, beside the weights that are uploaded. Where no token
    # is given, the hub's client takes `HF_TOKEN` or the one it is logged in with.
    def __getstate__(self) -> dict[str, Any]:
        return without_secrets(self.__dict__, hide=False)

    def __copy__(self) -> "GSPOConfig":
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "GSPOConfig":
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @property
    def _takes_one_step(self) -> bool:
        return self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) == 0

    def _doubts(self) -> Iterator[str]:
        """One sentence for each setting that runs but is most likely not what was meant."""
        completion_length = self.max_completion_length
        is_long = completion_length is None or completion_length > _LONG_COMPLETION
        wide = [
            f"`{name}={getattr(self, name)}`"
            for name in ("epsilon", "epsilon_high")
            if is_long and self.clip_fraction_target is None and (getattr(self, name) or 0) > _WIDE_EPSILON
        ]
        if wide:
            yield (
                f"{' and '.join(wide)} {'is' if len(wide) == 1 else 'are'} a token-level clip range, which never "
                f"clips the ratio of a whole sequence (`max_completion_length={completion_length}`): set "
                f"`epsilon={EPSILON_LOW}` and `epsilon_high={EPSILON_HIGH}`."
            )
        if self.epsilon_high is not None and self.epsilon_high < self.epsilon:
            yield (
                f"`epsilon_high={self.epsilon_high}` is narrower than `epsilon={self.epsilon}`, the opposite of the "
                "paper's: set both, or `epsilon_high=None` for the same on both sides."
            )
        if self._takes_one_step:
            yield (
                f"`steps_per_generation={self.steps_per_generation}` with "
                f"`gradient_accumulation_steps={self.gradient_accumulation_steps}` takes one optimizer step from each "
                "rollout batch, so the ratio is exactly 1 and GSPO does nothing: set `steps_per_generation="
                f"{MINIBATCHES_PER_ROLLOUT * self.gradient_accumulation_steps}`."
            )
        if self.use_vllm and self.vllm_importance_sampling_correction:
            if self.vllm_importance_sampling_mode.startswith("sequence_"):
                yield (
                    f"`vllm_importance_sampling_mode={self.vllm_importance_sampling_mode!r}` multiplies the ratios of "
                    "all tokens, so long sequences fall out of the bounds by rounding alone: set "
                    "`vllm_importance_sampling_mode='token_truncate'`."
                )
            sampling = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p} | (self.generation_kwargs or {})
            top_p, top_k, min_p = sampling["top_p"], sampling["top_k"], sampling["min_p"]
            if (top_p or 1.0) < 1.0 or (top_k or 0) > 0 or min_p:
                yield (
                    f"`top_p={top_p}`, `top_k={top_k}`, `min_p={min_p}` truncate what vLLM samples, "
                    "which biases its importance ratio: set `top_p=1.0`, `top_k=0` and `min_p=None`, or "
                    "`vllm_importance_sampling_correction=False`."
                )
        if self.log_expert_change and (self._takes_one_step or self.use_rollout_logps):
            reason = (
                "`use_rollout_logps=True`" if self.use_rollout_logps else "one optimizer step for each rollout batch"
            )
            yield (
                f"`log_expert_change=True` has nothing to compare: under {reason} the model does not score a rollout "
                "with the weights that sampled it."
            )
        if not self.disable_dropout:
            yield (
                "`disable_dropout=False` lets dropout, LoRA's too, move the ratio past the clip range before any "
                "update: set `disable_dropout=True`."
            )

    @classmethod
    def from_grpo(cls, config: GRPOConfig, **changes: Any) -> "GSPOConfig":
        """
        Converts a `GRPOConfig`, so that it trains GSPO.

        What still has TRL's default takes GSPO's. What was chosen is kept unless it contradicts GSPO: a refused
        `loss_type` becomes `"grpo"`, an epsilon outside (0, 1) takes the paper's value, and the options of refused
        loss types go back to their defaults. An `epsilon` that was chosen alone stays the width on both sides, as in
        TRL. What equals TRL's default counts as not chosen, and so does a `steps_per_generation` or
        `generation_batch_size` of one optimizer step a rollout: to keep such a value, give it in `changes`. One log
        message lists every field that changed, with its old and its new value.

        Args:
            config (`GRPOConfig`): left as it is. A `GSPOConfig` is copied with `changes` and nothing else.
            **changes (`Any`): fields that win over `config`.

        Returns:
            `GSPOConfig`: a new object.

        Raises:
            TypeError: if `config` is not a `GRPOConfig`, or a change names no field.
            ValueError: if a change is refused by [`GSPOConfig`].
        """
        if not isinstance(config, GRPOConfig):
            raise TypeError(f"`config` must be a `trl.GRPOConfig`, got `{type(config).__name__}`.")
        names = [spec.name for spec in fields(cls) if spec.init]
        unknown = sorted(set(changes) - set(names))
        if unknown:
            raise TypeError(f"`{cls.__name__}` has no field {', '.join(map(repr, unknown))}.")

        values = {name: getattr(config, name) for name in names if hasattr(config, name)}
        if not isinstance(config, GSPOConfig):
            values |= cls._departures(config)
        # `GRPOConfig` fills each of these from the other and refuses to be given both.
        is_default = not isinstance(config, GSPOConfig) and (
            config.steps_per_generation == config.gradient_accumulation_steps
        )
        values["generation_batch_size"] = None
        if is_default or "generation_batch_size" in changes:
            values["steps_per_generation"] = None
        for name in changes:
            for other in _IMPLIED_BY.get(name, ()):
                if other in values:  # transformers 5.20 lacks `activation_checkpointing`
                    values[other] = cls.__dataclass_fields__[other].default
        values |= changes

        with warnings.catch_warnings():
            # Deprecations of the host's fields were announced when `config` was made.
            warnings.simplefilter("ignore", FutureWarning)
            # Copied deeply, because both `__post_init__` and the trainer write into these.
            converted = cls(**copy.deepcopy(values))
        for spec in fields(config):  # what a subclass of `GRPOConfig` added
            if spec.name not in cls.__dataclass_fields__:
                setattr(converted, spec.name, copy.deepcopy(getattr(config, spec.name)))

        changed = [
            f"{name} (hidden)"
            if is_secret(name)
            else f"{name} {_shown(getattr(config, name))} -> {_shown(getattr(converted, name))}"
            for name in names
            if hasattr(config, name) and getattr(config, name) != getattr(converted, name)
        ]
        if changed:
            logger.warning(f"{type(config).__name__} was converted to {cls.__name__}: {'; '.join(changed)}")
        return converted

    @classmethod
    def _departures(cls, config: GRPOConfig) -> dict[str, Any]:
        """What `config` must have otherwise to be GSPO."""
        redeclared = set(GSPOConfig.__annotations__) & set(GRPOConfig.__dataclass_fields__)
        ours = {name: cls.__dataclass_fields__[name].default for name in redeclared}
        values = {name: default for name, default in ours.items() if getattr(config, name) == _trl_default(name)}
        for name in ("epsilon", "epsilon_high"):
            value = getattr(config, name)
            if isinstance(value, (int, float)) and not 0 < value < 1:
                values[name] = ours[name]
        # In TRL, `epsilon` alone is the width on both sides: whoever chose it chose both.
        if "epsilon" not in values:
            values.pop("epsilon_high", None)
        if config.loss_type not in _LOSS_TYPES:
            values["loss_type"] = ours["loss_type"]
        if config.importance_sampling_level != "sequence":
            values["importance_sampling_level"] = ours["importance_sampling_level"]
        return values | {name: _trl_default(name) for name in _FOREIGN_LOSS_FIELDS}
