"""What reads logs makes of any: the health watch and the curves."""

import json
import math

import plot
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st
from strategies import ANYTHING, NESTED
from test_health import HEALTHY, Run

from trl_gspo.curves import has_curves
from trl_gspo.health import HealthBounds, _Rewards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


# ---- bounds


@given(st.dictionaries(st.sampled_from([*HealthBounds.__dataclass_fields__]), ANYTHING, max_size=2))
@example({"health_patience": None})
@example({"health_patience": 2.5})
@example({"health_entropy": "0.1"})
def test_bounds_are_numbers_in_their_range_or_refused_by_name(options):
    try:
        bounds = HealthBounds(**options)
    except ValueError as error:
        assert any(f"`{name}" in str(error) for name in options)
        return
    for name, default in vars(HealthBounds()).items():
        value = getattr(bounds, name)
        assert isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
        assert not isinstance(default, int) or isinstance(value, int) and value >= 1
    assert 1 < bounds.health_ratio_warn <= bounds.health_ratio_stop


# ---- the watch

# TRL logs means of float32.
VALUES = st.none() | st.floats(width=32) | st.floats(0, 1) | st.sampled_from([0.0, 1.0, math.nan, math.inf, -1.0])
LOGS = st.fixed_dictionaries(
    {"loss": st.floats(width=32) | st.just(0.0)},
    optional={name: VALUES for name in HEALTHY if name != "loss"},
)


@given(st.lists(LOGS, max_size=30), st.lists(LOGS, max_size=5), st.booleans(), st.integers(1, 3))
def test_the_watch_judges_any_logs_and_stops_once(folder, logs, history, fp16, patience):
    bounds = HealthBounds(health_patience=patience, health_reward_window=2, health_reward_logs=2)
    run = Run(folder, bounds, [entry | {"step": step} for step, entry in enumerate(history)], fp16=fp16)
    stopped = None
    for entry in logs:
        run.step(base=entry)
        assert stopped is None or run.watch.stopped == stopped
        stopped = run.watch.stopped
        assert run.control.should_training_stop == (stopped is not None)
        if not math.isfinite(entry["loss"]):
            assert stopped is not None
    event("stopped" if stopped else "went on")


@given(st.lists(st.floats(0.3, 0.7), min_size=1, max_size=60))
def test_the_watch_never_stops_a_healthy_run(folder, rewards):
    run = Run(folder)
    for reward in rewards:
        run.step(changes={"reward": reward})
    assert run.watch.stopped is None


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=40), st.integers(1, 4), st.floats(0, 2), st.floats(0, 8))
def test_the_bound_of_a_collapse_is_below_the_best_mean(rewards, window, drop, noise):
    tracked = _Rewards(window)
    for step, reward in enumerate(rewards):
        tracked.add(reward, 0.4, step)
    bound = tracked.bound(drop, noise)
    assert (bound is None) == (len(rewards) < 2 * window)
    if bound is not None:
        means = [sum(rewards[i : i + window]) / window for i in range(len(rewards) - window + 1)]
        assert tracked.best == pytest.approx(max(means), abs=1e-12)
        assert bound <= tracked.best
        # More tolerance is a lower bound.
        assert tracked.bound(drop + 1, noise + 1) <= bound


# ---- the curves


ENTRIES = st.dictionaries(
    st.sampled_from(["step", "reward", "loss", "gspo/ratio/p50", "gspo/ratio/noise", "entropy"]), NESTED
)


@given(NESTED | st.fixed_dictionaries({"log_history": NESTED | st.lists(ENTRIES)}))
@example({"log_history": None})
@example({"log_history": [1]})
@example({"log_history": [{"reward": 1.0}]})
@example({"log_history": [{"reward": "1", "step": 1}]})
def test_a_state_has_curves_or_is_bad_input(folder, state):
    path = folder / "trainer_state.json"
    path.write_text(json.dumps(state))
    try:
        logs = plot.load_logs(path)
    except ValueError as error:
        event("refused")
        assert str(path) in str(error)
    else:
        event("has curves")
        assert has_curves(logs) and logs == json.loads(path.read_text())["log_history"] or "NaN" in path.read_text()


@given(st.text() | st.binary())
@example("[" * 100_000)
def test_a_file_has_curves_or_is_bad_input(folder, text):
    path = folder / "trainer_state.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match="is not a trainer_state.json"):
        plot.load_logs(path)
