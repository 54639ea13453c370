"""
`scripts/train.py`, killed with SIGKILL while it trains, saves and generates, and resumed until it is done: nothing
that was saved is lost, and what comes out is what an uninterrupted run gives, to the last bit.

`PYTHONPATH=. python tests/test_kill.py SEED KILLS` prints each kill. What it runs is what the tests run.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from tiny import make_model, make_tokenizer, sorting_rows, write_jsonl  # noqa: E402 - also found when run as a script

from trl_gspo.checkpoints import fault_of, is_complete, list_checkpoints, step_of  # noqa: E402


DAYTIME = ("time", "per_second", "runtime")

# Forks a process that trains, for each line that it reads: what takes the time of a start, the imports, is done once.
# The process is the script's own, from `main` on.
SERVER = """
import json, os, sys, traceback
import train

for line in sys.stdin:
    argv, log = json.loads(line)
    pid = os.fork()
    if pid == 0:
        sys.argv[0] = train.__file__
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        try:
            code = train.main(argv)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forked:
    """Starts runs without the time that imports take."""

    seconds_to_start = 1.0
    codes = (0, -signal.SIGKILL)

    def __init__(self):
        path = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )

    def start(self, argv, log):
        print(json.dumps([argv, str(log)]), file=self._server.stdin, flush=True)
        self._pid = int(self._server.stdout.readline())
        return self

    def is_running(self):
        # The server reaps it: until then it is a zombie, which has no command line.
        try:
            return bool(Path(f"/proc/{self._pid}/cmdline").read_bytes())
        except (FileNotFoundError, ProcessLookupError):
            return False

    def kill(self):
        os.kill(self._pid, signal.SIGKILL)

    def wait(self):
        return int(self._server.stdout.readline())

    def close(self):
        self._server.kill()
        self._server.wait()
        self._server.stdin.close()
        self._server.stdout.close()


class Launched:
    """Starts runs as a user does, in one process or with a launcher."""

    seconds_to_start = 8.0

    def __init__(self, launcher=()):
        self._launcher = launcher
        self.codes = (0, 1) if launcher else (0, -signal.SIGKILL)  # torchrun's own, or the script's

    def start(self, argv, log):
        with log.open("a") as file:
            self._process = subprocess.Popen(
                [sys.executable, *self._launcher, str(ROOT / "scripts" / "train.py"), *argv],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        return self

    def kill(self):
        if not self._launcher:
            self._process.kill()
            return
        # One rank, as the kernel does where memory is short; torchrun ends the others.
        workers = subprocess.run(
            ["pgrep", "-P", str(self._process.pid)], capture_output=True, text=True
        ).stdout.split()
        os.kill(int(random.choice(workers or [self._process.pid])), signal.SIGKILL)

    def is_running(self):
        return self._process.poll() is None

    def wait(self):
        return self._process.wait(timeout=300)

    def close(self):
        pass


class Victim:
    """One run in `output`, in as many processes as it takes."""

    def __init__(self, starter, argv, output, rng):
        self._starter, self._argv, self._rng = starter, [*argv, "--output_dir", str(output)], rng
        self.output, self.log = output, output.with_suffix(".log")
        self.log.touch()
        self.newest = 0
        self.kills = []

    def look(self):
        """The newest whole checkpoint is never older than one that was whole before."""
        whole = [step_of(path) for path in list_checkpoints(self.output) if is_complete(path)]
        newest = max(whole, default=0)
        assert newest >= self.newest, f"checkpoint-{self.newest} was whole and is lost: {self.report()}"
        self.newest = newest

    def kill(self, phase):
        """Starts a process and kills it in a phase; `False` if it came to the end of the run before."""
        start, printed = self.newest, self.log.stat().st_size
        # A rollout batch lasts four steps: with the log of its last one the next is sampled.
        at = start + self._rng.randint(1, 3)
        at += -at % 4 if phase == "generating" else int(phase == "training" and at % 4 == 0)
        # From the log of a step on, from the first file of a checkpoint on, or from the start of the process on.
        most = {"generating": 0.03, "training": 0.01, "saving": 0.08, "any": self._starter.seconds_to_start}
        delay = self._rng.uniform(0, most[phase])
        process = self._starter.start([*self._argv, *(["--resume"] if start or self.kills else [])], self.log)
        began, deadline = time.time_ns(), time.monotonic() + 240

        def is_there():
            if phase == "saving":
                # One that an earlier kill cut off lies there already, and is begun anew.
                return any(step_of(path) > start and _changed(path) > began for path in list_checkpoints(self.output))
            with self.log.open("rb") as file:
                file.seek(printed)
                steps = re.findall(rb"^step (\d+)/", file.read(), re.M)
            return any(int(step) >= at for step in steps)

        while phase != "any" and process.is_running() and not is_there():
            assert time.monotonic() < deadline, self.report()
            self.look()
            time.sleep(0.001)
        time.sleep(delay)
        was_running = process.is_running()
        if was_running:
            process.kill()
        code = process.wait()
        assert code in self._starter.codes, self.report()
        self.look()
        cut_off = {step_of(path): fault_of(path) for path in list_checkpoints(self.output) if not is_complete(path)}
        self.kills.append({"phase": phase, "from": start, "newest": self.newest, "cut off": cut_off, "code": code})
        return code != 0

    def finish(self):
        code = self._starter.start([*self._argv, "--resume"], self.log).wait()
        self.look()
        assert code == 0, self.report()

    def report(self):
        return "\n".join([*map(str, self.kills), self.log.read_text()[-6000:]])


def _changed(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def arguments(model, data, steps):
    options = {
        "model_name_or_path": model,
        "dataset_name": data,
        "reward_funcs": "tests.varied_reward.share_of_digits",
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 12,
        "clip_fraction_target": 0.3,
        "learning_rate": 1e-3,
        "max_steps": steps,
        "save_steps": 3,  # of rollout batches of 4: most checkpoints lie in the middle of one
        "save_total_limit": 1,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "eval_dataset_name": data,
        "dataset_train_split": "train[:32]",
        "dataset_test_split": "test[32:34]",
        "per_device_eval_batch_size": 8,
        "use_cpu": "true",
        "bf16": "false",
        "gradient_checkpointing": "false",
        "report_to": "none",
        "curves": "false",
    }
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def history(output):
    logs = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in DAYTIME)}
        for entry in logs
        if "train_loss" not in entry
    ]


def kill_and_resume(starter, folder, model, seed, kills, steps):
    """Kills a run so many times, resumes it to its end, and compares it with one that was left alone."""
    data = str(write_jsonl(folder / "data" / "rows.jsonl", sorting_rows(40, seed=0)))
    argv = arguments(model, data, steps)
    rng = random.Random(seed)
    calm = Victim(starter, argv, folder / "calm", rng)
    calm.finish()
    victim = Victim(starter, argv, folder / "killed", rng)
    phases = ["saving", "generating", "training", "any"]
    for index in range(kills):
        assert victim.kill(phases[index % 4]), f"no {kills} kills in {steps} steps: {victim.report()}"
    victim.finish()

    assert (victim.output / "summary.json").is_file() and not (victim.output / ".saving").exists()
    expected = history(calm.output)
    assert [entry["step"] for entry in expected if "loss" in entry] == list(range(1, steps + 1))
    evaluated = sorted({*range(5, steps, 5), steps})
    assert [entry["step"] for entry in expected if "eval_reward" in entry] == evaluated
    assert history(victim.output) == expected, victim.report()
    assert (victim.output / "model.safetensors").read_bytes() == (calm.output / "model.safetensors").read_bytes()
    assert list(map(step_of, list_checkpoints(victim.output))) == [steps]
    return victim.kills


@pytest.mark.slow
def test_four_kills_lose_nothing(model_path, tmp_path, capsys):
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown where it fails
    starter = Forked()
    try:
        kill_and_resume(starter, tmp_path, model_path, seed, kills=4, steps=24)
    finally:
        starter.close()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_twenty_kills_lose_nothing(model_path, tmp_path):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    done = kill_and_resume(Launched(), tmp_path, model_path, seed, kills=20, steps=80)
    # Of five that aim at it, some hit the middle of the saving.
    assert any(kill["cut off"] for kill in done)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_four_kills_of_one_of_two_ranks_lose_nothing(model_path, tmp_path):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    kill_and_resume(Launched(torchrun), tmp_path, model_path, seed, kills=4, steps=32)


if __name__ == "__main__":
    seed, count = map(int, sys.argv[1:3])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer()
        make_model(tokenizer).save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        for number, kill in enumerate(
            kill_and_resume(Launched(), Path(folder), f"{folder}/model", seed, count, 4 * count)
        ):
            print(number + 1, kill, flush=True)
