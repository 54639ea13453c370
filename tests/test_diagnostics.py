"""The statistics of the ratio against a plain loop in NumPy, over updates, ranks and rows that have gone wrong."""

import math

import numpy as np
import pytest
import torch
from test_objective import units_of
from torch.utils._python_dispatch import TorchDispatchMode

from trl_gspo.diagnostics import RatioStatistics, noise_warning
from trl_gspo.objective import LEVELS


EPSILONS = (3e-4, 4e-4)


def quantile(values, share):
    """Linear between the two values around the place `share * (N - 1)` of the sorted ones."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def reference_metrics(batches, epsilon_low, epsilon_high, level="sequence", minibatches=None):
    """The definitions of the metrics, one unit at a time in float64. `minibatches` holds one index for each batch."""
    minibatches = minibatches or [0] * len(batches)
    rows, log_ratios, tokens, clipped_tokens, kls, low, high, of_minibatch = 0, [], [], [], [], [], [], []
    for batch, minibatch in zip(batches, minibatches, strict=True):
        for new, old, advantages, mask in zip(*(tensor.numpy() for tensor in batch), strict=True):
            units = units_of(mask, level)
            rows += len(units) if level == "turn" else 1
            advantages = np.broadcast_to(advantages, mask.shape)
            for unit in units:
                token_log_ratios = new[unit].astype(np.float64) - old[unit].astype(np.float64)
                if not advantages[unit].any():
                    continue
                log_ratio = token_log_ratios.mean()
                ratio = np.exp(log_ratio)
                log_ratios.append(log_ratio)
                tokens.append(len(unit))
                kls.append(np.sum(np.expm1(token_log_ratios) - token_log_ratios))
                is_low = (advantages[unit] < 0) & (ratio < 1 - epsilon_low)
                is_high = (advantages[unit] > 0) & (ratio > 1 + epsilon_high)
                low.append(is_low.any())
                high.append(is_high.any())
                clipped_tokens.append(np.sum(is_low | is_high))
                of_minibatch.append(minibatch)
    log_ratios, tokens, low, high, of_minibatch = map(np.array, (log_ratios, tokens, low, high, of_minibatch))
    ratios = np.exp(log_ratios)
    metrics = {
        "gspo/clip_fraction/sequences": np.mean(low | high),
        "gspo/clip_fraction/low": np.mean(low),
        "gspo/clip_fraction/high": np.mean(high),
        "gspo/clip_fraction/tokens": np.sum(clipped_tokens) / np.sum(tokens),
    }
    for index in sorted(set(minibatches)):
        is_of = of_minibatch == index
        metrics[f"gspo/clip_fraction/minibatch_{index}"] = np.sum((low | high) & is_of) / np.sum(is_of)
    metrics |= {
        "gspo/ratio/mean": np.mean(ratios),
        "gspo/ratio/std": np.std(ratios),
        "gspo/ratio/min": np.min(ratios),
        "gspo/ratio/max": np.max(ratios),
        "gspo/ratio/p01": quantile(ratios, 0.01),
        "gspo/ratio/p10": quantile(ratios, 0.1),
        "gspo/ratio/p50": quantile(ratios, 0.5),
        "gspo/ratio/p90": quantile(ratios, 0.9),
        "gspo/ratio/p99": quantile(ratios, 0.99),
        "gspo/ratio/ess": np.sum(ratios) ** 2 / (len(ratios) * np.sum(ratios**2)),
    }
    if 0 in minibatches:
        metrics["gspo/ratio/noise"] = np.std(log_ratios[of_minibatch == 0])
    centred, lengths = log_ratios - np.mean(log_ratios), tokens - np.mean(tokens)
    return metrics | {
        "gspo/ratio/length_correlation": np.sum(centred * lengths) / np.sqrt(np.sum(centred**2) * np.sum(lengths**2)),
        "gspo/kl_old": np.sum(kls) / np.sum(tokens),
        "gspo/live_fraction": len(ratios) / rows,
    }


def make_batch(rows, length, seed, spread=3e-3, dtype=torch.float32):
    """Unequal lengths, tool tokens in the middle, every fourth row dead, one row without trained tokens."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, length, generator=generator, dtype=torch.float64)
    logps = old + spread * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    completion_mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    tool_mask = torch.rand(rows, length, generator=generator) > 0.2
    mask = completion_mask & tool_mask
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    advantages[::4], mask[1] = 0, False
    return logps.to(dtype), old.to(dtype), advantages.to(dtype), mask


def with_token_advantages(batch, seed):
    """`batch` with an advantage for each token: both signs in a row, some 0, dead rows as before, NaN in padding."""
    logps, old, advantages, mask = batch
    generator = torch.Generator().manual_seed(seed)
    per_token = torch.randn(mask.shape, generator=generator) * (torch.rand(mask.shape, generator=generator) > 0.3)
    per_token[advantages == 0] = 0
    return logps, old, per_token.masked_fill(~mask, math.nan), mask


BATCHES = [make_batch(rows, length, seed) for seed, (rows, length) in enumerate([(8, 20), (3, 7), (16, 33), (5, 1)])]

TOKEN_BATCHES = [with_token_advantages(batch, seed) for seed, batch in enumerate(BATCHES)]
LEVELS_AND_BATCHES = pytest.mark.parametrize(
    ("level", "batches"),
    [("turn", BATCHES), ("turn", TOKEN_BATCHES), ("sequence_token", BATCHES), ("sequence_token", TOKEN_BATCHES)],
    ids=["turn B", "turn BT", "token B", "token BT"],
)


def gathered_alone(state):
    return state


def accumulate(batches, epsilons=EPSILONS, level="sequence", minibatches=None, **kwargs):
    statistics = RatioStatistics()
    for batch, minibatch in zip(batches, minibatches or [0] * len(batches), strict=True):
        statistics.update(*batch, *epsilons, level, minibatch, **kwargs)
    return statistics


def padded_to(size):
    """The padding of `accelerator.pad_across_processes`, where the longest rank has `size` lines."""
    return lambda units: torch.nn.functional.pad(units, (0, 0, 0, size - len(units)), value=-1)


def over_ranks(ranks, pad=lambda units: units):
    """Metrics of several `RatioStatistics`, each of a process of its own."""
    first, *others = ranks
    states = []
    for other in others:
        other.compute(lambda state: states.append(state) or state, pad)
    return first.compute(lambda state: torch.cat([state, *states]), pad)


def single_row(log_ratio, advantage=1.0, length=3):
    return torch.full((1, length), log_ratio), torch.zeros(1, length), torch.tensor([advantage]), torch.ones(1, length)


def assert_metrics(metrics, expected, rel):
    assert list(metrics) == list(expected)
    assert {key: pytest.approx(value, rel=rel, abs=0, nan_ok=True) for key, value in expected.items()} == metrics


@pytest.mark.parametrize("epsilons", [EPSILONS, (1e-3, 5e-5)])
def test_equals_plain_numpy_over_updates(epsilons):
    expected = reference_metrics(BATCHES, *epsilons)
    assert 0 < expected["gspo/clip_fraction/low"] != expected["gspo/clip_fraction/high"] > 0
    assert_metrics(accumulate(BATCHES, epsilons).compute(gathered_alone), expected, rel=2e-5)


@pytest.mark.parametrize("epsilons", [EPSILONS, (1e-3, 5e-5)])
@LEVELS_AND_BATCHES
def test_other_units_equal_plain_numpy_over_updates(level, batches, epsilons):
    expected = reference_metrics(batches, *epsilons, level)
    assert 0 < expected["gspo/clip_fraction/low"] != expected["gspo/clip_fraction/high"] > 0
    assert 0 < expected["gspo/live_fraction"] < 1
    assert_metrics(accumulate(batches, epsilons, level).compute(gathered_alone), expected, rel=2e-5)
    if level == "turn" or batches is TOKEN_BATCHES:
        assert expected != pytest.approx(reference_metrics(BATCHES, *epsilons))


@LEVELS_AND_BATCHES
def test_other_units_add_up_over_ranks(level, batches):
    ranks = accumulate(batches[:1], level=level), accumulate(batches[1:], level=level)
    metrics = over_ranks(ranks, padded_to(1000))
    assert_metrics(metrics, reference_metrics(batches, *EPSILONS, level), rel=2e-5)


# One row, eps 0.25 and 0.5. Turn 1: token ratios 2 and 8, s = 4, A (1, -1): clipped above for one of its two tokens.
# Turn 2: ratio 1.2, A 1. Turn 3: ratio 9, A 0: dead. A row of one turn of ratio 1/4, A -1: clipped below.
#   live 3 of 4 turns; clipped 2 of 3; tokens clipped 2 of 4; mean (4 + 1.2 + 0.25) / 3
def test_turns_worked_out_by_hand():
    ratios = torch.tensor([[2, 8, 1, 1.2, 1, 9], [0.25, 1, 1, 1, 1, 1]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1, 9, 1, 9, 0], [-1.0, 9, 9, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0]])
    statistics = RatioStatistics()
    statistics.update(ratios.log(), torch.zeros_like(ratios), advantages, mask, 0.25, 0.5, "turn")
    metrics = statistics.compute(gathered_alone)
    expected = {"sequences": 2 / 3, "low": 1 / 3, "high": 1 / 3, "tokens": 2 / 4}
    assert {name: metrics[f"gspo/clip_fraction/{name}"] for name in expected} == pytest.approx(expected)
    assert metrics["gspo/live_fraction"] == 3 / 4
    assert metrics["gspo/ratio/mean"] == pytest.approx(5.45 / 3)
    assert (metrics["gspo/ratio/min"], metrics["gspo/ratio/max"]) == pytest.approx((0.25, 4))
    k3 = (2 + 8 + 1.2 + 0.25) - 4 - math.log(2 * 8 * 1.2 * 0.25)
    assert metrics["gspo/kl_old"] == pytest.approx(k3 / 4)


@pytest.mark.parametrize(
    "ranks", [[[0], [1], [2], [3]], [[0, 1, 2], [3]], [[3, 2], [1, 0], ["dead"]]], ids=["four", "two", "one dead"]
)
def test_ranks_add_up_to_one_process(ranks):
    dead = (BATCHES[0][0], BATCHES[0][1], torch.zeros(8), BATCHES[0][3])
    batches = [[dead if index == "dead" else BATCHES[index] for index in rank] for rank in ranks]
    metrics = over_ranks([accumulate(rank) for rank in batches], padded_to(40))
    assert_metrics(metrics, reference_metrics(sum(batches, []), *EPSILONS), rel=2e-5)


# s = 4, 1/4, 1/4, 1.2 (token ratios 2 and 8; 1/2 and 1/8; 1/4; 1.2), advantages 1, -1, 1, -1, eps 0.25 and 0.5, then a
# dead row with s = 9. Live 4 of 5; clipped high the first (2 tokens), low the second (2 tokens), of 6 tokens.
#   mean = 5.7 / 4 = 1.425; sum s^2 = 16 + 0.0625 + 0.0625 + 1.44 = 17.565
#   std = sqrt(17.565 / 4 - 1.425^2) = sqrt(2.360625); ess = 5.7^2 / (4 * 17.565) = 32.49 / 70.26
#   k3 = r - 1 - ln r, summed: (2 + 8 + 0.5 + 0.125 + 0.25 + 1.2) - 6 - ln(16 / 16 / 4 * 1.2) = 6.075 - ln 0.3
#   log s = 2 ln 2, -2 ln 2, -2 ln 2, ln 1.2; lengths 2, 2, 1, 1, of mean 1.5 and summed squares 1 about it: their
#   covariance with log s sums to (0 + 2 ln 2 - ln 1.2) / 2
def test_numbers_worked_out_by_hand():
    square, mean = (12 * math.log(2) ** 2 + math.log(1.2) ** 2) / 4, (math.log(1.2) - 2 * math.log(2)) / 4
    noise = math.sqrt(square - mean**2)
    ratios = torch.tensor([[2, 8], [1 / 2, 1 / 8], [1 / 4, 1], [1.2, 1], [9, 9]], dtype=torch.float64)
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0], [1, 1]])
    statistics = RatioStatistics()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0])
    statistics.update(ratios.log(), torch.zeros_like(ratios), advantages, mask, 0.25, 0.5)
    expected = {
        "gspo/clip_fraction/sequences": 2 / 4,
        "gspo/clip_fraction/low": 1 / 4,
        "gspo/clip_fraction/high": 1 / 4,
        "gspo/clip_fraction/tokens": 4 / 6,
        "gspo/clip_fraction/minibatch_0": 2 / 4,
        "gspo/ratio/mean": 1.425,
        "gspo/ratio/std": math.sqrt(2.360625),
        "gspo/ratio/min": 1 / 4,
        "gspo/ratio/max": 4,
        "gspo/ratio/p01": 1 / 4,
        "gspo/ratio/p10": 1 / 4,
        "gspo/ratio/p50": 0.725,
        "gspo/ratio/p90": 1.2 + 0.7 * 2.8,
        "gspo/ratio/p99": 1.2 + 0.97 * 2.8,
        "gspo/ratio/ess": 32.49 / 70.26,
        "gspo/ratio/noise": noise,
        "gspo/ratio/length_correlation": (math.log(2) - math.log(1.2) / 2) / (2 * noise),
        "gspo/kl_old": (6.075 - math.log(0.3)) / 6,
        "gspo/live_fraction": 4 / 5,
    }
    assert_metrics(statistics.compute(gathered_alone), expected, rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-8)], ids=["f32", "f64"])
def test_spread_of_ratios_within_1e_4_of_one(dtype, tolerance):
    # Token log-ratios of spread 1e-5 over up to 2000 tokens: the ratios spread by 4e-7, three or four steps of float32
    # at 1, and their variance is 2e-13. The old log-probs are 0, so that the inputs hold the spread exactly.
    logps, old, advantages, mask = make_batch(64, 2000, seed=5, spread=1e-5, dtype=torch.float64)
    batch = ((logps - old).to(dtype), torch.zeros_like(old, dtype=dtype), advantages, mask)
    expected = reference_metrics([batch], *EPSILONS)
    assert 1e-7 < expected["gspo/ratio/std"] < 1e-5 and abs(expected["gspo/ratio/mean"] - 1) < 1e-4
    metrics = accumulate([batch]).compute(gathered_alone)
    assert metrics["gspo/ratio/std"] == pytest.approx(expected["gspo/ratio/std"], rel=tolerance)
    assert metrics["gspo/ratio/mean"] - 1 == pytest.approx(expected["gspo/ratio/mean"] - 1, rel=tolerance)


@pytest.mark.parametrize("log_ratio", [1e-3, -1e-4, 1e-5])
def test_kl_of_small_log_ratios(log_ratio):
    # k3 = l^2 / 2 + l^3 / 6 + ...: at 1e-4 it is 5e-9, and a float32 difference of expm1(l) and l has errors of 4e-12.
    metrics = accumulate([single_row(log_ratio)]).compute(gathered_alone)
    stored = float(np.float32(log_ratio))
    assert metrics["gspo/kl_old"] == pytest.approx(stored**2 / 2 + stored**3 / 6 + stored**4 / 24, rel=1e-5)


def test_log_probs_in_bfloat16():
    # 0.125 and 0.125 + 2^-10 are exact in bfloat16; the ratio, rounded to bfloat16, would be 1.
    batch = (torch.full((1, 4), -0.125 - 2**-10, dtype=torch.bfloat16), torch.full((1, 4), -0.125))
    metrics = accumulate([(*batch, -torch.ones(1), torch.ones(1, 4))]).compute(gathered_alone)
    assert metrics["gspo/ratio/mean"] == pytest.approx(math.exp(-(2**-10)), rel=1e-7)
    assert metrics["gspo/clip_fraction/low"] == 1


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(3, 4), torch.zeros(3, 4), torch.zeros(3), torch.ones(3, 4)),
        (torch.ones(3, 4), torch.zeros(3, 4), torch.ones(3), torch.zeros(3, 4)),
    ],
    ids=["advantages 0", "nothing trained"],
)
def test_without_live_rows(batch):
    metrics = accumulate([batch]).compute(gathered_alone)
    assert metrics.pop("gspo/live_fraction") == 0
    assert metrics.keys() | {"gspo/live_fraction"} == reference_metrics(BATCHES, *EPSILONS).keys()
    assert all(math.isnan(value) for value in metrics.values())


def test_counts_above_the_integers_of_float32():
    # One clipped token in 2^24 + 1: a float32 sum of tokens stops at 2^24.
    statistics = RatioStatistics()
    many = torch.zeros(1, 1).expand(1, 2**24)
    statistics.update(many, many, torch.ones(1), torch.ones(1, 1, dtype=torch.bool).expand(1, 2**24), *EPSILONS)
    statistics.update(*single_row(0.1, length=1), *EPSILONS)
    assert statistics.compute(gathered_alone)["gspo/clip_fraction/tokens"] == 1 / (2**24 + 1)


def test_minibatches_and_the_noise_of_the_first():
    # Two rollout batches of two minibatches, of which the last log saw the end of the first and all of the second.
    minibatches = [1, 0, 1, 2]
    expected = reference_metrics(BATCHES, *EPSILONS, minibatches=minibatches)
    assert 0 < expected["gspo/clip_fraction/minibatch_0"] != expected["gspo/clip_fraction/minibatch_1"] > 0
    assert expected["gspo/ratio/noise"] != pytest.approx(reference_metrics(BATCHES, *EPSILONS)["gspo/ratio/noise"])
    assert_metrics(accumulate(BATCHES, minibatches=minibatches).compute(gathered_alone), expected, rel=2e-5)


def test_without_a_first_minibatch_there_is_no_noise():
    metrics = accumulate(BATCHES[:2], minibatches=[3, 5]).compute(gathered_alone)
    assert "gspo/ratio/noise" not in metrics and "gspo/clip_fraction/minibatch_0" not in metrics
    assert {"gspo/clip_fraction/minibatch_3", "gspo/clip_fraction/minibatch_5"} < metrics.keys()


def test_quantiles_are_of_the_window_and_not_means_of_quantiles():
    # Nine ratios of 1 in one micro-batch and one of e in the other: the mean of the two medians would be 1.86.
    statistics = accumulate([single_row(0.0)] * 9 + [single_row(1.0)])
    metrics = statistics.compute(gathered_alone)
    assert metrics["gspo/ratio/p50"] == 1
    assert metrics["gspo/ratio/p99"] == pytest.approx(1 + 0.91 * (math.e - 1))
    assert statistics.ratios.tolist() == pytest.approx([1.0] * 9 + [math.e])


def test_slots_beyond_the_most_turns_are_not_kept():
    most = max(len(units_of(row, "turn")) for batch in BATCHES for row in batch[3])
    rows = RatioStatistics().update(*BATCHES[2], *EPSILONS, "turn", max_units=most)
    assert rows.shape == (16 * most, 9) and most < 17
    metrics = accumulate(BATCHES, level="turn", max_units=most).compute(gathered_alone)
    assert metrics == accumulate(BATCHES, level="turn").compute(gathered_alone)


def test_expert_changes_add_up_over_micro_batches_and_ranks():
    def rank(*changes):
        statistics = RatioStatistics()
        for change in changes:
            statistics.update(*BATCHES[1], *EPSILONS, expert_changes=torch.tensor(change))
        return statistics

    ranks = rank([1, 10], [3, 2**25 + 1]), rank([0, 20], [1, 0])
    assert over_ranks(ranks)["gspo/expert_change_fraction"] == 5 / (31 + 2**25)
    assert math.isnan(rank([0, 0]).compute(gathered_alone)["gspo/expert_change_fraction"])
    assert "gspo/expert_change_fraction" not in accumulate(BATCHES).compute(gathered_alone)


# Token log-ratios 0.5 and -1; 0.25 (its second token is padding); a dead row; and one in a later minibatch.
def test_mismatch_with_the_rollout_engine_is_that_of_the_first_minibatch():
    statistics = RatioStatistics(compares_rollout=True)
    logps = torch.tensor([[0.5, -1.0], [0.25, 9.0], [7.0, 7.0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    statistics.update(logps, torch.zeros(3, 2), torch.tensor([1.0, -1.0, 0.0]), mask, *EPSILONS)
    statistics.update(*single_row(3.0), *EPSILONS, minibatch=1)
    metrics = statistics.compute(gathered_alone)
    assert metrics["gspo/rollout_logp_difference/mean"] == pytest.approx(1.75 / 3)
    assert metrics["gspo/rollout_logp_difference/max"] == 1
    statistics.update(*single_row(3.0), *EPSILONS, minibatch=1)
    assert "gspo/rollout_logp_difference/mean" not in statistics.compute(gathered_alone)
    assert "gspo/rollout_logp_difference/mean" not in accumulate(BATCHES).compute(gathered_alone)


def test_nan_of_a_live_unit_is_seen():
    metrics = accumulate([*BATCHES, single_row(math.nan)]).compute(gathered_alone)
    assert math.isnan(metrics["gspo/ratio/mean"]) and math.isnan(metrics["gspo/ratio/p50"])
    assert 0 < metrics["gspo/clip_fraction/sequences"] < 1


@pytest.mark.parametrize(("spread", "is_warned"), [(0.0, False), (2e-4, False), (4e-4, True), (math.nan, False)])
def test_noise_above_a_third_of_the_narrower_side_is_warned_of(spread, is_warned):
    # Two ratios, exp(+-spread), before any update; the clip range is 3e-3 below 1 and 1e-3 above, a third is 3.3e-4.
    statistics = accumulate([single_row(spread), single_row(-spread)], epsilons=(3e-3, 1e-3))
    message = noise_warning(statistics.compute(gathered_alone), 3e-3, 1e-3)
    assert (message is not None) == is_warned
    if is_warned:
        assert "`gspo/ratio/noise` is 0.0004" in message and "clip range (0.001)" in message
        assert "0.0% of the live sequences" in message and "disable_dropout=True" in message


def test_warning_says_what_the_noise_clips():
    batches = [single_row(5e-3), single_row(-5e-3), single_row(0.0), single_row(1e-4)]
    message = noise_warning(accumulate(batches).compute(gathered_alone), *EPSILONS)
    assert "25.0% of the live sequences are clipped by noise alone" in message and "at least 0.011" in message


def test_no_warning_where_no_first_minibatch_was():
    metrics = accumulate([single_row(0.5), single_row(-0.5)], minibatches=[1, 1]).compute(gathered_alone)
    assert noise_warning(metrics, *EPSILONS) is None


def test_starts_anew_after_compute():
    statistics = RatioStatistics()
    assert not statistics
    statistics.update(*single_row(5.0), *EPSILONS)
    assert statistics
    statistics.compute(gathered_alone)
    assert not statistics
    statistics.update(*single_row(0.0), *EPSILONS)
    metrics = statistics.compute(gathered_alone)
    assert metrics["gspo/ratio/max"] == metrics["gspo/ratio/mean"] == 1
    assert metrics["gspo/clip_fraction/sequences"] == 0


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_garbage_in_padding(garbage):
    clean = accumulate(BATCHES).compute(gathered_alone)
    dirty = [
        (logps.masked_fill(~mask, garbage), old.masked_fill(~mask, -garbage), advantages, mask)
        for logps, old, advantages, mask in BATCHES
    ]
    assert accumulate(dirty).compute(gathered_alone) == clean


@pytest.mark.parametrize("log_ratio", [100.0, math.inf])
def test_a_dead_row_far_off_leaves_no_trace(log_ratio):
    dead = single_row(log_ratio, advantage=0.0)
    with_dead = accumulate([*BATCHES, dead]).compute(gathered_alone)
    without = accumulate(BATCHES).compute(gathered_alone)
    del with_dead["gspo/live_fraction"], without["gspo/live_fraction"]
    assert with_dead == without


def test_extremes_over_updates():
    statistics = accumulate([single_row(0.2), single_row(-0.3), single_row(0.9, advantage=0.0), single_row(0.1)])
    metrics = statistics.compute(gathered_alone)
    assert metrics["gspo/ratio/min"] == pytest.approx(math.exp(-0.3), rel=1e-6)
    assert metrics["gspo/ratio/max"] == pytest.approx(math.exp(0.2), rel=1e-6)


@pytest.mark.parametrize("log_ratio", [30.0, 100.0, 400.0, math.inf, -30.0, -40.0, -400.0, -math.inf])
def test_a_ratio_far_off_does_not_stop_the_run(log_ratio):
    advantage = math.copysign(1.0, log_ratio)
    metrics = accumulate([single_row(log_ratio, advantage)]).compute(gathered_alone)
    assert metrics["gspo/clip_fraction/sequences"] == 1
    assert metrics["gspo/ratio/min"] <= metrics["gspo/ratio/max"]
    assert math.isnan(metrics["gspo/ratio/ess"]) or 0 <= metrics["gspo/ratio/ess"] <= 1


def test_no_gradient_is_kept():
    logps, *others = BATCHES[0]
    statistics = RatioStatistics()
    statistics.update(logps.clone().requires_grad_(), *others, *EPSILONS)
    statistics.compute(lambda state: state if not state.requires_grad else pytest.fail("the state holds a graph"))


class _Operations(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("level", LEVELS)
def test_update_reads_nothing_back_to_the_host(level):
    # A meta tensor has no values: whatever asks for one (`.item()`, `bool()`, indexing by a mask) raises.
    statistics = RatioStatistics()
    for batch in BATCHES:
        statistics.update(*(tensor.to("meta") for tensor in batch), *EPSILONS, level)
    assert statistics


@pytest.mark.parametrize("level", LEVELS)
def test_update_copies_nothing_from_the_host(level):
    # `torch.tensor(number, device="cuda")` makes the tensor on the host, and the copy waits for the stream.
    with _Operations() as operations:
        accumulate(BATCHES, level=level)
    assert "masked_fill" in operations.names
    assert not operations.names & {"lift_fresh", "_local_scalar_dense", "is_nonzero", "nonzero"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_update_on_cuda_does_not_synchronise():
    batches = [tuple(tensor.cuda() for tensor in batch) for batch in BATCHES]
    accumulate(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistics = accumulate(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_metrics(statistics.compute(gathered_alone), reference_metrics(BATCHES, *EPSILONS), rel=2e-5)
