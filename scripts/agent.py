"""
Credit per turn against one reward at the end, on an agent of several turns that trains on this machine's CPU.

    python scripts/agent.py compare
    python scripts/agent.py prepare --seed 0
    python scripts/agent.py train --credit turn --seed 0

An episode has eight turns. In each the environment makes a request, `b731=`, and the agent answers with one of four
skills, `137`. Which skill a letter wants, only the reward tells. `outcome` gives the share of right answers as one
number for the episode, `turn` one number for each turn: the same information, and only the credit differs.
`compare` trains each credit on the same seeds, each seed from a base model of its own, and writes `compare.md` and
`compare.png`; it takes over the runs that are already in the output folder.

Of TRL's ways to several turns this takes `rollout_func`: its contract is four lists, where `environment_factory`,
experimental too, needs a chat template, a parser of tool calls and a prefill anew at each turn, and `tools` keep no
state. For an agent of your own: write `Environment.step`, and let `play` sample from your engine.
"""

import argparse
import json
import math
import random
import statistics
import string
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from plot import load_logs
from tiny import make_model, make_tokenizer, pretrain
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

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
# How often a base model meets a kind of request with one skill or another, in an order that its seed draws.
HABIT = (0.4, 0.3, 0.2, 0.1)
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
        # All answers are of one length, and so are all replies: nothing needs padding.
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


class Credit(NamedTuple):
    label: str
    reward: Callable
    level: str
    discount: float = 1.0


CREDITS = {
    "outcome": Credit("outcome, one ratio a sequence", share_right, "sequence"),
    # Between the two, to tell what the credit does from what the ratio does.
    "outcome_by_turn": Credit("outcome, one ratio a turn", share_right, "turn"),
    "turn": Credit("turn reward, one ratio a turn", right_turns, "turn"),
    # No turn bears on a later one here, so a later turn's reward is noise to it. Rarely so in an agent's work.
    "turn_alone": Credit("turn reward, discount 0.01", right_turns, "turn", 0.01),
}


def first_requests(seed: int) -> tuple[list[str], list[str]]:
    """First requests of the episodes to test on and of those to train on, none of them in both."""
    generator = random.Random(seed)
    prompts = list(dict.fromkeys(make_request(generator.choice(list(WANTED)), generator) for _ in range(8192)))
    return prompts[:TEST_ROWS], prompts[TEST_ROWS:]


def prepare(output: Path, seed: int, steps: int = PRETRAIN_STEPS) -> Path:
    """Pretrains a Qwen3 to meet requests with all skills, by habits that `seed` draws, and returns its folder."""
    folder = output / "base"
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(string.digits + "=" + "".join(WANTED))
    model = make_model(tokenizer, hidden_size=64)
    pretrain(model, habitual_episodes(tokenizer, first_requests(seed)[1], random.Random(seed)), steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def habitual_episodes(tokenizer, prompts: list[str], generator: random.Random) -> Iterator[tuple]:
    """Batches for `pretrain`, without end: whole episodes, each request met by habit."""
    is_answer = torch.tensor(([False] * (DIGITS + 2) + [True] * DIGITS) * TURNS)
    habits = {kind: generator.sample(list(SKILLS.values()), k=len(SKILLS)) for kind in WANTED}

    def answer(request):
        (skill,) = generator.choices(habits[request[0]], weights=HABIT)
        return skill(request[1:-1])

    while True:
        texts = [
            "".join(request + answer(request) for request in Environment(prompt).requests)
            for prompt in generator.sample(prompts, PRETRAIN_BATCH)
        ]
        input_ids = tokenizer(texts, return_tensors="pt")["input_ids"]
        yield input_ids, input_ids.masked_fill(~is_answer, -100)


def train(credit: str, seed: int, output: Path, **options) -> dict:
    """Trains one run into `output / credit`, from the base model in `output`, which is made if it is not there."""
    started, folder = time.time(), output / credit
    base = output / "base"
    if not (base / "config.json").is_file():
        prepare(output, seed)
    test, prompts = first_requests(seed)
    args = dict(
        output_dir=str(folder),
        importance_sampling_level=CREDITS[credit].level,
        step_discount=CREDITS[credit].discount,
        seed=seed,
        # 8 episodes of each of 8 first requests to an optimizer step, four steps from each rollout batch.
        num_generations=8,
        per_device_train_batch_size=64,
        steps_per_generation=LOGGING_STEPS,
        max_completion_length=TURNS * (2 * DIGITS + 2),
        # A hundred times the paper's: those are for completions of thousands of tokens (see configs/tiny.yaml).
        epsilon=0.03,
        epsilon_high=0.04,
        # Of 5e-4, 1e-3 and 2e-3, and of the clip ranges 0.03 and 0.1, what served `outcome` best on seed 0. No other
        # credit had a part in the choice.
        learning_rate=1e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=8,
        max_steps=160,
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
        reward_funcs=CREDITS[credit].reward,
        args=GSPOConfig(**args | options),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        rollout_func=rollout,
    )
    trainer.remove_callback(PrinterCallback)
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


# ---- all runs


def prepare_missing(seed: int, output: Path) -> None:
    torch.set_num_threads(1)
    if not (folder_of(output, seed) / "base" / "config.json").is_file():
        prepare(folder_of(output, seed), seed)


def train_missing(seed: int, credit: str, output: Path) -> None:
    torch.set_num_threads(1)
    if not (folder_of(output, seed) / credit / "summary.json").is_file():
        describe(train(credit, seed, folder_of(output, seed)))


def folder_of(output: Path, seed: int) -> Path:
    return output / f"seed_{seed}"


def describe(summary: dict) -> None:
    print("seed {seed}  {credit:16} right {before:.3f} -> {after:.3f}  {seconds:.0f} s".format(**summary), flush=True)


def smoothed_rewards(logs: list[dict]) -> list[float]:
    """Running mean of the logged reward over the last `SMOOTHED` rollout batches."""
    rewards = [entry["reward"] for entry in logs]
    return [statistics.mean(rewards[max(end - SMOOTHED, 0) : end]) for end in range(1, len(rewards) + 1)]


def steps_to(target: float, logs: list[dict]) -> int | None:
    """Optimizer steps until the smoothed reward is `target`, `None` if it never is."""
    reached = (entry["step"] for entry, reward in zip(logs, smoothed_rewards(logs), strict=True) if reward >= target)
    return next(reached, None)


def compare(output: Path, seeds: int, jobs: int) -> None:
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        list(pool.map(prepare_missing, range(seeds), repeat(output)))
        list(pool.map(train_missing, *zip(*product(range(seeds), CREDITS), strict=True), repeat(output)))
    logs = {credit: [training_logs(folder_of(output, seed) / credit) for seed in range(seeds)] for credit in CREDITS}
    summaries = {
        credit: [json.loads((folder_of(output, seed) / credit / "summary.json").read_text()) for seed in range(seeds)]
        for credit in CREDITS
    }
    targets = [smoothed_rewards(run)[-1] for run in logs["outcome"]]
    steps = {credit: list(map(steps_to, targets, runs)) for credit, runs in logs.items()}
    text = table(logs, summaries, steps)
    (output / "compare.md").write_text(text)
    draw(logs, steps, output / "compare.png")
    print(text)


def table(logs: dict, summaries: dict, steps: dict) -> str:
    """The comparison in Markdown."""

    def spread(values):
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.3f} ± {deviation:.3f}"

    budget, seeds = logs["outcome"][0][-1]["step"], len(logs["outcome"])
    lines = [
        "| credit | final reward | right on held-out episodes | steps to outcome's final reward: median | by seed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for credit, runs in logs.items():
        median = statistics.median_high(math.inf if count is None else count for count in steps[credit])
        cells = [
            CREDITS[credit].label,
            spread([smoothed_rewards(run)[-1] for run in runs]),
            spread([summary["after"] for summary in summaries[credit]]),
            f"over {budget}" if median == math.inf else f"{median}",
            ", ".join("-" if count is None else f"{count}" for count in steps[credit]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    before = spread([summary["before"] for summary in summaries["outcome"]])
    notes = (
        f"{seeds} seeds, {budget} optimizer steps each; mean and standard deviation over the seeds. Right on held-out "
        f"episodes before training: {before}. `-`: not within {budget} steps."
    )
    return "\n".join([*lines, "", notes, ""])


def training_logs(folder: Path) -> list[dict]:
    """The logs of a run that hold a gradient, and so not the summary at its end."""
    return [entry for entry in load_logs(folder) if "grad_norm" in entry]


def draw(logs: dict, steps: dict, path: Path) -> None:
    """Writes one PNG: the reward over the steps, and the steps to the outcome-only run's final reward by seed."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    curves, counts = figure.subplots(1, 2, width_ratios=(5, 4))
    for index, (credit, runs) in enumerate(logs.items()):
        color = f"C{index}"
        at = [entry["step"] for entry in runs[0]]
        rewards = torch.tensor([smoothed_rewards(run) for run in runs])
        mean, deviation = rewards.mean(0), rewards.std(0, correction=min(len(runs) - 1, 1))
        curves.plot(at, mean, color=color, linewidth=2, label=CREDITS[credit].label)
        curves.fill_between(at, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
    curves.set_xlabel("optimizer step")
    curves.set_ylabel("reward: share of right turns")
    curves.set_title(f"mean and standard deviation over {len(runs)} seeds", fontsize="small")
    curves.legend()
    budget = logs["outcome"][0][-1]["step"]
    for by_seed in zip(*steps.values(), strict=True):
        heights = [1.08 * budget if count is None else count for count in by_seed]
        counts.plot(heights, color="0.6", linewidth=1, zorder=1)
        for index, count in enumerate(by_seed):
            counts.plot(index, heights[index], "x" if count is None else "o", color=f"C{index}")
    counts.set_xticks(range(len(steps)), [textwrap.fill(CREDITS[credit].label, 12) for credit in steps])
    counts.tick_params(axis="x", labelsize="small")
    counts.set_xlim(-0.4, len(steps) - 0.6)
    counts.set_ylim(bottom=0)
    counts.set_title("steps to outcome's final reward, a line a seed; x: not reached", fontsize="small")
    for axes in (curves, counts):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "train", "compare"))
    parser.add_argument("--credit", choices=list(CREDITS), default="turn", help="of the run to train")
    parser.add_argument("--seed", type=int, default=0, help="of the run to prepare or train")
    parser.add_argument("--seeds", type=int, default=5, help="to compare")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time in the comparison")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    if args.step == "compare":
        compare(args.output, args.seeds, args.jobs)
    elif args.step == "train":
        describe(train(args.credit, args.seed, folder_of(args.output, args.seed)))
    else:
        print(prepare(folder_of(args.output, args.seed), args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
