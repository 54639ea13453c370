"""From a data set by hub id or local path to the rows that the trainer takes: a `prompt`, and columns for rewards."""

import difflib
import re
import string
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError


# File name endings and the builder of `datasets` that reads them.
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


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
