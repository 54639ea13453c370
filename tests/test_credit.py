"""Step rewards as advantages: by hand, against a slow loop over DeepSeekMath's section 4.1.3, and gone wrong."""

import asyncio
import functools
import math
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from trl_gspo.credit import (
    StepCredit,
    check_advantages,
    check_step_rewards,
    credit_to_tokens,
    normalize_steps,
    place_steps,
    step_kind,
    token_reward,
    turn_reward,
)
from trl_gspo.objective import turn_ids


NAN = math.nan
EXACT = dict(rtol=1e-12, atol=1e-15)


def loop_ends(mask, kind, length):
    """Position of the token that ends each step of one completion."""
    if kind == "token":
        return list(range(length))
    return [t for t in range(length) if mask[t] and (t + 1 == length or not mask[t + 1])]


def loop_credit(rewards, masks, kind, num_generations, width, scale="group", discount=1.0):
    """DeepSeekMath, section 4.1.3, one group, one completion and one token at a time."""
    groups = [rewards[i : i + num_generations] for i in range(0, len(rewards), num_generations)]
    everything = [r for steps in rewards for r in steps or []]
    credit = []
    for index, (steps, mask) in enumerate(zip(rewards, masks, strict=True)):
        group = [r for others in groups[index // num_generations] for r in others or []]
        mean = statistics.fmean(group) if group else 0.0
        spread = {"group": group, "batch": everything, "none": None}[scale]
        std = 0.0 if spread is None or len(spread) < 2 else statistics.stdev(spread)
        normalized = [(r - mean) / (1.0 if spread is None else std + 1e-4) for r in steps or []]
        if len(set(group)) <= 1:
            normalized = [0.0] * len(normalized)
        ends = [] if steps is None else loop_ends(mask, kind, len(mask))
        row = []
        for t in range(width):
            after = [r for end, r in zip(ends, normalized, strict=True) if end >= t]
            row.append(sum(discount**j * r for j, r in enumerate(after)))
        credit.append(row)
    return torch.tensor(credit, dtype=torch.float64)


def credit_of(rewards, masks, kind, num_generations, scale="group", discount=1.0, width=None):
    """The same through `place_steps`, `normalize_steps` and `credit_to_tokens`."""
    ids = turn_ids(padded(masks, width))
    placed, is_end = place_steps(rewards, kind, ids)
    return credit_to_tokens(normalize_steps(placed, is_end, num_generations, scale), is_end, discount)


def padded(masks, width=None):
    width = width or max(map(len, masks))
    return torch.tensor([mask + [0] * (width - len(mask)) for mask in masks])


def random_batch(rows, kind, seed, num_turns=4):
    """Masks of several turns between tool tokens, at the start and the end too, and steps; some completions `None`."""
    generator = np.random.default_rng(seed)
    masks, rewards = [], []
    for _ in range(rows):
        mask = [0] * generator.integers(0, 2)
        for _ in range(generator.integers(1, num_turns + 1)):
            mask += [1] * generator.integers(1, 5) + [0] * generator.integers(1, 3)
        masks.append([int(m) for m in mask[: len(mask) - generator.integers(0, 2)]])
        steps = generator.normal(size=len(loop_ends(masks[-1], kind, len(masks[-1])))).astype(np.float32)
        rewards.append(None if generator.random() < 0.15 else steps.tolist())
    return masks, rewards


# ---- by hand


# Two completions of two turns, tool tokens in the middle, the second shorter. Rewards (1, 0) and (0, 3): mean 1,
# deviations (0, -1) and (-1, 2), sum of squares 6, unbiased standard deviation sqrt(6 / 3) = sqrt(2).
HAND_MASKS = [[1, 1, 0, 0, 1, 1, 1], [1, 0, 1, 1]]
HAND_REWARDS = [[1.0, 0.0], [0.0, 3.0]]
HAND_SCALE = math.sqrt(2) + 1e-4


@pytest.mark.parametrize(
    ("discount", "expected"),
    [
        # The first turn earns its own and what follows: 0 - 1 and -1 + 2; tool tokens earn what follows.
        (1.0, [[-1, -1, -1, -1, -1, -1, -1], [1, 2, 2, 2, 0, 0, 0]]),
        # 0 - 1/2 and -1 + 2/2; nothing is discounted within a turn, nor from the tool tokens before the next.
        (0.5, [[-0.5, -0.5, -1, -1, -1, -1, -1], [0, 2, 2, 2, 0, 0, 0]]),
    ],
)
def test_turn_credit_by_hand(discount, expected):
    credit = credit_of(HAND_REWARDS, HAND_MASKS, "turn", 2, discount=discount)
    torch.testing.assert_close(credit, torch.tensor(expected, dtype=torch.float64) / HAND_SCALE, **EXACT)


@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_token_credit_by_hand(discount):
    # Rewards (3, 3, 1.5) and (3, 1): mean 2.3; a token of a tool has a reward as any other.
    rewards, masks = [[3.0, 3.0, 1.5], [3.0, 1.0]], [[1, 0, 1], [1, 1]]
    first, second = [0.7, 0.7, -0.8], [0.7, -1.3]
    scale = math.sqrt((3 * 0.49 + 0.64 + 1.69) / 4) + 1e-4
    expected = [
        [first[0] + discount * first[1] + discount**2 * first[2], first[1] + discount * first[2], first[2]],
        [second[0] + discount * second[1], second[1], 0],
    ]
    credit = credit_of(rewards, masks, "token", 2, discount=discount)
    torch.testing.assert_close(credit, torch.tensor(expected, dtype=torch.float64) / scale, **EXACT)


@pytest.mark.parametrize(
    ("scale", "deviation"),
    [("none", 1.0), ("group", math.sqrt(2) + 1e-4), ("batch", math.sqrt(40 / 3) + 1e-4)],
)
def test_scales_by_hand(scale, deviation):
    # Two groups of two completions of one turn: (0, 2) and (6, 8), each with mean m +- 1 and standard deviation
    # sqrt(2); over the batch mean 4, squares 16 + 4 + 4 + 16 = 40, standard deviation sqrt(40 / 3).
    credit = credit_of([[0.0], [2.0], [6.0], [8.0]], [[1]] * 4, "turn", 2, scale=scale)
    expected = torch.tensor([-1, 1, -1, 1], dtype=torch.float64) / deviation
    torch.testing.assert_close(credit.squeeze(1), expected, **EXACT)


def test_place_steps_by_hand():
    ids = turn_ids(padded([[0, 1, 1, 0, 1], [1, 1, 1], [1, 0, 1]], 6))
    placed, is_end = place_steps([[5.0, 7.0], [3.0], None], "turn", ids)
    assert placed.tolist() == [[0, 0, 5, 0, 7, 0], [0, 0, 3, 0, 0, 0], [0] * 6]
    assert is_end.int().tolist() == [[0, 0, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0], [0] * 6]
    placed, is_end = place_steps([[1.0, 2.0, 3.0, 4.0, 5.0], None, [6.0, 0.0, 8.0]], "token", ids)
    assert placed.tolist() == [[1, 2, 3, 4, 5, 0], [0] * 6, [6, 0, 8, 0, 0, 0]]
    assert is_end.int().tolist() == [[1, 1, 1, 1, 1, 0], [0] * 6, [1, 1, 1, 0, 0, 0]]


def test_a_completion_without_a_reward_is_in_no_mean():
    # With `None` as 0 the mean would be 2, not 3, and the standard deviation sqrt(4), not sqrt(2).
    credit = credit_of([[2.0], None, [4.0]], [[1, 1], [1, 1], [1, 0]], "turn", 3)
    scale = math.sqrt(2) + 1e-4
    expected = torch.tensor([[-1, -1], [0, 0], [1, 0]], dtype=torch.float64) / scale
    torch.testing.assert_close(credit, expected, **EXACT)


# ---- against the loop


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("discount", [1.0, 0.7])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("num_generations", [1, 4])
@pytest.mark.parametrize("kind", ["turn", "token"])
def test_equals_the_loop(kind, num_generations, scale, discount, seed):
    masks, rewards = random_batch(12, kind, seed)
    width = max(map(len, masks)) + 3
    credit = credit_of(rewards, masks, kind, num_generations, scale, discount, width)
    expected = loop_credit(rewards, masks, kind, num_generations, width, scale, discount)
    assert credit.dtype == torch.float64
    torch.testing.assert_close(credit, expected, rtol=1e-9, atol=1e-12)
    assert not credit[:, -3:].any() and credit.any()
    for row, steps in enumerate(rewards):
        assert steps is not None or not credit[row].any()


def test_rewards_far_from_zero_keep_their_spread():
    # From sums of squares the variance of 1e4 +- 1 would be lost in float32.
    credit = credit_of([[1e4 - 1], [1e4 + 1]], [[1], [1]], "turn", 2)
    torch.testing.assert_close(
        credit, torch.tensor([[-1.0], [1.0]], dtype=torch.float64) / (math.sqrt(2) + 1e-4), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("discount", [1.0, 0.5])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.7, 1e-8, 12345.678])
def test_a_flat_group_has_no_credit_at_all(value, discount, scale):
    masks = [[1, 0, 1, 1, 0, 1], [1, 1, 0, 1], [1], [1, 0, 1], [1, 0, 1], [1]]
    rewards = [[value] * len(loop_ends(mask, "turn", len(mask))) for mask in masks]
    rewards[3:] = [[1.0, 2.0], [3.0, 4.0], [5.0]]
    credit = credit_of(rewards, masks, "turn", 3, scale, discount)
    assert credit[:3].eq(0).all() and credit[3:].ne(0).any()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_flat_group_is_flat_though_its_mean_is_rounded(dtype, scale):
    rewards = torch.full((6, 1), 0.1, dtype=dtype)
    rewards[3:] = torch.tensor([[1.0], [2.0], [3.0]])
    assert (0.1 + 0.1 + 0.1) / 3 != 0.1
    normalized = normalize_steps(rewards, torch.ones(6, 1, dtype=torch.bool), 3, scale)
    assert normalized[:3].eq(0).all() and normalized[3:].ne(0).any()


def test_rewards_that_differ_by_rounding_alone_are_equal():
    assert 0.1 + 0.2 != 0.3
    assert credit_of([[0.1 + 0.2, 0.3], [sum([0.1] * 3)]], [[1, 0, 1], [1]], "turn", 2).eq(0).all()


@pytest.mark.parametrize("rewards", [[None, None], [[], []], [None, []]])
def test_a_group_without_a_step_has_no_credit(rewards):
    assert credit_of(rewards, [[0, 0], [0, 0]], "turn", 2).tolist() == [[0, 0], [0, 0]]


def test_one_step_alone_has_no_credit():
    assert credit_of([[3.0], None], [[1, 1], [1, 1]], "turn", 2).tolist() == [[0, 0], [0, 0]]


# ---- over ranks


def on_ranks(function, ranks):
    """Runs `function(rank, gather)` on simulated ranks, which `gather` joins."""
    barrier, slots = threading.Barrier(ranks), [None] * ranks

    def run(rank):
        def gather(tensor):
            slots[rank] = tensor
            barrier.wait(timeout=20)
            gathered = torch.cat(slots)
            barrier.wait(timeout=20)
            return gathered

        return function(rank, gather)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_groups_may_be_spread_over_ranks(ranks, scale):
    # 12 rows in groups of 4: on 2 ranks the middle group straddles both, on 6 each is spread over two.
    masks, rewards = random_batch(12, "turn", seed=5)
    placed, is_end = place_steps(rewards, "turn", turn_ids(padded(masks)))
    rows = 12 // ranks

    def share(rank, gather):
        mine = slice(rank * rows, (rank + 1) * rows)
        return normalize_steps(placed[mine], is_end[mine], 4, scale, gather, rank)

    whole = normalize_steps(placed, is_end, 4, scale)
    torch.testing.assert_close(torch.cat(on_ranks(share, ranks)), whole, **EXACT)
    assert whole[:4].any() and whole[4:8].any() and whole[8:].any()


# ---- what a function may return


@pytest.mark.parametrize(
    ("kind", "rewards", "message"),
    [
        ("turn", [[1.0]], "The turn reward 'f' returned 1 lists for 2 completions"),
        ("turn", [[1.0], [1.0, 2.0, 3.0], [1.0]], "The turn reward 'f' returned 3 lists for 2 completions"),
        ("turn", [[1.0], [1.0, 2.0]], r"'f' returned 2 numbers for completion 1, which has 3 turns\. A turn is a max"),
        ("token", [[1.0, 2.0], [1.0] * 3], r"'f' returned 2 numbers for completion 0, which has 1 tokens\. Every tok"),
        ("turn", [[], [1.0] * 3], "'f' returned 0 numbers for completion 0, which has 1 turns"),
        ("turn", [[1.0], 2.5], "'f' returned 2.5 for completion 1, which has 3 turns"),
        ("turn", [1.0, 2.0], "'f' returned 1.0 for completion 0, which has 1 turns"),
        ("turn", [[1.0], [1.0, NAN, 1.0]], "'f' returned nan for a turn of completion 1"),
        ("token", [[-math.inf], [1.0] * 3], "'f' returned -inf for a token of completion 0"),
        ("turn", [[1.0], [1.0, None, 1.0]], "'f' returned None for a turn of completion 1"),
        ("turn", [[1.0], "abc"], "'f' returned 'abc' for completion 1"),
        ("turn", [[1.0], [[1.0], [2.0], [3.0]]], r"'f' returned \[1.0\] for a turn of completion 1"),
    ],
)
def test_wrong_step_rewards_are_refused(kind, rewards, message):
    with pytest.raises(ValueError, match=message):
        check_step_rewards("f", kind, rewards, [1, 3])


def test_the_message_says_how_turns_are_counted_and_what_else_to_return():
    with pytest.raises(ValueError) as raised:
        check_step_rewards("f", "turn", [[1.0] * 4], [3])
    message = str(raised.value)
    assert "maximal run of trained tokens" in message and "`num_turns`" in message and "Return None" in message
    with pytest.raises(ValueError, match="those of tools and environments too"):
        check_step_rewards("f", "token", [[1.0] * 4], [3])


def test_right_step_rewards_are_accepted():
    rewards = [[1, True, -2.5], None, np.array([1.0, 2.0], dtype=np.float32), torch.tensor([3.0]), (), (4.0,)]
    lengths = [3, 9, 2, 1, 0, 1]
    check_step_rewards("f", "turn", rewards, lengths)
    ids = turn_ids(padded([[1, 0, 1, 0, 1], [1], [1, 0, 1], [1], [0], [1]]))
    placed, _ = place_steps(rewards, "turn", ids)
    assert placed.sum(1).tolist() == [-0.5, 0, 3, 3, 0, 4]


# ---- the functions, as a trainer calls them


COMPLETION_IDS = [[9, 9, 9, 9], [9, 9], [9, 9, 9]]
TOOL_MASK = [[1, 0, 0, 1], [1, 1], [1, 0, 1]]
CALL = dict(prompts=["p"] * 3, completions=["c"] * 3, completion_ids=COMPLETION_IDS, trainer_state=None)


@turn_reward
def with_kwargs(completions, num_turns, **kwargs):
    assert kwargs.keys() == CALL.keys() - {"completions"}
    return [[float(10 * index + k) for k in range(turns)] for index, turns in enumerate(num_turns)]


@turn_reward
def by_name(prompts, completions, completion_ids, trainer_state, num_turns):
    return with_kwargs(completions, num_turns, prompts=0, completion_ids=0, trainer_state=0)


@turn_reward
def only_kwargs(**kwargs):
    assert kwargs["num_turns"] == [2, 1, 2]
    return by_name(**kwargs)


@turn_reward
def without_turns(prompts, completions, completion_ids, trainer_state):
    return [[0.0, 1.0], [10.0], [20.0, 21.0]]


@turn_reward
async def asynchronous(num_turns, **kwargs):
    await asyncio.sleep(0)
    return with_kwargs(num_turns=num_turns, **kwargs)


def offset(by, num_turns, **kwargs):
    return [[by + step for step in steps] for steps in with_kwargs(num_turns=num_turns, **kwargs)]


class Judge:
    def __call__(self, num_turns, **kwargs):
        return with_kwargs(num_turns=num_turns, **kwargs)

    @turn_reward
    def method(self, num_turns, **kwargs):
        return self(num_turns, **kwargs)


class AsyncJudge(Judge):
    async def __call__(self, num_turns, **kwargs):
        return await asynchronous(num_turns=num_turns, **kwargs)


FUNCTIONS = {
    "kwargs": with_kwargs,
    "by_name": by_name,
    "only_kwargs": only_kwargs,
    "without_turns": without_turns,
    "async": asynchronous,
    "partial": turn_reward(functools.partial(offset, 0.0)),
    "partial_of_marked": functools.partial(with_kwargs),
    "async_partial": functools.partial(asynchronous),
    "object": turn_reward(Judge()),
    "async_object": turn_reward(AsyncJudge()),
    "method": Judge().method,
    "generator": turn_reward(
        lambda num_turns, **_: ([10.0 * i + k for k in range(n)] for i, n in enumerate(num_turns))
    ),
}


def call(function, **others):
    result = function(**CALL | others)
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_kind_of_function(function):
    assert step_kind(function) == "turn"
    credit = StepCredit([len, function])
    assert credit.kinds == {1: "turn"}
    credit.begin(COMPLETION_IDS, TOOL_MASK)
    ordinary, wrapped = credit.wrap([len, function])
    assert ordinary is len
    assert call(wrapped) == [1.0, 10.0, 41.0]  # the totals, for TRL's logs
    result = credit.advantages(torch.tensor([5.0, 2.0]), 4, 3, "none", 1.0, lambda x: x, 0, torch.device("cpu"))
    # Mean of (0, 1, 10, 20, 21) is 10.4; twice the sums of what follows.
    expected = [[-19.8, -9.4, -9.4, -9.4], [-0.4, -0.4, 0, 0], [20.2, 10.6, 10.6, 0]]
    torch.testing.assert_close(result, 2 * torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_an_async_function_stays_one_for_the_host():
    from trl.trainer.utils import is_async_callable

    for name, function in FUNCTIONS.items():
        credit = StepCredit([function])
        assert is_async_callable(credit.wrap([function])[0]) == name.startswith("async"), name


def test_the_name_and_the_function_itself_are_kept():
    (wrapped,) = StepCredit([by_name]).wrap([by_name])
    assert wrapped.__name__ == "by_name" and wrapped is not by_name
    assert by_name(**CALL, num_turns=[1, 1, 1]) == [[0.0], [10.0], [20.0]]


def test_functions_that_are_not_marked():
    assert step_kind(len) is step_kind(functools.partial(offset, 1.0)) is step_kind("a/reward-model") is None
    assert not StepCredit([len, "a/reward-model"]).kinds


def test_tokens_count_those_of_tools_and_truncated_completions():
    @token_reward
    def f(completion_ids, num_turns, **_):
        assert num_turns == [2, 1, 2]
        return [[1.0] * len(ids) for ids in completion_ids]

    credit = StepCredit([f])
    credit.begin(COMPLETION_IDS, TOOL_MASK)
    assert call(*credit.wrap([f])) == [4.0, 2.0, 3.0]


def test_without_a_tool_mask_each_completion_is_one_turn():
    credit = StepCredit([with_kwargs])
    credit.begin(COMPLETION_IDS, None)
    assert call(*credit.wrap([with_kwargs])) == [0.0, 10.0, 20.0]


def test_none_has_no_total():
    function = turn_reward(lambda **_: [[1.0, 2.0], None, [3.0, 4.0]])
    credit = StepCredit([function])
    credit.begin(COMPLETION_IDS, TOOL_MASK)
    assert call(*credit.wrap([function])) == [3.0, None, 7.0]
    result = credit.advantages(torch.ones(1), 4, 3, "none", 1.0, lambda x: x, 0, torch.device("cpu"))
    assert result.tolist() == [[-2.0, -0.5, -0.5, -0.5], [0] * 4, [2.0, 1.5, 1.5, 0]]


def test_a_completion_without_a_turn_has_no_step():
    function = turn_reward(lambda num_turns, **_: [[1.0] * turns for turns in num_turns])
    credit = StepCredit([function])
    credit.begin([[9, 9], [9]], [[0, 0], [1]])
    assert call(*credit.wrap([function])) == [0.0, 1.0]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_wrong_length_names_the_function(is_async):
    def short(**_):
        return [[1.0], [1.0], [1.0, 2.0]]

    async def async_short(**_):
        return short()

    function = turn_reward(async_short if is_async else short)
    credit = StepCredit([function])
    credit.begin(COMPLETION_IDS, TOOL_MASK)
    with pytest.raises(ValueError, match="short' returned 1 numbers for completion 0, which has 2 turns"):
        call(*credit.wrap([function]))


def test_functions_are_normalised_apart_and_weighted():
    first = turn_reward(lambda num_turns, **_: [[1.0, 0.0], [0.0], [2.0, 5.0]])
    second = token_reward(lambda completion_ids, **_: [[100.0 * i] * len(ids) for i, ids in enumerate(completion_ids)])
    functions = [first, len, second]
    credit = StepCredit(functions)
    credit.begin(COMPLETION_IDS, TOOL_MASK)
    wrapped = credit.wrap(functions)
    call(wrapped[0]), call(wrapped[2])
    weights = torch.tensor([0.5, 7.0, -2.0])
    result = credit.advantages(weights, 6, 3, "group", 0.9, lambda x: x, 0, torch.device("cpu"))
    by_turn = loop_credit([[1.0, 0.0], [0.0], [2.0, 5.0]], TOOL_MASK, "turn", 3, 6, discount=0.9)
    by_token = loop_credit([[0.0] * 4, [100.0] * 2, [200.0] * 3], TOOL_MASK, "token", 3, 6, discount=0.9)
    torch.testing.assert_close(result, 0.5 * by_turn - 2 * by_token, rtol=1e-9, atol=1e-12)


def test_each_rollout_batch_starts_anew():
    credit = StepCredit([with_kwargs])
    (wrapped,) = credit.wrap([with_kwargs])
    for ids, mask, totals in (
        (COMPLETION_IDS, TOOL_MASK, [1.0, 10.0, 41.0]),
        (COMPLETION_IDS[:2], [[1, 1, 0, 0], [0, 1]], [0.0, 10.0]),
    ):
        credit.begin(ids, mask)
        assert call(wrapped) == totals


# ---- what `advantage_func` may return


MASK = torch.tensor([[1, 1, 0], [1, 0, 1]])


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_of_sequences_and_tokens_are_accepted(shape, dtype):
    advantages = torch.arange(1, 1 + math.prod(shape), dtype=dtype).view(shape)
    checked = check_advantages(advantages, MASK)
    assert checked.dtype == dtype
    assert torch.equal(checked, advantages if len(shape) == 1 else advantages * MASK)


@pytest.mark.parametrize("garbage", [NAN, math.inf, 1e30])
def test_advantages_off_trained_tokens_may_be_anything_and_become_0(garbage):
    # The host multiplies by the mask, and NaN * 0 is NaN.
    advantages = torch.ones(2, 3).masked_fill(MASK == 0, garbage)
    assert torch.equal(check_advantages(advantages, MASK), MASK.float())
    assert advantages[0, 2] == garbage or garbage != garbage  # the caller's own tensor is left as it is


@pytest.mark.parametrize("returned", [torch.ones(3), torch.ones(2, 1), torch.ones(1, 3), torch.ones(2, 3, 1)], ids=str)
def test_advantages_of_another_shape_are_refused(returned):
    with pytest.raises(ValueError, match=r"`advantage_func` must return a tensor of shape \(2,\) or \(2, 3\), got \("):
        check_advantages(returned, MASK)


@pytest.mark.parametrize(("returned", "name"), [([1.0, 2.0], "list"), (None, "NoneType"), (np.ones(2), "ndarray")])
def test_advantages_that_are_no_tensor_are_refused(returned, name):
    with pytest.raises(ValueError, match=f"got {name}"):
        check_advantages(returned, MASK)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_advantages_that_are_not_finite_are_refused(shape, value):
    advantages = torch.zeros(shape)
    advantages.view(-1)[0] = value
    with pytest.raises(ValueError, match="`advantage_func` returned an advantage that is not finite"):
        check_advantages(advantages, MASK)
