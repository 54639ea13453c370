"""The objective against the paper, against numbers worked out by hand, and on tensors that have gone wrong."""

import math
import subprocess
import sys

import pytest
import torch

from trl_gspo.objective import EPSILON_HIGH, EPSILON_LOW, check_epsilon, clip_masks, gspo_loss, sequence_log_ratio


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


def loss_and_gradient(loss, logps, *others, **epsilons):
    logps = logps.detach().clone().requires_grad_()
    value = loss(logps, *others, **epsilons)
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
