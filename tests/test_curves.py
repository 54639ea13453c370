"""What is in the picture of a run, read from the figure; and the callback that keeps it current."""

import builtins
import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from trl_gspo import GSPOConfig, GSPOTrainer, curves
from trl_gspo.curves import CurvesCallback, draw, figure_of, has_curves


def log(step, **values):
    """A log of a GSPO run, with numbers that a float holds exactly, so that what is drawn can be compared exactly."""
    return {
        "step": step,
        "reward": 0.5,
        "entropy": 1.25,
        "completions/mean_length": 300.0,
        "gspo/clip_fraction/sequences": 0.25,
        "gspo/clip_fraction/low": 0.125,
        "gspo/clip_fraction/high": 0.0625,
        "gspo/clip_fraction/tokens": 0.375,
        "gspo/ratio/mean": 1.0,
        "gspo/ratio/std": 0.25,
        "gspo/ratio/p01": 0.75,
        "gspo/ratio/p10": 0.875,
        "gspo/ratio/p50": 1.0625,
        "gspo/ratio/p90": 1.25,
        "gspo/ratio/p99": 1.5,
        "gspo/ratio/noise": 2**-10,
    } | values


def without(prefix, entry):
    return {key: value for key, value in entry.items() if not key.startswith(prefix)}


def panel(figure, title):
    found = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(title)]
    assert len(found) == 1, f"{title!r} among {[axes.get_title(loc='left') for axes in figure.axes]}"
    return found[0]


def titles(figure):
    return [axes.get_title(loc="left").split(" (")[0] for axes in figure.axes]


def lines(axes):
    """The lines of a panel as `{key: [points of each]}`; what has no key is decoration."""
    drawn = {}
    for line in axes.get_lines():
        if line.get_gid() is not None:
            drawn.setdefault(line.get_gid(), []).append([tuple(point) for point in line.get_xydata().tolist()])
    return drawn


def band(axes, gid):
    """Lower and upper limit of a shaded band by step."""
    (found,) = [artist for artist in axes.collections if artist.get_gid() == gid]
    by_step = {}
    for step, value in found.get_paths()[0].vertices.tolist():
        by_step.setdefault(step, []).append(value)
    return {step: (min(values), max(values)) for step, values in by_step.items()}


def legend(axes):
    return [] if axes.get_legend() is None else [text.get_text() for text in axes.get_legend().get_texts()]


def colors(axes, gid):
    return [line.get_color() for line in axes.get_lines() if line.get_gid() == gid]


def test_every_panel_shows_what_was_logged():
    logs = [log(4), log(8, reward=0.75, entropy=1.0)]
    figure = figure_of({"run": logs})
    assert titles(figure) == [
        "Reward",
        "Clipped share",
        "Importance ratio - 1",
        "Noise of the log-ratio",
        "Entropy",
        "Completion length",
    ]
    assert lines(panel(figure, "Reward")) == {"reward": [[(4, 0.5), (8, 0.75)]]}
    assert lines(panel(figure, "Clipped share")) == {
        "gspo/clip_fraction/sequences": [[(4, 0.25), (8, 0.25)]],
        "gspo/clip_fraction/low": [[(4, 0.125), (8, 0.125)]],
        "gspo/clip_fraction/high": [[(4, 0.0625), (8, 0.0625)]],
        "gspo/clip_fraction/tokens": [[(4, 0.375), (8, 0.375)]],
    }
    assert lines(panel(figure, "Noise")) == {"gspo/ratio/noise": [[(4, 2**-10), (8, 2**-10)]]}
    assert lines(panel(figure, "Entropy")) == {"entropy": [[(4, 1.25), (8, 1.0)]]}
    assert lines(panel(figure, "Completion length")) == {"completions/mean_length": [[(4, 300.0), (8, 300.0)]]}
    # The ratio is drawn as its distance from 1, and without a clip range, which nothing told us.
    ratio = panel(figure, "Importance ratio")
    assert lines(ratio) == {"gspo/ratio/p50": [[(4, 0.0625), (8, 0.0625)]]}
    assert band(ratio, "p01 to p99") == {4: (-0.25, 0.5), 8: (-0.25, 0.5)}
    assert band(ratio, "p10 to p90") == {4: (-0.125, 0.25), 8: (-0.125, 0.25)}
    assert legend(ratio) == ["p01 to p99", "p10 to p90", "median"]


def test_the_range_of_the_paper_is_shaded():
    axes = panel(figure_of({"run": [log(1)]}), "Clipped share")
    (shaded,) = [patch for patch in axes.patches if patch.get_gid() == "paper"]
    assert shaded.get_y() == pytest.approx(0.10) and shaded.get_height() == pytest.approx(0.10)
    assert legend(axes) == ["sequences", "low side", "high side", "tokens", "paper: 0.15 of tokens, ± 0.05"]
    # Read from 0: how far a share is from none is the question.
    assert axes.get_ylim()[0] == 0
    # And with room above: a line along the frame would not be seen.
    length = panel(figure_of({"run": [log(1), log(2)]}), "Completion length").get_ylim()
    assert length[0] == 0 and length[1] > 300


@pytest.mark.parametrize(
    ("logged", "given", "low", "high"),
    [
        ({}, (0.25, 0.5), [0.25, 0.25], [0.5, 0.5]),
        ({"gspo/epsilon_low": 0.125, "gspo/epsilon_high": 0.25}, None, [0.125, 0.125], [0.25, 0.25]),
        # What a controller moved wins over what the configuration started from.
        ({"gspo/epsilon_low": 0.125, "gspo/epsilon_high": 0.25}, (0.5, 0.5), [0.125, 0.125], [0.25, 0.25]),
    ],
)
def test_the_clip_range_is_drawn_where_it_is_known(logged, given, low, high):
    figure = figure_of({"run": [log(1, **logged), log(2, **logged)]}, given)
    drawn = lines(panel(figure, "Importance ratio"))
    assert drawn["gspo/epsilon_low"] == [[(1, -low[0]), (2, -low[1])]]
    assert drawn["gspo/epsilon_high"] == [[(1, high[0]), (2, high[1])]]
    assert legend(panel(figure, "Importance ratio")).count("clip range") == 1
    # The bound of the noise goes by the narrower side.
    assert lines(panel(figure, "Noise"))["epsilon/3"] == [[(1, low[0] / 3), (2, low[1] / 3)]]


def test_the_moves_of_a_controller_are_drawn():
    moved = [
        log(step, **{"gspo/epsilon_low": 2.0**-step, "gspo/epsilon_high": 2.0 ** (1 - step)}) for step in (1, 2, 3)
    ]
    drawn = lines(panel(figure_of({"run": moved}), "Importance ratio"))
    assert drawn["gspo/epsilon_low"] == [[(1, -0.5), (2, -0.25), (3, -0.125)]]
    assert drawn["gspo/epsilon_high"] == [[(1, 1.0), (2, 0.5), (3, 0.25)]]


def test_a_log_without_a_value_leaves_no_hole():
    # TRL logs the reward with the step that generates; a window without a live sequence has no ratio; evaluations and
    # the end of the run are logs of their own.
    empty = {key: None for key in log(2) if key.startswith("gspo/")}
    logs = [log(1), log(2, **empty), {"step": 2, "eval_reward": 0.25}, log(3), {"step": 3, "train_loss": 0.0}]
    del logs[1]["reward"]
    figure = figure_of({"run": logs}, (0.25, 0.5))
    assert lines(panel(figure, "Reward")) == {"reward": [[(1, 0.5), (3, 0.5)]], "eval_reward": [[(2, 0.25)]]}
    assert legend(panel(figure, "Reward")) == ["training", "evaluation"]
    assert lines(panel(figure, "Clipped share"))["gspo/clip_fraction/sequences"] == [[(1, 0.25), (3, 0.25)]]
    assert list(band(panel(figure, "Importance ratio"), "p01 to p99")) == [1, 3]
    assert lines(panel(figure, "Entropy")) == {"entropy": [[(1, 1.25), (2, 1.25), (3, 1.25)]]}
    # A value that stands alone is a dot, not a line of no length.
    (alone,) = [line for line in panel(figure, "Reward").get_lines() if line.get_gid() == "eval_reward"]
    assert alone.get_marker() == "."


def test_nan_and_infinity_are_drawn_around(tmp_path):
    logs = [log(1), log(2, reward=float("nan"), entropy=float("inf")), log(3)]
    draw({"run": logs}, tmp_path / "curves.png")
    assert panel(figure_of({"run": logs}), "Entropy").get_ylim()[1] < 2


def test_logs_without_quantiles_show_mean_and_standard_deviation():
    figure = figure_of({"run": [without("gspo/ratio/p", log(step)) for step in (1, 2)]}, (0.25, 0.5))
    ratio = panel(figure, "Importance ratio")
    assert lines(ratio)["gspo/ratio/mean"] == [[(1, 0.0), (2, 0.0)]]
    assert band(ratio, "mean ± standard deviation") == {1: (-0.25, 0.25), 2: (-0.25, 0.25)}
    assert legend(ratio) == ["mean ± standard deviation", "mean", "clip range"]


def test_a_run_of_the_stock_trainer_has_what_it_logged():
    logs = [without("gspo/", log(step)) for step in (1, 2)]
    assert titles(figure_of({"grpo": logs})) == ["Reward", "Entropy", "Completion length"]
    assert has_curves(logs) and not has_curves([{"step": 1, "loss": 0.5, "gspo/ratio/p50": None}])
    # Beside a GSPO run it is missing from the panels that it has nothing for, and nothing else is.
    figure = figure_of({"grpo": logs, "gspo": [log(1), log(2)]})
    assert len(figure.axes) == 6
    assert len(lines(panel(figure, "Reward"))["reward"]) == 2
    assert len(lines(panel(figure, "Importance ratio"))["gspo/ratio/p50"]) == 1


def test_several_runs_are_told_apart_by_color():
    figure = figure_of({"outputs/$a$": [log(1)], "_b": [log(1, reward=1.0), log(2)]}, (0.25, 0.5))
    reward, clipped = panel(figure, "Reward"), panel(figure, "Clipped share")
    assert lines(reward)["reward"] == [[(1, 0.5)], [(1, 1.0), (2, 0.5)]]
    assert colors(reward, "reward") == ["C0", "C1"]
    # One color through all panels, and the lines of a panel by their strokes.
    assert colors(clipped, "gspo/clip_fraction/tokens") == colors(clipped, "gspo/clip_fraction/low") == ["C0", "C1"]
    assert legend(clipped)[:4] == ["sequences", "low side", "high side", "tokens"]
    (named,) = figure.legends
    assert [text.get_text() for text in named.get_texts()] == ["outputs/$a$", "_b"]
    assert not any(text.get_parse_math() for text in named.get_texts())
    assert [line.get_color() for line in named.get_lines()] == ["C0", "C1"]
    # Of one run, the lines of a panel by color.
    one = figure_of({"a": [log(1)]})
    assert not one.legends
    shares = [f"gspo/clip_fraction/{name}" for name in ("sequences", "low", "high", "tokens")]
    assert [colors(panel(one, "Clipped share"), key) for key in shares] == [["C0"], ["C1"], ["C2"], ["C3"]]


def test_no_text_lies_on_another():
    moved = {"gspo/epsilon_low": 3e-4, "gspo/epsilon_high": 4e-4, "eval_reward": 0.5}
    runs = {name: [log(step, **moved) for step in (1, 20000)] for name in ("outputs/a_run_with_a_long_name", "b")}
    figure = figure_of(runs)
    figure.canvas.draw()
    boxes = []
    for axes in figure.axes:
        boxes += [axes.get_legend().get_window_extent()] if axes.get_legend() else []
        boxes += [axes._left_title.get_window_extent(), axes.xaxis.label.get_window_extent(), axes.get_window_extent()]
        # Were the ticks' power of ten split off, it would stand where the legend is.
        assert axes.yaxis.get_offset_text().get_text() == ""
    boxes += [figure.legends[0].get_window_extent()]
    for index, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        for other in boxes[:index]:
            assert not box.padded(-1).overlaps(other.padded(-1)), (box, other)


def test_the_file_is_put_in_place_whole(tmp_path, monkeypatch):
    output = tmp_path / "new" / "curves.png"
    draw({"run": [log(1)]}, output)
    before = output.read_bytes()
    assert before.startswith(b"\x89PNG") and before.rstrip().endswith(b"IEND\xaeB`\x82")

    def interrupted(source, target):
        assert target == output and source.parent == output.parent
        assert source.read_bytes().startswith(b"\x89PNG") and output.read_bytes() == before
        raise OSError("cut off")

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(OSError, match="cut off"):
        draw({"run": [log(1), log(2)]}, output)
    assert output.read_bytes() == before
    assert list(output.parent.iterdir()) == [output]


def test_the_suffix_names_the_format(tmp_path):
    draw({"run": [log(1)]}, tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    draw({"run": [log(1)]}, tmp_path / "curves")
    assert (tmp_path / "curves").read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
def test_the_notebook_keeps_its_backend(tmp_path):
    # In a process of its own: other tests may have chosen a backend here.
    code = f"""
import sys
from trl_gspo.curves import draw
assert "matplotlib" not in sys.modules
draw({{"run": {[log(1)]!r}}}, __import__("pathlib").Path({str(tmp_path / "curves.png")!r}))
assert "matplotlib.pyplot" not in sys.modules
import matplotlib
assert "backend" not in dict.keys(matplotlib.rcParams) or not isinstance(
    dict.__getitem__(matplotlib.rcParams, "backend"), str
), "a backend was chosen"
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ---- the callback


@pytest.fixture
def drawn(monkeypatch):
    """Records what would be drawn, on a clock that stands still until it is told."""
    calls = []
    monkeypatch.setattr(curves, "draw", lambda runs, output, epsilon: calls.append((runs, output, epsilon)))
    return calls


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(curves.time, "monotonic", lambda: now.seconds)
    return now


def state_of(*logs, main=True):
    return TrainerState(log_history=list(logs), is_world_process_zero=main)


ARGS = SimpleNamespace(output_dir="outputs/run", epsilon=3e-4, epsilon_high=None)


def test_drawn_at_a_log_and_then_not_before_its_time(drawn, clock):
    callback = CurvesCallback(seconds=60)
    state = state_of(log(1))
    callback.on_log(ARGS, state, TrainerControl())
    assert [str(output) for _, output, _ in drawn] == ["outputs/run/curves.png"]
    clock.seconds += 59
    state.log_history.append(log(2))
    callback.on_log(ARGS, state, TrainerControl())
    assert len(drawn) == 1
    clock.seconds += 1
    callback.on_log(ARGS, state, TrainerControl())
    assert len(drawn) == 2
    # The end waits for nothing, and the whole history is drawn, of before a resume too.
    callback.on_train_end(ARGS, state, TrainerControl())
    assert len(drawn) == 3
    assert drawn[-1][0] == {"curves": [log(1), log(2)]}


def test_a_slow_drawing_is_not_repeated_soon(clock, monkeypatch):
    calls = []

    def slow(*args):
        calls.append(clock.seconds)
        clock.seconds += 10

    monkeypatch.setattr(curves, "draw", slow)
    callback = CurvesCallback(seconds=60)
    for _ in range(100):
        callback.on_log(ARGS, state_of(log(1)), TrainerControl())
        clock.seconds += 10
    # 10 s of drawing, then 500 s without.
    assert calls == [1000.0, 1510.0]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (SimpleNamespace(output_dir="o", epsilon=3e-4, epsilon_high=4e-4), (3e-4, 4e-4)),
        (SimpleNamespace(output_dir="o", epsilon=3e-4, epsilon_high=None), (3e-4, 3e-4)),
        (SimpleNamespace(output_dir="o"), None),
    ],
)
def test_the_clip_range_is_the_configuration_s(drawn, args, expected):
    CurvesCallback("elsewhere.png").on_train_end(args, state_of(log(1)), TrainerControl())
    ((_, output, epsilon),) = drawn
    assert str(output) == "elsewhere.png" and epsilon == expected


def test_nothing_is_drawn_off_the_main_process_or_before_there_is_something(drawn):
    callback = CurvesCallback()
    for state in (state_of(log(1), main=False), state_of({"step": 1, "loss": 0.5}), state_of()):
        callback.on_log(ARGS, state, TrainerControl())
        callback.on_train_end(ARGS, state, TrainerControl())
    assert drawn == []
    # Which did not use up the time until the next drawing.
    callback.on_log(ARGS, state_of(log(1)), TrainerControl())
    assert len(drawn) == 1


def test_without_matplotlib_one_warning(tmp_path, monkeypatch, caplog):
    imported = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    args = SimpleNamespace(output_dir=str(tmp_path))
    callback = CurvesCallback(seconds=0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            callback.on_log(args, state_of(log(1)), TrainerControl())
        callback.on_train_end(args, state_of(log(1)), TrainerControl())
    (message,) = caplog.messages
    assert "pip install 'trl_gspo[plot]'" in message and str(tmp_path / "curves.png") in message
    with pytest.raises(ImportError, match=r"pip install 'trl_gspo\[plot\]'"):
        draw({"run": [log(1)]}, tmp_path / "curves.png")


def test_a_place_that_cannot_be_written_to_does_not_stop_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    callback = CurvesCallback(tmp_path / "file" / "curves.png", seconds=0)
    with caplog.at_level(logging.WARNING):
        callback.on_log(ARGS, state_of(log(1)), TrainerControl())
        callback.on_train_end(ARGS, state_of(log(1)), TrainerControl())
    (message,) = caplog.messages
    assert "file/curves.png" in message and "Error" in message


def starts_lowercase(completions, **_):
    return [float(completion[:1].islower()) for completion in completions]


def test_a_training_leaves_its_picture_and_a_resumed_one_the_whole_of_it(tmp_path, model_path, dataset, monkeypatch):
    figures = []
    original = curves.figure_of
    monkeypatch.setattr(curves, "figure_of", lambda *args: figures.append(original(*args)) or figures[-1])
    torch.manual_seed(0)

    class StopAtTwo(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    def train(*callbacks, checkpoint=None):
        config = GSPOConfig(
            str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=4,
            learning_rate=1e-2,
            max_steps=4,
            logging_steps=1,
            save_steps=2,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = GSPOTrainer(model_path, starts_lowercase, config, dataset, callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.state.log_history

    train(CurvesCallback(seconds=0), StopAtTwo())
    drawn = lines(panel(figures[-1], "Entropy"))["entropy"]
    assert [[step for step, _ in points] for points in drawn] == [[1, 2]]
    (tmp_path / "curves.png").unlink()

    history = train(CurvesCallback(seconds=3600), checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    drawn = lines(panel(figures[-1], "Entropy"))["entropy"]
    assert drawn == [[(entry["step"], entry["entropy"]) for entry in history if "entropy" in entry]]
    assert [step for step, _ in drawn[0]] == [1, 2, 3, 4]
    # The clip range is the configuration's.
    assert lines(panel(figures[-1], "Importance ratio"))["gspo/epsilon_high"][0][0][1] == 4e-4
    # `scripts/plot.py` sees the same history in the checkpoint.
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert lines(panel(original({"saved": saved}), "Entropy"))["entropy"] == drawn
