"""The controller of the clip range: one step by hand, bounds, noise floor, both sides, runs that reach the target."""

import math

import numpy as np
import pytest
import torch
from test_diagnostics import EPSILONS, gathered_alone, padded_to
from transformers import TrainerControl, TrainerState

from trl_gspo.clip_range import ClipRangeController
from trl_gspo.diagnostics import RatioStatistics


def make_controller(epsilon_low=0.01, epsilon_high=0.01, target=0.5, epsilon_min=1e-6, epsilon_max=0.5):
    return ClipRangeController(epsilon_low, epsilon_high, target, epsilon_min, epsilon_max)


def rows_of(log_ratios, advantages, minibatch=1):
    """What the statistics keep of sequences of one token, at these log-ratios."""
    logps = torch.tensor(log_ratios, dtype=torch.float64).unsqueeze(1)
    old, mask = torch.zeros_like(logps), torch.ones_like(logps)
    return RatioStatistics().update(logps, old, torch.tensor(advantages), mask, *EPSILONS, minibatch=minibatch)


def moved(controller, *rows):
    for row in rows:
        controller.observe(row)
    controller.update(gathered_alone, lambda units: units)
    return controller.epsilon_low, controller.epsilon_high


# Target 1/2, so 1/2 of each side: the medians. Below: ratios 0.97, 0.98, 0.99 with A < 0, median 0.98, width 0.02,
# from 0.01 three tenths of the way in log space: 0.01^0.7 * 0.02^0.3. Above: ratios 1.005, 1.01, 1.015 with A > 0,
# median 1.01, width 0.01: stays.
def test_one_step_by_hand():
    log_ratios = [math.log(ratio) for ratio in (0.97, 0.98, 0.99, 1.005, 1.01, 1.015, 3.0)]
    low, high = moved(make_controller(), rows_of(log_ratios, [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 0.0]))
    assert low == pytest.approx(0.01**0.7 * 0.02**0.3) and high == pytest.approx(0.01)


def test_it_is_the_sign_of_the_advantage_that_makes_a_side():
    # A negative advantage with a ratio above 1 is never clipped, but counts among those that can be.
    log_ratios = [-0.02, -0.02, 0.5, 0.5, 0.02, 0.02, -0.5, -0.5]
    low, high = moved(
        make_controller(target=0.25), rows_of(log_ratios, [-1.0] * 4 + [1.0] * 4), rows_of([9.0, -9.0], [0.0, 0.0])
    )
    # A quarter of (-0.02, -0.02, 0.5, 0.5) is below -0.02 + 0: place 0.75 of the sorted values.
    assert low == pytest.approx(0.01**0.7 * (-math.expm1(-0.02)) ** 0.3)
    assert high == pytest.approx(0.01**0.7 * math.expm1(0.02) ** 0.3)


@pytest.mark.parametrize(("start", "expected"), [(1e-4, 2e-4), (0.4, 0.2)])
def test_it_changes_by_a_factor_of_two_at_most(start, expected):
    rows = rows_of([-0.01, -0.01, 0.01, 0.01], [-1.0, -1.0, 1.0, 1.0])
    assert moved(make_controller(start, start), rows) == pytest.approx((expected, expected))


def test_bounds_hold():
    wide = rows_of([-5.0, -5.0, 5.0, 5.0], [-1.0, -1.0, 1.0, 1.0])
    assert moved(make_controller(0.3, 0.3, epsilon_max=0.4), wide) == (0.4, 0.4)
    narrow = rows_of([-1e-9, -1e-9, 1e-9, 1e-9], [-1.0, -1.0, 1.0, 1.0])
    assert moved(make_controller(5e-4, 5e-4, epsilon_min=1e-3), narrow) == (1e-3, 1e-3)


def test_never_below_the_noise_floor():
    # Before any update log s is +-0.02, so the noise is 0.02; after it the ratios stay within 0.001.
    first = rows_of([-0.02, 0.02, -0.02, 0.02], [-1.0, -1.0, 1.0, 1.0], minibatch=0)
    later = rows_of([-1e-3] * 20 + [1e-3] * 20, [-1.0] * 20 + [1.0] * 20)
    assert moved(make_controller(), first, later) == (0.02, 0.02)


def test_a_ratio_on_the_wrong_side_of_one_goes_to_the_floor():
    # Half of the negatives would be clipped only by a width below 0.
    rows = rows_of([0.1, 0.1, 0.2, 0.2], [-1.0, -1.0, 1.0, 1.0])
    low, high = moved(make_controller(epsilon_min=1e-4), rows)
    assert low == 0.005 and high > 0.01


def test_a_side_without_units_stays():
    low, high = moved(make_controller(), rows_of([0.02, 0.02], [1.0, 1.0]))
    assert low == 0.01 and high == pytest.approx(0.01**0.7 * math.expm1(0.02) ** 0.3)


@pytest.mark.parametrize("log_ratio", [math.nan, math.inf, -math.inf])
def test_without_a_live_or_finite_unit_it_stays(log_ratio):
    assert moved(make_controller(), rows_of([0.1, 0.2], [0.0, 0.0])) == (0.01, 0.01)
    assert moved(make_controller(), rows_of([0.1, log_ratio], [1.0, 1.0])) == (0.01, 0.01)


def test_units_of_both_signs_count_once():
    # Turns of two tokens with advantages of both signs: each can be clipped from either side. Target 1/2 of the units
    # is then a quarter from below and a quarter from above.
    log_ratios = torch.tensor([-0.04, -0.02, 0.0, 0.02, 0.04], dtype=torch.float64)
    logps = log_ratios.unsqueeze(1).expand(5, 2)
    advantages = torch.tensor([[1.0, -1.0]]).expand(5, 2)
    rows = RatioStatistics().update(
        logps, torch.zeros_like(logps), advantages, torch.ones(5, 2), *EPSILONS, "turn", minibatch=1
    )
    low, high = moved(make_controller(), rows)
    assert low == pytest.approx(0.01**0.7 * (-math.expm1(-0.02)) ** 0.3)
    assert high == pytest.approx(0.01**0.7 * math.expm1(0.02) ** 0.3)


def test_the_same_on_all_ranks_as_on_one():
    generator = np.random.default_rng(0)
    log_ratios, advantages = generator.normal(0, 0.01, (2, 30)), generator.choice([-1.0, 0.0, 1.0], (2, 30))
    parts = [rows_of(values, signs) for values, signs in zip(log_ratios, advantages, strict=True)]
    alone = moved(make_controller(target=0.15), *parts)
    uneven = [torch.cat(parts)[:40], torch.cat(parts)[40:]]
    state = torch.cat([padded_to(40)(part).flatten() for part in uneven])
    for part in uneven:
        controller = make_controller(target=0.15)
        controller.observe(part)
        controller.update(lambda _: state, padded_to(40))
        assert (controller.epsilon_low, controller.epsilon_high) == alone != (0.01, 0.01)


@pytest.mark.parametrize("start", [0.2, 1e-5])
@pytest.mark.parametrize("noise", [0.0, 3e-4])
def test_it_reaches_the_target_and_holds_it(start, noise):
    # A stand-in for a policy: minibatch K of a rollout batch spreads log s by 2e-3 * K, and pushes it to the side that
    # its advantage wants. The clipped share is measured with the range in force, as a log would.
    generator = np.random.default_rng(0)
    controller = make_controller(start, start, target=0.15)
    fractions = []
    for _ in range(60):
        clipped = 0
        for minibatch in range(4):
            advantages = generator.choice([-1.0, 1.0], 64)
            log_ratios = minibatch * 2e-3 * (generator.normal(size=64) + 0.3 * advantages)
            log_ratios += noise * generator.normal(size=64)
            ratios = np.exp(log_ratios)
            clipped += np.sum((ratios < 1 - controller.epsilon_low) & (advantages < 0))
            clipped += np.sum((ratios > 1 + controller.epsilon_high) & (advantages > 0))
            controller.observe(rows_of(log_ratios, advantages, minibatch))
        fractions.append(clipped / 256)
        controller.update(gathered_alone, lambda units: units)
    assert abs(fractions[0] - 0.15) > 0.1
    assert np.abs(np.array(fractions[25:30]).mean() - 0.15) < 0.05
    assert np.abs(np.array(fractions[30:]) - 0.15).max() < 0.08


def test_its_state_comes_back():
    controller = make_controller(0.02, 0.03)
    state = TrainerState(stateful_callbacks=[controller])
    other = make_controller(0.5, 0.5)
    other.on_train_begin(None, state, TrainerControl())
    assert (other.epsilon_low, other.epsilon_high) == (0.02, 0.03)


def test_a_checkpoint_that_did_not_know_it_is_taken_up_and_can_be_saved():
    state, controller = TrainerState(), make_controller(0.02, 0.03)
    controller.on_train_begin(None, state, TrainerControl())
    assert (controller.epsilon_low, controller.epsilon_high) == (0.02, 0.03)
    assert state.stateful_callbacks["ClipRangeController"] == controller.state()


def test_transformers_own_restoring_makes_its_equal():
    controller = make_controller(0.02, 0.03, target=0.2, epsilon_min=1e-5, epsilon_max=0.3)
    twin = ClipRangeController.from_state(controller.state())
    assert vars(twin) == vars(controller)
