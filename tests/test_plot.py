import json

import plot
import pytest


def log(step, **values):
    return {
        "step": step,
        "reward": 0.5,
        "gspo/clip_fraction/sequences": 0.1,
        "gspo/clip_fraction/low": 0.1,
        "gspo/clip_fraction/high": 0.0,
        "gspo/ratio/mean": 1.0,
        "gspo/ratio/std": 0.01,
    } | values


def write_state(folder, history):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))


def test_curves_of_a_run_with_gaps(tmp_path, capsys):
    gap = {key: None for key in log(2) if key.startswith("gspo/")}
    history = [log(1), {"step": 1, "eval_reward": 0.1}, log(2, **gap), log(3), {"step": 3, "train_loss": 0.0}]
    del history[3]["reward"]
    write_state(tmp_path, history)
    assert [entry["step"] for entry in plot.load_logs(tmp_path)] == [1, 2, 3]
    assert plot.main([str(tmp_path)]) == 0
    assert str(tmp_path / "curves.png") in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_several_runs_over_each_other(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plot, "draw", lambda runs, output: drawn.update(runs=runs, output=output))
    write_state(tmp_path / "a", [log(1)])
    write_state(tmp_path / "b" / "checkpoint-9", [log(1)])
    write_state(tmp_path / "b" / "checkpoint-10", [log(1), log(2)])
    assert plot.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "c.png")]) == 0
    assert drawn["output"] == tmp_path / "c.png"
    # A run that was stopped has the history of its last checkpoint, by step and not by name.
    assert [len(logs) for logs in drawn["runs"].values()] == [1, 2]


@pytest.mark.parametrize(
    ("history", "message"), [(None, "No trainer_state.json in"), ([{"step": 1, "loss": 0.1}], "no training log")]
)
def test_without_logs_one_line(tmp_path, capsys, history, message):
    if history is not None:
        write_state(tmp_path, history)
    assert plot.main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
