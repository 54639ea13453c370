"""The objective against the paper, against numbers worked out by hand, and on tensors that have gone wrong."""

import math
import subprocess
import sys

import pytest
import torch

from trl_gspo.objective import (
    EPSILON_HIGH,
    EPSILON_LOW,
    LEVELS,
    check_epsilon,
    clip_masks,
    clipped_units,
    gspo_loss,
    sequence_log_ratio,
    token_log_ratio,
    turn_ids,
    unit_ids,
)


NAN, INF = math.nan, math.inf
HAND_EPSILONS = {"epsilon_low": 0.25, "epsilon_high": 0.5}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
    ),
]


def reference_gspo_loss(logps, old_logps, advantages, mask, epsilon_low=3e-4, epsilon_high=4e-4):
    """GSPO paper, equations 5 to 7: one sequence and one token at a time, in float64."""
    objectives = []
    for logps_i, old_i, advantage, mask_i in zip(
        logps.double(), old_logps.double(), advantages.double(), mask, strict=True
    ):
        length, log_ratio = 0, 0.0
        for new, old, is_trained in zip(logps_i, old_i, mask_i, strict=True):
            if is_trained:
                length, log_ratio = length + 1, log_ratio + new - old.detach()
        if length == 0:
            objectives.append(torch.zeros((), dtype=torch.float64))
            continue
        ratio = torch.exp(log_ratio / length)
        clipped_ratio = ratio
        if ratio < 1 - epsilon_low:
            clipped_ratio = torch.tensor(1 - epsilon_low, dtype=torch.float64)
        elif ratio > 1 + epsilon_high:
            clipped_ratio = torch.tensor(1 + epsilon_high, dtype=torch.float64)
        objectives.append(min(ratio * advantage, clipped_ratio * advantage))
    return -sum(objectives) / len(objectives)


def make_batch(dtype=torch.float64, spread=2e-3, seed=1, rows=16, length=12):
    """Unequal lengths with holes (tool tokens), a row of advantage 0, a row without trained tokens."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, length, generator=generator, dtype=torch.float64)
    logps = old + spread * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) > 0.3
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64) + 0.3
    advantages[1], mask[2] = 0, False
    return logps.to(dtype), old.to(dtype), advantages.to(dtype), mask


def batch_of_ratios(token_ratios, dtype=torch.float64):
    """Log-probs whose token ratios are `token_ratios`, with `None` for a token that is masked out."""
    length = max(map(len, token_ratios))
    ratios = [[*row, *[None] * (length - len(row))] for row in token_ratios]
    mask = torch.tensor([[ratio is not None for ratio in row] for row in ratios])
    logps = torch.tensor([[math.log(ratio or 1e3) for ratio in row] for row in ratios], dtype=dtype)
    return logps, torch.zeros_like(logps), mask


def loss_and_gradient(loss, logps, *others, **options):
    logps = logps.detach().clone().requires_grad_()
    value = loss(logps, *others, **options)
    value = value[0] if isinstance(value, tuple) else value
    value.backward()
    return value.detach(), logps.grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spread", [1e-5, 2e-3, 0.3])
@pytest.mark.parametrize("epsilons", [{}, {"epsilon_low": 0.01, "epsilon_high": 0.05}], ids=["paper", "wide"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_equals_the_loop_from_the_paper(dtype, tolerance, epsilons, spread, device):
    batch = make_batch(dtype, spread)
    expected_loss, expected_gradient = loss_and_gradient(reference_gspo_loss, *batch, **epsilons)
    loss, gradient = loss_and_gradient(gspo_loss, *(tensor.to(device) for tensor in batch), **epsilons)
    assert loss.dtype == dtype and gradient.device.type == device
    torch.testing.assert_close(loss.cpu().double(), expected_loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=tolerance, atol=0)


def test_the_compared_batch_holds_every_case():
    batch = make_batch()
    _, statistics = gspo_loss(*batch)
    is_inside = ~statistics.is_clipped_low & ~statistics.is_clipped_high & statistics.is_live
    for rows in (statistics.is_clipped_low, statistics.is_clipped_high, is_inside, ~statistics.is_live):
        assert rows.any()


# eps 0.25 and 0.5: the clip range is [0.75, 1.5]. For each row s, min(s A, clip(s) A), gradient -s A / (n B):
#   token ratios 2, 8        s = sqrt(16)   = 4     A =  3   min(12, 4.5)   =  4.5   clipped: 0
#   token ratios 1/2, 1/8    s = sqrt(1/16) = 0.25  A =  2   min(0.5, 1.5)  =  0.5   -0.25 * 2 / (2 * 5)  = -0.05
#   token ratio  4           s =              4     A = -1   min(-4, -1.5)  = -4      4 * 1 / (1 * 5)     =  0.8
#   token ratios 1/4, 1/4    s =              0.25  A = -2   min(-0.5, -1.5) = -1.5  clipped: 0
#   token ratios 1.6, 0.9    s = sqrt(1.44) = 1.2   A =  1   min(1.2, 1.2)  =  1.2   -1.2 * 1 / (2 * 5)   = -0.12
# loss = -(4.5 + 0.5 - 4 - 1.5 + 1.2) / 5 = -0.14
HAND_RATIOS = [[2, 8], [1 / 2, None, 1 / 8], [4], [1 / 4, 1 / 4], [1.6, 0.9]]
HAND_ADVANTAGES = torch.tensor([3.0, 2.0, -1.0, -2.0, 1.0], dtype=torch.float64)
HAND_GRADIENT = [[0, 0, 0], [-0.05, 0, -0.05], [0.8, 0, 0], [0, 0, 0], [-0.12, -0.12, 0]]


def test_numbers_worked_out_by_hand():
    logps, old, mask = batch_of_ratios(HAND_RATIOS)
    loss, gradient = loss_and_gradient(gspo_loss, logps, old, HAND_ADVANTAGES, mask, **HAND_EPSILONS)
    assert loss.item() == pytest.approx(-0.14, rel=1e-12)
    torch.testing.assert_close(gradient, torch.tensor(HAND_GRADIENT, dtype=torch.float64), rtol=1e-12, atol=0)


def test_statistics_worked_out_by_hand():
    # Below the rows above: advantage 0 far outside the range, and no trained token. Of 5 live rows 2 are clipped; a
    # count blind to the sign of the advantage would say 4, one over all rows would divide by 7.
    logps, old, mask = batch_of_ratios([*HAND_RATIOS, [9], []])
    advantages = torch.cat([HAND_ADVANTAGES, torch.tensor([0.0, 5.0])])
    logps.requires_grad_()
    _, statistics = gspo_loss(logps, old, advantages, mask, **HAND_EPSILONS)
    torch.testing.assert_close(
        statistics.ratio, torch.tensor([4, 0.25, 4, 0.25, 1.2, 9, 1], dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert statistics.is_live.tolist() == [True] * 5 + [False] * 2
    assert statistics.is_clipped_low.tolist() == [False, False, False, True, False, False, False]
    assert statistics.is_clipped_high.tolist() == [True, False, False, False, False, False, False]
    assert statistics.clip_fraction.item() == pytest.approx(0.4, rel=1e-6)
    assert not any(tensor.requires_grad for tensor in statistics)


def test_clip_fraction_without_live_rows_is_zero():
    logps, old, mask = batch_of_ratios([[9], []])
    _, statistics = gspo_loss(logps, old, torch.tensor([0.0, 5.0]), mask)
    assert statistics.clip_fraction.item() == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [
        (0.5, -1, "low"),
        (0.5, 0, None),
        (0.5, 1, None),
        (0.99, -1, None),
        (1.0, 1, None),
        (1.01, 1, None),
        (2.0, -1, None),
        (2.0, 0, None),
        (2.0, 1, "high"),
    ],
)
def test_sign_of_advantage_against_side_of_clip(ratio, advantage, clipped):
    logps, old, mask = batch_of_ratios([[ratio, ratio]])
    advantages = torch.tensor([advantage], dtype=torch.float64)
    _, gradient = loss_and_gradient(gspo_loss, logps, old, advantages, mask, **HAND_EPSILONS)
    _, statistics = gspo_loss(logps, old, advantages, mask, **HAND_EPSILONS)
    assert statistics.is_clipped_low.item() == (clipped == "low")
    assert statistics.is_clipped_high.item() == (clipped == "high")
    if clipped:
        assert gradient.tolist() == [[0, 0]]
    else:
        torch.testing.assert_close(gradient, torch.full_like(gradient, -ratio * advantage / 2), rtol=1e-12, atol=0)


def test_the_edge_of_the_range_is_inside_it():
    ratio = torch.tensor([0.75, 1.5], dtype=torch.float64)
    low, high = clip_masks(ratio, torch.tensor([-1.0, 1.0]), 0.25, 0.5)
    assert not low.any() and not high.any()
    low, high = clip_masks(ratio + torch.tensor([-1e-12, 1e-12]), torch.tensor([-1.0, 1.0]), 0.25, 0.5)
    assert low.tolist() == [True, False] and high.tolist() == [False, True]


def test_clip_masks_of_one_ratio_and_many_advantages():
    low, high = clip_masks(torch.tensor([[0.5], [2.0]]), torch.tensor([[-1.0, 0.0, 1.0]]), 0.25, 0.5)
    assert low.tolist() == [[True, False, False], [False, False, False]]
    assert high.tolist() == [[False, False, False], [False, False, True]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_in_closed_form(dtype):
    logps, old, advantages, mask = make_batch(dtype, spread=1e-2)
    _, gradient = loss_and_gradient(gspo_loss, logps, old, advantages, mask, epsilon_low=0.9, epsilon_high=0.9)
    length = mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = torch.exp(((logps - old) * mask).sum(-1, keepdim=True) / length)
    expected = -ratio * advantages[:, None] * mask / (length * len(mask))
    torch.testing.assert_close(gradient, expected, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)


def test_gradient_flows_into_the_new_log_probs_only():
    logps, old, advantages, mask = make_batch()
    inputs = [tensor.requires_grad_() for tensor in (logps, old, advantages)]
    loss, _ = gspo_loss(*inputs, mask)
    loss.backward()
    assert logps.grad.abs().sum() > 0
    assert old.grad is None and advantages.grad is None


def test_sequence_log_ratio_detaches_the_old_policy():
    logps, old, _, mask = make_batch()
    log_ratio = sequence_log_ratio(logps.requires_grad_(), old.requires_grad_(), mask)
    assert log_ratio.shape == (len(mask), 1) and log_ratio[2].item() == 0
    log_ratio.sum().backward()
    torch.testing.assert_close(logps.grad, mask / mask.sum(-1, keepdim=True).clamp(min=1).double())
    assert old.grad is None


def test_row_without_trained_tokens():
    # Without that row the loss is a mean over one row less; with it, only the denominator grows.
    logps, old, mask = batch_of_ratios([[1.2, 1.2], []])
    loss, gradient = loss_and_gradient(gspo_loss, logps, old, torch.tensor([1.0, 7.0]), mask, **HAND_EPSILONS)
    assert loss.item() == pytest.approx(-1.2 / 2, rel=1e-12)
    assert gradient[1].tolist() == [0, 0]
    _, statistics = gspo_loss(logps, old, torch.tensor([1.0, 7.0]), mask, **HAND_EPSILONS)
    assert statistics.is_live.tolist() == [True, False]


def test_dead_rows_count_in_the_denominator():
    logps, old, mask = batch_of_ratios([[1.2], [1.1], [1.3], [0.9]])
    loss, gradient = loss_and_gradient(gspo_loss, logps, old, torch.tensor([2.0, 0, 0, 0]), mask, **HAND_EPSILONS)
    assert loss.item() == pytest.approx(-1.2 * 2 / 4, rel=1e-12)
    torch.testing.assert_close(gradient.squeeze(1), torch.tensor([-0.6, 0, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("where", ["logps", "old", "both"])
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_garbage_in_padding(garbage, where):
    logps, old, advantages, mask = make_batch(torch.float32)
    expected = loss_and_gradient(gspo_loss, logps, old, advantages, mask)
    if where != "old":
        logps = logps.masked_fill(~mask, garbage)
    if where != "logps":
        old = old.masked_fill(~mask, garbage)
    loss, gradient = loss_and_gradient(gspo_loss, logps, old, advantages, mask)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_masks_of_numbers(dtype):
    *batch, mask = make_batch()
    assert torch.equal(gspo_loss(*batch, mask.to(dtype))[0], gspo_loss(*batch, mask)[0])


def test_micro_batches_add_up():
    batch = make_batch()
    loss, gradient = loss_and_gradient(gspo_loss, *batch)
    parts = [loss_and_gradient(gspo_loss, *part) for part in zip(*(tensor.split(4) for tensor in batch), strict=True)]
    assert len(parts) == 4
    torch.testing.assert_close(sum(part[0] for part in parts) / 4, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]) / 4, gradient, rtol=1e-12, atol=0)


def test_wider_padding_changes_nothing():
    logps, old, advantages, mask = make_batch()
    loss, gradient = loss_and_gradient(gspo_loss, logps, old, advantages, mask)
    wide = [torch.nn.functional.pad(tensor, (0, 5), value=value) for tensor, value in ((logps, NAN), (old, 0.0))]
    wide_loss, wide_gradient = loss_and_gradient(
        gspo_loss, *wide, advantages, torch.nn.functional.pad(mask, (0, 5), value=False)
    )
    torch.testing.assert_close(wide_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(wide_gradient[:, :-5], gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("old_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_log_probs_give_a_float32_ratio(old_dtype):
    # 0.125 and 0.125 + 2^-10 are both exact in bfloat16, and so log s = -2^-10. Rounded to bfloat16 s would be 1.
    old = torch.full((2, 4), -0.125, dtype=old_dtype)
    logps = torch.full((2, 4), -0.125 - 2**-10, dtype=torch.bfloat16)
    assert torch.exp(torch.tensor(-(2**-10), dtype=torch.bfloat16)) == 1
    advantages = torch.tensor([-1.0, 1.0], dtype=torch.bfloat16)
    loss, statistics = gspo_loss(logps, old, advantages, torch.ones(2, 4))
    assert loss.dtype == statistics.ratio.dtype == torch.float32
    ratio = math.exp(-(2**-10))
    assert statistics.ratio.tolist() == pytest.approx([ratio, ratio], rel=1e-6)
    assert statistics.is_clipped_low.tolist() == [True, False]
    assert loss.item() == pytest.approx(((1 - EPSILON_LOW) - ratio) / 2, abs=1e-7)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [200.0, -200.0, INF, -INF])
def test_an_extreme_ratio_stays_in_its_row(log_ratio, advantage):
    logps, old, advantages, mask = make_batch(torch.float32)
    calm = loss_and_gradient(gspo_loss, logps, old, advantages, mask)[1]
    logps[0], advantages[0], mask[0] = old[0] + log_ratio, advantage, True
    loss, gradient = loss_and_gradient(gspo_loss, logps, old, advantages, mask)
    assert loss.isfinite() and gradient.isfinite().all()
    assert torch.equal(gradient[1:], calm[1:])


@pytest.mark.parametrize(
    ("old_shape", "mask_shape"), [((4, 1), (4, 6)), ((4, 6), (1, 6)), ((4, 5), (4, 6)), ((6,), (4, 6))]
)
def test_shapes_that_would_broadcast_are_refused(old_shape, mask_shape):
    with pytest.raises(ValueError, match=r"must all be \(B, T\)") as raised:
        gspo_loss(torch.zeros(4, 6), torch.zeros(old_shape), torch.ones(4), torch.ones(mask_shape))
    for shape in ((4, 6), old_shape, mask_shape):
        assert str(shape) in str(raised.value)


def test_flat_log_probs_are_refused():
    with pytest.raises(ValueError, match=r"must all be \(B, T\), got \(6,\), \(6,\) and \(6,\)"):
        sequence_log_ratio(torch.zeros(6), torch.zeros(6), torch.ones(6))


@pytest.mark.parametrize("shape", [(4, 6), (4, 1), (1,), (), (5,)])
def test_advantages_must_be_one_for_each_sequence(shape):
    with pytest.raises(ValueError, match=r"`advantages` must be \(B,\) = \(4,\), one for each sequence") as raised:
        gspo_loss(torch.zeros(4, 6), torch.zeros(4, 6), torch.ones(shape), torch.ones(4, 6))
    assert f"got {shape}" in str(raised.value)


# ---- GSPO-token: levels "sequence_token" and "turn"


TOKEN_LEVELS = ("sequence_token", "turn")


def units_of(is_trained, level):
    """The trained tokens of one row, unit by unit: all of them, or one maximal run after the other."""
    tokens = [t for t, trained in enumerate(is_trained.tolist()) if trained]
    if level != "turn":
        return [tokens] if tokens else []
    runs = []
    for t in tokens:
        if runs and runs[-1][-1] == t - 1:
            runs[-1].append(t)
        else:
            runs.append([t])
    return runs


def reference_token_loss(logps, old_logps, advantages, mask, epsilon_low=3e-4, epsilon_high=4e-4, *, level):
    """GSPO paper, equations 13 and 14, token by token in float64; with a turn in the place of the sequence."""
    objectives = []
    for logps_i, old_i, advantages_i, mask_i in zip(
        logps.double(), old_logps.double(), advantages.double(), mask, strict=True
    ):
        units, objective = units_of(mask_i, level), torch.zeros((), dtype=torch.float64)
        for unit in units:
            unit_ratio = torch.exp(sum(logps_i[t] - old_i[t] for t in unit).detach() / len(unit))
            for t in unit:
                advantage = advantages_i if advantages_i.dim() == 0 else advantages_i[t]
                ratio = unit_ratio * torch.exp(logps_i[t]) / torch.exp(logps_i[t]).detach()
                clipped_ratio = ratio
                if unit_ratio < 1 - epsilon_low:
                    clipped_ratio = torch.tensor(1 - epsilon_low, dtype=torch.float64)
                elif unit_ratio > 1 + epsilon_high:
                    clipped_ratio = torch.tensor(1 + epsilon_high, dtype=torch.float64)
                objective = objective + min(ratio * advantage, clipped_ratio * advantage)
        objectives.append(objective / max(sum(map(len, units)), 1))
    return -sum(objectives) / len(objectives)


def make_token_batch(dtype=torch.float64, spread=2e-3, seed=1):
    """As `make_batch`, with an advantage for each token: both signs in a row, and a row without any."""
    logps, old, _, mask = make_batch(dtype, spread, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    advantages = torch.randn(mask.shape, generator=generator, dtype=torch.float64) + 0.3
    advantages[1], advantages[3, ::2] = 0, 0
    return logps, old, advantages.to(dtype), mask


def one_turn(mask):
    """`mask` with the trained tokens of each row moved to its start."""
    return mask.sort(dim=-1, descending=True, stable=True).values


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spread", [1e-5, 2e-3, 0.3])
@pytest.mark.parametrize("make", [make_batch, make_token_batch], ids=["B", "BT"])
@pytest.mark.parametrize("level", TOKEN_LEVELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_token_levels_equal_the_loop_from_the_paper(dtype, tolerance, level, make, spread, device):
    batch = make(dtype, spread)
    expected_loss, expected_gradient = loss_and_gradient(reference_token_loss, *batch, level=level)
    loss, gradient = loss_and_gradient(gspo_loss, *(tensor.to(device) for tensor in batch), level=level)
    torch.testing.assert_close(loss.cpu().double(), expected_loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=tolerance, atol=0)
    assert gradient[[1, 2]].eq(0).all() and gradient.ne(0).any()
    if spread == 2e-3:
        is_stopped = gradient.cpu().eq(0) & batch[3] & (batch[2] if batch[2].dim() == 2 else batch[2][:, None]).ne(0)
        assert is_stopped.any() and not is_stopped[~is_stopped.all(-1)].all()


def test_the_loop_tells_the_levels_apart():
    batch = make_token_batch()
    assert reference_token_loss(*batch, level="turn") != reference_token_loss(*batch, level="sequence_token")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("spread", [2e-3, 0.3])
def test_with_one_advantage_sequence_token_is_sequence(spread, dtype, tolerance):
    batch = make_batch(dtype, spread)
    loss, gradient = loss_and_gradient(gspo_loss, *batch)
    token_loss, token_gradient = loss_and_gradient(gspo_loss, *batch, level="sequence_token")
    torch.testing.assert_close(token_loss.to(dtype), loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(token_gradient, gradient, rtol=tolerance, atol=0)
    statistics, token_statistics = gspo_loss(*batch)[1], gspo_loss(*batch, level="sequence_token")[1]
    for name in statistics._fields:
        torch.testing.assert_close(
            getattr(token_statistics, name).double(), getattr(statistics, name).double(), rtol=tolerance, atol=0
        )


@pytest.mark.parametrize("make", [make_batch, make_token_batch], ids=["B", "BT"])
def test_turn_is_sequence_token_where_each_row_has_one_turn(make):
    logps, old, advantages, mask = make()
    batch = logps, old, advantages, one_turn(mask)
    expected = loss_and_gradient(gspo_loss, *batch, level="sequence_token")
    for value, expected_value in zip(loss_and_gradient(gspo_loss, *batch, level="turn"), expected, strict=True):
        torch.testing.assert_close(value, expected_value, rtol=1e-12, atol=0)
    with_holes = loss_and_gradient(gspo_loss, logps, old, advantages, mask, level="turn")
    assert not torch.allclose(with_holes[1], expected[1])


# The clip range is [0.75, 1.5]; n = 5 trained tokens, B = 1, gradient -s A / (n B) where the clip lets it through:
#   turn 1   ratios 2, 8      s = sqrt(16)   = 4      A =  1   min(4, 1.5)      =  1.5    clipped: 0
#   turn 2   ratios 1.6, 0.9  s = sqrt(1.44) = 1.2    A =  1   min(1.2, 1.2)    =  1.2    -1.2 / 5  = -0.24
#   turn 3   ratio  1/4       s =              0.25   A = -2   min(-0.5, -1.5)  = -1.5    clipped: 0
# loss = -(2 * 1.5 + 2 * 1.2 - 1.5) / 5 = -0.78
TURNS = [[2, 8, None, 1.6, 0.9, None, 1 / 4]]
TURN_ADVANTAGES = torch.tensor([[1, 1, NAN, 1, 1, NAN, -2]], dtype=torch.float64)


def test_a_clipped_turn_has_no_gradient_and_its_neighbours_keep_theirs():
    batch = *batch_of_ratios(TURNS)[:2], TURN_ADVANTAGES, batch_of_ratios(TURNS)[2]
    loss, gradient = loss_and_gradient(gspo_loss, *batch, **HAND_EPSILONS, level="turn")
    assert loss.item() == pytest.approx(-0.78, rel=1e-12)
    assert gradient[0, [0, 1, 2, 5, 6]].tolist() == [0] * 5
    torch.testing.assert_close(gradient[0, 3:5], torch.full((2,), -0.24, dtype=torch.float64), rtol=1e-12, atol=0)
    _, statistics = gspo_loss(*batch, **HAND_EPSILONS, level="turn")
    torch.testing.assert_close(statistics.ratio, torch.tensor([[4, 1.2, 0.25, 1]], dtype=torch.float64))
    assert statistics.is_live.tolist() == [[True, True, True, False]]
    assert statistics.is_clipped_high.tolist() == [[True, False, False, False]]
    assert statistics.is_clipped_low.tolist() == [[False, False, True, False]]
    assert statistics.clip_fraction.item() == pytest.approx(2 / 3)


def test_the_clip_of_a_sequence_stops_only_the_tokens_whose_advantage_has_the_sign():
    # s = 4 on all tokens: those of positive advantage are clipped, the others have -s A / n.
    logps, old, mask = batch_of_ratios([[2, 8, 4]])
    advantages = torch.tensor([[1.0, -1.0, -0.5]], dtype=torch.float64)
    _, gradient = loss_and_gradient(gspo_loss, logps, old, advantages, mask, **HAND_EPSILONS, level="sequence_token")
    torch.testing.assert_close(gradient, torch.tensor([[0, 4 / 3, 2 / 3]], dtype=torch.float64), rtol=1e-12, atol=0)
    units = clipped_units(logps, old, advantages, mask, 0.25, 0.5, "sequence_token")
    assert units.clipped_tokens.tolist() == [[1]] and units.is_clipped_high.tolist() == [[True]]


def test_the_gradient_of_a_token_is_proportional_to_its_own_advantage():
    logps, old, advantages, mask = make_token_batch(spread=1e-2)
    _, gradient = loss_and_gradient(
        gspo_loss, logps, old, advantages, mask, epsilon_low=0.9, epsilon_high=0.9, level="sequence_token"
    )
    length = mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = torch.exp(((logps - old) * mask).sum(-1, keepdim=True) / length)
    torch.testing.assert_close(gradient, -ratio * advantages * mask / (length * len(mask)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("level", TOKEN_LEVELS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("side", [1, -1])
def test_all_tokens_of_a_unit_agree_on_the_clip_at_the_edge_of_the_range(side, outside, seed, level):
    # Float32 log-probs are multiples of 2^-21 between 4 and 8: a mean over 1000 comes within 5e-10 of any edge.
    generator = torch.Generator().manual_seed(seed)
    old = -5 - 7 * torch.rand(1, 1000, generator=generator)
    logps = old + 1e-2 * torch.randn(1, 1000, generator=generator)
    old[0, 0] = -6.0
    edge = 1 + EPSILON_HIGH if side > 0 else 1 - EPSILON_LOW
    missing = 1000 * math.log(edge) - (logps.double() - old.double())[0, 1:].sum().item()
    step = 2.0**-21
    logps[0, 0] = -6 + (math.ceil if (side > 0) == outside else math.floor)(missing / step) * step
    ratio = math.exp((logps.double() - old.double()).mean().item())
    assert 4 < -logps[0, 0] < 8 and abs(ratio - edge) < 1e-9 and ((ratio - edge) * side > 0) == outside

    batch = logps, old, torch.tensor([float(side)]), torch.ones(1, 1000)
    _, gradient = loss_and_gradient(gspo_loss, *batch, level=level)
    assert gradient.eq(0).all() if outside else gradient.ne(0).all()
    _, statistics = gspo_loss(*batch, level=level)
    assert statistics.clip_fraction.item() == outside
    assert clipped_units(*batch, EPSILON_LOW, EPSILON_HIGH, level).clipped_tokens.sum() == 1000 * outside


@pytest.mark.parametrize("level", TOKEN_LEVELS)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_garbage_in_padding_of_tokens(garbage, level):
    logps, old, advantages, mask = make_token_batch(torch.float32)
    expected = loss_and_gradient(gspo_loss, logps, old, advantages, mask, level=level)
    dirty = [tensor.masked_fill(~mask, garbage) for tensor in (logps, old, advantages)]
    loss, gradient = loss_and_gradient(gspo_loss, *dirty, mask, level=level)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])
    _, statistics = gspo_loss(*dirty, mask, level=level)
    for value, clean in zip(statistics, gspo_loss(logps, old, advantages, mask, level=level)[1], strict=True):
        assert torch.equal(value, clean)


@pytest.mark.parametrize("level", TOKEN_LEVELS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
def test_an_extreme_ratio_of_a_unit_stays_in_its_row(log_ratio, advantage, level):
    logps, old, advantages, mask = make_token_batch(torch.float32)
    calm = loss_and_gradient(gspo_loss, logps, old, advantages, mask, level=level)[1]
    logps[0], advantages[0], mask[0] = old[0] + log_ratio, advantage, True
    loss, gradient = loss_and_gradient(gspo_loss, logps, old, advantages, mask, level=level)
    assert loss.isfinite() and gradient.isfinite().all()
    assert torch.equal(gradient[1:], calm[1:])


@pytest.mark.parametrize("level", TOKEN_LEVELS)
def test_micro_batches_of_token_levels_add_up(level):
    batch = make_token_batch()
    loss, gradient = loss_and_gradient(gspo_loss, *batch, level=level)
    parts = [
        loss_and_gradient(gspo_loss, *part, level=level)
        for part in zip(*(tensor.split(4) for tensor in batch), strict=True)
    ]
    torch.testing.assert_close(sum(part[0] for part in parts) / 4, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]) / 4, gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("level", TOKEN_LEVELS)
def test_gradient_of_token_levels_flows_into_the_new_log_probs_only(level):
    *inputs, mask = make_token_batch()
    for tensor in inputs:
        tensor.requires_grad_()
    loss, statistics = gspo_loss(*inputs, mask, level=level)
    loss.backward()
    assert inputs[0].grad.abs().sum() > 0 and inputs[1].grad is inputs[2].grad is None
    assert not any(tensor.requires_grad for tensor in statistics)


MASK = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0, 1, 1, 1, 1, 0, 0], [0] * 7, [1] * 7, [1, 0] * 3 + [1]])
TURN_IDS = [[0, 0, -1, 1, -1, -1, 2], [-1, 0, 0, 0, 0, -1, -1], [-1] * 7, [0] * 7, [0, -1, 1, -1, 2, -1, 3]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_turn_ids(dtype):
    ids = turn_ids(MASK.to(dtype))
    assert ids.dtype == torch.int64 and ids.tolist() == TURN_IDS
    for mask, row in zip(MASK, ids, strict=True):
        assert [[t for t in range(7) if row[t] == k] for k in range(row.max() + 1)] == units_of(mask, "turn")
    assert turn_ids(torch.ones(2, 0)).shape == (2, 0)


def test_unit_ids():
    ids, units = unit_ids(MASK, "turn")
    assert ids.tolist() == TURN_IDS and units == 4  # as many turns as 7 tokens can hold
    for level in ("sequence", "sequence_token"):
        ids, units = unit_ids(MASK, level)
        assert torch.equal(ids, MASK - 1) and units == 1


def test_token_log_ratio():
    # Row 0: turns of log-ratios (1, 3), (5), (7), mean 2, 5, 7; over the sequence (1 + 3 + 5 + 7) / 4 = 4.
    mask, old = MASK[:1], torch.full((1, 7), -9.0)
    logps = (old + torch.tensor([[1, 3, NAN, 5, NAN, NAN, 7]])).requires_grad_()
    assert token_log_ratio(logps, old, mask, "turn").tolist() == [[2, 2, 0, 5, 0, 0, 7]]
    log_ratio = token_log_ratio(logps, old.requires_grad_(), mask)
    assert log_ratio.dtype == torch.float64 and log_ratio.tolist() == [[4, 4, 0, 4, 0, 0, 4]]
    (log_ratio * torch.arange(1.0, 8)).sum().backward()
    assert logps.grad.tolist() == [[1, 2, 0, 4, 0, 0, 7]] and old.grad is None  # each token's own


@pytest.mark.parametrize("make", [make_batch, make_token_batch], ids=["B", "BT"])
@pytest.mark.parametrize("level", LEVELS)
def test_clipped_units_equal_a_loop(level, make):
    logps, old, advantages, mask = make()
    if level == "sequence" and advantages.dim() == 2:
        pytest.skip("refused")
    units = clipped_units(logps, old, advantages, mask, EPSILON_LOW, EPSILON_HIGH, level)
    expected = {name: torch.zeros_like(value) for name, value in units._asdict().items()}
    for i, row in enumerate(mask):
        for k, unit in enumerate(units_of(row, level)):
            log_ratio = sum(logps[i, t] - old[i, t] for t in unit) / len(unit)
            advantage = [(advantages[i] if advantages.dim() == 1 else advantages[i, t]).item() for t in unit]
            low = [a < 0 and log_ratio.exp() < 1 - EPSILON_LOW for a in advantage]
            high = [a > 0 and log_ratio.exp() > 1 + EPSILON_HIGH for a in advantage]
            row_of = dict(log_ratio=log_ratio, lengths=len(unit), is_live=any(advantage), is_clipped_low=any(low))
            row_of |= dict(has_negative=min(advantage) < 0, has_positive=max(advantage) > 0)
            row_of |= dict(is_clipped_high=any(high), clipped_tokens=sum(low) + sum(high))
            for name, value in row_of.items():
                expected[name][i, k] = value
    for name, value in units._asdict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-18)
    assert expected["is_clipped_low"].any() and expected["is_clipped_high"].any()
    assert units.log_ratio.shape == (len(mask), (mask.size(1) + 1) // 2 if level == "turn" else 1)
    is_mixed = expected["is_clipped_low"] | expected["is_clipped_high"]
    assert (expected["clipped_tokens"] < expected["lengths"])[is_mixed].any() == (make is make_token_batch)


@pytest.mark.parametrize(("level", "shape"), [("sequence", (16,)), ("sequence_token", (16,)), ("turn", (16, 6))])
def test_shapes_of_the_statistics(level, shape):
    _, statistics = gspo_loss(*make_batch(), level=level)
    assert [tuple(value.shape) for value in statistics] == [shape] * 4 + [()]


@pytest.mark.parametrize("level", TOKEN_LEVELS)
@pytest.mark.parametrize("shape", [(4, 1), (1, 6), (6,), (1,), (), (4, 5), (4, 6, 1)])
def test_advantages_of_token_levels_must_be_of_sequences_or_tokens(shape, level):
    with pytest.raises(ValueError, match=r"must be \(B,\) = \(4,\) or \(B, T\) = \(4, 6\)") as raised:
        gspo_loss(torch.zeros(4, 6), torch.zeros(4, 6), torch.ones(shape), torch.ones(4, 6), level=level)
    assert f"got {shape}" in str(raised.value)


def test_advantages_of_tokens_are_refused_at_sequence_with_the_reason():
    with pytest.raises(ValueError, match="spreads an advantage evenly.*'sequence_token' and 'turn' keep it"):
        gspo_loss(*make_token_batch())


@pytest.mark.parametrize("level", ["token", "word", "", None])
def test_an_unknown_level_is_refused(level):
    batch = make_batch()
    for call in (
        lambda: gspo_loss(*batch, level=level),
        lambda: token_log_ratio(*batch[:2], batch[3], level),
        lambda: clipped_units(*batch, 0.1, 0.1, level),
    ):
        with pytest.raises(ValueError, match="must be one of 'sequence', 'sequence_token', 'turn'") as raised:
            call()
        assert f"got {level!r}" in str(raised.value)


@pytest.mark.parametrize("level", TOKEN_LEVELS)
def test_shapes_that_would_broadcast_are_refused_at_token_levels(level):
    shapes = (torch.zeros(4, 6), torch.zeros(4, 1), torch.ones(4, 6))
    for call in (
        lambda: token_log_ratio(*shapes, level),
        lambda: gspo_loss(*shapes[:2], torch.ones(4), shapes[2], level=level),
    ):
        with pytest.raises(ValueError, match=r"must all be \(B, T\)"):
            call()


# ---- options


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.0, 1.5, NAN, INF, -INF, -3e-4, True, False, "3e-4", None])
@pytest.mark.parametrize("name", ["epsilon_low", "epsilon_high"])
def test_epsilon_outside_its_range_is_refused(name, value):
    with pytest.raises(ValueError) as raised:
        gspo_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1), **{name: value})
    message = str(raised.value)
    assert f"`{name}`" in message and f"got {value!r}." in message
    assert "(0, 1)" in message and "0.0003" in message and "0.0004" in message


def test_epsilon_inside_its_range_is_accepted():
    for value in (1e-12, EPSILON_LOW, EPSILON_HIGH, 0.5, 1 - 1e-12):
        check_epsilon("epsilon", value)


def test_defaults_are_those_of_the_paper():
    assert (EPSILON_LOW, EPSILON_HIGH) == (3e-4, 4e-4)
    batch = make_batch()
    assert torch.equal(gspo_loss(*batch)[0], gspo_loss(*batch, epsilon_low=3e-4, epsilon_high=4e-4)[0])


def test_needs_neither_trl_nor_transformers():
    code = (
        "import sys, trl_gspo.objective; from trl_gspo import gspo_loss;"
        "print(sorted({'trl', 'transformers', 'accelerate', 'datasets'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
