"""
`GSPOTrainer` against TRL's `GRPOTrainer` at sequence level, for everything a GRPO script may set.

It is the same code on the same weights, so losses, gradients, metrics and trained weights are compared bit for bit.
"""

import asyncio
import copy
import functools
import inspect
import math
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
import trl
import yaml
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from test_diagnostics import reference_metrics
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, Qwen3ForSequenceClassification, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_gspo import GSPOConfig, GSPOTrainer, gspo_loss


# What a user of the stock trainer must write to train GSPO, and of `GSPOConfig` need not. `build` adds the four
# minibatches for each rollout batch.
SPELLED_OUT = dict(
    importance_sampling_level="sequence",
    loss_type="grpo",
    epsilon=3e-4,
    epsilon_high=4e-4,
    beta=0.0,
    disable_dropout=True,
)
# A learning rate that takes the ratio far out of the clip range within one step.
TINY = dict(
    per_device_train_batch_size=8,
    per_device_eval_batch_size=8,
    num_generations=4,
    max_completion_length=12,
    learning_rate=1e-2,
    max_steps=6,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    disable_tqdm=True,
)
TRAINER_ARGUMENTS = {*inspect.signature(GRPOTrainer.__init__).parameters, "advantage_func"}
CLOCKS = ("step_time", "_runtime", "_per_second")


def starts_lowercase(completions, **_):
    """Few values, so that some groups are dead."""
    return [float(text(completion)[:1].islower()) for completion in completions]


def text(completion):
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def build(trainer_class, output_dir, **script):
    """A trainer of `script`: the trainer's arguments and the config's options, in one dictionary."""
    script = {"reward_funcs": starts_lowercase} | script
    arguments = {name: script.pop(name) for name in list(script) if name in TRAINER_ARGUMENTS}
    attributes = {name: script.pop(name) for name in ("use_vllm", "vllm_generation") if name in script}
    options = {"output_dir": str(output_dir)} | TINY | script
    if trainer_class is GRPOTrainer:
        options = SPELLED_OUT | options
        if not {"steps_per_generation", "generation_batch_size"} & set(script):
            options["steps_per_generation"] = 4 * options.get("gradient_accumulation_steps", 1)
    else:
        # Bit for bit is the same computation; test_trainer_packing.py has packed rows.
        options = {"pack_live_tokens": False} | options
    config_class = GRPOConfig if trainer_class is GRPOTrainer else GSPOConfig
    transformers.set_seed(0)  # TRL 1.14 draws an adapter's weights before it sets the seed
    trainer = trainer_class(args=config_class(**options), **arguments)
    trainer.current_gradient_accumulation_steps = 1  # `train` sets it
    for name, value in attributes.items():  # vLLM itself is not needed for what the loss does with its log-probs
        setattr(trainer, name, value)
        trainer._last_loaded_step = -1
    return trainer


def weights(trainer):
    models = [trainer.model] if trainer.ref_model is None else [trainer.model, trainer.ref_model]
    return [parameter for model in models for parameter in model.parameters()]


def is_same(value, expected):
    return value == expected or (value != value and expected != expected)


def assert_all_equal(tensors, expected):
    assert len(tensors) == len(expected)
    for index, (one, other) in enumerate(zip(tensors, expected, strict=True)):
        assert torch.equal(one, other), f"tensor {index} differs by {(one - other).abs().max():.3g}"


@pytest.fixture(scope="module")
def folders(tokenizer, model_path, moe_path, tmp_path_factory):
    """Folders of models: the shared ones, some of which end a completion at a capital letter, and a reward model."""
    root = tmp_path_factory.mktemp("trainer")
    stops = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list("ABCDEFGHIJKLM"))]
    for name, source in (("qwen3", model_path), ("moe", moe_path)):
        model = AutoModelForCausalLM.from_pretrained(source)
        model.generation_config.eos_token_id = stops
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    torch.manual_seed(1)
    config = make_model(tokenizer).config
    config.num_labels = 1
    Qwen3ForSequenceClassification(config).save_pretrained(root / "reward")
    tokenizer.save_pretrained(root / "reward")
    return {name: str(root / name) for name in ("qwen3", "moe", "reward")}


# ---- one micro-batch: loss, gradient, metrics


# Advantage and log-ratio of each row: both signs on both sides of the clip range and inside it, a row without
# advantage, a row that `tool_mask` masks and a row that is all padding.
ROWS = [
    (1.0, 5e-3),  # clipped above
    (-0.8, -5e-3),  # clipped below
    (0.6, -8e-3),
    (-1.2, 1e-2),
    (0.5, 1e-4),
    (-0.7, -1e-4),
    (0.0, 5e-3),
    (0.4, -2e-3),
    (0.9, 5e-3),
]
CLIPPED_HIGH, CLIPPED_LOW, DEAD, TOOL_ONLY, EMPTY = 0, 1, 6, 7, 8
LENGTHS = [12, 3, 7, 11, 1, 9, 8, 5, 0]
REQUIRED_KEYS = {
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "advantages",
    "num_items_in_batch",
}
KEYS = {"old_per_token_logps", "ref_per_token_logps", "importance_sampling_ratio"}


def score(trainer, batch):
    """Log-probs of `batch` under the trainer's model, as the host's loss asks for them."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention_mask, batch["completion_ids"].size(1)
        )[0]


def trained_tokens(batch):
    return (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()


def make_batch(trainer, keys=KEYS, seed=0):
    """What TRL hands to the loss, with the optional `keys`; the ratios are those of `ROWS` exactly."""
    generator = torch.Generator().manual_seed(seed)
    rows, prompt, width = len(ROWS), 6, max(LENGTHS)
    noise = lambda scale: scale * torch.randn(rows, width, generator=generator)  # noqa: E731
    prompt_lengths = torch.randint(1, prompt + 1, (rows, 1), generator=generator)
    batch = {
        "prompt_ids": torch.randint(7, 100, (rows, prompt), generator=generator),
        "prompt_mask": (torch.arange(prompt) >= prompt - prompt_lengths).long(),
        "completion_ids": torch.randint(7, 100, (rows, width), generator=generator),
        "completion_mask": (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long(),
        "advantages": torch.tensor([advantage for advantage, _ in ROWS]),
        "tool_mask": (torch.rand(rows, width, generator=generator) < 0.7).long(),
    }
    batch["tool_mask"][:, 0] = 1
    batch["tool_mask"][TOOL_ONLY] = 0
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    if "tool_mask" not in keys:
        del batch["tool_mask"]
    logps, mask = score(trainer, batch), trained_tokens(batch)
    spread = noise(1e-2) * mask
    spread = spread - spread.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    old = logps - torch.tensor([log_ratio for _, log_ratio in ROWS])[:, None] - spread
    optional = {
        "old_per_token_logps": old,
        "ref_per_token_logps": logps + noise(0.3),
        # The sampler drifted on three rows, among them one of negative advantage that is not clipped.
        "sampling_per_token_logps": old + noise(1e-3) + 0.05 * torch.tensor([0, 0, 1, 1, 0, 1, 0, 0, 0])[:, None],
        "importance_sampling_ratio": noise(0.5).exp().clamp(max=1.5),
    }
    if trainer.vllm_importance_sampling_mode.startswith("sequence"):  # (B, 1), and 0 where a sequence is masked
        optional["importance_sampling_ratio"] = noise(0.5).exp()[:, :1] * (torch.arange(rows)[:, None] != 2)
    return batch | {key: value for key, value in optional.items() if key in keys}


def backward(trainer, batches):
    """Losses, gradients and metrics of two accumulation windows over `batches`, then of an evaluation of them."""
    trainer.current_gradient_accumulation_steps = len(batches)
    trainer.model.train()
    losses = []
    for batch in [*batches, *batches]:
        trainer.accelerator.gradient_state._set_sync_gradients(batch is batches[-1])
        losses.append(trainer.compute_loss(trainer.model, dict(batch)))
        losses[-1].backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.eval()
    with torch.no_grad():
        losses += [trainer.compute_loss(trainer.model, dict(batch)) for batch in batches]
    metrics = {f"{mode}/{key}": values for mode in ("train", "eval") for key, values in trainer._metrics[mode].items()}
    return [loss.detach() for loss in losses], gradients, metrics


def assert_same_backward(result, expected):
    losses, gradients, metrics = result
    expected_losses, expected_gradients, expected_metrics = expected
    assert_all_equal(losses, expected_losses)
    assert gradients.keys() == expected_gradients.keys()
    assert_all_equal(list(gradients.values()), list(expected_gradients.values()))
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-5
    for key, values in expected_metrics.items():
        assert all(map(is_same, metrics[key], values)) and len(metrics[key]) == len(values), key


class Case(NamedTuple):
    on: dict  # options of both trainers
    off: dict = {}  # options of a stock trainer whose loss must differ, so that the case can fail
    keys: set = KEYS  # optional keys of `inputs`
    off_keys: set = KEYS


CASES = {
    "defaults": Case({}, dict(importance_sampling_level="token")),
    "sequence_mean": Case({}, dict(loss_type="dapo")),
    "clip_range": Case({}, dict(epsilon=0.2, epsilon_high=0.2)),
    "other_clip_range": Case(dict(epsilon=2e-3, epsilon_high=6e-3)),
    "epsilon_high_none": Case(dict(epsilon_high=None)),
    "luspo": Case(dict(loss_type="luspo")),
    "on_policy": Case({}, keys=KEYS - {"old_per_token_logps"}),
    "kl": Case(dict(beta=0.1)),
    "kl_bias_correction": Case(
        dict(beta=0.1, use_bias_correction_kl=True), dict(beta=0.1, use_bias_correction_kl=False)
    ),
    "kl_no_bias_correction": Case(
        dict(beta=0.1, use_bias_correction_kl=False), dict(beta=0.1, use_bias_correction_kl=True)
    ),
    "luspo_kl": Case(dict(loss_type="luspo", beta=0.1), dict(loss_type="luspo")),
    "delta": Case(dict(delta=1.005)),
    "tool_mask": Case({}, keys=KEYS | {"tool_mask"}),
    "tool_mask_kl": Case(dict(beta=0.1), keys=KEYS | {"tool_mask"}, off_keys=KEYS | {"tool_mask"}),
    "top_entropy_quantile": Case(dict(top_entropy_quantile=0.5)),
    "entropy_coef": Case(dict(entropy_coef=0.05)),
    "entropy_coef_quantile": Case(dict(entropy_coef=0.05, top_entropy_quantile=0.5), dict(top_entropy_quantile=0.5)),
    "adaptive_entropy": Case(
        dict(use_adaptive_entropy=True, entropy_coef=0.01, entropy_target=9.0), dict(entropy_coef=0.01)
    ),
    "adaptive_entropy_falling": Case(
        dict(use_adaptive_entropy=True, entropy_coef=0.01, entropy_target=0.1), dict(entropy_coef=0.01)
    ),
    "off_policy_mask": Case(dict(off_policy_mask_threshold=2e-3)),
    "off_policy_mask_sampler": Case(
        dict(off_policy_mask_threshold=2e-3),
        dict(off_policy_mask_threshold=2e-3),
        keys=KEYS | {"sampling_per_token_logps"},
    ),
    "temperature": Case(dict(temperature=0.7)),
    "vllm_token_ratio": Case(dict(use_vllm=True, vllm_importance_sampling_mode="token_truncate")),
    "vllm_sequence_ratio": Case(dict(use_vllm=True, vllm_importance_sampling_mode="sequence_mask")),
    "vllm_no_correction": Case(dict(use_vllm=True, vllm_importance_sampling_correction=False), dict(use_vllm=True)),
    "router_loss": Case(dict(model="moe", router_aux_loss_coef=0.1), dict(model="moe", router_aux_loss_coef=0.0)),
    "router_loss_of_model": Case(dict(model="moe"), dict(model="moe", router_aux_loss_coef=0.0)),
    "bfloat16": Case(dict(model_init_kwargs={"dtype": "bfloat16"})),
    "bfloat16_float32_head": Case(
        dict(model_init_kwargs={"dtype": "bfloat16"}, cast_lm_head_to_fp32=True),
        dict(model_init_kwargs={"dtype": "bfloat16"}),
    ),
    "everything": Case(
        dict(
            beta=0.1,
            delta=1.005,
            top_entropy_quantile=0.8,
            use_adaptive_entropy=True,
            entropy_target=9.0,
            off_policy_mask_threshold=2e-3,
            use_vllm=True,
        ),
        keys=KEYS | {"tool_mask", "sampling_per_token_logps"},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_gradient_and_metrics_are_the_hosts(case, folders, dataset, tmp_path):
    def trainer_of(trainer_class, options):
        model = folders[options.get("model", "qwen3")]
        return build(trainer_class, tmp_path, **options | {"model": model, "train_dataset": dataset})

    stock = trainer_of(GRPOTrainer, case.on)
    batches = [make_batch(stock, case.keys | case.off_keys, seed) for seed in (0, 1)]
    batches, off_batches = (
        [{key: batch[key] for key in batch if key in REQUIRED_KEYS | keys} for batch in batches]
        for keys in (case.keys, case.off_keys)
    )
    expected = backward(stock, batches)
    assert_same_backward(backward(trainer_of(GSPOTrainer, case.on), batches), expected)
    off_losses, _, _ = backward(trainer_of(GRPOTrainer, case.off), off_batches)
    assert not all(map(torch.equal, off_losses, expected[0]))


class SpyTrainer(GSPOTrainer):
    """Keeps the log-probs that its last loss was computed from, with their gradient."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if logps.requires_grad:
            logps.retain_grad()
        self.seen_logps = logps
        return logps, *others


@pytest.fixture
def spy(folders, dataset, tmp_path):
    return build(SpyTrainer, tmp_path, model=folders["qwen3"], train_dataset=dataset)


def paper_loss(logps, old_logps, advantages, mask, epsilon_low, epsilon_high):
    """Equations 5 and 7 of the GSPO paper with its clip, one sequence after the other."""
    objective = 0.0
    for logp, old_logp, advantage, is_trained in zip(logps, old_logps, advantages, mask.tolist(), strict=True):
        tokens = [t for t, trained in enumerate(is_trained) if trained]
        if not tokens:
            continue
        ratio = torch.exp(sum(logp[t] - old_logp[t] for t in tokens) / len(tokens))
        clipped_ratio = min(max(ratio, 1 - epsilon_low), 1 + epsilon_high)
        objective = objective + min(ratio * advantage, clipped_ratio * advantage)
    return -objective / len(logps)


@pytest.mark.parametrize("keys", [KEYS, KEYS | {"tool_mask"}], ids=["", "tool_mask"])
def test_loss_is_the_papers_and_its_gradient_flows_where_the_clip_lets_it(spy, keys):
    batch = make_batch(spy, keys)
    spy.model.train()
    spy.current_gradient_accumulation_steps = 3
    loss = spy.compute_loss(spy.model, dict(batch))
    loss.backward()
    gradient = spy.seen_logps.grad

    logps = spy.seen_logps.detach().double().requires_grad_()
    reference = paper_loss(
        logps, batch["old_per_token_logps"].double(), batch["advantages"].double(), trained_tokens(batch), 3e-4, 4e-4
    )
    (reference / 3).backward()
    assert loss.item() == pytest.approx(reference.item() / 3, rel=1e-5)
    assert (gradient - logps.grad).norm() < 1e-5 * logps.grad.norm()

    has_gradient = gradient.ne(0).any(1)
    without = {CLIPPED_HIGH, CLIPPED_LOW, DEAD, EMPTY} | ({TOOL_ONLY} if "tool_mask" in keys else set())
    assert has_gradient.tolist() == [row not in without for row in range(len(ROWS))]
    assert not gradient[~trained_tokens(batch)].any()
    # Against the sign of the advantage: a step along it makes good completions likelier.
    assert (gradient * batch["advantages"][:, None] <= 0).all()


@pytest.mark.parametrize("keys", [KEYS, KEYS | {"tool_mask"}], ids=["", "tool_mask"])
def test_loss_is_that_of_the_functional_form(spy, keys):
    batch = make_batch(spy, keys)
    spy.model.train()
    spy.current_gradient_accumulation_steps = 3
    loss = spy.compute_loss(spy.model, dict(batch))
    gradients = torch.autograd.grad(loss, spy.model.parameters(), retain_graph=True)

    functional, _ = gspo_loss(spy.seen_logps, batch["old_per_token_logps"], batch["advantages"], trained_tokens(batch))
    functional_gradients = torch.autograd.grad(functional / 3, spy.model.parameters())
    assert loss.item() == pytest.approx(functional.item() / 3, rel=1e-5)
    difference = torch.cat([(a - b).flatten() for a, b in zip(gradients, functional_gradients, strict=True)])
    total = torch.cat([gradient.flatten() for gradient in gradients])
    assert difference.norm() < 1e-5 * total.norm()


def test_gradient_and_statistics_do_not_depend_on_the_micro_batch_size(spy):
    batch = make_batch(spy, KEYS | {"tool_mask"})
    whole = {key: value[:8] if value.dim() else value for key, value in batch.items()}
    halves = [{key: value[i : i + 2] if value.dim() else value for key, value in whole.items()} for i in (0, 2, 4, 6)]

    def gradient_and_log(batches):
        spy.current_gradient_accumulation_steps = len(batches)
        spy.model.train().zero_grad()
        for micro_batch in batches:
            spy.compute_loss(spy.model, micro_batch).backward()
        spy.log({"loss": 0.0})
        log = {key: value for key, value in spy.state.log_history[-1].items() if key.startswith("gspo/")}
        return torch.cat([parameter.grad.flatten() for parameter in spy.model.parameters()]), log

    gradient, log = gradient_and_log([whole])
    micro_gradient, micro_log = gradient_and_log(halves)
    assert (gradient - micro_gradient).norm() < 1e-5 * gradient.norm()
    assert micro_log == pytest.approx(log, rel=1e-6, abs=1e-6)
    assert log["gspo/clip_fraction/low"] > 0 and log["gspo/clip_fraction/high"] > 0


def test_finite_garbage_in_padding_changes_nothing(spy):
    # Not NaN: the host multiplies by the mask, and NaN in the padding of what it is handed makes its loss NaN.
    batch = make_batch(spy)
    garbage = dict(batch, old_per_token_logps=batch["old_per_token_logps"].clone())
    garbage["old_per_token_logps"][~trained_tokens(batch)] = -70.0
    losses, logs = [], []
    for inputs in (batch, garbage):
        spy.model.train().zero_grad()
        losses.append(spy.compute_loss(spy.model, inputs))
        losses[-1].backward()
        spy.log({"loss": 0.0})
        logs.append({key: value for key, value in spy.state.log_history[-1].items() if key.startswith("gspo/")})
    assert torch.equal(*losses) and losses[0] != 0
    assert logs[0] == logs[1]


# ---- what is logged beside the host's metrics


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_statistics_are_those_of_all_micro_batches_since_the_last_log(spy, mode):
    spy.model.train(mode == "train")
    seen = []
    for seed, keys in enumerate([KEYS, KEYS | {"tool_mask"}, KEYS - {"old_per_token_logps"}]):
        batch = make_batch(spy, keys, seed)
        batch["advantages"] = batch["advantages"].roll(seed)
        spy.compute_loss(spy.model, dict(batch))
        logps = spy.seen_logps.detach()
        arrays = (logps, batch.get("old_per_token_logps", logps), batch["advantages"], trained_tokens(batch))
        seen.append([array if array is arrays[3] else array.double() for array in arrays])
        spy.log({"note": 1.0})  # a call of the user's own, which may not reach all ranks

    assert not any("gspo/" in key for entry in spy.state.log_history for key in entry)
    spy.log({"loss": 0.0} if mode == "train" else {"eval_loss": 0.0})
    logged, prefix = spy.state.log_history[-1], "" if mode == "train" else "eval_"
    expected = reference_metrics(seen, 3e-4, 4e-4)
    # Log-probs are float32: that is 1e-7 of a ratio, and more of what is left after 1 is taken from it.
    for key, value in expected.items():
        is_ratio = key.startswith(("gspo/clip", "gspo/live")) or 0.9 < value < 1.1
        assert logged[prefix + key] == pytest.approx(value, rel=1e-6 if is_ratio else 1e-4, abs=0), key
    assert 0 < expected["gspo/clip_fraction/low"] != expected["gspo/clip_fraction/high"] > 0

    spy.log({"loss": 0.0} if mode == "train" else {"eval_loss": 0.0})
    assert not any("gspo/" in key for key in spy.state.log_history[-1])


def test_without_a_live_sequence_the_fractions_are_missing_and_not_zero(spy):
    batch = make_batch(spy)
    spy.model.train()
    spy.compute_loss(spy.model, batch | {"advantages": torch.zeros(len(ROWS))})
    spy.log({"loss": 0.0})
    log = spy.state.log_history[-1]
    assert log["gspo/live_fraction"] == 0
    assert log["gspo/clip_fraction/sequences"] is log["gspo/ratio/mean"] is log["gspo/ratio/max"] is None


# ---- vision inputs


VISION_TOKENS = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]


@pytest.fixture(scope="module")
def qwen_vl(tmp_path_factory):
    """Folder of a tiny random Qwen2.5-VL, and its tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": VISION_TOKENS})
    start, image, video, end = tokenizer.convert_tokens_to_ids(VISION_TOKENS)
    text_config = make_model(tokenizer).config.to_dict()
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    text_config = {name: text_config[name] for name in names.split()} | dict(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    )
    vision_config = dict(
        depth=2,
        hidden_size=16,
        intermediate_size=16,
        num_heads=2,
        out_hidden_size=32,
        patch_size=4,
        temporal_patch_size=1,
        window_size=16,
        fullatt_block_indexes=[1],
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("qwen_vl")
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(path)
    return str(path), tokenizer


def vision_batch(trainer, tokenizer, seed):
    """Rows with one, two and no images of different sizes, in the layout of Qwen-VL."""
    generator = torch.Generator().manual_seed(seed)
    batch = make_batch(trainer, seed=seed)
    start, image, _, end = tokenizer.convert_tokens_to_ids(VISION_TOKENS)
    grids = torch.tensor([[1, 4, 4], [1, 2, 4], [1, 6, 2], [1, 4, 2]])
    images_of_row = [[0], [1, 2], [], [3]] + [[]] * (len(ROWS) - 4)
    prompts = [
        [token for index in images for token in [start, *[image] * (int(grids[index].prod()) // 4), end]] + [9, 10]
        for images in images_of_row
    ]
    width = max(map(len, prompts))
    batch["prompt_ids"] = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    batch["prompt_mask"] = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    return batch | {
        "pixel_values": torch.randn(int(grids.prod(1).sum()), 3 * 4 * 4, generator=generator),
        "image_grid_thw": grids,
        "num_images": [len(images) for images in images_of_row],
        "mm_token_type_ids": (ids == image).long(),
    }


def test_loss_of_images_is_the_hosts(qwen_vl, dataset, tmp_path):
    path, tokenizer = qwen_vl
    script = dict(model=path, train_dataset=dataset, processing_class=tokenizer)
    stock = build(GRPOTrainer, tmp_path, **script)
    batches = [vision_batch(stock, tokenizer, seed) for seed in (0, 1)]
    expected = backward(stock, batches)
    assert_same_backward(backward(build(GSPOTrainer, tmp_path, **script), batches), expected)
    assert any("visual" in name and gradient.any() for name, gradient in expected[1].items())
    blank = [batch | {"pixel_values": torch.zeros_like(batch["pixel_values"])} for batch in batches]
    assert not all(map(torch.equal, backward(build(GRPOTrainer, tmp_path, **script), blank)[0], expected[0]))


# ---- whole scripts


def starts_lowercase_or_none(completions, **_):
    return [None if "a" in text(completion) else float(len(text(completion)) % 3) for completion in completions]


def length_parity(completions, log_metric, log_extra, **_):
    lengths = [len(text(completion)) for completion in completions]
    log_metric("mean_length", sum(lengths) / len(lengths))
    log_extra("length", lengths)
    return [float(length % 2) for length in lengths]


async def starts_uppercase(completions, **_):
    await asyncio.sleep(0)
    return [float(text(completion)[:1].isupper()) for completion in completions]


def chat(dataset):
    return Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in dataset])


def ordinals(text: str) -> str:
    """
    Sums the characters of a text.

    Args:
        text: The text.

    Returns:
        The sum.
    """
    return str(sum(map(ord, text)))


async def async_ordinals(text: str) -> str:
    await asyncio.sleep(0)
    return ordinals(text)


class Desk:
    """An environment: a tool, and a reward for having used it."""

    def reset(self, **_):
        self.calls = 0
        return "?"

    def ordinals(self, text: str) -> str:
        self.calls += 1
        return ordinals(text)

    def get_reward(self):
        return float(self.calls)


# The model is told of a tool by its docstring.
Desk.ordinals.__doc__ = async_ordinals.__doc__ = ordinals.__doc__


def tool_tokenizer(tool):
    """A tokenizer by which random text calls `tool`: what stands between a letter of n-z and a capital letter."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}"
        "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    call = {"type": "function", "function": {"name": tool, "arguments": {"text": "{content}"}}}
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|assistant|>",
        "fields": {
            "tool_calls": {"open_pattern": "[n-z]", "close_pattern": "[A-Z]", "repeats": True, "transform": call},
            "content": {"content": "text"},
        },
    }
    return tokenizer


def rollout(prompts, trainer):
    """Random completions of a sampler whose log-probs are near the policy's, with tokens of an environment inside."""
    generator = random.Random(trainer.state.global_step)
    tokenizer = trainer.processing_class
    lengths = [generator.randint(1, 12) for _ in prompts]
    completion_ids = [[generator.randint(7, 100) for _ in range(length)] for length in lengths]
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": completion_ids,
        "logprobs": [[-math.log(len(tokenizer)) + generator.gauss(0, 0.1) for _ in ids] for ids in completion_ids],
        "env_mask": [[int(t % 4 != 2) for t in range(length)] for length in lengths],
    }


class Synchronized:
    """In the place of a vLLM engine where `rollout` generates."""

    def sync_weights(self):
        pass


def lora_model(path):
    """A PEFT model whose adapter has been trained before: its output is not the base model's."""
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_pretrained(path)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def images(folders, dataset):
    """Prompts with a picture each, for a Llava."""
    if Version(trl.__version__) < Version("1.15") and Version(transformers.__version__) > Version("5.20.2"):
        pytest.skip("TRL 1.14 loses the pixels of the image processors of later transformers: stock fails")
    image = pytest.importorskip("PIL.Image")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}<|end|>{% endfor %}<|assistant|>",
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(
        text_config=make_model(tokenizer).config,
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
        image_token_index=image_token,
        image_seq_length=4,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.config.image_token_id = image_token
    pictures = [image.new("RGB", (8, 8), (13 * i % 256, 7 * i % 256, 29 * i % 256)) for i in range(16)]
    prompt = [{"role": "user", "content": "which?"}]
    rows = Dataset.from_list([{"prompt": prompt, "image": picture} for picture in pictures])
    return dict(model=model, processing_class=processor, train_dataset=rows, reward_funcs=length_parity)


def uses_tool(tool, **others):
    return lambda folders, dataset: dict(
        train_dataset=chat(dataset), processing_class=tool_tokenizer(tool), max_completion_length=40, **others
    )


def rolls_out(**others):
    return lambda folders, dataset: dict(rollout_func=rollout, **others)


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
TWO_REWARDS = [length_parity, starts_lowercase_or_none]
ACCUMULATION = dict(gradient_accumulation_steps=2, per_device_train_batch_size=4)
EVALUATION = dict(eval_strategy="steps", eval_steps=2)
VLLM = dict(use_vllm=True, vllm_generation=Synchronized())

# Name -> the script, from `folders` and `dataset`. Called once for each trainer: TRL writes into what it is handed.
SCRIPTS = {
    "plain": lambda f, d: {},
    "one_step_a_rollout": lambda f, d: dict(steps_per_generation=1),
    "generation_batch_size": lambda f, d: dict(generation_batch_size=16),
    "num_iterations": lambda f, d: dict(num_iterations=2, max_steps=10),
    "accumulation": lambda f, d: ACCUMULATION,
    "rare_logs": lambda f, d: dict(logging_steps=4),
    "sampling": lambda f, d: dict(
        temperature=0.8, top_p=0.9, top_k=50, min_p=0.001, repetition_penalty=1.1, seed=3, shuffle_dataset=False
    ),
    "pad_to_multiple_of": lambda f, d: dict(pad_to_multiple_of=16, max_completion_length=9),
    "scale_rewards_batch": lambda f, d: dict(scale_rewards="batch"),
    "scale_rewards_none": lambda f, d: dict(scale_rewards="none"),
    "reward_none": lambda f, d: dict(reward_funcs=starts_lowercase_or_none),
    "reward_none_as_0": lambda f, d: dict(
        reward_funcs=lambda **k: [reward or 0.0 for reward in starts_lowercase_or_none(**k)]
    ),
    "two_rewards": lambda f, d: dict(reward_funcs=TWO_REWARDS.copy()),
    "reward_weights": lambda f, d: dict(reward_funcs=TWO_REWARDS.copy(), reward_weights=[1.0, -0.3]),
    "normalize_then_sum": lambda f, d: dict(
        reward_funcs=TWO_REWARDS.copy(), multi_objective_aggregation="normalize_then_sum"
    ),
    "async_rewards": lambda f, d: dict(reward_funcs=[starts_uppercase, starts_lowercase]),
    "reward_model": lambda f, d: dict(reward_funcs=f["reward"]),
    "reward_model_and_function": lambda f, d: dict(
        reward_funcs=[Qwen3ForSequenceClassification.from_pretrained(f["reward"]), length_parity],
        reward_processing_classes=[make_tokenizer(), None],
    ),
    "iterable_dataset": lambda f, d: dict(train_dataset=d.to_iterable_dataset()),
    "chat": lambda f, d: dict(train_dataset=chat(d)),
    "luspo": lambda f, d: dict(loss_type="luspo"),
    "kl": lambda f, d: dict(beta=0.1),
    "sync_ref_model": lambda f, d: dict(
        beta=0.1, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.6
    ),
    "short": lambda f, d: dict(max_completion_length=6),
    "mask_truncated_completions": lambda f, d: dict(mask_truncated_completions=True, max_completion_length=6),
    "adaptive_entropy": lambda f, d: dict(
        ACCUMULATION, use_adaptive_entropy=True, entropy_coef=0.05, entropy_target=9.0
    ),
    "everything": lambda f, d: dict(
        beta=0.05,
        delta=1.5,
        epsilon_high=None,
        top_entropy_quantile=0.8,
        entropy_coef=0.01,
        off_policy_mask_threshold=1e-3,
        mask_truncated_completions=True,
        num_iterations=2,
    ),
    "gradient_checkpointing": lambda f, d: dict(gradient_checkpointing=True),
    "bfloat16": lambda f, d: dict(model_init_kwargs={"dtype": "bfloat16"}, cast_lm_head_to_fp32=True),
    "autocast": lambda f, d: dict(bf16=True),
    "experts": lambda f, d: dict(model=f["moe"], router_aux_loss_coef=0.0),
    "experts_router_loss": lambda f, d: dict(model=f["moe"], router_aux_loss_coef=0.1),
    "images": images,
    "lora": lambda f, d: dict(peft_config=LORA),
    "lora_kl": lambda f, d: dict(peft_config=LORA, beta=0.1),
    "trained_lora": lambda f, d: dict(model=lora_model(f["qwen3"])),
    "trained_lora_kl": lambda f, d: dict(model=lora_model(f["qwen3"]), beta=0.1),
    "evaluation": lambda f, d: dict(EVALUATION, eval_dataset=d.select(range(4)), beta=0.1),
    "evaluation_sets": lambda f, d: dict(
        EVALUATION, num_generations_eval=2, eval_dataset={"easy": d.select(range(4)), "hard": d.select(range(4, 12))}
    ),
    "log_completions": lambda f, d: dict(log_completions=True, num_completions_to_print=0),
    "tools": uses_tool("ordinals", tools=[ordinals], max_tool_calling_iterations=2),
    "tools_unused": uses_tool("ordinals"),
    "async_tools": uses_tool("async_ordinals", tools=[async_ordinals], mask_truncated_completions=True),
    "environment": uses_tool("ordinals", environment_factory=Desk, reward_funcs=None),
    "rollout_func": rolls_out(),
    "rollout_func_off_policy_mask": rolls_out(off_policy_mask_threshold=0.01),
    "vllm": rolls_out(**VLLM),
    "vllm_token_truncate": rolls_out(**VLLM, vllm_importance_sampling_mode="token_truncate"),
}
# The script whose losses must differ, so that the option is seen to be heard; the plain one for all others.
WITHOUT = {
    "reward_none": "reward_none_as_0",
    "reward_weights": "two_rewards",
    "normalize_then_sum": "two_rewards",
    "sync_ref_model": "kl",
    "mask_truncated_completions": "short",
    "adaptive_entropy": "accumulation",
    "experts_router_loss": "experts",
    "lora_kl": "lora",
    "trained_lora_kl": "trained_lora",
    "evaluation": "kl",
    "tools": "tools_unused",
    "rollout_func_off_policy_mask": "rollout_func",
    "vllm": "rollout_func",
    "vllm_token_truncate": "vllm",
}
TRAINS_AS_PLAIN = {"plain", "gradient_checkpointing", "rare_logs", "log_completions"}


def trained(trainer_class, output_dir, **script):
    trainer = build(trainer_class, output_dir, **script)
    trainer.train()
    return trainer


def without_clocks(log):
    return [{key: value for key, value in entry.items() if not key.endswith(CLOCKS)} for entry in log]


def assert_same_log(log, expected):
    """Every key of the stock trainer's with its value, and beside them none but ours."""
    assert len(log) == len(expected)
    for entry, expected_entry in zip(without_clocks(log), without_clocks(expected), strict=True):
        for key, value in expected_entry.items():
            assert is_same(entry[key], value), f"{key} at step {entry['step']}"
        added = entry.keys() - expected_entry.keys()
        assert all(key.startswith(("gspo/", "eval_gspo/")) for key in added)
        assert ("loss" in entry) <= ("gspo/ratio/mean" in added)
        assert ("eval_reward" in entry) <= ("eval_gspo/ratio/mean" in added)


def is_same_entry(entry, expected):
    return entry.keys() == expected.keys() and all(is_same(entry[key], expected[key]) for key in entry)


def losses(log):
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.fixture(scope="module")
def run(folders, dataset, tmp_path_factory):
    """Trains a script, once for each trainer."""

    @functools.cache
    def run(trainer_class, name):
        script = {"model": folders["qwen3"], "train_dataset": dataset} | SCRIPTS[name](folders, dataset)
        return trained(trainer_class, tmp_path_factory.mktemp(name), **script)

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_trains_as_with_the_host(run, name):
    ours, stock = run(GSPOTrainer, name), run(GRPOTrainer, name)
    assert_all_equal(weights(ours), weights(stock))
    assert_same_log(ours.state.log_history, stock.state.log_history)
    assert max(entry.get("grad_norm", 0) for entry in stock.state.log_history) > 1e-3
    if name not in TRAINS_AS_PLAIN:
        without = run(GRPOTrainer, WITHOUT.get(name, "plain"))
        assert losses(stock.state.log_history) != losses(without.state.log_history)


def test_plain_script_is_clipped_on_both_sides(run):
    steps = [entry for entry in run(GSPOTrainer, "plain").state.log_history if "loss" in entry]
    assert len(steps) == 6
    for side in ("low", "high"):
        fractions = [entry[f"gspo/clip_fraction/{side}"] for entry in steps]
        assert fractions[0] == fractions[4] == 0 < max(fractions)  # the first steps of the two rollout batches


def test_options_outside_the_loss_do_what_they_say(run, folders):
    def logged(name, key):
        return [entry[key] for entry in run(GSPOTrainer, name).state.log_history if entry.get(key) is not None]

    start = AutoModelForCausalLM.from_pretrained(folders["qwen3"]).parameters()
    assert not any(map(torch.equal, run(GSPOTrainer, "sync_ref_model").ref_model.parameters(), start))
    assert 0 < min(logged("mask_truncated_completions", "completions/clipped_ratio")) < 1
    assert min(logged("mask_truncated_completions", "gspo/live_fraction")) < min(logged("short", "gspo/live_fraction"))
    assert len(set(logged("adaptive_entropy", "entropy_coef"))) > 1
    for name in ("tools", "async_tools", "environment"):
        assert min(logged(name, "tools/call_frequency")) > 0 == max(logged(name, "tools/failure_frequency"))
        assert not all(inputs["tool_mask"].all() for inputs in run(GSPOTrainer, name)._buffered_inputs)
    assert len(logged("evaluation", "eval_gspo/ratio/mean")) == len(logged("evaluation", "eval_loss")) == 3
    tables, stock_tables = (
        [path.read_bytes() for path in sorted(Path(run(cls, "log_completions").args.output_dir).rglob("*.parquet"))]
        for cls in (GSPOTrainer, GRPOTrainer)
    )
    assert tables == stock_tables != []


class CountSteps(TrainerCallback):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, *args, **kwargs):
        self.steps += 1


def test_arguments_are_taken_by_position_as_with_the_host(folders, dataset, tmp_path):
    trainers = []
    for trainer_class, config_class, options in (
        (GSPOTrainer, GSPOConfig, {"pack_live_tokens": False}),
        (GRPOTrainer, GRPOConfig, SPELLED_OUT | {"steps_per_generation": 4}),
    ):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folders["qwen3"])
        callback, optimizer = CountSteps(), torch.optim.SGD(model.parameters(), lr=1.0)
        args = config_class(str(tmp_path), **TINY | options | {"eval_strategy": "steps", "eval_steps": 3})
        tokenizers = make_tokenizer(), [make_tokenizer(), None]
        rewards = [folders["reward"], starts_lowercase]
        # fmt: off
        trainer = trainer_class(
            model, rewards, args, dataset, dataset.select(range(4)), *tokenizers, [callback], (optimizer, None)
        )
        # fmt: on
        trainer.train()
        assert callback.steps == 6
        trainers.append(trainer)
    ours, stock = trainers
    assert_all_equal(weights(ours), weights(stock))
    assert_same_log(ours.state.log_history, stock.state.log_history)
    signature, stock_signature = (
        [(p.name, p.default, p.kind) for p in inspect.signature(trainer_class).parameters.values()]
        for trainer_class in (GSPOTrainer, GRPOTrainer)
    )
    assert signature == [*stock_signature, ("advantage_func", None, inspect.Parameter.KEYWORD_ONLY)]


@pytest.mark.parametrize("options", [{}, dict(ACCUMULATION, use_adaptive_entropy=True, entropy_target=9.0)])
def test_resumes_exactly_and_takes_turns_with_the_host(options, folders, dataset, tmp_path):
    script = {"model": folders["qwen3"], "train_dataset": dataset, "save_strategy": "steps", "save_steps": 2} | options
    whole = {
        trainer_class: trained(trainer_class, tmp_path / trainer_class.__name__, **script)
        for trainer_class in (GSPOTrainer, GRPOTrainer)
    }
    assert_all_equal(weights(whole[GSPOTrainer]), weights(whole[GRPOTrainer]))

    def resumed(trainer_class, checkpoint_of):
        trainer = build(trainer_class, tmp_path / "resumed", **script)
        trainer.train(resume_from_checkpoint=str(tmp_path / checkpoint_of.__name__ / "checkpoint-2"))
        assert [entry["step"] for entry in trainer.state.log_history] == [1, 2, 3, 4, 5, 6, 6]
        return trainer

    # Stock does not: it samples the rest of a rollout batch anew (docs/resume.md).
    ours = resumed(GSPOTrainer, GSPOTrainer)
    assert_all_equal(weights(ours), weights(whole[GSPOTrainer]))
    # But the last, which has the mean loss of this call's steps.
    logs = [without_clocks(trainer.state.log_history[:-1]) for trainer in (ours, whole[GSPOTrainer])]
    assert all(map(is_same_entry, *logs))
    assert ours.entropy_coef == whole[GSPOTrainer].entropy_coef
    start = AutoModelForCausalLM.from_pretrained(folders["qwen3"]).parameters()
    assert not all(map(torch.equal, weights(ours), start))

    # A checkpoint of ours serves stock as its own does, and the other way round there is no more to go by.
    stock = [resumed(GRPOTrainer, checkpoint_of) for checkpoint_of in (GSPOTrainer, GRPOTrainer)]
    assert_all_equal(*map(weights, stock))
    assert all(map(is_same_entry, *(without_clocks(trainer.state.log_history[2:]) for trainer in stock)))
    resumed(GSPOTrainer, GRPOTrainer)
    names = [
        {path.name for path in (tmp_path / trainer_class.__name__ / "checkpoint-2").iterdir()}
        for trainer_class in (GSPOTrainer, GRPOTrainer)
    ]
    assert names[0] - names[1] == {"checkpoint.json", "gspo_state_0.pt"} and not names[1] - names[0]


# ---- construction


def test_a_grpo_config_trains_as_its_conversion_and_is_left_as_it_is(folders, dataset, tmp_path):
    # TRL writes into each of these: the accelerator's configuration, the number of workers, the model's arguments.
    script = dict(
        model=folders["qwen3"],
        reward_funcs=folders["reward"],
        train_dataset=dataset.to_iterable_dataset(),
        dataloader_num_workers=1,
        model_init_kwargs={"dtype": "float32"},
        output_dir=str(tmp_path),
    )
    arguments = {name: script.pop(name) for name in list(script) if name in TRAINER_ARGUMENTS}
    config = GRPOConfig(**TINY | script | dict(steps_per_generation=4, scale_rewards="batch"))
    before = copy.deepcopy(vars(config)) | {"distributed_state": config.distributed_state}  # has no equality
    trainers = []
    for args in (config, GSPOConfig.from_grpo(config)):
        trainers.append(GSPOTrainer(args=args, **arguments))
        trainers[-1].train()
    from_grpo, from_gspo = trainers
    assert vars(config) == before
    assert from_grpo.args is not config and isinstance(from_grpo.args, GSPOConfig)
    assert from_grpo.loss_type == "grpo" and from_grpo.importance_sampling_level == "sequence"
    assert (from_grpo.epsilon_low, from_grpo.epsilon_high) == (3e-4, 4e-4)
    assert from_grpo.scale_rewards == "batch"
    assert_all_equal(weights(from_grpo), weights(from_gspo))
    assert without_clocks(from_grpo.state.log_history) == without_clocks(from_gspo.state.log_history)


@pytest.mark.parametrize("as_object", [False, True], ids=["folder", "object"])
def test_without_args_the_output_is_named_after_the_model(as_object, folders, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The host's default is bfloat16, which transformers refuses where there is no GPU.
    monkeypatch.setattr("trl_gspo.trainer.GSPOConfig", functools.partial(GSPOConfig, use_cpu=True, bf16=False))
    model = AutoModelForCausalLM.from_pretrained(folders["qwen3"]) if as_object else folders["qwen3"]
    trainer = GSPOTrainer(model, starts_lowercase, train_dataset=dataset)
    assert type(trainer.args) is GSPOConfig
    assert Path(trainer.args.output_dir).name == "qwen3-GSPO"
    assert trainer.args.steps_per_generation == 4


def test_too_small_a_dataset_is_refused_before_a_model_is_loaded(dataset, tmp_path):
    script = dict(model=str(tmp_path / "no-such-model"), output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match=r"`train_dataset` has 7 prompts, and one rollout batch takes 8 .*8 x.* 1 x"):
        build(GSPOTrainer, train_dataset=dataset.select(range(7)), **script)
    with pytest.raises(OSError, match="no-such-model"):  # enough for one: it is the model that is missing
        build(GSPOTrainer, train_dataset=dataset.select(range(8)), **script)


def test_the_smallest_dataset_that_is_not_refused_trains(folders, dataset, tmp_path):
    trainer = trained(
        GSPOTrainer, tmp_path, model=folders["qwen3"], train_dataset=dataset.select(range(8)), max_steps=2
    )
    assert trainer.state.global_step == 2


def test_advantages_of_tokens_are_refused(spy):
    batch = make_batch(spy)
    batch["advantages"] = batch["advantages"][:, None].expand(-1, 12)
    with pytest.raises(ValueError, match=r"`advantages` must be \(B,\), one for each sequence, got \(9, 12\)"):
        spy.compute_loss(spy.model, batch)


@pytest.mark.parametrize("kind", ["attention_dropout", "lora_dropout"])
def test_dropout_is_off_unless_asked_for(kind, folders, dataset, tmp_path):
    def is_noisy(trainer_class, **options):
        script = {"model": folders["qwen3"]}
        if kind == "attention_dropout":
            script["model"] = AutoModelForCausalLM.from_pretrained(folders["qwen3"], attention_dropout=0.5)
        else:
            script["peft_config"] = LORA
        trainer = build(trainer_class, tmp_path, train_dataset=dataset, **script | options)
        batch = make_batch(trainer)
        trainer.model.train()
        return not torch.equal(score(trainer, batch), score(trainer, batch))

    assert not is_noisy(GSPOTrainer)
    assert is_noisy(GSPOTrainer, disable_dropout=False)
    # The host's own switch does not reach a number in an attention module, which is why ours goes further.
    assert is_noisy(GRPOTrainer) == (kind == "attention_dropout")


def test_an_adapter_of_a_mixture_needs_no_word_on_dropout(folders, dataset, tmp_path):
    adapter = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.05)
    script = {"model": folders["moe"], "peft_config": adapter, "train_dataset": dataset}
    assert trained(GSPOTrainer, tmp_path, **script, max_steps=1).state.global_step == 1
    assert adapter.lora_dropout == 0.05
    with pytest.raises(ValueError, match="lora_dropout"):
        build(GSPOTrainer, tmp_path, **script, disable_dropout=False)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_dropout_that_a_model_reads_from_its_config_is_off_in_training(gradient_checkpointing, dataset, tmp_path):
    tokenizer = make_tokenizer()
    config = transformers.FalconConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.5
    )

    def noise(**options):
        trainer = build(
            GSPOTrainer,
            tmp_path,
            model=transformers.FalconForCausalLM(config),
            processing_class=tokenizer,
            train_dataset=dataset,
            gradient_checkpointing=gradient_checkpointing,
            max_steps=1,
            **options,
        )
        trainer.train()
        trainer.save_model(tmp_path / "saved")
        return trainer.state.log_history[0]["gspo/ratio/std"]

    # The first step after a rollout has the weights that sampled it: only noise moves the ratio.
    assert noise() < 1e-6
    assert noise(disable_dropout=False) > 1e-3
    assert transformers.AutoConfig.from_pretrained(tmp_path / "saved").hidden_dropout == 0.5


def test_attention_dropout_of_the_reference_model_is_off(folders, dataset, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders["qwen3"], attention_dropout=0.5)
    path = tmp_path / "dropout"
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    trainer = build(GSPOTrainer, tmp_path, model=str(path), train_dataset=dataset, beta=0.1)
    for network in (trainer.model, trainer.ref_model):
        assert {layer.self_attn.attention_dropout for layer in network.model.layers} == {0.0}


# ---- the model card


def read_card(path):
    header, body = path.read_text().split("---\n", 2)[1:]
    return yaml.safe_load(header), body


def assert_is_gspo_card(path):
    header, body = read_card(path)
    assert {"trl", "gspo"} <= set(header["tags"])
    assert "grpo" not in header["tags"]
    assert "trained with GSPO" in body
    assert "https://huggingface.co/papers/2507.18071" in body
    assert "title        = {{Group Sequence Policy Optimization}}" in body
    assert "DeepSeekMath" not in body


def test_checkpoint_comes_with_a_card_that_says_gspo(folders, dataset, tmp_path):
    trained(
        GSPOTrainer, tmp_path, model=folders["qwen3"], train_dataset=dataset, save_strategy="steps", max_steps=1,
        save_steps=1,
    )  # fmt: skip
    assert_is_gspo_card(tmp_path / "README.md")


def test_pushed_card_says_gspo(folders, dataset, tmp_path, monkeypatch):
    uploads = []
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda _, **request: uploads.append(request))
    trainer = build(GSPOTrainer, tmp_path, model=folders["qwen3"], train_dataset=dataset)
    trainer.hub_model_id = "someone/sorter"
    trainer.push_to_hub(dataset_name="someone/digits")
    assert uploads[0]["repo_id"] == "someone/sorter"
    assert_is_gspo_card(Path(uploads[0]["folder_path"]) / "README.md")
    assert {"trl", "gspo"} <= set(trainer.model.model_tags)


# ---- what is relied on in TRL: if one of these fails, TRL has moved, and the trainer has to follow


def test_contract_signatures():
    def names(function):
        return list(inspect.signature(function).parameters)

    assert names(GRPOTrainer.__init__)[:5] == ["self", "model", "reward_funcs", "args", "train_dataset"]
    assert names(GRPOTrainer._compute_loss) == ["self", "model", "inputs"]
    assert names(GRPOTrainer.log) == ["self", "logs", "start_time"]
    assert names(GRPOTrainer._get_per_token_logps_and_entropies)[:2] == ["self", "model"]


OLD, SAMPLER = {"old_per_token_logps"}, {"sampling_per_token_logps", "tool_mask"}
INPUTS = {
    "plain": OLD,
    "one_step_a_rollout": set(),
    "kl": OLD | {"ref_per_token_logps"},
    "tools": OLD | {"tool_mask"},
    "rollout_func": OLD | SAMPLER,
    "vllm": OLD | SAMPLER | {"importance_sampling_ratio"},
    "images": OLD | {"pixel_values", "num_images"},
}


@pytest.mark.parametrize("name", INPUTS)
def test_contract_inputs_of_the_loss(run, name):
    for inputs in run(GRPOTrainer, name)._buffered_inputs:
        assert inputs.keys() == REQUIRED_KEYS | INPUTS[name], "TRL hands its loss other keys"
        shape = inputs["completion_ids"].shape
        assert inputs["advantages"].shape == shape[:1], "TRL's advantages are no longer one for each sequence"
        for key in inputs.keys() & {"completion_mask", "tool_mask", "old_per_token_logps", "ref_per_token_logps"}:
            assert inputs[key].shape == shape, f"`{key}` is no longer (B, T)"


class Diary(dict):
    """`inputs` that writes down when `old_per_token_logps` is read."""

    def __init__(self, content, events):
        super().__init__(content)
        self.events = events

    def __getitem__(self, key):
        self.events.append(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.events.append(key)
        return super().get(key, default)


def test_contract_the_loss_scores_once_and_reads_the_old_logps_after(folders, dataset, tmp_path, monkeypatch):
    trainer = build(GRPOTrainer, tmp_path, model=folders["qwen3"], train_dataset=dataset)
    batch = make_batch(trainer)
    events, calls = [], []
    scorer = trainer._get_per_token_logps_and_entropies

    def watched(*args, **kwargs):
        result = scorer(*args, **kwargs)
        events.append("scored")
        calls.append((args, kwargs, result))
        return result

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", watched)
    trainer._compute_loss(trainer.model.train(), Diary(batch, events))

    assert events.count("scored") == 1, "TRL's loss no longer scores exactly once: whose log-probs are the last ones?"
    assert "old_per_token_logps" in events, "TRL's loss no longer reads `inputs['old_per_token_logps']`"
    assert events.index("old_per_token_logps") > events.index("scored"), (
        "TRL's loss reads `old_per_token_logps` before it has the new log-probs: a scorer can no longer replace them"
    )
    ((model, input_ids, attention_mask, logits_to_keep), options, (logps, entropies, *_)) = calls[0]
    assert model is trainer.model
    assert torch.equal(input_ids, torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1))
    assert torch.equal(attention_mask, torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1))
    assert logits_to_keep == batch["completion_ids"].size(1)
    assert logps.shape == entropies.shape == batch["completion_ids"].shape, "the scorer's first two are not (B, T)"
    assert options.keys() == {"compute_entropy", "compute_aux_loss"} | {
        "pixel_values",
        "image_grid_thw",
        "num_images",
        "pixel_attention_mask",
        "spatial_shapes",
        "num_tiles",
        "image_sizes",
        "token_type_ids",
        "mm_token_type_ids",
        "image_position_ids",
    }, "TRL's loss calls its scorer with other options"
