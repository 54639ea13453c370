"""
What trackers get of a run, read back with their own readers: Weights & Biases in offline mode, and, where they are
installed, TensorBoard and trackio, which the Trainer serves without us.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest


pytestmark = pytest.mark.slow

# Two windows of two steps: the first minibatch of a rollout is in the first window only. An evaluation after the last.
SCRIPT = """
import json, sys
from datasets import load_dataset
from trl_gspo import GSPOConfig, GSPOTrainer

model, data, output_dir, report_to = sys.argv[1:]

def starts_lowercase(completions, **_):
    return [float(completion[:1].islower()) for completion in completions]

rows = load_dataset("json", data_files=data, split="train")
config = GSPOConfig(
    output_dir,
    run_name="tiny",
    per_device_train_batch_size=8,
    per_device_eval_batch_size=8,
    num_generations=4,
    max_completion_length=12,
    learning_rate=1e-2,
    max_steps=4,
    logging_steps=2,
    eval_strategy="steps",
    eval_steps=4,
    save_strategy="no",
    report_to=report_to,
    trackio_space_id=None,
    trackio_static_space_id=False,
    log_completions=True,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    disable_tqdm=True,
)
trainer = GSPOTrainer(model, starts_lowercase, config, rows, rows.select(range(2)))
trainer.train()
with open(output_dir + "/log_history.json", "w") as file:
    json.dump(trainer.state.log_history, file)
"""


def train(report_to, model_path, dataset, folder, **environment):
    """Runs a tiny training in a process of its own, which ends the tracker's too, and returns its `log_history`."""
    dataset.to_json(folder / "data.jsonl")
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, model_path, str(folder / "data.jsonl"), str(folder / "output"), report_to],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path_here()} | environment,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((folder / "output" / "log_history.json").read_text())


def path_here():
    return os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))


def as_tracked(entry):
    """The names that the Trainer gives a log's metrics in all trackers. The totals of the run are kept elsewhere."""
    return {
        f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}": value
        for key, value in entry.items()
        if key != "step"
    }


def training_logs(history):
    return [entry for entry in history if "loss" in entry]


# ---- Weights & Biases


@pytest.fixture(scope="module")
def wandb_run(model_path, dataset, tmp_path_factory):
    """`log_history`, the records of the `.wandb` file as wandb itself prints them, and the run's folder."""
    folder = tmp_path_factory.mktemp("wandb")
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    # Nothing of this in the home of whoever runs the tests.
    environment |= {f"WANDB_{name}": str(folder) for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR")}
    history = train("wandb", model_path, dataset, folder, **environment)
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    read = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )
    assert read.returncode == 0, read.stderr
    return history, [json.loads(line) for line in read.stdout.splitlines()], folder


def items(records):
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def row_with(records, key, step):
    (found,) = [item for item in items(records) if key in item and item.get("train/global_step") == step]
    return found


def test_wandb_has_the_configuration(wandb_run):
    _, records, _ = wandb_run
    config = {}
    for record in records:
        update = record.get("run", record).get("config", {})
        config |= update.get("update", update)
    assert config["importance_sampling_level"] == "sequence" and config["loss_type"] == "grpo"
    assert (config["epsilon"], config["epsilon_high"]) == (3e-4, 4e-4)
    assert config["steps_per_generation"] == 4 and config["disable_dropout"] is True
    # What only `GSPOConfig` has is there as well.
    assert config["step_discount"] == 1.0
    assert config["clip_fraction_target"] is None
    assert [record["run"]["display_name"] for record in records if record["type"] == "run"][0] == "tiny"


def test_wandb_has_every_metric_of_every_log(wandb_run):
    history, records, _ = wandb_run
    entries = training_logs(history) + [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 4]
    for entry in entries:
        expected = as_tracked(entry)
        row = row_with(
            records, next(key for key in expected if key.endswith("gspo/clip_fraction/sequences")), entry["step"]
        )
        for key, value in expected.items():
            assert row[key] == (pytest.approx(value, rel=1e-12, abs=0) if value is not None else None), key
    row = row_with(records, "train/gspo/clip_fraction/sequences", 2)
    # A learning rate that leaves the clip range at once: these are no zeros.
    assert 0 < row["train/gspo/clip_fraction/sequences"] <= 1
    assert row["train/gspo/clip_fraction/minibatch_0"] == 0 and row["train/gspo/ratio/noise"] < 1e-6


def test_wandb_has_the_histogram_in_the_row_of_its_log(wandb_run):
    history, records, _ = wandb_run
    for entry in training_logs(history):
        row = row_with(records, "train/gspo/ratio/mean", entry["step"])
        assert row["train/gspo/ratio/histogram._type"] == "histogram"
        counts, edges = row["train/gspo/ratio/histogram.values"], row["train/gspo/ratio/histogram.bins"]
        assert len(edges) == len(counts) + 1
        # Two micro-batches of eight sequences, of which the live ones have a ratio to show.
        assert sum(counts) == round(16 * entry["gspo/live_fraction"]) > 0
        assert edges[0] == pytest.approx(entry["gspo/ratio/min"], rel=1e-12)
        assert edges[-1] == pytest.approx(entry["gspo/ratio/max"], rel=1e-12)
        # The bin of the median holds the middle of the counts.
        below = sum(count for count, edge in zip(counts, edges[1:], strict=True) if edge < entry["gspo/ratio/p50"])
        assert below <= sum(counts) / 2
    assert "eval/gspo/ratio/histogram._type" in row_with(records, "eval/gspo/ratio/mean", 4)
    # None of it in rows of its own.
    assert len([item for item in items(records) if "train/gspo/ratio/histogram._type" in item]) == 2


def test_wandb_has_the_table_of_completions(wandb_run):
    _, records, folder = wandb_run
    logged = [item["completions.path"] for item in items(records) if "completions.path" in item]
    assert logged
    (run,) = folder.glob("wandb/offline-run-*")
    newest = json.loads((run / "files" / logged[-1]).read_text())
    assert newest["columns"] == ["step", "prompt", "completion", "starts_lowercase", "advantage"]
    (saved,) = sorted((folder / "output" / "completions").glob("completions_*4.parquet"))
    saved = pd.read_parquet(saved)
    assert list(saved.columns) == newest["columns"]
    assert len(newest["data"]) == len(saved) > 0
    for row, (_, expected) in zip(newest["data"], saved.iterrows(), strict=True):
        assert row[:3] == list(expected[:3])
        assert row[3:] == pytest.approx(list(expected[3:]), abs=1e-6)


# ---- TensorBoard and trackio


def test_tensorboard_has_every_metric_of_every_log(model_path, dataset, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "tensorboard"
    history = train("tensorboard", model_path, dataset, tmp_path, TENSORBOARD_LOGGING_DIR=str(folder))
    events = EventAccumulator(str(folder)).Reload()
    tracked = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert {"train/gspo/clip_fraction/sequences", "train/gspo/ratio/p99", "eval/gspo/ratio/mean"} <= set(tracked)
    for entry in history:
        for key, value in as_tracked(entry).items():
            if value is not None:  # TensorBoard has no word for it
                assert tracked[key][entry["step"]] == pytest.approx(value, rel=1e-6), key


def test_trackio_has_every_metric_of_every_log(model_path, dataset, tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed")
    history = train("trackio", model_path, dataset, tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    code = (
        "import json\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "print(json.dumps(SQLiteStorage.get_logs('huggingface', 'tiny'), default=str))"
    )
    read = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")},
    )
    assert read.returncode == 0, read.stderr
    rows = json.loads(read.stdout)
    for entry in training_logs(history):
        expected = as_tracked(entry)
        (row,) = [row for row in rows if row.get("train/global_step") == entry["step"] and "train/loss" in row]
        for key, value in expected.items():
            assert row[key] == (value if value is None or math.isnan(value) else pytest.approx(value)), key
