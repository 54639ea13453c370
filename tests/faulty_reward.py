"""Rewards that are `varied_reward`'s for two rollout batches of four steps, and then break the run."""

import gc
import math

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
