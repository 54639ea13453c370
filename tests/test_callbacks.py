import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from trl_gspo.callbacks import RewardProgressCallback, StopOnSignalCallback


ONE_PROCESS = SimpleNamespace(world_size=1)


@pytest.fixture
def stop():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    callback = StopOnSignalCallback()
    callback.on_train_begin(ONE_PROCESS, None, None)
    yield callback
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_at_the_end_of_the_step(stop, signum, capsys):
    control = TrainerControl(should_evaluate=True)
    stop.on_step_end(ONE_PROCESS, None, control)
    assert stop.signum is None and not control.should_save and not control.should_training_stop
    os.kill(os.getpid(), signum)
    assert f"{signum.name}: saving a checkpoint" in capsys.readouterr().err
    stop.on_step_end(ONE_PROCESS, None, control)
    assert stop.signum == signum
    assert control.should_save and control.should_training_stop and not control.should_evaluate


@pytest.mark.parametrize("echo", [signal.SIGINT, signal.SIGTERM])
def test_an_echo_is_not_a_second_signal(stop, echo):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), echo)
    control = TrainerControl()
    stop.on_step_end(ONE_PROCESS, None, control)
    assert stop.signum == signal.SIGINT


def test_a_later_ctrl_c_ends_the_process_at_once(stop, monkeypatch):
    os.kill(os.getpid(), signal.SIGINT)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 2)
    os.kill(os.getpid(), signal.SIGTERM)  # the launcher's end, some time after the terminal's Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) != stop._handle


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    callback = StopOnSignalCallback()
    callback.on_train_begin(ONE_PROCESS, None, None)
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == callback._handle
    callback.on_train_end(ONE_PROCESS, None, None)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_shows_reward_and_clip_fraction_and_keeps_the_last_reward(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    state = TrainerState(max_steps=8, global_step=1, is_world_process_zero=True)
    callback = RewardProgressCallback()
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs={"reward": 0.25, "gspo/clip_fraction/sequences": 0.125, "loss": 1.0})
    state.global_step = 2
    callback.on_log(None, state, None, logs={"gspo/clip_fraction/sequences": None, "loss": 1.0})
    callback.on_log(None, state, None, logs={"gspo/clip_fraction/sequences": 0.5, "loss": 1.0})
    callback.on_step_end(None, state, None)
    if is_terminal:
        assert callback.training_bar.postfix == "reward=0.25, clipped=0.5"
    callback.on_train_end(None, state, None)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines == (
        [] if is_terminal else ["step 1/8: reward 0.25, clipped 0.125", "step 2/8: reward 0.25, clipped 0.5"]
    )
    assert ("2/8" in captured.err) == is_terminal


def test_other_ranks_show_nothing(capsys):
    state = TrainerState(max_steps=8, is_world_process_zero=False)
    callback = RewardProgressCallback()
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs={"reward": 0.25})
    callback.on_step_end(None, state, None)
    callback.on_train_end(None, state, None)
    assert capsys.readouterr() == ("", "")
