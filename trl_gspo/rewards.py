"""
Reward functions that TRL does not have, and rewards by name.

A reward function takes `completions` and the columns of the dataset as keyword arguments, and returns one number for
each completion, or `None` where it does not apply. Completions are strings, or lists of messages for chat prompts.
"""

import ast
import difflib
import functools
import importlib
import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import trl.rewards

from .sandbox import Limits, Program, check_platform, run_programs


logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)")

# What reward functions get beside the columns of the data set: of TRL, and `num_turns` of ours, for step rewards.
_HOST_ARGUMENTS = {
    "prompts",
    "completions",
    "completion_ids",
    "environments",
    "log_extra",
    "log_metric",
    "num_turns",
    "trainer_state",
}


def _text(completion: str | list[dict[str, Any]]) -> str:
    """What a completion says: of messages the last, which says nothing where it only calls a tool."""
    content = completion
    if isinstance(completion, list):
        content = completion[-1].get("content") if completion else None
    if isinstance(content, list):  # of parts, text and others
        content = "".join(part.get("text") or "" for part in content)
    return content or ""


def exact_match_reward(completions: list, solution: Sequence[str | None], **kwargs: Any) -> list[float | None]:
    """
    1 where the completion is the solution, up to white space around it, else 0.

    Args:
        completions (`list`): strings, or lists of messages, of which the last counts.
        solution (`Sequence[str | None]`): what is right; `None` where the reward does not apply.
        **kwargs (`Any`): other columns, not used.

    Returns:
        `list[float | None]`: one for each completion.
    """
    return [
        None if right is None else float(_text(completion).strip() == str(right).strip())
        for completion, right in zip(completions, solution, strict=True)
    ]


def final_number(text: str) -> Decimal | None:
    r"""
    The number a text ends on: behind the last `####` or in the last `\boxed{}` if there is one, else the last of all.

    Thousands separators, currency and percent signs and a full stop behind it do not count. `None` without a number.
    """
    for marker in ("####", r"\boxed{"):
        if marker in text:
            found = _NUMBER.findall(text.rsplit(marker, 1)[1])[:1]
            break
    else:
        found = _NUMBER.findall(text)[-1:]
    try:
        return Decimal(found[0].replace(",", "").rstrip(".")) if found else None
    except InvalidOperation:
        return None


def final_number_reward(completions: list, solution: Sequence[str | None], **kwargs: Any) -> list[float | None]:
    r"""
    1 where the completion ends on the number that the solution ends on, else 0. For data such as GSM8K.

    Both sides are read by [`final_number`], so `18`, `$18.00`, `#### 18` and `\boxed{18}` are equal.

    Args:
        completions (`list`): strings, or lists of messages, of which the last counts.
        solution (`Sequence[str | None]`): worked solutions; the reward is `None` where one holds no number.
        **kwargs (`Any`): other columns, not used.

    Returns:
        `list[float | None]`: one for each completion.
    """
    rights = [None if right is None else final_number(str(right)) for right in solution]
    return [
        None if right is None else float(final_number(_text(completion)) == right)
        for completion, right in zip(completions, rights, strict=True)
    ]


def keywords_reward(completions: list, keywords: Sequence[list[str] | None], **kwargs: Any) -> list[float | None]:
    """
    The share of a row's keywords that the completion holds, whatever their case; for facts that an answer must name.

    Args:
        completions (`list`): strings, or lists of messages, of which the last counts.
        keywords (`Sequence[list[str] | None]`): the words or phrases of each row; the reward is `None` where there is
            none.
        **kwargs (`Any`): other columns, not used.

    Returns:
        `list[float | None]`: one for each completion, in [0, 1].
    """
    scores: list[float | None] = []
    for completion, words in zip(completions, keywords, strict=True):
        text = _text(completion).lower()
        scores.append(sum(word.lower() in text for word in words) / len(words) if words else None)
    return scores


def get_pattern_reward(pattern: str) -> Callable:
    r"""
    A reward that is 1 where the whole completion, up to white space around it, matches a regular expression, else 0.

    Args:
        pattern (`str`): such as `"(Hello|Dear) .*(Best regards|Yours).*"`; a dot matches line ends too.

    Returns:
        `Callable`: the reward function.

    Raises:
        ValueError: if `pattern` is not a regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"`reward_kwargs` gives `get_pattern_reward` the pattern {pattern!r}: {error}.") from error

    def pattern_reward(completions: list, **kwargs: Any) -> list[float]:
        return [float(compiled.fullmatch(_text(completion).strip()) is not None) for completion in completions]

    return pattern_reward


# Families of reasoning-gym 0.1.25 whose verifiers evaluate the answer as Python: plainly, or in sympy's parser, which
# does the same. What a model wrote gets there only as a Python literal, as arithmetic, or as algebra.
_EVALUATED_FAMILIES = {
    "binary_matrix": "literal",
    "n_queens": "literal",
    "spiral_matrix": "literal",
    "string_insertion": "literal",
    "countdown": "arithmetic",
    "puzzle24": "arithmetic",
    "intermediate_integration": "algebra",
    "polynomial_multiplication": "algebra",
    "simple_integration": "algebra",
}
_FUNCTIONS = {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
_FUNCTIONS |= {"exp", "log", "ln", "sqrt", "pi", "Abs"}
_LONGEST_FORMULA = 500


def reasoning_reward(completions: list, reasoning_item: Sequence[str | None], **kwargs: Any) -> list[float | None]:
    """
    What reasoning-gym's own verifier gives the answer, mostly 1 or 0; some families give shares.

    The answer is what stands between the last `<answer>` and `</answer>`; without these, all behind the last
    `</think>`. Needs the extra `reasoning`. Some verifiers evaluate the answer as Python: to those it gets only as a
    literal or as a formula, so that nothing a model wrote is run.

    Args:
        completions (`list`): strings, or lists of messages, of which the last counts.
        reasoning_item (`Sequence[str | None]`): as the task `reasoning` makes them: JSON of family, seed, index and
            parameters. The reward is `None` where it is.
        **kwargs (`Any`): other columns, not used.

    Returns:
        `list[float | None]`: one for each completion.
    """
    scores: list[float | None] = []
    for completion, item in zip(completions, reasoning_item, strict=True):
        if item is None:
            scores.append(None)
            continue
        answer = _final_answer(_text(completion))
        dataset, entry = reasoning_entry(item)
        if not _is_safe(answer, _EVALUATED_FAMILIES.get(json.loads(item)["family"])):
            scores.append(float(answer == entry["answer"]))
            continue
        try:
            scores.append(float(dataset.score_answer(answer, entry)))
        except Exception:  # a verifier that trips over an answer has not found it right
            scores.append(0.0)
    return scores


def _final_answer(text: str) -> str:
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return (tagged[-1] if tagged else text.rsplit("</think>", 1)[-1]).strip()


def _is_safe(answer: str, kind: str | None) -> bool:
    """Whether evaluating `answer` runs nothing but a literal, or a formula that ends soon."""
    if kind is None:
        return True
    if kind == "literal":
        try:
            ast.literal_eval(answer)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return False
        return True
    if len(answer) > _LONGEST_FORMULA or re.search(r"[^A-Za-z0-9\s.+*/()-]|\.(?!\d)|\d{7}", answer):
        return False
    words = re.findall(r"[A-Za-z]+", answer)
    if kind == "arithmetic":
        return not words and "**" not in answer
    # Towers of powers are numbers that no machine writes down: small exponents, and few powers of brackets.
    exponents = re.findall(r"\*\*\s*(?:-?\d{1,2}|\(-?\d{1,2}(?:/\d{1,2})?\))(?!\s*\*\*|\d)", answer)
    return (
        all(len(word) == 1 or word in _FUNCTIONS for word in words)
        and len(exponents) == answer.count("**")
        and len(re.findall(r"\)\s*\*\*", answer)) <= 2
    )


def _reasoning_gym():
    try:
        import reasoning_gym.factory
    except ImportError as error:
        raise ImportError(
            "The task `reasoning` and the reward `reasoning_reward` need reasoning-gym: pip install "
            '"trl_gspo[reasoning]".'
        ) from error
    return reasoning_gym.factory


# Of reasoning-gym 0.1.25. A policy finds what a verifier takes for right; a test tries each family.
UNFIT_FAMILIES = {
    "coin_flip": "its verifier takes the first digits for the whole number",
    "complex_arithmetic": "its verifier takes `nan` for the right number",
    "composite": "it is made of other families: name those",
    "game_of_life_halting": "its verifier takes any text for `True`",
    "list_functions": "its entries differ from one call to the next",
}


def reasoning_families() -> list[str]:
    """The families of reasoning-gym that can be trained on, by name."""
    return sorted(set(_reasoning_gym().DATASETS) - set(UNFIT_FAMILIES))


@functools.lru_cache(maxsize=256)
def reasoning_dataset(family: str, seed: int, params: str) -> Any:
    """A family of reasoning-gym; `params` as JSON."""
    return _reasoning_gym().create_dataset(family, seed=seed, **json.loads(params))


@functools.lru_cache(maxsize=1024)
def reasoning_entry(item: str) -> tuple[Any, dict[str, Any]]:
    """The data set and the entry that a `reasoning_item` stands for."""
    fields = json.loads(item)
    dataset = reasoning_dataset(fields["family"], fields["seed"], json.dumps(fields["params"]))
    return dataset, dataset[fields["index"]]


_OURS = {
    function.__name__: function
    for function in (exact_match_reward, final_number_reward, get_pattern_reward, keywords_reward, reasoning_reward)
}


def _trl_names() -> list[str]:
    return [name for name in dir(trl.rewards) if name.endswith("_reward") or name.startswith("get_")]


def reward_names() -> list[str]:
    """Names that [`load_reward`] knows by themselves: ours, then TRL's."""
    return sorted([*_OURS, "code_reward"]) + sorted(set(_trl_names()) - set(_OURS))


def load_reward(
    name: str,
    kwargs: dict[str, Any] | None = None,
    max_completion_length: int | None = None,
    allow_code_execution: bool = False,
) -> Callable | str:
    """
    A reward function by name.

    Args:
        name (`str`): one of [`reward_names`]; `package.module.function`, imported from Python's path as it stands
            (`PYTHONPATH`), and so not from the working directory unless it is there; or a reward model, as a folder or
            a hub id with a slash, which is handed to TRL as it is.
        kwargs (`dict`, *optional*): for `code_reward`, and for a name that starts with `get_`, a function that makes
            the reward: its arguments.
        max_completion_length (`int`, *optional*): default of their `max_completion_len` and `max_len`; a fifth of it
            is the default of `soft_punish_cache`, as in TRL's `scripts/grpo.py`.
        allow_code_execution (`bool`, *optional*, defaults to `False`): whether `code_reward` may run what a model
            wrote.

    Returns:
        `Callable` or `str`: for the trainer's `reward_funcs`.

    Raises:
        ValueError: if there is no such reward, or its arguments do not fit.
    """
    if name == "code_reward":
        given = (kwargs or {}) | {"allow_code_execution": allow_code_execution}  # no file of arguments allows it
        return _make(get_code_reward, name, given, max_completion_length)
    if name in _OURS:
        function = _OURS[name]
    elif name in _trl_names():
        function = getattr(trl.rewards, name)
    elif "/" in name or os.path.isdir(name):
        return name
    elif "." in name:
        function = _import(name)
    else:
        near = difflib.get_close_matches(name, reward_names(), n=1)
        raise ValueError(
            f"`reward_funcs` has no {name!r}{f', did you mean {near[0]!r}?' if near else '.'} Known are "
            f"{', '.join(reward_names())}; a `package.module.function`; a reward model by folder or hub id."
        )

    if name.rsplit(".", 1)[-1].startswith("get_"):
        function = _make(function, name, kwargs or {}, max_completion_length)
    elif kwargs:
        raise ValueError(f"`reward_kwargs` has arguments for {name!r}, which takes none.")
    return _for_plain_text(function) if name in _trl_names() else function


def check_columns(reward: Callable | str, columns: Sequence[str]) -> None:
    """
    Raises `ValueError` if a reward function needs a column that the data set does not have; the message lists them.

    Args:
        reward (`Callable` or `str`): as [`load_reward`] returned it.
        columns (`Sequence[str]`): of the data set, as [`~trl_gspo.tasks.to_prompts`] left it.
    """
    if isinstance(reward, str):
        return
    parameters = inspect.signature(reward).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = {p.name for p in parameters if p.kind in named and p.default is inspect.Parameter.empty}
    missing = sorted(needed - _HOST_ARGUMENTS - set(columns))
    if missing:
        name = getattr(reward, "__name__", repr(reward))
        raise ValueError(
            f"The reward {name!r} needs the column {', '.join(map(repr, missing))}, which the data set "
            f"does not have. It has {', '.join(columns)}; `solution_column` names the one to use as 'solution'."
        )


def _import(name: str) -> Callable:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"`reward_funcs` names {name!r}, which has not the form `package.module.function`.")
    module_name, function_name = name.rsplit(".", 1)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"`reward_funcs` names {name!r}, and {error}. It is imported from Python's path alone, to which the "
            "working directory does not belong by itself: start with `PYTHONPATH=. accelerate launch ...`, or with "
            "the folder that holds it."
        ) from error
    if not hasattr(module, function_name):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"`reward_funcs` names {name!r}, and {module.__file__} has no {function_name!r}. It has "
            f"{', '.join(callables) or 'nothing to call'}."
        )
    function = getattr(module, function_name)
    if not callable(function):
        raise ValueError(f"`reward_funcs` names {name!r}, which is a {type(function).__name__} and cannot be called.")
    return function


def _make(factory: Callable, name: str, kwargs: dict[str, Any], max_completion_length: int | None) -> Callable:
    parameters = inspect.signature(factory).parameters
    if max_completion_length is not None:
        derived = {
            "max_completion_len": max_completion_length,
            "max_len": max_completion_length,
            "soft_punish_cache": max_completion_length // 5,
        }
        kwargs = {key: value for key, value in derived.items() if key in parameters} | kwargs
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        raise ValueError(
            f"`reward_kwargs` does not fit {name}{inspect.signature(factory)}: {error}. Give them as "
            f"`reward_kwargs: {{{name}: {{...}}}}`."
        ) from error
    return factory(**kwargs)


def _for_plain_text(function: Callable) -> Callable:
    # TRL's own rewards read `completion[0]["content"]`, which a plain prompt's completion, a string, does not have.
    @functools.wraps(function)
    def reward(completions, **kwargs):
        messages = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions]
        return function(completions=messages, **kwargs)

    return reward


_FENCED = re.compile(r"^```([^\n`]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

CODE_OUTCOMES = ("passed", "failed", "error", "timeout", "memory", "disk", "output", "unused", "lost")


def extract_code(text: str) -> str:
    """The last fenced block that is marked as Python; else the last that is not marked; else all of the text."""
    blocks = [(label.strip().lower(), body) for label, body in _FENCED.findall(text)]
    for labels in (("python", "py", "python3"), ("",)):
        found = [body for label, body in blocks if label in labels]
        if found:
            return found[-1]
    return text


def get_code_reward(
    allow_code_execution: bool = False,
    packages: bool = False,
    workers: int | None = None,
    wall_seconds: float = 10.0,
    cpu_seconds: int = 5,
    memory_mib: int = 512,
    disk_mib: int = 16,
    output_kib: int = 256,
) -> Callable[..., list[float | None]]:
    """
    Makes `code_reward`, which runs what the model wrote against unit tests: 1 if they pass, else 0.

    Its columns are `tests`, Python source (`None`: the reward does not apply); `code_prefix`, text that the completion
    continues, such as HumanEval's prompt; and `entry_point`, the name of what is tested. The last two are optional.
    See [`~trl_gspo.sandbox.Program`] for how they work together, and docs/code_reward.md for what the confinement does
    not protect from.

    Logs the share of each outcome among the completions it applies to, as `code/passed`, `code/timeout` and so on, and
    the outcomes themselves in the table of completions.

    Args:
        allow_code_execution (`bool`, *optional*, defaults to `False`):
            Has to be `True`: the code that a model writes will be run on this machine.
        packages (`bool`, *optional*, defaults to `False`):
            Whether candidates and tests may import the installed packages, not the standard library alone. Imports
            count towards the limits.
        workers (`int`, *optional*):
            Candidates at once. By default the processor cores of this process, shared with the other local ranks.
        wall_seconds (`float`), cpu_seconds (`int`), memory_mib (`int`), disk_mib (`int`), output_kib (`int`):
            What one candidate may use: [`~trl_gspo.sandbox.Limits`].

    Returns:
        `Callable`: the reward function. It gives `None` where nothing is known of a candidate: tests that never used
        it, or a machine that did not let it run.

    Raises:
        ValueError: without `allow_code_execution`, or if a limit makes no sense.
        trl_gspo.sandbox.SandboxError: if candidates cannot be confined on this machine. The reward function raises it
            too.
    """
    if not allow_code_execution:
        raise ValueError(
            "`code_reward` runs code that a model wrote, on this machine. It is confined, but not as well as in a "
            "virtual machine: read docs/code_reward.md, then allow it by `--allow_code_execution`, in Python by "
            "`get_code_reward(allow_code_execution=True)`."
        )
    limits = Limits(
        wall_seconds=wall_seconds,
        cpu_seconds=cpu_seconds,
        memory_mib=memory_mib,
        disk_mib=disk_mib,
        output_kib=output_kib,
    )
    check_platform()
    # Once for all candidates, and before a model is loaded.
    (tried,) = run_programs([Program("def one(): return 1", "assert one() == 1")], limits, packages)
    if tried.outcome != "passed":
        raise ValueError(
            f"A trivial candidate does not pass under the limits of `code_reward`: {tried.outcome}, {tried.message}. "
            f"Raise them; they are {limits}."
        )

    def code_reward(
        completions: list,
        tests: Sequence[str | None],
        code_prefix: Sequence[str | None] | None = None,
        entry_point: Sequence[str | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        nothing = [None] * len(completions)
        programs = [
            None if test is None else Program(extract_code(_text(completion)), test, prefix or "", name or None)
            for completion, test, prefix, name in zip(
                completions, tests, code_prefix or nothing, entry_point or nothing, strict=True
            )
        ]
        # Once for each that differs: late in training many completions of a group are the same.
        distinct = list(dict.fromkeys(program for program in programs if program is not None))
        results = dict(zip(distinct, run_programs(distinct, limits, packages, workers), strict=True))
        found = [None if program is None else results[program] for program in programs]
        outcomes = [result.outcome for result in found if result is not None]
        if log_metric is not None and outcomes:
            for outcome in CODE_OUTCOMES:
                log_metric(f"code/{outcome}", outcomes.count(outcome) / len(outcomes))
        if log_extra is not None:
            log_extra("code_outcome", ["" if result is None else result.outcome for result in found])
        for result in results.values():
            if result.score is None:
                logger.warning(f"A candidate gets no code reward: {result.outcome}, {result.message}")
        return [None if result is None else result.score for result in found]

    return code_reward
