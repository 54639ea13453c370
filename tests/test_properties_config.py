"""What becomes of options that are anything: a configuration that means what it says, or an error that names one."""

import copy
import logging
import math
import sys
import traceback
import types
import typing
from dataclasses import fields
from pathlib import Path

import pytest
import train
import yaml
from hypothesis import assume, event, example, given
from hypothesis import strategies as st
from strategies import ANYTHING, NESTED, SCALARS
from trl import GRPOConfig

import trl_gspo
from trl_gspo import GSPOConfig
from trl_gspo.health import HealthBounds
from trl_gspo.objective import LEVELS


pytestmark = pytest.mark.filterwarnings("ignore")

PACKAGE = str(Path(trl_gspo.__file__).parent)
COMMON = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
# What `parse` may raise, as `main` of `scripts/train.py` has it: one line, and exit code 2.
BAD_INPUT = (ValueError, OSError, ImportError, yaml.YAMLError)


@pytest.fixture(autouse=True, scope="module")
def _silence():
    """What is warned of is not looked at here, and `warning_once` would keep each of thousands of messages."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value):
    return not isinstance(value, (bool, float)) and value == int(value) and value >= 1


def is_open_share(value):
    return is_number(value) and 0 < value < 1


# What each option of ours, and each of TRL's that the rollout batch is counted in, may be.
MAY_BE = {
    "importance_sampling_level": lambda value: value in LEVELS,
    "loss_type": lambda value: value in ("grpo", "luspo"),
    "epsilon": is_open_share,
    "epsilon_high": lambda value: value is None or is_open_share(value),
    "beta": lambda value: is_number(value) and 0 <= value <= sys.float_info.max,
    "disable_dropout": lambda value: isinstance(value, bool),
    "step_discount": lambda value: is_number(value) and 0 < value <= 1,
    "clip_fraction_target": lambda value: value is None or is_open_share(value),
    "clip_epsilon_min": is_open_share,
    "clip_epsilon_max": is_open_share,
    "pack_live_tokens": lambda value: isinstance(value, bool),
    "use_rollout_logps": lambda value: isinstance(value, bool),
    "log_expert_change": lambda value: isinstance(value, bool),
    "reward_timeout": lambda value: is_number(value) and value > 0,
    "steps_per_generation": is_count,
    "generation_batch_size": is_count,
    "gradient_accumulation_steps": is_count,
    "per_device_train_batch_size": is_count,
    "num_generations": lambda value: is_count(value) and value >= 2,
    "num_iterations": is_count,
    "max_completion_length": lambda value: value is None or is_count(value),
    "use_vllm": lambda value: isinstance(value, bool),
    "vllm_importance_sampling_correction": lambda value: isinstance(value, bool),
}
# Of TRL and transformers, to stand beside them: those that touch neither network, nor environment, nor process groups.
HOSTS = [
    "learning_rate", "num_generations_eval", "temperature", "top_p", "top_k", "min_p", "generation_kwargs",
    "chat_template_kwargs", "repetition_penalty", "vllm_mode", "delta", "reward_weights", "scale_rewards",
    "multi_objective_aggregation", "mask_truncated_completions", "sync_ref_model", "top_entropy_quantile",
    "entropy_coef", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min", "off_policy_mask_threshold", "use_bias_correction_kl", "log_completions",
    "num_completions_to_print", "pad_to_multiple_of", "model_init_kwargs", "shuffle_dataset", "logging_steps",
    "save_steps", "eval_steps", "eval_strategy", "save_strategy", "logging_strategy", "max_steps", "warmup_steps",
    "num_train_epochs", "weight_decay", "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "seed",
    "save_total_limit", "gradient_checkpointing", "gradient_checkpointing_kwargs", "remove_unused_columns", "run_name",
    "sapo_temperature_neg", "vespo_k_pos", "auto_find_batch_size", "load_best_model_at_end", "router_aux_loss_coef",
]  # fmt: skip
HOSTS = [name for name in HOSTS if name in GRPOConfig.__dataclass_fields__]

# Values that make sense somewhere, so that a combination gets as far as to be built.
SENSIBLE = {
    "importance_sampling_level": st.sampled_from([*LEVELS, "token"]),
    "loss_type": st.sampled_from(["grpo", "luspo", "dapo", "sapo"]),
    "epsilon": st.sampled_from([3e-4, 0.2]) | st.floats(0, 1),
    "epsilon_high": st.none() | st.floats(0, 1),
    "beta": st.floats(0, 1),
    "step_discount": st.floats(0, 1),
    "clip_fraction_target": st.none() | st.floats(0, 1),
    "clip_epsilon_min": st.floats(0, 0.1),
    "clip_epsilon_max": st.floats(0.1, 1),
    "steps_per_generation": st.none() | st.integers(0, 16),
    "generation_batch_size": st.none() | st.sampled_from([0, 8, 16, 24, 64]),
    "gradient_accumulation_steps": st.integers(1, 8),
    "per_device_train_batch_size": st.sampled_from([1, 2, 8, 16]),
    "num_generations": st.sampled_from([1, 2, 4, 8]),
    "num_iterations": st.integers(1, 3),
    "max_completion_length": st.none() | st.integers(1, 4096),
    "vllm_importance_sampling_mode": st.sampled_from(["token_truncate", "sequence_mask"]),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(0, 50),
    "min_p": st.none() | st.floats(0, 1),
    "generation_kwargs": st.none() | st.fixed_dictionaries({"top_p": st.floats(0, 1)}),
    "eval_strategy": st.sampled_from(["no", "steps"]),
    "save_strategy": st.sampled_from(["no", "steps"]),
    "optim": st.sampled_from(["sgd", "adamw_torch"]),
    "lr_scheduler_type": st.sampled_from(["constant", "cosine"]),
}
for _name in MAY_BE.keys() | set(HOSTS):
    _default = GSPOConfig.__dataclass_fields__[_name].default
    if isinstance(_default, bool):
        SENSIBLE.setdefault(_name, st.booleans())
    elif is_number(_default):
        SENSIBLE.setdefault(
            _name, st.just(_default) | st.floats(0, 1) if isinstance(_default, float) else st.integers(1, 9)
        )
    else:
        SENSIBLE.setdefault(_name, st.just(_default))


def sensible(names):
    """Some of `names`, with values that make sense somewhere."""
    return st.lists(st.sampled_from(names), unique=True, max_size=8).flatmap(
        lambda chosen: st.fixed_dictionaries({name: SENSIBLE[name] for name in chosen})
    )


def combinations(names, strange):
    """The same, with anything for at most two of them."""
    strangers = st.dictionaries(st.sampled_from(names), strange, max_size=2)
    return st.tuples(sensible(names), strangers).map(lambda options: options[0] | options[1])


def is_raised_by_the_package(error):
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)


def build(make, **options):
    """
    The configuration, `None` where it is refused. What the package refuses is a `ValueError` that names an option;
    TRL and transformers have errors of their own, for options of theirs.
    """
    try:
        return make(**copy.deepcopy(options))
    except Exception as error:
        if is_raised_by_the_package(error):
            assert type(error) is ValueError, repr(error)
            assert any(f"`{spec.name}" in str(error) for spec in fields(GSPOConfig)), str(error)
        else:
            # For an option of ours TRL has no error to raise.
            assert set(options) - set(OWN) - set(COMMON), repr(error)
        return None


OWN = [name for name in GSPOConfig.__annotations__ if name not in GRPOConfig.__dataclass_fields__]


def check(config):
    for name, may_be in MAY_BE.items():
        assert may_be(getattr(config, name)), (name, getattr(config, name))
    if config.clip_fraction_target is not None:
        assert config.clip_epsilon_min < config.clip_epsilon_max
    if config.use_rollout_logps and config.use_vllm:
        assert not config.vllm_importance_sampling_correction
    for name in ("sapo_temperature_neg", "vespo_k_pos"):
        assert getattr(config, name) == GRPOConfig.__dataclass_fields__[name].default


@given(combinations(list(MAY_BE), ANYTHING))
@example({"gradient_accumulation_steps": None})
@example({"steps_per_generation": "8"})
@example({"steps_per_generation": 2.0})
@example({"generation_batch_size": 0})
@example({"loss_type": ["grpo"]})
@example({"pack_live_tokens": "false"})
@example({"beta": math.nan})
@example({"max_completion_length": "512"})
@example({"epsilon": 10**400})
@example({"importance_sampling_level": "turn", "disable_dropout": False})
def test_options_build_what_they_say_or_are_refused_by_name(options):
    config = build(GSPOConfig, **COMMON | options)
    event("built" if config is not None else "refused")
    if config is not None:
        check(config)
        for name, value in options.items():
            if value is not None:
                assert getattr(config, name) == value
        assert GSPOConfig.from_grpo(config) == config


@given(combinations([*MAY_BE, *HOSTS], ANYTHING))
@example({"use_vllm": True, "vllm_importance_sampling_mode": None})
@example({"use_vllm": True, "top_p": "0.9"})
@example({"use_vllm": True, "generation_kwargs": [1]})
def test_no_option_of_the_host_breaks_what_is_ours(options):
    config = build(GSPOConfig, **COMMON | options)
    event("built" if config is not None else "refused")
    if config is not None:
        check(config)


@given(combinations([*MAY_BE, *HOSTS], NESTED))
def test_a_grpo_config_is_converted_once_or_refused_by_name(options):
    options = {name: value for name, value in options.items() if name not in OWN}
    try:
        config = GRPOConfig(**COMMON | copy.deepcopy(options))
    except Exception:
        event("not a GRPOConfig")
        return
    before = copy.deepcopy({name: value for name, value in vars(config).items() if name != "distributed_state"})
    converted = build(lambda **_: GSPOConfig.from_grpo(config), **options)
    assert {name: value for name, value in vars(config).items() if name != "distributed_state"} == before
    event("built" if converted is not None else "refused")
    if converted is not None:
        check(converted)
        assert GSPOConfig.from_grpo(converted) == converted


# ---- YAML and command line


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("yaml") / "config.yaml"


NEEDED = {"dataset_name": "rows.jsonl", "reward_funcs": ["exact_match_reward"], "model_name_or_path": "model"}


def parse(path, text, *argv):
    """What `scripts/train.py` makes of a YAML file and a command line, `None` where it refuses."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    try:
        return train.parse(["--config", str(path), *argv])
    except BAD_INPUT as error:
        assert str(error) and "IndexError" not in str(error)
        return None


def check_parsed(parsed):
    script_args, config, model_args, bounds = parsed
    check(config)
    for name, hint in typing.get_type_hints(train.ScriptArguments).items():
        value = getattr(script_args, name)
        if name == "reward_funcs":
            assert value and all(isinstance(item, str) for item in value)
        elif name == "reward_kwargs":
            assert value is None or all(isinstance(kwargs, dict) for kwargs in value.values())
        else:
            is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
            kinds = typing.get_args(hint) if is_union else (hint,)
            assert isinstance(value, tuple(typing.get_origin(kind) or kind for kind in kinds)), (name, value)
    for name in HealthBounds.__dataclass_fields__:
        assert is_number(getattr(bounds, name)) and getattr(bounds, name) >= 0
    assert isinstance(model_args.model_name_or_path, str)


SCRIPT = [*train.ScriptArguments.__dataclass_fields__]
BOUNDS = [*HealthBounds.__dataclass_fields__]
YAML_VALUES = NESTED | st.dates() | st.datetimes() | st.binary(max_size=3) | st.sets(st.integers(), max_size=2)


@given(
    st.dictionaries(st.sampled_from([*MAY_BE, *HOSTS, *SCRIPT, *BOUNDS]), YAML_VALUES, max_size=3),
    combinations([name for name in MAY_BE if name != "generation_batch_size"], NESTED),
)
@example({"reward_kwargs": "[1]"}, {})
@example({"reward_kwargs": 5}, {})
@example({"reward_kwargs": {"exact_match_reward": 1}}, {})
@example({"reward_funcs": [["a"]]}, {})
@example({"reward_funcs": [None]}, {})
@example({"reward_weights": [0.5, "half"]}, {})
@example({"health_patience": None}, {})
@example({"logging_steps": None}, {})
@example({"dataset_name": True}, {})
@example({"run_name": b"1"}, {})
def test_yaml_builds_or_is_bad_input(path, options, ours):
    text = yaml.safe_dump(NEEDED | COMMON | ours | options, allow_unicode=True)
    parsed = parse(path, text)
    event("built" if parsed is not None else "refused")
    if parsed is not None:
        check_parsed(parsed)


@given(st.text() | st.binary(max_size=30) | st.dictionaries(SCALARS, NESTED).map(yaml.safe_dump))
@example("1: 2")
@example("on: 1")
@example("[" * 3000)
@example("beta: !!timestamp x")
@example("env: {1: 2}")
def test_any_file_builds_or_is_bad_input(path, text):
    assume("env" not in (text if isinstance(text, str) else "") or text == "env: {1: 2}")
    parsed = parse(path, text)
    event("built" if parsed is not None else "refused")
    if parsed is not None:
        check_parsed(parsed)


WORDS = st.text(max_size=6).filter(lambda word: not word.startswith("-h"))
OPTION = st.sampled_from([f"--{name}" for name in [*MAY_BE, *HOSTS, *SCRIPT, *BOUNDS]])
VALUES = st.sampled_from(["3e-4", "1", "0", "true", "no", "nan", "inf", "-1", "grpo", "turn", "None", "{}", "a b"])


@given(st.lists(OPTION | VALUES | WORDS | st.tuples(OPTION, VALUES | WORDS).map("=".join), max_size=6))
@example(["--config"])
@example(["--config", "nowhere.yaml"])
@example(["--epsilon"])
@example(["--beta", "nan"])
def test_a_command_line_builds_or_is_bad_input(path, argv):
    parsed = parse(path, yaml.safe_dump(NEEDED | COMMON), *argv)
    event("built" if parsed is not None else "refused")
    if parsed is not None:
        check_parsed(parsed)


# Written even with its default: what is not set follows from others.
ALWAYS = {*COMMON, "steps_per_generation"}


@given(sensible([*MAY_BE, *HOSTS]), st.integers(0, 9))
@example({}, 0)
def test_a_configuration_comes_back_from_yaml(path, options, seldom):
    config = build(GSPOConfig, **COMMON | options)
    assume(config is not None)
    written, unchanged = config.to_dict(), GSPOConfig(**COMMON).to_dict()
    if seldom:  # of what was changed alone: all of it takes YAML some tenths of a second
        written = {name: value for name, value in written.items() if name in ALWAYS or value != unchanged[name]}
    # `to_dict` hides tokens, and TRL does not take both of what it fills from one another.
    written = {
        name: value
        for name, value in written.items()
        if not name.endswith("_token") and name != "generation_batch_size"
    }
    assert parse(path, yaml.safe_dump(NEEDED | written))[1] == config
