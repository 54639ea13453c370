"""
Trains a model with GSPO.

    accelerate launch scripts/train.py --config configs/qwen7b.yaml
    accelerate launch scripts/train.py --config configs/qwen7b.yaml --learning_rate 5e-7 --output_dir outputs/slow
    accelerate launch scripts/train.py --config configs/qwen7b.yaml --resume
    python scripts/train.py --config configs/qwen7b.yaml --dry_run --dry_run_processes 8
    accelerate launch scripts/train.py --task gsm8k --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct

Any field of the script's own arguments (below), of `GSPOConfig` and of TRL's `ModelConfig` can stand in the YAML file
and on the command line, where it wins. Ctrl-C and SIGTERM save a checkpoint at the end of the step; `--resume` goes on
from it.

The health watch (`trl_gspo.health`) warns of what goes wrong, and stops a run that is past saving. Nothing is saved
after the damage: the output says which checkpoint is the last good one, and how to go on from it. `--health_watch
false` turns it off; its bounds are the options `health_...`.

Exit codes of this script: 0 done; 2 bad input, named in one line; 3 stopped by the health watch, or ended by weights
that are not finite; 4 a reward function raised, took too long, or returned what is no reward; 5 a checkpoint or the
model could not be saved, for a full disk most often, and those saved before are whole; 130 stopped by Ctrl-C, 143 by
SIGTERM, both with a checkpoint; 1 any other error. Launchers have exit codes of their own (1 for all of ours but 0),
and torchrun, which `accelerate launch` uses for several processes, kills the workers 30 seconds after it was told to
stop. Where a step takes longer than that, signal a worker instead: all of them stop together. docs/resume.md says what
a resumed run takes up.
"""

import argparse
import datetime
import difflib
import importlib.util
import json
import logging
import os
import pickle
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, ProgressCallback, TrainerCallback
from trl import GRPOConfig, ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_gspo import GSPOConfig, GSPOTrainer
from trl_gspo.callbacks import RewardProgressCallback, StopOnSignalCallback
from trl_gspo.checkpoints import (
    SavingError,
    alarms_of,
    fault_of,
    is_complete,
    is_disk_full,
    last_good,
    list_checkpoints,
    save_model,
    write_json,
)
from trl_gspo.checks import check_deepspeed_checkpoint
from trl_gspo.cost import describe, run_cost
from trl_gspo.curves import CurvesCallback
from trl_gspo.health import HealthBounds, HealthWatchCallback, non_finite_weight, reward_that_raised
from trl_gspo.placement import check_memory, connect_deepspeed, start_alone
from trl_gspo.rewards import check_columns, load_reward
from trl_gspo.saving import check_saving, merge_adapter
from trl_gspo.secrets import is_secret, without_secret_words
from trl_gspo.tasks import DataArguments, columns_of, defaults_of, find_task, load_task, scope_rewards


# For trackers to send the last they have.
SECONDS_TO_LEAVE = 60.0


@dataclass
class ScriptArguments(DataArguments):
    """
    Arguments of this script: data and rewards, as [`~trl_gspo.tasks.DataArguments`] has them, and how to start.

    Parameters:
        resume (`bool`, *optional*, defaults to `False`):
            Whether to go on from the last checkpoint in `output_dir`; without one the run starts from the beginning.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to start anew in an `output_dir` that holds checkpoints, and delete those.
        health_watch (`bool`, *optional*, defaults to `True`):
            Whether to warn of what goes wrong, and to stop a run that is past saving, by the bounds `health_...`.
        curves (`bool`, *optional*, defaults to `True`):
            Whether to keep `curves.png` in `output_dir` current, if matplotlib is installed.
        memory_check (`bool`, *optional*, defaults to `True`):
            Whether to refuse a run whose weights and optimizer cannot fit on the GPUs, before anything is loaded, and
            to warn of one whose rollouts or updates may not.
        merge_adapter (`bool`, *optional*, defaults to `False`):
            Whether to save the model with the adapter added to its weights, too, in `merged` in `output_dir`.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to print the effective configuration and what the run costs, and end. Reads the data, and loads no
            model. Without an accelerator it sets `use_cpu`, so that the configuration of a larger machine can be read.
        dry_run_processes (`int`, *optional*):
            Number of processes that `dry_run` counts for; those that it was launched with if not set.
    """

    resume: bool = field(
        default=False, metadata={"help": "Whether to go on from the last checkpoint in `output_dir`."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Whether to start anew in an `output_dir` that holds checkpoints, and delete those."},
    )
    health_watch: bool = field(
        default=True,
        metadata={"help": "Whether to warn of what goes wrong, and to stop a run that is past saving."},
    )
    curves: bool = field(
        default=True,
        metadata={"help": "Whether to keep `curves.png` in `output_dir` current, if matplotlib is installed."},
    )
    memory_check: bool = field(
        default=True, metadata={"help": "Whether to refuse a run that cannot fit on the GPUs, before it is loaded."}
    )
    merge_adapter: bool = field(
        default=False,
        metadata={"help": "Whether to save the adapter merged into its model, too, in `merged` in `output_dir`."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Whether to print the effective configuration and what the run costs, and end."},
    )
    dry_run_processes: int | None = field(
        default=None, metadata={"help": "Number of processes that `dry_run` counts for, if not those of this launch."}
    )


class Parser(TrlParser):
    """TRL's parser, which also names the nearest known option for an unknown one, and checks the types in the YAML."""

    def __init__(self, starts: bool = False, script_type: type = ScriptArguments):
        self.starts = starts  # the training arguments start the process group: what it needs has to stand before
        super().__init__((script_type, GSPOConfig, ModelConfig, HealthBounds), allow_abbrev=False)

    def parse_args_and_config(self, args, **kwargs):
        self.given = self._given(args)
        task = self.given.get("task", (None,))[0]
        defaults = defaults_of(task, self.given)
        if self.given.get("dry_run", (False,))[0] and not torch.accelerator.is_available():
            defaults |= {} if "use_cpu" in self.given else {"use_cpu": True}
        self.set_defaults_with_config(**defaults)
        sources = {option: (value, f"task {task}") for option, value in find_task(task).options.items()}
        self.given = {option: sources[option] for option in defaults if option in sources} | self.given
        return super().parse_args_and_config(args, **kwargs)

    def _given(self, args: list[str]) -> dict[str, tuple]:
        """The options in the YAML file and on the command line, each with its value and the name of its source."""
        args, given = [word for word in args if word not in ("-h", "--help")], {}
        if "--config" in args[:-1]:
            index = args.index("--config")
            path = args[index + 1]
            args = args[:index] + args[index + 2 :]
            config = yaml.safe_load(Path(path).read_text())
            if isinstance(config, dict):  # TRL's parser complains of anything else
                given = {str(key): (value, path) for key, value in config.items() if key != "env"}
        defaults = {action: action.default for action in self._actions}
        for action in self._actions:
            action.default = argparse.SUPPRESS
        try:
            words = vars(super().parse_known_args(args)[0])
        finally:
            for action, default in defaults.items():
                action.default = default
        return given | {option: (value, "command line") for option, value in words.items()}

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            raise ValueError(self._unknown([word for word in unknown if word.startswith("-")] or unknown))
        if self.starts:
            start_alone(namespace.deepspeed, namespace.use_cpu)
        return namespace, unknown

    def error(self, message):
        # argparse would print the usage first: hundreds of options, with the message out of sight.
        raise ValueError(message)

    def set_defaults_with_config(self, **config):
        # Of two for a switch that is on by default, `--name` and `--no_name`, the first.
        actions = {action.dest: action for action in reversed(self._actions)}
        hints = {
            name: str(hint) for kind in self.dataclass_types for name, hint in typing.get_type_hints(kind).items()
        }
        unknown = [key for key in config if key not in actions]
        if unknown:
            raise ValueError(self._unknown(unknown))
        for key, value in config.items():
            action, hint = actions[key], hints.get(key, "")
            shown = "<hidden>" if is_secret(key) else repr(value)
            if value is None:
                if "None" not in hint and action.default is not None:
                    raise ValueError(f"`{key}` has no value: give one, or leave it out for {action.default!r}.")
            elif isinstance(value, (list, dict)) and type(value).__name__ not in hint:
                raise ValueError(f"`{key}: {shown}` is a {type(value).__name__}, and `{key}` takes one value.")
            elif action.nargs == "+":
                config[key] = [_converted(action, item) for item in (value if isinstance(value, list) else [value])]
            elif isinstance(value, bool) and action.type is str:
                # TRL reads `scale_rewards: false` as a boolean, and transformers `resume_from_checkpoint: true`.
                if key in ScriptArguments.__dataclass_fields__:
                    raise ValueError(
                        f"`{key}: {value}` is a boolean to YAML, and `{key}` takes text: put it in quotes."
                    )
            # argparse converts a default, and so complains about a wrong one, only where it is a string.
            elif isinstance(value, (int, float, datetime.date)):
                config[key] = str(value)
            elif not isinstance(value, (str, list, dict)):
                raise ValueError(f"`{key}: {shown}` is of type {type(value).__name__}, which no option takes.")
        return super().set_defaults_with_config(**config)

    def _unknown(self, words: list) -> str:
        known = sorted({action.dest for action in self._actions})
        messages = []
        for word in map(str, words):
            near = difflib.get_close_matches(word.lstrip("-").split("=")[0].replace("-", "_"), known, n=1)
            shown = word.split("=")[0] if near and is_secret(near[0]) else word
            messages.append(f"`{shown}` is not an option{f', did you mean `{near[0]}`?' if near else '.'}")
        return " ".join(messages)


def _converted(action: argparse.Action, item: Any) -> Any:
    """One of the values of a list in the YAML, as argparse converts it on the command line."""
    try:
        if isinstance(item, (str, int, float, datetime.date)):
            return action.type(str(item))
    except ValueError:
        pass
    raise ValueError(f"`{action.dest}` has {item!r} among its values, which is not of type {action.type.__name__}.")


def config_file(argv: list[str]) -> str | None:
    """The YAML file that is named on the command line."""
    words = [part for word in argv for part in word.split("=", 1)]
    return words[words.index("--config") + 1] if "--config" in words[:-1] else None


def parse(
    argv: list[str], starts: bool = False, script_type: type = ScriptArguments
) -> tuple[ScriptArguments, GSPOConfig, ModelConfig, HealthBounds]:
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if argv[-1:] == ["--config"]:
        raise ValueError("`--config` needs the path of a YAML file.")
    parser = Parser(starts, script_type)
    try:
        script_args, training_args, model_args, bounds = parser.parse_args_and_config(argv)
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        # Of YAML that is no mapping of names, or of a value that TRL and transformers compute with unchecked.
        raise ValueError(f"An option has a value that it cannot have: {type(error).__name__}: {error}.") from error
    script_args.given = parser.given
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is not set: give a folder or a hub id.")
    return script_args, training_args, model_args, bounds


def find_checkpoint(script_args: ScriptArguments, training_args: GSPOConfig) -> str | None:
    """The checkpoint to go on from, `None` to start anew. An earlier run's are never mixed with a new one's."""
    if str(training_args.resume_from_checkpoint).lower() in ("true", "false"):  # as other trainers' scripts have it
        script_args.resume = str(training_args.resume_from_checkpoint).lower() == "true"
        training_args.resume_from_checkpoint = None
    if training_args.resume_from_checkpoint is not None:
        if not os.path.isdir(training_args.resume_from_checkpoint):
            raise FileNotFoundError(f"`resume_from_checkpoint={training_args.resume_from_checkpoint}` is no folder.")
        fault = fault_of(training_args.resume_from_checkpoint)
        if fault is not None:
            raise ValueError(
                f"`resume_from_checkpoint={training_args.resume_from_checkpoint}` is not whole: {fault}. --resume in "
                "its place goes on from the last whole checkpoint in `output_dir`."
            )
        return training_args.resume_from_checkpoint
    output_dir = training_args.output_dir
    if os.path.isfile(output_dir):
        raise NotADirectoryError(f"`output_dir={output_dir}` is a file.")
    checkpoints = list_checkpoints(output_dir)
    if script_args.resume:
        good = last_good(checkpoints)
        for checkpoint in checkpoints[: checkpoints.index(good) if good else None]:
            alarms = ", ".join(alarms_of(checkpoint))
            note = f"was saved near an alarm ({alarms})" if alarms else f"is incomplete ({fault_of(checkpoint)})"
            print(f"{checkpoint} {note} and passed over.")
        if good is not None:
            return str(good)
        suspects = [checkpoint for checkpoint in checkpoints if is_complete(checkpoint)]
        if suspects:
            raise FileNotFoundError(
                f"`output_dir={output_dir}` holds no checkpoint from before the alarm. Go on from the oldest with "
                f"--resume_from_checkpoint {suspects[-1]} instead of --resume, or start anew with "
                "--overwrite_output_dir, which deletes the checkpoints there."
            )
        print(f"No checkpoint in {output_dir}: the run starts from the beginning.")
    elif checkpoints and not script_args.overwrite_output_dir:
        raise FileExistsError(
            f"`output_dir={output_dir}` holds {checkpoints[0].name} of an earlier run: go on with --resume, choose "
            "another --output_dir, or start anew with --overwrite_output_dir, which deletes the checkpoints there."
        )
    return None


def resume_command(argv: list[str], training_args: GSPOConfig, checkpoint: Path | None = None) -> str:
    """The command that goes on from `checkpoint`, by default the last good one, of the run that `argv` started."""
    words = ["accelerate", "launch", sys.argv[0], *without_secret_words(argv)]
    if checkpoint is not None or training_args.resume_from_checkpoint is not None:
        # Of two the last wins; `true` means the same as `--resume`.
        return shlex.join([*words, "--resume_from_checkpoint", str(checkpoint or "true")])
    return shlex.join(words if "--resume" in argv else [*words, "--resume"])


def advise(argv: list[str], training_args: GSPOConfig) -> str:
    """What to do after a run that broke."""
    checkpoints = [path for path in list_checkpoints(training_args.output_dir) if is_complete(path)]
    good = last_good(checkpoints)
    if good is not None:
        command = resume_command(argv, training_args)
        return f"The last good checkpoint is {good}. Once the cause is mended, go on from it with: {command}"
    if not checkpoints:
        return "No checkpoint was saved before it. Once the cause is mended, start anew."
    oldest = checkpoints[-1]
    return (
        f"No checkpoint was saved long enough before it to be trusted. Once the cause is mended, start anew, or try "
        f"{oldest}, which may be damaged: {resume_command(argv, training_args, oldest)}"
    )


def explain(error: Exception, trainer: GSPOTrainer, rewards: list) -> tuple[int, str]:
    """Exit code and cause of an error that ended the training; 1 and no cause where it is none that we know."""
    if isinstance(error, SavingError):
        return 5, str(error)
    culprit = reward_that_raised(error, rewards)
    if culprit is not None:
        return 4, f"{culprit} raised {type(error).__name__}: {error}".rstrip(".") + "."
    if is_disk_full(error):  # of a table of completions, say
        return 5, f"the disk, a quota or a file is full: {error}".rstrip(".") + "."
    if "CUDA error" in str(error):  # nothing on the GPU can be read any more
        return 1, "the GPU reported an error. While sampling, a device-side assert means that the weights hold NaN."
    weight = non_finite_weight(trainer.model)
    if weight is None:
        return 1, ""
    logged = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    since = f"since the last log, at step {logged[-1]}" if logged else "since before the first log"
    return 3, f"the weights hold NaN or infinity ({weight}), {since}. Likely cause: too high a learning rate."


def is_finished(checkpoint: str, training_args: GSPOConfig) -> bool:
    """Whether a checkpoint is the end of the run it belongs to, at the steps that are asked for now."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    wanted = training_args.max_steps if training_args.max_steps > 0 else state["max_steps"]
    return state["global_step"] >= wanted


def has_model_of(checkpoint: str, output_dir: str) -> bool:
    """Whether the run was ended at this checkpoint, and its model saved since: `summary.json` is the last file."""
    state, summary = Path(checkpoint) / "trainer_state.json", Path(output_dir) / "summary.json"
    if not summary.is_file() or summary.stat().st_mtime < state.stat().st_mtime:
        return False
    try:
        return json.loads(summary.read_text())["steps"] == json.loads(state.read_text())["global_step"]
    except (ValueError, KeyError):
        return False


def load_data(script_args: ScriptArguments, training_args: GSPOConfig):
    if script_args.dataset_streaming and training_args.max_steps <= 0:
        raise ValueError("`dataset_streaming` needs `max_steps`: a stream has no length.")
    return load_task(script_args, evaluation=training_args.eval_strategy != "no")


def load_rewards(script_args: ScriptArguments, training_args: GSPOConfig) -> list:
    """The rewards of `reward_funcs`, those of a mixture kept to their tasks."""
    rewards = [
        load_reward(
            name,
            (script_args.reward_kwargs or {}).get(name),
            training_args.max_completion_length,
            script_args.allow_code_execution,
        )
        for name in script_args.reward_funcs
    ]
    return scope_rewards(script_args, rewards)


def print_task(script_args: ScriptArguments) -> None:
    """Says what a named task stands for, and what of it was chosen otherwise."""
    if script_args.task is None or os.environ.get("RANK", "0") != "0":
        return
    own = f"task {script_args.task}"
    kept, changed = [], []
    for name, value in find_task(script_args.task).options.items():
        chosen, source = script_args.given.get(name, (None, "left out, with its data set"))
        (kept if source == own else changed).append(
            f"{name}={value!r}" if source == own else f"{name}={chosen!r} ({source})"
        )
    print(f"task        {script_args.task}: {', '.join(kept) or 'nothing of its own'}")
    if changed:
        print(f"            not the task's: {', '.join(changed)}")


def print_dry_run(script_args, training_args, model_args, bounds, train_dataset, eval_dataset, why_not: str) -> None:
    """The effective configuration, with the source of each value, and what the run costs."""
    cost = run_cost(
        training_args,
        *(len(rows) if isinstance(rows, Dataset) else None for rows in (train_dataset, eval_dataset)),
        script_args.dry_run_processes,
        "generation_batch_size" in script_args.given,
    )
    if os.environ.get("RANK", "0") != "0":
        return
    print("Effective configuration: what differs from the defaults, and where it is from")
    for name, value, source in effective_options(script_args.given, script_args, training_args, model_args, bounds):
        print(f"  {name:32}{show(name, value):40}  {source}")
    print("Cost")
    train_rows = len(train_dataset) if isinstance(train_dataset, Dataset) else None
    lengths = prompt_lengths(model_args, training_args, train_dataset) if train_rows else []
    print("\n".join(describe(cost, training_args, train_rows, lengths)))
    if why_not:
        print(f"  {'data':16}not read: {why_not}")


def effective_options(given: dict[str, tuple], *parsed) -> Iterator[tuple]:
    """Name, value and source of each option that differs from its default, or whose default differs from TRL's."""
    for arguments in parsed:
        for spec in fields(arguments):
            if not spec.init or spec.name in ("dry_run", "dry_run_processes"):
                continue
            value = getattr(arguments, spec.name)
            default = spec.default if spec.default is not MISSING else None
            theirs = GRPOConfig.__dataclass_fields__.get(spec.name, spec) if arguments is parsed[1] else spec
            if spec.name in given:
                if value != default or value != theirs.default:
                    yield spec.name, value, given[spec.name][1]
            elif theirs is not spec and default != theirs.default and value == default:
                yield spec.name, value, f"default of GSPOConfig (TRL: {theirs.default!r})"
            elif spec.name in ("steps_per_generation", "use_cpu") and value != default:
                yield (
                    spec.name,
                    value,
                    "four optimizer steps a rollout" if spec.name != "use_cpu" else "no accelerator",
                )


def show(name: str, value) -> str:
    """A value as text, without what is nobody's business."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(str(key), item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(show(name, item) for item in value) + "]"
    if is_secret(name) and value is not None:
        return "(hidden)"
    text = repr(getattr(value, "value", value))
    return re.sub(r"\b(hf|sk)[_-]\w{8,}", "(hidden)", re.sub(r"//[^/@\s]+@", "//(hidden)@", text))


def prompt_lengths(model_args: ModelConfig, training_args: GSPOConfig, rows: Dataset, count: int = 256) -> list[int]:
    """Tokens of some prompts; none where the tokenizer is not at hand."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    except (OSError, ValueError):
        return []
    prompts = rows.shuffle(seed=0).select(range(min(count, len(rows))))["prompt"]
    options = {"tokenize": False, "add_generation_prompt": True} | (training_args.chat_template_kwargs or {})
    texts = [p if isinstance(p, str) else tokenizer.apply_chat_template(p, **options) for p in prompts]
    return [len(ids) for ids in tokenizer(texts)["input_ids"]]


def summarize(log_history: list[dict], rollout_steps: int, **facts) -> dict:
    """
    Reward and clip fraction at the start and the end of a run, and the tokens seen, beside `facts`.

    `rollout_steps` is the number of optimizer steps that a rollout batch lasts. The clip fraction is the mean over the
    first and the last so many: in the first step of a rollout it is 0 by definition, and it rises from step to step.
    """
    logs = [entry for entry in log_history if "reward" in entry]
    summary = facts | {"tokens": int(logs[-1]["num_tokens"]) if logs else 0}
    for name, entries in (
        ("reward", logs),
        ("eval_reward", [entry for entry in log_history if "eval_reward" in entry]),
    ):
        summary[f"{name}_start"], summary[f"{name}_end"] = (
            (entries[0][name], entries[-1][name]) if entries else (None, None)
        )
    key = "gspo/clip_fraction/sequences"
    clipped = [(entry["step"], entry[key]) for entry in log_history if entry.get(key) is not None]
    first, last = (clipped[0][0], clipped[-1][0]) if clipped else (0, 0)
    for name, values in (
        ("start", [value for step, value in clipped if step < first + rollout_steps]),
        ("end", [value for step, value in clipped if step > last - rollout_steps]),
    ):
        summary[f"clip_fraction_{name}"] = sum(values) / len(values) if values else None
    return summary


class ResumedLearningRateCallback(TrainerCallback):
    """Lets a resumed run take the learning rate that is asked for: a checkpoint's scheduler brings back its own."""

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps it
        if state.global_step == 0 or not isinstance(scheduler, LambdaLR):
            return
        before = scheduler.base_lrs
        if set(before) == {args.learning_rate} or len(set(before)) > 1:
            return
        scheduler.base_lrs = [args.learning_rate] * len(before)
        groups = zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True)
        scheduler._last_lr = [args.learning_rate * factor(scheduler.last_epoch) for _, factor in groups]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["initial_lr"], group["lr"] = args.learning_rate, rate
        if state.is_world_process_zero:
            print(f"learning_rate: {before[0]:g} in the checkpoint, {args.learning_rate:g} from here on.")


def make_trainer(training_args, model_args, rewards, train_dataset, eval_dataset, callbacks) -> GSPOTrainer:
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    try:
        trainer = GSPOTrainer(
            model=model_args.model_name_or_path,
            reward_funcs=rewards,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except (
        OSError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:  # transformers' own does not always name what it looked for
        raise OSError(
            f"The model {model_args.model_name_or_path!r} or a reward model cannot be loaded: {error}"
        ) from error
    if not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(RewardProgressCallback)
    return trainer


def main(argv: list[str]) -> int:
    started = time.time()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_gspo").setLevel(logging.INFO)  # what goes through the model, and why
    try:
        script_args, training_args, model_args, bounds = parse(argv, starts=True)
        sys.argv[1:] = without_secret_words(sys.argv[1:])  # which Weights & Biases uploads
        check_saving(training_args, model_args, script_args.merge_adapter)
        if script_args.memory_check and not script_args.dry_run:
            check_memory(training_args, model_args, config_file(argv))
        connect_deepspeed(training_args)
        checkpoint = None if script_args.dry_run else find_checkpoint(script_args, training_args)
        print_task(script_args)
        rewards, why_not = load_rewards(script_args, training_args), ""
        try:
            train_dataset, eval_dataset = load_data(script_args, training_args)
        except (ConnectionError, DatasetNotFoundError) as error:  # a hub that is out of reach
            if not script_args.dry_run:
                raise
            train_dataset, eval_dataset, why_not = None, None, str(error)
        for rows in filter(None, (train_dataset, eval_dataset)):
            for reward in rewards:
                check_columns(reward, columns_of(rows))
        if script_args.dry_run:
            parsed = (script_args, training_args, model_args, bounds)
            print_dry_run(*parsed, train_dataset, eval_dataset, why_not)
            return 0
        if checkpoint is not None and is_finished(checkpoint, training_args):
            is_merged = not script_args.merge_adapter or Path(training_args.output_dir, "merged").is_dir()
            if is_merged and has_model_of(checkpoint, training_args.output_dir):
                print(f"{checkpoint} is the end of this run. To train on, set a larger `max_steps`.")
                return 0
            print(f"{checkpoint} is the end of this run, whose model was not saved to its end: that is done now.")
        stop, health = StopOnSignalCallback(), HealthWatchCallback(bounds)
        # The watch after the signals: it has the last word on a checkpoint.
        callbacks = [ResumedLearningRateCallback(), stop, *([health] if script_args.health_watch else [])]
        if script_args.curves and importlib.util.find_spec("matplotlib") is not None:
            callbacks.append(CurvesCallback())
        trainer = make_trainer(training_args, model_args, rewards, train_dataset, eval_dataset, callbacks)
        if checkpoint is not None and trainer.is_deepspeed_enabled:
            check_deepspeed_checkpoint(checkpoint)
    except (ValueError, OSError, ImportError, yaml.YAMLError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: {error}", file=sys.stderr)
        return 2

    output_dir = Path(training_args.output_dir)
    if script_args.overwrite_output_dir and checkpoint is None:
        if trainer.is_world_process_zero():
            for old in list_checkpoints(training_args.output_dir):
                shutil.rmtree(old)
        trainer.accelerator.wait_for_everyone()
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except Exception as error:
        return fail(error, trainer, rewards, health, argv)
    if health.stopped is not None:
        trainer.accelerator.print(
            f"Stopped by the health watch at step {trainer.state.global_step}: {health.stopped}. "
            f"{advise(argv, training_args)}"
        )
        finish(trainer)
        return 3
    if stop.signum is not None:
        trainer.accelerator.print(
            f"Stopped by {signal.Signals(stop.signum).name} at step {trainer.state.global_step}, saved in "
            f"{output_dir / f'checkpoint-{trainer.state.global_step}'}. Go on with: "
            f"{resume_command(argv, training_args)}"
        )
        finish(trainer)
        return 128 + stop.signum

    # A local path means nothing to a reader of the card, and is nobody's business.
    dataset_name = script_args.dataset_name
    dataset_name = None if dataset_name is None or os.path.exists(dataset_name) else dataset_name
    try:
        save_model(
            output_dir,
            lambda folder: trainer.save_model(folder, _internal_call=True),
            trainer.accelerator,
            training_args.should_save,
        )
        trainer.save_state()
        trainer.create_model_card(model_name=output_dir.name, dataset_name=dataset_name)
        if trainer.is_world_process_zero():
            args = training_args
            summary = summarize(
                trainer.state.log_history,
                max(args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps, 1),
                model=model_args.model_name_or_path,
                output_dir=str(output_dir),
                steps=trainer.state.global_step,
                train_seconds=round(result.metrics["train_runtime"], 1),
                seconds=round(time.time() - started, 1),
            )
            write_json(output_dir / "summary.json", summary)  # the last file: see `has_model_of`
            report(summary)
    except Exception as error:
        return fail(error, trainer, rewards, health, argv)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    finish(trainer)
    # By the first process alone, after the others have nothing left to wait for.
    if script_args.merge_adapter and os.environ.get("RANK", "0") == "0":
        try:
            merge_adapter(
                output_dir,
                output_dir / "merged",
                model_args.model_name_or_path,
                model_args.model_revision,
                model_args.dtype,
                getattr(training_args, "trust_remote_code", False),
            )
        except Exception as error:
            return fail(error, trainer, rewards, health, argv)
        print(f"{'merged':12}{output_dir / 'merged'}")
    return 0


def fail(error: Exception, trainer: GSPOTrainer, rewards: list, health: HealthWatchCallback, argv: list[str]) -> int:
    """Says what ended the run, and how to go on; returns the exit code."""
    code, cause = explain(error, trainer, rewards)
    if code == 3 and health in trainer.callback_handler.callbacks:
        health.mark_untrusted(trainer.args, "not finite")
    traceback.print_exc()
    print(
        f"\nThe run ended after step {trainer.state.global_step}{f': {cause}' if cause else '.'} "
        f"{advise(argv, trainer.args)}",
        file=sys.stderr,
    )
    return code


def finish(trainer: GSPOTrainer) -> None:
    """Ends trackers and process group, which transformers does for us from 5.18 on."""
    if hasattr(trainer, "end"):
        trainer.end()


def report(summary: dict) -> None:
    for name, label in (("reward", "reward"), ("clip_fraction", "clipped"), ("eval_reward", "eval reward")):
        if summary[f"{name}_start"] is not None:
            print(f"{label:12}{summary[f'{name}_start']:.3f} -> {summary[f'{name}_end']:.3f}")
    print(f"{'work':12}{summary['steps']} steps, {summary['tokens']} tokens, {summary['train_seconds']} s")
    print(f"{'saved':12}{summary['output_dir']} (model, tokenizer, model card, trainer_state.json, summary.json)")


def leave(code: int) -> typing.NoReturn:
    """Ends the process, even if a reward function that took too long left threads that Python would wait for."""
    if code == 4:
        timer = threading.Timer(SECONDS_TO_LEAVE, os._exit, [code])
        timer.daemon = True
        timer.start()
    sys.exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
