"""What holds of the objective for any batch: the loop from the paper, invariances, exact zeros, finite numbers."""

import math

import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import ANYTHING, GARBAGE, UNIFORM, cases, dirty, drawn, is_clear_of_the_edges, like, masks
from test_objective import loss_and_gradient, reference_gspo_loss, reference_token_loss, units_of

from trl_gspo.objective import LEVELS, check_epsilon, clipped_units, gspo_loss, token_log_ratio, turn_ids, unit_ids


TOKEN_LEVELS = ("sequence_token", "turn")


def evaluate(case, **changes):
    return loss_and_gradient(gspo_loss, *case.batch, **case.options | changes)


def from_the_paper(case):
    level, logps = case.options["level"], case.logps.clone().requires_grad_()
    options = {name: value for name, value in case.options.items() if name != "level" or level != "sequence"}
    loop = reference_gspo_loss if level == "sequence" else reference_token_loss
    loss = torch.as_tensor(loop(logps, *case.batch[1:], **options), dtype=torch.float64)
    if loss.requires_grad:  # not where every row is clipped or without trained tokens
        loss.backward()
    return loss.detach(), torch.zeros_like(logps) if logps.grad is None else logps.grad


def assert_same(case, one, other):
    """Loss to the rounding of its largest terms, gradient to that of each token, which has no sum of signs in it."""
    advantages = case.advantages[case.mask] if case.advantages.dim() == 2 else case.advantages
    largest = (case.logps - case.old)[case.mask].abs().max().exp() if case.mask.any() else 1.0
    size = largest * advantages.abs().sum()
    torch.testing.assert_close(one[0], other[0], rtol=1e-9, atol=1e-12 * size.item(), check_dtype=False)
    torch.testing.assert_close(one[1], other[1], rtol=1e-9, atol=1e-300)


@given(cases())
def test_it_is_the_loop_from_the_paper(case):
    assume(is_clear_of_the_edges(case))
    assert_same(case, evaluate(case), from_the_paper(case))


@given(cases(), st.data())
def test_what_is_not_trained_may_hold_anything(case, data):
    clean = evaluate(case)
    changed = case._replace(
        logps=dirty(data.draw, case.logps, case.mask),
        old=dirty(data.draw, case.old, case.mask),
        advantages=dirty(data.draw, case.advantages, case.mask if case.advantages.dim() == 2 else case.mask.any(1)),
    )
    loss, gradient = evaluate(changed)
    assert torch.equal(loss, clean[0]) and torch.equal(gradient, clean[1])
    assert not gradient[~case.mask].any()
    for one, other in zip(changed.units, case.units, strict=True):
        assert torch.equal(one, other)


@given(cases(), st.data())
def test_rows_in_another_order(case, data):
    assume(is_clear_of_the_edges(case))
    order = torch.tensor(data.draw(st.permutations(range(len(case.mask)))))
    permuted = case._replace(**{name: getattr(case, name)[order] for name in ("logps", "old", "advantages", "mask")})
    loss, gradient = evaluate(case)
    assert_same(case, evaluate(permuted), (loss, gradient[order]))


@given(cases(levels=("sequence", "sequence_token"), per_token=False), st.data())
def test_a_sequence_does_not_know_the_order_of_its_tokens(case, data):
    assume(is_clear_of_the_edges(case))
    order = torch.tensor(data.draw(st.permutations(range(case.mask.size(1)))), dtype=torch.long)
    permuted = case._replace(logps=case.logps[:, order], old=case.old[:, order], mask=case.mask[:, order])
    loss, gradient = evaluate(case)
    assert_same(case, evaluate(permuted), (loss, gradient[:, order]))


@given(cases(), st.data())
def test_micro_batches_of_any_size_add_up(case, data):
    assume(is_clear_of_the_edges(case))
    rows = len(case.mask)
    sizes, left = [], rows
    while left:
        sizes.append(data.draw(st.integers(1, left)))
        left -= sizes[-1]
    parts = [
        evaluate(case._replace(logps=logps, old=old, advantages=advantages, mask=mask))
        for logps, old, advantages, mask in zip(*(tensor.split(sizes) for tensor in case.batch), strict=True)
    ]
    loss = sum(part[0] * size for part, size in zip(parts, sizes, strict=True)) / rows
    gradient = torch.cat([part[1] * size for part, size in zip(parts, sizes, strict=True)]) / rows
    assert_same(case, (loss, gradient), evaluate(case))


@given(cases(), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), st.sampled_from(GARBAGE))
def test_padding_on_all_sides(case, left, right, rows, garbage):
    assume(is_clear_of_the_edges(case))
    pad = (left, right, 0, rows)
    padded = case._replace(
        logps=torch.nn.functional.pad(case.logps, pad, value=garbage),
        old=torch.nn.functional.pad(case.old, pad, value=garbage),
        advantages=torch.nn.functional.pad(
            case.advantages, pad if case.advantages.dim() == 2 else (0, rows), value=garbage
        ),
        mask=torch.nn.functional.pad(case.mask, pad, value=False),
    )
    before, after = len(case.mask), len(padded.mask)
    loss, gradient = evaluate(padded)
    expected = evaluate(case)
    # A row of padding is a row: it counts in the denominator, with loss 0.
    inner = gradient[:before, left : left + case.mask.size(1)]
    assert_same(case, (loss * after / before, inner * after / before), expected)
    assert gradient.count_nonzero() == inner.count_nonzero()


@given(cases(), st.data())
def test_only_the_difference_of_the_log_probs_counts(case, data):
    assume(is_clear_of_the_edges(case))
    shift = 5 * drawn(data.draw, case.mask.shape, UNIFORM)
    shifted = case._replace(logps=case.logps + shift, old=case.old + shift)
    assert_same(case, evaluate(shifted), evaluate(case))


@given(cases(), st.floats(1e-3, 1e3))
def test_it_scales_with_the_advantages(case, scale):
    loss, gradient = evaluate(case)
    scaled = evaluate(case._replace(advantages=case.advantages * scale))
    assert_same(case, (scaled[0] / scale, scaled[1] / scale), (loss, gradient))


@given(cases(levels=("sequence",)))
def test_with_one_advantage_sequence_token_is_sequence(case):
    assume(is_clear_of_the_edges(case))
    assert_same(case, evaluate(case, level="sequence_token"), evaluate(case))


@given(cases(levels=("turn",)))
def test_with_one_turn_turn_is_sequence_token(case):
    assume(case.mask.any())
    has_one = turn_ids(case.mask).amax(1) <= 0
    case = case._replace(mask=case.mask & has_one.unsqueeze(1))
    assume(is_clear_of_the_edges(case))
    assert_same(case, evaluate(case, level="sequence_token"), evaluate(case))


@given(cases(levels=("turn",)))
def test_turns_are_rows_that_share_a_length(case):
    assume(is_clear_of_the_edges(case))
    ids, turns = unit_ids(case.mask, "turn")
    loss, gradient = 0.0, torch.zeros_like(case.logps)
    for turn in range(turns):
        alone = case._replace(mask=ids == turn)
        weight = alone.mask.sum(1).double() / case.mask.sum(1).clamp(min=1)
        for row in range(len(case.mask)):
            one = alone._replace(**{name: getattr(alone, name)[row : row + 1] for name in alone._fields[:4]})
            part = evaluate(one, level="sequence_token")
            loss = loss + part[0] * weight[row] / len(case.mask)
            gradient[row] += part[1][0] * weight[row] / len(case.mask)
    assert_same(case, (loss, gradient), evaluate(case))


def clips_by_token(case):
    """`(B, T)`, bool, of the statistics: the clip stops this token's gradient."""
    ids, _ = unit_ids(case.mask, case.options["level"])
    advantages = case.advantages if case.advantages.dim() == 2 else case.advantages.unsqueeze(1)
    low, high = (
        (getattr(case.units, f"is_clipped_{side}").gather(1, ids.clamp(min=0)) & case.mask) for side in ("low", "high")
    )
    return (low & (advantages < 0)) | (high & (advantages > 0)), (case.mask & (advantages != 0))


DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


@given(st.data(), DTYPES)
def test_a_clipped_token_has_no_gradient_and_every_other_live_one_has(data, dtype):
    # On the edges of the range too: what the statistics call clipped is what the gradient says.
    case = data.draw(cases(dtype=dtype))
    _, gradient = evaluate(case)
    is_clipped, is_live = clips_by_token(case)
    assert not gradient[is_clipped | ~is_live].any()
    assert gradient[is_live & ~is_clipped].all()
    assert torch.equal(is_clipped.sum(1), case.units.clipped_tokens.sum(1))
    assert torch.equal(is_live.any(1), case.units.is_live.any(1))


@given(
    st.sampled_from([math.log1p(-3e-4), math.log1p(4e-4)]),
    st.integers(-8, 8),
    st.floats(0.5, 4, width=32) | st.floats(-4, -0.5, width=32),
)
def test_so_it_is_within_some_steps_of_float32_of_the_edge(edge, steps, advantage):
    logps = torch.tensor([[edge + steps * 2.0**-25]])
    batch = logps, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1)
    _, gradient = loss_and_gradient(gspo_loss, *batch)
    _, statistics = gspo_loss(*batch)
    is_clipped = statistics.is_clipped_low | statistics.is_clipped_high
    ratio = statistics.ratio.item()
    assert gradient.item() == (0 if is_clipped else torch.tensor(-advantage * ratio).item())


@given(st.data(), DTYPES, st.sampled_from(LEVELS), st.sampled_from([1.0, 1e-6, 1e6, 1e20]))
def test_whatever_is_finite_stays_finite(data, dtype, level, scale):
    mask = data.draw(masks(min_tokens=0))
    # Far beyond any log-probability, and far from where a difference of two would itself be infinite.
    values = st.floats(-1e30, 0) | st.sampled_from([0.0, -1e30, -1e-40, -5e-324, -700.0, -90.0])
    logps, old = data.draw(like(mask, values)).to(dtype), data.draw(like(mask, values)).to(dtype)
    is_per_token = level != "sequence" and data.draw(st.booleans())
    shape = mask if is_per_token else mask.new_empty(len(mask))
    advantages = (scale * drawn(data.draw, shape.shape, UNIFORM)).to(dtype)
    loss, gradient = loss_and_gradient(gspo_loss, logps, old, advantages, mask, level=level)
    assert loss.isfinite() and gradient.isfinite().all()
    assert not gradient[~mask].any()
    _, statistics = gspo_loss(logps, old, advantages, mask, level=level)
    assert 0 <= statistics.clip_fraction <= 1 and not statistics.ratio.isnan().any()


@given(cases())
def test_units_agree_with_one_another(case):
    units, (_, statistics) = case.units, gspo_loss(*case.batch, **case.options)
    is_clipped = units.is_clipped_low | units.is_clipped_high
    assert torch.equal(units.lengths.sum(1), case.mask.sum(1))
    assert torch.equal(is_clipped, units.clipped_tokens > 0)
    assert (units.clipped_tokens <= units.lengths).all()
    assert torch.equal(units.is_live, units.has_negative | units.has_positive)
    assert not (units.is_clipped_low & ~units.has_negative).any()
    assert not (units.is_clipped_high & ~units.has_positive).any()
    assert not units.log_ratio[units.lengths == 0].any()
    assert torch.equal(statistics.ratio.flatten(), torch.exp(units.log_ratio).flatten())
    assert statistics.clip_fraction == is_clipped.sum() / units.is_live.sum().clamp(min=1)


@given(cases(levels=TOKEN_LEVELS))
def test_each_token_has_the_ratio_of_its_unit_and_its_own_gradient(case):
    logps = case.logps.requires_grad_()
    log_ratio = token_log_ratio(logps, case.old, case.mask, case.options["level"])
    expected = torch.zeros_like(log_ratio)
    for row, is_trained in enumerate(case.mask):
        for unit in units_of(is_trained, case.options["level"]):
            expected[row, unit] = (case.logps[row, unit] - case.old[row, unit]).mean().detach()
    torch.testing.assert_close(log_ratio.detach(), expected, rtol=1e-12, atol=1e-14)
    log_ratio.sum().backward()
    assert torch.equal(logps.grad, case.mask.double())


@given(masks(min_tokens=0))
def test_turns_are_the_maximal_runs(mask):
    for is_trained, row in zip(mask, turn_ids(mask), strict=True):
        expected = [-1] * len(row)
        for index, unit in enumerate(units_of(is_trained, "turn")):
            for t in unit:
                expected[t] = index
        assert row.tolist() == expected


SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@given(
    st.lists(SHAPES, min_size=3, max_size=3) | SHAPES.map(lambda shape: [shape] * 3), SHAPES, st.sampled_from(LEVELS)
)
def test_shapes_fit_or_are_refused(shapes, advantages, level):
    logps, old, mask = shapes
    fits = len(logps) == 2 and logps == old == mask
    fits &= advantages == mask[:1] or (level != "sequence" and advantages == mask)
    for call in (gspo_loss, lambda *batch, level: clipped_units(*batch, 0.1, 0.1, level)):
        try:
            call(torch.zeros(logps), torch.zeros(old), torch.ones(advantages), torch.ones(mask), level=level)
        except ValueError as error:
            assert not fits and ("must" in str(error))
        else:
            assert fits


@given(ANYTHING)
@example(10**400)
@example(5e-324)
@example(math.nextafter(1, 0))
def test_an_epsilon_is_a_number_between_0_and_1_or_refused(value):
    is_right = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1
    try:
        check_epsilon("epsilon", value)
    except ValueError as error:
        assert not is_right and "`epsilon`" in str(error)
    else:
        assert is_right
