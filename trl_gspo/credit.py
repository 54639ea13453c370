"""
Credit where it was earned: step rewards, and the per-token advantages made of them.

A step is a turn that the model wrote, or a single token. B sequences, T completion tokens.

Source: DeepSeekMath, section 4.1.3 (process supervision), https://huggingface.co/papers/2402.03300
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .objective import exact_dtype, turn_ids
from .reward_calls import is_async


_MARK = "_gspo_step"

# TRL's guard against a standard deviation of 0, for advantages of the same scale as its own.
_EPSILON = 1e-4

# What one function gave one completion: a number for each step, or `None` where it does not apply.
StepRewards = Sequence[float] | None


def turn_reward(function: Callable) -> Callable:
    """
    Marks a reward function that returns, for each completion, one float for each turn of the model, or `None`.

    A turn is a maximal run of trained tokens: what the model wrote between two answers of a tool or an environment.
    The keyword argument `num_turns` says how many each completion has. The function may be async; it is called as any
    reward function of TRL is.

    Example:

    ```python
    @turn_reward
    def right_calls(completions, num_turns, **kwargs):
        return [[1.0] * turns for turns in num_turns]
    ```
    """
    setattr(function, _MARK, "turn")
    return function


def token_reward(function: Callable) -> Callable:
    """
    Marks a reward function that returns, for each completion, one float for each token of it, or `None`.

    The tokens are those of `completion_ids`, the answers of tools and environments included.
    """
    setattr(function, _MARK, "token")
    return function


def step_kind(function: Any) -> str | None:
    """`"turn"` or `"token"` for a function that a decorator marked, or a `functools.partial` of one, else `None`."""
    while isinstance(function, functools.partial) and not hasattr(function, _MARK):
        function = function.func
    return getattr(function, _MARK, None)


def check_step_rewards(name: str, kind: str, rewards: Sequence[StepRewards], lengths: Sequence[int]) -> None:
    """
    Raises `ValueError` unless each completion has `None`, or one finite number for each step.

    Args:
        name (`str`): of the function, for the message.
        kind (`str`): `"turn"` or `"token"`.
        rewards (`Sequence`): what the function returned.
        lengths (`Sequence[int]`): steps of each completion.
    """
    if len(rewards) != len(lengths):
        raise ValueError(f"The {kind} reward {name!r} returned {len(rewards)} lists for {len(lengths)} completions.")
    counted = {
        "turn": "A turn is a maximal run of trained tokens, between two answers of a tool or an environment; their "
        "number is in the keyword argument `num_turns`.",
        "token": "Every token of `completion_ids` counts, those of tools and environments too.",
    }[kind]
    for index, (steps, length) in enumerate(zip(rewards, lengths, strict=True)):
        if steps is None:
            continue
        if not hasattr(steps, "__len__") or len(steps) != length:
            got = f"{len(steps)} numbers" if hasattr(steps, "__len__") else repr(steps)
            raise ValueError(
                f"The {kind} reward {name!r} returned {got} for completion {index}, which has {length} {kind}s. "
                f"{counted} Return None where the reward does not apply."
            )
        for step in steps:
            try:
                is_finite = math.isfinite(step)
            except TypeError:
                is_finite = False
            if not is_finite:
                raise ValueError(
                    f"The {kind} reward {name!r} returned {step!r} for a {kind} of completion {index}: it must be a "
                    "finite number."
                )


def place_steps(rewards: Sequence[StepRewards], kind: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """
    Puts each step reward at the token that ends its step.

    Args:
        rewards (`Sequence`): step rewards of each completion, of the lengths that [`check_step_rewards`] checked.
        kind (`str`): `"turn"` or `"token"`.
        ids (`Tensor`): `(B, T)`, the turn of each token, -1 on tokens that are not trained.

    Returns:
        `tuple[Tensor, Tensor]`: `(B, T)`, the rewards, 0 where no step ends; and `(B, T)`, bool, where one does.
    """
    device = ids.device
    is_end = torch.zeros(ids.shape, dtype=torch.bool)
    if kind == "token":
        for row, steps in enumerate(rewards):
            is_end[row, : 0 if steps is None else len(steps)] = True
    else:
        ids = ids.cpu()
        following = torch.nn.functional.pad(ids, (0, 1), value=-1)[:, 1:]
        is_end = (ids >= 0) & (following != ids)
        is_end &= torch.tensor([steps is not None for steps in rewards]).unsqueeze(1)
    placed = torch.zeros(ids.shape, dtype=torch.float64)
    # Row by row, in the order of the tokens: the order of the steps. Rounded to float32, in which TRL holds rewards:
    # 0.1 + 0.2 and 0.3 are the same one.
    flat = [float(step) for steps in rewards if steps is not None for step in steps]
    placed[is_end] = torch.tensor(flat, dtype=torch.float32).double()
    is_end = is_end.to(device)
    return placed.to(device, exact_dtype(is_end)), is_end


def normalize_steps(
    rewards: Tensor,
    is_end: Tensor,
    num_generations: int,
    scale_rewards: str = "group",
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    process_index: int = 0,
) -> Tensor:
    """
    Normalises all step rewards of a group together.

        r~ = (r - mean(R)) / (std(R) + 1e-4),   R all step rewards of the group

    Where all of them are equal, `r~` is exactly 0.

    Source: DeepSeekMath, section 4.1.3.

    Args:
        rewards (`Tensor`): `(B, T)`, at the tokens that end a step.
        is_end (`Tensor`): `(B, T)`, bool, which tokens do.
        num_generations (`int`): completions of a group; the groups are consecutive over the gathered rows.
        scale_rewards (`str`, *optional*, defaults to `"group"`): as TRL's: the standard deviation of the `"group"`, of
            the whole `"batch"`, or `"none"` at all.
        gather (`Callable`, *optional*): concatenates a tensor over the ranks; a group may be spread over several.
        process_index (`int`, *optional*, defaults to 0): which of the gathered rows are this rank's.

    Returns:
        `Tensor`: `(B, T)`, 0 where no step ends.
    """
    largest, smallest = rewards.masked_fill(~is_end, -math.inf), rewards.masked_fill(~is_end, math.inf)
    local = torch.stack(
        [is_end.sum(-1).to(rewards.dtype), rewards.sum(-1), largest.amax(-1), smallest.amin(-1)], dim=1
    )
    rows = len(rewards)
    mine = slice(process_index * rows, (process_index + 1) * rows)
    count, total, high, low = gather(local).view(-1, num_generations, 4).unbind(-1)
    mean = (total.sum(1) / count.sum(1).clamp(min=1)).repeat_interleave(num_generations)
    is_flat = (high.amax(1) <= low.amin(1)).repeat_interleave(num_generations)
    centred = (rewards - mean[mine].unsqueeze(1)).masked_fill(~is_end | is_flat[mine].unsqueeze(1), 0.0)
    if scale_rewards == "none":
        return centred
    # A second pass over the ranks, because the variance from sums of squares would cancel.
    if scale_rewards == "batch":
        overall = (total.sum() / count.sum().clamp(min=1)).expand_as(mean)
        deviation = (rewards - overall[mine].unsqueeze(1)).masked_fill(~is_end, 0.0).square().sum(-1)
        variance = (gather(deviation).sum() / (count.sum() - 1).clamp(min=1)).expand_as(mean)
    else:
        squares = gather(centred.square().sum(-1)).view(-1, num_generations)
        variance = (squares.sum(1) / (count.sum(1) - 1).clamp(min=1)).repeat_interleave(num_generations)
    return centred / (variance.sqrt() + _EPSILON)[mine].unsqueeze(1)


def credit_to_tokens(normalized: Tensor, is_end: Tensor, discount: float = 1.0) -> Tensor:
    """
    Credits each token with the steps that end at or after it.

        A_t = sum_j discount^(j - k(t)) r~_j  over the steps j that end at or after t,   k(t) the first of them

    Source: DeepSeekMath, section 4.1.3, which has `discount` 1.

    Args:
        normalized (`Tensor`): `(B, T)`, as [`normalize_steps`] returns them.
        is_end (`Tensor`): `(B, T)`, bool, which tokens end a step.
        discount (`float`, *optional*, defaults to 1): for each step between a token and a reward, in (0, 1].

    Returns:
        `Tensor`: `(B, T)`, in the type of `normalized`.
    """
    if discount == 1.0:
        return normalized.flip(-1).cumsum(-1).flip(-1)
    credit = torch.zeros_like(normalized)
    running = normalized.new_zeros(len(normalized))
    for t in range(normalized.size(1) - 1, -1, -1):
        running = torch.where(is_end[:, t], normalized[:, t] + discount * running, running)
        credit[:, t] = running
    return credit


def check_advantages(advantages: Any, mask: Tensor) -> Tensor:
    """
    Raises `ValueError` unless `advantages` is a tensor of shape `(B,)` or `(B, T)`, finite on trained tokens.

    Returns them with 0 on the tokens that `mask`, `(B, T)`, excludes: TRL multiplies by the mask, and NaN * 0 is NaN.
    """
    shapes = (tuple(mask.shape[:1]), tuple(mask.shape))
    if not isinstance(advantages, Tensor) or tuple(advantages.shape) not in shapes:
        got = tuple(advantages.shape) if isinstance(advantages, Tensor) else type(advantages).__name__
        raise ValueError(f"`advantage_func` must return a tensor of shape {shapes[0]} or {shapes[1]}, got {got}.")
    if advantages.dim() == 2:
        advantages = advantages.masked_fill(~mask.bool(), 0)
    if not torch.isfinite(advantages).all():
        raise ValueError("`advantage_func` returned an advantage that is not finite.")
    return advantages


class StepCredit:
    """
    The step rewards of one rollout batch: collected while TRL scores it, turned into advantages when it has.

    Args:
        functions (`list`): the trainer's reward functions, marked and others.
    """

    def __init__(self, functions: list):
        self.kinds = {index: kind for index, function in enumerate(functions) if (kind := step_kind(function))}
        self._rewards: dict[int, list[StepRewards]] = {}
        self._lengths: dict[str, list[int]] = {}
        self._turn_ids: Tensor | None = None

    def begin(self, completion_ids: list[list[int]], tool_mask: list[list[int]] | None) -> None:
        """Counts the steps of a rollout batch: `tool_mask` is 0 on tokens of tools, and all the model's if `None`."""
        masks = [[1] * len(ids) for ids in completion_ids] if tool_mask is None else tool_mask
        trained = torch.zeros(len(masks), max(map(len, masks)), dtype=torch.bool)
        for row, mask in enumerate(masks):
            trained[row, : len(mask)] = torch.tensor(mask, dtype=torch.bool)
        self._turn_ids = turn_ids(trained)
        self._lengths = {
            "turn": (self._turn_ids.amax(-1) + 1).tolist(),
            "token": [len(ids) for ids in completion_ids],
        }
        self._rewards = {}

    def wrap(self, functions: list) -> list:
        """`functions`, of which the marked ones return the totals that TRL logs, and leave their steps here."""
        return [self._wrap(index, f) if index in self.kinds else f for index, f in enumerate(functions)]

    def _wrap(self, index: int, function: Callable) -> Callable:
        parameters = inspect.signature(function).parameters.values()
        takes_turns = any(p.name == "num_turns" or p.kind is p.VAR_KEYWORD for p in parameters)
        name, kind = getattr(function, "__name__", repr(function)), self.kinds[index]

        def arguments(kwargs):
            return kwargs | ({"num_turns": self._lengths["turn"]} if takes_turns else {})

        def record(rewards):
            rewards = list(rewards)
            check_step_rewards(name, kind, rewards, self._lengths[kind])
            self._rewards[index] = rewards
            return [None if steps is None else float(sum(steps)) for steps in rewards]

        if is_async(function):

            async def reward(**kwargs):
                return record(await function(**arguments(kwargs)))

        else:

            def reward(**kwargs):
                return record(function(**arguments(kwargs)))

        return functools.update_wrapper(reward, function)

    def advantages(
        self,
        weights: Tensor,
        width: int,
        num_generations: int,
        scale_rewards: str,
        discount: float,
        gather: Callable[[Tensor], Tensor],
        process_index: int,
        device: torch.device,
    ) -> Tensor:
        """
        Sum over the marked functions of their weighted per-token credit, `(B, width)`.

        Each function is normalised by itself, so that its weight says what it counts against the others. Arguments as
        in [`normalize_steps`] and [`credit_to_tokens`]; `weights` has one value for each of all functions.
        """
        ids = torch.nn.functional.pad(self._turn_ids, (0, width - self._turn_ids.size(1)), value=-1).to(device)
        credit = torch.zeros(ids.shape, dtype=exact_dtype(ids), device=device)
        for index, kind in self.kinds.items():
            rewards, is_end = place_steps(self._rewards[index], kind, ids)
            normalized = normalize_steps(rewards, is_end, num_generations, scale_rewards, gather, process_index)
            credit += weights[index].item() * credit_to_tokens(normalized, is_end, discount)
        return credit
