"""`GSPOTrainer` with only live tokens through the model, against the same trainer with all of them."""

import math
import random

import pytest
import torch
import transformers
from peft import LoraConfig
from test_trainer import (
    ACCUMULATION,
    CASES,
    DEAD,
    KEYS,
    REQUIRED_KEYS,
    SCRIPTS,
    Synchronized,
    backward,
    build,
    folders,  # noqa: F401 - a fixture
    make_batch,
    make_tokenizer,
    score,
    trained,
    trained_tokens,
    weights,
    without_clocks,
)
from test_trainer_credit import CASES as TOKEN_CASES
from test_trainer_credit import SGD, TOOLS, make_token_batch, moved

from trl_gspo import GSPOTrainer
from trl_gspo.host import HAS_FUSED_HEAD
from trl_gspo.objective import unit_ids


pytestmark = pytest.mark.skipif(not HAS_FUSED_HEAD, reason="TRL 1.15 is the first whose head takes packed rows")

UNITS = [("sequence", "B"), ("sequence_token", "B"), ("sequence_token", "BT"), ("turn", "B"), ("turn", "BT")]


def both(output_dir, **script):
    """The same trainer twice: with all tokens through the model, and with live ones."""
    whole, packed = (build(GSPOTrainer, output_dir, **script, pack_live_tokens=live) for live in (False, True))
    packed._find_way()
    assert (whole._scorer.way, packed._scorer.way) == ("whole", "packed")
    return whole, packed


class Counter:
    """Counts the tokens of each forward of a model that scores, by whether it is for a gradient."""

    def __init__(self, model):
        self.with_gradient, self.without = [], []
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        if kwargs.get("fused_lm_head"):
            (self.with_gradient if torch.is_grad_enabled() else self.without).append(kwargs["input_ids"].numel())


def flat(gradients):
    return torch.cat([gradient.float().flatten() for gradient in gradients.values()])


def assert_same_backward(result, expected, tolerance=1e-5, without=()):
    """
    Losses, gradients and metrics of `backward`. In float32 each parameter's gradient is held to `tolerance`, with
    1e-7 of the largest for rounding; in half precision the gradient as a whole.
    """
    losses, gradients, metrics = result
    expected_losses, expected_gradients, expected_metrics = expected
    for one, other in zip(losses, expected_losses, strict=True):
        # A loss is a sum of terms of size 1, of which little may be left.
        assert one.item() == pytest.approx(other.item(), rel=tolerance, abs=tolerance / 10)
    assert gradients.keys() == expected_gradients.keys()
    total, expected_total = flat(gradients), flat(expected_gradients)
    assert expected_total.norm() > 1e-3
    assert (total - expected_total).norm() <= tolerance * expected_total.norm()
    if tolerance <= 1e-5:
        largest = max(gradient.norm() for gradient in expected_gradients.values())
        for name, gradient in expected_gradients.items():
            difference = (gradients[name] - gradient).norm()
            assert difference <= tolerance * gradient.norm() + 1e-7 * largest, f"{name}: {difference:.2g}"
    for key, values in expected_metrics.items():
        # Dead tokens are not looked at: the mean entropy is that of live ones.
        if not key.endswith(("/entropy", *without)):
            assert metrics[key] == pytest.approx(values, rel=1e2 * tolerance, abs=tolerance, nan_ok=True), key


# ---- one micro-batch: loss, gradient, metrics


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_gradient_and_metrics_are_those_of_all_tokens(case, folders, dataset, tmp_path):  # noqa: F811
    options = case.on | {"model": folders[case.on.get("model", "qwen3")], "train_dataset": dataset}
    whole, packed = both(tmp_path, **options)
    batches = [make_batch(whole, case.keys, seed) for seed in (0, 1)]
    batches = [{key: batch[key] for key in batch if key in REQUIRED_KEYS | case.keys} for batch in batches]
    expected = backward(whole, batches)
    assert_same_backward(backward(packed, batches), expected, 2e-2 if "model_init_kwargs" in case.on else 1e-5)


def with_dead_ends(batch):
    """Units without advantage: the turns after a row's first in some rows, all of others."""
    batch["advantages"] = batch["advantages"].clone()
    batch["advantages"][[1, DEAD]] = 0
    if batch["advantages"].dim() == 2:
        batch["advantages"][[0, 3], 4:] = 0
    return batch


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("level", "shape"), UNITS)
def test_every_unit_and_shape_of_advantages(level, shape, implementation, model_path, dataset, tmp_path):
    whole, packed = both(
        tmp_path,
        model=model_path,
        train_dataset=dataset,
        importance_sampling_level=level,
        model_init_kwargs={"attn_implementation": implementation},
    )
    batches = [with_dead_ends(make_token_batch(whole, shape, TOOLS, seed)) for seed in (0, 1)]
    counter, of_all = Counter(packed.model), Counter(whole.model)
    assert_same_backward(backward(packed, batches), backward(whole, batches))

    # Of each row what stands before its last live token: of live turns, at their level; else of live rows.
    live = trained_tokens(batches[0])
    has_advantage = batches[0]["advantages"].view(len(live), -1).expand(live.shape) != 0
    if level == "turn":
        starts = live & ~torch.nn.functional.pad(live, (1, 0))[:, :-1]
        turns = starts.cumsum(1)
        live = live & torch.stack(
            [((turns == turn[:, None]) & live & has_advantage).any(1) for turn in turns.T], 1
        )  # fmt: skip
    else:
        live = live & (live & has_advantage).any(1, keepdim=True)
    ends = torch.where(live, torch.arange(live.size(1)), -1).amax(1)
    tokens = (batches[0]["prompt_mask"].sum(1) + ends)[ends >= 0].sum()
    assert counter.with_gradient[0] == tokens < 0.6 * of_all.with_gradient[0]
    row_ends = torch.where(trained_tokens(batches[0]), torch.arange(live.size(1)), -1).amax(1)
    assert (ends < row_ends)[ends >= 0].any() == ((level, shape) == ("turn", "BT"))


@pytest.mark.parametrize(
    ("level", "shape"),
    [("turn", "BT"), *(pytest.param(*units, marks=pytest.mark.exhaustive) for units in UNITS[1:4])],
)
@pytest.mark.parametrize(("options", "keys"), TOKEN_CASES.values(), ids=TOKEN_CASES)
def test_options_at_the_levels_of_tokens(options, keys, level, shape, model_path, moe_path, dataset, tmp_path):
    is_half = "model_init_kwargs" in options
    if is_half:  # what rounding does to a ratio is as wide as the clip range, and would decide what is clipped
        options = options | dict(epsilon=0.2, epsilon_high=0.2)
    whole, packed = both(
        tmp_path,
        model=moe_path if "router_aux_loss_coef" in options else model_path,
        train_dataset=dataset,
        importance_sampling_level=level,
        **options,
    )
    batches = [with_dead_ends(make_token_batch(whole, shape, keys, seed)) for seed in (0, 1)]
    assert_same_backward(backward(packed, batches), backward(whole, batches), 2e-2 if is_half else 1e-5)


@pytest.mark.parametrize("kind", ["no advantage", "all masked", "all tools"])
@pytest.mark.parametrize(("level", "shape"), UNITS)
def test_without_a_live_row_the_gradient_is_there_and_exactly_0(level, shape, kind, model_path, dataset, tmp_path):
    whole, packed = both(tmp_path, model=model_path, train_dataset=dataset, importance_sampling_level=level)
    batch = make_token_batch(whole, shape)
    batch[{"no advantage": "advantages", "all masked": "completion_mask", "all tools": "tool_mask"}[kind]].zero_()
    counter = Counter(packed.model)
    losses = [trainer.compute_loss(trainer.model.train(), dict(batch)) for trainer in (whole, packed)]
    losses[1].backward()
    assert losses[1].item() == losses[0].item() == 0
    assert counter.with_gradient == [2]
    # Ranks with live rows reduce a gradient of each parameter: here it must not be missing.
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in packed.model.parameters())
    packed.model.eval()
    assert packed.compute_loss(packed.model, dict(batch)).item() == 0


@pytest.mark.parametrize("kind", ["no advantage", "all masked"])
def test_without_a_live_row_the_rest_of_the_loss_stays(kind, moe_path, dataset, tmp_path):
    options = dict(beta=0.1, router_aux_loss_coef=0.1, entropy_coef=0.01)
    whole, packed = both(tmp_path, model=moe_path, train_dataset=dataset, **options)
    batches = [make_batch(whole, KEYS, seed) for seed in (0, 1)]
    for batch in batches:
        batch["advantages" if kind == "no advantage" else "completion_mask"].zero_()
    if kind == "all masked":  # the entropy bonus of no token is 0/0 in TRL
        whole, packed = both(tmp_path, model=moe_path, train_dataset=dataset, **options | dict(entropy_coef=0.0))
    assert_same_backward(backward(packed, batches), backward(whole, batches))


def test_a_dead_row_far_from_its_old_log_probs_is_not_nan(model_path, dataset, tmp_path):
    _, packed = both(tmp_path, model=model_path, train_dataset=dataset)
    batch = make_batch(packed)
    loss = packed.compute_loss(packed.model.train(), dict(batch))
    batch["old_per_token_logps"][DEAD] = -200.0  # the ratio of a row that is not looked at is 1, and not infinite
    far = packed.compute_loss(packed.model, dict(batch))
    assert far.item() == loss.item() != 0
    far.backward()
    assert all(parameter.grad.isfinite().all() for parameter in packed.model.parameters())


@pytest.mark.parametrize("level", ["sequence_token", "turn"])
def test_the_off_policy_mask_sees_turns_without_advantage(level, model_path, dataset, tmp_path):
    options = dict(model=model_path, train_dataset=dataset, importance_sampling_level=level)
    whole, packed = both(tmp_path, **options, off_policy_mask_threshold=2e-2)
    batch = make_token_batch(whole, "BT")
    turns = unit_ids(trained_tokens(batch), "turn")[0]
    batch["advantages"] = -(turns == 0).float()
    drift = torch.where(turns == 0, 0.0, 0.1)
    batch["old_per_token_logps"] = score(whole, batch) + drift  # only where nothing is trained on
    expected = backward(whole, [batch, batch])
    assert_same_backward(backward(packed, [batch, batch]), expected)
    assert expected[0][0] != backward(build(GSPOTrainer, tmp_path, **options), [batch, batch])[0][0]


def test_entropy_is_that_of_live_tokens_and_of_dead_ones_their_mean(model_path, dataset, tmp_path):
    whole, packed = both(tmp_path, model=model_path, train_dataset=dataset)
    batch = make_batch(whole)
    ids, mask = (torch.cat([batch[f"prompt_{key}"], batch[f"completion_{key}"]], 1) for key in ("ids", "mask"))
    with torch.no_grad():
        logits = whole.model(input_ids=ids, attention_mask=mask).logits[:, batch["prompt_ids"].size(1) - 1 : -1]
    entropies = torch.distributions.Categorical(logits=logits.double()).entropy()
    live = trained_tokens(batch) & (batch["advantages"] != 0).unsqueeze(1)
    for trainer, tokens in ((whole, trained_tokens(batch)), (packed, live)):
        trainer.compute_loss(trainer.model.train(), dict(batch))
        (logged,) = trainer._metrics["train"]["entropy"]
        assert logged == pytest.approx(entropies[tokens].mean().item(), rel=1e-6)
    assert abs(entropies[live].mean() - entropies[trained_tokens(batch)].mean()) > 1e-5


# ---- other models, other attention


SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=None,
)
# Shorter than the rows, of up to 18 tokens.
WINDOW = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
CHECKPOINTED = dict(gradient_checkpointing=True)

# Name -> the family, what its config sets, and options of the trainer.
MODELS = {
    "window": ("Qwen3", "Qwen3Config", WINDOW | dict(use_sliding_window=True), {}),
    "window eager": ("Qwen3", "Qwen3Config", WINDOW | dict(use_sliding_window=True, eager=True), {}),
    "mistral": ("Mistral", "MistralConfig", dict(sliding_window=4), {}),
    "gpt2": ("GPT2LMHead", "GPT2Config", dict(n_embd=32, n_layer=2, n_head=4, n_positions=64), {}),
    "gpt2 eager": ("GPT2LMHead", "GPT2Config", dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, eager=True), {}),
    "gemma2 eager": (
        "Gemma2",
        "Gemma2Config",
        dict(sliding_window=4, attn_logit_softcapping=5.0, final_logit_softcapping=3.0, eager=True),
        {},
    ),
    "gemma3": ("Gemma3", "Gemma3TextConfig", WINDOW, {}),
    "gpt-oss eager": (
        "GptOss",
        "GptOssConfig",
        WINDOW | dict(num_local_experts=4, num_experts_per_tok=2, eager=True),
        {},
    ),
    "window checkpointed": ("Qwen3", "Qwen3Config", WINDOW | dict(use_sliding_window=True), CHECKPOINTED),
}


def make_causal_lm(name):
    family, config_class, settings, _ = MODELS[name]
    settings = dict(SIZES, vocab_size=len(make_tokenizer()), **settings)
    is_eager = settings.pop("eager", False)
    config = getattr(transformers, config_class)(**settings)
    config._attn_implementation = "eager" if is_eager else "sdpa"
    torch.manual_seed(0)
    suffix = "Model" if family.endswith("Head") else "ForCausalLM"
    return getattr(transformers, f"{family}{suffix}")(config)


def checkpoint(model, kwargs):
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def assert_models_agree(make, output_dir, dataset, **options):
    """`make` gives the model, for each of the two trainers, or its folder."""
    script = dict(train_dataset=dataset, processing_class=make_tokenizer()) | options
    whole, packed = (
        build(GSPOTrainer, output_dir, model=make(), pack_live_tokens=live, **script) for live in (False, True)
    )
    batches = [make_batch(whole, KEYS | {"tool_mask"}, seed) for seed in (0, 1)]
    for trainer in (whole, packed):
        if trainer.args.gradient_checkpointing:  # `train` enables it
            checkpoint(trainer.model, trainer.args.gradient_checkpointing_kwargs)
    counter = Counter(packed.model)
    assert_same_backward(backward(packed, batches), backward(whole, batches))
    assert packed._scorer.way == "packed" and counter.with_gradient[0] < 100 < batches[0]["completion_mask"].numel()
    return packed


@pytest.mark.parametrize("name", MODELS)
def test_other_models(name, dataset, tmp_path):
    packed = assert_models_agree(lambda: make_causal_lm(name), tmp_path, dataset, **MODELS[name][3])
    implementation = "eager" if name.endswith("eager") else "sdpa"
    assert packed.model.config._attn_implementation == implementation


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("router_aux_loss_coef", [0.0, 0.1])
def test_experts_with_and_without_the_loss_of_routers(
    router_aux_loss_coef, implementation, moe_path, dataset, tmp_path
):
    assert_models_agree(
        lambda: moe_path,
        tmp_path,
        dataset,
        router_aux_loss_coef=router_aux_loss_coef,
        model_init_kwargs={"attn_implementation": implementation},
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
def test_gradient_checkpointing_and_adapters(lora, implementation, use_reentrant, model_path, dataset, tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    packed = assert_models_agree(
        lambda: model_path,
        tmp_path,
        dataset,
        peft_config=adapter if lora else None,
        model_init_kwargs={"attn_implementation": implementation},
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    assert packed.model.is_gradient_checkpointing


def test_lora_without_checkpointing(model_path, dataset, tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    assert_models_agree(lambda: model_path, tmp_path, dataset, peft_config=adapter)


FLEX = dict(model_init_kwargs={"attn_implementation": "flex_attention"})


def test_flex_attention_forward(model_path, dataset, tmp_path):
    with torch.compiler.set_stance("force_eager"):  # the same computation, without a minute of compiling
        whole, packed = both(tmp_path, model=model_path, train_dataset=dataset, **FLEX)
        batch = make_batch(whole, TOOLS)
        counter = Counter(packed.model)
        with torch.no_grad():
            losses = [trainer.compute_loss(trainer.model.train(), dict(batch)) for trainer in (whole, packed)]
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5) and losses[0] != 0
        assert counter.without[-1] < 100
        for trainer in (whole, packed):
            trainer.log({"loss": 0.0})
        logs = [trainer.state.log_history[-1] for trainer in (whole, packed)]
        for name in (name for name in logs[0] if name.startswith("gspo/")):
            assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-4, abs=1e-6), name
        # When this fails, the comparison of gradients below runs without an accelerator.
        with pytest.raises(NotImplementedError, match="FlexAttention does not support backward on CPU"):
            packed.compute_loss(packed.model, dict(batch)).backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has no backward pass on a CPU")
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_flex_attention_gradient(gradient_checkpointing, model_path, dataset, tmp_path):
    whole, packed = both(tmp_path, model=model_path, train_dataset=dataset, use_cpu=False, **FLEX)
    on_cpu = build(GSPOTrainer, tmp_path, model=model_path, train_dataset=dataset)
    batches = [make_batch(on_cpu, TOOLS, seed) for seed in (0, 1)]
    batches = [{key: value.to(whole.accelerator.device) for key, value in batch.items()} for batch in batches]
    if gradient_checkpointing:
        checkpoint(whole.model, None)
        checkpoint(packed.model, None)
    assert_same_backward(backward(packed, batches), backward(whole, batches), 1e-4)


# ---- whole scripts


# The ones that differ in what packing touches; all others take minutes together.
FAST_SCRIPTS = {
    "plain", "num_iterations", "accumulation", "luspo", "mask_truncated_completions", "adaptive_entropy", "bfloat16",
    "experts", "images", "lora_kl", "evaluation", "tools", "vllm", "vllm_token_truncate",
}  # fmt: skip
# How far weights may be apart, as a share of how far they moved: what rounding alone does. These runs amplify it.
TOLERANCES = {"chat": 3e-5, "luspo": 3e-5, "autocast": 5e-2, "bfloat16": 5e-2}
# Metrics that are means or extremes of means over micro-batches, whose rows are balanced where there are several in an
# optimizer step, and TRL's mean entropy, which is that of live tokens.
BY_MICRO_BATCH = ("kl", "clip_ratio/low_min", "clip_ratio/high_max")


def assert_same_log(log, expected, tolerance, without):
    assert len(log) == len(expected) > 3
    for entry, expected_entry in zip(without_clocks(log), without_clocks(expected), strict=True):
        assert entry.keys() == expected_entry.keys()
        for key, value in expected_entry.items():
            name = key.removeprefix("eval_").removeprefix("gspo/")
            is_noise = name == "ratio/length_correlation" and expected_entry[key.replace(name, "ratio/std")] < 1e-5
            if name in without or is_noise:
                continue
            place = f"{key} at step {entry['step']}"
            if value is None:
                assert entry[key] is None, place
            else:
                assert entry[key] == pytest.approx(value, rel=1e2 * tolerance, abs=tolerance, nan_ok=True), place


@pytest.mark.parametrize(
    "name", [name if name in FAST_SCRIPTS else pytest.param(name, marks=pytest.mark.exhaustive) for name in SCRIPTS]
)
def test_script_trains_as_with_all_tokens(name, folders, dataset, tmp_path):  # noqa: F811
    runs, starts, counters = [], [], []
    for live in (False, True):
        script = {"model": folders["qwen3"], "train_dataset": dataset} | SCRIPTS[name](folders, dataset)
        trainer = build(GSPOTrainer, tmp_path, **script | SGD, pack_live_tokens=live)
        trainer._find_way()
        starts.append([parameter.detach().clone() for parameter in weights(trainer)])
        counters.append(Counter(trainer.model))
        trainer.train()
        runs.append(trainer)
    whole, packed = runs
    expected, result = (moved(weights(trainer), start) for trainer, start in zip(runs, starts, strict=True))
    tolerance = TOLERANCES.get(name, 1e-5)
    assert expected.norm() > 0.1
    assert (result - expected).norm() <= tolerance * expected.norm()

    means = BY_MICRO_BATCH if whole.args.gradient_accumulation_steps > 1 else ()
    assert_same_log(packed.state.log_history, whole.state.log_history, tolerance, ("entropy", *means))
    assert packed._scorer.way == "packed"
    counts, all_counts = ([len(c.with_gradient), sum(c.with_gradient)] for c in reversed(counters))
    assert counts[0] == all_counts[0]
    # Rows with images are not packed, and those of this script fill their columns.
    assert (counts[1] < all_counts[1]) == (name != "images")


def test_an_optimizer_step_without_a_live_row_decays_the_weights(model_path, dataset, tmp_path):
    def first_rows(completions, **_):
        return [float(row < 4) * (row % 4) for row in range(len(completions))]

    script = SGD | ACCUMULATION | dict(weight_decay=0.1, max_steps=8, num_iterations=2, reward_funcs=first_rows)
    runs = [
        trained(GSPOTrainer, tmp_path, model=model_path, train_dataset=dataset, **script, pack_live_tokens=live)
        for live in (False, True)
    ]
    whole, packed = runs
    start = weights(build(GSPOTrainer, tmp_path, model=model_path, train_dataset=dataset))
    one, other = moved(weights(packed), start), moved(weights(whole), start)
    assert (one - other).norm() <= 1e-5 * other.norm()
    live = [entry["gspo/live_fraction"] for entry in whole.state.log_history if "loss" in entry]
    assert live == [entry["gspo/live_fraction"] for entry in packed.state.log_history if "loss" in entry]
    assert 0 in live and max(live) > 0


# ---- tokens through the model


def varied(prompts, trainer):
    """Completions of 1 to 24 tokens, most of them short."""
    generator = random.Random(trainer.state.global_step)
    lengths = [min(1 + int(generator.lognormvariate(1.5, 0.8)), 24) for _ in prompts]
    ids = [[generator.randint(7, 100) for _ in range(length)] for length in lengths]
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": ids,
        "logprobs": [[-math.log(107)] * len(row) for row in ids],
    }


def dead_groups(share):
    """A reward by which that share of the groups of four is dead."""

    def reward(completions, **_):
        return [float(row % 4) * (row // 4 % 10 >= 10 * share) for row in range(len(completions))]

    return reward


class CountingTrainer(GSPOTrainer):
    """Counts the tokens of each loss that a gradient flows to: of live rows those before the last trained one."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens_with_gradient = []

    def _compute_loss(self, model, inputs):
        tokens = 0
        for prompt, mask, advantage in zip(
            inputs["prompt_mask"].tolist(), trained_tokens(inputs).tolist(), inputs["advantages"].tolist(), strict=True
        ):
            if advantage != 0 and any(mask):
                tokens += sum(prompt) + len(mask) - 1 - mask[::-1].index(True)
        self.tokens_with_gradient.append(tokens)
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("dead_share", [0, 0.5, 0.9])
@pytest.mark.parametrize(("rows", "accumulation"), [(1, 20), (4, 5), (8, 5), (16, 1)])
def test_no_token_without_gradient_goes_through_the_model(
    rows, accumulation, dead_share, model_path, dataset, tmp_path
):
    # 20 groups in each rollout batch.
    trainer = build(
        CountingTrainer,
        tmp_path,
        model=model_path,
        train_dataset=dataset,
        reward_funcs=dead_groups(dead_share),
        rollout_func=varied,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=80 // rows,
        max_steps=80 // rows // accumulation,
        max_completion_length=24,
        pack_live_tokens=True,
    )
    trainer._find_way()
    counter = Counter(trainer.model)
    trainer.train()
    needed = trainer.tokens_with_gradient
    assert len(needed) == 80 // rows
    expected = []
    for start in range(0, len(needed), accumulation):
        # A micro-batch without a live row does not run. In a whole optimizer step of them two tokens do, for a
        # gradient of 0.
        expected += [tokens for tokens in needed[start : start + accumulation] if tokens] or [2]
    assert counter.with_gradient == expected
    assert counter.without == [tokens for tokens in needed if tokens]  # the old log-probabilities
    batches = trainer._buffered_inputs
    assert sum(batch["advantages"].eq(0).sum().item() for batch in batches) == 80 * dead_share
    padded = sum(batch["prompt_mask"].numel() + batch["completion_mask"].numel() for batch in batches)
    assert 0 < sum(needed) < 0.7 * (1 - dead_share) * padded


# ---- old log-probabilities, and the noise floor


class SpyTrainer(GSPOTrainer):
    """Keeps the log-probabilities of its losses before the first update of a rollout batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.first = []

    def _score_for_loss(self, *args, **kwargs):
        scored = super()._score_for_loss(*args, **kwargs)
        if not self.model.training or self.state.global_step == self._rollout_step:
            self.first.append(
                (self.model.training, self._per_token_logps, self._old_per_token_logps, self._loss_inputs)
            )
        return scored


FIRST_MINIBATCHES = {
    "plain": {},
    "num_iterations": dict(num_iterations=2, max_steps=9),
    "accumulation": ACCUMULATION,
    "kl": dict(beta=0.1),
    "vllm": dict(use_vllm=True, vllm_generation=Synchronized()),
    "turn": dict(importance_sampling_level="turn"),
    "gradient_checkpointing": dict(gradient_checkpointing=True),
    "eager": dict(model_init_kwargs={"attn_implementation": "eager"}),
}


def noise(trainer):
    names = "gspo/ratio/noise", "eval_gspo/ratio/noise"
    return [entry[name] for entry in trainer.state.log_history for name in names if entry.get(name) is not None]


def in_precision(precision, **options):
    if precision == "bfloat16":
        options["model_init_kwargs"] = options.get("model_init_kwargs", {}) | {"dtype": "bfloat16"}
    return options | dict(bf16=precision == "autocast")


MORE_PRECISIONS = [pytest.param(precision, marks=pytest.mark.exhaustive) for precision in ("float32", "autocast")]


@pytest.mark.parametrize("precision", ["bfloat16", *MORE_PRECISIONS])
@pytest.mark.parametrize("options", FIRST_MINIBATCHES.values(), ids=FIRST_MINIBATCHES)
def test_before_the_first_update_old_log_probs_are_the_new_ones(options, precision, model_path, dataset, tmp_path):
    script = dict(model=model_path, train_dataset=dataset, eval_dataset=dataset.select(range(4)), rollout_func=varied)
    script |= dict(eval_strategy="steps", eval_steps=3, max_steps=5) | in_precision(precision, **options)
    trainer = trained(SpyTrainer, tmp_path, **script, pack_live_tokens=True)
    assert trainer._scorer.way == "packed"
    modes = [is_training for is_training, *_ in trainer.first]
    assert modes.count(True) == 2 * trainer.args.gradient_accumulation_steps and modes.count(False) >= 1
    for _, logps, old, inputs in trainer.first:
        is_wanted = trainer._wanted(inputs)
        assert torch.equal(logps[is_wanted], old[is_wanted]) and logps.dtype == torch.float32
        assert (logps[is_wanted] < 0).all()
    assert any(trainer._wanted(inputs).any() for *_, inputs in trainer.first)
    assert noise(trainer) == [0.0] * len(noise(trainer)) and len(noise(trainer)) >= 3


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_noise_is_not_above_that_of_all_tokens(precision, model_path, dataset, tmp_path):
    script = dict(model=model_path, train_dataset=dataset, rollout_func=varied, max_steps=5)
    script |= in_precision(precision)
    whole, packed = (noise(trained(GSPOTrainer, tmp_path, **script, pack_live_tokens=live)) for live in (False, True))
    print(f"all tokens: {whole}, live tokens: {packed}")
    assert len(whole) == len(packed) == 2 and all(one <= other for one, other in zip(packed, whole, strict=True))


# ---- micro-batches of about as many tokens


def rows_of(batches):
    """What is in each row, hashable, padding and all."""
    names = sorted(name for name, value in batches[0].items() if torch.is_tensor(value) and value.dim())
    # What the model scored may differ in rounding.
    names = [name for name in names if not name.startswith(("old_", "ref_"))]
    assert {"prompt_ids", "completion_ids", "completion_mask", "advantages"} <= set(names)
    return [
        tuple((name, tuple(batch[name][row].flatten().tolist())) for name in names)
        for batch in batches
        for row in range(len(batch["completion_ids"]))
    ]


def tokens_to_score(batch, options):
    """Of live rows, where the loss has no KL term, those before the last."""
    is_scored = (batch["advantages"] != 0) | (options.get("beta", 0) > 0)
    return int((batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1) - 1)[is_scored].sum())


def drawn_and_trained_on(output_dir, **options):
    """Micro-batches of the first rollout batch as TRL drew them, and as they were trained on."""
    script = dict(rollout_func=varied, reward_funcs=dead_groups(0.3), max_steps=1, max_completion_length=24)
    script |= dict(per_device_train_batch_size=4, gradient_accumulation_steps=5, steps_per_generation=20) | options
    return [
        trained(GSPOTrainer, output_dir, **script, pack_live_tokens=live)._buffered_inputs for live in (False, True)
    ]


@pytest.mark.parametrize("options", [{}, dict(beta=0.1), dict(importance_sampling_level="turn")])
def test_rows_move_within_their_optimizer_step_and_even_out_its_tokens(options, model_path, dataset, tmp_path):
    drawn, balanced = drawn_and_trained_on(tmp_path, model=model_path, train_dataset=dataset, **options)
    assert len(drawn) == len(balanced) == 20
    spreads = []
    for start in range(0, 20, 5):
        before, after = drawn[start : start + 5], balanced[start : start + 5]
        assert sorted(rows_of(before)) == sorted(rows_of(after)) and rows_of(before) != rows_of(after)
        assert all(len(batch["completion_ids"]) == 4 for batch in after)
        before, after = ([tokens_to_score(batch, options) for batch in batches] for batches in (before, after))
        assert after == sorted(after, reverse=True)  # on every rank the fullest first
        spreads.append([5 * max(tokens) / sum(tokens) for tokens in (before, after)])
    before, after = (max(column) for column in zip(*spreads, strict=True))
    assert after < 1.15 < 1.2 < before, spreads


@pytest.mark.parametrize(
    "options",
    [
        dict(use_adaptive_entropy=True, entropy_target=9.0),
        dict(entropy_coef=0.01),
        dict(top_entropy_quantile=0.8),
        dict(router_aux_loss_coef=0.1),
        dict(gradient_accumulation_steps=1),
    ],
    ids=lambda options: next(iter(options)),
)
def test_rows_stay_where_a_mean_over_the_micro_batch_is_in_the_loss(options, moe_path, dataset, tmp_path):
    script = dict(model=moe_path, train_dataset=dataset, router_aux_loss_coef=0.0) | options
    drawn, trained_on = drawn_and_trained_on(tmp_path, **script)
    assert rows_of(drawn) == rows_of(trained_on)


# ---- memory


def bytes_kept(trainer, batch):
    """What the loss keeps for its backward pass, each storage once."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.compute_loss(trainer.model.train(), dict(batch))
    return sum(storage.nbytes() for storage in storages.values())


LENGTHS = {
    "equal": ([64] * 8, 0),
    "nearly equal": ([64] * 7 + [63], 0),
    "one row": ([64], 0),
    "two rows": ([64, 63], 0),
    "lognormal": ([64, 5, 20, 31, 17, 2, 9, 40], 0),
    "half dead": ([64] * 8, 4),
    "all dead": ([64] * 8, 8),
    "long": ([1024, 1023], 0),
    "very short": ([2] * 15 + [1], 0),
}
ATTENTION = {
    "sdpa": {},
    "eager": {"attn_implementation": "eager"},
    "window": WINDOW | {"use_sliding_window": True},
    "window eager": WINDOW | {"use_sliding_window": True, "attn_implementation": "eager"},
}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("lengths", "dead"), LENGTHS.values(), ids=LENGTHS)
def test_no_more_is_kept_for_the_backward_pass(lengths, dead, attention, model_path, dataset, tmp_path):
    settings = dict(ATTENTION[attention])
    whole, packed = both(tmp_path, model=model_path, train_dataset=dataset, model_init_kwargs=settings)
    generator, rows, width = torch.Generator().manual_seed(0), len(lengths), max(lengths)
    batch = {
        "prompt_ids": torch.randint(7, 100, (rows, 6), generator=generator),
        "prompt_mask": torch.ones(rows, 6, dtype=torch.long),
        "completion_ids": torch.randint(7, 100, (rows, width), generator=generator),
        "completion_mask": (torch.arange(width) < torch.tensor(lengths)[:, None]).long(),
        "advantages": (torch.arange(rows) >= dead).float(),
        "old_per_token_logps": torch.full((rows, width), -4.6),
        "num_items_in_batch": torch.tensor(sum(lengths)),
    }
    before, now = bytes_kept(whole, batch), bytes_kept(packed, batch)
    assert 0 < now <= (0.6 if dead else 1) * before, f"{now / before:.3f} of what the uncut loss keeps"
