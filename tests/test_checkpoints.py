"""Which checkpoints are whole, which may go, and what a disk that fills up leaves."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from test_trainer_resume import make
from transformers import TrainerCallback

from trl_gspo import checkpoints
from trl_gspo.checkpoints import (
    SavingError,
    alarms_of,
    delete_old,
    fault_of,
    is_complete,
    is_disk_full,
    last_good,
    list_checkpoints,
    mark,
    options_of,
    save,
    save_model,
    step_of,
)


def write(folder, step, size=10, is_whole=True, alarms=()):
    path = folder / f"checkpoint-{step}"

    def files():
        (path / "model.safetensors").write_bytes(b"w" * size)
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 100}))

    save(path, files, Accelerator(cpu=True), True, {"seed": step})
    mark(path, list(alarms))
    if not is_whole:
        (path / "model.safetensors").write_bytes(b"w" * (size - 1))
    return path


def steps(folder):
    return [step_of(path) for path in list_checkpoints(folder)]


def test_the_newest_comes_first_and_what_is_no_checkpoint_is_left_out(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert steps(tmp_path) == [10, 9]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_a_checkpoint_that_is_not_as_it_was_written_has_a_fault(tmp_path):
    path = write(tmp_path, 3)
    assert fault_of(path) is None and is_complete(path) and options_of(path) == {"seed": 3}
    (path / "model.safetensors").write_bytes(b"w" * 11)  # longer than a network disk said when it was written
    assert is_complete(path)
    (path / "model.safetensors").write_bytes(b"w" * 9)
    assert fault_of(path) == "model.safetensors has 9 of 10 bytes"
    (path / "model.safetensors").unlink()
    assert fault_of(path) == "model.safetensors is missing"
    (path / "checkpoint.json").write_text('{"is_complete": false}')
    assert fault_of(path) == "its writing was cut off"
    (path / "checkpoint.json").write_text('{"is_comp')
    assert fault_of(path) == "checkpoint.json is damaged" and options_of(path) == {}


def test_a_checkpoint_of_another_trainer_is_judged_by_the_file_that_is_written_last(tmp_path):
    path = tmp_path / "checkpoint-3"
    path.mkdir()
    assert fault_of(path) == "trainer_state.json is missing"
    (path / "trainer_state.json").write_text('{"global_st')
    assert fault_of(path) == "trainer_state.json is damaged"
    (path / "trainer_state.json").write_text('{"global_step": 3}')
    assert fault_of(path) is None and options_of(path) == {}


def test_the_last_good_one_is_whole_and_has_no_mark(tmp_path):
    write(tmp_path, 2)
    right = write(tmp_path, 4)
    write(tmp_path, 6, alarms=["loss"])
    write(tmp_path, 8, is_whole=False)
    assert last_good(list_checkpoints(tmp_path)) == right
    assert alarms_of(tmp_path / "checkpoint-6") == ["loss"]
    (tmp_path / "checkpoint-4" / "health.json").write_text('{"ala')
    assert last_good(list_checkpoints(tmp_path)) == tmp_path / "checkpoint-2"
    mark(right, [])
    assert last_good(list_checkpoints(tmp_path)) == right
    mark(tmp_path / "checkpoint-99", ["loss"])  # which is gone: nothing to mark
    assert steps(tmp_path) == [8, 6, 4, 2]


@pytest.mark.parametrize(
    ("given", "options", "left"),
    [
        ("2 4 6", {}, [6]),
        ("2 4 6", {"keep": 2}, [6, 4]),
        ("2 4 6", {"keep": 9}, [6, 4, 2]),
        ("2 4 6", {"best": 2}, [6, 2]),
        # A broken one is no reason to delete the one before it, whatever its step or its date.
        ("2 4 6broken", {}, [6, 4]),
        ("2broken 4 6", {}, [6]),
        ("4broken 6", {}, [6, 4]),
        ("2 4 12broken", {"step": 6}, [12, 4]),
        ("2broken 4broken", {}, [4, 2]),
        ("2 4marked", {}, [2]),
        ("2 4 6marked", {"keep": 2}, [4, 2]),
        ("2marked 4marked", {}, [4, 2]),
        # Ahead: of a run from whose end this one was not resumed.
        ("2 4 8 10marked", {"step": 4}, [10, 8, 4]),
        ("2 4 6 8", {"keep": 3, "unproven": [6, 8]}, [8, 6, 4]),
        ("2 4 6 8", {"keep": 1, "unproven": [6, 8]}, [8, 4]),
        ("2 4 6marked 8marked", {"keep": 3, "unproven": [6, 8]}, [8, 6, 4]),
        ("2 4 6marked", {"keep": 1, "unproven": [6]}, [6, 4]),
    ],
)
def test_what_goes_and_what_stays(given, options, left, tmp_path):
    for word in given.split():
        digits = word.rstrip("abcdefghijklmnopqrstuvwxyz")
        kind = word.removeprefix(digits)
        write(tmp_path, int(digits), is_whole=kind != "broken", alarms=["loss"] if kind == "marked" else [])
    options = {"step": 100, "keep": 1} | options
    if "best" in options:
        options["best"] = str(tmp_path / f"checkpoint-{options['best']}")
    delete_old(tmp_path, **options)
    assert steps(tmp_path) == left


def test_nothing_goes_before_what_stays_is_on_the_disk(tmp_path, monkeypatch):
    for step in (2, 4):
        write(tmp_path, step)

    def full(descriptor):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="quota"):
        delete_old(tmp_path, step=4, keep=1)
    assert steps(tmp_path) == [4, 2]


def test_a_writer_that_fails_leaves_no_trace_and_says_why(tmp_path):
    write(tmp_path, 2)
    path = tmp_path / "checkpoint-4"

    def fail():
        (path / "model.safetensors").write_bytes(b"w")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SavingError) as error:
        save(path, fail, Accelerator(cpu=True), True, {})
    assert f"checkpoint-4 could not be saved in {tmp_path}: the disk, a quota or a file is full." in str(error.value)
    assert "What was saved before is as it was." in str(error.value) and isinstance(error.value.__cause__, OSError)
    assert steps(tmp_path) == [2] and is_complete(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("is_writer", [True, False])
def test_a_process_that_did_not_fail_raises_with_the_one_that_did(is_writer, tmp_path):
    others = SimpleNamespace(device="cpu", reduce=lambda failures, reduction: failures + 1)
    with pytest.raises(SavingError, match="checkpoint-2 could not be saved in .*: another process says why"):
        save(tmp_path / "checkpoint-2", lambda: None, others, is_writer, {})
    assert not (tmp_path / "checkpoint-2").exists()


def test_what_an_earlier_run_left_in_the_folder_is_no_part_of_a_checkpoint(tmp_path):
    path = write(tmp_path, 4, alarms=["loss"])
    (path / "rng_state_7.pth").write_text("of another number of processes")
    write(tmp_path, 4)
    assert not (path / "rng_state_7.pth").exists() and is_complete(path) and alarms_of(path) == []


def test_a_model_takes_the_place_of_another_only_when_it_is_whole(tmp_path):
    def saved(**files):
        def write(folder):
            for name, text in files.items():
                Path(folder, name.replace("_", ".")).write_text(text)
                assert text != "fail", "No space left on device"

        save_model(tmp_path, write, Accelerator(cpu=True), True)
        return {path.name: path.read_text() for path in sorted(tmp_path.iterdir())}

    (tmp_path / "curves.png").write_text("stays")
    old = saved(config_json="1", model_safetensors="1")
    assert old == {"config.json": "1", "curves.png": "stays", "model.safetensors": "1"}
    with pytest.raises(SavingError, match="the model could not be saved"):
        saved(config_json="2", model_safetensors="fail")
    assert {path.name: path.read_text() for path in sorted(tmp_path.iterdir())} == old
    # In parts, as larger ones are; `from_pretrained` would read the old file in place of them.
    parts = {"model-1_safetensors": "2", "model-2_safetensors": "2", "model_safetensors_index_json": "2"}
    assert "model.safetensors" not in saved(config_json="2", **parts)
    assert saved(model_safetensors="3") == {
        "config.json": "2", "curves.png": "stays", "model.safetensors": "3"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EFBIG, "File too large"), True),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 200640 vs 200528"), True),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (ValueError("x"), False),
        (OSError(errno.EACCES, "Permission denied"), False),
    ],
    ids=repr,
)
def test_a_full_disk_by_any_name(error, is_full):
    assert is_disk_full(error) == is_full
    wrapped = SavingError("checkpoint-4 could not be saved")
    wrapped.__cause__ = error
    assert is_disk_full(wrapped) == is_full


# With a trainer.


@pytest.fixture
def snapshots(tmp_path):
    """Copies of a folder, taken before each file that Python writes or renames in it; and where to name the folder."""
    taken, watched = [], []

    def look(event, arguments):
        if not watched or event not in ("open", "os.rename") or not str(arguments[0]).startswith(watched[0]):
            return
        if event == "os.rename" or arguments[2] & (os.O_WRONLY | os.O_RDWR):
            folder = watched.pop()  # the copy opens files too
            target = tmp_path / "snapshots" / f"{len(taken)}" / "checkpoint-4"
            if os.path.isdir(folder):
                shutil.copytree(folder, target)
                taken.append(target)
            watched.append(folder)

    sys.addaudithook(look)
    yield taken, watched
    watched.clear()  # a hook cannot be taken away


@pytest.mark.slow
def test_a_checkpoint_cut_off_at_any_point_is_known(snapshots, model_path, tmp_path):
    taken, watched = snapshots
    trainer = make(model_path, tmp_path / "run", max_steps=4, save_steps=4, clip_fraction_target=None)
    watched.append(str(tmp_path / "run" / "checkpoint-4"))
    trainer.train()
    watched.clear()
    assert is_complete(tmp_path / "run" / "checkpoint-4")
    seen = {tuple(sorted(path.name for path in copy.iterdir())) for copy in taken}
    assert len(seen) >= 8, seen  # weights, tokenizer, optimizer, scheduler, random states, ...
    last = {path.name for path in (tmp_path / "run" / "checkpoint-4").iterdir()}
    assert any(last <= set(names) for names in seen)  # to the manifest, the last one
    assert all(fault_of(copy) for copy in taken)


@pytest.mark.slow
def test_any_file_that_is_shortened_or_gone_is_known(model_path, tmp_path):
    make(model_path, tmp_path, max_steps=3, save_steps=3).train()
    path = tmp_path / "checkpoint-3"
    files = [file for file in path.rglob("*") if file.is_file()]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "gspo_state_0.pt"} <= {
        file.name for file in files
    }
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-2])  # the last byte of a manifest is the end of its last line
        assert fault_of(path), file
        file.unlink()
        # Without a manifest it is one of another trainer.
        assert fault_of(path) or file.name == "checkpoint.json", file
        file.write_bytes(content)
    assert is_complete(path)


@pytest.mark.slow
def test_the_limit_never_costs_the_last_good_checkpoint(model_path, tmp_path):
    make(model_path, tmp_path / "run", max_steps=6, save_steps=3).train()
    broken = tmp_path / "run" / "checkpoint-6"
    (broken / "optimizer.pt").write_bytes(b"")
    trainer = make(model_path, tmp_path / "run", max_steps=5, save_steps=1, save_total_limit=1)
    whole = []
    saving, checkpoints_of = trainer._save_checkpoint, list_checkpoints

    def watched(*arguments):
        whole.append([step_of(path) for path in checkpoints_of(tmp_path / "run") if is_complete(path)])
        saving(*arguments)

    trainer._save_checkpoint = watched
    trainer.train(True)  # passes over 6
    assert trainer.state.global_step == 5
    assert whole == [[3], [4]]
    assert steps(tmp_path / "run") == [6, 5] and fault_of(broken)


@pytest.mark.slow
def test_the_best_checkpoint_and_the_last_one_stay(model_path, tmp_path):
    options = {
        "max_steps": 6, "save_steps": 2, "save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 2,
        "per_device_eval_batch_size": 4, "load_best_model_at_end": True, "metric_for_best_model": "num_tokens",
        "greater_is_better": False,
    }  # fmt: skip
    trainer = make(model_path, tmp_path / "run", **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")
    assert is_complete(tmp_path / "run" / "checkpoint-2")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # where a test failed its traceback holds files


class Filler(TrainerCallback):
    """Leaves so many bytes on the disk once the first checkpoint is saved."""

    def __init__(self, spare):
        self._spare = spare

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 1:
            size = shutil.disk_usage(args.output_dir).free - self._spare
            Path(args.output_dir, "filler").write_bytes(b"f" * size)


@pytest.mark.slow
@pytest.mark.parametrize("spare", [0, 8_000, 90_000, 120_000, 200_000, 310_000, 350_000])
def test_a_full_disk_costs_no_checkpoint_that_was_saved(spare, small_disk, model_path):
    # A checkpoint takes 380 kB: weights 100, tokenizer, optimizer 190, our own 20.
    output = small_disk / "run"
    trainer = make(model_path, output, max_steps=2, save_total_limit=1)
    trainer.add_callback(Filler(spare))
    with pytest.raises(SavingError) as error:
        trainer.train()
    assert "checkpoint-2 could not be saved" in str(error.value)
    assert "the disk, a quota or a file is full" in str(error.value)
    assert steps(output) == [1] and is_complete(output / "checkpoint-1")
    (output / "filler").unlink()
    again = make(model_path, output, max_steps=2, save_total_limit=1)
    again.train(True)
    assert steps(output) == [2] and is_complete(output / "checkpoint-2")


@pytest.mark.slow
def test_a_disk_that_is_about_to_be_full_is_told_of(model_path, tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
    with caplog.at_level("WARNING", "trl_gspo.checkpoints"):
        make(model_path, tmp_path / "run", max_steps=1).train()
    assert "and 1 kB are free there: the next checkpoint will not fit" in caplog.text
