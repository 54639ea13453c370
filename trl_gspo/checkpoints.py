"""
Checkpoint folders: whether one is whole, which is the last good one, and which may go.

transformers writes a checkpoint file by file, on several ranks, into a folder that has its name from the start. So a
manifest in it, `checkpoint.json`, says first that it is being written, and last which files it holds and how long
they are. The folder is not written under another name and renamed: with machines that do not share a disk, or on a
mounted bucket, no rename is atomic.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator


logger = logging.getLogger(__name__)

_MANIFEST = "checkpoint.json"
# In the folder of a checkpoint that is not to be trusted: `{"alarms": [...]}`.
_MARK = "health.json"
_TRAINER_STATE = "trainer_state.json"
_STAGING = ".saving"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and torch pass on no error number, and torch's writer of archives only where it stopped.
_FULL_TEXTS = ("no space left", "os error 28", "disk quota", "file too large", "file write failed", "unexpected pos")
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")


class SavingError(OSError):
    """A checkpoint or a model could not be written. What was saved before is as it was."""


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoint folders of a run, newest first, whole or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted((path for path in found if path.is_dir()), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return int(checkpoint.name.split("-")[-1])


def fault_of(checkpoint: str | os.PathLike) -> str | None:
    """
    Why a checkpoint is not whole, in a few words; `None` if it is.

    One without a manifest, which another trainer wrote, is taken for whole if it holds the file that transformers
    writes last on the main process, `trainer_state.json`.
    """
    checkpoint = Path(checkpoint)
    # Before the manifest: where one is there, and a run is writing, so is the other.
    state = _read_json(checkpoint / _TRAINER_STATE, missing={})
    manifest = _read_json(checkpoint / _MANIFEST, missing={})
    if manifest is None:
        return f"{_MANIFEST} is damaged"
    if not manifest.get("is_complete", True):
        return "its writing was cut off"
    for name, size in manifest.get("sizes", {}).items():
        try:
            found = (checkpoint / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        # Longer is right: a network disk may have told the main process an old length of another machine's file.
        if found < size:
            return f"{name} has {found} of {size} bytes"
    if state is None or "global_step" not in state:
        return f"{_TRAINER_STATE} is {'damaged' if state is None else 'missing'}"
    return None


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was written to its end, and is as long as it was then."""
    return fault_of(checkpoint) is None


def alarms_of(checkpoint: str | os.PathLike) -> list[str]:
    """What was wrong when a checkpoint was saved, or soon after; empty if nothing was."""
    content = _read_json(Path(checkpoint, _MARK), missing={"alarms": []})
    return [f"{_MARK} is damaged"] if content is None else content["alarms"]


def mark(checkpoint: Path, alarms: list[str]) -> None:
    """Marks a checkpoint as not to be trusted; without alarms, takes the mark away."""
    if alarms and checkpoint.is_dir():
        write_json(checkpoint / _MARK, {"alarms": alarms})
    else:
        (checkpoint / _MARK).unlink(missing_ok=True)


def last_good(checkpoints: list[Path]) -> Path | None:
    """The first complete one that the health watch has not marked."""
    return next((path for path in checkpoints if is_complete(path) and not alarms_of(path)), None)


def options_of(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """What [`save`] was told of the run; empty for a checkpoint of another trainer."""
    return (_read_json(Path(checkpoint, _MANIFEST), missing={}) or {}).get("options", {})


def save(
    folder: Path, write: Callable[[], Any], accelerator: Accelerator, is_writer: bool, options: dict[str, Any]
) -> None:
    """
    Writes a checkpoint so that one whose writing was cut off at any point is known by it. All ranks call it together.

    Args:
        folder (`Path`): what is there of an earlier run is deleted.
        write (`Callable`): writes the files of this rank.
        accelerator (`Accelerator`): of the trainer.
        is_writer (`bool`): whether this rank writes what is of all ranks, `args.should_save`.
        options (`dict`): what [`options_of`] returns later; plain JSON.

    Raises:
        SavingError: on all ranks, if one of them failed. What was written of the checkpoint is deleted.
    """

    def begin() -> None:
        if is_writer:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _MANIFEST, {"is_complete": False})

    def finish() -> None:
        if is_writer:
            files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (_MANIFEST, _MARK)]
            sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(files)}
            write_json(folder / _MANIFEST, {"is_complete": True, "options": options, "sizes": sizes})

    for stage in (begin, write, finish):
        _together(stage, folder, accelerator, is_writer)


def save_model(output_dir: Path, write: Callable[[str], Any], accelerator: Accelerator, is_writer: bool) -> None:
    """
    Writes a model into a folder where an earlier one stays whole until the new one is. All ranks call it together.

    Args:
        output_dir (`Path`): its other files stay.
        write (`Callable`): writes the files of this rank into the folder that it gets.
        accelerator, is_writer: as in [`save`].

    Raises:
        SavingError: on all ranks, if one of them failed.
    """
    staging = output_dir / _STAGING

    def begin() -> None:
        if is_writer:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)

    def finish() -> None:
        if not is_writer:
            return
        files = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
        for name in files:
            _sync(staging / name)
        # Of an earlier model: `from_pretrained` would take `model.safetensors` before the parts of a new one.
        for pattern in _WEIGHTS:
            for old in output_dir.glob(pattern):
                if old.relative_to(output_dir) not in files:
                    old.unlink()
        for name in files:
            (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, output_dir / name)
        shutil.rmtree(staging, ignore_errors=True)

    for stage in (begin, lambda: write(str(staging)), finish):
        _together(stage, staging, accelerator, is_writer, name="the model")


def delete_old(
    output_dir: str | os.PathLike, step: int, keep: int, best: str | None = None, unproven: Collection[int] = ()
) -> None:
    """
    Deletes checkpoints up to `step`, but for the newest `keep` that are whole, the newest of those that is proven, and
    the best one. Later ones are of a run from whose end this one was not resumed, and stay.

    Args:
        output_dir (`str`): of the run.
        step (`int`): the optimizer step that the run is at.
        keep (`int`): at least 1.
        best (`str`, *optional*): `state.best_model_checkpoint`.
        unproven (`Collection[int]`, *optional*): steps of checkpoints that count, marked or not, but are not trusted
            alone. Marked ones that are not among them are deleted.

    Raises:
        OSError: if what is kept cannot be brought to the disk. Nothing was deleted then.
    """
    passed = [path for path in list_checkpoints(output_dir) if step_of(path) <= step]
    whole = [path for path in passed if is_complete(path)]
    counted = [path for path in whole if step_of(path) in unproven or not alarms_of(path)]
    if not counted:
        return
    kept = [*counted[:keep], *[path for path in counted if step_of(path) not in unproven][:1]]
    marked = [path for path in whole if path not in counted]
    # What is not whole stays until it is old: it may be of use to somebody.
    old = [path for path in passed if step_of(path) < step_of(counted[:keep][-1])] if len(counted) > keep else []
    doomed = [path for path in {*marked, *old} - {*kept} if best is None or path.resolve() != Path(best).resolve()]
    if doomed:
        # A machine that loses its power loses what is not on the disk yet.
        for path in counted[0].rglob("*"):
            _sync(path)
    for path in doomed:
        shutil.rmtree(path, ignore_errors=True)


def warn_of_space(checkpoint: Path) -> None:
    """Says so if a checkpoint as large as this one would not fit on the disk."""
    needed = sum(_read_json(checkpoint / _MANIFEST, missing={}).get("sizes", {}).values())
    free = shutil.disk_usage(checkpoint).free
    if free < needed:
        logger.warning(
            f"{checkpoint} takes {_in_bytes(needed)}, and {_in_bytes(free)} are free there: the next checkpoint will "
            "not fit, and the run will end with it. Delete something there."
        )


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a disk, a quota or a file is full."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL or any(text in str(error).lower() for text in _FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _together(
    stage: Callable[[], Any], folder: Path, accelerator: Accelerator, is_writer: bool, name: str | None = None
) -> None:
    """Runs `stage` on all ranks, and raises on all if it raised on one: the others would wait for it."""
    error = None
    try:
        stage()
    except Exception as caught:
        error = caught
    failures = torch.tensor(float(error is not None), device=accelerator.device)
    if accelerator.reduce(failures, reduction="sum") == 0:
        return
    free = _in_bytes(shutil.disk_usage(next(path for path in folder.parents if path.is_dir())).free)
    if is_writer:
        shutil.rmtree(folder, ignore_errors=True)
    cause = "another process says why" if error is None else f"{type(error).__name__}: {error}".rstrip(".")
    full = "the disk, a quota or a file is full. " if is_disk_full(error) else ""
    raise SavingError(
        f"{name or folder.name} could not be saved in {folder.parent}: {full}{cause}. {free} were free there then. "
        "What was saved before is as it was."
    ) from error


def write_json(path: Path, content: dict) -> None:
    """Writes JSON so that the file is either as it was, or new, but never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_json(path: Path, missing: dict) -> dict | None:
    """The mapping in a file, `None` if the file is damaged."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return missing
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _sync(path: Path) -> None:
    """Waits until a file is on its disk. A full network disk may say so only then."""
    if not path.is_file():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (*_FULL, errno.EIO):
            raise  # any other: a file system that knows no such thing
    finally:
        os.close(descriptor)


def _in_bytes(size: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"
