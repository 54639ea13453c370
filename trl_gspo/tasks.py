"""
Named tasks: a data set, its mapping to the rows that the trainer takes, and its rewards.

A row has a `prompt`, and columns for the rewards. Rows come from a file, a folder, a hub id, or a generator.
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import itertools
import json
import logging
import os
import random
import re
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, interleave_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from .rewards import UNFIT_FAMILIES, reasoning_dataset, reasoning_entry, reasoning_families


logger = logging.getLogger(__name__)

Rows = Dataset | IterableDataset

# File name endings and the builder of `datasets` that reads them.
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}

# A generator that finds nothing new in so many draws for each row that is asked for has run out of rows.
_DRAWS_PER_ROW = 50


@dataclass(frozen=True)
class Task:
    """
    A data set, its mapping to prompts, and its rewards.

    Parameters:
        options (`dict`):
            What the task sets of the options of `scripts/train.py`: defaults, which the YAML file and the command line
            win over.
        convert (`Callable`, *optional*):
            Takes a row as a dict, returns a dict of the columns to add. `prompt_column` and `solution_column` may name
            these.
        generate (`Callable`, *optional*):
            Takes the [`DataArguments`], yields rows without end. Used where no `dataset_name` is given; rows with the
            prompt of an earlier one are passed over.
    """

    options: dict[str, Any]
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    generate: Callable[["DataArguments"], Iterator[dict[str, Any]]] | None = None


@dataclass
class DataArguments:
    """
    Data and rewards, of `scripts/train.py` and `scripts/evaluate.py` alike.

    Parameters:
        task (`str`, *optional*):
            One of [`TASKS`], or `package.module.name` of a [`Task`], or of a function that returns one. It sets
            defaults of the options below, and of others.
        dataset_name (`str`, *optional*):
            JSON, JSONL, Parquet or CSV file, a folder of such files, or a hub id. Tasks that generate their rows need
            none.
        dataset_config (`str`, *optional*):
            Configuration of a hub data set.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on, with an optional slice: `train[:1000]`.
        eval_dataset_name (`str`, *optional*):
            File, folder or hub id to evaluate on; `dataset_name` if not set. Read if `eval_strategy` is set.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on.
        dataset_streaming (`bool`, *optional*, defaults to `False`):
            Whether to stream the data; needs `max_steps`.
        num_train_samples (`int`, *optional*):
            Rows to train on, drawn by `task_seed`; all if not set.
        num_eval_samples (`int`, *optional*):
            Rows to evaluate on, drawn by `task_seed`. Where the data has no split of its own to evaluate on, they are
            held out from the rows to train on.
        task_seed (`int`, *optional*, defaults to `0`):
            Seed of the data: which rows are drawn, held out, generated and mixed. It is not `seed`, so that runs with
            several seeds have the same rows held out.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the prompt: strings, or lists of messages.
        prompt_template (`str`, *optional*):
            Text with column names in braces, in place of `prompt_column`.
        system_prompt (`str`, *optional*):
            System message before each prompt. An empty one turns a task's off.
        conversational (`bool`, *optional*, defaults to `False`):
            Whether to render string prompts with the model's chat template.
        solution_column (`str`, *optional*):
            Column that rewards get as `solution`.
        reward_funcs (`list[str]`):
            Rewards by name: TRL's, ours, `package.module.function`, or a reward model.
        reward_kwargs (`dict`, *optional*):
            For `code_reward` and rewards named `get_...`: their arguments by name.
        allow_code_execution (`bool`, *optional*, defaults to `False`):
            Whether `code_reward` may run the code that the model writes, on this machine.
        reasoning_families (`list[str]`, *optional*):
            Task `reasoning`: families of reasoning-gym by name, each with an optional weight, as in `gcd:2`; or `all`.
        reasoning_params (`dict`, *optional*):
            Task `reasoning`: difficulty of a family, by its own parameters: `{"gcd": {"max_value": 100}}`.
        task_weights (`dict`, *optional*):
            Task `mixed`: the tasks to mix, with their weights: `{"gsm8k": 3, "math": 1}`.
        task_options (`dict`, *optional*):
            Task `mixed`: options above for single tasks: `{"gsm8k": {"dataset_name": "path/to/train.jsonl"}}`.
    """

    task: str | None = field(
        default=None, metadata={"help": "A named task, or package.module.name of one of your own; see docs/tasks.md."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "JSON, JSONL, Parquet or CSV file, a folder of such files, or a hub id."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on, with an optional slice: train[:1000]."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "File, folder or hub id to evaluate on; `dataset_name` if not set."}
    )
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Whether to stream the data; needs `max_steps`."})
    num_train_samples: int | None = field(
        default=None, metadata={"help": "Rows to train on, drawn by `task_seed`; all if not set."}
    )
    num_eval_samples: int | None = field(
        default=None,
        metadata={
            "help": "Rows to evaluate on, drawn by `task_seed`; held out from the rows to train on where the data has "
            "no split of its own for it."
        },
    )
    task_seed: int = field(
        default=0,
        metadata={"help": "Seed of the data, apart from `seed`: which rows are drawn, held out, generated and mixed."},
    )
    prompt_column: str = field(
        default="prompt", metadata={"help": "Column of the prompt: strings, or lists of messages."}
    )
    prompt_template: str | None = field(
        default=None, metadata={"help": "Text with column names in braces, in place of `prompt_column`."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message before each prompt. An empty one turns a task's off."}
    )
    conversational: bool = field(
        default=False, metadata={"help": "Whether to render string prompts with the model's chat template."}
    )
    solution_column: str | None = field(default=None, metadata={"help": "Column that rewards get as `solution`."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Rewards by name: TRL's, ours, package.module.function, or a reward model."},
    )
    reward_kwargs: dict | str | None = field(
        default=None, metadata={"help": "For code_reward and rewards named get_...: arguments by name, as JSON."}
    )
    allow_code_execution: bool = field(
        default=False,
        metadata={"help": "Whether `code_reward` may run the code that the model writes, on this machine."},
    )
    reasoning_families: list[str] | None = field(
        default=None,
        metadata={"help": "Task reasoning: families of reasoning-gym, each with an optional weight (gcd:2), or all."},
    )
    reasoning_params: dict | str | None = field(
        default=None, metadata={"help": "Task reasoning: parameters by family, as JSON."}
    )
    task_weights: dict | str | None = field(
        default=None, metadata={"help": "Task mixed: the tasks to mix and their weights, as JSON."}
    )
    task_options: dict | str | None = field(
        default=None, metadata={"help": "Task mixed: options of single tasks by task, as JSON."}
    )

    def __post_init__(self):
        for name in ("reward_kwargs", "reasoning_params", "task_weights", "task_options"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    setattr(self, name, json.loads(value))
                except json.JSONDecodeError as error:
                    raise ValueError(f"`{name}={value}` is not JSON: {error}.") from error
            if not isinstance(getattr(self, name), (dict, type(None))):
                raise ValueError(f"`{name}={value}` must map names to values, as JSON.")
        if not all(isinstance(kwargs, dict) for kwargs in (self.reward_kwargs or {}).values()):
            raise ValueError(
                f"`reward_kwargs={self.reward_kwargs!r}` must be arguments by reward: {{reward: {{argument: value}}}}."
            )
        for name in ("num_train_samples", "num_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.system_prompt = self.system_prompt or None
        task = find_task(self.task)
        if self.task == "mixed":
            self.parts = _parts(self)
            if self.reward_funcs is None:
                names = itertools.chain.from_iterable(part.reward_funcs for part in self.parts.values())
                self.reward_funcs = list(dict.fromkeys(names))
            of_parts = [part.reward_kwargs or {} for part in self.parts.values()]
            self.reward_kwargs = functools.reduce(dict.__or__, [*of_parts, self.reward_kwargs or {}])
        elif not self.dataset_name and task.generate is None:
            raise ValueError(
                "`dataset_name` is not set: give a file, a folder or a hub id, or a `task` that brings its data."
            )
        if not self.reward_funcs:
            raise ValueError("`reward_funcs` is not set: give at least one reward by name, or a `task`.")
        strangers = sorted(map(str, set(self.reward_kwargs or {}) - set(self.reward_funcs)))
        if strangers:
            raise ValueError(f"`reward_kwargs` has arguments for {', '.join(strangers)}, not among `reward_funcs`.")

    @property
    def is_generated(self) -> bool:
        """Whether the rows come from the task's generator."""
        return not self.dataset_name and self.task != "mixed"

    @property
    def holds_out(self) -> bool:
        """Whether the rows to evaluate on are held out from those to train on, for want of a split of their own."""
        if self.is_generated:
            return True
        if self.num_eval_samples is None or self.eval_dataset_name is not None or self.task == "mixed":
            return False
        splits = (self.dataset_train_split, self.dataset_test_split)
        return splits[0] == splits[1] or (
            os.path.isfile(self.dataset_name) and not any("[" in split for split in splits)
        )


def find_task(name: str | None) -> Task:
    """
    A task by name; one that sets nothing for `None`.

    Args:
        name (`str`, *optional*): one of [`TASKS`], or `package.module.name` of a [`Task`] or of a function that
            returns one, importable from here or from the working directory.

    Raises:
        ValueError: if there is none; the message names the nearest and lists the known.
    """
    if name is None:
        return Task({})
    if name in TASKS:
        return TASKS[name]
    if "." not in name:
        near = difflib.get_close_matches(name, TASKS, n=1)
        raise ValueError(
            f"`task={name}` is not known{f', did you mean {near[0]!r}?' if near else '.'} Known are "
            f"{', '.join(TASKS)}, and `package.module.name` of a `Task`."
        )
    module_name, attribute = name.rsplit(".", 1)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"`task={name}` cannot be imported: {error}. It is looked for on Python's path alone, to which the "
            "working directory does not belong by itself: start with `PYTHONPATH=. accelerate launch ...`."
        ) from error
    task = found() if callable(found) else found
    if not isinstance(task, Task):
        raise ValueError(f"`task={name}` is a {type(task).__name__}, not a `trl_gspo.tasks.Task`.")
    return task


def load_task(args: DataArguments, train: bool = True, evaluation: bool = True) -> tuple[Rows | None, Rows | None]:
    """
    The rows to train on and those to evaluate on.

    No prompt is in both: where the evaluation data has prompts of the training data, those are taken out of the
    training data, and a line says how many.

    Args:
        args (`DataArguments`): what to load.
        train (`bool`, *optional*, defaults to `True`): whether to load what to train on.
        evaluation (`bool`, *optional*, defaults to `True`): whether to load what to evaluate on.

    Returns:
        `tuple[Dataset | IterableDataset | None, Dataset | IterableDataset | None]`

    Raises:
        FileNotFoundError: if a path is not there.
        ValueError: if the data does not fit the options. Each message names the option.
    """
    if args.task == "mixed":
        train_rows, eval_rows = _load_mixture(args, train, evaluation)
    elif args.is_generated:
        train_rows, eval_rows = _generate(args, train)
    else:
        train_rows, eval_rows = _load(args, train, evaluation)
    if train_rows is not None and eval_rows is not None:
        train_rows = _without_prompts_of(eval_rows, train_rows)
    return train_rows if train else None, eval_rows if evaluation else None


def _load(args: DataArguments, train: bool, evaluation: bool) -> tuple[Rows | None, Rows | None]:
    eval_name = args.eval_dataset_name or args.dataset_name

    def load(name: str, split: str) -> Rows:
        config = args.dataset_config if name == args.dataset_name else None
        return _to_rows(args, load_rows(name, split, config, args.dataset_streaming))

    if args.holds_out:
        if args.dataset_streaming:
            raise ValueError(
                "`num_eval_samples` holds rows out, which a stream (`dataset_streaming`) does not allow: set "
                "`eval_dataset_name`."
            )
        rows = load(args.dataset_name, args.dataset_train_split).shuffle(seed=args.task_seed)
        wanted = args.num_eval_samples + ((args.num_train_samples or 1) if train else 0)
        _check_size(rows, wanted, "num_train_samples` and `num_eval_samples")
        end = len(rows) if args.num_train_samples is None or not train else wanted
        return rows.select(range(args.num_eval_samples, end)), rows.select(range(args.num_eval_samples))
    if train and evaluation and eval_name == args.dataset_name:
        splits = (args.dataset_train_split, args.dataset_test_split)
        if splits[0] == splits[1] or (os.path.isfile(eval_name) and not any("[" in split for split in splits)):
            raise ValueError(
                f"`{eval_name}` has no split to evaluate on that was not trained on. Hold rows out with "
                "`num_eval_samples`, or set `eval_dataset_name`, or slices: `dataset_train_split: train[100:]` and "
                "`dataset_test_split: test[:100]`."
            )
    train_rows = load(args.dataset_name, args.dataset_train_split) if train else None
    eval_rows = load(eval_name, args.dataset_test_split) if evaluation else None
    return (
        _draw(train_rows, args.num_train_samples, args.task_seed, "num_train_samples"),
        _draw(eval_rows, args.num_eval_samples, args.task_seed, "num_eval_samples"),
    )


def _generate(args: DataArguments, train: bool) -> tuple[Dataset | None, Dataset]:
    train_count, eval_count = args.num_train_samples or 0, args.num_eval_samples or 0
    if not train_count or not eval_count:
        raise ValueError(f"The task {args.task!r} generates its rows: set `num_train_samples` and `num_eval_samples`.")
    # The held-out rows are the first, so that they are the same for any number of training rows, and without any.
    count = eval_count + train_count if train else eval_count
    column, seen, rows = args.prompt_column, set(), []
    for row in itertools.islice(find_task(args.task).generate(args), _DRAWS_PER_ROW * count):
        if len(rows) == count:
            break
        key = row.get(column, str(row))
        if key not in seen:
            seen.add(key)
            rows.append(row)
    if len(rows) < count:
        raise ValueError(
            f"The task {args.task!r} has {len(rows)} different prompts at these parameters (after "
            f"{_DRAWS_PER_ROW * count} draws), and `num_train_samples={train_count}` and "
            f"`num_eval_samples={eval_count}` ask for {count}: ask for fewer, or for harder ones."
        )
    rows = _to_rows(args, Dataset.from_list(rows))
    return rows.select(range(eval_count, count)) if train else None, rows.select(range(eval_count))


def _load_mixture(args: DataArguments, train: bool, evaluation: bool) -> tuple[Dataset | None, Dataset | None]:
    loaded = {name: load_task(part, train, evaluation) for name, part in args.parts.items()}
    total = sum(args.task_weights.values())
    shares = [args.task_weights[name] / total for name in args.parts]
    mixed = []
    for index, count, option in (
        (0, args.num_train_samples, "num_train_samples"),
        (1, args.num_eval_samples, "num_eval_samples"),
    ):
        parts = {name: rows[index] for name, rows in loaded.items()}
        if any(rows is None for rows in parts.values()):
            mixed.append(None)
            continue
        chats = any(isinstance(rows[0]["prompt"], list) for rows in parts.values())
        parts = _of_one_type([_for_mixture(name, rows, chats) for name, rows in parts.items()])
        # A mixture ends with the first of its tasks that has no row left: no row is in it twice.
        rows = interleave_datasets(parts, shares, seed=args.task_seed, stopping_strategy="first_exhausted")
        if count is not None:
            _check_size(rows, count, option, "which ends with the first of its tasks that has no row left")
            rows = rows.select(range(count))
        mixed.append(rows)
    return tuple(mixed)


def _for_mixture(name: str, rows: Dataset, chats: bool) -> Dataset:
    def convert(row):
        prompt = row["prompt"]
        return {
            "prompt": [{"role": "user", "content": prompt}] if chats and isinstance(prompt, str) else prompt,
            "task": name,
        }

    return rows.map(convert)


def _of_one_type(parts: list[Dataset]) -> list[Dataset]:
    """Leaves out the columns that are of one type in one part and of another in the next."""
    types: dict[str, list] = {}
    for rows in parts:
        for column, feature in rows.features.items():
            if feature not in types.setdefault(column, []):
                types[column].append(feature)
    mismatched = sorted(column for column, found in types.items() if len(found) > 1)
    if mismatched:
        _say(f"The mixture leaves out columns whose type differs between its tasks: {', '.join(mismatched)}.")
    return [rows.remove_columns([name for name in mismatched if name in rows.column_names]) for rows in parts]


def _say(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.info(message)


def _parts(args: DataArguments) -> dict[str, DataArguments]:
    """The tasks of a mixture, each with its own arguments."""
    if not args.task_weights:
        raise ValueError('The task `mixed` needs `task_weights`: {"gsm8k": 3, "math": 1}, say.')
    if args.dataset_name or args.dataset_streaming:
        raise ValueError(
            "The task `mixed` takes `dataset_name` and the like for each of its tasks, from `task_options`, and "
            "streams nothing."
        )
    strangers = set(args.task_options or {}) - set(args.task_weights)
    if strangers:
        raise ValueError(f"`task_options` has options for {', '.join(sorted(strangers))}, not among `task_weights`.")
    known = {spec.name for spec in dataclasses.fields(DataArguments)} - {
        "task",
        "task_weights",
        "task_options",
        "dataset_streaming",
    }
    parts = {}
    for name, weight in args.task_weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(f"`task_weights` gives {name!r} the weight {weight!r}; weights are positive numbers.")
        if name == "mixed":
            raise ValueError("`task_weights` names 'mixed', which cannot be a part of itself.")
        options = (args.task_options or {}).get(name, {})
        for option in set(options) - known:
            near = difflib.get_close_matches(option, known, n=1)
            raise ValueError(
                f"`task_options` gives {name!r} the option {option!r}, which is not one of a single task"
                f"{f'; did you mean {near[0]!r}?' if near else '.'}"
            )
        defaults = defaults_of(name, options)
        parts[name] = DataArguments(
            **{"task": name, "task_seed": args.task_seed}
            | {option: value for option, value in defaults.items() if option in known}
            | options
        )
    return parts


def defaults_of(name: str | None, given: Iterable[str]) -> dict[str, Any]:
    """
    What a task sets, less what belongs to a data set that is not the task's: its configuration, or how many rows are
    generated.

    Args:
        name (`str`, *optional*): the task's.
        given (`Iterable[str]`): the options that are given, which win over the task's.
    """
    task, left_out = find_task(name), set(given)
    if "dataset_name" in left_out:
        left_out |= {"dataset_config"} if task.generate is None else {"num_train_samples", "num_eval_samples"}
    return {option: value for option, value in task.options.items() if option not in left_out}


def scope_rewards(args: DataArguments, rewards: list[Callable | str]) -> list[Callable | str]:
    """
    In a mixture, keeps each task's rewards to the rows of that task: elsewhere they return `None`.

    A reward that belongs to no task of the mixture scores every row.

    Args:
        args (`DataArguments`): of a mixture; for any other task `rewards` are returned as they are.
        rewards (`list[Callable | str]`): those of `args.reward_funcs`, in that order.
    """
    if args.task != "mixed":
        return rewards
    scoped = []
    for name, reward in zip(args.reward_funcs, rewards, strict=True):
        tasks = frozenset(task for task, part in args.parts.items() if name in part.reward_funcs)
        if tasks and isinstance(reward, str):
            raise ValueError(f"The reward model {name!r} of {', '.join(sorted(tasks))} cannot be kept to one task.")
        if tasks and inspect.iscoroutinefunction(reward):
            raise ValueError(f"The reward {name!r} is async, which the task `mixed` does not support.")
        scoped.append(_only_for(reward, tasks) if tasks else reward)
    return scoped


def _only_for(reward: Callable, tasks: frozenset[str]) -> Callable:
    @functools.wraps(reward)
    def scoped(completions, task, **kwargs):
        # What it would log for some of the rows does not fit the table of all completions.
        kwargs.pop("log_extra", None)
        rows = [index for index, name in enumerate(task) if name in tasks]
        scores: list[float | None] = [None] * len(completions)
        if rows:

            def pick(value):
                is_column = isinstance(value, (list, tuple)) and len(value) == len(completions)
                return [value[index] for index in rows] if is_column else value

            picked = reward(completions=pick(completions), **{key: pick(value) for key, value in kwargs.items()})
            for index, score in zip(rows, picked, strict=True):
                scores[index] = score
        return scores

    return scoped


def _to_rows(args: DataArguments, rows: Rows) -> Rows:
    convert = find_task(args.task).convert
    if convert is not None and isinstance(rows, IterableDataset):
        rows = rows.map(convert)
    elif convert is not None:
        # `datasets` knows a function of a module by its name: without its source it would hand out what an earlier
        # version of it made.
        source = Path(inspect.getfile(convert)).read_bytes()
        rows = rows.map(convert, new_fingerprint=Hasher.hash([rows._fingerprint, source]))
    return to_prompts(
        rows,
        args.prompt_column,
        args.prompt_template,
        args.system_prompt,
        args.conversational,
        args.solution_column,
    )


def _draw(rows: Rows | None, count: int | None, seed: int, option: str) -> Rows | None:
    if rows is None or count is None:
        return rows
    if isinstance(rows, IterableDataset):
        return rows.shuffle(seed=seed, buffer_size=max(1000, count)).take(count)
    _check_size(rows, count, option)
    return rows.shuffle(seed=seed).select(range(count))


def _check_size(rows: Dataset, count: int, option: str, why: str = "") -> None:
    if len(rows) < count:
        raise ValueError(f"`{option}` ask for {count} rows of {len(rows)}{f', {why}' if why else ''}.")


def _without_prompts_of(eval_rows: Rows, train_rows: Rows) -> Rows:
    if isinstance(eval_rows, IterableDataset):
        return train_rows  # its prompts are known only once it has been read
    held_out = {json.dumps(prompt) for prompt in eval_rows["prompt"]}
    if isinstance(train_rows, IterableDataset):
        return train_rows.filter(lambda row: json.dumps(row["prompt"]) not in held_out)
    keep = [index for index, prompt in enumerate(train_rows["prompt"]) if json.dumps(prompt) not in held_out]
    dropped = len(train_rows) - len(keep)
    if not keep:
        raise ValueError(
            f"Each of the {len(train_rows)} prompts to train on is in the data to evaluate on: set "
            "`eval_dataset_name`, `dataset_test_split` or slices so that they differ."
        )
    if dropped:
        _say(f"{dropped} of {len(train_rows)} rows to train on are left out: their prompts are to evaluate on.")
    return train_rows.select(keep) if dropped else train_rows


def load_rows(name: str, split: str, config: str | None = None, streaming: bool = False) -> Dataset | IterableDataset:
    """
    Loads one split by local path or hub id.

    Args:
        name (`str`): a JSON, JSONL, Parquet or CSV file; a folder of such files, or one that
            `Dataset.save_to_disk` wrote; or a hub id.
        split (`str`): with an optional slice, such as `"train[:1000]"`. A single file is its own split, so there any
            name fits.
        config (`str`, *optional*): configuration of a hub data set.
        streaming (`bool`, *optional*, defaults to `False`): whether to stream.

    Returns:
        `Dataset` or `IterableDataset`.

    Raises:
        FileNotFoundError: if `name` is a path and is not there; the message lists what is.
        ValueError: if the file cannot be read, if there is no such split, or no row in it.
    """
    path = Path(name).expanduser()
    is_path = path.suffix in _BUILDERS or path.exists() or name.startswith((".", "/", "~"))
    if is_path and not path.exists():
        raise FileNotFoundError(f"`{name}` does not exist. {_listing(path)}")
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise ValueError(f"`{name}` ends in {path.suffix!r}; read are {', '.join(_BUILDERS)}.")
        if path.stat().st_size == 0:
            raise ValueError(f"`{name}` is empty.")
        files = {split.split("[")[0]: str(path)}
        try:
            rows = load_dataset(_BUILDERS[path.suffix], data_files=files, split=split, streaming=streaming)
        except (DatasetGenerationError, ValueError) as error:
            cause = error.__cause__ or error
            raise ValueError(
                f"`{name}` cannot be read as {_BUILDERS[path.suffix]}, split {split!r}: {cause}"
            ) from error
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        if isinstance(saved, dict) and split not in saved:
            raise ValueError(f"`{name}` has no split {split!r}; it has {', '.join(saved)}.")
        rows = saved[split] if isinstance(saved, dict) else saved
    else:
        try:
            rows = load_dataset(str(path) if is_path else name, config, split=split, streaming=streaming)
        except RuntimeError as error:  # that of `datasets` for a data set whose loading is code
            raise ValueError(f"`{name}` cannot be loaded: {error}") from error
    if len(rows) == 0 if isinstance(rows, Dataset) else next(iter(rows), None) is None:
        raise ValueError(f"`{name}` has no row in split {split!r}.")
    return rows


def to_prompts(
    rows: Dataset | IterableDataset,
    prompt_column: str = "prompt",
    prompt_template: str | None = None,
    system_prompt: str | None = None,
    conversational: bool = False,
    solution_column: str | None = None,
) -> Dataset | IterableDataset:
    """
    Adds the column `prompt`, and `solution` if asked for; the other columns stay, for the reward functions.

    Args:
        rows (`Dataset` or `IterableDataset`): with a column of strings or of message lists.
        prompt_column (`str`, *optional*, defaults to `"prompt"`): where the prompt is; not read with a template.
        prompt_template (`str`, *optional*): text with column names in braces, such as `"Q: {question}\\nA:"`.
        system_prompt (`str`, *optional*): put before each prompt, which makes it conversational.
        conversational (`bool`, *optional*, defaults to `False`): whether to make a string the message of a user, so
            that TRL renders it with the model's chat template.
        solution_column (`str`, *optional*): copied to `solution`, the name that rewards by name read.

    Returns:
        `Dataset` or `IterableDataset`: of the type of `rows`.

    Raises:
        ValueError: if a column is not there, before anything is mapped, or if a row has no prompt. The message lists
            the columns, or names the row.
    """
    columns = columns_of(rows)
    if prompt_template is None:
        wanted = {prompt_column: "prompt_column"}
    else:
        keys = [key for _, key, _, _ in string.Formatter().parse(prompt_template) if key is not None]
        # A field may go on with `.attribute` or `[index]`; what stands before it is the column.
        wanted = {re.split(r"[.\[]", key)[0]: "prompt_template" for key in keys}
    if solution_column is not None:
        wanted[solution_column] = "solution_column"
    for column, option in wanted.items():
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            raise ValueError(
                f"`{option}` names the column {column!r}, which the data set does not have"
                f"{f'; did you mean {near[0]!r}' if near else ''}. It has {', '.join(columns)}."
            )

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt = row[prompt_column] if prompt_template is None else prompt_template.format(**row)
        if not prompt or not isinstance(prompt, (str, list)):
            raise ValueError(f"Row {index} has no prompt: column {prompt_column!r} holds {prompt!r}.")
        if isinstance(prompt, str) and (conversational or system_prompt is not None):
            prompt = [{"role": "user", "content": prompt}]
        if system_prompt is not None and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": system_prompt}, *prompt]
        return {"prompt": prompt} | ({} if solution_column is None else {"solution": row[solution_column]})

    return rows.map(convert, with_indices=True)


def columns_of(rows: Dataset | IterableDataset) -> list[str]:
    """The names of the columns; of a stream that does not know them, of its first row."""
    return rows.column_names or list(next(iter(rows)))


def _listing(path: Path) -> str:
    folder = next(parent for parent in path.resolve().parents if parent.is_dir())
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:20]) + (" and more" if len(names) > 20 else "")
    return f"In {folder} there is {shown or 'nothing'}."


def sorting_rows(seed: int, digits: int = 5) -> Iterator[dict[str, str]]:
    """Prompts to sort `digits` digits, without end: `{"prompt": "73914=", "solution": "13479"}`."""
    generator = random.Random(seed)
    while True:
        number = "".join(generator.choices(string.digits, k=digits))
        yield {"prompt": f"{number}=", "solution": "".join(sorted(number))}


def reasoning_rows(args: DataArguments) -> Iterator[dict[str, str]]:
    """
    Rows of reasoning-gym, without end: `question`, `answer`, and `reasoning_item`, from which the reward makes the
    entry anew.

    A family's entry `i` under seed `s` is its entry `i + 1` under seed `s - 1`, so that other seeds do not give other
    rows. All rows here are of one seed, each with an index of its own.
    """
    generator = random.Random(args.task_seed)
    families = _families(args)
    parameters = {name: (args.reasoning_params or {}).get(name, {}) for name in families}
    strangers = sorted(set(args.reasoning_params or {}) - set(families))
    if strangers:
        raise ValueError(f"`reasoning_params` has {', '.join(strangers)}, not among `reasoning_families`.")
    for name, values in parameters.items():
        try:
            # `seed` and `size` would contradict the item's.
            reasoning_dataset(name, args.task_seed, json.dumps(values))
        except (TypeError, AssertionError, ValueError) as error:
            raise ValueError(f"`reasoning_params` for {name!r}: {error or 'refused by reasoning-gym'}.") from error
    indices = dict.fromkeys(families, -1)
    while True:
        (family,) = generator.choices(list(families), list(families.values()))
        indices[family] += 1
        item = {"family": family, "seed": args.task_seed, "index": indices[family], "params": parameters[family]}
        packed = json.dumps(item)
        entry = reasoning_entry(packed)[1]
        yield {"question": entry["question"], "answer": str(entry["answer"]), "reasoning_item": packed}


def _families(args: DataArguments) -> dict[str, float]:
    known = reasoning_families()
    if args.reasoning_families == ["all"]:
        return dict.fromkeys(known, 1.0)
    families = {}
    for word in args.reasoning_families or []:
        name, _, weight = word.partition(":")
        if name in UNFIT_FAMILIES:
            raise ValueError(f"`reasoning_families` names {name!r}, which is refused: {UNFIT_FAMILIES[name]}.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"`reasoning_families` has no {name!r}{f', did you mean {near[0]!r}?' if near else '.'} reasoning-gym "
                f"has {', '.join(known)}."
            )
        try:
            families[name] = float(weight or 1)
        except ValueError:
            families[name] = -1.0
        if not 0 < families[name] < float("inf"):
            raise ValueError(f"`reasoning_families` gives {word!r} no positive weight: write `{name}:2`, say.")
    if not families:
        raise ValueError("`reasoning_families` is empty: name at least one, or `all`.")
    return families


def to_code(row: dict[str, Any]) -> dict[str, str | None]:
    """
    A row of HumanEval's or of MBPP's form as `question`, and as the columns that `code_reward` reads.

    `tests` is Python source to run after the candidate; `code_prefix` is what the completion continues, empty for
    MBPP; `entry_point` is the function's name, `None` for MBPP.

    Args:
        row (`dict`): with `prompt`, `test` and `entry_point` (HumanEval), or with `test_list`, and `text` or `prompt`
            (MBPP, full or sanitized).
    """
    if row.get("test") is not None and row.get("entry_point") is not None:
        return {
            "question": f"Complete this function, and give it whole:\n\n```python\n{row['prompt'].rstrip()}\n```",
            "tests": f"{row['test']}\ncheck({row['entry_point']})",
            "code_prefix": row["prompt"],
            "entry_point": row["entry_point"],
        }
    if row.get("test_list"):
        setup = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
        tests = "\n".join(row["test_list"])
        return {
            "question": f"{row.get('text') or row['prompt']}\n\nThe code has to pass these tests:\n\n{tests}",
            "tests": "\n".join([*filter(None, setup), tests]),
            "code_prefix": "",
            "entry_point": None,
        }
    raise ValueError(
        "The task `code` reads `prompt`, `test` and `entry_point` (HumanEval's form), or `test_list` and `text` or "
        f"`prompt` (MBPP's). The data has {', '.join(row)}."
    )


TASKS = {
    "gsm8k": Task(
        {
            "dataset_name": "openai/gsm8k",
            "dataset_config": "main",
            "prompt_column": "question",
            "solution_column": "answer",
            "system_prompt": 'Reason step by step, then give the final number behind four hashes, as in "#### 72".',
            "reward_funcs": ["final_number_reward"],
        }
    ),
    "math": Task(
        {
            "dataset_name": "DigitalLearningGmbH/MATH-lighteval",
            "prompt_column": "problem",
            "solution_column": "solution",
            "system_prompt": r"Reason step by step, and put the final answer in \boxed{}.",
            "reward_funcs": ["accuracy_reward"],
        }
    ),
    "code": Task(
        {
            "dataset_name": "google-research-datasets/mbpp",
            "dataset_config": "full",
            "prompt_column": "question",
            "system_prompt": "Answer with Python code alone, in one block fenced by ```python and ```.",
            "reward_funcs": ["code_reward"],
        },
        convert=to_code,
    ),
    "reasoning": Task(
        {
            "reasoning_families": ["chain_sum", "gcd", "letter_counting", "number_sorting", "spell_backward"],
            "num_train_samples": 10_000,
            "num_eval_samples": 256,
            "prompt_column": "question",
            "system_prompt": "Reason step by step, then give the final answer alone between <answer> and </answer>.",
            "reward_funcs": ["reasoning_reward"],
        },
        generate=reasoning_rows,
    ),
    "mixed": Task({}),
    "sort": Task(
        {"num_train_samples": 4096, "num_eval_samples": 1024, "reward_funcs": ["exact_match_reward"]},
        generate=lambda args: sorting_rows(args.task_seed),
    ),
}
