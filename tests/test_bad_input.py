"""
Bad input, and what comes of it: the table of docs/troubleshooting.md, which is written from the one here.

    python tests/test_bad_input.py > table.md

A row says what is given, through which door, and what has to happen. Each is tried with an `output_dir` that holds a
checkpoint of an earlier run, which has to be there unharmed afterwards.
"""

import inspect
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import train
import trl.trainer.grpo_trainer
from datasets import Dataset, IterableDataset
from tiny import make_model, make_tokenizer, sorting_rows, write_jsonl
from transformers import AutoModelForCausalLM

from trl_gspo import GSPOConfig, GSPOTrainer


SCRIPT, TRAINER = "train.py", "GSPOTrainer"
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "troubleshooting.md"

TINY = {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 6,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "max_steps": 4,
}


@dataclass
class Row:
    """
    Attributes:
        given: what is given, as the docs have it.
        door: `SCRIPT` or `TRAINER`.
        says: what the message, or what is logged, has to contain. A regular expression.
        ends: exit code of the script, or class of the trainer's error; `None` where the run goes on to its end.
        make: options, from [`World`]; `model`, `dataset` and `yaml` among them take the place of good ones.
        loads: whether a model is loaded before.
        trains: whether it shows while training.
        seconds: that it may take.
        meaning: what the docs say of it beyond the message.
        after: a check of what was trained.
    """

    given: str
    door: str
    says: str
    ends: int | type | None
    make: Callable[["World"], dict[str, Any]]
    loads: bool = False
    trains: bool = False
    seconds: float = 10
    meaning: str = ""
    after: Callable[[GSPOTrainer], None] | None = None

    @property
    def id(self) -> str:
        return f"{self.given}: {self.door}"


class World:
    """What rows are made of, in a folder of their own."""

    def __init__(self, folder: Path, model_path: str, tokenizer):
        self.folder, self.model_path, self.tokenizer = folder, model_path, tokenizer

    def jsonl(self, rows: list[dict], name: str = "rows.jsonl") -> str:
        return str(write_jsonl(self.folder / "data" / name, rows))

    def file(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def model(self, tokenizer=None, **overrides) -> str:
        """A folder with a model of another kind, or with another tokenizer."""
        folder = self.folder / "model"
        make_model(self.tokenizer, **overrides).save_pretrained(folder)
        (tokenizer or self.tokenizer).save_pretrained(folder)
        return str(folder)

    def broken_model(self, *, change: dict[str, Any] = {}, remove: tuple = (), cut: tuple = ()) -> str:  # noqa: B006
        """A copy of the good model's folder, with files of another content, without, and cut off in their middle."""
        folder = self.folder / "model"
        shutil.copytree(self.model_path, folder)
        for name, content in change.items():
            (folder / name).write_text(content)
        for name in remove:
            (folder / name).unlink()
        for name in cut:
            whole = (folder / name).read_bytes()
            (folder / name).write_bytes(whole[: len(whole) // 2])
        return str(folder)

    def small_tokenizer(self, **without):
        """The good one without its `eos_token`, say."""
        tokenizer = make_tokenizer()
        for name in without:
            setattr(tokenizer, name, None)
        return tokenizer


def prompts(*texts: Any) -> Dataset:
    return Dataset.from_list([{"prompt": text, "solution": "1"} for text in texts])


def stream(rows: list[dict]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


LONG = "1" * 3000  # tokens, and the context is 2048
MANY = [{"prompt": "1=", "solution": "1"}] * 8


def is_untrained(trainer: GSPOTrainer) -> None:
    start = AutoModelForCausalLM.from_pretrained(trainer.model.config._name_or_path)
    for (name, one), other in zip(trainer.model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(one, other), name


def is_trained_and_finite(trainer: GSPOTrainer) -> None:
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    with pytest.raises(AssertionError):
        is_untrained(trainer)


def only_the_end(world: World) -> dict[str, Any]:
    tokens = [index for index in range(len(world.tokenizer)) if index != world.tokenizer.eos_token_id]
    return {"generation_kwargs": {"suppress_tokens": tokens}}


def shards(world: World) -> str:
    folder = world.folder / "model"
    make_model(world.tokenizer).save_pretrained(folder, max_shard_size="20KB")
    world.tokenizer.save_pretrained(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    return str(folder)


def extended_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"])
    return tokenizer


def reward(name: str) -> dict[str, Any]:
    return {"reward_funcs": f"tests.faulty_reward.{name}"}


DATA = [
    Row(
        "a data set without a row",
        SCRIPT,
        "is empty",
        2,
        lambda w: {"dataset": w.file("rows.jsonl", "")},
    ),
    Row(
        "a data set without a row",
        TRAINER,
        "`train_dataset` has 0 prompts, and one rollout batch takes 8",
        ValueError,
        lambda w: {"dataset": prompts()},
    ),
    Row(
        "a stream without a row",
        SCRIPT,
        "has no row in split 'train'",
        2,
        lambda w: {"dataset": w.file("rows.csv", "prompt,solution\n"), "dataset_streaming": True},
    ),
    Row(
        "a stream without a row",
        TRAINER,
        "`train_dataset` has no row",
        ValueError,
        lambda w: {"dataset": stream([])},
    ),
    Row(
        "one row, and a rollout batch of several",
        SCRIPT,
        "`train_dataset` has 1 prompts, and one rollout batch takes 8 .* Set a smaller `steps_per_generation`",
        2,
        lambda w: {"dataset": w.jsonl(MANY[:1])},
    ),
    Row(
        "one row, and a rollout batch of several",
        TRAINER,
        "`train_dataset` has 1 prompts, and one rollout batch takes 8",
        ValueError,
        lambda w: {"dataset": prompts("1=")},
    ),
    Row(
        "one row, and a rollout batch of one prompt",
        TRAINER,
        "",
        None,
        lambda w: {"dataset": prompts("1="), "per_device_train_batch_size": 1},
        loads=True,
        trains=True,
        meaning="trains",
        after=is_trained_and_finite,
    ),
    Row(
        "no column of prompts",
        SCRIPT,
        "`prompt_column` names the column 'prompt', which the data set does not have. It has question, answer",
        2,
        lambda w: {"dataset": w.jsonl([{"question": "1=", "answer": "1"}])},
    ),
    Row(
        "no column of prompts",
        TRAINER,
        "`train_dataset` has no column 'prompt'. It has question, answer",
        ValueError,
        lambda w: {"dataset": Dataset.from_list([{"question": "1=", "answer": "1"}] * 8)},
    ),
    Row(
        "a row without a prompt",
        SCRIPT,
        "Row 1 has no prompt: column 'prompt' holds None",
        2,
        lambda w: {"dataset": w.jsonl([*MANY[:1], {"prompt": None, "solution": "1"}, *MANY])},
    ),
    Row(
        "a row without a prompt",
        TRAINER,
        "Row 1 of `train_dataset` has no prompt, but None",
        ValueError,
        lambda w: {"dataset": prompts("1=", None, *["1="] * 8)},
    ),
    Row(
        "a prompt without a token",
        TRAINER,
        "Row 8 of `train_dataset`: A prompt has no token",
        ValueError,
        lambda w: {"dataset": prompts(*["1="] * 8, "")},
    ),
    Row(
        "messages, and a tokenizer without a chat template",
        TRAINER,
        "Row 0 of `train_dataset`: .*chat_template",
        ValueError,
        lambda w: {
            "dataset": prompts(*[[{"role": "user", "content": "1="}]] * 8),
            "model": w.model(w.small_tokenizer(chat_template=None)),
        },
    ),
    Row(
        "a prompt longer than the context",
        SCRIPT,
        "Row 8 of `train_dataset`: A prompt has 3000 tokens, and the model's context is 2048",
        2,
        lambda w: {"dataset": w.jsonl([*MANY, {"prompt": LONG, "solution": "1"}])},
    ),
    Row(
        "a prompt longer than the context",
        TRAINER,
        "Row 8 of `train_dataset`: A prompt has 3000 tokens, and the model's context is 2048",
        ValueError,
        lambda w: {"dataset": prompts(*["1="] * 8, LONG)},
    ),
    Row(
        "a prompt to evaluate on longer than the context",
        TRAINER,
        r"Row 1 of `eval_dataset\['hard'\]`: A prompt has 3000 tokens",
        ValueError,
        lambda w: {"eval_dataset": {"hard": prompts("1=", LONG)}},
    ),
    Row(
        "a prompt longer than the context, in a stream",
        TRAINER,
        "A prompt has 3000 tokens, and the model's context is 2048",
        ValueError,
        lambda w: {"dataset": stream([{"prompt": LONG, "solution": "1"}] * 8)},
        loads=True,
        trains=True,
        meaning="when it is rolled out",
    ),
    Row(
        "prompt and completion together longer than the context",
        TRAINER,
        "The longest prompt of `train_dataset` has 40 tokens, which with `max_completion_length=30` is beyond the "
        "model's context of 64: set `max_completion_length=24`",
        None,
        lambda w: {
            "dataset": prompts(*["1="] * 8, "1" * 40),
            "model": w.model(max_position_embeddings=64),
            "max_completion_length": 30,
        },
        loads=True,
        trains=True,
        meaning="a warning: rotary embeddings go on, worse, beyond what a model was trained on",
    ),
    Row(
        "a model that only writes empty completions",
        TRAINER,
        "",
        None,
        lambda w: only_the_end(w) | {"reward_funcs": lambda completions, **_: [float(c == "") for c in completions]},
        loads=True,
        trains=True,
        meaning="nothing is learnt and nothing is harmed: all rewards of a group are equal, and so its advantages 0; "
        "the health watch of `train.py` warns of the live fraction",
        after=is_untrained,
    ),
]
REWARDS = [
    Row(
        "rewards that are NaN",
        SCRIPT,
        "Stopped by the health watch at step 17: gspo/unscored_fraction is 1",
        3,
        lambda w: reward("nan") | {"max_steps": 24},
        loads=True,
        trains=True,
        meaning="NaN counts as `None`: not scored, advantage 0. The health watch stops a run in which no completion "
        "has a reward for `health_unscored_logs` logs in a row",
    ),
    Row(
        "rewards that are NaN for some completions",
        TRAINER,
        "The reward function 'half_nan' returned NaN for 16 of 32 completions. NaN counts as `None`",
        None,
        lambda w: reward("half_nan"),
        loads=True,
        trains=True,
        meaning="a warning; the others are trained on",
        after=is_trained_and_finite,
    ),
    Row(
        "rewards that are all `None`",
        TRAINER,
        "All reward functions returned None",
        None,
        lambda w: reward("nothing"),
        loads=True,
        trains=True,
        meaning="TRL's warning; not scored, nothing is learnt",
        after=is_untrained,
    ),
    Row(
        "an infinite reward",
        SCRIPT,
        r"'infinite' returned inf \(float\) for completion 31: it must be a finite number .*go on from it with",
        4,
        lambda w: reward("infinite"),
        loads=True,
        trains=True,
    ),
    Row(
        "an infinite reward",
        TRAINER,
        "The reward function 'infinite' returned inf",
        ValueError,
        lambda w: reward("infinite"),
        loads=True,
        trains=True,
    ),
    Row(
        "too few rewards",
        SCRIPT,
        "The reward function 'short' returned 31 rewards, but 32 were expected",
        4,
        lambda w: reward("short"),
        loads=True,
        trains=True,
    ),
    Row(
        "too few rewards",
        TRAINER,
        "The reward function 'short' returned 31 rewards, but 32 were expected",
        ValueError,
        lambda w: reward("short"),
        loads=True,
        trains=True,
    ),
    Row(
        "one reward, and no list",
        SCRIPT,
        r"The reward function 'a_number' returned 1.0 \(float\): it must return a list with one number for each",
        4,
        lambda w: reward("a_number"),
        loads=True,
        trains=True,
    ),
    Row(
        "rewards that are text",
        SCRIPT,
        r"The reward function 'words' returned 'good' \(str\) for completion 0: it must be a number",
        4,
        lambda w: reward("words"),
        loads=True,
        trains=True,
    ),
    Row(
        "rewards that are text",
        TRAINER,
        "The reward function 'words' returned 'good'",
        ValueError,
        lambda w: reward("words"),
        loads=True,
        trains=True,
    ),
    Row(
        "a reward function that raises",
        SCRIPT,
        "the reward function 'dividing_by_zero' raised ZeroDivisionError: division by zero. The last good checkpoint",
        4,
        lambda w: reward("dividing_by_zero"),
        loads=True,
        trains=True,
    ),
    Row(
        "a reward function that raises",
        TRAINER,
        "division by zero",
        ZeroDivisionError,
        lambda w: reward("dividing_by_zero"),
        loads=True,
        trains=True,
    ),
    Row(
        "a reward function that hangs",
        SCRIPT,
        r"The reward function 'waiting' took longer than 0.5 seconds .*`reward_timeout`.*go on from it with",
        4,
        lambda w: reward("waiting") | {"reward_timeout": 0.5},
        loads=True,
        trains=True,
    ),
    Row(
        "a reward function that hangs",
        TRAINER,
        "The reward function 'waiting' took longer than 0.5 seconds",
        TimeoutError,
        lambda w: reward("waiting") | {"reward_timeout": 0.5},
        loads=True,
        trains=True,
    ),
    Row(
        "an async reward function that hangs",
        SCRIPT,
        "The reward function 'waiting_async' took longer than 0.5 seconds",
        4,
        lambda w: reward("waiting_async") | {"reward_timeout": 0.5},
        loads=True,
        trains=True,
    ),
    Row(
        "a `reward_timeout` that is no time",
        SCRIPT,
        "`reward_timeout` must be a number of seconds above 0, got 0.0",
        2,
        lambda w: {"reward_timeout": 0},
    ),
]
GROUPS = [
    Row(
        "a group size that does not divide the rollout batch",
        SCRIPT,
        r"generation_batch_size \(32\) must be divisible by num_generations \(5\)",
        2,
        lambda w: {"num_generations": 5},
    ),
    Row(
        "a group size that does not divide the rollout batch",
        TRAINER,
        r"generation_batch_size \(32\) must be divisible by num_generations \(5\)",
        ValueError,
        lambda w: {"num_generations": 5},
    ),
    Row(
        "a group size that does not divide the evaluation's batch",
        TRAINER,
        "must be divisible by the number of generations used for evaluation",
        ValueError,
        lambda w: {"num_generations_eval": 3, "eval_strategy": "steps", "eval_steps": 2},
    ),
    Row(
        "group size 1",
        SCRIPT,
        "`num_generations=1` is refused: the advantage of a completion is against the others of its group",
        2,
        lambda w: {"num_generations": 1},
    ),
    Row(
        "group size 0",
        TRAINER,
        "`num_generations` must be a whole number, at least 1, got 0",
        ValueError,
        lambda w: {"num_generations": 0},
    ),
]
CONFIGURATION = [
    Row(
        "YAML with a misspelt key",
        SCRIPT,
        "`learning_rat` is not an option, did you mean `learning_rate`?",
        2,
        lambda w: {"yaml": "learning_rat: 0.1"},
    ),
    Row(
        "YAML with a value of another type",
        SCRIPT,
        "num_generations.*: invalid int value: 'four'",
        2,
        lambda w: {"yaml": "num_generations: four"},
    ),
    Row(
        "YAML with a list for a single value",
        SCRIPT,
        r"`num_generations: \[4\]` is a list, and `num_generations` takes one value",
        2,
        lambda w: {"yaml": "num_generations: [4]"},
    ),
    Row(
        "YAML with tabs",
        SCRIPT,
        r"found character '\\t' that cannot start any token",
        2,
        lambda w: {"yaml": "epsilon: 0.1\n\tbeta: 0\n"},
    ),
    Row(
        "YAML that is no mapping",
        SCRIPT,
        "must contain a YAML mapping",
        2,
        lambda w: {"yaml": "- 1"},
    ),
    Row(
        "an empty file for YAML",
        SCRIPT,
        "must contain a YAML mapping",
        2,
        lambda w: {"yaml": ""},
    ),
    Row(
        "a binary file for YAML",
        SCRIPT,
        "can't decode byte|unacceptable character",
        2,
        lambda w: {"yaml": bytes(range(256))},
    ),
    Row(
        "a folder for YAML",
        SCRIPT,
        "Is a directory",
        2,
        lambda w: {"config": str(w.folder)},
    ),
    Row(
        "`--config` without a path",
        SCRIPT,
        "`--config` needs the path of a YAML file",
        2,
        lambda w: {"config": None},
    ),
    Row(
        "YAML that would run code",
        SCRIPT,
        "could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.mkdir'",
        2,
        lambda w: {"yaml": f"run_name: !!python/object/apply:os.mkdir ['{w.folder / 'RAN'}']"},
        meaning="nothing is run",
    ),
]
MODELS = [
    Row(
        "a model that is not there",
        SCRIPT,
        "The model 'no/such' or a reward model cannot be loaded",
        2,
        lambda w: {"model": "no/such"},
    ),
    Row(
        "a model folder without weights",
        SCRIPT,
        "no file named model.safetensors",
        2,
        lambda w: {"model": w.broken_model(remove=("model.safetensors",))},
    ),
    Row(
        "a model folder whose weights are cut off",
        SCRIPT,
        r"model.safetensors is cut off or damaged \(.*\): copy the model again",
        2,
        lambda w: {"model": w.broken_model(cut=("model.safetensors",))},
    ),
    Row(
        "a model folder whose weights are cut off",
        TRAINER,
        "model.safetensors is cut off or damaged",
        ValueError,
        lambda w: {"model": w.broken_model(cut=("model.safetensors",))},
    ),
    Row(
        "a model folder that lacks one of several weight files",
        SCRIPT,
        "model-00002-of-.*.safetensors is not there, and the model's index names it",
        2,
        lambda w: {"model": shards(w)},
    ),
    Row(
        "a config.json that is no JSON",
        SCRIPT,
        "config file at '.*config.json' is not a valid JSON file",
        2,
        lambda w: {"model": w.broken_model(change={"config.json": "{"})},
    ),
    Row(
        "a config.json that names no architecture",
        SCRIPT,
        "has no `architectures`",
        2,
        lambda w: {"model": w.broken_model(change={"config.json": '{"model_type": "qwen3"}'})},
    ),
    Row(
        "a tokenizer.json that is cut off",
        SCRIPT,
        "The tokenizer of '.*' cannot be loaded: ",
        2,
        lambda w: {"model": w.broken_model(cut=("tokenizer.json",))},
    ),
    Row(
        "a tokenizer without `pad_token`",
        TRAINER,
        "",
        None,
        lambda w: {"model": w.model(w.small_tokenizer(pad_token=None))},
        loads=True,
        trains=True,
        meaning="pads with `eos_token`, as TRL does",
        after=is_trained_and_finite,
    ),
    Row(
        "a tokenizer without `eos_token`",
        SCRIPT,
        "The tokenizer has no `eos_token`: no completion would ever end",
        2,
        lambda w: {"model": w.model(w.small_tokenizer(eos_token=None))},
    ),
    Row(
        "a tokenizer without `eos_token`",
        TRAINER,
        "The tokenizer has no `eos_token`: no completion would ever end",
        ValueError,
        lambda w: {"processing_class": w.small_tokenizer(eos_token=None, pad_token=None)},
    ),
    Row(
        "a model with a smaller vocabulary than the tokenizer's",
        SCRIPT,
        "The tokenizer has a vocabulary of 107 tokens, and the model has embeddings for 100 tokens",
        2,
        lambda w: {"model": w.model(vocab_size=100)},
    ),
    Row(
        "a model with a smaller vocabulary than the tokenizer's",
        TRAINER,
        "The tokenizer has a vocabulary of 107 tokens, and the model has embeddings for 100 tokens",
        ValueError,
        lambda w: {"model": make_model(w.tokenizer, vocab_size=100), "processing_class": w.tokenizer},
    ),
    Row(
        "a tokenizer with an added token beyond the model's vocabulary",
        TRAINER,
        "",
        None,
        lambda w: {"processing_class": extended_tokenizer()},
        loads=True,
        trains=True,
        meaning="trains, as long as no prompt has it: some models of text alone come with a token for images",
        after=is_trained_and_finite,
    ),
    Row(
        "a prompt with such a token",
        TRAINER,
        "Row 0 of `train_dataset`: A prompt has the token 107, and the model's vocabulary ends at 106",
        ValueError,
        lambda w: {"processing_class": extended_tokenizer(), "dataset": prompts(*["<image>"] * 8)},
    ),
]
MACHINE = [
    Row(
        "bf16 where there is no GPU",
        SCRIPT,
        "Your setup doesn't support bf16/gpu. You need to assign use_cpu",
        2,
        lambda w: {"bf16": True, "use_cpu": False},
    ),
    Row(
        "fp16 on the CPU",
        SCRIPT,
        "`fp16=True` needs a GPU, and this run is on the CPU",
        2,
        lambda w: {"fp16": True},
    ),
    Row(
        "fp16 on the CPU",
        TRAINER,
        "`fp16=True` needs a GPU, and this run is on the CPU",
        ValueError,
        lambda w: {"fp16": True},
    ),
    Row(
        "a tracker that is not known",
        SCRIPT,
        "wandbb is not supported, only",
        2,
        lambda w: {"report_to": "wandbb"},
    ),
]
# In a process of its own, where these packages cannot be found.
HIDDEN = ("bitsandbytes", "deepspeed", "vllm", "wandb")
NOT_INSTALLED = [
    Row(
        "deepspeed configured and not installed",
        SCRIPT,
        "`deepspeed` is set, and DeepSpeed is not installed: `pip install deepspeed`",
        2,
        lambda w: {"deepspeed": str(ROOT / "configs" / "deepspeed" / "zero3.json")},
    ),
    Row(
        "wandb configured and not installed",
        SCRIPT,
        "`report_to` names wandb, which is not installed: install it",
        2,
        lambda w: {"report_to": "wandb"},
    ),
    Row(
        "an optimizer of bitsandbytes, which is not installed",
        SCRIPT,
        "`optim='paged_adamw_8bit'` needs bitsandbytes, which is not installed",
        2,
        lambda w: {"optim": "paged_adamw_8bit"},
    ),
    Row(
        "`load_in_4bit`, and bitsandbytes not installed",
        SCRIPT,
        "4-bit quantization requires bitsandbytes: `pip install",
        2,
        lambda w: {"load_in_4bit": True, "use_peft": True},
    ),
    Row(
        "`use_vllm`, and vLLM not installed",
        SCRIPT,
        "`use_vllm=True` needs vLLM, which is not installed",
        2,
        lambda w: {"use_vllm": True},
    ),
]
TABLE = {
    "Data": DATA,
    "Rewards": REWARDS,
    "Groups": GROUPS,
    "Configuration": CONFIGURATION,
    "Model and tokenizer": MODELS,
    "Machine and packages": MACHINE + NOT_INSTALLED,
}
TRAINER_ARGUMENTS = set(inspect.signature(GSPOTrainer.__init__).parameters)


@pytest.fixture(scope="module")
def earlier_run(model_path, tmp_path_factory):
    """An `output_dir` with a checkpoint at the end of a rollout batch, as `train.py` left it."""
    folder = tmp_path_factory.mktemp("earlier")
    data = write_jsonl(folder / "data.jsonl", sorting_rows(32, seed=0))
    options = {"save_steps": 4, "reward_funcs": "tests.varied_reward.share_of_digits"}
    argv = arguments(TINY | options | {"dataset_name": data, "model_name_or_path": model_path})
    with signals_restored():
        assert train.main([*argv, "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


class signals_restored:
    """`train.py` ends with its process, and so leaves its handlers where a run is broken off."""

    def __enter__(self):
        self.handlers = {
            number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
        }

    def __exit__(self, *_):
        left = signal.getsignal(signal.SIGALRM)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        assert left == self.handlers[signal.SIGALRM] and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def arguments(options: dict[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        value = [json.dumps(value)] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(part).lower() if isinstance(part, bool) else str(part) for part in value)]
    return words


def files_of(folder: Path) -> dict[str, tuple]:
    """Content and time of each file."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def command(row: Row, world: World, output: Path) -> list[str]:
    """The command line of a row of the script."""
    made = row.make(world)
    start = ["--output_dir", str(output), "--overwrite_output_dir"]
    if "yaml" in made:
        return ["--config", world.file("config.yaml", made["yaml"]), *start]
    if "config" in made:
        return [*start, "--config", *([] if made["config"] is None else [made["config"]])]
    options = TINY | {"reward_funcs": "tests.varied_reward.share_of_digits"}
    options |= {"dataset_name": made.pop("dataset", None) or world.jsonl(sorting_rows(32, seed=0), "good.jsonl")}
    options |= {"model_name_or_path": made.pop("model", world.model_path)}
    if row.trains:
        # From the checkpoint at step 4 on: the fault shows in the rollout batch after it.
        start[-1:] = ["--resume"]
        options |= {"max_steps": 8, "save_steps": 100}
    return [*arguments(options | made), *start]


def run_script(row, world, output, capsys, caplog):
    returned = train.main(command(row, world, output))
    printed = capsys.readouterr()
    if row.ends == 2:
        # One line, after the progress bars of the data.
        assert re.search(r"(\A|\n)train\.py: .*\n\Z", printed.err, re.S) and "Traceback" not in printed.err
    assert returned == row.ends, printed.err
    return printed.out + printed.err + caplog.text


def run_trainer(row, world, output, capsys, caplog):
    made = {"reward_funcs": "tests.varied_reward.share_of_digits"} | row.make(world)
    made["train_dataset"] = made.pop("dataset", Dataset.from_list(sorting_rows(32, seed=0)))
    made.setdefault("model", world.model_path)
    if isinstance(made["reward_funcs"], str):
        made["reward_funcs"] = train.load_reward(made["reward_funcs"])
    options = {name: made.pop(name) for name in list(made) if name not in TRAINER_ARGUMENTS}
    try:
        args = GSPOConfig(str(output), save_strategy="no", disable_tqdm=True, **(TINY | options))
        trainer = GSPOTrainer(args=args, **made)
        trainer.train()
    except Exception as error:
        assert row.ends is not None and type(error) is row.ends, repr(error)
        return str(error) + caplog.text
    assert row.ends is None, "nothing was raised"
    assert trainer.state.global_step == args.max_steps
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    if row.after is not None:
        row.after(trainer)
    return caplog.text


@pytest.fixture
def loaded(monkeypatch):
    """The models that were asked for, with their weights."""
    names = []
    create = trl.trainer.grpo_trainer.create_model_from_path

    def spy(name, *args, **kwargs):
        model = create(name, *args, **kwargs)
        names.append(name)
        return model

    monkeypatch.setattr(trl.trainer.grpo_trainer, "create_model_from_path", spy)
    return names


@pytest.mark.parametrize(
    "row", [row for name, rows in TABLE.items() for row in rows if row not in NOT_INSTALLED], ids=lambda row: row.id
)
def test_bad_input(row, model_path, tokenizer, earlier_run, loaded, capsys, caplog, tmp_path):
    world = World(tmp_path, model_path, tokenizer)
    output = tmp_path / "run"
    shutil.copytree(earlier_run, output)
    before = files_of(output)
    caplog.set_level(logging.INFO)
    logging.getLogger("trl_gspo").propagate = True
    start = time.monotonic()
    with signals_restored():
        said = (run_script if row.door == SCRIPT else run_trainer)(row, world, output, capsys, caplog)
    assert time.monotonic() - start < row.seconds
    assert re.search(row.says, said, re.S), said
    assert bool(loaded) == row.loads
    after = files_of(output)
    if not row.trains:
        assert after == before
    assert {name: content for name, content in after.items() if name in before and "checkpoint-" in name} == {
        name: content for name, content in before.items() if "checkpoint-" in name
    }
    assert not (tmp_path / "RAN").exists()


HIDING = """
import importlib.machinery, json, sys, time

hidden = sys.argv[1].split(",")
Finder = importlib.machinery.PathFinder


class Hiding:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in hidden else Finder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(context):
        return [] if context.name in hidden else Finder.find_distributions(context)


sys.meta_path[sys.meta_path.index(Finder)] = Hiding
sys.path.insert(0, sys.argv[2])
import train, trl.trainer.grpo_trainer

loaded = []
create = trl.trainer.grpo_trainer.create_model_from_path
trl.trainer.grpo_trainer.create_model_from_path = lambda *a, **k: (create(*a, **k), loaded.append(a))[0]
for line in sys.stdin:
    start = time.monotonic()
    returned = train.main(json.loads(line))
    print("RETURNED", json.dumps([returned, time.monotonic() - start, bool(loaded)]), file=sys.stderr, flush=True)
"""


def test_packages_that_are_not_installed(model_path, tokenizer, earlier_run, tmp_path):
    worlds = [World(tmp_path / str(index), model_path, tokenizer) for index in range(len(NOT_INSTALLED))]
    output = tmp_path / "run"
    shutil.copytree(earlier_run, output)
    before = files_of(output)
    commands = [command(row, world, output) for row, world in zip(NOT_INSTALLED, worlds, strict=True)]
    run = subprocess.run(
        [sys.executable, "-c", HIDING, ",".join(HIDDEN), str(ROOT / "scripts")],
        input="".join(json.dumps(words) + "\n" for words in commands),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    parts = re.split(r"RETURNED (.*)\n", run.stderr)
    assert len(parts) == 2 * len(NOT_INSTALLED) + 1, run.stderr
    for row, said, ended in zip(NOT_INSTALLED, parts[::2], parts[1::2], strict=False):
        returned, seconds, has_loaded = json.loads(ended)
        assert (returned, has_loaded) == (row.ends, row.loads), said
        assert seconds < row.seconds
        line = said.strip().splitlines()[-1]
        assert re.search(row.says, said) and "train.py: " in said, said
        assert "Traceback" not in said, line
    assert files_of(output) == before


def documented() -> str:
    """The table of the docs."""
    lines = []
    for title, rows in TABLE.items():
        lines += [f"### {title}", "", "| given | to | what happens |", "| --- | --- | --- |"]
        for row in rows:
            if row.ends is None:
                ends = ""
            else:
                ends = f"exit code {row.ends}" if row.door == SCRIPT else f"`{row.ends.__name__}`"
            when = "" if row.ends is None or row.trains else "before a model is loaded"
            says = re.sub(r"\\(.)", r"\1", row.says.split("|")[0]).replace(".*", " ... ").strip()
            message = f"“{' '.join(says.split())}”" if row.says else ""
            what = "; ".join(filter(None, [", ".join(filter(None, [ends, when])), message, row.meaning]))
            lines.append(f"| {row.given} | `{row.door}` | {what} |")
        lines.append("")
    return "\n".join(lines).strip()


def test_the_docs_have_the_table():
    before, table = DOCS.read_text().split("<!-- tests/test_bad_input.py: begin -->\n")
    assert table.split("\n<!-- end -->")[0] == documented()


def test_every_row_has_a_name_of_its_own():
    ids = [row.id for rows in TABLE.values() for row in rows]
    assert len(ids) == len(set(ids))


if __name__ == "__main__":
    print(documented())
