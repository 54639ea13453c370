"""What holds of the statistics and of the clip range for any micro-batches, however they are spread over ranks."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import cases, is_clear_of_the_edges
from test_diagnostics import assert_metrics, gathered_alone, over_ranks, padded_to, reference_metrics
from transformers import TrainerControl, TrainerState

from trl_gspo.clip_range import ClipRangeController
from trl_gspo.diagnostics import RatioStatistics, noise_warning


# NumPy warns of what it cannot compute; a user must not read that.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def statistics_of(parts, options):
    """Of micro-batches, each with the index of its minibatch."""
    statistics = RatioStatistics(compares_rollout=True)
    low, high, level = options.values()
    for batch, minibatch in parts:
        statistics.update(*batch, low, high, level, minibatch)
    return statistics


def rows(case, index):
    return tuple(tensor[index] for tensor in case.batch)


def metrics_of(case, minibatches):
    parts = [(rows(case, slice(row, row + 1)), minibatch) for row, minibatch in enumerate(minibatches)]
    return statistics_of(parts, case.options).compute(gathered_alone)


@st.composite
def windows(draw, **options):
    """A case, and the minibatch of each of its rows."""
    case = draw(cases(min_tokens=1, **options))
    return case, [draw(st.integers(0, 2)) for _ in case.mask]


SPREAD = "gspo/ratio/length_correlation"


@given(windows())
def test_they_are_the_definitions(window):
    case, minibatches = window
    if case.options["level"] == "turn":
        # A row without a trained token has no turn, and so no minibatch.
        case.mask[:, 0] |= ~case.mask.any(1)
    assume(is_clear_of_the_edges(case))
    metrics = metrics_of(case, minibatches)
    assume(metrics["gspo/live_fraction"] > 0)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # the loop divides by the rows of minibatches without a live one
        expected = reference_metrics(
            [rows(case, slice(row, row + 1)) for row in range(len(minibatches))],
            *case.options.values(),
            minibatches=minibatches,
        )
    metrics = {name: value for name, value in metrics.items() if name in expected}
    assert metrics.keys() == expected.keys()
    # Of rounding alone a correlation is anything, and a standard deviation next to nothing.
    deviations = ("gspo/ratio/std", "gspo/ratio/noise")
    for name in deviations:
        if name in metrics:
            assert metrics.pop(name) == pytest.approx(expected.pop(name), rel=1e-5, abs=1e-9, nan_ok=True)
    correlation = metrics.pop(SPREAD), expected.pop(SPREAD)
    if not math.isnan(correlation[0]) and case.units.log_ratio[case.units.is_live].std() > 1e-6:
        assert correlation[0] == pytest.approx(correlation[1], rel=1e-5, abs=1e-7)
    kl = metrics.pop("gspo/kl_old"), expected.pop("gspo/kl_old")
    assert kl[0] == pytest.approx(kl[1], rel=1e-9, abs=1e-15)
    assert_metrics(metrics, expected, rel=1e-9)


@given(windows(), st.data())
def test_micro_batches_and_ranks_add_up(window, data):
    case, minibatches = window
    whole = metrics_of(case, minibatches)
    # Each row to one of the ranks, and there in micro-batches of its minibatch, in any order; no rank without a row.
    order = data.draw(st.permutations(range(len(minibatches))))
    ranks = data.draw(st.integers(1, len(order)))
    owners = [*range(ranks), *(data.draw(st.integers(0, ranks - 1)) for _ in order[ranks:])]
    parts = [[] for _ in range(ranks)]
    for row, owner in zip(order, owners, strict=True):
        if parts[owner] and parts[owner][-1][1] == minibatches[row] and data.draw(st.booleans()):
            parts[owner][-1][0].append(row)
        else:
            parts[owner].append(([row], minibatches[row]))
    statistics = [
        statistics_of([(rows(case, members), minibatch) for members, minibatch in part], case.options)
        for part in parts
    ]
    metrics = over_ranks(statistics, padded_to(200))
    assert metrics.keys() == whole.keys()
    for name, value in whole.items():
        if name != SPREAD or (not math.isnan(value) and case.units.log_ratio.std() > 1e-6):
            assert metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name


@given(windows(), st.data())
def test_dead_rows_count_in_the_live_fraction_alone(window, data):
    case, minibatches = window
    dead = case._replace(advantages=torch.zeros_like(case.advantages))
    both = case._replace(**{name: torch.cat([getattr(case, name), getattr(dead, name)]) for name in case._fields[:4]})
    alone, beside = metrics_of(case, minibatches), metrics_of(both, minibatches * 2)
    live, live_beside = alone.pop("gspo/live_fraction"), beside.pop("gspo/live_fraction")
    assert_metrics(beside, alone, rel=1e-12)
    if not math.isnan(live):
        assert live_beside == pytest.approx(live / 2)


@given(windows(max_log_ratio=2000.0))
def test_they_are_in_order_and_in_their_bounds(window):
    case, minibatches = window
    metrics = metrics_of(case, minibatches)
    clipped = {name: metrics[f"gspo/clip_fraction/{name}"] for name in ("sequences", "low", "high", "tokens")}
    live = case.units.is_live.sum().item()
    if not live:
        assert metrics["gspo/live_fraction"] == 0 or math.isnan(metrics["gspo/live_fraction"])
        assert all(map(math.isnan, clipped.values()))
        return
    assert all(0 <= value <= 1 for value in clipped.values())
    # A unit has one ratio, on one side of the range.
    assert clipped["low"] + clipped["high"] == pytest.approx(clipped["sequences"])
    assert (clipped["tokens"] > 0) == (clipped["sequences"] > 0)
    ratio = {name: metrics[f"gspo/ratio/{name}"] for name in ("min", "p01", "p10", "p50", "p90", "p99", "max")}
    if all(map(math.isfinite, ratio.values())):
        assert list(ratio.values()) == sorted(ratio.values())
        assert ratio["min"] * (1 - 1e-12) <= metrics["gspo/ratio/mean"] <= ratio["max"] * (1 + 1e-12)
    assert (
        not ratio["max"] < 1e-300
        and math.isnan(metrics["gspo/ratio/ess"])
        or (math.isnan(metrics["gspo/ratio/ess"]) or 1 / live * (1 - 1e-9) <= metrics["gspo/ratio/ess"] <= 1)
    )
    assert metrics["gspo/kl_old"] >= 0
    of_minibatch = [value for name, value in metrics.items() if name.startswith("gspo/clip_fraction/minibatch_")]
    assert np.nanmin(of_minibatch) - 1e-12 <= clipped["sequences"] <= np.nanmax(of_minibatch) + 1e-12


@given(
    st.floats(-1, 1),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.sampled_from(["sequence", "sequence_token"]),
)
@example(0.1, [1, 2, 4], "sequence")
def test_equal_ratios_have_neither_spread_nor_correlation(log_ratio, lengths, level):
    mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    statistics = RatioStatistics()
    # A sum of equal numbers rounds, and so one token of each row moves, by its length.
    moved = torch.zeros(mask.shape, dtype=torch.float64)
    moved[:, 0] = log_ratio * torch.tensor(lengths)
    statistics.update(moved, torch.zeros_like(moved), torch.ones(len(lengths)), mask, 0.1, 0.1, level)
    units = torch.unique(moved.sum(1) / torch.tensor(lengths))
    assume(len(units) == 1)
    metrics = statistics.compute(gathered_alone)
    assert math.isnan(metrics[SPREAD])
    assert metrics["gspo/ratio/std"] <= 1e-15 * math.exp(log_ratio)
    assert metrics["gspo/ratio/ess"] == pytest.approx(1)


@given(st.floats(), st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True), st.floats(0, 1))
def test_noise_is_warned_of_above_a_third_of_the_range(noise, low, high, clipped):
    warning = noise_warning({"gspo/ratio/noise": noise, "gspo/clip_fraction/minibatch_0": clipped}, low, high)
    assert (warning is not None) == (noise > min(low, high) / 3)
    assert noise_warning({}, low, high) is None


# ---- the controller


LOG_RATIOS = (
    st.floats(-0.1, 0.1) | st.sampled_from([0.0, 1e-9, -1e-9, 700.0, 710.0, 1e4, -1e4]) | st.floats(-1000, 1000)
)
# Of the two tokens of a unit.
SIGNS = st.tuples(*[st.sampled_from([-1.0, 0.0, 1.0])] * 2)
UNITS = st.lists(st.tuples(LOG_RATIOS, SIGNS, st.integers(0, 2)), min_size=1, max_size=12)
BOUNDS = st.sampled_from([(1e-6, 0.5), (1e-3, 0.01), (0.2, 0.9)])


def lines_of(units):
    """What the statistics keep of units, each with its log-ratio, the signs of its advantages and its minibatch."""
    lines = []
    for index in {minibatch for *_, minibatch in units}:
        log_ratios, signs = zip(*(unit[:2] for unit in units if unit[2] == index), strict=True)
        logps = torch.tensor(log_ratios, dtype=torch.float64).unsqueeze(1).expand(-1, 2)
        old, mask = torch.zeros_like(logps), torch.ones_like(logps)
        statistics = RatioStatistics()
        lines.append(statistics.update(logps, old, torch.tensor(signs), mask, 0.1, 0.1, "sequence_token", index))
    return torch.cat(lines)


def observed(controller, lines):
    controller.observe(lines)
    controller.update(gathered_alone, lambda lines: lines)
    return controller.epsilon_low, controller.epsilon_high


@st.composite
def controllers(draw):
    low, high = draw(BOUNDS)
    start = st.floats(low, high)
    return ClipRangeController(draw(start), draw(start), draw(st.floats(1e-3, 0.999)), low, high)


@given(controllers(), UNITS)
@example(ClipRangeController(0.1, 0.1, 0.15, 1e-6, 0.5), [(800.0, (1.0, 1.0), 1)])
def test_the_range_keeps_its_bounds_and_moves_by_two_at_most(controller, units):
    before = controller.epsilon_low, controller.epsilon_high
    after = observed(controller, lines_of(units))
    first = [log_ratio for log_ratio, signs, minibatch in units if any(signs) and not minibatch]
    noise = float(np.std(first)) if first else 0.0
    for old, new in zip(before, after, strict=True):
        assert controller.epsilon_min <= new <= controller.epsilon_max
        assert old / 2 * (1 - 1e-9) <= new <= max(2 * old, noise) * (1 + 1e-9)
        if any(map(any, (signs for _, signs, _ in units))):
            assert new >= min(noise, controller.epsilon_max) * (1 - 1e-9)
        else:
            assert after == before


@given(controllers(), UNITS, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_ratio_that_is_not_finite_moves_nothing(controller, units, value):
    before = controller.epsilon_low, controller.epsilon_high
    assert observed(controller, lines_of([*units, (value, (1.0, 1.0), 1)])) == before


def twin_of(controller, **changes):
    return ClipRangeController(**controller.state()["args"] | changes)


# After the first minibatch, so that no noise holds the range up.
LATER = st.lists(
    st.tuples(LOG_RATIOS.filter(lambda log_ratio: abs(log_ratio) < 100), SIGNS, st.just(1)), min_size=1, max_size=12
)


@given(controllers(), LATER, st.floats(1, 8))
def test_wider_ratios_widen_it(controller, units, factor):
    wider = lines_of([(factor * log_ratio, signs, minibatch) for log_ratio, signs, minibatch in units])
    wider = observed(twin_of(controller), wider)
    for narrow, wide in zip(observed(controller, lines_of(units)), wider, strict=True):
        assert narrow <= wide * (1 + 1e-9)


@given(controllers(), LATER, st.floats(1e-3, 0.999))
def test_a_higher_target_narrows_it(controller, units, target):
    lines = lines_of(units)
    wide, narrow = (
        observed(twin_of(controller, target=share), lines) for share in sorted([target, controller.target])
    )
    assert all(low <= high * (1 + 1e-9) for low, high in zip(narrow, wide, strict=True))


@given(controllers(), LATER)
@example(
    ClipRangeController(0.05, 0.05, 0.2, 1e-6, 0.5),
    [(place / 100, (1.0, -1.0), 1) for place in range(-10, 11) if place],
)
def test_the_same_rollouts_again_and_again_clip_the_target(controller, units):
    lines = lines_of(units)
    for _ in range(45):
        settled = observed(controller, lines)
    for one, other in zip(observed(controller, lines), settled, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    live = [(log_ratio, signs) for log_ratio, signs, _ in units if any(signs)]
    clipped = 0
    for sign, width in zip((-1, 1), settled, strict=True):
        side = [math.exp(log_ratio) for log_ratio, signs in live if sign in signs]
        if not side:
            continue
        if not controller.epsilon_min * 1.001 < width < controller.epsilon_max * 0.999:
            return  # the bounds decide
        outside = sum((1 - ratio if sign < 0 else ratio - 1) > width * 1.001 for ratio in side)
        # Of `n` sorted values the quantile stands at place `share * (n - 1)`.
        assert outside <= controller.target * (len(side) - 1) + 1
        clipped += outside
    assert clipped <= controller.target * len(live) + 2


@given(controllers(), UNITS, st.data())
def test_the_range_is_the_same_on_all_ranks(controller, units, data):
    lines = lines_of(units)
    alone = observed(twin_of(controller), lines)
    ranks = data.draw(st.integers(1, len(units)))
    owners = torch.tensor([*range(ranks), *(data.draw(st.integers(0, ranks - 1)) for _ in units[ranks:])])
    parts = [lines[owners == rank] for rank in range(ranks)]
    pad = padded_to(len(units))
    state = torch.cat([pad(part).flatten() for part in parts])
    for part in parts:
        twin = twin_of(controller)
        twin.observe(part)
        twin.update(lambda _: state, pad)
        assert (twin.epsilon_low, twin.epsilon_high) == pytest.approx(alone, rel=1e-9)


@given(controllers(), UNITS)
def test_its_state_comes_back_from_json(controller, units):
    lines = lines_of(units)
    observed(controller, lines)
    state = json.loads(json.dumps(controller.state()))
    restored = ClipRangeController.from_state(state)
    assert vars(restored) == vars(controller)
    other = twin_of(controller, epsilon_low=controller.epsilon_max, epsilon_high=controller.epsilon_max)
    other.on_train_begin(None, TrainerState(stateful_callbacks=[controller]), TrainerControl())
    assert observed(other, lines) == observed(restored, lines)
