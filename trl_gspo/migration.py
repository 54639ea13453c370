"""
Configurations of GRPO, and of other systems' GSPO, as configurations of `scripts/train.py`.

A configuration is read as a mapping ([`read_config`], [`read_command`]), its system is told from its fields
([`detect`]), and [`migrate_config`] turns it into our options, with a remark on every field. [`to_yaml`] writes them
down. The tables are in [`trl_gspo.migration_tables`]; scripts in Python are for [`trl_gspo.codemod`].
"""

import ast
import difflib
import json
import math
import operator
import re
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any

import yaml
from trl import ModelConfig

from .config import _FOREIGN_LOSS_FIELDS, _LONG_COMPLETION, _REFUSED_LOSS_TYPES, _WIDE_EPSILON, GSPOConfig
from .config import MINIBATCHES_PER_ROLLOUT as MINIBATCHES
from .health import HealthBounds
from .migration_tables import (
    ACTOR,
    DEFAULTS,
    NAMES,
    ONE_OLD_POLICY,
    OWN_DATA,
    STANDALONE_SHARED,
    SWIFT,
    SWIFT_REWARDS,
    SYSTEMS,
    TELLING,
    VERL,
    VERL_SECTIONS,
    Row,
)
from .objective import EPSILON_HIGH, EPSILON_LOW, LEVELS
from .tasks import TASKS, DataArguments


# Below this a KL coefficient becomes 0: the rule of the conversion helper in stateset-agents' guide. GSPO's objective
# (equation 5) is stated without the term.
SMALL_KL = 0.05

_TOKEN_LEVEL = "A clip range for single tokens, which never clips the ratio of a whole completion. "
_PAPER_STEPS = f"{MINIBATCHES} x gradient_accumulation_steps (paper, section 5.1)."

# Where the source packs a micro-batch by tokens, it names no number of completions for one.
_MICRO_BATCH = 8

# Options of `scripts/train.py` beside those of data and rewards; a test compares them with its parser.
SCRIPT_OPTIONS = ("health_watch", "curves", "memory_check", "merge_adapter")

# Without these `scripts/train.py` does not start.
REQUIRED = {
    "model_name_or_path": "a folder or a hub id",
    "dataset_name": "a file, a folder or a hub id, with `prompt_column` and `solution_column` for its columns",
    "reward_funcs": "rewards by name or as package.module.function",
}


class MigrationError(ValueError):
    """What was given cannot be migrated; the message says why, and what to do."""


@dataclass
class Migration:
    """
    A configuration of `scripts/train.py`, and what became of each field of its source.

    Attributes:
        system (`str`): where it comes from, one of [`SYSTEMS`].
        values (`dict[str, Any]`): options and their values.
        remarks (`dict[str, list[str]]`): for each option that does not merely stand as it stood, where it is from, and
            why.
        dropped (`list[str]`): source fields without a counterpart, with value and reason.
        questions (`list[str]`): what a person has to decide.
        unknown (`dict[str, Any]`): source fields that were not understood.
        unset (`list[str]`): source fields that are null.
        batch (`str`): the arithmetic of the batch in one sentence.
    """

    system: str
    values: dict[str, Any] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    unknown: dict[str, Any] = field(default_factory=dict)
    unset: list[str] = field(default_factory=list)
    batch: str = ""
    # Values of the source that no single option holds, by the name after `@` in the tables: (source field, value).
    _facts: dict[str, tuple[str, Any]] = field(default_factory=dict, repr=False)

    def set(self, option: str, value: Any, *remarks: str) -> None:
        self.values[option] = value
        self.remarks.setdefault(option, []).extend(remark for remark in remarks if remark)

    def drop(self, source: str, value: Any, why: str) -> None:
        self.dropped.append(f"{source}: {_short(value)}. {why}")

    def fact(self, name: str) -> Any:
        return self._facts[name][1] if name in self._facts else None

    def source(self, name: str) -> str:
        """The source's own words for a fact: `name: value`."""
        source, value = self._facts[name]
        return f"{source}: {_short(value)}"

    def drops(self, name: str, why: str) -> None:
        """Drops a fact, if the source has it."""
        if name in self._facts:
            self.dropped.append(f"{self.source(name)}. {why}")

    def asks(self, name: str, why: str) -> None:
        """Drops a fact that a person has to decide on."""
        self.questions.append(f"`{self.source(name)}`: {why}")
        self.drops(name, why)


def is_token_level(epsilon: float, is_sequence: bool, length: float) -> bool:
    """
    Whether a clip range is meant for single tokens, or is none at all.

    TRL's 0.2 always is. Any other that is wide is, unless it was chosen for the ratio of sequences (`is_sequence`)
    that are short: of `length` tokens at most.
    """
    is_wide = epsilon > _WIDE_EPSILON and not (is_sequence and length <= _LONG_COMPLETION)
    return epsilon == 0.2 or is_wide or not 0 < epsilon < 1


def known_options() -> dict[str, type]:
    """The options of `scripts/train.py` that a configuration can hold, each with the class that has it."""
    options: dict[str, Any] = dict.fromkeys(SCRIPT_OPTIONS)
    for kind in (DataArguments, GSPOConfig, ModelConfig, HealthBounds):
        options |= {spec.name: kind for spec in fields(kind) if spec.init}
    return options | {"env": None}


# ---- reading


def read_config(text: str) -> dict[str, Any]:
    """
    A configuration as a mapping, from YAML or JSON.

    Raises:
        MigrationError: if it is neither, is empty, or holds no mapping.
    """
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MigrationError(f"it is neither YAML nor JSON: {error}") from error
    if loaded is None:
        raise MigrationError("it is empty")
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise MigrationError(
            f"it holds a {type(loaded).__name__}, and a configuration is a mapping of names to values"
        )
    if {"cells", "nbformat"} <= set(loaded):
        raise MigrationError("it is a notebook: export it with `jupyter nbconvert --to script`, and migrate that")
    return _numbers(loaded)


def _numbers(value: Any) -> Any:
    """YAML reads 1e-6, without a dot, as a string, and JSON's own readers as a number."""
    if isinstance(value, dict):
        return {name: _numbers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value)
    return float(value) if is_number else value


def read_command(text: str) -> dict[str, Any]:
    """
    The options of a command line, or of the last command of a shell script that has any, as a mapping.

    Understood are `--name value`, `--name=value`, `--flag`, Hydra's `section.name=value`, and variables that the
    script itself sets, with `${NAME}`, `${NAME:-default}` and `$((...))`. A variable from elsewhere stays as it is
    written.

    Raises:
        MigrationError: if there is no option in it, or a quote is not closed.
    """
    variables: dict[str, str] = {}
    found: dict[str, Any] = {}
    joined = re.sub(r"\\[ \t]*\n", " ", text)
    joined = re.sub(r"\$\(\(.*?\)\)(?!\))", lambda match: re.sub(r"\s", "", match[0]), joined)
    try:
        lines = [shlex.split(line) for line in _logical_lines(joined)]
    except ValueError as error:
        raise MigrationError(f"the command line cannot be read: {error}") from error
    for words in lines:
        if words[:1] == ["export"]:
            words = words[1:]
        leading = 0
        while leading < len(words) and re.match(r"[A-Za-z_]\w*=", words[leading]):
            leading += 1
        assigned = dict(word.split("=", 1) for word in words[:leading])
        variables |= {name: _expand(value, variables) for name, value in assigned.items()}
        launcher, rest = _launcher(words[leading:])
        options = _options([_expand(word, variables) for word in _split_lists(rest, variables)])
        if options:
            processes = {"num_processes": _scalar(_expand(launcher, variables))} if launcher else {}
            found = {name: _scalar(value) for name, value in assigned.items() if name in SWIFT} | processes | options
    if not found:
        raise MigrationError("there is no option such as --name value or section.name=value in it")
    return found


def _launcher(words: list[str]) -> tuple[str, list[str]]:
    """The number of processes that a launcher starts, and what stands behind the script that it starts."""
    scripts = [index for index, word in enumerate(words) if word.endswith(".py")]
    if not scripts:
        return "", words
    options = " ".join(words[: scripts[0]])
    match = re.search(r"--(?:num_processes|nproc[_-]per[_-]node)[ =](\S+)", options)
    return match[1] if match else "", words[scripts[0] + 1 :]


def _logical_lines(text: str) -> list[str]:
    """Lines without comments, with a quote that goes on over several as one."""
    lines, line, quote = [], "", ""
    previous = "\n"
    for character in text + "\n":
        if quote == "#":
            quote = "" if character == "\n" else "#"
        elif quote:
            quote = "" if character == quote and previous != "\\" else quote
        elif character in "\"'" and previous != "\\":
            quote = character
        elif character == "#" and previous in " \t\n":
            quote = "#"
        if character == "\n" and not quote:
            lines.append(line)
            line = ""
        elif quote != "#":
            line += character
        previous = character
    return [*lines, line] if line else lines


def _split_lists(words: list[str], variables: Mapping[str, str]) -> list[str]:
    """A word that is nothing but a variable with several options in it is those options."""
    result: list[str] = []
    for word in words:
        name = re.fullmatch(r"\$\{?(\w+)\}?", word)
        value = variables.get(name[1], "") if name else ""
        result += shlex.split(value.replace("\\", " ")) if "=" in value or "--" in value else [word]
    return result


def _expand(text: str, variables: Mapping[str, str]) -> str:
    def variable(match: re.Match) -> str:
        name, default = match[1] or match[3], match[2]
        return variables.get(name, default if default is not None else match[0])

    text = re.sub(r"\$\{(\w+)(?::-([^}]*))?\}|\$([A-Za-z_]\w*)", variable, text)

    def arithmetic(match: re.Match) -> str:
        body = re.sub(r"[A-Za-z_]\w*", lambda name: variables.get(name[0], name[0]), match[1])
        try:
            return str(_whole_number(ast.parse(body, mode="eval").body))
        except (SyntaxError, ZeroDivisionError, KeyError, TypeError):
            return match[0]

    return re.sub(r"\$\(\((.*?)\)\)(?!\))", arithmetic, text)


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.floordiv}


def _whole_number(node: ast.expr) -> int:
    """The value of a shell's arithmetic."""
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_whole_number(node.left), _whole_number(node.right))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    raise TypeError


def _options(words: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if re.match(r"[+~]{0,2}[A-Za-z_][\w.]*=", word) and not word.startswith("-"):
            name, value = word.lstrip("+~").split("=", 1)
            options[name] = _scalar(value)
        elif re.match(r"--?[A-Za-z]", word) and not re.fullmatch(r"-[a-z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            values = [value] if equals else []
            while (
                not equals
                and index < len(words)
                and not re.match(r"--[A-Za-z]|[+~]{0,2}[A-Za-z_][\w.]*=", words[index])
            ):
                values.append(words[index].rstrip(",") if words[index] != "," else "")
                index += 1
            values = [value for value in values if value] if len(values) > 1 else values
            hydra = name in ("config-path", "config-name", "config-dir")
            name = f"--{name}" if hydra else name.replace("-", "_")
            options[name] = (
                True if not values else _scalar(values[0]) if len(values) == 1 else list(map(_scalar, values))
            )
    return options


def _scalar(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value) if re.search(r"\d", value) else value
        except ValueError:
            return value
    return value


def detect(config: Mapping[str, Any]) -> str:
    """
    The system that a configuration is for, by its fields.

    Returns:
        `str`: one of [`SYSTEMS`]: the one that knows more of the fields than any other, and, unless it is TRL, at
        least one that no other knows.

    Raises:
        MigrationError: if two know equally many, or none knows half of them. The message names the options.
    """
    told = {TELLING[key] for key in config.items() if isinstance(key[1], str) and key in TELLING}
    if len(told) == 1:
        return told.pop()
    names = [name for name in _flat(config) if name != "env"]
    known = {system: [name for name in names if _row(system, name) is not None] for system in SYSTEMS}
    # TRL's names are understood by all that are built on it: another system has to have one of its own besides.
    for system in set(SYSTEMS) - {"trl"}:
        others = {name for other in SYSTEMS if other != system for name in known[other]}
        if not set(known[system]) - others:
            known[system] = []
    best = max(map(len, known.values()))
    leaders = [system for system in SYSTEMS if len(known[system]) == best]
    if not names or 2 * best < len(names):
        raise MigrationError(
            f"no system is known by these fields: {_listed(names)}. Known are {', '.join(SYSTEMS)}; give --from "
            "SYSTEM if it is one of them"
        )
    if len(leaders) > 1:
        raise MigrationError(
            f"its fields fit {' and '.join(leaders)} equally well: {_listed(names)}. Give --from "
            f"{' or --from '.join(leaders)}"
        )
    return leaders[0]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections of verl's configuration as dotted names; other mappings stay values."""
    sections = (
        "actor_rollout_ref",
        "algorithm",
        "critic",
        "reward_model",
        "data",
        "trainer",
        "custom_reward_function",
    )
    sections += ("global_profiler", "ray_init", "ray_kwargs", "transfer_queue", "hydra", "actor", "rollout", "reward")
    flat: dict[str, Any] = {}
    for name, value in config.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, Mapping) and (prefix or name in sections):
            flat |= _flat(value, f"{dotted}.")
        else:
            flat[dotted] = value
    return flat


def _verl_name(name: str) -> str:
    """A field of verl by its whole name: `clip_ratio_low` is the actor's."""
    if name in VERL:
        return name
    whole = [known for known in VERL if known.endswith(f".{name}")]
    return whole[0] if len(whole) == 1 else name


def _row(system: str, name: str) -> Row | None:
    """What becomes of a field of `system`; `None` if it is not known."""
    if system == "verl":
        name = _verl_name(name)
        if name.split(".")[-1] == "_target_":
            return Row(None, "Of Hydra.")
        if name in VERL:
            return VERL[name]
        section = next((key for key in VERL_SECTIONS if name == key or name.startswith(f"{key}.")), None)
        # A misspelt field is not one of the section's others.
        is_misspelt = name not in VERL_SECTIONS and difflib.get_close_matches(name, VERL, n=1, cutoff=0.95)
        return None if section is None or is_misspelt else Row(None, VERL_SECTIONS[section])
    if name in SYSTEMS[system]:
        return SYSTEMS[system][name]
    if name in known_options():
        # A stand-alone script has few names of its own, and TRL's data and batch options are not among them.
        return Row(name) if system != "standalone" or name in STANDALONE_SHARED else None
    return None


# ---- migrating


def migrate_config(
    config: Mapping[str, Any], system: str | None = None, num_processes: int | None = None
) -> Migration:
    """
    Turns a configuration into one of `scripts/train.py` that trains GSPO.

    Clip ranges for single tokens become the paper's, a KL coefficient below [`SMALL_KL`] becomes 0, losses that are
    not GSPO's become its own, and the batch is counted in TRL's terms: `per_device_train_batch_size` in completions,
    `steps_per_generation` in micro-batches. What was chosen, and is GSPO's, stays. Every field of the source is in
    the result: as an option, with a remark if it is not just carried over, as dropped, as unset, or as unknown.

    Args:
        config (`Mapping[str, Any]`): of TRL, stateset-agents, a stand-alone GSPO script, verl or ms-swift.
        system (`str`, *optional*): one of [`SYSTEMS`]; by default [`detect`] tells it.
        num_processes (`int`, *optional*): that will train, which divide the batch; by default as many as the source
            names, or 1.

    Returns:
        `Migration`.

    Raises:
        MigrationError: if the system cannot be told, or a value cannot be read.
    """
    system = system or detect(config)
    if system not in SYSTEMS:
        raise MigrationError(f"`--from {system}` is not known; known are {', '.join(SYSTEMS)}.")
    result = Migration(system)
    for name, value in (_flat(config) if system == "verl" else config).items():
        _take(result, name, value)
    for step in (_rewards, _data, _model, _optimizer, _loss, _engine):
        step(result)
    for option, value in DEFAULTS.get(system, {}).items():
        if option not in result.values and _is_default_wanted(result, option):
            result.set(option, value, f"Not in the source, whose default it is: {_short(value)}.")
    _objective(result)
    _adapter(result)
    _vllm(result)
    _batch(result, num_processes)
    _evaluation(result)
    _names(result)
    for option in _missing(result.values):
        result.questions.append(f"`{option}` is not in the source: {REQUIRED[option]}.")
    return result


def _missing(values: Mapping[str, Any]) -> list[str]:
    """The required options that are not there. A task brings data and rewards."""
    brought = {"dataset_name", "reward_funcs"} if "task" in values else set()
    return [option for option in REQUIRED if option not in values and option not in brought]


def _take(result: Migration, name: str, value: Any) -> None:
    row = _row(result.system, name)
    is_no_task_of_ours = row is not None and row.to == "task" and value not in TASKS and "." not in str(value)
    if row is None or is_no_task_of_ours:
        result.unknown[name] = value
        return
    if value is None:
        result.unset.append(name)
        return
    if isinstance(value, str) and "$" in value and result.system in ("verl", "standalone", "ms-swift"):
        if re.search(r"\$\{[^}]*[.:]", value):
            result.drop(name, value, "A reference of Hydra to another field.")
        else:
            result.questions.append(f"`{name}: {value}` holds a variable that is not set here: write its value.")
            result.drop(name, value, "Its variable is not set here.")
        return
    if row.asks:
        result.questions.append(f"`{name}: {_short(value)}`: {row.why}")
    if row.to is None:
        result.drop(name, value, row.why)
    elif row.to.startswith("@env "):
        env = row.to.removeprefix("@env ")
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        result.set("env", {**result.values.get("env", {}), env: text}, f"{name}: {_short(value)}. {row.why}")
    elif row.to.startswith("@"):
        result._facts[row.to[1:]] = (name, value)
    else:
        try:
            converted = row.convert(value) if row.convert else value
        except (TypeError, ValueError) as error:
            raise MigrationError(f"`{name}: {value!r}` cannot be read: {error}") from error
        if row.to in result.values and result.values[row.to] != converted:
            result.remarks[row.to].append(f"It wins over {name}: {_short(value)}.")
            return
        plain = row.to == name and converted == value and not row.why
        result.set(row.to, converted, "" if plain else f"{name}: {_short(value)}. {row.why}".strip())


def _rewards(result: Migration) -> None:
    fact, source, values = result.fact, result.source, result.values
    if isinstance(values.get("reward_funcs"), str):
        values["reward_funcs"] = [values["reward_funcs"]]
    if fact("reward_model") is not None:
        models = fact("reward_model")
        models = models if isinstance(models, list) else [models]
        result.set(
            "reward_funcs",
            [*_list(values.get("reward_funcs")), *models],
            f"{source('reward_model')}. A reward model is one of them.",
        )
    if fact("reward_funcs") is not None:
        names = _list(fact("reward_funcs"))
        strangers = [name for name in names if name not in SWIFT_REWARDS and name not in SWIFT_REWARDS.values()]
        known = [SWIFT_REWARDS.get(name, name) for name in names if name not in strangers]
        if strangers:
            result.questions.append(
                f"`{source('reward_funcs')}`: {', '.join(strangers)} are plugins; name them as "
                "package.module.function."
            )
        if known:
            result.set(
                "reward_funcs",
                [*known, *values.get("reward_funcs", [])],
                f"{source('reward_funcs')}. TRL's names of the same rewards.",
            )
        else:
            result.drops("reward_funcs", "Plugins: name them as package.module.function.")
    soft = {"soft_punish_cache": fact("soft_cache_length"), "max_completion_len": fact("soft_max_length")}
    soft = {name: value for name, value in soft.items() if value is not None}
    if soft:
        used = [name for name in ("soft_cache_length", "soft_max_length") if fact(name) is not None]
        if "get_soft_overlong_punishment" in values.get("reward_funcs", []):
            soft.setdefault("max_completion_len", values.get("max_completion_length", 512))
            result.set("reward_kwargs", {"get_soft_overlong_punishment": soft}, " and ".join(map(source, used)) + ".")
        else:
            for name in used:
                result.drops(name, "soft_overlong is not among the rewards.")


def _data(result: Migration) -> None:
    fact, source, values = result.fact, result.source, result.values
    if fact("datasets") is not None:
        mixture = fact("datasets")
        one = mixture[0] if isinstance(mixture, list) and len(mixture) == 1 and isinstance(mixture[0], dict) else None
        known = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
        if one and set(one) <= set(known):
            result.questions = [question for question in result.questions if not question.startswith("`datasets:")]
            for key, value in one.items():
                result.set(known[key], value, f"datasets: {key}: {_short(value)}.")
        else:
            result.drops("datasets", "One data set is read: make the mixture a file of its own.")
    for name, option in (
        ("train_files", "dataset_name"),
        ("val_files", "eval_dataset_name"),
        ("dataset", "dataset_name"),
        ("val_dataset", "eval_dataset_name"),
    ):
        if fact(name) is None:
            continue
        files = _list(fact(name))
        if len(files) != 1 or not isinstance(files[0], str):
            result.asks(name, f"`{option}` takes one file, folder or hub id.")
            continue
        path, _, count = files[0].partition("#")
        if name == "val_files" and _number("", fact("test_freq") or -1) <= 0:
            result.drops(name, "`trainer.test_freq` does not ask for evaluation.")
            continue
        result.set(option, path, f"{source(name)}.")
        if count and name == "dataset":
            result.set("dataset_train_split", f"train[:{int(count)}]", f"{source(name)}.")
        if result.system == "verl" and name == "train_files":
            result.questions.append(
                "verl's rows hold the answer in `reward_model.ground_truth` and choose the reward by "
                "`data_source`: make a column of it, and name it in `solution_column`."
            )
    if fact("columns") is not None:
        columns = fact("columns") if isinstance(fact("columns"), dict) else {}
        for ours, theirs in (("prompt_column", "query"), ("solution_column", "solution")):
            for old, new in columns.items():
                if new == theirs:
                    result.set(ours, old, f"{source('columns')}.")
        if not columns:
            result.asks("columns", "`prompt_column` and `solution_column` name the columns.")
    if fact("own_data") is not None:
        ours = OWN_DATA.get(fact("own_data"))
        if ours:
            for option, value in ours.items():
                result.set(option, value, f"{source('own_data')}.")
        elif ours is None:
            result.set("dataset_name", fact("own_data"), f"{source('own_data')}.")
        else:
            result.asks(
                "own_data",
                "Its rows are made by its own code: write them to a file, with the columns prompt and solution, "
                "and set `dataset_name`.",
            )
    if fact("max_examples") is not None:
        split = values.get("dataset_train_split", "train")
        result.set("dataset_train_split", f"{split}[:{_whole(result, 'max_examples')}]", f"{source('max_examples')}.")
    wants_eval = fact("eval_steps") is not None and "dataset_name" in values
    if fact("eval_examples") is not None:
        if wants_eval:
            result.set(
                "dataset_test_split", f"test[:{_whole(result, 'eval_examples')}]", f"{source('eval_examples')}."
            )
        else:
            result.drops(
                "eval_examples", "There is nothing to evaluate on: set `eval_dataset_name` and `eval_strategy`."
            )
    if fact("eval_steps") is not None:
        if wants_eval:
            result.set("eval_strategy", "steps", f"{source('eval_steps')}.")
            result.set("eval_steps", _whole(result, "eval_steps"), f"{source('eval_steps')}.")
        else:
            result.drops(
                "eval_steps",
                "There is nothing to evaluate on: set `eval_dataset_name`, `eval_strategy` and `eval_steps`.",
            )


def _model(result: Migration) -> None:
    fact, source, values = result.fact, result.source, result.values
    if fact("tuner") is not None:
        kind = fact("tuner")
        if kind not in ("lora", "full"):
            result.asks("tuner", "TRL's script knows LoRA and full fine-tuning; full it is here.")
        result.set("use_peft", kind == "lora", f"{source('tuner')}.")
    if fact("lora_rank") is not None:
        rank = _whole(result, "lora_rank", least=0)
        result.set("use_peft", rank > 0, f"{source('lora_rank')}.")
        if rank:
            result.set("lora_r", rank, f"{source('lora_rank')}.")
    if fact("quant_method") is not None:
        bits = int(_number("quant_bits", fact("quant_bits") or 4))
        if fact("quant_method") == "bnb" and bits in (4, 8):
            words = source("quant_method") + (f", {source('quant_bits')}" if fact("quant_bits") is not None else "")
            result.set(f"load_in_{bits}bit", True, f"{words}.")
        else:
            result.asks("quant_method", "TRL quantizes with bitsandbytes alone, to 4 or 8 bits.")
    elif fact("quant_bits") is not None:
        result.drops("quant_bits", "Without `quant_method` nothing is quantized.")
    if values.get("load_in_8bit") and values.get("load_in_4bit"):
        values.pop("load_in_4bit")
        result.dropped.append("use_4bit: true. 8 bits were asked for too, which win there.")
    if values.get("bf16") and values.get("fp16"):
        values.pop("fp16")
        result.dropped.append("fp16: true. bf16 was asked for too.")
    if fact("deepspeed") is not None:
        choice = fact("deepspeed")
        if choice in ("zero3", "zero3_offload"):
            result.set("deepspeed", "configs/deepspeed/zero3.json", f"{source('deepspeed')}.")
        elif isinstance(choice, dict) or str(choice).endswith(".json"):
            result.set("deepspeed", choice)
        else:
            result.asks("deepspeed", "A JSON file of DeepSpeed's is wanted; configs/deepspeed/zero3.json is there.")
    if fact("adam8bit"):
        result.set("optim", "adamw_bnb_8bit", f"{source('adam8bit')}.")


def _optimizer(result: Migration) -> None:
    fact, source = result.fact, result.source
    if fact("betas") is not None:
        pair = _list(fact("betas"))
        if len(pair) != 2:
            raise MigrationError(f"`{source('betas')}` are not two numbers.")
        result.set("adam_beta1", pair[0], f"{source('betas')}.")
        result.set("adam_beta2", pair[1], f"{source('betas')}.")
    if fact("schedule") is not None:
        kind = {"constant": "constant_with_warmup"}.get(fact("schedule"), fact("schedule"))
        result.set("lr_scheduler_type", kind, f"{source('schedule')}.")
    if fact("warmup_steps") is not None and _number("", fact("warmup_steps")) <= 0:
        result.drops("warmup_steps", "Not set there.")
        result._facts.pop("warmup_steps")
    if fact("warmup_ratio") is not None and "warmup_steps" not in result._facts:
        result.set(
            "warmup_steps",
            _number("lr_warmup_steps_ratio", fact("warmup_ratio")),
            f"{source('warmup_ratio')}. A share of all steps.",
        )
    else:
        result.drops("warmup_ratio", "`lr_warmup_steps` wins.")


def _loss(result: Migration) -> None:
    fact, source, values = result.fact, result.source, result.values
    if fact("clip_ratio") is not None:
        sides = [option for option in ("epsilon", "epsilon_high") if option not in values]
        for option in sides:
            result.set(option, fact("clip_ratio"), f"{source('clip_ratio')}.")
        if not sides:
            result.drops("clip_ratio", "clip_ratio_low and clip_ratio_high win.")
    if fact("use_gspo_token"):
        result.set("importance_sampling_level", "sequence_token", f"{source('use_gspo_token')}.")
    elif result.system in ("stateset", "standalone") and fact("use_gspo_token") is not None:
        result.drops("use_gspo_token", "`importance_sampling_level: sequence` is the default.")
    if fact("rescore") is False:
        result.asks(
            "rescore",
            "`use_rollout_logps: true` does it, with `use_vllm: true` and `vllm_importance_sampling_correction: "
            "false`.",
        )
    else:
        result.drops("rescore", "Old log-probabilities are always scored here.")
    mode = fact("loss_mode")
    if mode == "gspo":
        result.set(
            "importance_sampling_level",
            "sequence",
            f"{source('loss_mode')}. One advantage a completion: its gradient is that of `sequence`.",
        )
    elif mode is not None:
        result.drops(
            "loss_mode",
            f"{'The loss of GRPO' if mode == 'vanilla' else 'Another loss'}; GSPO's is `importance_sampling_level: "
            "sequence`.",
        )
    aggregation = fact("loss_agg_mode")
    if aggregation is not None:
        why = {
            "seq-mean-token-mean": "Each sequence counts the same.",
            "token-mean": (
                "It weights each sequence by its length; its own GSPO loss overrides it, and takes the mean of each."
            ),
        }.get(aggregation, "It weights each sequence by its length; `loss_type: luspo` does so on purpose.")
        result.set("loss_type", "grpo", f"{source('loss_agg_mode')}. {why}")
    if fact("use_kl_loss"):
        result.set(
            "beta",
            fact("kl_loss_coef") if fact("kl_loss_coef") is not None else 0.001,
            f"{source('use_kl_loss')}" + (f", {source('kl_loss_coef')}." if fact("kl_loss_coef") is not None else "."),
        )
    else:
        result.drops("use_kl_loss", "`beta` is 0.")
        result.drops("kl_loss_coef", "Not used without `use_kl_loss`.")
    if fact("kl_in_reward"):
        result.asks("kl_in_reward", "TRL has the KL term in the loss alone: `beta`.")
        result.drops("kl_ctrl", "Of the KL term in the reward.")
    else:
        result.drops("kl_in_reward", "TRL has the KL term in the loss alone.")
        result.drops("kl_ctrl", "Not used without `use_kl_in_reward`.")
    if fact("use_reference_model") is not None:
        if not fact("use_reference_model") and _number("beta", values.get("beta", 0)) > 0:
            was = values.pop("beta")
            result.remarks.pop("beta", None)
            result.set(
                "beta",
                0.0,
                f"beta: {_short(was)} with {source('use_reference_model')}: without a reference model its KL term "
                "was off.",
            )
        else:
            result.drops("use_reference_model", "TRL loads the reference model if `beta` > 0.")
    if fact("entropy"):
        if "entropy_coef" in known_options():
            result.set(
                "entropy_coef",
                fact("entropy"),
                f"{source('entropy')}. Not GSPO's, kept; every row then goes through the model.",
            )
        else:
            result.asks("entropy", "This TRL has no entropy bonus.")
    elif fact("entropy") is not None:
        result.drops("entropy", "The default.")
    if fact("adv_estimator") not in (None, "grpo"):
        result.asks("adv_estimator", "GSPO's advantages are the rewards, normalised in their group.")
    else:
        result.drops("adv_estimator", "What GSPO does.")
    if fact("baseline") not in (None, "group_mean"):
        result.asks("baseline", "GSPO's baseline is the mean of the group.")
    else:
        result.drops("baseline", "What GSPO does.")
    if fact("rlhf_type") not in (None, "grpo"):
        raise MigrationError(f"`{source('rlhf_type')}` is not GRPO: there is nothing to migrate.")
    result.drops("rlhf_type", "What `scripts/train.py` does.")


def _engine(result: Migration) -> None:
    fact, source = result.fact, result.source
    if fact("engine") is not None:
        result.set(
            "use_vllm",
            fact("engine") != "hf",
            f"{source('engine')}." + (" TRL has vLLM." if fact("engine") == "sglang" else ""),
        )
    if fact("loggers") is not None:
        known = [
            name
            for name in map(str, _list(fact("loggers")))
            if name in ("wandb", "tensorboard", "swanlab", "mlflow", "clearml", "trackio")
        ]
        result.set("report_to", known or "none", f"{source('loggers')}.")
    result.drops("dynamic", VERL[ACTOR + "use_dynamic_bsz"].why)


def _is_default_wanted(result: Migration, option: str) -> bool:
    """Whether a default of the source is worth writing down: not where another field has decided it."""
    if option.startswith("lora_"):
        return bool(result.values.get("use_peft", DEFAULTS[result.system].get("use_peft")))
    if result.system == "stateset" and result.fact("prompts_per_rollout") is not None:
        return option not in ("per_device_train_batch_size", "gradient_accumulation_steps")
    return True


def _objective(result: Migration) -> None:
    values, remarks = result.values, result.remarks

    level = values.get("importance_sampling_level")
    is_sequence = level in LEVELS or (level is None and result.system in ("stateset", "standalone"))
    if level not in LEVELS:
        why = "The source's default is `token`, which is GRPO." if level is None and not is_sequence else ""
        result.set(
            "importance_sampling_level", "sequence", f"{why} The unit of GSPO's ratio (paper, equation 7).".strip()
        )

    length = _number("max_completion_length", values.get("max_completion_length", 512))
    chosen = {name: _number(name, values[name]) for name in ("epsilon", "epsilon_high") if name in values}
    paper = {"epsilon": EPSILON_LOW, "epsilon_high": EPSILON_HIGH}
    if any(is_token_level(value, is_sequence, length) for value in chosen.values()):
        for name in paper:
            was = _TOKEN_LEVEL if name in chosen else ""
            result.set(name, paper[name], f"{was}The paper's (section 5.1) in its place.")
    elif not chosen:
        for name in paper:
            result.set(name, paper[name], "Not in the source. The paper's (section 5.1).")
    elif "epsilon_high" not in chosen:
        result.set(
            "epsilon_high",
            chosen["epsilon"],
            f"The source has one width for both sides: epsilon: {_short(values['epsilon'])}.",
        )
        remarks["epsilon"].append("Kept.")
    elif "epsilon" not in chosen:
        result.set("epsilon", EPSILON_LOW, "Not in the source. The paper's (section 5.1).")
    for name in chosen:
        values[name] = _number(name, values[name])
        if values[name] == chosen[name] and not remarks[name]:
            remarks[name].append("Kept: it is of the size of a sequence's ratio.")
    if length <= _LONG_COMPLETION and "clip_fraction_target" not in values:
        remarks["epsilon"].append(
            f"With at most {int(length)} tokens the ratio spreads wider than the paper's; `clip_fraction_target: "
            "0.15` finds the range."
        )

    beta = _number("beta", values.get("beta", 0))
    if result.system == "ms-swift" and "beta" not in values:
        result.set(
            "beta",
            0.0,
            "Not in the source, whose default is 0.04. GSPO's objective (paper, equation 5) has no KL term.",
        )
    elif 0 < beta < SMALL_KL:
        result.set(
            "beta",
            0.0,
            f"{_short(values['beta'])} is below {SMALL_KL}, where the guides switch it off: GSPO's objective "
            "(paper, equation 5) has no KL term.",
        )
    elif beta > 0:
        result.set(
            "beta",
            beta,
            f"Kept, since it is not below {SMALL_KL}: a reference model is loaded, and every row goes through the "
            "model.",
        )
    elif "beta" in values:
        result.set("beta", 0.0, f"beta: {_short(values['beta'])} is none." if beta else "")

    loss = values.get("loss_type")
    loss = loss[0] if isinstance(loss, list) and len(loss) == 1 else loss
    if loss == "luspo":
        remarks["loss_type"].append("Kept: it weights each sequence by its length on purpose.")
    elif loss != "grpo":
        was = "TRL's default is dapo, which weights each sequence by its length." if result.system == "trl" else ""
        if loss is not None:
            reason = _REFUSED_LOSS_TYPES.get(loss) if isinstance(loss, str) else None
            was = f"loss_type: {_short(loss)} {reason or 'is not known here'}."
        result.set("loss_type", "grpo", f"{was} Each sequence counts the same (paper, equation 5).".strip())
    for name in _FOREIGN_LOSS_FIELDS:
        if name in values:
            result.drop(name, values.pop(name), f"Only `loss_type: {name.split('_')[0]}` reads it.")
            remarks.pop(name, None)
    if "delta" in values:
        remarks["delta"].append("Kept: it bounds the ratio of a whole completion from above, which seldom gets there.")
    if values.get("disable_dropout") is False:
        result.set(
            "disable_dropout", True, "disable_dropout: false. Dropout alone moves the ratio past the clip range."
        )


def _adapter(result: Migration) -> None:
    values = result.values
    if values.get("use_peft"):
        if _number("lora_dropout", values.get("lora_dropout", 0.05)) != 0:
            was = (
                f"lora_dropout: {_short(values['lora_dropout'])}."
                if "lora_dropout" in values
                else "TRL's default is 0.05."
            )
            result.remarks.pop("lora_dropout", None)
            result.set(
                "lora_dropout", 0.0, f"{was} GSPO needs dropout off: it alone moves the ratio past the clip range."
            )
        modules = values.get("lora_target_modules")
        if isinstance(modules, str):
            values["lora_target_modules"] = [modules]
    else:
        for name in [name for name in values if name.startswith("lora_") or name in ("use_rslora", "use_dora")]:
            result.drop(name, values.pop(name), "There is no adapter.")
            result.remarks.pop(name, None)


def _vllm(result: Migration) -> None:
    values = result.values
    if not values.get("use_vllm"):
        return
    if "vllm_importance_sampling_correction" not in values or values["vllm_importance_sampling_correction"]:
        sampling = {
            name: _number(name, values.get(name) or default)
            for name, default in (("top_p", 1), ("top_k", 0), ("min_p", 0))
        }
        if sampling["top_p"] < 1 or sampling["top_k"] > 0 or sampling["min_p"] > 0:
            result.set(
                "vllm_importance_sampling_correction",
                False,
                "Not in the source. top_p, top_k and min_p truncate what is sampled, which biases TRL's correction.",
            )
        elif str(values.get("vllm_importance_sampling_mode", "sequence_mask")).startswith("sequence_"):
            result.set(
                "vllm_importance_sampling_mode",
                "token_truncate",
                "TRL's sequence_mask multiplies the ratios of all tokens, so that long completions fall out by "
                "rounding alone.",
            )


def _batch(result: Migration, num_processes: int | None) -> None:
    values = result.values
    # Of stateset-agents, `TrainingConfig` has 16 and its `GSPOConfig`, which names the sides of its clip range, 4.
    default = {"verl": 1, "stateset": 4 if _is_stateset_gspo(result) else 16}.get(result.system, 8)
    group = int(_number("num_generations", values.get("num_generations", default)))
    if result.system == "stateset" and "num_generations" not in values:
        result.set("num_generations", group, f"Not in the source, whose default it is: {group}.")
    if group < 2:
        result.questions.append(f"{group} completion a prompt makes no group: `num_generations` is set to 8.")
        group = 8
        result.set("num_generations", group, "GSPO needs two completions a prompt at least.")
    values["num_generations"] = group
    iterations = int(_number("num_iterations", values.get("num_iterations", 1)))
    # verl's defaults are one node of 8.
    told = _whole(result, "gpus", 8 if result.system == "verl" else 1) * _whole(result, "nodes", 1)
    processes = num_processes or told
    for name in ("gpus", "nodes"):
        if result.fact(name) is not None:
            result.dropped.append(
                f"{result.source(name)}. Of the launcher: `accelerate launch --num_processes {processes}`."
            )

    {"verl": _batch_of_verl, "standalone": _batch_of_standalone}.get(result.system, _batch_of_trl)(
        result, group, processes, iterations
    )

    micro, accumulation = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    steps = values["steps_per_generation"]
    count = "1 process" if processes == 1 else f"{processes} processes"
    whole = group // math.gcd(micro * processes, group)
    whole = whole if steps % accumulation else math.lcm(whole, accumulation)
    if steps % whole:
        steps = whole * math.ceil(steps / whole)
        result.set(
            "steps_per_generation",
            steps,
            f"Raised to {steps}, so that {count} x {micro} x {steps} completions are whole groups of {group}.",
        )
    rollout, step = micro * steps * processes, micro * accumulation * processes
    result.batch = (
        f"An optimizer step: {micro} completions in a micro-batch x {accumulation} x {count} = {step}. A rollout: "
        f"{micro} x {steps} x {count} = {rollout} completions, {rollout // group} prompts."
    )
    minibatches = max(steps * iterations // accumulation, 1)
    for name, option in (
        ("rollouts", "max_steps"),
        ("save_freq", "save_steps"),
        ("test_freq", "eval_steps"),
        ("warmup_steps", "warmup_steps"),
    ):
        if result.fact(name) is None:
            continue
        count = int(_number(*result._facts[name]))
        if count <= 0:
            if option == "save_steps":
                result.set("save_strategy", "no", f"{result.source(name)}. The model is saved at the end.")
            else:
                result.dropped.append(f"{result.source(name)}. Not set there.")
            continue
        if option == "eval_steps":
            if "eval_dataset_name" not in values:
                result.dropped.append(
                    f"{result.source(name)}. There is nothing to evaluate on: set `eval_dataset_name`, "
                    "`eval_strategy` and `eval_steps`."
                )
                continue
            result.set("eval_strategy", "steps", f"{result.source(name)}.")
        result.set(
            option,
            count * minibatches,
            f"{result.source(name)}, counted in rollouts: times {minibatches} optimizer steps.",
        )
    if result.fact("eval_on_start") is not None:
        if result.fact("eval_on_start") and values.get("eval_strategy", "no") != "no":
            result.set("eval_on_start", True, f"{result.source('eval_on_start')}.")
        else:
            result.dropped.append(f"{result.source('eval_on_start')}. The default, or there is no evaluation.")


def _is_stateset_gspo(result: Migration) -> bool:
    names = {remark.split(":")[0] for remarks in result.remarks.values() for remark in remarks}
    return result.fact("prompts_per_rollout") is not None or bool({"clip_range_left", "clip_range_right"} & names)


def _batch_of_trl(result: Migration, group: int, processes: int, iterations: int) -> None:
    values = result.values
    default = {"trl": 8, "ms-swift": 1, "stateset": 1}[result.system]
    micro = int(_number("per_device_train_batch_size", values.get("per_device_train_batch_size", default)))
    accumulation = int(_number("gradient_accumulation_steps", values.get("gradient_accumulation_steps", 1)))
    if micro < 1 or accumulation < 1:
        raise MigrationError(
            f"`per_device_train_batch_size: {micro}` and `gradient_accumulation_steps: {accumulation}` must be at "
            "least 1."
        )
    prompts = result.fact("prompts_per_rollout")
    if prompts is not None:
        prompts = _whole(result, "prompts_per_rollout")
        step = math.ceil(prompts / MINIBATCHES) * group
        was = [
            f"{name}: {values.pop(name)}"
            for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
            if name in values
        ]
        micro, accumulation = _split(step, processes, micro if was else _MICRO_BATCH)
        words = (
            f"{result.source('prompts_per_rollout')} x {group} completions, of which its trainer makes one "
            f"optimizer step, and {MINIBATCHES} here (paper, section 5.1)."
        )
        for option, value in (("per_device_train_batch_size", micro), ("gradient_accumulation_steps", accumulation)):
            result.remarks.pop(option, None)
            result.set(option, value, words)
        for words in was:
            result.dropped.append(
                f"{words}. Its GSPO trainer does not read it; generations_per_iteration sizes the batch."
            )
        result.set(
            "steps_per_generation",
            MINIBATCHES * accumulation,
            f"{MINIBATCHES} minibatches x gradient_accumulation_steps (paper, section 5.1).",
        )
        if result.fact("episodes") is not None:
            result.dropped.append(
                f"{result.source('episodes')}. Its GSPO trainer does not read it; num_outer_iterations says how long."
            )
        return
    values["per_device_train_batch_size"], values["gradient_accumulation_steps"] = micro, accumulation
    if result.fact("episodes") is not None and "max_steps" not in values and result.fact("rollouts") is None:
        steps = max(_whole(result, "episodes") // accumulation, 1)
        result.set(
            "max_steps",
            steps,
            f"{result.source('episodes')} / gradient_accumulation_steps: {accumulation}, as its get_total_steps has "
            "it.",
        )
    elif result.fact("episodes") is not None:
        result.dropped.append(f"{result.source('episodes')}. num_outer_iterations says how long.")
    paper = MINIBATCHES * accumulation
    name = next(
        (name for name in ("steps_per_generation", "generation_batch_size") if result.fact(name) is not None), None
    )
    if name is None:
        result.set(
            "steps_per_generation",
            paper,
            "Not in the source, which takes one optimizer step from each rollout: the ratio is then exactly 1. "
            f"{_PAPER_STEPS}",
        )
        return
    steps = _whole(result, name)
    words = f"{result.source(name)}."
    if name == "generation_batch_size":
        if steps % (micro * processes):
            result.set(
                "steps_per_generation",
                paper,
                f"{words} Not a multiple of {micro} completions x {processes} processes. {MINIBATCHES} x "
                "gradient_accumulation_steps (paper, section 5.1).",
            )
            result.questions.append(
                f"`{result.source(name)}` is no multiple of {micro} x {processes} processes: give --num_processes."
            )
            return
        steps //= micro * processes
    elif result.fact("generation_batch_size") is not None:
        result.dropped.append(f"{result.source('generation_batch_size')}. steps_per_generation says the same.")
    if accumulation % (steps * iterations) == 0:
        result.set(
            "steps_per_generation",
            paper,
            f"{words} With gradient_accumulation_steps: {accumulation} that is one optimizer step a rollout, and "
            f"the ratio exactly 1. {_PAPER_STEPS}",
        )
    else:
        result.set(
            "steps_per_generation",
            steps,
            f"{words} Kept: {steps * iterations / accumulation:g} optimizer steps a rollout (paper, section 5.1: "
            f"{MINIBATCHES}).",
        )


def _batch_of_verl(result: Migration, group: int, processes: int, iterations: int) -> None:
    rollout = _whole(result, "prompts_per_rollout", 1024)
    step = _whole(result, "prompts_per_step", 256)
    if result.fact("completions_per_micro_batch") is not None:
        limit = _whole(result, "completions_per_micro_batch")
        words = f"{result.source('completions_per_micro_batch')}."
    elif result.fact("completions_of_all") is not None:
        limit = max(_whole(result, "completions_of_all") // processes, 1)
        words = f"{result.source('completions_of_all')}, over {processes} processes."
    else:
        limit = _MICRO_BATCH
        words = f"Not in the source. At most {_MICRO_BATCH} here; raise or lower it with the memory."
    if result.fact("completions_per_micro_batch") is not None and result.fact("completions_of_all") is not None:
        result.dropped.append(f"{result.source('completions_of_all')}. ppo_micro_batch_size_per_gpu wins.")
    micro, accumulation = _split(step * group, processes, limit)
    words_step = (
        result.source("prompts_per_step")
        if result.fact("prompts_per_step") is not None
        else f"ppo_mini_batch_size, by default: {step}"
    )
    words_rollout = (
        result.source("prompts_per_rollout")
        if result.fact("prompts_per_rollout") is not None
        else f"train_batch_size, by default: {rollout}"
    )
    minibatches = max(rollout // step, 1)
    why = f"{words_rollout} prompts a rollout, {minibatches} minibatches (paper, section 5.1: {MINIBATCHES})."
    if minibatches * iterations == 1:
        minibatches = MINIBATCHES
        why = (
            f"{words_rollout} prompts a rollout would be one optimizer step, and the ratio exactly 1. {MINIBATCHES} "
            "minibatches (paper, section 5.1)."
        )
    result.set("per_device_train_batch_size", micro, f"{words} Counted in completions.")
    result.set(
        "gradient_accumulation_steps",
        accumulation,
        f"{words_step} prompts x {group} completions / ({micro} x {processes} processes).",
    )
    result.set("steps_per_generation", accumulation * minibatches, f"{why} Counted in micro-batches.")


def _batch_of_standalone(result: Migration, group: int, processes: int, iterations: int) -> None:
    prompts = _whole(result, "prompts_per_step", 4) * _whole(result, "accumulation", 1)
    limit = _whole(result, "prompts_per_micro_batch", 1) * group
    micro, accumulation = _split(prompts * group, processes, limit)
    words = {
        name: result.source(name)
        for name in ("prompts_per_step", "prompts_per_micro_batch", "accumulation")
        if result.fact(name) is not None
    }
    result.set(
        "per_device_train_batch_size",
        micro,
        f"{words.get('prompts_per_micro_batch', 'mini_batch_size, by default: 1')} prompts x group_size: {group} "
        "completions.",
    )
    result.set(
        "gradient_accumulation_steps",
        accumulation,
        f"{words.get('prompts_per_step', 'batch_size, by default: 4')} prompts x group_size: "
        f"{group}{' x ' + words['accumulation'] if 'accumulation' in words else ''} completions to an optimizer "
        "step.",
    )
    result.set(
        "steps_per_generation",
        MINIBATCHES * accumulation,
        f"{MINIBATCHES} x gradient_accumulation_steps. {ONE_OLD_POLICY}",
    )


def _split(completions: int, processes: int, limit: int) -> tuple[int, int]:
    """A micro-batch of at most `limit`, and accumulation: over all processes they are `completions`, or a bit more."""
    each = math.ceil(completions / processes)
    micro = max(size for size in range(1, min(max(limit, 1), each) + 1) if each % size == 0)
    return micro, each // micro


def _evaluation(result: Migration) -> None:
    values = result.values
    if values.get("eval_strategy", "no") in ("no", False):
        if values.get("eval_strategy") is False:
            values["eval_strategy"] = "no"
        return
    group = int(_number("num_generations_eval", values.get("num_generations_eval") or values["num_generations"]))
    batch = int(_number("per_device_eval_batch_size", values.get("per_device_eval_batch_size", 8)))
    if batch % group:
        values["per_device_eval_batch_size"] = group * math.ceil(batch / group)
        result.remarks.setdefault("per_device_eval_batch_size", []).append(
            f"Raised from {batch} to whole groups of {group}."
        )


def gspo_name(name: str) -> str:
    """
    The name of a run, folder or hub repository for its GSPO twin, so that nothing of the first is overwritten.

    `grpo` in it becomes `gspo`, in its own case; a name without either gets `-gspo` at its end.
    """
    if re.search("grpo", name, re.IGNORECASE):
        return re.sub(
            "grpo",
            lambda match: "".join({"r": "s", "R": "S"}.get(letter, letter) for letter in match[0]),
            name,
            flags=re.IGNORECASE,
        )
    if re.search("gspo", name, re.IGNORECASE):
        return name
    stripped = name.rstrip("/")
    if PurePosixPath(stripped).name in ("", ".."):
        return f"{stripped}/gspo" if name else "gspo"
    return f"{stripped}-gspo"


def _names(result: Migration) -> None:
    values = result.values
    if "output_dir" not in values:
        run = values.get("run_name") or PurePosixPath(str(values.get("model_name_or_path", "run"))).name
        result.set("output_dir", f"outputs/{gspo_name(str(run).replace('/', '-'))}", "Not in the source.")
    for name in ("output_dir", "run_name", "hub_model_id"):
        if name not in values:
            continue
        was = str(values[name])
        new = gspo_name(was)
        if (
            new == was
            and result.system != "trl"
            and name == "output_dir"
            and "trl_gspo" not in was
            and "Not in the source." not in result.remarks[name]
        ):
            new = f"{was.rstrip('/')}-trl_gspo"
        if new != was:
            words = (
                "" if any(remark.endswith(f"{_short(was)}.") for remark in result.remarks[name]) else f"{name}: {was}."
            )
            result.set(name, new, f"{words} Renamed, so that nothing of the other run is overwritten.".strip())


# ---- values


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise MigrationError(f"`{name}: {value!r}` is not a number.")
    try:
        number = float(value)
    except ValueError:
        raise MigrationError(f"`{name}: {value!r}` is not a number.") from None
    if not math.isfinite(number):
        raise MigrationError(f"`{name}: {value!r}` is not finite.")
    return number


def _whole(result: Migration, fact: str, default: int | None = None, least: int = 1) -> int:
    if result.fact(fact) is None and default is not None:
        return default
    source, value = result._facts[fact]
    number = _number(source, value)
    if number != int(number) or number < least:
        raise MigrationError(f"`{source}: {value!r}` must be a whole number, at least {least}.")
    return int(number)


def _list(value: Any) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _short(value: Any) -> str:
    text = (
        str(value).lower()
        if isinstance(value, bool)
        else json.dumps(value)
        if isinstance(value, (dict, list))
        else str(value)
    )
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (" and more" if len(names) > 12 else "")


# ---- writing

_ORDER = (
    "model_name_or_path model_revision dtype bf16 fp16 use_cpu gradient_checkpointing deepspeed load_in_8bit "
    "load_in_4bit use_peft "
    "lora_r lora_alpha lora_dropout lora_target_modules dataset_name dataset_config dataset_train_split "
    "eval_dataset_name "
    "dataset_test_split prompt_column solution_column system_prompt reward_funcs reward_weights reward_kwargs env "
    "run_name "
    "output_dir max_completion_length temperature top_p top_k use_vllm num_generations per_device_train_batch_size "
    "gradient_accumulation_steps steps_per_generation num_iterations importance_sampling_level loss_type epsilon "
    "epsilon_high beta "
    "learning_rate lr_scheduler_type warmup_steps max_steps num_train_epochs"
).split()


def to_yaml(migration: Migration, source: str, target: str = "CONFIG.yaml") -> str:
    """
    A migration as YAML for `scripts/train.py`: each option under the remarks on it, then those that stand as they
    stood, then what was dropped, and what was not understood.

    Args:
        migration (`Migration`): what [`migrate_config`] returned.
        source (`str`): where it is from, for the head of the file.
        target (`str`, *optional*): its own name, for the command in its head.

    Returns:
        `str`.
    """
    lines = _comment(f"From {source} ({NAMES[migration.system]}), by scripts/migrate.py.")
    lines += ["#", f"#     accelerate launch scripts/train.py --config {target}", "#", *_comment(migration.batch)]
    for option in _missing(migration.values):
        lines += [
            "",
            *_comment(f"Not in the source. Set it here, or on the command line: {REQUIRED[option]}."),
            f"# {option}:",
        ]
    options = sorted(migration.values, key=lambda option: _ORDER.index(option) if option in _ORDER else len(_ORDER))
    for option in (option for option in options if migration.remarks.get(option)):
        lines += [
            "",
            *_comment(" ".join(dict.fromkeys(migration.remarks[option]))),
            *_dump(option, migration.values[option]),
        ]
    kept = [option for option in options if not migration.remarks.get(option)]
    if kept:
        lines += ["", "# As in the source: the same option, the same value."]
        for option in kept:
            lines += _dump(option, migration.values[option])
    questions = [question for question in migration.questions if "is not in the source:" not in question]
    for title, entries in (
        ("For you to decide:", questions),
        ("Dropped:", migration.dropped),
        (
            "Not understood, and so not carried over:",
            [f"{name}: {_short(value)}" for name, value in migration.unknown.items()],
        ),
        ("Not set in the source (null):", [", ".join(migration.unset)] if migration.unset else []),
    ):
        if entries:
            lines += ["", f"# {title}"]
            for entry in entries:
                lines += _comment(entry, "#   ", "#     ")
    return "\n".join(lines) + "\n"


def _comment(text: str, first: str = "# ", rest: str = "# ") -> list[str]:
    return textwrap.wrap(
        text, 118, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _dump(option: str, value: Any) -> list[str]:
    text = yaml.safe_dump({option: value}, default_flow_style=False, sort_keys=False, allow_unicode=True, width=10_000)
    return re.sub(r"^- ", "  - ", text, flags=re.MULTILINE).rstrip("\n").splitlines()


def table(system: str) -> str:
    """The mapping of one system as a table in Markdown, for docs/migration.md."""
    rows = ["| field | option | remark |", "| --- | --- | --- |"]
    for name, row in SYSTEMS[system].items():
        plain = row.to is not None and not row.to.startswith("@")
        option = f"`{row.to}`" if plain else "dropped" if row.to is None else "see remark"
        rows.append(f"| `{name}` | {option} | {row.why} |")
    if system == "verl":
        rows += [f"| `{name}`, what is not above | dropped | {why} |" for name, why in VERL_SECTIONS.items()]
    return "\n".join(rows)
