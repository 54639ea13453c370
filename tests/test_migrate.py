"""`scripts/migrate.py` from its command line, and what it migrates, run to an optimizer step."""

import json
import os
import runpy
import shutil
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

import migrate
import pytest
import train
import yaml
from tiny import sorting_rows, write_jsonl
from trl.scripts import grpo as trl_script

from trl_gspo import GSPOConfig, GSPOTrainer, migration
from trl_gspo import trainer as trainer_module


ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "migration"
SCRIPT = "from trl import GRPOTrainer\n\nGRPOTrainer('m')\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with rows under the names of all columns that the fixtures ask for."""
    folder = tmp_path_factory.mktemp("data")
    rows = [row | {"question": row["prompt"], "answer": row["solution"]} for row in sorting_rows(128, seed=0)]
    return write_jsonl(folder / "train.jsonl", rows)


# The command line.


def test_a_diff_is_printed_and_the_script_left_alone(tmp_path, capsys):
    path = tmp_path / "grpo.py"
    path.write_text(SCRIPT)
    assert migrate.main([str(path)]) == 0
    assert path.read_text() == SCRIPT
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"--- {path}", f"+++ {path}"]
    assert [line for line in lines[2:] if line[0] in "+-"] == [
        "-from trl import GRPOTrainer",
        "+from trl_gspo import GSPOTrainer",
        "-GRPOTrainer('m')",
        "+GSPOTrainer('m')",
    ]


def test_write_applies_the_diff_and_keeps_the_mode(tmp_path, capsys):
    path, link = tmp_path / "grpo.py", tmp_path / "link.py"
    path.write_text(SCRIPT)
    path.chmod(0o750)
    link.symlink_to(path)
    assert migrate.main([str(link), "--write"]) == 0
    assert path.read_text() == SCRIPT.replace("trl ", "trl_gspo ").replace("GRPO", "GSPO")
    assert stat.S_IMODE(path.stat().st_mode) == 0o750 and link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [path, link]
    capsys.readouterr()
    assert migrate.main([str(path), "--write"]) == 0
    assert capsys.readouterr().out == f"{path}: nothing to do.\n"


def test_a_script_that_cannot_be_written_stays_whole(tmp_path, capsys, monkeypatch):
    path = tmp_path / "grpo.py"
    path.write_text(SCRIPT)

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    assert migrate.main([str(path), "--write"]) == 2
    assert "no space left" in capsys.readouterr().err
    assert path.read_text() == SCRIPT and list(tmp_path.iterdir()) == [path]


def test_points_left_are_listed_with_their_line(tmp_path, capsys):
    path = tmp_path / "grpo.py"
    path.write_text("from trl import GRPOConfig\nGRPOConfig('gspo', beta=0.1, **options)\n")
    assert migrate.main([str(path)]) == 1
    error = capsys.readouterr().err
    assert f"Changed or kept:\n  {path}:2: `beta=0.1` is kept" in error
    assert f"For you to decide:\n  {path}:2: the configuration takes **" in error


def test_a_configuration_is_printed_or_written_beside_its_source(tmp_path, capsys):
    source = tmp_path / "run.yaml"
    shutil.copy(FIXTURES / "trl_grpo.yaml", source)
    before = source.read_text()
    assert migrate.main([str(source)]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["epsilon"] == 3e-4 and list(tmp_path.iterdir()) == [source]

    target = tmp_path / "run_gspo.yaml"
    assert migrate.main([str(source), "--write"]) == 0
    assert yaml.safe_load(target.read_text()) == yaml.safe_load(printed) and source.read_text() == before
    capsys.readouterr()
    assert migrate.main([str(source), "--write"]) == 0
    assert capsys.readouterr().out == f"{target}: nothing to do.\n"

    target.write_text("mine: 1\n")
    assert migrate.main([str(source), "--write"]) == 2
    assert "exists: choose another --output, or give --overwrite" in capsys.readouterr().err
    assert target.read_text() == "mine: 1\n"
    assert migrate.main([str(source), "--output", str(target), "--overwrite"]) == 0
    assert "epsilon" in target.read_text()


def test_a_command_line_and_the_number_of_processes(capsys):
    command = "torchrun train.py --model_name_or_path m --dataset_name d --reward_funcs r --generation_batch_size 64"
    assert migrate.main(["--command", command, "--num_processes", "4"]) == 0
    # 64 completions on 4 processes of 8: two micro-batches.
    assert yaml.safe_load(capsys.readouterr().out)["steps_per_generation"] == 2


def test_from_wins_over_what_the_fields_say(capsys, tmp_path):
    (tmp_path / "c.json").write_text('{"model_name": "m", "num_generations": 4}')
    assert migrate.main([str(tmp_path / "c.json"), "--from", "stateset"]) == 1
    assert yaml.safe_load(capsys.readouterr().out)["use_peft"] is True


def test_what_the_script_refuses_is_said(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model_name_or_path: m\ndataset_name: d\nreward_funcs: r\nuse_rollout_logps: true\nuse_vllm: true\n"
    )
    assert migrate.main([str(tmp_path / "c.yaml")]) == 1
    assert "scripts/train.py refuses the result: `use_rollout_logps=True` takes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.py", b"import torch\n", [], "it has no GRPOTrainer or GRPOConfig of TRL"),
        ("a.py", b"def f(:\n", [], "is not Python"),
        ("a.py", b"\x00\xff", [], "it is not a Python script"),
        ("a.py", SCRIPT.encode(), ["--from", "trl"], "`--from` is for configurations"),
        ("a.py", SCRIPT.encode(), ["--num_processes", "2"], "`--num_processes` is for configurations"),
        ("a.yaml", b"", [], "it is empty"),
        ("a.yaml", b"\x80\x81\xff", [], "it is no text"),
        ("a.yaml", b"a: [", [], "neither YAML nor JSON"),
        ("a.yaml", b"foo: 1\nbar: 2\n", [], "no system is known by these fields"),
        ("a.yaml", b"foo: 1\n", ["--from", "axolotl"], "`--from axolotl` is not known; known are trl"),
        ("a.yaml", b"model_name_or_path: m\n", ["--num_processes", "0"], "`--num_processes` must be at least 1"),
        ("a.ipynb", b'{"cells": [], "nbformat": 4}', [], "jupyter nbconvert --to script"),
        ("a.sh", b"echo hello\n", [], "there is no option"),
        (None, None, [], "nowhere.yaml"),
    ],
)
def test_bad_input_ends_with_one_line(name, content, options, message, capsys, tmp_path):
    path = tmp_path / (name or "nowhere.yaml")
    if name:
        path.write_bytes(content)
    assert migrate.main([str(path), *options]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.startswith("migrate.py: ") and output.out == ""
    assert "Traceback" not in output.err


def test_a_file_or_a_command_is_wanted(capsys):
    assert migrate.main([]) == 2 and "give a file, or --command" in capsys.readouterr().err
    assert migrate.main(["x.yaml", "--command", "y"]) == 2


def test_without_libcst_the_extra_is_named(capsys, tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(SCRIPT)
    monkeypatch.setitem(sys.modules, "libcst", None)
    monkeypatch.delitem(sys.modules, "trl_gspo.codemod", raising=False)
    monkeypatch.delattr("trl_gspo.codemod", raising=False)
    assert migrate.main([str(tmp_path / "a.py")]) == 2
    assert "pip install 'trl_gspo[migrate]'" in capsys.readouterr().err


# What comes out, run.

# Of the machine: no GPU, no engine, no quantization, no tracker.
MACHINE = {
    "use_cpu": "true",
    "bf16": "false",
    "dtype": "float32",
    "gradient_checkpointing": "false",
    "use_vllm": "false",
    "load_in_4bit": "false",
    "deepspeed": "",
    "report_to": "none",
    "curves": "false",
}
# A rollout of the source's size would take hours here.
SMALL = {"gradient_accumulation_steps": 1, "steps_per_generation": 4, "max_completion_length": 8}


@pytest.mark.parametrize(
    "path", sorted(path for path in FIXTURES.iterdir() if path.suffix != ".py"), ids=lambda p: p.name
)
def test_a_migrated_configuration_trains(path, tmp_path, data, model_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    config = tmp_path / "c.yaml"
    assert migrate.main([str(path), "--output", str(config)]) in (0, 1)
    values = yaml.safe_load(config.read_text())
    for name in values.get("env", {}):
        monkeypatch.delenv(name, raising=False)
    options = MACHINE | {"model_name_or_path": model_path, "dataset_name": data, "output_dir": tmp_path / "out"}
    options |= SMALL | {"per_device_train_batch_size": values["num_generations"], "max_steps": 1}
    if values["steps_per_generation"] * values["per_device_train_batch_size"] <= 32:
        # Small enough to be run at its own size.
        options = {name: value for name, value in options.items() if name not in SMALL and "batch_size" not in name}
        options["max_completion_length"] = 8
    options |= {"eval_dataset_name": data, "eval_strategy": "no"} if "eval_strategy" in values else {}
    options |= {} if "reward_funcs" in values else {"reward_funcs": "tests.varied_reward.share_of_digits"}
    argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    capsys.readouterr()
    assert train.main(["--config", str(config), *argv, "--dry_run"]) == 0, capsys.readouterr().err
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    size = values["num_generations"]  # 8 is the default, and not printed
    assert size == 8 or ["num_generations", str(size), str(config)] in printed
    assert any(line[:2] == ["rollout", "batch"] and "completions;" in line for line in printed)
    assert not (tmp_path / "out").exists()
    assert train.main(["--config", str(config), *argv]) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 1 and summary["reward_start"] is not None
    for name in values.get("env", {}):
        os.environ.pop(name, None)


def prepare(source, tmp_path, **texts):
    """A script with its own paths in it, migrated in place."""
    path = tmp_path / "script.py"
    text = Path(source).read_text()
    for name, value in texts.items():
        text = text.replace(name, str(value))
    path.write_text(text)
    return path


def last_log(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"][0]


def test_the_configured_script_trains(tmp_path, data, model_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    path = prepare(FIXTURES / "configured.py", tmp_path, MODEL=model_path, DATA=data, OUTPUT=tmp_path)
    assert migrate.main([str(path), "--write"]) == 0
    assert "`epsilon=0.2` is taken out" in capsys.readouterr().err
    trainer = runpy.run_path(str(path), run_name="__main__")["trainer"]
    assert type(trainer) is GSPOTrainer and trainer.state.global_step == 1
    assert (trainer.args.epsilon, trainer.args.epsilon_high, trainer.beta) == (3e-4, 4e-4, 0.0)
    assert trainer.args.steps_per_generation == 4 and trainer.loss_type == "grpo"
    log = last_log(tmp_path / "Qwen-GSPO" / "checkpoint-1")
    assert log["gspo/ratio/noise"] is not None


@dataclass
class OnThisMachine(GSPOConfig):
    """What a script without a configuration gets."""

    use_cpu: bool = True
    bf16: bool | None = False
    max_steps: int = 1
    max_completion_length: int | None = 8


def test_the_quick_start_trains(tmp_path, data, model_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)  # where TRL writes by default
    path = prepare(FIXTURES / "quickstart.py", tmp_path, MODEL=model_path, DATA=data)
    assert migrate.main([str(path), "--write"]) == 0
    monkeypatch.setattr(trainer_module, "GSPOConfig", OnThisMachine)
    trainer = runpy.run_path(str(path), run_name="__main__")["trainer"]
    assert type(trainer) is GSPOTrainer and trainer.state.global_step == 1
    assert Path(trainer.args.output_dir).name == f"{Path(model_path).name}-GSPO"


def test_the_script_of_trl_trains(tmp_path, data, model_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    path = prepare(trl_script.__file__, tmp_path)
    assert migrate.main([str(path), "--write"]) == 1
    points = capsys.readouterr().err
    assert "leave --loss_type" in points
    options = dict(
        model_name_or_path=model_path,
        dataset_name=data.parent,
        reward_funcs="tests.varied_reward.share_of_digits",
        output_dir=tmp_path / "out",
        max_steps=1,
        logging_steps=1,
        num_generations=4,
        max_completion_length=8,
        use_cpu="true",
        bf16="false",
        gradient_checkpointing="false",
    )
    argv = [str(path), *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.chdir(ROOT)
    space = runpy.run_path(str(path), run_name="__main__")
    assert space["training_args"].epsilon == 3e-4 and space["training_args"].steps_per_generation == 4
    assert "gspo/clip_fraction/sequences" in last_log(tmp_path / "out" / "checkpoint-1")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_check_asks_the_script(tmp_path):
    result = migration.migrate_config({"model_name_or_path": "m", "num_generations": 4})
    assert migrate.check(migration.to_yaml(result, "x")) is None
    result.values["steps_per_generation"] = 0
    assert "`steps_per_generation` must be a whole number, at least 1" in migrate.check(migration.to_yaml(result, "x"))
