"""
Calls reward functions: what they return is checked, and how long they may take is bounded.

TRL takes what a reward function returns as it comes. An infinite reward silences its whole group, or, with
`scale_rewards="none"`, gives the others an advantage of 3e38; a text ends in an error of torch that names nobody; a
function that never returns holds the run, and its bill, for ever.
"""

import asyncio
import faulthandler
import functools
import inspect
import math
import numbers
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from torch import Tensor, nn


logger = get_logger(__name__)

# Seconds beyond its limit that a call is left which no exception ends, before the process is ended from outside of
# Python.
GRACE = 60.0

_LARGEST = torch.finfo(torch.float32).max


class RewardInterrupted(BaseException):
    """Raised inside a reward function whose time is up. No `Exception`: those a reward function may well swallow."""


def guard(function: Callable | nn.Module, name: str, seconds: float) -> Callable | nn.Module:
    """
    A reward function that returns finite numbers or `None` in time, or raises an error that names it.

    The call ends by an exception that is raised where the function is at that moment: in Python code, in a wait of the
    operating system, in a regular expression; for an async function, at its `await`. An extension that does not come
    back to Python, and an async function that blocks its event loop, no exception can end: [`GRACE`] seconds later the
    stacks of all threads are written to standard error and the process ends with code 1. So do a call off the main
    thread, and one during an alarm (`signal.alarm`) that was set outside or that the function sets for itself, which
    takes the place of this one.

    Args:
        function (`Callable` or `nn.Module`): as given to the trainer. A reward model is returned as it is.
        name (`str`): by which errors call it.
        seconds (`float`): that a call may take; infinity for no limit.

    Returns:
        `Callable` or `nn.Module`: to be called as `function` is; it returns a list of `float` and `None`.

    Raises:
        TimeoutError: by the returned function, if a call takes longer.
        ValueError: by the returned function, as [`check_rewards`] does.
    """
    if isinstance(function, nn.Module):
        return function
    message = (
        f"The reward function {name!r} took longer than {seconds:g} seconds for one rollout batch (`reward_timeout`). "
        "Bound what it waits for (network, subprocess, regular expression), or raise `reward_timeout`."
    )
    warned: list[str] = []

    def checked(rewards: Any) -> list[float | None]:
        rewards = check_rewards(name, rewards)
        missing = sum(reward is not None and math.isnan(reward) for reward in rewards)
        if missing and not warned:
            warned.append(name)
            logger.warning(
                f"The reward function {name!r} returned NaN for {missing} of {len(rewards)} completions. NaN counts "
                "as `None`: not scored by this function. Said once.",
                main_process_only=False,
            )
        return rewards

    if is_async(function):

        async def reward(**kwargs):
            with _last_resort(seconds):
                task = asyncio.ensure_future(function(**kwargs))
                await asyncio.wait([task], timeout=None if math.isinf(seconds) else seconds)
                if not task.done():
                    task.cancel()
                    raise TimeoutError(message)
            return checked(task.result())

    else:

        def reward(**kwargs):
            with _last_resort(seconds):
                rewards = _call_in_time(function, kwargs, seconds, message)
            return checked(rewards)

    return functools.update_wrapper(reward, function)


def check_rewards(name: str, rewards: Any) -> list[float | None]:
    """
    The rewards that a function returned, as TRL takes them.

    Args:
        name (`str`): of the function, for the message.
        rewards (`Any`): what it returned.

    Returns:
        `list[float | None]`: NaN among them stays. Their number is TRL's to check.

    Raises:
        ValueError: if it is no list, or holds something that is neither a number nor `None`, or a number that is not
            finite in float32.
    """
    if isinstance(rewards, (Tensor, np.ndarray)) and rewards.ndim == 1:
        rewards = rewards.tolist()  # at once: an element at a time is slow from a GPU
    if not isinstance(rewards, Iterable) or isinstance(rewards, (str, bytes, Mapping)):
        raise ValueError(
            f"The reward function {name!r} returned {_shown(rewards)}: it must return a list with one number for each "
            "completion, or `None` where it does not apply."
        )
    checked = []
    for index, reward in enumerate(rewards):
        if isinstance(reward, (Tensor, np.ndarray, np.generic)) and math.prod(reward.shape) == 1:
            reward = reward.item()
        if reward is not None and not isinstance(reward, numbers.Real):
            raise ValueError(
                f"The reward function {name!r} returned {_shown(reward)} for completion {index}: it must be a number, "
                "or `None` where the reward does not apply."
            )
        if reward is not None and abs(reward) > _LARGEST:  # false for NaN
            raise ValueError(
                f"The reward function {name!r} returned {_shown(reward)} for completion {index}: it must be a finite "
                "number in float32, or `None` where the reward does not apply. An infinite one would silence its "
                "whole group."
            )
        checked.append(None if reward is None else float(reward))
    return checked


def is_async(function: Callable) -> bool:
    """Whether a call has to be awaited. As TRL tells them apart: an object may have its `async` on `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _call_in_time(function: Callable, kwargs: dict[str, Any], seconds: float, message: str) -> Any:
    is_over = False

    def interrupt(signum, frame):
        nonlocal is_over
        is_over = True
        if frame.f_code is not _call_in_time.__code__:  # there the function has returned
            raise RewardInterrupted

    can_interrupt = (
        hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
        and not math.isinf(seconds)
        and signal.getitimer(signal.ITIMER_REAL)[0] == 0  # somebody's own alarm, of the whole job, say
    )
    if not can_interrupt:
        return function(**kwargs)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        # Again each second: a bare `except` swallows even this exception.
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
        rewards = function(**kwargs)
    except (Exception, RewardInterrupted) as error:
        if is_over:
            raise TimeoutError(message) from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if is_over:
        raise TimeoutError(message)
    return rewards


_guarded = 0


@contextmanager
def _last_resort(seconds: float):
    # A thread in C, which needs no interpreter. There is one for the process: of async functions that run together,
    # the first to start sets it and the last to end takes it back.
    global _guarded
    is_possible = sys.__stderr__ is not None and not math.isinf(seconds)
    if is_possible and _guarded == 0:
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)
    _guarded += 1
    try:
        yield
    finally:
        _guarded -= 1
        if is_possible and _guarded == 0:
            faulthandler.cancel_dump_traceback_later()
