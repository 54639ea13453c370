"""Rewards that are `varied_reward`'s for two rollout batches of four steps, and then break the run."""

import asyncio
import gc
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import Qwen3ForCausalLM

from tests.varied_reward import share_of_digits


def nan(completions, trainer_state, **kwargs):
    rewards = share_of_digits(completions)
    return rewards if trainer_state.global_step < 8 else [math.nan] * len(rewards)


def exploding(completions, trainer_state, **kwargs):
    # By 1e10 in each rollout batch: in the fourth the squares exceed float32, and its 3e38 in the fifth.
    return [10.0 ** (2.5 * trainer_state.global_step) * reward for reward in share_of_digits(completions)]


def raising(completions, trainer_state, **kwargs):
    if trainer_state.global_step < 8:
        return share_of_digits(completions)
    return [1 / int(text == text + text) for text in completions]


def too_few(completions, trainer_state, **kwargs):
    return share_of_digits(completions)[: 99 if trainer_state.global_step < 8 else 1]


def nan_weight(completions, trainer_state, **kwargs):
    """A good reward, and a weight overwritten behind the Trainer's back, as faulty memory would."""
    if trainer_state.global_step >= 8:
        (model,) = [thing for thing in gc.get_objects() if type(thing) is Qwen3ForCausalLM]
        with torch.no_grad():
            model.lm_head.weight[0, 0] = math.nan
    return share_of_digits(completions)


# Faults at the first call.


def infinite(completions, **kwargs):
    return [0.0] * (len(completions) - 1) + [math.inf]


def nothing(completions, **kwargs):
    return [None] * len(completions)


def half_nan(completions, **kwargs):
    return [math.nan if row % 2 else reward for row, reward in enumerate(share_of_digits(completions))]


def short(completions, **kwargs):
    return share_of_digits(completions)[1:]


def a_number(completions, **kwargs):
    return 1.0


def words(completions, **kwargs):
    return ["good"] * len(completions)


def dividing_by_zero(completions, **kwargs):
    return [1 / len(text * 0) for text in completions]


def waiting(completions, **kwargs):
    time.sleep(600)


def waiting_and_swallowing(completions, **kwargs):
    """As code around a network does: whatever goes wrong with one completion is worth 0."""
    rewards = []
    for _ in completions:
        try:
            time.sleep(600)
        except Exception:
            rewards.append(0.0)
    return rewards


def backtracking(completions, **kwargs):
    """A regular expression whose time doubles with each character, and which holds the interpreter meanwhile."""
    return [float(bool(re.match(r"(a+)+$", "a" * 60 + "b"))) for _ in completions]


async def waiting_async(completions, **kwargs):
    await asyncio.sleep(600)


def waiting_in_threads(completions, **kwargs):
    """As those do that ask a judge for all completions at once."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda _: time.sleep(600), completions))


def waiting_on_rank_1(completions, **kwargs):
    if os.environ["RANK"] == "1":
        time.sleep(600)
    return share_of_digits(completions)
