"""What holds of step rewards as advantages for any masks and rewards, and what is said of those that are anything."""

import asyncio
import functools
import math
import statistics

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import ANYTHING, BOOLEANS, UNIFORM, drawn, like, masks
from test_credit import loop_credit, loop_ends, on_ranks

from trl_gspo.credit import (
    StepCredit,
    check_advantages,
    check_step_rewards,
    credit_to_tokens,
    normalize_steps,
    step_kind,
    token_reward,
    turn_reward,
)


SCALES = st.sampled_from(["group", "batch", "none"])
DISCOUNTS = st.sampled_from([1.0, 0.5]) | st.floats(0.01, 1)
# Exact in float32, and equal often: groups whose rewards are all the same are a case of their own.
REWARDS = torch.cat([torch.tensor([0.0, 1.0, -1.0, 0.1]).repeat(32), 100 * UNIFORM[-127:].float()]).double()
ONE_REWARD = st.integers(0, len(REWARDS) - 1).map(lambda index: REWARDS[index].item())
EXACT = dict(rtol=1e-8, atol=1e-9)


@st.composite
def steps(draw):
    """Rewards and where their steps end, `(B, T)`; in groups of `num_generations` rows."""
    num_generations, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    is_end = drawn(draw, (num_generations * groups, draw(st.integers(1, 6))), BOOLEANS)
    rewards = drawn(draw, is_end.shape, REWARDS)
    return rewards.masked_fill(~is_end, 0.0), is_end, num_generations


def std_of(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


@given(steps(), SCALES)
def test_steps_of_a_group_are_normalized_together(case, scale):
    rewards, is_end, num_generations = case
    normalized = normalize_steps(*case, scale)
    everything = rewards[is_end].tolist()
    for start in range(0, len(rewards), num_generations):
        group = slice(start, start + num_generations)
        values = rewards[group][is_end[group]].tolist()
        spread = {"group": values, "batch": everything, "none": None}[scale]
        deviation = 1.0 if spread is None else std_of(spread) + 1e-4
        flat = not values or min(values) == max(values)
        expected = [0.0 if flat else (value - statistics.fmean(values)) / deviation for value in values]
        found = normalized[group][is_end[group]]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)
        assert not flat or not found.any()
    assert not normalized[~is_end].any()


@given(steps(), SCALES, st.data())
def test_rows_of_a_group_and_groups_in_another_order(case, scale, data):
    rewards, is_end, num_generations = case
    groups = len(rewards) // num_generations
    order = torch.tensor(
        [
            group * num_generations + row
            for group in data.draw(st.permutations(range(groups)))
            for row in data.draw(st.permutations(range(num_generations)))
        ]
    )
    found = normalize_steps(rewards[order], is_end[order], num_generations, scale)
    torch.testing.assert_close(found, normalize_steps(*case, scale)[order], **EXACT)


@given(steps(), SCALES, st.sampled_from([-1000.0, 0.25, 8.0]), st.sampled_from([0.5, 4.0]))
def test_only_differences_count_and_without_a_scale_they_are_kept(case, scale, shift, factor):
    rewards, is_end, num_generations = case
    shifted = (rewards + shift).masked_fill(~is_end, 0.0)
    torch.testing.assert_close(
        normalize_steps(shifted, is_end, num_generations, scale), normalize_steps(*case, scale), rtol=1e-6, atol=1e-7
    )
    if scale == "none":
        scaled = normalize_steps(rewards * factor, is_end, num_generations, scale)
        assert torch.equal(scaled, factor * normalize_steps(*case, scale))


@given(steps(), SCALES, st.sampled_from([1, 2, 3, 4]))
def test_the_same_over_ranks_as_on_one(case, scale, ranks):
    rewards, is_end, num_generations = case
    # As many rows on each rank: groups are spread over several, or several stand on one.
    rewards, is_end = (tensor.repeat(ranks, 1) for tensor in (rewards, is_end))

    def share(rank, gather):
        return normalize_steps(
            rewards.chunk(ranks)[rank], is_end.chunk(ranks)[rank], num_generations, scale, gather, rank
        )

    whole = normalize_steps(rewards, is_end, num_generations, scale)
    torch.testing.assert_close(torch.cat(on_ranks(share, ranks)), whole, **EXACT)


@given(steps(), DISCOUNTS)
def test_a_token_is_credited_with_the_steps_at_or_after_it(case, discount):
    rewards, is_end, _ = case
    credit = credit_to_tokens(rewards, is_end, discount)
    for row in range(len(rewards)):
        ends = is_end[row].nonzero().flatten().tolist()
        for t in range(rewards.size(1)):
            after = [rewards[row, end].item() for end in ends if end >= t]
            expected = math.fsum(discount**j * reward for j, reward in enumerate(after))
            assert math.isclose(credit[row, t].item(), expected, rel_tol=1e-9, abs_tol=1e-9)


@given(steps(), DISCOUNTS)
def test_the_credit_of_two_rewards_is_the_sum_of_their_credits(case, discount):
    rewards, is_end, _ = case
    other = rewards.flip(0).masked_fill(~is_end, 0.0)
    torch.testing.assert_close(
        credit_to_tokens(rewards, is_end, discount) + credit_to_tokens(other, is_end, discount),
        credit_to_tokens(rewards + other, is_end, discount),
        **EXACT,
    )


@st.composite
def rollouts(draw):
    """Tool masks of completions of any length, the size of a group, step rewards, and whether there are tools."""
    num_generations, groups, has_tools = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.booleans())
    bits = st.lists(st.integers(0 if has_tools else 1, 1), max_size=6)
    tool_mask = [draw(bits) for _ in range(num_generations * groups)]

    def given_to(kind):
        lengths = [len(loop_ends(mask, kind, len(mask))) for mask in tool_mask]
        return [draw(st.none() | st.lists(ONE_REWARD, min_size=n, max_size=n)) for n in lengths]

    return tool_mask, num_generations, {kind: given_to(kind) for kind in ("turn", "token")}, has_tools


def marked(kind, rewards, seen, is_async):
    def function(completions, num_turns=None, **kwargs):
        seen[kind] = num_turns if kind == "turn" else kwargs.get("num_turns")
        return rewards

    async def waiting(completions, num_turns=None, **kwargs):
        return function(completions, num_turns, **kwargs)

    mark = turn_reward if kind == "turn" else token_reward
    return functools.partial(mark(waiting if is_async else function))


@given(rollouts(), SCALES, DISCOUNTS, st.integers(0, 2), st.booleans())
@example(([[]], 1, {"turn": [[]], "token": [None]}, False), "group", 1.0, 0, False)
@example(([[], []], 2, {"turn": [[], None], "token": [[], []]}, True), "batch", 0.5, 1, False)
def test_marked_functions_become_the_advantages_of_the_loop(rollout, scale, discount, extra, is_async):
    tool_mask, num_generations, rewards, has_tools = rollout
    seen = {}
    functions = [len, *(marked(kind, rewards[kind], seen, is_async) for kind in ("turn", "token"))]
    assert [step_kind(function) for function in functions] == [None, "turn", "token"]
    credit = StepCredit(functions)
    credit.begin([[7] * len(mask) for mask in tool_mask], tool_mask if has_tools else None)
    wrapped = credit.wrap(functions)
    assert wrapped[0] is len
    for function, kind in zip(wrapped[1:], ("turn", "token"), strict=True):
        totals = function(completions=["x"] * len(tool_mask))
        totals = asyncio.run(totals) if is_async else totals
        for total, steps_of_row in zip(totals, rewards[kind], strict=True):
            assert total == (None if steps_of_row is None else sum(steps_of_row))
    assert seen["turn"] == [len(loop_ends(mask, "turn", len(mask))) for mask in tool_mask]

    width = max(map(len, tool_mask)) + extra
    weights = torch.tensor([5.0, 1.0, -0.5])
    found = credit.advantages(
        weights, width, num_generations, scale, discount, lambda tensor: tensor, 0, torch.device("cpu")
    )
    assert found.shape == (len(tool_mask), width)
    turn, token = (
        loop_credit(rewards[kind], tool_mask, kind, num_generations, width, scale, discount)
        for kind in ("turn", "token")
    )
    torch.testing.assert_close(found, (turn - 0.5 * token).view(found.shape), rtol=1e-6, atol=1e-6)


def is_number_of_float32(value):
    try:
        return abs(value) <= np.finfo(np.float32).max
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


@given(
    st.lists(ANYTHING | st.lists(st.floats() | ANYTHING, max_size=3), max_size=3) | ANYTHING,
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.sampled_from(["turn", "token"]),
)
@example([[10**400]], [1], "turn")
@example([[1e300]], [1], "token")
@example([torch.tensor(1.0)], [1], "turn")
@example([b"1"], [1], "token")
@example([{1.0: 2.0}], [1], "token")
@example(None, [1], "token")
def test_step_rewards_are_finite_numbers_or_refused_by_name(rewards, lengths, kind):
    try:
        check_step_rewards("my_reward", kind, rewards, lengths)
    except ValueError as error:
        assert "'my_reward'" in str(error)
        return
    assert len(rewards) == len(lengths)
    for given_to_row, length in zip(rewards, lengths, strict=True):
        assert given_to_row is None or len(given_to_row) == length
        for step in () if given_to_row is None else given_to_row:
            assert is_number_of_float32(step) and not isinstance(step, str)
    # And so they can be credited.
    mark = turn_reward if kind == "turn" else token_reward
    functions = [mark(lambda **kwargs: rewards)]
    credit = StepCredit(functions)
    tool_mask = [([1, 0] if kind == "turn" else [1]) * length for length in lengths]
    credit.begin(tool_mask, tool_mask)
    credit.wrap(functions)[0]()
    width = max(map(len, tool_mask), default=0)
    found = credit.advantages(
        torch.ones(1), width, max(len(lengths), 1), "group", 1.0, lambda tensor: tensor, 0, torch.device("cpu")
    )
    assert found.isfinite().all()


@given(masks(min_tokens=0), st.data())
def test_advantages_fit_and_are_finite_or_refused(mask, data):
    shapes = st.sampled_from([tuple(mask.shape[:1]), tuple(mask.shape), (), (1,), (1, 1), (*mask.shape, 1)])
    tensors = shapes.map(torch.empty).flatmap(lambda tensor: like(tensor, st.floats()))
    advantages = data.draw(tensors | ANYTHING)
    try:
        checked = check_advantages(advantages, mask)
    except ValueError as error:
        assert "`advantage_func`" in str(error)
        if torch.is_tensor(advantages) and advantages.shape in (mask.shape, mask.shape[:1]):
            trained = advantages[mask] if advantages.dim() == 2 else advantages
            assert not trained.isfinite().all()
    else:
        assert checked.isfinite().all() and checked.shape in (mask.shape, mask.shape[:1])
        assert checked.dim() == 1 or not checked[~mask].any()
        of_rows = checked.dim() == 1
        assert torch.equal(checked if of_rows else checked[mask], advantages if of_rows else advantages[mask])
