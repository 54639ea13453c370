import json

import plot
import pytest
from test_curves import log, without


def write_state(folder, history):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))


@pytest.fixture
def drawn(monkeypatch):
    calls = {}
    monkeypatch.setattr(
        plot, "draw", lambda runs, output, epsilon: calls.update(runs=runs, output=output, epsilon=epsilon)
    )
    return calls


def test_curves_of_a_run_with_gaps(tmp_path, capsys):
    gap = {key: None for key in log(2) if key.startswith("gspo/")}
    history = [log(1), {"step": 1, "eval_reward": 0.1}, log(2, **gap), log(3), {"step": 3, "train_loss": 0.0}]
    del history[3]["reward"]
    write_state(tmp_path, history)
    assert plot.load_logs(tmp_path) == history
    assert plot.main([str(tmp_path)]) == 0
    assert str(tmp_path / "curves.png") in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_several_runs_over_each_other(tmp_path, drawn):
    write_state(tmp_path / "a", [log(1)])
    write_state(tmp_path / "b" / "checkpoint-9", [log(1)])
    write_state(tmp_path / "b" / "checkpoint-10", [log(1), log(2)])
    assert plot.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "c.png")]) == 0
    assert drawn["output"] == tmp_path / "c.png"
    assert list(drawn["runs"]) == [str(tmp_path / "a"), str(tmp_path / "b")]
    # A run that was stopped has the history of its last checkpoint, by step and not by name.
    assert [len(logs) for logs in drawn["runs"].values()] == [1, 2]
    assert drawn["epsilon"] is None


def test_a_file_its_clip_range_and_a_run_of_the_stock_trainer(tmp_path, drawn):
    write_state(tmp_path, [without("gspo/", log(1))])
    path = tmp_path / "trainer_state.json"
    assert plot.main([str(path), "--epsilon", "3e-4", "4e-4"]) == 0
    assert drawn == {
        "runs": {str(path): [without("gspo/", log(1))]},
        "output": tmp_path / "curves.png",
        "epsilon": [3e-4, 4e-4],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No trainer_state.json in"),
        (json.dumps({"log_history": [{"step": 1, "loss": 0.1}]}), "no training log"),
        ('{"log_history": [{"st', "is not a trainer_state.json: JSONDecodeError"),
        ('{"epoch": 1}', "is not a trainer_state.json: KeyError"),
        ("[]", "is not a trainer_state.json: TypeError"),
    ],
)
def test_without_logs_one_line(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "trainer_state.json").write_text(text)
    assert plot.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("plot.py: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["curves.docx", "file/curves.png"])
def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, capsys, name):
    write_state(tmp_path, [log(1)])
    (tmp_path / "file").write_text("")
    assert plot.main([str(tmp_path), "--output", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.startswith("plot.py: ")
