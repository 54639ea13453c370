"""
GSPO against GRPO: same models, data, budget and seeds, the claims of the paper one by one, and a clip-range guide.

    python scripts/compare.py all --docs docs/evidence.md
    python scripts/compare.py all --settings dense moe --methods gspo grpo --seeds 5
    python scripts/compare.py all --settings dense --seeds 1 --steps 8 --output outputs/miniature
    python scripts/compare.py report --docs docs/evidence.md
    python scripts/compare.py all --scale large --config configs/gsm8k_0.5b.yaml

`all` pretrains the base models, chooses learning rates and GSPO's clip range on a seed that is not evaluated, trains
each setting x method x seed, and writes `compare.md`, `compare.png` and `results.json`; `--docs` puts tables, verdicts
and figure into that page, between its markers. Runs in the output folder that were made with the same options are
taken over, so that a command that was cut off goes on. `report` writes from finished runs alone. A run is one process
with one thread; two at a time unless `--jobs` says otherwise.

250 runs. CPU seconds of one: sorting 9, stale 9 and 18, about 50 tokens 18, about 200 tokens 55, the guide's 6, 12 and
32; 12, 12 and 45 for the base models of each of six seeds. Most of an hour for two processes.

`--scale large` takes model, task and budget of a configuration of scripts/train.py, and a GPU. Nothing is tuned there:
the learning rate is the configuration's, clip ranges are the papers'. It has never been run.

Exit codes: 0 done; 2 bad input, named in one line.
"""

import argparse
import json
import logging
import random
import string
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import fields
from itertools import islice, product, repeat
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import train as train_script
import transformers
import yaml
from datasets import Dataset
from demo import corrupted_answers, split
from evidence import BLOCKS, curve, markers, measures, values_of, write
from pages import has_markers, machine
from plot import load_logs
from tiny import make_model, make_tokenizer, pretrain, sorting_rows
from torch import Tensor
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from trl_gspo import GSPOConfig, GSPOTrainer, token_reward
from trl_gspo.checkpoints import write_json
from trl_gspo.diagnostics import RatioStatistics
from trl_gspo.evaluation import generate, score
from trl_gspo.health import non_finite_weight
from trl_gspo.routing import RoutingRecorder, changed_slots, find_routers
from trl_gspo.tasks import load_task


OUTPUT = Path("outputs/compare")
# Base model and prompts of the runs that choose; no other run has it.
TUNING_SEED = 1000
# A completion of the evaluation is as good a sample from one prompt as from another.
TEST_COMPLETIONS = 1024
COMPLETIONS, GROUP = 64, 16  # of an optimizer step, of a prompt
MINIBATCHES = 4


# ---- the tasks: five digits to sort, and a computation to write out


SORT_ALPHABET, COUNT_ALPHABET = string.digits + "=", string.digits + "=;"
SORT_ROWS = {"test": 1024, "train": 4096}
LINES = range(5, 51)  # of all written-out computations, in pretraining
# A slip changes one digit of a line, and the lines after it go on from there.
SLIPS = 0.03


def next_line(line: str) -> str:
    """The line after `line`: `2347` is 23 to go, total 4, add 7, and is followed by `2217`."""
    count, total, step = int(line[:2]), int(line[2]), int(line[3])
    return f"{count - 1:02d}{(total + step) % 10}{step}"


def write_out(prompt: str, generator: random.Random | None = None, slips: float = 0.0) -> str:
    """
    The lines that follow from a prompt such as `2347=`, down to count 00, with `;` between them.

    Args:
        prompt (`str`): the first line, and `=`.
        generator (`random.Random`, *optional*): of the slips.
        slips (`float`, *optional*, defaults to 0): chance of a slip, for each line.
    """
    line, lines = prompt[:-1], []
    while line[:2] != "00" and len(lines) < LINES[-1] + 10:
        line = next_line(line)
        if generator is not None and generator.random() < slips:
            # Not the tens of the count: a run of twice the lines teaches nothing and costs as much as two.
            place = generator.randrange(1, 4)
            line = line[:place] + generator.choice(string.digits) + line[place + 1 :]
        lines.append(line)
    return ";".join(lines)


def counting_rows(seed: int, lines: range = LINES) -> dict[str, list[dict[str, str]]]:
    """Rows to test on, a quarter of the prompts of each length, and rows to train on."""
    prompts = [f"{count:02d}{digits:02d}=" for count in LINES for digits in range(100)]
    random.Random(seed).shuffle(prompts)
    rows = [{"prompt": prompt, "solution": write_out(prompt).rsplit(";")[-1]} for prompt in prompts]
    test, train = split(rows, len(rows) // 4)
    return {
        name: [row for row in part if int(row["prompt"][:2]) in lines]
        for name, part in (("test", test), ("train", train))
    }


def digits_rows(seed: int) -> dict[str, list[dict[str, str]]]:
    """Rows to test on, to train on, and to pretrain on, all from one stream and no prompt in two of them."""
    rows = {row["prompt"]: row for row in sorting_rows(20_000, seed)}
    parts = split(list(rows.values()), SORT_ROWS["test"], SORT_ROWS["train"])
    return dict(zip(("test", "train", "pretraining"), parts, strict=True))


def last_line_reward(completions: list[str], solution: list[str], **_: Any) -> list[float]:
    """1 where the last line, of a sorted answer the only one, is the solution."""
    return [float(text.rsplit(";", 1)[-1] == right) for text, right in zip(completions, solution, strict=True)]


@token_reward
def right_lines(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
) -> list[list[float]]:
    """1 on the last token of each line that follows from the line before it, right or not; 0 elsewhere."""
    rewards = []
    for prompt, text, ids in zip(prompts, completions, completion_ids, strict=True):
        by_token, end, previous = [0.0] * len(ids), -1, prompt[:-1]
        for line in text.split(";"):
            end += len(line) + 1  # a character is a token; behind the line stands `;` or the end of text
            follows = len(previous) == 4 and previous[:2] != "00" and previous.isdigit()
            if follows and end < len(ids):
                by_token[end] = float(line == next_line(previous))
            previous = line
        rewards.append(by_token)
    return rewards


def written_out_batches(tokenizer, prompts: list[str], batch_size: int, generator: random.Random) -> Iterator[tuple]:
    """Batches for `pretrain`, without end: computations written out, with slips."""
    while True:
        chosen = generator.sample(prompts, batch_size)
        texts = [prompt + write_out(prompt, generator, SLIPS) + tokenizer.eos_token for prompt in chosen]
        input_ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")["input_ids"]
        labels = input_ids.masked_fill(input_ids == tokenizer.pad_token_id, -100)
        labels[:, : len(chosen[0])] = -100
        yield input_ids, labels


# ---- the base models


def prepare(base: str, seed: int, folder: Path) -> None:
    """Pretrains a base model, `"dense"`, `"moe"` or `"count"`, into `folder`."""
    torch.manual_seed(seed)
    generator = random.Random(seed)
    if base == "count":
        tokenizer = make_tokenizer(COUNT_ALPHABET)
        model = make_model(tokenizer, hidden_size=64)
        prompts = [row["prompt"] for row in counting_rows(seed)["train"]]
        short = [prompt for prompt in prompts if int(prompt[:2]) < 15]
        pretrain(model, counting_lessons(tokenizer, short, prompts, generator), sum(COUNT_STEPS), 6e-3)
    else:
        tokenizer = make_tokenizer(SORT_ALPHABET)
        is_moe = base == "moe"
        experts = dict(num_experts=8, num_experts_per_tok=2) if is_moe else {}
        model = make_model(tokenizer, moe=is_moe, hidden_size=64 if is_moe else 96, **experts)
        pretrain(model, corrupted_answers(tokenizer, digits_rows(seed)["pretraining"], generator), SORT_STEPS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


SORT_STEPS = 400
COUNT_STEPS = (300, 150)  # on short computations, on all


def counting_lessons(tokenizer, short: list[str], prompts: list[str], generator: random.Random) -> Iterator[tuple]:
    """Short computations first: what they teach, long ones teach at three times the price."""
    yield from islice(written_out_batches(tokenizer, short, 32, generator), COUNT_STEPS[0])
    yield from written_out_batches(tokenizer, prompts, 32, generator)


# ---- the methods


class Method(NamedTuple):
    """
    What is compared. `options` are of `config`; all else is that class's default or the setting's. `minibatches` is
    optimizer steps for each rollout, where the setting does not say.
    """

    label: str
    config: type[GRPOConfig]
    options: dict[str, Any]
    minibatches: int = MINIBATCHES
    takes_tuned_range: bool = False
    rewards_lines: bool = False

    @property
    def family(self) -> str:
        # The flag is flipped in a script of GRPO, and its learning rate stays.
        return "gspo" if self.config is GSPOConfig else "grpo"


_TOKEN = {"importance_sampling_level": "sequence_token"}
METHODS = {
    # The baseline of the GSPO paper, section 5.1, with the clip range that it tuned for GRPO. The loss is averaged in
    # each sequence and then over sequences (DeepSeekMath, equation 3).
    "grpo": Method(
        "GRPO, the GSPO paper's baseline", GRPOConfig, dict(loss_type="grpo", epsilon=0.2, epsilon_high=0.27, beta=0.0)
    ),
    # Section 4.2: KL coefficient 0.04, and a single update for each rollout, so that nothing can be clipped.
    "deepseekmath": Method("GRPO as in DeepSeekMath", GRPOConfig, dict(loss_type="grpo", epsilon=0.2, beta=0.04), 1),
    # The rest is TRL's defaults: range 0.2, loss `dapo`, one step for each rollout.
    "flag": Method("GRPO, TRL's flag flipped", GRPOConfig, dict(importance_sampling_level="sequence"), 1),
    "gspo": Method("GSPO", GSPOConfig, {}, takes_tuned_range=True),
    # From the paper's range, to the clip fraction that it reports.
    "gspo_controlled": Method("GSPO, range by controller", GSPOConfig, dict(clip_fraction_target=0.15)),
    "gspo_token": Method("GSPO-token", GSPOConfig, _TOKEN, takes_tuned_range=True),
    # A wrong line makes no later line wrong, so that a later line's reward is noise to it.
    "gspo_token_lines": Method(
        "GSPO-token, a reward a line",
        GSPOConfig,
        _TOKEN | dict(step_discount=0.01),
        takes_tuned_range=True,
        rewards_lines=True,
    ),
}
# Of the search, by the setting that is tuned: factors of two around what learnt at all.
LEARNING_RATES = {
    "dense": (5e-5, 1e-4, 2e-4, 4e-4),
    "moe": (5e-5, 1e-4, 2e-4, 4e-4),
    "stale_16": (2.5e-5, 5e-5, 1e-4, 2e-4),
    "medium": (6.25e-5, 1.25e-4, 2.5e-4, 5e-4),
    "long": (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3),
}
# Where the controller starts when a range is looked for: near where it goes, as a stale run has few rollouts.
RANGE_STARTS = {"dense": 0.05, "moe": 0.05, "count": 0.005}


def searching(base: str) -> dict[str, float]:
    """Options of a run that looks for a clip range."""
    start = RANGE_STARTS[base]
    return dict(epsilon=start, epsilon_high=start, clip_fraction_target=0.15)


class NoisyOldLogps:
    """Mixed into a trainer: adds normal noise to the old log-probs, and to nothing else."""

    def __init__(self, *args: Any, noise: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # A generator of its own: what is sampled stays the same.
        self.noise, self.noise_generator = noise, torch.Generator(self.model.device).manual_seed(self.args.seed)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.noise:
            old = output["old_per_token_logps"]
            noise = torch.randn(old.shape, generator=self.noise_generator, device=old.device)
            output["old_per_token_logps"] = old + self.noise * noise
        return output


class MeasuredGRPO(GRPOTrainer):
    """
    TRL's trainer, which trains as it does, with the metrics of ours beside its own.

    `gspo/ratio/*` and `gspo/kl_old` are of sequences whatever the level, and so comparable between methods;
    `gspo/clip_fraction/tokens` is of what this trainer clips: single tokens, or all those of a sequence.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sequences, self._tokens = RatioStatistics(), RatioStatistics()
        is_mixture = getattr(self.model.config, "num_experts", None) is not None
        self._routing = RoutingRecorder(find_routers(self.model)) if is_mixture else None
        self._logps = self._experts = None
        self._rollout_step = 0

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rollout_step = self.state.global_step
        output = super()._generate_and_score_completions(inputs)
        if self._routing is not None and "old_per_token_logps" in output:
            output["old_experts"] = self._experts
        return output

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple:
        is_policy = model is not self.ref_model
        with self._routing if self._routing is not None and is_policy else nullcontext():
            scored = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        if is_policy:
            self._logps = scored[0].detach()
            if self._routing is not None:
                self._experts = self._routing.experts(*input_ids.shape)[:, -logits_to_keep - 1 : -1]
        return scored

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        logps, mask, advantages = self._logps, inputs["completion_mask"], inputs["advantages"]
        old, experts, changes = inputs.get("old_per_token_logps", logps), inputs.get("old_experts"), None
        if experts is not None:
            is_live = mask.bool() & (advantages != 0).unsqueeze(1)
            changes = torch.stack(changed_slots(self._experts, experts, is_live))
        clip_range = self.epsilon_low, self.epsilon_high
        minibatch = self.state.global_step - self._rollout_step
        self._sequences.update(logps, old, advantages, mask, *clip_range, minibatch=minibatch, expert_changes=changes)
        if self.importance_sampling_level == "token":
            # Each token as a sequence of one.
            columns = [tensor.reshape(-1, 1) for tensor in (logps, old)]
            by_token = advantages.repeat_interleave(mask.size(1))
            self._tokens.update(*columns, by_token, mask.reshape(-1, 1), *clip_range, minibatch=minibatch)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._sequences and any(key.endswith("loss") for key in logs):
            metrics = self._sequences.compute(self.accelerator.gather)
            if self._tokens:
                metrics = {name: value for name, value in metrics.items() if "clip_fraction" not in name}
                share = self._tokens.compute(self.accelerator.gather)["gspo/clip_fraction/tokens"]
                metrics["gspo/clip_fraction/tokens"] = share
            for name, value in metrics.items():
                self._metrics["train"][name].append(value)
        super().log(logs, start_time)


class GRPORun(NoisyOldLogps, MeasuredGRPO):
    pass


class GSPORun(NoisyOldLogps, GSPOTrainer):
    pass


# ---- the settings


class Setting(NamedTuple):
    """
    Where methods are compared. `minibatches` is optimizer steps for each pass over a rollout, `None` for each method's
    own; `noise` the standard deviation of what is added to the old log-probs, nats a token; `tuned_on` the setting
    whose learning rates and clip range this one takes.
    """

    label: str
    base: str
    steps: int
    methods: tuple[str, ...]
    lines: range | None = None
    minibatches: int | None = None
    iterations: int = 1
    noise: float = 0.0
    tuned_on: str | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest completion: five digits, or lines of five tokens with room to go astray."""
        return 6 if self.lines is None else 5 * (self.lines[-1] + 6)


MEDIUM, LONG = range(5, 15), range(30, 51)
_MAIN = ("grpo", "deepseekmath", "flag", "gspo", "gspo_controlled", "gspo_token")
_NOISY = ("grpo", "gspo")
SETTINGS = {
    "dense": Setting("dense, 6 tokens", "dense", 160, _MAIN),
    "moe": Setting("mixture of experts, 6 tokens", "moe", 160, _MAIN),
    "medium": Setting("dense, about 50 tokens", "count", 48, ("grpo", "gspo", "gspo_controlled"), MEDIUM),
    "long": Setting(
        "dense, about 200 tokens", "count", 48, ("grpo", "flag", "gspo", "gspo_controlled", "gspo_token_lines"), LONG
    ),
    "stale_8": Setting(
        "8 minibatches, 4 iterations", "dense", 192, ("grpo", "flag", "gspo"), None, 8, 4, tuned_on="stale_16"
    ),
    "stale_16": Setting("16 minibatches, 4 iterations", "dense", 384, ("grpo", "flag", "gspo"), None, 16, 4),
} | {
    f"noise_{noise}": Setting(f"noise of {noise} nats", "count", 48, _NOISY, MEDIUM, noise=noise, tuned_on="medium")
    for noise in (0.02, 0.1, 0.3)
}
GUIDE = "guide"


class Job(NamedTuple):
    """One run: its folder in the output, and what differs from its setting and method."""

    folder: str
    setting: str
    method: str
    seed: int
    changes: dict[str, Any] = {}


# ---- one run


class Problem(NamedTuple):
    """What one run trains on: `options` are common to all methods, `base` is where the model lies."""

    base: str
    rewards: list
    weights: list[float] | None
    train_rows: Dataset
    test_rows: list[dict]
    options: dict[str, Any]


def small_problem(setting: Setting, seed: int, output: Path) -> Problem:
    """A setting of [`SETTINGS`], on one thread of a CPU."""
    rows = digits_rows(seed) if setting.lines is None else counting_rows(seed, setting.lines)
    minibatches = setting.minibatches or MINIBATCHES
    options = dict(
        num_generations=GROUP,
        per_device_train_batch_size=COMPLETIONS,
        num_iterations=setting.iterations,
        max_completion_length=setting.longest,
        max_steps=setting.steps,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=8,
        # One log for each rollout of the methods that take several steps from it.
        logging_steps=minibatches * setting.iterations,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    base = output / "bases" / setting.base / f"seed_{seed}"
    return Problem(str(base), [last_line_reward], None, Dataset.from_list(rows["train"]), rows["test"], options)


def options_of(job: Job, setting: Setting, common: dict[str, Any]) -> dict[str, Any]:
    """What the configuration of a run is made of, but for its folder."""
    method = METHODS[job.method]
    minibatches = setting.minibatches or method.minibatches
    ours = {}
    if method.config is GSPOConfig:
        # All tokens go through the model, as in TRL's trainer: seconds and entropies mean the same for each method.
        ours = dict(pack_live_tokens=False, log_expert_change=setting.base == "moe")
    return (
        common
        | dict(steps_per_generation=minibatches * common.get("gradient_accumulation_steps", 1), seed=job.seed)
        | dict(save_strategy="no", report_to="none", disable_tqdm=True)
        | ours
        | method.options
        | job.changes
    )


def train(job: Job, setting: Setting, problem: Problem, output: Path) -> None:
    """Trains one run into `output / job.folder`, and writes its `trainer_state.json` and `summary.json` there."""
    folder, method = output / job.folder, METHODS[job.method]
    options = options_of(job, setting, problem.options)
    trainer_class = GSPORun if method.config is GSPOConfig else GRPORun
    rewards, weights = list(problem.rewards), problem.weights
    if method.rewards_lines:
        rewards, weights = [*rewards, right_lines], [*(weights or [1.0] * len(rewards)), 1.0]
    trainer = trainer_class(
        model=problem.base,
        reward_funcs=rewards,
        args=method.config(output_dir=str(folder), reward_weights=weights, **options),
        train_dataset=problem.train_rows,
        noise=setting.noise,
    )
    trainer.remove_callback(PrinterCallback)
    before = accuracy_before(trainer, problem, setting)
    started, broken = time.perf_counter(), None
    try:
        trainer.train()
    except RuntimeError as error:
        # Sampling from NaN raises. Of weights that are whole it is another error.
        broken = non_finite_weight(trainer.model)
        if broken is None:
            raise
        broken = f"{broken} not finite at step {trainer.state.global_step} ({type(error).__name__})"
    seconds = time.perf_counter() - started
    if broken is None and non_finite_weight(trainer.model) is not None:
        broken = f"{non_finite_weight(trainer.model)} not finite at the end"
    # A model that samples nothing answers nothing right.
    after = 0.0 if broken else accuracy(trainer, problem)
    folder.mkdir(parents=True, exist_ok=True)
    trainer.save_state()
    facts = dict(setting=job.setting, method=job.method, seed=job.seed, before=before, after=after, broken=broken)
    facts |= dict(seconds=round(seconds, 1), options=fingerprint(options, setting))
    write_json(folder / "summary.json", facts)


def fingerprint(options: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """What a finished run has to have been made with, to be taken over."""
    lines = None if setting.lines is None else [setting.lines[0], setting.lines[-1]]
    # As JSON gives it back.
    return json.loads(json.dumps(options | dict(base=setting.base, lines=lines, noise=setting.noise)))


def accuracy(trainer: GRPOTrainer, problem: Problem) -> float:
    """Share of right answers on the held-out rows, sampled as in training, from the same random numbers each time."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    is_training, cache = model.training, model.config.use_cache
    model.eval()
    samples = generate(
        model,
        trainer.processing_class,
        [row["prompt"] for row in problem.test_rows],
        max(TEST_COMPLETIONS // len(problem.test_rows), 1),
        batch_size=TEST_COMPLETIONS if args.use_cpu else args.per_device_eval_batch_size,
        max_new_tokens=args.max_completion_length,
        temperature=args.temperature,
    )
    model.train(is_training)
    model.config.use_cache = cache
    rewards = {f"reward_{index}": reward for index, reward in enumerate(problem.rewards)}
    score(samples, problem.test_rows, rewards, problem.weights)
    return float(np.mean([sample.passed for group in samples for sample in group]))


def accuracy_before(trainer: GRPOTrainer, problem: Problem, setting: Setting) -> float:
    """That of the base model, computed once for all methods where there is a folder to keep it in."""
    if not Path(problem.base).is_dir():
        return accuracy(trainer, problem)
    span = "all" if setting.lines is None else f"{setting.lines[0]}_{setting.lines[-1]}"
    path = Path(problem.base) / f"accuracy_{span}.json"
    if not path.is_file():
        write_json(path, {"accuracy": accuracy(trainer, problem)})
    return json.loads(path.read_text())["accuracy"]


# ---- all runs


class Scale(NamedTuple):
    """What `--scale` chooses: the settings, by name, and for `large` the words of scripts/train.py."""

    settings: dict[str, Setting]
    words: tuple[str, ...] | None = None

    def problem(self, setting: Setting, seed: int, output: Path) -> Problem:
        return small_problem(setting, seed, output) if self.words is None else large_problem(self.words)


SMALL = Scale(SETTINGS)


def prepare_missing(base: str, seed: int, output: Path) -> None:
    folder = output / "bases" / base / f"seed_{seed}"
    if not (folder / "tokenizer.json").is_file():  # the last that is written
        calm_down()
        prepare(base, seed, folder)
        print(f"base  {base}, seed {seed}", flush=True)


def train_missing(job: Job, scale: Scale, output: Path) -> None:
    setting, path = scale.settings[job.setting], output / job.folder / "summary.json"
    problem = scale.problem(setting, job.seed, output)
    if is_finished(path, options_of(job, setting, problem.options), setting):
        return
    calm_down()
    train(job, setting, problem, output)
    facts = json.loads(path.read_text())
    state = facts["broken"] or "right {before:.3f} -> {after:.3f}".format(**facts)
    print(f"{job.folder}  {state}  {facts['seconds']:.0f} s", flush=True)


def calm_down() -> None:
    """One thread, and no warnings: what is compared is out of the ordinary on purpose."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def is_finished(path: Path, options: dict[str, Any], setting: Setting) -> bool:
    return path.is_file() and json.loads(path.read_text())["options"] == fingerprint(options, setting)


def tuning_jobs(names: Iterable[str], steps: dict[str, Any]) -> list[Job]:
    """The same learning rates for both families; the controller finds GSPO's clip range meanwhile."""
    return [
        Job(f"tuning/{name}/{family}_{rate:g}", name, family, TUNING_SEED, dict(learning_rate=rate) | more | steps)
        for name in names
        for family, more in (("grpo", {}), ("gspo", searching(SETTINGS[name].base)))
        for rate in LEARNING_RATES[name]
    ]


def tuned(output: Path, jobs: list[Job]) -> dict[str, dict[str, dict[str, float]]]:
    """By setting and family, the options of the run with the highest held-out accuracy."""
    best: dict[str, dict[str, tuple]] = {}
    for job in jobs:
        found = best.setdefault(job.setting, {})
        # The lower learning rate of two that are as good; a broken run has 0.
        found[job.method] = max(
            found.get(job.method, (-1.0, job)), (read_run(job, output)["after"], job), key=itemgetter(0)
        )
    return {
        setting: {
            family: dict(learning_rate=job.changes["learning_rate"])
            | (controlled_range(output / job.folder) if family == "gspo" else {})
            for family, (_, job) in found.items()
        }
        for setting, found in best.items()
    }


def controlled_range(folder: Path) -> dict[str, float]:
    """Where the controller stood in a run, the median."""
    logs = load_logs(folder)
    keys = {"epsilon": "gspo/epsilon_low", "epsilon_high": "gspo/epsilon_high"}
    return {option: float(np.median(values_of(logs, key))) for option, key in keys.items()}


def setting_jobs(
    settings: dict[str, Setting], methods: Iterable[str], seeds: int, choices: dict, steps: dict[str, Any]
) -> list[Job]:
    jobs = []
    for name, setting in settings.items():
        for key, seed in product(setting.methods, range(seeds)):
            if key not in methods:
                continue
            method, changes = METHODS[key], dict(steps)
            if choices:
                chosen = choices[setting.tuned_on or name][method.family]
                wanted = (
                    ("learning_rate", "epsilon", "epsilon_high") if method.takes_tuned_range else ("learning_rate",)
                )
                changes |= {option: chosen[option] for option in wanted}
            jobs.append(Job(f"{name}/{key}/seed_{seed}", name, key, seed, changes))
    return jobs


def guide_jobs(steps: dict[str, Any]) -> list[Job]:
    """Fixed clip ranges and the controller, by completion length, learning rate and minibatches."""
    jobs = []
    for (name, count), minibatches in product(GUIDE_STEPS.items(), GUIDE_MINIBATCHES):
        shape = dict(max_steps=count, steps_per_generation=minibatches, logging_steps=minibatches)
        ranges = GUIDE_RANGES | {"controller": searching(SETTINGS[name].base)}
        for rate, (label, clip_range) in product(GUIDE_RATES[name], ranges.items()):
            folder = f"{GUIDE}/{name}/{rate:g}_{minibatches}_{label}"
            changes = dict(learning_rate=rate) | shape | clip_range | steps
            jobs.append(Job(folder, name, "gspo", TUNING_SEED, changes))
    return jobs


GUIDE_STEPS = {"dense": 96, "medium": 32, "long": 24}
GUIDE_RATES = {"dense": (5e-5, 2e-4), "medium": (1.25e-4, 5e-4), "long": (2.5e-4, 1e-3)}
GUIDE_MINIBATCHES = (4, 8)
# A factor of ten from one to the next, in the proportion of the paper's.
GUIDE_RANGES = {f"{3 * scale:g}": dict(epsilon=3 * scale, epsilon_high=4 * scale) for scale in (1e-4, 1e-3, 1e-2)}


def read_run(job: Job, output: Path) -> dict[str, Any]:
    """A finished run: its summary, its curves, and the figures of it that the tables hold."""
    folder = output / job.folder
    facts = json.loads((folder / "summary.json").read_text())
    state = json.loads((folder / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "grad_norm" in entry]
    return facts | dict(curve=curve(logs), measures=measures(facts, logs))


# What a configuration of scripts/train.py says that a method decides here, or that a comparison has no use for.
OF_METHODS = {
    "importance_sampling_level", "loss_type", "epsilon", "epsilon_high", "beta", "steps_per_generation",
    "generation_batch_size", "output_dir", "eval_strategy", "eval_steps", "reward_weights", "seed", "report_to",
}  # fmt: skip
LARGE = Setting("", "", 0, ("grpo", "deepseekmath", "flag", "gspo", "gspo_token"))


def large_problem(words: tuple[str, ...]) -> Problem:
    """Model, task and budget of scripts/train.py's options."""
    script_args, training_args, model_args, _ = train_script.parse(list(words))
    train_rows, test_rows = load_task(script_args)
    names = {spec.name for spec in fields(GRPOConfig)} - OF_METHODS
    options = {name: getattr(training_args, name) for name in script_args.given if name in names}
    options["model_init_kwargs"] = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    rewards = train_script.load_rewards(script_args, training_args)
    return Problem(
        model_args.model_name_or_path, rewards, training_args.reward_weights, train_rows, list(test_rows), options
    )


def large_scale(words: list[str]) -> Scale:
    """
    The one setting of a configuration.

    Raises:
        ValueError: if there is no GPU, or scripts/train.py would refuse the words.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "`--scale large` trains a model of the hub's size and needs a GPU: leave it out, or find one."
        )
    script_args, _, model_args, _ = train_script.parse(words)
    name = script_args.task or Path(script_args.dataset_name).stem
    return Scale({name: LARGE._replace(label=f"{model_args.model_name_or_path} on {name}")}, tuple(words))


def run_all(args: argparse.Namespace, scale: Scale) -> None:
    """All that is missing: base models, the runs that choose, the runs that are compared, and the guide."""
    settings = {name: scale.settings[name] for name in args.settings if name != GUIDE}
    has_guide, is_small = GUIDE in args.settings, scale.words is None
    steps = {} if args.steps is None else dict(max_steps=args.steps)
    tuning = tuning_jobs(dict.fromkeys(s.tuned_on or name for name, s in settings.items()), steps) if is_small else []
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        if is_small:
            bases = {SETTINGS[name].base for name in [*settings, *(GUIDE_STEPS if has_guide else ())]}
            seeds = [TUNING_SEED, *(range(args.seeds) if settings else ())]
            wanted = sorted(product(bases, seeds), key=lambda pair: pair[0] != "count")  # what takes longest first
            list(pool.map(prepare_missing, *zip(*wanted, strict=True), repeat(args.output)))
        list(pool.map(train_missing, longest_first(tuning, scale), repeat(scale), repeat(args.output)))
        jobs = setting_jobs(settings, args.methods, args.seeds, tuned(args.output, tuning), steps)
        jobs += guide_jobs(steps) if has_guide else []
        list(pool.map(train_missing, longest_first(jobs, scale), repeat(scale), repeat(args.output)))


def longest_first(jobs: list[Job], scale: Scale) -> list[Job]:
    """So that no worker is alone at the end for long."""
    return sorted(jobs, key=lambda job: -scale.settings[job.setting].longest)


def gather(args: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """All finished runs of the chosen settings, methods and seeds, in the form that `evidence.write` takes."""
    settings = {name: scale.settings[name] for name in args.settings if name != GUIDE}

    def finished(jobs):
        return [
            (job, read_run(job, args.output)) for job in jobs if (args.output / job.folder / "summary.json").is_file()
        ]

    names = dict.fromkeys(setting.tuned_on or name for name, setting in settings.items())
    tuning = finished(tuning_jobs(names, {}) if scale.words is None else [])
    runs = finished(setting_jobs(settings, args.methods, args.seeds, {}, {}))
    guide = finished(guide_jobs({}) if GUIDE in args.settings else [])
    return {
        "settings": {name: setting.label for name, setting in settings.items()},
        "methods": {name: method.label for name, method in METHODS.items()},
        "noise": {name: setting.noise for name, setting in settings.items() if setting.noise},
        "runs": [run for _, run in runs],
        "tuning": [
            dict(setting=job.setting, method=job.method, learning_rate=job.changes["learning_rate"])
            | dict(accuracy=run["after"], broken=run["broken"])
            | (controlled_range(args.output / job.folder) if job.method == "gspo" else {})
            for job, run in tuning
        ],
        "guide": [
            dict(length=run["measures"]["length"], is_controlled="clip_fraction_target" in job.changes)
            | {name: run["options"][name] for name in ("learning_rate", "steps_per_generation", "epsilon_high")}
            | dict(setting=job.setting)
            | {name: run["measures"][name] for name in ("reward", "clipped", "epsilon_high_end")}
            for job, run in guide
        ],
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("all", "report"))
    parser.add_argument("--settings", nargs="+", metavar="NAME", help=f"of {', '.join([*SETTINGS, GUIDE])}; all")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="all")
    parser.add_argument("--seeds", type=int, default=5, help="from 0")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run, in place of the setting's")
    parser.add_argument("--jobs", type=int, help="runs at a time: 2, at a large scale 1")
    parser.add_argument("--scale", choices=("small", "large"), default="small")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--docs", type=Path, help="page that gets tables, verdicts and, beside it, the figure")
    args, words = parser.parse_known_args(argv)
    try:
        scale = prepare_arguments(args, words)
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    started = time.time()
    if args.step == "all":
        run_all(args, scale)
    results = gather(args, scale)
    command = f"python scripts/compare.py {' '.join(argv)}"
    results |= dict(machine=machine(), command=command, minutes=(time.time() - started) / 60)
    summaries = args.output.glob("*/*/**/summary.json")
    results["taken_over"] = sum(path.stat().st_mtime < started for path in summaries)
    made = args.output / "results.json"
    if args.step == "report" and made.is_file():
        # Of the command that trained.
        before = json.loads(made.read_text())
        results |= {name: before[name] for name in ("machine", "command", "minutes", "taken_over")}
    print(write(results, args.output, args.docs))
    return 0


def prepare_arguments(args: argparse.Namespace, words: list[str]) -> Scale:
    """
    Checks everything that can be checked before the first run, and fills in what depends on the scale.

    Raises:
        ValueError: if an option has a value that it cannot have; the message says what is allowed.
    """
    if words and args.scale == "small":
        raise ValueError(f"`{words[0]}` is no option here: those of scripts/train.py go with `--scale large`.")
    scale = SMALL if args.scale == "small" else large_scale(words)
    known = [*scale.settings, *([GUIDE] if scale.words is None else [])]
    args.settings = args.settings or known
    unknown = [name for name in args.settings if name not in known]
    if unknown:
        raise ValueError(f"`--settings {unknown[0]}` is not known: {', '.join(known)}.")
    for name in ("seeds", "steps", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`--{name} {value}` must be at least 1.")
    if args.seeds > TUNING_SEED:
        raise ValueError(f"`--seeds {args.seeds}` would evaluate on the seed of the search: at most {TUNING_SEED}.")
    if args.step == "report" and not any(args.output.glob("*/*/*/summary.json")):
        raise ValueError(
            f"`--output {args.output}` holds no finished run: `python scripts/compare.py all` makes them."
        )
    args.jobs = args.jobs or (2 if args.scale == "small" else 1)
    if args.docs is not None:
        for block in BLOCKS:
            if not has_markers(args.docs, *markers(block)):
                raise ValueError(f"{args.docs} does not hold the two lines {' and '.join(map(repr, markers(block)))}.")
    return scale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
