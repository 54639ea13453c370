"""`GSPOTrainer` at levels `"sequence_token"` and `"turn"`, with step rewards and with `advantage_func`."""

import asyncio
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_credit import loop_credit
from test_diagnostics import reference_metrics
from test_objective import units_of
from test_trainer import (
    DEAD,
    KEYS,
    build,
    make_batch,
    trained_tokens,
    weights,
)

from trl_gspo import GSPOTrainer, gspo_loss, token_reward, turn_reward
from trl_gspo.objective import turn_ids


TOKEN_LEVELS = ("sequence_token", "turn")
TOOLS = KEYS | {"tool_mask"}
SAMPLER = TOOLS | {"sampling_per_token_logps"}


# ---- one micro-batch: loss and gradient against a loop in float64


class SpyTrainer(GSPOTrainer):
    """Keeps what its last loss was computed from, with their gradient, and the arguments of the off-policy mask."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.seen = result
        return result

    def get_off_policy_mask(self, **arguments):
        self.off_policy_arguments = arguments
        return super().get_off_policy_mask(**arguments)


def loop_loss(logps, entropies, batch, level, accumulation, options):
    """
    The loss of a micro-batch, token by token in float64: GSPO-token (equation 14 of the GSPO paper) and what TRL's
    options add to it.
    """
    options = dict(beta=0.0, delta=None, top_entropy_quantile=1.0, entropy_coef=0.0) | options
    low, high = options.get("epsilon", 3e-4), options.get("epsilon_high", 4e-4)
    logps, mask = logps.double(), trained_tokens(batch)
    old = batch.get("old_per_token_logps", logps.detach()).double()
    sampling = batch.get("sampling_per_token_logps", old).double()
    advantages = batch["advantages"].double()
    advantages = advantages[:, None].expand(mask.shape) if advantages.dim() == 1 else advantages
    is_certain = torch.zeros_like(mask)
    if options["top_entropy_quantile"] < 1:
        threshold = np.quantile(entropies.detach()[mask].numpy(), 1 - options["top_entropy_quantile"])
        is_certain = entropies < float(threshold)
    total = 0.0
    for i in range(len(mask)):
        units, of_row = units_of(mask[i], level), 0.0
        tokens = sum(units, [])
        drift = sum((sampling[i, t] - logps[i, t]).item() for t in tokens) / max(len(tokens), 1)
        for unit in units:
            unit_ratio = torch.exp(sum(logps[i, t] - old[i, t] for t in unit).detach() / len(unit))
            for t in unit:
                ratio, advantage = unit_ratio * torch.exp(logps[i, t] - logps[i, t].detach()), advantages[i, t]
                unclipped = ratio if options["delta"] is None else ratio.clamp(max=options["delta"])
                loss = -torch.min(unclipped * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
                if advantage < 0 and drift > options.get("off_policy_mask_threshold", np.inf) or is_certain[i, t]:
                    loss = 0.0 * loss
                if options.get("use_vllm"):
                    correction = batch["importance_sampling_ratio"][i].double()
                    loss = loss * correction[t if len(correction) > 1 else 0]
                if options["beta"]:
                    difference = batch["ref_per_token_logps"][i, t].double() - logps[i, t]
                    kl = torch.exp(difference) - difference - 1
                    loss = loss + options["beta"] * kl * (ratio if options.get("use_bias_correction_kl") else 1)
                of_row = of_row + loss
        total = total + (of_row if options.get("loss_type") == "luspo" else of_row / max(len(tokens), 1))
    bonus = entropies.double()[mask & ~is_certain].mean() if options["entropy_coef"] else 0.0
    return (total / len(mask) - options["entropy_coef"] * bonus) / accumulation


def make_token_batch(trainer, shape="BT", keys=TOOLS, seed=0):
    """`make_batch` of test_trainer.py, with an advantage for each token: both signs in a row, a dead row."""
    batch = make_batch(trainer, keys, seed)
    if shape == "BT":
        generator = torch.Generator().manual_seed(seed)
        batch["advantages"] = torch.randn(batch["completion_mask"].shape, generator=generator)
        batch["advantages"][DEAD] = 0
    return batch


CASES = {
    "plain": ({}, KEYS),
    "tool_mask": ({}, TOOLS),
    "clip_range": (dict(epsilon=2e-3, epsilon_high=6e-3), TOOLS),
    "on_policy": ({}, TOOLS - {"old_per_token_logps"}),
    "luspo": (dict(loss_type="luspo"), TOOLS),
    "kl": (dict(beta=0.1, use_bias_correction_kl=False), TOOLS),
    "kl_bias_correction": (dict(beta=0.1, use_bias_correction_kl=True), TOOLS),
    "luspo_kl": (dict(beta=0.1, use_bias_correction_kl=True, loss_type="luspo"), TOOLS),
    "kl_on_policy": (dict(beta=0.1, use_bias_correction_kl=True), TOOLS - {"old_per_token_logps"}),
    "delta": (dict(delta=1.003), TOOLS),
    "entropy": (dict(entropy_coef=0.05), TOOLS),
    "top_entropy": (dict(top_entropy_quantile=0.5), TOOLS),
    "entropy_of_the_top": (dict(top_entropy_quantile=0.5, entropy_coef=0.05), TOOLS),
    "off_policy_mask": (dict(off_policy_mask_threshold=2e-3), TOOLS),
    "off_policy_mask_sampler": (dict(off_policy_mask_threshold=2e-3), SAMPLER),
    "vllm_token": (dict(use_vllm=True, vllm_importance_sampling_mode="token_truncate"), SAMPLER),
    "vllm_sequence": (dict(use_vllm=True, vllm_importance_sampling_mode="sequence_mask"), SAMPLER),
    "router_loss": (dict(router_aux_loss_coef=0.1), TOOLS),
    "bfloat16": (dict(model_init_kwargs={"dtype": "bfloat16"}), TOOLS),
    "everything": (
        dict(
            beta=0.1,
            use_bias_correction_kl=True,
            delta=1.003,
            top_entropy_quantile=0.8,
            entropy_coef=0.05,
            off_policy_mask_threshold=2e-3,
            use_vllm=True,
        ),
        SAMPLER,
    ),
}


def gradients_of(loss, trainer):
    return torch.autograd.grad(loss, list(trainer.model.parameters()), retain_graph=True)


def assert_close_gradients(gradients, expected, tolerance=1e-5):
    """Each parameter's, to `tolerance` of its norm; rounding in float32 leaves 1e-7 of the largest."""
    largest = max(gradient.norm() for gradient in expected)
    assert largest > 1e-5
    for gradient, one in zip(gradients, expected, strict=True):
        assert (gradient - one).norm() <= tolerance * one.norm() + 1e-7 * largest


@pytest.mark.parametrize("shape", ["B", "BT"])
@pytest.mark.parametrize("level", TOKEN_LEVELS)
@pytest.mark.parametrize(("options", "keys"), CASES.values(), ids=CASES)
def test_loss_and_gradient_equal_the_loop(options, keys, level, shape, model_path, moe_path, dataset, tmp_path):
    has_router, is_bfloat16 = "router_aux_loss_coef" in options, "model_init_kwargs" in options
    trainer = build(
        SpyTrainer,
        tmp_path,
        model=moe_path if has_router else model_path,
        train_dataset=dataset,
        importance_sampling_level=level,
        **options,
    )
    batch = make_token_batch(trainer, shape, keys)
    handed = {key: value.clone() for key, value in batch.items()}
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 3
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.dtype == torch.float32
    gradients = gradients_of(loss, trainer)

    logps, entropies, router_loss = trainer.seen
    expected = loop_loss(logps, entropies, handed, level, 3, options)
    if has_router:
        expected = expected + 0.1 * router_loss / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close_gradients(gradients, gradients_of(expected, trainer), 1e-2 if is_bfloat16 else 1e-5)
    # What was handed in is as it was: the next epoch over the rollout batch must find the true old log-probs.
    assert batch.keys() == handed.keys() and all(torch.equal(batch[key], handed[key]) for key in batch)

    if options.keys() <= {"epsilon", "epsilon_high"}:
        old = batch.get("old_per_token_logps", logps.detach())
        epsilons = dict(epsilon_low=trainer.epsilon_low, epsilon_high=trainer.epsilon_high)
        functional, _ = gspo_loss(logps, old, batch["advantages"], trained_tokens(batch), level=level, **epsilons)
        assert loss.item() == pytest.approx(functional.item() / 3, rel=1e-5)
        assert_close_gradients(gradients, gradients_of(functional / 3, trainer))
    elif not is_bfloat16:
        without = loop_loss(logps, entropies, handed, level, 3, {})
        assert abs(without.item() - expected.item()) > 1e-4 * abs(expected.item())  # the option is heard


@pytest.mark.parametrize("level", TOKEN_LEVELS)
def test_the_loop_tells_levels_and_shapes_apart(level, model_path, dataset, tmp_path):
    trainer = build(SpyTrainer, tmp_path, model=model_path, train_dataset=dataset, importance_sampling_level=level)
    batches = [make_token_batch(trainer, shape) for shape in ("B", "BT")]
    logps, entropies, _ = trainer.seen
    values = [loop_loss(logps, entropies, batch, unit, 1, {}).item() for batch in batches for unit in TOKEN_LEVELS]
    assert len(set(values)) == 4


# ---- what sees the old log-probs


@pytest.mark.parametrize("keys", [TOOLS, SAMPLER, TOOLS - {"old_per_token_logps"}], ids=["old", "sampler", "none"])
@pytest.mark.parametrize("shape", ["B", "BT"])
@pytest.mark.parametrize("level", TOKEN_LEVELS)
def test_mask_and_metrics_see_the_true_old_log_probs(level, shape, keys, model_path, dataset, tmp_path):
    trainer = build(
        SpyTrainer,
        tmp_path,
        model=model_path,
        train_dataset=dataset,
        importance_sampling_level=level,
        off_policy_mask_threshold=2e-3,
    )
    trainer.model.train()
    batch = make_token_batch(trainer, shape, keys)
    trainer.compute_loss(trainer.model, batch)
    logps = trainer.seen[0].detach()
    old = batch.get("old_per_token_logps", logps)
    arguments, mask = trainer.off_policy_arguments, trained_tokens(batch)
    assert torch.equal(arguments["sampling_per_token_logps"], batch.get("sampling_per_token_logps", old))
    assert torch.equal(arguments["per_token_logps"], logps)
    assert torch.equal(arguments["mask"].bool(), mask)
    assert arguments["off_policy_threshold"] == 2e-3

    trainer.log({"loss": 0.0})
    expected = reference_metrics([(logps.double(), old.double(), batch["advantages"], mask)], 3e-4, 4e-4, level)
    log = trainer.state.log_history[-1]
    if "old_per_token_logps" not in keys:
        assert log["gspo/ratio/length_correlation"] is None  # of ratios that are all 1
        del expected["gspo/ratio/length_correlation"]
    for key, value in expected.items():
        # The diagnostics see float32 log-probs as the loss does; where all ratios are 1 no spread is left but theirs.
        assert log[key] == pytest.approx(value, rel=1e-6, abs=1e-12), key
    assert (expected["gspo/ratio/std"] > 1e-4) == ("old_per_token_logps" in keys)


def test_advantages_of_tokens_are_refused_at_sequence_with_the_reason(model_path, dataset, tmp_path):
    trainer = build(SpyTrainer, tmp_path, model=model_path, train_dataset=dataset)
    with pytest.raises(ValueError, match="spreads an advantage evenly.*Set it to 'sequence_token' or 'turn'"):
        trainer.compute_loss(trainer.model, make_token_batch(trainer))


# ---- whole runs


class Rollout:
    """
    Random completions of one to four turns with an environment's tokens between them, some truncated (without the
    end-of-sequence token); keeps what it handed out.
    """

    def __init__(self, seed=0, turns=4):
        self.seed, self.turns, self.batches = seed, turns, []

    def __call__(self, prompts, trainer):
        tokenizer, first = trainer.processing_class, trainer.accelerator.process_index * len(prompts)
        rows = [
            self.row(tokenizer, f"{self.seed} {trainer.state.global_step} {first + i}") for i in range(len(prompts))
        ]
        batch = {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [ids for ids, _ in rows],
            "env_mask": [mask for _, mask in rows],
            "logprobs": [[-4.6] * len(ids) for ids, _ in rows],
        }
        self.batches.append(batch | {"mode": "train" if trainer.model.training else "eval"})
        return batch

    def row(self, tokenizer, seed):
        generator = random.Random(seed)
        mask = [0] * generator.randint(0, 1)
        for _ in range(generator.randint(1, self.turns)):
            mask += [1] * generator.randint(1, 3) + [0] * generator.randint(1, 2)
        mask = mask[: len(mask) - 1] if generator.random() < 0.7 else mask
        ids = [generator.randint(7, 100) for _ in mask]
        return ids[:-1] + [tokenizer.eos_token_id if generator.random() < 0.7 else ids[-1]], mask


def turns_in(masks):
    return [len(units_of(np.array(mask, dtype=bool), "turn")) for mask in masks]


def outcome(completion_ids, **_):
    return [None if ids[0] % 5 == 0 else float(sum(ids) % 3) for ids in completion_ids]


def by_turn(completion_ids, num_turns):
    return [
        None if ids[0] % 4 == 0 else [float((sum(ids) + 7 * k) % 5) / 2 for k in range(turns)]
        for ids, turns in zip(completion_ids, num_turns, strict=True)
    ]


@turn_reward
def turns(completion_ids, num_turns, **_):
    return by_turn(completion_ids, num_turns)


@turn_reward
async def async_turns(completion_ids, num_turns, **_):
    await asyncio.sleep(0)
    return by_turn(completion_ids, num_turns)


@token_reward
def tokens(completion_ids, **_):
    return [None if ids[0] % 7 == 0 else [float(token % 4) for token in ids] for ids in completion_ids]


# Name of a function in TRL's logs -> its kind, and its plain recomputation from ids and number of turns.
PLAIN = {
    "outcome": ("outcome", lambda ids, _: outcome(ids)),
    "turns": ("turn", by_turn),
    "async_turns": ("turn", by_turn),
    "tokens": ("token", lambda ids, _: tokens(ids)),
}


def recompute(batch, functions, weights, num_generations, scale="group", discount=1.0):
    """By plain NumPy: advantages, `(B, T)`, and the total of each function, `(B, F)`, NaN for `None`."""
    ids, masks = batch["completion_ids"], batch["env_mask"]
    width = max(map(len, ids))
    credit, totals = np.zeros((len(ids), width)), np.full((len(ids), len(functions)), np.nan)
    outcomes = totals.copy()
    for index, (function, weight) in enumerate(zip(functions, weights, strict=True)):
        kind, plain = PLAIN[function.__name__]
        rewards = plain(ids, turns_in(masks))
        if kind == "outcome":
            totals[:, index] = outcomes[:, index] = [np.nan if reward is None else reward for reward in rewards]
        else:
            totals[:, index] = [np.nan if steps is None else sum(steps) for steps in rewards]
            arguments = (rewards, masks, kind, num_generations, width, scale, discount)
            credit += weight * loop_credit(*arguments).numpy()
    has_outcome = ~np.isnan(outcomes).all(1)
    outcomes = np.nansum(outcomes * weights, 1)
    for start in range(0, len(ids), num_generations):
        rows = [row for row in range(start, start + num_generations) if has_outcome[row]]
        if not rows:
            continue
        spread = outcomes[rows] if scale == "group" else outcomes[has_outcome]
        std = np.std(spread, ddof=1) if len(spread) > 1 else 0.0
        scaled = (outcomes[rows] - outcomes[rows].mean()) / (1.0 if scale == "none" else std + 1e-4)
        credit[rows] += scaled[:, None]
    return credit, totals


def by_completion(buffered):
    """Rows of the shuffled micro-batches, keyed by what was sampled."""
    rows = {}
    for inputs in buffered:
        for row in range(len(inputs["completion_ids"])):
            ids = inputs["completion_ids"][row].tolist()
            while ids[-1] == 0:
                ids.pop()
            rows[tuple(ids)] = {key: value[row] for key, value in inputs.items() if value.dim()}
    return rows


def train(tmp_path, model_path, dataset, **script):
    rollout = script.pop("rollout_func", None) or Rollout()
    script = dict(importance_sampling_level="turn", max_steps=1, reward_funcs=[turns, outcome]) | script
    trainer = build(GSPOTrainer, tmp_path, model=model_path, train_dataset=dataset, rollout_func=rollout, **script)
    trainer.train()
    return trainer, rollout.batches


def assert_advantages(trainer, batch, expected, shape="BT"):
    rows = by_completion(trainer._buffered_inputs)
    assert len(rows) == len(batch["completion_ids"]) == len(expected)
    for ids, one in zip(batch["completion_ids"], expected, strict=True):
        advantages = rows[tuple(ids)]["advantages"]
        assert advantages.dtype == torch.float32 and advantages.dim() == len(shape) - 1
        np.testing.assert_allclose(advantages.numpy(), one, rtol=2e-5, atol=2e-5)


STEP_SCRIPTS = {
    "turn": dict(reward_funcs=[turns]),
    "turn_and_outcome": dict(reward_funcs=[turns, outcome]),
    "outcome_and_turn": dict(reward_funcs=[outcome, turns], reward_weights=[1.0, 0.3]),
    "token": dict(reward_funcs=[tokens], importance_sampling_level="sequence_token"),
    "all": dict(reward_funcs=[turns, outcome, tokens, async_turns], reward_weights=[0.5, 2.0, -0.1, 1.5]),
    "discount": dict(step_discount=0.6),
    "none": dict(scale_rewards="none"),
    "batch": dict(scale_rewards="batch"),
    "async": dict(reward_funcs=[async_turns, outcome]),
    "pad": dict(pad_to_multiple_of=64),
    "one_turn": dict(rollout_func=Rollout(turns=1)),
}


@pytest.mark.parametrize("script", STEP_SCRIPTS.values(), ids=STEP_SCRIPTS)
def test_step_rewards_become_advantages_and_logs(script, model_path, dataset, tmp_path):
    script = script | dict(log_completions=True, num_completions_to_print=0)
    trainer, (batch, *others) = train(tmp_path, model_path, dataset, **script)
    assert not others and max(turns_in(batch["env_mask"])) == (1 if "rollout_func" in script else 4)
    functions = script.get("reward_funcs", [turns, outcome])
    factors = np.array(script.get("reward_weights", [1.0] * len(functions)))
    scale, discount = script.get("scale_rewards", "group"), script.get("step_discount", 1.0)
    expected, totals = recompute(batch, functions, factors, 4, scale, discount)
    if "pad_to_multiple_of" in script:
        # An outcome advantage stands in padding too, where nothing is trained.
        width = trainer._buffered_inputs[0]["advantages"].size(1)
        assert width == 64
        for inputs in trainer._buffered_inputs:
            inputs["advantages"] = inputs["advantages"][:, : expected.shape[1]]
    assert_advantages(trainer, batch, expected)
    assert np.isnan(totals).any() and len({*expected[:, 0]}) > 10

    log = trainer.state.log_history[0]
    for index, function in enumerate(functions):
        column = totals[:, index][~np.isnan(totals[:, index])]
        assert log[f"rewards/{function.__name__}/mean"] == pytest.approx(column.mean(), rel=1e-5)
        assert log[f"rewards/{function.__name__}/std"] == pytest.approx(column.std(ddof=1), rel=1e-5)
    weighted = np.nansum(totals * factors, 1)
    scored = ~np.isnan(totals).all(1)
    assert log["reward"] == pytest.approx(weighted[scored].mean(), rel=1e-5)
    assert log["reward_std"] == pytest.approx(weighted[scored].std(ddof=1), rel=1e-5)
    spread = [np.std(group[ok], ddof=1) if ok.sum() > 1 else np.nan
              for group, ok in zip(weighted.reshape(-1, 4), scored.reshape(-1, 4), strict=True)]  # fmt: skip
    assert log["frac_reward_zero_std"] == pytest.approx(np.isclose(spread, 0).mean())

    (table,) = sorted(Path(trainer.args.output_dir).rglob("*.parquet"))
    table = pd.read_parquet(table)
    for index, function in enumerate(functions):
        np.testing.assert_allclose(table[function.__name__], totals[:, index], rtol=1e-6)


def test_a_step_reward_is_no_outcome(model_path, dataset, tmp_path):
    # Where the outcome is None, a step reward stands: its completion must not enter the outcome's baseline as 0.
    trainer, (batch,) = train(tmp_path, model_path, dataset, reward_weights=[1e-9, 1.0])
    expected, totals = recompute(batch, [outcome], np.ones(1), 4)
    missing = np.isnan(totals[:, 0])
    assert missing.any() and not missing.all()
    assert_advantages(trainer, batch, expected)
    for ids in (ids for ids, none in zip(batch["completion_ids"], missing, strict=True) if none):
        assert by_completion(trainer._buffered_inputs)[tuple(ids)]["advantages"].abs().max() < 1e-6


def test_the_logs_of_several_rollout_batches_are_those_of_each(model_path, dataset, tmp_path):
    trainer, batches = train(tmp_path, model_path, dataset, max_steps=6, logging_steps=1)
    assert len(batches) == 2
    first, second = (recompute(batch, [turns, outcome], np.ones(2), 4)[1] for batch in batches)
    logged = [entry["rewards/turns/mean"] for entry in trainer.state.log_history if "rewards/turns/mean" in entry]
    assert logged == pytest.approx([np.nanmean(first[:, 0]), np.nanmean(second[:, 0])], rel=1e-5)


@pytest.mark.parametrize("function", [turns, async_turns, tokens])
def test_step_rewards_are_refused_at_sequence_before_a_model_is_loaded(function, dataset, tmp_path):
    script = dict(model=str(tmp_path / "no-such-model"), train_dataset=dataset, output_dir=tmp_path)
    for reward_funcs in (function, [outcome, function]):
        with pytest.raises(ValueError, match=f"The step reward '{function.__name__}' .*set it to 'turn' or 'sequ"):
            build(GSPOTrainer, reward_funcs=reward_funcs, **script)
    with pytest.raises(OSError, match="no-such-model"):
        build(GSPOTrainer, reward_funcs=function, importance_sampling_level="turn", **script)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_wrong_number_of_steps_stops_the_run_with_the_reason(is_async, model_path, dataset, tmp_path):
    def one_too_many(num_turns, **_):
        return [[0.0] * (turns + (index == 5)) for index, turns in enumerate(num_turns)]

    async def async_one_too_many(**arguments):
        return one_too_many(**arguments)

    function = turn_reward(async_one_too_many if is_async else one_too_many)
    rollout = Rollout()
    with pytest.raises(ValueError, match=r"one_too_many' returned (\d) numbers for completion 5, which has") as raised:
        train(tmp_path, model_path, dataset, reward_funcs=[outcome, function], rollout_func=rollout)
    length = turns_in(rollout.batches[0]["env_mask"])[5]
    assert f"returned {length + 1} numbers" in str(raised.value) and f"has {length} turns" in str(raised.value)


def test_truncated_completions_are_masked_and_their_steps_count_as_their_outcomes_do(model_path, dataset, tmp_path):
    trainer, (batch,) = train(tmp_path, model_path, dataset, mask_truncated_completions=True)
    expected, _ = recompute(batch, [turns, outcome], np.ones(2), 4)
    assert_advantages(trainer, batch, expected)
    truncated = [tuple(ids) for ids in batch["completion_ids"] if ids[-1] != trainer.processing_class.eos_token_id]
    assert 0 < len(truncated) < 32
    for ids, row in by_completion(trainer._buffered_inputs).items():
        assert row["completion_mask"].any() == (ids not in truncated)


# ---- evaluation


def test_evaluation_normalises_its_own_groups(model_path, dataset, tmp_path):
    calls = []

    def spy(advantages, **_):
        calls.append(advantages)
        return advantages

    trainer, batches = train(
        tmp_path,
        model_path,
        dataset,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=dataset.select(range(4)),
        num_generations_eval=2,
        advantage_func=spy,
        log_completions=True,
        num_completions_to_print=0,
    )
    assert [(batch["mode"], len(batch["completion_ids"])) for batch in batches] == [("train", 32), ("eval", 8)]
    assert [len(advantages) for advantages in calls] == [32, 8]
    seen = []
    for batch, advantages, num_generations in zip(batches, calls, (4, 2), strict=True):
        expected, totals = recompute(batch, [turns, outcome], np.ones(2), num_generations)
        np.testing.assert_allclose(advantages, expected, rtol=2e-5, atol=2e-5)
        seen.append(totals)
        prefix = "eval_" if batch["mode"] == "eval" else ""
        (logged,) = [e for e in trainer.state.log_history if f"{prefix}rewards/turns/mean" in e]
        assert logged[f"{prefix}rewards/turns/mean"] == pytest.approx(np.nanmean(totals[:, 0]), rel=1e-5)
        assert logged[f"{prefix}gspo/ratio/mean"] == pytest.approx(1, abs=0.1)
    # The completions table keeps the last 32 rows: those of the evaluation push out the oldest of training.
    table = pd.read_parquet(max(Path(trainer.args.output_dir).rglob("*.parquet")))
    np.testing.assert_allclose(table[["turns", "outcome"]].to_numpy(), np.concatenate(seen)[-32:], rtol=1e-6)


# ---- credit of one's own


class Hook:
    """An `advantage_func` that keeps what it was called with."""

    def __init__(self, returns):
        self.returns, self.calls = returns, []

    def __call__(self, **arguments):
        self.calls.append(arguments)
        return self.returns(arguments)


def test_advantage_func_gets_what_is_documented_once_a_rollout_batch(model_path, dataset, tmp_path):
    hook = Hook(lambda call: call["advantages"] * 2)
    trainer, batches = train(tmp_path, model_path, dataset, advantage_func=hook, max_steps=6)
    assert len(hook.calls) == len(batches) == 2
    for call, batch in zip(hook.calls, batches, strict=True):
        assert call.keys() == {
            "advantages", "rewards", "completions", "completion_ids", "completion_mask", "tool_mask", "turn_ids"
        }  # fmt: skip
        expected, totals = recompute(batch, [turns, outcome], np.ones(2), 4)
        np.testing.assert_allclose(call["advantages"], expected, rtol=2e-5, atol=2e-5)
        assert list(call["rewards"]) == ["turns", "outcome"]
        for index, name in enumerate(call["rewards"]):
            assert call["rewards"][name].shape == (32,)
            np.testing.assert_allclose(call["rewards"][name], totals[:, index], rtol=1e-6)
        lengths = list(map(len, batch["completion_ids"]))
        assert call["completion_mask"].sum(1).tolist() == lengths
        for row, length in enumerate(lengths):
            assert call["completion_ids"][row, :length].tolist() == batch["completion_ids"][row]
            assert call["tool_mask"][row, :length].tolist() == batch["env_mask"][row]
        assert torch.equal(call["turn_ids"], turn_ids(call["completion_mask"] * call["tool_mask"]))
        assert (call["turn_ids"].amax(1) + 1).tolist() == turns_in(batch["env_mask"])
        texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
        assert call["completions"] == texts
    assert_advantages(trainer, batches[1], 2 * expected * call["completion_mask"].mul(call["tool_mask"]).numpy())


@pytest.mark.parametrize(
    ("level", "returns", "shape"),
    [
        ("sequence", lambda call: call["advantages"] + 1, "B"),
        ("sequence_token", lambda call: call["advantages"] + 1, "B"),
        ("turn", lambda call: -call["advantages"], "B"),
        ("turn", lambda call: call["advantages"][:, None] * call["turn_ids"], "BT"),
        ("sequence_token", lambda call: torch.where(call["turn_ids"] < 0, torch.nan, call["turn_ids"] * 1.0), "BT"),
    ],
    ids=["sequence B", "token B", "turn B", "turn BT", "token BT, NaN in padding"],
)
def test_what_advantage_func_returns_is_trained_on(level, returns, shape, model_path, dataset, tmp_path):
    hook = Hook(returns)
    trainer, (batch,) = train(
        tmp_path,
        model_path,
        dataset,
        reward_funcs=outcome,
        advantage_func=hook,
        importance_sampling_level=level,
        max_steps=3,
    )
    (call,) = hook.calls
    assert call["advantages"].shape == (32,) and list(call["rewards"]) == ["outcome"]
    expected = torch.nan_to_num(returns(call))
    if shape == "BT":
        expected = expected.masked_fill(call["turn_ids"] < 0, 0.0)
    assert_advantages(trainer, batch, expected.numpy(), shape)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3 and all(np.isfinite(entry["grad_norm"]) and entry["grad_norm"] > 0 for entry in logs)


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        (lambda call: call["advantages"][:, None], r"shape \(32,\) or \(32, \d+\), got \(32, 1\)"),
        (lambda call: call["advantages"][1:], r"got \(31,\)"),
        (lambda call: None, "got NoneType"),
        (lambda call: call["advantages"] * torch.nan, "not finite"),
        (lambda call: call["turn_ids"] * torch.inf, "not finite"),
    ],
)
def test_what_advantage_func_may_not_return(returns, message, model_path, dataset, tmp_path):
    with pytest.raises(ValueError, match=f"`advantage_func` .*{message}"):
        train(tmp_path, model_path, dataset, reward_funcs=outcome, advantage_func=Hook(returns))


def test_advantages_of_tokens_from_advantage_func_are_refused_at_sequence(model_path, dataset, tmp_path):
    hook = Hook(lambda call: call["turn_ids"].float())
    with pytest.raises(ValueError, match="spreads an advantage evenly"):
        train(
            tmp_path, model_path, dataset, reward_funcs=outcome, advantage_func=hook,
            importance_sampling_level="sequence",
        )  # fmt: skip


# ---- the same training by another way


SGD = dict(optim="sgd", learning_rate=0.5, max_grad_norm=1e9, lr_scheduler_type="constant", logging_steps=1)


def moved(tensors, start):
    return torch.cat([(one.detach() - other).flatten() for one, other in zip(tensors, start, strict=True)])


def start_weights(tmp_path, model_path, dataset):
    trainer = build(GSPOTrainer, tmp_path, model=model_path, train_dataset=dataset)
    return [parameter.detach().clone() for parameter in weights(trainer)]


def clipped(trainer):
    return [e["gspo/clip_fraction/sequences"] for e in trainer.state.log_history if "gspo/ratio/mean" in e]


@pytest.mark.parametrize("turns", [1, 4])
def test_with_one_advantage_sequence_token_trains_as_sequence(turns, model_path, dataset, tmp_path):
    script = SGD | dict(reward_funcs=outcome, max_steps=4)
    runs = {
        level: train(
            tmp_path, model_path, dataset, rollout_func=Rollout(turns=turns), importance_sampling_level=level, **script
        )[0]
        for level in ("sequence", "sequence_token", "turn")
    }
    start = start_weights(tmp_path, model_path, dataset)
    sequence, token, turn = (moved(weights(trainer), start) for trainer in runs.values())
    assert (token - sequence).norm() < 1e-5 * sequence.norm()
    assert ((turn - sequence).norm() < 1e-5 * sequence.norm()) == (turns == 1)
    assert max(clipped(runs["sequence"])) > 0 == clipped(runs["sequence"])[0]


def test_gradient_accumulation_changes_nothing(model_path, dataset, tmp_path):
    script = SGD | dict(max_steps=4)
    whole, _ = train(tmp_path, model_path, dataset, **script, steps_per_generation=2)
    parts, _ = train(
        tmp_path, model_path, dataset, **script, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        steps_per_generation=8,
    )  # fmt: skip
    start = start_weights(tmp_path, model_path, dataset)
    one, other = moved(weights(whole), start), moved(weights(parts), start)
    assert (one - other).norm() < 1e-5 * one.norm()
    assert clipped(whole) == pytest.approx(clipped(parts), abs=1e-9) and max(clipped(whole)) > 0
