"""The statistics of the ratio against a plain loop in NumPy, over updates, ranks and rows that have gone wrong."""

import math

import numpy as np
import pytest
import torch
from test_objective import units_of
from torch.utils._python_dispatch import TorchDispatchMode

from trl_gspo.diagnostics import RatioStatistics
from trl_gspo.objective import LEVELS


EPSILONS = (3e-4, 4e-4)


def reference_metrics(batches, epsilon_low, epsilon_high, level="sequence"):
    """The definitions of the metrics, one unit at a time in float64."""
    rows, ratios, tokens, clipped_tokens, kls, low, high = 0, [], [], [], [], [], []
    for batch in batches:
        for new, old, advantages, mask in zip(*(tensor.numpy() for tensor in batch), strict=True):
            units = units_of(mask, level)
            rows += len(units) if level == "turn" else 1
            advantages = np.broadcast_to(advantages, mask.shape)
            for unit in units:
                log_ratios = new[unit].astype(np.float64) - old[unit].astype(np.float64)
                if not advantages[unit].any():
                    continue
                ratio = np.exp(log_ratios.mean())
                ratios.append(ratio)
                tokens.append(len(unit))
                kls.append(np.sum(np.expm1(log_ratios) - log_ratios))
                is_low = (advantages[unit] < 0) & (ratio < 1 - epsilon_low)
                is_high = (advantages[unit] > 0) & (ratio > 1 + epsilon_high)
                low.append(is_low.any())
                high.append(is_high.any())
                clipped_tokens.append(np.sum(is_low | is_high))
    ratios, tokens, low, high = map(np.array, (ratios, tokens, low, high))
    return {
        "gspo/clip_fraction/sequences": np.mean(low | high),
        "gspo/clip_fraction/low": np.mean(low),
        "gspo/clip_fraction/high": np.mean(high),
        "gspo/clip_fraction/tokens": np.sum(clipped_tokens) / np.sum(tokens),
        "gspo/ratio/mean": np.mean(ratios),
        "gspo/ratio/std": np.std(ratios),
        "gspo/ratio/min": np.min(ratios),
        "gspo/ratio/max": np.max(ratios),
        "gspo/ratio/ess": np.sum(ratios) ** 2 / (len(ratios) * np.sum(ratios**2)),
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


def accumulate(batches, epsilons=EPSILONS, level="sequence"):
    statistics = RatioStatistics()
    for batch in batches:
        statistics.update(*batch, *epsilons, level)
    return statistics


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
    first, second = accumulate(batches[:1], level=level), accumulate(batches[1:], level=level)
    states = []
    second.compute(lambda state: states.append(state) or state)
    metrics = first.compute(lambda state: torch.cat([state, *states]))
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
    first, *others = (accumulate(rank) for rank in batches)
    states = []
    for other in others:
        other.compute(lambda state: states.append(state) or state)
    metrics = first.compute(lambda state: torch.cat([state, *states]))
    assert_metrics(metrics, reference_metrics(sum(batches, []), *EPSILONS), rel=2e-5)


# s = 4, 1/4, 1/4, 1.2 (token ratios 2 and 8; 1/2 and 1/8; 1/4; 1.2), advantages 1, -1, 1, -1, eps 0.25 and 0.5, then a
# dead row with s = 9. Live 4 of 5; clipped high the first (2 tokens), low the second (2 tokens), of 6 tokens.
#   mean = 5.7 / 4 = 1.425; sum s^2 = 16 + 0.0625 + 0.0625 + 1.44 = 17.565
#   std = sqrt(17.565 / 4 - 1.425^2) = sqrt(2.360625); ess = 5.7^2 / (4 * 17.565) = 32.49 / 70.26
#   k3 = r - 1 - ln r, summed: (2 + 8 + 0.5 + 0.125 + 0.25 + 1.2) - 6 - ln(16 / 16 / 4 * 1.2) = 6.075 - ln 0.3
def test_numbers_worked_out_by_hand():
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
        "gspo/ratio/mean": 1.425,
        "gspo/ratio/std": math.sqrt(2.360625),
        "gspo/ratio/min": 1 / 4,
        "gspo/ratio/max": 4,
        "gspo/ratio/ess": 32.49 / 70.26,
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
    assert len(metrics) == 10 and all(math.isnan(value) for value in metrics.values())


def test_counts_above_the_integers_of_float32():
    # One clipped token in 2^24 + 1: a float32 sum of tokens stops at 2^24.
    statistics = RatioStatistics()
    many = torch.zeros(1, 1).expand(1, 2**24)
    statistics.update(many, many, torch.ones(1), torch.ones(1, 1, dtype=torch.bool).expand(1, 2**24), *EPSILONS)
    statistics.update(*single_row(0.1, length=1), *EPSILONS)
    assert statistics.compute(gathered_alone)["gspo/clip_fraction/tokens"] == 1 / (2**24 + 1)


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
