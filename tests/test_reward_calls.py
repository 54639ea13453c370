"""Reward functions that return what they should not, or nothing at all."""

import asyncio
import functools
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from tiny import sorting_rows, write_jsonl
from torch import nn

from trl_gspo.reward_calls import check_rewards, guard


ROOT = Path(__file__).parents[1]


# ---- what they return


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ([1, 0.5, None, True], [1.0, 0.5, None, 1.0]),
        ((1, 2), [1.0, 2.0]),
        ((value for value in (1, 2)), [1.0, 2.0]),
        (np.array([0.5, 1], dtype=np.float32), [0.5, 1.0]),
        (torch.tensor([0.5, 1], dtype=torch.bfloat16), [0.5, 1.0]),
        (torch.tensor([[0.5], [1]]), [0.5, 1.0]),
        ([torch.tensor(0.5), np.float16(0.5), np.bool_(True), np.array([2.0])], [0.5, 0.5, 1.0, 2.0]),
        ([Fraction(1, 2), 3.4028234e38], [0.5, 3.4028234e38]),
        ([], []),
    ],
    ids=["list", "tuple", "generator", "array", "bfloat16", "column", "of_tensors", "fractions", "empty"],
)
def test_numbers_are_taken_as_trl_takes_them(given, taken):
    assert check_rewards("f", given) == taken


def test_nan_stays():
    assert math.isnan(check_rewards("f", [math.nan])[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (1.0, r"'f' returned 1.0 \(float\): it must return a list"),
        (None, r"returned None \(NoneType\)"),
        ("good", r"returned 'good' \(str\): it must return a list"),
        ({"a": 1.0}, r"returned \{'a': 1.0\} \(dict\)"),
        ([1.0, "1.0"], r"returned '1.0' \(str\) for completion 1: it must be a number"),
        ([[1.0, 2.0]], r"returned \[1.0, 2.0\] \(list\) for completion 0"),
        ([torch.zeros(2)], r"returned tensor\(\[0., 0.\]\) \(Tensor\) for completion 0"),
        ([1j], r"returned 1j \(complex\)"),
        ([0.0, math.inf], r"returned inf \(float\) for completion 1: it must be a finite number in float32"),
        ([-math.inf], r"returned -inf \(float\)"),
        ([3.5e38], r"returned 3.5e\+38 \(float\)"),
        ([10**400], r"returned 10{56}\.\.\. \(int\)"),
        (["x" * 1000], r"returned 'x{56}\.\.\. \(str\)"),
    ],
)
def test_anything_else_is_refused_with_the_name_of_the_function(given, message):
    with pytest.raises(ValueError, match="The reward function 'f' " + message.split("'f' ")[-1]):
        check_rewards("f", given)


def test_nan_is_said_once_for_each_function(caplog):
    logging.getLogger("trl_gspo").propagate = True
    PartialState(cpu=True)  # which the trainer's arguments make, and accelerate's loggers need
    first, second = (guard(lambda completions: [math.nan, 1.0, None], name, 10) for name in ("one", "two"))
    for function in (first, first, second):
        assert math.isnan(function(completions=[])[0])
    assert [record.message.removeprefix("[RANK 0] ").split(" completions")[0] for record in caplog.records] == [
        f"The reward function {name!r} returned NaN for 1 of 3" for name in ("one", "two")
    ]


def test_a_guarded_function_looks_like_its_own():
    async def later(completions):
        return [1.0]

    class Judge:
        async def __call__(self, completions):
            return [2.0]

    for function, reward in ((later, 1.0), (functools.partial(later), 1.0), (Judge(), 2.0)):
        guarded = guard(function, "f", 10)
        assert asyncio.iscoroutinefunction(guarded)
        assert asyncio.run(guarded(completions=[])) == [reward]
    assert guard(later, "f", 10).__name__ == "later"
    model = nn.Linear(1, 1)
    assert guard(model, "f", 10) is model


# ---- how long they take


@pytest.fixture(autouse=True)
def no_trace_is_left():
    before = signal.getsignal(signal.SIGALRM)
    yield
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def in_python(**_):
    while True:
        pass


def in_a_wait(**_):
    time.sleep(60)


def in_a_regular_expression(**_):
    re.match(r"(a+)+$", "a" * 60 + "b")


def in_a_subprocess(**_):
    subprocess.run(["sleep", "60"])


def behind_except_exception(**_):
    for _ in range(10):
        try:
            time.sleep(60)
        except Exception:  # noqa: S112 - what users write
            continue


def behind_a_bare_except(**_):
    for _ in range(2):
        try:
            time.sleep(60)
        except:  # noqa: E722, S110 - what users write
            pass


def behind_an_error_of_its_own(**_):
    try:
        time.sleep(60)
    except BaseException as error:
        raise RuntimeError("the judge did not answer") from error


HANGING = [
    in_python,
    in_a_wait,
    in_a_regular_expression,
    in_a_subprocess,
    behind_except_exception,
    behind_a_bare_except,
    behind_an_error_of_its_own,
]


@pytest.mark.parametrize("function", HANGING, ids=lambda function: function.__name__)
def test_a_function_that_hangs_ends_in_time_with_its_name(function):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="'slow' took longer than 0.2 seconds .*`reward_timeout`"):
        guard(function, "slow", 0.2)(completions=[])
    assert time.monotonic() - start < 3


def test_the_stack_where_it_hung_is_shown():
    with pytest.raises(TimeoutError) as caught:
        guard(in_a_wait, "slow", 0.1)(completions=[])
    shown = "".join(traceback.format_exception(caught.value))
    assert "in in_a_wait\n    time.sleep(60)" in shown and "RewardInterrupted" in shown


def test_an_async_function_that_hangs_ends_in_time_with_its_name():
    ended = []

    async def waiting(**_):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def quick(**_):
        return [1.0]

    async def together():
        return await asyncio.gather(
            guard(waiting, "slow", 0.2)(), guard(quick, "quick", 0.2)(), return_exceptions=True
        )

    slow, rewards = asyncio.run(together())
    assert isinstance(slow, TimeoutError) and "'slow' took longer than 0.2 seconds" in str(slow)
    assert rewards == [1.0] and ended == [True]


def test_a_function_in_time_is_not_disturbed():
    assert guard(lambda: [1.0], "f", 0.1)() == [1.0]
    assert guard(lambda: [1.0], "f", math.inf)() == [1.0]
    time.sleep(0.2)


def test_an_error_of_the_function_passes_as_it_is():
    def raising():
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        guard(raising, "f", 10)()


def test_a_timeout_of_the_functions_own_passes_as_it_is():
    def raising():
        raise TimeoutError("the judge's")

    async def raising_async():
        raise TimeoutError("the judge's")

    with pytest.raises(TimeoutError, match="the judge's"):
        guard(raising, "f", 10)()
    with pytest.raises(TimeoutError, match="the judge's"):
        asyncio.run(guard(raising_async, "f", 10)())


def test_an_alarm_that_somebody_else_set_stays():
    received = []
    before = signal.signal(signal.SIGALRM, lambda *_: received.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert guard(lambda: [1.0], "f", 60)() == [1.0]
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        time.sleep(0.3)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert received == [True]


def test_off_the_main_thread_functions_are_called_without_an_alarm():
    returned = []
    thread = threading.Thread(target=lambda: returned.append(guard(lambda: [1.0], "f", 10)()))
    thread.start()
    thread.join()
    assert returned == [[1.0]]


UNINTERRUPTIBLE = """
import asyncio, ctypes, sys, time
from trl_gspo import reward_calls

reward_calls.GRACE = 0.3

def deadlocked():
    # A mutex locked twice, by a call that keeps the interpreter's lock: no signal, no thread of Python gets through.
    mutex, library = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

async def blocking():
    time.sleep(60)

guarded = reward_calls.guard(globals()[sys.argv[1]], "f", 0.3)
asyncio.run(guarded()) if sys.argv[1] == "blocking" else guarded()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of the C library there")
@pytest.mark.parametrize("name", ["deadlocked", "blocking"])
def test_what_no_exception_ends_ends_the_process_with_its_stack(name):
    run = subprocess.run([sys.executable, "-c", UNINTERRUPTIBLE, name], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "Timeout (0:00:00.600000)!" in run.stderr and f"in {name}" in run.stderr, run.stderr


RETURNING = """
import asyncio, time
from trl_gspo import reward_calls

reward_calls.GRACE = 0.1

async def later():
    return [1.0]

reward_calls.guard(lambda: [1.0], "f", 0.2)()
asyncio.run(reward_calls.guard(later, "f", 0.2)())
time.sleep(1)
print("alive")
"""


def test_a_call_that_returned_leaves_nothing_that_ends_the_process():
    run = subprocess.run([sys.executable, "-c", RETURNING], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (0, "alive\n"), run.stderr


def command_line(model_path, folder, reward):
    options = dict(
        dataset_name=write_jsonl(folder / "rows.jsonl", sorting_rows(32, seed=0)),
        model_name_or_path=model_path,
        output_dir=folder / "run",
        reward_funcs=f"tests.faulty_reward.{reward}",
        reward_timeout=2,
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=6,
        use_cpu="true",
        bf16="false",
        report_to="none",
        max_steps=4,
    )
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def run(command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, env=environment)


LEAVING = "import sys, train; train.SECONDS_TO_LEAVE = 1.0; train.leave(train.main(sys.argv[1:]))"


@pytest.mark.slow
def test_threads_that_hang_do_not_keep_the_process(model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'scripts'}{os.pathsep}{os.environ['PYTHONPATH']}")
    ended = run(["-c", LEAVING, *command_line(model_path, tmp_path, "waiting_in_threads")])
    assert ended.returncode == 4
    assert "'waiting_in_threads' took longer than 2 seconds" in ended.stderr


@pytest.mark.slow
def test_a_function_that_hangs_on_one_rank_ends_both(model_path, tmp_path):
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "scripts" / "train.py"),
    ]
    ended = run([*launcher, *command_line(model_path, tmp_path, "waiting_on_rank_1")])
    assert ended.returncode == 1  # torchrun's own, for whatever its workers return
    assert "The reward function 'waiting_on_rank_1' took longer than 2 seconds" in ended.stderr
    assert re.search(r"exitcode +: 4 ", ended.stderr), ended.stderr
