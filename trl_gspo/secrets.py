"""Keeps tokens, keys and passwords out of logs and saved files. An option is secret by its name."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any


# Not each `..._token`: `pad_token` is none.
_SECRET = re.compile(
    r"(^|_)((hub|hf|auth|access|api|bearer|refresh|secret)_token|api_?key|secret_?key|secret|password)$|^(token|auth)$",
    re.IGNORECASE,
)


def is_secret(name: str) -> bool:
    """Whether an option or key of this name holds a secret: `hub_token`, `api_key`, `password`."""
    return _SECRET.search(name.lstrip("-").replace("-", "_")) is not None


def placeholder(name: str) -> str:
    """What stands in place of a secret: `<HUB_TOKEN>`, as in transformers' `TrainingArguments.to_dict`."""
    return f"<{name.lstrip('-').replace('-', '_').upper()}>"


def without_secrets(value: Any, hide: bool = True) -> Any:
    """
    A copy of `value` without the secrets in its mappings, at any depth.

    Args:
        value (`Any`): mappings and lists are gone through, anything else is left as it is.
        hide (`bool`, *optional*, defaults to `True`): whether a placeholder stands in their place, or else `None`.
    """
    if isinstance(value, Mapping):
        return {
            key: (placeholder(key) if hide else None)
            if isinstance(key, str) and is_secret(key) and isinstance(inner, str)
            else without_secrets(inner, hide)
            for key, inner in value.items()
        }
    if type(value) in (list, tuple):
        return type(value)(without_secrets(inner, hide) for inner in value)
    return value


def without_secret_words(words: Sequence[str]) -> list[str]:
    """A command line with placeholders for the values of secret options, `--name value` and `--name=value`."""
    hidden, name = [], ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            hidden.append(f"{name}={_hidden(name, value)}" if equals else word)
        else:
            hidden.append(_hidden(name, word))
    return hidden


def _hidden(name: str, value: str) -> str:
    if is_secret(name):
        return placeholder(name)
    try:
        parsed = json.loads(value)
    except ValueError:
        return value
    hidden = without_secrets(parsed)
    return json.dumps(hidden) if hidden != parsed else value
