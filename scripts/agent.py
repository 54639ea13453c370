"""
Credit per turn against one reward at the end, on an agent of several turns that trains on this machine's CPU.

    python scripts/agent.py compare
    python scripts/agent.py train --credit turn --seed 0
    python scripts/agent.py train --credit outcome --seed 0

An episode has four turns. In each the environment asks for four digits to be sorted, `7314=`, and the model answers.
The reward is the share of right answers. `outcome` learns it as one number for the episode, `turn` as one number for
each turn: the same information, and only the credit differs. `compare` trains every kind of credit on the same seeds,
each seed from one base model of its own, and writes `compare.md` and `compare.png` to `outputs/agent`.

Of TRL's ways to several turns this takes `rollout_func`, whose contract is four lists; experimental in TRL as
`environment_factory` is, it needs no chat template, no parser of tool calls and no prefill anew at each turn. To make an
agent of your own of it: write its `step`, and let `play` sample from your engine.
"""

import argparse
import json
import os
import random
import statistics
import string
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from plot import load_logs, plt
from tiny import make_model, make_tokenizer, pretrain
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_gspo import GSPOConfig, GSPOTrainer, turn_reward


OUTPUT = Path("outputs/agent")
TURNS, DIGITS = 8, 3
TEST_ROWS = 1024
PRETRAIN_STEPS, PRETRAIN_BATCH = 600, 32
# Optimizer steps between two logs, as many as a rollout batch lasts: one reward for each.
LOGGING_STEPS = 4
# Rollout batches in the running mean of the reward, by which the end of a run and the way to it are measured.
SMOOTHED = 3


# ---- the environment, its rewards, and the rollout


SKILLS = {
    "copy": lambda digits: digits,
    "reverse": lambda digits: digits[::-1],
    "ascending": lambda digits: "".join(sorted(digits)),
    "descending": lambda digits: "".join(sorted(digits, reverse=True)),
}
# The skill that each kind of request wants. Nobody tells the agent but the reward.
WANTED = dict(zip("abcdefgh", [*SKILLS, *SKILLS], strict=True))


class Environment:
    """
    Makes one request after the other, a letter and some digits, and judges the answers.

    All requests follow from the first, so that every episode of a group, which shares a prompt, meets the same ones.

    Args:
        prompt (`str`): the first request, such as `b731=`.
    """

    def __init__(self, prompt: str):
        generator = random.Random(prompt)
        kinds = [kind for kind in WANTED if kind != prompt[0]]
        generator.shuffle(kinds)
        self.requests = [prompt, *(make_request(kind, generator) for kind in kinds)]
        self.rewards: list[float] = []

    def step(self, answer: str) -> str | None:
        """Judges the answer to the last request, and returns the next one, or `None` at the end of the episode."""
        request = self.requests[len(self.rewards)]
        is_right = answer == SKILLS[WANTED[request[0]]](request[1:-1])
        # The turns of an episode add up to the share of right ones: the reward of either credit.
        self.rewards.append(is_right / TURNS)
        return self.requests[len(self.rewards)] if len(self.rewards) < TURNS else None


def make_request(kind: str, generator: random.Random) -> str:
    return f"{kind}{''.join(generator.choices(string.digits, k=DIGITS))}="


def share_right(turn_rewards, **_) -> list[float]:
    """One number for each episode."""
    return [sum(rewards) for rewards in turn_rewards]


@turn_reward
def right_turns(turn_rewards, **_) -> list[list[float]]:
    """One number for each turn."""
    return turn_rewards


@torch.no_grad()
def play(model, tokenizer, prompts: list[str], temperature: float = 1.0) -> dict[str, list]:
    """
    Plays one episode for each prompt, all of them together.

    Returns:
        `dict`: what TRL takes from a `rollout_func`, one entry for each prompt: `prompt_ids`; `completion_ids`, the
        model's answers and the environment's replies in turn; `logprobs` of them; `env_mask`, 1 on tokens of the
        model. What else is in it reaches the reward functions by its name: `turn_rewards`.
    """
    environments = [Environment(prompt) for prompt in prompts]
    encode = lambda texts: tokenizer(texts, return_tensors="pt")["input_ids"].to(model.device)  # noqa: E731
    prompt_ids = unseen = encode(prompts)
    cache, tokens, logprobs, env_mask = None, [], [], []
    for _ in range(TURNS):
        answers = []
        # An answer is as long as the question is, so no episode waits for another and nothing needs padding.
        for _ in range(DIGITS):
            output = model(input_ids=unseen, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logps = (output.logits[:, -1] / temperature).log_softmax(-1)
            unseen = torch.multinomial(logps.exp(), 1)
            answers.append(unseen)
            logprobs.append(logps.gather(1, unseen))
        answers = torch.cat(answers, 1)
        texts = tokenizer.batch_decode(answers)
        replies = [environment.step(text) for environment, text in zip(environments, texts, strict=True)]
        # The environment ends an episode with the end of text, without which TRL takes it for cut off.
        replies = encode([tokenizer.eos_token if reply is None else reply for reply in replies])
        unseen = torch.cat([unseen, replies], 1)
        tokens += [answers, replies]
        logprobs.append(torch.zeros(replies.shape, device=model.device))
        env_mask += [torch.ones_like(answers), torch.zeros_like(replies)]
    return {
        "prompt_ids": prompt_ids.tolist(),
        "completion_ids": torch.cat(tokens, 1).tolist(),
        "logprobs": torch.cat(logprobs, 1).tolist(),
        "env_mask": torch.cat(env_mask, 1).tolist(),
        "turn_rewards": [environment.rewards for environment in environments],
    }


def rollout(prompts: list[str], trainer: GSPOTrainer) -> dict[str, list]:
    # TRL repeats each prompt `num_generations` times before it calls this.
    model = trainer.accelerator.unwrap_model(trainer.model)
    return play(model, trainer.processing_class, prompts, trainer.temperature)


# ---- one run


class Arm(NamedTuple):
    label: str
    reward: str
    level: str


ARMS = {
    "outcome": Arm("outcome, ratio of the sequence", "share_right", "sequence"),
    "outcome_by_turn": Arm("outcome, ratio of each turn", "share_right", "turn"),
    "turn": Arm("turn credit, ratio of each turn", "right_turns", "turn"),
}


def first_requests(seed: int) -> tuple[list[str], list[str]]:
    """First requests of the episodes to test on and of those to train on, none of them in both."""
    generator = random.Random(seed)
    prompts = list(dict.fromkeys(make_request(generator.choice(list(WANTED)), generator) for _ in range(8192)))
    return prompts[:TEST_ROWS], prompts[TEST_ROWS:]


def prepare(output: Path, seed: int, steps: int = PRETRAIN_STEPS) -> Path:
    """Pretrains a Qwen3 to meet every request with a skill at random, and returns its folder."""
    folder = output / "base"
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(string.digits + "=" + "".join(WANTED))
    model = make_model(tokenizer, hidden_size=64)
    pretrain(model, episodes_at_random(tokenizer, first_requests(seed)[1], random.Random(seed)), steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def episodes_at_random(tokenizer, prompts: list[str], generator: random.Random) -> Iterator[tuple]:
    """Batches for `pretrain`, without end: whole episodes, each request met with a skill at random."""
    is_answer = torch.tensor(([False] * (DIGITS + 2) + [True] * DIGITS) * TURNS)
    skills = list(SKILLS.values())
    while True:
        texts = [
            "".join(request + generator.choice(skills)(request[1:-1]) for request in Environment(prompt).requests)
            for prompt in generator.sample(prompts, PRETRAIN_BATCH)
        ]
        input_ids = tokenizer(texts, return_tensors="pt")["input_ids"]
        yield input_ids, input_ids.masked_fill(~is_answer, -100)


def train(credit: str, seed: int, output: Path, **options) -> dict:
    """Trains one run into `output / credit`, from the base model in `output`, which is made if it is not there."""
    started, arm, folder = time.time(), ARMS[credit], output / credit
    base = output / "base"
    if not (base / "config.json").is_file():
        prepare(output, seed)
    test, prompts = first_requests(seed)
    args = dict(
        output_dir=str(folder),
        importance_sampling_level=arm.level,
        seed=seed,
        # 8 episodes of each of 16 first questions to an optimizer step, four steps from each rollout batch.
        num_generations=8,
        per_device_train_batch_size=128,
        steps_per_generation=LOGGING_STEPS,
        max_completion_length=TURNS * (2 * DIGITS + 2),
        # A hundred times the paper's: those are for completions of thousands of tokens (see configs/tiny.yaml).
        epsilon=0.03,
        epsilon_high=0.04,
        learning_rate=2e-4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=8,
        max_steps=120,
        logging_steps=LOGGING_STEPS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = GSPOTrainer(
        model=str(base),
        reward_funcs=globals()[arm.reward],
        args=GSPOConfig(**args | options),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        rollout_func=rollout,
    )
    trainer.train()
    trainer.save_model(str(folder))
    trainer.save_state()
    summary = {"credit": credit, "seed": seed, "before": success(base, test), "after": success(folder, test)}
    summary["seconds"] = round(time.time() - started, 1)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def success(folder: Path, prompts: list[str]) -> float:
    """Share of right answers in one episode for each prompt, at temperature 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return statistics.mean(share_right(**play(model, AutoTokenizer.from_pretrained(folder), prompts)))
