"""`GSPOConfig`: its defaults and their sources, what it refuses and warns of, and what becomes of a `GRPOConfig`."""

import ast
import copy
import json
import logging
import math
import pickle
import random
import re
import warnings
from dataclasses import dataclass, field, fields

import pytest
from accelerate.logging import MultiProcessAdapter
from trl import GRPOConfig, TrlParser

from trl_gspo import GSPOConfig


pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

DEFAULTS = {
    "importance_sampling_level": "sequence",
    "loss_type": "grpo",
    "epsilon": 3e-4,
    "epsilon_high": 4e-4,
    "beta": 0.0,
    "steps_per_generation": None,
    "disable_dropout": True,
    "step_discount": 1.0,
    "clip_fraction_target": None,
    "clip_epsilon_min": 1e-6,
    "clip_epsilon_max": 0.5,
    "pack_live_tokens": True,
    "use_rollout_logps": False,
    "log_expert_change": False,
    "reward_timeout": 1500.0,
}
# Fields that TRL has not.
OWN = list(DEFAULTS)[list(DEFAULTS).index("step_discount") :]
# What `from_grpo` makes of a `GRPOConfig` with TRL's defaults, as it is logged.
CONVERSION = {
    "disable_dropout": (False, True),
    "generation_batch_size": (8, 32),
    "steps_per_generation": (1, 4),
    "epsilon": (0.2, 3e-4),
    "epsilon_high": (None, 4e-4),
    "importance_sampling_level": ("token", "sequence"),
    "loss_type": ("dapo", "grpo"),
}
FOREIGN = ["sapo_temperature_neg", "sapo_temperature_pos"] + [
    f"vespo_{name}_{sign}" for name in ("k", "lambda") for sign in ("neg", "pos")
]
has_activation_checkpointing = pytest.mark.skipif(
    "activation_checkpointing" not in GRPOConfig.__dataclass_fields__, reason="this transformers has the old name only"
)


@pytest.fixture(autouse=True)
def forget_warnings():
    MultiProcessAdapter.warning_once.cache_clear()


@pytest.fixture
def common(tmp_path):
    return {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.fixture
def make(common):
    return lambda **kwargs: GSPOConfig(**{**common, **kwargs})


@pytest.fixture
def make_grpo(common):
    return lambda **kwargs: GRPOConfig(**{**common, **kwargs})


@pytest.fixture
def logged(caplog):
    """What `trl_gspo.config` logged, the rank that accelerate puts in front left out."""
    caplog.set_level(logging.WARNING, logger="trl_gspo.config")

    def messages():
        records = [record for record in caplog.records if record.name == "trl_gspo.config"]
        assert all(record.levelno == logging.WARNING for record in records)
        return [record.getMessage().removeprefix("[RANK 0] ") for record in records]

    return messages


def field_values(config):
    return {spec.name: getattr(config, spec.name) for spec in fields(config)}


def values_of(config, names):
    return {name: getattr(config, name) for name in names}


def changed_fields(before, after):
    """Of all fields of `before`: those that differ, with both values."""
    after = vars(after)
    return {name: (value, after[name]) for name, value in field_values(before).items() if value != after[name]}


def conversion_without(chosen):
    """`CONVERSION` of a `GRPOConfig` in which `chosen` was chosen: what must stay with it stays."""
    kept = set(chosen)
    if "epsilon" in kept:  # in TRL the width on both sides
        kept.add("epsilon_high")
    if kept & {"steps_per_generation", "generation_batch_size"}:
        kept |= {"steps_per_generation", "generation_batch_size"}
    return {name: values for name, values in CONVERSION.items() if name not in kept}


# --- defaults


def test_defaults(make):
    assert {name: GSPOConfig.__dataclass_fields__[name].default for name in GSPOConfig.__annotations__} == DEFAULTS
    assert values_of(make(), DEFAULTS) == DEFAULTS | {"steps_per_generation": 4}


def test_every_other_default_is_that_of_trl(make, make_grpo):
    assert set(changed_fields(make_grpo(), make())) == set(CONVERSION)
    assert list(field_values(make())) == [*field_values(make_grpo()), *OWN]


@pytest.mark.parametrize("name", list(DEFAULTS)[: list(DEFAULTS).index("clip_fraction_target")])
def test_each_default_of_the_objective_names_its_source(name):
    source = r"section 5\.1|equation \d|https://huggingface\.co/papers/\d"
    assert re.search(source, GSPOConfig.__dataclass_fields__[name].metadata["help"])
    documented = re.search(rf"^ {{8}}{name} \(.*?\):\n((?: {{12}}.*\n)+)", GSPOConfig.__doc__, re.MULTILINE)
    assert documented and re.search(source, " ".join(documented[1].split()))


def test_the_documented_defaults_are_the_defaults():
    stated = re.findall(r"^ {8}(\w+) \(.*defaults to `(.*?)`\)", GSPOConfig.__doc__, re.MULTILINE)
    assert {name: ast.literal_eval(value) for name, value in stated} == {
        name: default for name, default in DEFAULTS.items() if default is not None
    }


@pytest.mark.parametrize(
    ("chosen", "steps", "batch"),
    [
        ({}, 4, 32),
        ({"gradient_accumulation_steps": 2}, 8, 64),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, 8, 32),
        ({"steps_per_generation": 2}, 2, 16),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 4}, 3, 24),
        ({"generation_batch_size": 16}, 2, 16),
        ({"generation_batch_size": 64, "gradient_accumulation_steps": 2}, 8, 64),
    ],
)
def test_four_minibatches_unless_chosen(make, chosen, steps, batch):
    config = make(**chosen)
    assert (config.steps_per_generation, config.generation_batch_size) == (steps, batch)


# --- refusals


@pytest.mark.parametrize("value", [0, 1, 1.0, 5.0, -3e-4, float("nan"), float("inf"), True, "3e-4"])
@pytest.mark.parametrize("name", ["epsilon", "epsilon_high"])
def test_epsilon_outside_its_range_is_refused(make, name, value):
    with pytest.raises(ValueError, match=rf"^`{name}` must be a finite number in \(0, 1\)") as raised:
        make(**{name: value})
    assert f"got {value!r}." in str(raised.value)


@pytest.mark.parametrize(
    ("loss_type", "reason"),
    [
        ("dapo", "divides by the tokens of the batch"),
        ("bnpo", "divides by the tokens of the batch"),
        ("dr_grpo", "divides by a constant number of tokens"),
        ("cispo", "clips the weight of a policy gradient"),
        ("sapo", "soft gate for each token"),
        ("vespo", "product of the token ratios"),
        ("gspo", "is not known"),
    ],
)
def test_loss_types_that_are_not_gspo_are_refused(make, loss_type, reason):
    with pytest.raises(ValueError, match=f"^`loss_type='{loss_type}'` is refused: it .*{reason}") as raised:
        make(loss_type=loss_type)
    assert "set `loss_type='grpo'`" in str(raised.value)


def test_the_loss_types_of_trl_are_all_judged(make):
    """A loss type that a later TRL adds must be allowed or refused with a reason, not called unknown."""
    section = re.search(r"^ {8}loss_type .*\n((?: {12}.*\n|\n)+)", GRPOConfig.__doc__, re.MULTILINE)[1]
    names = re.findall(r'^ {12}- `"(\w+)"`', section, re.MULTILINE)
    assert {"grpo", "dapo", "vespo"} <= set(names)
    for name in names:
        try:
            make(loss_type=name)
        except ValueError as error:
            assert "not known" not in str(error)


def test_luspo_is_accepted(make, logged):
    assert make(loss_type="luspo").loss_type == "luspo"
    assert logged() == []


@pytest.mark.parametrize("level", ["sequence", "sequence_token", "turn"])
def test_levels_are_accepted(make, logged, level):
    assert make(importance_sampling_level=level).importance_sampling_level == level
    assert logged() == []


@pytest.mark.parametrize(("level", "reason"), [("token", "it is GRPO"), ("word", "it is not known")])
def test_other_levels_are_refused(make, level, reason):
    with pytest.raises(ValueError, match=f"^`importance_sampling_level='{level}'` is refused: {reason}") as raised:
        make(importance_sampling_level=level)
    assert "Set it to one of 'sequence', 'sequence_token', 'turn', or use TRL's `GRPOTrainer`" in str(raised.value)


@pytest.mark.parametrize("value", [1, 1.0, 0.5, 1e-9])
def test_step_discount_in_its_range_is_accepted(make, value):
    assert make(step_discount=value).step_discount == value


@pytest.mark.parametrize("value", [0, 0.0, -0.5, 1.0001, 2, float("nan"), float("inf"), True, False, "1", None])
def test_step_discount_outside_its_range_is_refused(make, value):
    with pytest.raises(ValueError, match=r"^`step_discount` must be a number in \(0, 1\], got ") as raised:
        make(step_discount=value)
    assert f"got {value!r}." in str(raised.value)


@pytest.mark.parametrize("value", [None, 0.15, 1e-3, 0.9])
def test_clip_fraction_target_in_its_range_is_accepted(make, value):
    assert make(clip_fraction_target=value).clip_fraction_target == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_fraction_target": 0.0}, r"`clip_fraction_target` must be a number in \(0, 1\), got 0.0"),
        ({"clip_fraction_target": 15}, r"`clip_fraction_target` must be .*, got 15: 0.15, say"),
        ({"clip_fraction_target": math.nan}, "`clip_fraction_target` must be .*, got nan"),
        ({"clip_fraction_target": True}, "`clip_fraction_target` must be .*, got True"),
        ({"clip_fraction_target": "0.15"}, "`clip_fraction_target` must be .*, got '0.15'"),
        ({"clip_epsilon_min": 0.0}, "`clip_epsilon_min` must be a finite number in"),
        ({"clip_epsilon_max": 1.5}, "`clip_epsilon_max` must be a finite number in"),
        (
            {"clip_fraction_target": 0.15, "clip_epsilon_min": 0.1, "clip_epsilon_max": 0.01},
            "`clip_epsilon_min=0.1` must be below `clip_epsilon_max=0.01`",
        ),
        (
            {"use_rollout_logps": True, "use_vllm": True},
            "`use_rollout_logps=True` takes .* `vllm_importance_sampling_correction=True` .* set one of the two to",
        ),
        (
            {"clip_fraction_target": 0.15, "steps_per_generation": 2, "gradient_accumulation_steps": 4},
            "is refused with one optimizer step for each rollout batch .* Set `steps_per_generation=16`",
        ),
    ],
)
def test_what_our_own_options_cannot_do_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"steps_per_generation": 1}, "one optimizer step for each rollout batch"),
        ({"use_rollout_logps": True}, "`use_rollout_logps=True`"),
    ],
)
def test_expert_change_without_old_routings_is_warned_of(make, logged, options, reason):
    make(log_expert_change=True, **options)
    assert any(f"`log_expert_change=True` has nothing to compare: under {reason}" in line for line in logged())


def test_a_wide_range_is_a_start_where_the_controller_moves_it(make, logged):
    make(clip_fraction_target=0.15, epsilon=0.2, epsilon_high=0.2, max_completion_length=1000)
    assert logged() == []


@pytest.mark.parametrize("name", FOREIGN)
def test_options_of_refused_loss_types_are_refused(make, name):
    with pytest.raises(ValueError, match=f"^`{name}=7.5` is refused: only `loss_type='{name.split('_')[0]}'`"):
        make(**{name: 7.5})
    make(**{name: GRPOConfig.__dataclass_fields__[name].default})


def test_every_option_of_a_refused_loss_type_is_known():
    assert set(FOREIGN) == {spec.name for spec in fields(GRPOConfig) if spec.name.startswith(("sapo_", "vespo_"))}


def test_no_step_in_a_rollout_batch_is_refused_by_name(make):
    with pytest.raises(ValueError, match="steps_per_generation"):
        make(steps_per_generation=0)


# --- warnings

VLLM = {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"}
# Options, what the one warning says, and the options that silence it.
DOUBTS = {
    "wide epsilon": (
        {"epsilon": 0.2, "epsilon_high": None},
        "`epsilon=0.2` is a token-level clip range.*`max_completion_length=512`.*set `epsilon=0.0003`",
        {"epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "wide epsilon, no limit of length": (
        {"epsilon": 0.2, "epsilon_high": None, "max_completion_length": None},
        "`epsilon=0.2` is a token-level clip range.*`max_completion_length=None`",
        {"epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "wide epsilon_high": (
        {"epsilon_high": 0.27, "max_completion_length": 129},
        "`epsilon_high=0.27` is a token-level clip range.*set.*`epsilon_high=0.0004`",
        {"epsilon_high": 4e-4},
    ),
    "narrow above": (
        {"epsilon_high": 2e-4},
        "`epsilon_high=0.0002` is narrower than `epsilon=0.0003`.*set.*`epsilon_high=None`",
        {"epsilon_high": None},
    ),
    "on-policy": (
        {"steps_per_generation": 1},
        "`steps_per_generation=1`.*ratio is exactly 1.*set `steps_per_generation=4`",
        {"steps_per_generation": 4},
    ),
    "on-policy, accumulated": (
        {"generation_batch_size": 16, "gradient_accumulation_steps": 2},
        "`steps_per_generation=2` with `gradient_accumulation_steps=2`.*set `steps_per_generation=8`",
        {"generation_batch_size": None, "steps_per_generation": 8},
    ),
    "sum over the sequence": (
        VLLM | {"vllm_importance_sampling_mode": "sequence_truncate"},
        "`vllm_importance_sampling_mode='sequence_truncate'`.*set `vllm_importance_sampling_mode='token_truncate'`",
        {"vllm_importance_sampling_mode": "token_truncate"},
    ),
    "sum over the sequence by TRL's default": (
        {"use_vllm": True},
        "`vllm_importance_sampling_mode='sequence_mask'`",
        {"vllm_importance_sampling_mode": "token_truncate"},
    ),
    "top_p": (VLLM | {"top_p": 0.9}, "`top_p=0.9`.*truncate.*set `top_p=1.0`", {"top_p": 1.0}),
    "top_k": (VLLM | {"top_k": 20}, "`top_k=20`.*truncate.*set.*`top_k=0`", {"top_k": 0}),
    "min_p": (
        VLLM | {"min_p": 0.05},
        "`min_p=0.05` truncate.*set.*`min_p=None`.*or `vllm_importance_sampling_correction=False`",
        {"vllm_importance_sampling_correction": False},
    ),
    "dropout": (
        {"disable_dropout": False},
        "`disable_dropout=False`.*set `disable_dropout=True`",
        {"disable_dropout": True},
    ),
}


@pytest.mark.parametrize("options, message, remedy", DOUBTS.values(), ids=DOUBTS)
def test_doubts(make, logged, options, message, remedy):
    for _ in range(2):
        make(**options)
    (warned,) = logged()
    assert re.search(message, warned)
    assert warned.endswith(".") and not re.search(r"[.!?] ", warned), "one sentence"
    make(**options | remedy)
    assert logged() == [warned]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epsilon": 0.2, "epsilon_high": 0.27, "max_completion_length": 128},
        {"epsilon": 0.01, "epsilon_high": 0.01},
        {"epsilon_high": None},
        {"steps_per_generation": 1, "num_iterations": 2},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"steps_per_generation": 3, "gradient_accumulation_steps": 4},
        {"top_p": 0.9, "top_k": 20, "min_p": 0.05},
        {"use_vllm": True, "vllm_importance_sampling_correction": False, "top_p": 0.9},
        {**VLLM, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    ],
    ids=str,
)
def test_no_doubt(make, logged, options):
    make(**options)
    assert logged() == []


# --- from_grpo


def test_trl_defaults_become_ours(make, make_grpo, logged):
    config = make_grpo()
    converted = GSPOConfig.from_grpo(config)
    assert type(converted) is GSPOConfig and converted == make()
    assert changed_fields(config, converted) == CONVERSION
    listed = "; ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in CONVERSION.items())
    (message,) = logged()
    prefix, _, rest = message.partition(": ")
    assert prefix == "GRPOConfig was converted to GSPOConfig"
    assert sorted(rest.split("; ")) == sorted(listed.split("; "))


@pytest.mark.parametrize(
    ("chosen", "stays"),
    [
        ({"num_generations": 4}, {}),
        ({"learning_rate": 5e-6}, {}),
        ({"beta": 0.04}, {}),
        ({"loss_type": "luspo"}, {}),
        ({"importance_sampling_level": "sequence"}, {}),
        ({"disable_dropout": True}, {}),
        ({"epsilon": 0.1}, {"epsilon_high": None}),
        ({"epsilon_high": 0.1}, {}),
        ({"epsilon": 0.1, "epsilon_high": 0.15}, {}),
        ({"steps_per_generation": 8}, {"generation_batch_size": 64}),
        ({"generation_batch_size": 24}, {"steps_per_generation": 3}),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 4}, {"generation_batch_size": 16}),
    ],
    ids=str,
)
def test_what_was_chosen_is_kept(make_grpo, chosen, stays):
    config = make_grpo(**chosen)
    converted = GSPOConfig.from_grpo(config)
    assert values_of(converted, chosen | stays) == chosen | stays
    assert changed_fields(config, converted) == conversion_without(chosen)


@pytest.mark.parametrize(
    ("chosen", "replaced"),
    [
        ({"loss_type": "dr_grpo"}, {"loss_type": "grpo"}),
        ({"loss_type": "bnpo"}, {"loss_type": "grpo"}),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, {"loss_type": "grpo", "epsilon_high": 4e-4, "epsilon": 3e-4}),
        ({"epsilon": 2.0, "epsilon_high": 0.1}, {"epsilon": 3e-4, "epsilon_high": 0.1}),
        ({"epsilon": float("nan")}, {"epsilon": 3e-4}),
        ({"importance_sampling_level": "sequence_token"}, {"importance_sampling_level": "sequence"}),
        (
            {"loss_type": "sapo", "sapo_temperature_neg": 2.0, "sapo_temperature_pos": 1.5},
            {"loss_type": "grpo", "sapo_temperature_neg": 1.05, "sapo_temperature_pos": 1.0},
        ),
        (
            {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_neg": 9.0},
            {"loss_type": "grpo", "vespo_k_pos": 2.0, "vespo_lambda_neg": 2.0},
        ),
    ],
    ids=str,
)
def test_contradictions_are_replaced_and_listed(make_grpo, logged, chosen, replaced):
    converted = GSPOConfig.from_grpo(make_grpo(**chosen))
    assert values_of(converted, replaced) == replaced
    for name, value in chosen.items():
        assert (f"{name} {value!r} -> {replaced[name]!r}" in logged()[-1]) == (value != replaced[name])


NESTED = {
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "model_init_kwargs": {"dtype": "float32", "nested": {"list": [1]}},
    "accelerator_config": {"split_batches": True, "gradient_accumulation_kwargs": {"sync_with_dataloader": True}},
    "generation_kwargs": {"num_beams": 1},
    "chat_template_kwargs": {"enable_thinking": False},
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "reward_weights": [1.0, 2.0],
    "report_to": ["tensorboard"],
}


def test_the_users_object_stays_as_it_is(make_grpo):
    config = make_grpo(**copy.deepcopy(NESTED))
    # accelerate's state is one for all objects of a process.
    snapshot = copy.deepcopy({name: value for name, value in vars(config).items() if name != "distributed_state"})
    converted = GSPOConfig.from_grpo(config, learning_rate=1.0)
    for name in NESTED:
        assert getattr(converted, name) == getattr(config, name)
        assert getattr(converted, name) is not getattr(config, name)
    converted.model_init_kwargs["nested"]["list"].append(2)
    converted.accelerator_config.split_batches = False
    converted.gradient_checkpointing_kwargs["use_reentrant"] = True
    converted.accelerator_config.gradient_accumulation_kwargs.clear()
    converted.reward_weights.clear()
    assert {name: value for name, value in vars(config).items() if name != "distributed_state"} == snapshot


def test_nested_changes_are_not_shared_either(make_grpo):
    generation_kwargs = {"stop": ["x"]}
    converted = GSPOConfig.from_grpo(make_grpo(), generation_kwargs=generation_kwargs)
    converted.generation_kwargs["stop"].append("y")
    assert generation_kwargs == {"stop": ["x"]}


def test_changes_win(make_grpo):
    changes = {"epsilon": 0.01, "epsilon_high": 0.02, "learning_rate": 1e-5, "disable_dropout": False, "beta": 0.1}
    converted = GSPOConfig.from_grpo(make_grpo(epsilon=0.1, learning_rate=5e-6, loss_type="sapo"), **changes)
    assert values_of(converted, changes) == changes


@pytest.mark.parametrize(
    ("chosen", "changes", "steps", "batch"),
    [
        ({}, {"steps_per_generation": 2}, 2, 16),
        ({}, {"generation_batch_size": 24}, 3, 24),
        ({"steps_per_generation": 8}, {"steps_per_generation": 2}, 2, 16),
        ({"steps_per_generation": 8}, {"gradient_accumulation_steps": 2}, 8, 64),
        ({"steps_per_generation": 8}, {"generation_batch_size": 24}, 3, 24),
        ({"generation_batch_size": 64}, {"steps_per_generation": 2}, 2, 16),
        ({"generation_batch_size": 64}, {"generation_batch_size": 24}, 3, 24),
    ],
)
@pytest.mark.parametrize("kind", [GRPOConfig, GSPOConfig])
def test_changes_of_the_rollout_batch(common, kind, chosen, changes, steps, batch):
    converted = GSPOConfig.from_grpo(kind(**common, **chosen), **changes)
    assert (converted.steps_per_generation, converted.generation_batch_size) == (steps, batch)


def test_four_minibatches_of_the_changed_optimizer_step(make_grpo):
    converted = GSPOConfig.from_grpo(make_grpo(), gradient_accumulation_steps=2)
    assert (converted.steps_per_generation, converted.generation_batch_size) == (8, 64)


CHECKPOINTING_CHANGES = [
    ({}, {"gradient_checkpointing": False}),
    ({"gradient_checkpointing": False}, {"gradient_checkpointing": True}),
    ({}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    (NESTED, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    (NESTED, {"gradient_checkpointing_kwargs": None}),
    *(
        pytest.param(chosen, changes, marks=has_activation_checkpointing)
        for chosen, changes in [
            ({}, {"activation_checkpointing": False}),
            ({"gradient_checkpointing": False}, {"activation_checkpointing": True}),
            (NESTED, {"activation_checkpointing_kwargs": {"use_reentrant": True}}),
            (NESTED, {"activation_checkpointing_kwargs": None}),
        ]
    ),
]


@pytest.mark.parametrize(("chosen", "changes"), CHECKPOINTING_CHANGES)
@pytest.mark.parametrize("kind", [GRPOConfig, GSPOConfig])
def test_changes_of_gradient_checkpointing(common, kind, chosen, changes):
    chosen = {name: value for name, value in chosen.items() if name.startswith("gradient_")}
    converted = GSPOConfig.from_grpo(kind(**common, **chosen), **changes)
    for name, value in changes.items():
        assert getattr(converted, name) == value
        assert getattr(converted, name.replace("activation", "gradient")) == value


@pytest.mark.parametrize(
    ("chosen", "changes"),
    [
        ({"torch_compile": True}, {"torch_compile": False}),
        ({"vllm_importance_sampling_cap": 2.0}, {"vllm_importance_sampling_clip_max": 5.0}),
        ({"use_transformers_paged": True}, {"use_transformers_continuous_batching": False}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_changes_of_what_another_field_implies(make_grpo, chosen, changes):
    converted = GSPOConfig.from_grpo(make_grpo(**chosen), **changes)
    assert values_of(converted, changes) == changes


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_deprecations_are_not_announced_again(make_grpo):
    config = make_grpo(vllm_importance_sampling_cap=2.0, gradient_checkpointing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = GSPOConfig.from_grpo(config)
    assert converted.vllm_importance_sampling_clip_max == 2.0


def test_unknown_changes_are_refused_by_name(make_grpo):
    with pytest.raises(TypeError, match="^`GSPOConfig` has no field 'epsilon_hi', 'lr'"):
        GSPOConfig.from_grpo(make_grpo(), lr=1.0, epsilon_hi=0.1, epsilon=0.1)


@pytest.mark.parametrize(
    "change",
    [{"loss_type": "dapo"}, {"epsilon": 2.0}, {"importance_sampling_level": "token"}, {"vespo_k_neg": 1.0}],
    ids=str,
)
def test_refused_changes_are_refused(make_grpo, change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"^`{name}") as raised:
        GSPOConfig.from_grpo(make_grpo(), **change)
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize("config", [None, {"epsilon": 0.1}, GRPOConfig])
def test_only_a_grpo_config_is_converted(config):
    with pytest.raises(TypeError, match=r"^`config` must be a `trl\.GRPOConfig`, got"):
        GSPOConfig.from_grpo(config)


def test_epsilon_as_text_is_refused_by_name(make_grpo):
    """YAML 1.1 reads `3e-4` as text, and `GRPOConfig` lets it pass."""
    with pytest.raises(ValueError, match="^`epsilon` must be a finite number"):
        GSPOConfig.from_grpo(make_grpo(epsilon="3e-4"))


def test_a_gspo_config_is_copied(make, logged):
    config = make(
        epsilon=0.2, epsilon_high=None, steps_per_generation=1, disable_dropout=False, max_completion_length=64
    )
    logged_before = logged()
    copied = GSPOConfig.from_grpo(config)
    assert copied == config and copied is not config
    assert logged() == logged_before
    assert changed_fields(config, GSPOConfig.from_grpo(config, epsilon=0.1)) == {"epsilon": (0.2, 0.1)}
    assert logged()[-1] == "GSPOConfig was converted to GSPOConfig: epsilon 0.2 -> 0.1"


@dataclass
class CuriousGRPOConfig(GRPOConfig):
    """A user's own, with a field of its own and a default of its own."""

    curiosity: float = 0.5
    weights: dict = field(default_factory=lambda: {"novelty": [1.0]})
    num_generations: int = 4


@dataclass
class CuriousGSPOConfig(GSPOConfig):
    curiosity: float = 0.5


class PlainGSPOConfig(GSPOConfig):
    pass


def test_a_subclass_of_grpo_config_keeps_its_fields(common):
    config = CuriousGRPOConfig(**common, curiosity=0.7)
    converted = GSPOConfig.from_grpo(config)
    assert (converted.curiosity, converted.weights, converted.num_generations) == (0.7, {"novelty": [1.0]}, 4)
    converted.weights["novelty"].append(2.0)
    assert config.weights == {"novelty": [1.0]}


@pytest.mark.parametrize("kind", [CuriousGSPOConfig, PlainGSPOConfig])
def test_a_subclass_of_gspo_config_converts_too(make_grpo, kind):
    config = make_grpo()
    converted = kind.from_grpo(config)
    assert type(converted) is kind
    assert changed_fields(config, converted) == CONVERSION
    assert getattr(converted, "curiosity", 0.5) == 0.5


def test_a_token_is_kept_and_not_logged(make_grpo, logged):
    assert GSPOConfig.from_grpo(make_grpo(hub_token="hf_kept")).hub_token == "hf_kept"
    assert GSPOConfig.from_grpo(make_grpo(hub_token="hf_kept"), hub_token="hf_other").hub_token == "hf_other"
    assert len(logged()) == 2 and not any("hf_" in message for message in logged())


@pytest.mark.parametrize(
    "chosen",
    [
        {"accelerator_config": {"split_batches": True, "even_batches": False}},
        {"report_to": ["tensorboard"]},
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1}},
        {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 10, "load_best_model_at_end": True},
        {"bf16": True},
        {"pad_to_multiple_of": 8, "scale_rewards": False, "optim": "sgd"},
        {"gradient_checkpointing": False},
    ],
    ids=str,
)
def test_what_the_host_derives_survives(make_grpo, chosen):
    config = make_grpo(**chosen)
    converted = GSPOConfig.from_grpo(config)
    assert changed_fields(config, converted) == CONVERSION
    derived = ("mixed_precision", "device", "n_gpu", "train_batch_size", "should_log")
    assert values_of(converted, derived) == values_of(config, derived)


def test_deepspeed_survives(make_grpo):
    pytest.importorskip("deepspeed")
    deepspeed = {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    config = make_grpo(deepspeed=copy.deepcopy(deepspeed), gradient_accumulation_steps=2)
    converted = GSPOConfig.from_grpo(config)
    assert converted.deepspeed == config.deepspeed == deepspeed and converted.deepspeed is not config.deepspeed
    assert converted.deepspeed_plugin.zero_stage == 2
    assert converted.deepspeed_plugin is not config.deepspeed_plugin
    assert converted.hf_deepspeed_config.config["gradient_accumulation_steps"] == 2
    assert (converted.steps_per_generation, config.steps_per_generation) == (8, 2)


ALTERNATIVES = {
    "learning_rate": 3e-6,
    "num_generations": 4,
    "beta": 0.02,
    "temperature": 0.7,
    "max_completion_length": 96,
    "num_iterations": 3,
    "delta": 1.5,
    "scale_rewards": "batch",
    "reward_weights": [0.5, 2.0],
    "mask_truncated_completions": True,
    "top_entropy_quantile": 0.8,
    "entropy_coef": 0.01,
    "off_policy_mask_threshold": 0.5,
    "router_aux_loss_coef": 0.001,
    "use_bias_correction_kl": True,
    "sync_ref_model": True,
    "shuffle_dataset": False,
    "seed": 7,
    "max_steps": 11,
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.2,
    "logging_steps": 1,
    "save_strategy": "no",
    "log_completions": True,
    "gradient_checkpointing": False,
    "generation_kwargs": {"stop": ["x"]},
    "optim": "adafactor",
    "lr_scheduler_type": "constant",
    "epsilon": 0.05,
    "epsilon_high": 0.06,
    "steps_per_generation": 6,
    "loss_type": "luspo",
    "disable_dropout": True,
}


@pytest.mark.parametrize("seed", range(20))
def test_any_choice_survives(make_grpo, seed):
    generator = random.Random(seed)
    known = [name for name in ALTERNATIVES if name in GRPOConfig.__dataclass_fields__]
    chosen = {name: ALTERNATIVES[name] for name in generator.sample(known, generator.randint(2, 12))}
    config = make_grpo(**chosen)
    converted = GSPOConfig.from_grpo(config)
    assert values_of(converted, chosen) == chosen
    assert changed_fields(config, converted) == conversion_without(chosen)


# --- the ways in and out


def test_yaml_and_command_line(tmp_path):
    # YAML 1.1 reads `3e-4`, without a dot, as text; argparse makes a number of it.
    path = tmp_path / "config.yaml"
    path.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nreport_to: none\n"
        "epsilon: 3e-4\nepsilon_high: 5e-4\nlearning_rate: 2e-6\nsteps_per_generation: 8\n"
    )
    (config,) = TrlParser(GSPOConfig).parse_args_and_config(["--config", str(path)])
    assert (config.epsilon, config.epsilon_high, config.learning_rate) == (3e-4, 5e-4, 2e-6)
    assert (config.steps_per_generation, config.disable_dropout, config.loss_type) == (8, True, "grpo")
    arguments = ["--config", str(path), "--epsilon", "1e-3", "--disable_dropout", "false", "--loss_type", "luspo"]
    (config,) = TrlParser(GSPOConfig).parse_args_and_config(arguments)
    assert (config.epsilon, config.epsilon_high) == (1e-3, 5e-4)
    assert (config.steps_per_generation, config.disable_dropout, config.loss_type) == (8, False, "luspo")


def test_help_can_be_printed():
    text = " ".join(TrlParser(GSPOConfig).format_help().split())
    for name in DEFAULTS:
        assert f"--{name} " in text


def test_pickle(make):
    config = make(epsilon=0.1, epsilon_high=None, model_init_kwargs={"dtype": "float32"})
    assert pickle.loads(pickle.dumps(config)) == config


def test_to_dict_is_json(make):
    config = make(**NESTED, epsilon=0.1)
    written = json.loads(json.dumps(config.to_dict()))
    assert (written["epsilon"], written["epsilon_high"], written["loss_type"]) == (0.1, 4e-4, "grpo")
    assert written["steps_per_generation"] == 4 and written["model_init_kwargs"] == NESTED["model_init_kwargs"]
