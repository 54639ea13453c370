"""
Runs code that a model wrote against unit tests: many candidates at once, each confined to processes of its own.

Linux alone, without root, daemon or container, and needs the standard library alone. For each candidate two processes
are started (see `sandbox_child.py`): one that runs it, and one that judges it. This file starts, watches and removes
them. docs/code_reward.md says what the confinement is, and what it does not protect from.
"""

import contextlib
import json
import logging
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


logger = logging.getLogger(__name__)

# As a module, not by path: its compiled form is read then, which halves what each process costs.
_CHILD = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import sandbox_child; del sys.path[0]; "
    "sandbox_child.main()"
)
_START_SECONDS = 60.0  # for two interpreters to start, on a machine that is busy with other things
_WATCH_SECONDS = 0.1  # how often to look at the folder, and whether to stop
_MOST_FILES = 1000
_warned = set()


class SandboxError(OSError):
    """The system does not let candidates be confined, or started: nothing is known about them."""


@dataclass(frozen=True)
class Limits:
    """
    What one candidate may use. Each of its two processes has the limits of memory and processor time for itself.

    Args:
        wall_seconds (`float`, *optional*, defaults to `10.0`):
            From when both processes are ready until the tests have ended.
        cpu_seconds (`int`, *optional*, defaults to `5`):
            Processor time, whole seconds.
        memory_mib (`int`, *optional*, defaults to `512`):
            Address space, MiB, which counts what is reserved too. 64 is enough for a trivial program.
        disk_mib (`int`, *optional*, defaults to `16`):
            What may lie in the folder, and the size of one file, MiB.
        output_kib (`int`, *optional*, defaults to `256`):
            What may be printed, KiB.
        open_files (`int`, *optional*, defaults to `32`):
            Files and pipes open at a time.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 5
    memory_mib: int = 512
    disk_mib: int = 16
    output_kib: int = 256
    open_files: int = 32

    def __post_init__(self):
        least = {"memory_mib": 64, "open_files": 16, "cpu_seconds": 1}
        for name, value in vars(self).items():
            whole = name != "wall_seconds"
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ValueError(f"`{name}` is {value!r}: it has to be a {'whole ' if whole else ''}number.")
            if not least.get(name, 0) <= value or value <= 0:
                raise ValueError(f"`{name}` is {value}: it has to be at least {least.get(name, 'more than 0')}.")


@dataclass(frozen=True)
class Program:
    """
    A candidate and its tests.

    Args:
        code (`str`):
            What the model wrote: a program that defines the entry point, or the continuation of `code_prefix`.
        tests (`str`):
            Python source. Passed if it runs to its end, having used the candidate. If it only defines a function
            `check`, that is called with the entry point, as HumanEval has it.
        code_prefix (`str`, *optional*, defaults to `""`):
            What comes before `code`. The tests get their own copy of what it defines, but for the entry point.
        entry_point (`str`, *optional*):
            What is tested: a name, or an expression such as `Solution().solve`. By default the last function or class
            that `code_prefix` defines; without that, the tests ask the candidate for each name that they lack.
    """

    code: str
    tests: str
    code_prefix: str = ""
    entry_point: str | None = None


@dataclass(frozen=True)
class Result:
    """
    What became of a candidate.

    Args:
        outcome (`str`):
            `passed`; `failed`, an assertion did not hold; `error`, any other exception, a crash or an exit; `timeout`,
            of wall or processor time; `memory`; `disk`; `output`. Nothing is known of the candidate after `unused`,
            tests that ended without asking anything of it, and `lost`, where the system did not let it run.
        message (`str`):
            What went wrong.
        output (`str`):
            What was printed, as far as `output_kib` goes.
    """

    outcome: str
    message: str = ""
    output: str = ""

    @property
    def score(self) -> float | None:
        """1 for `passed`, 0 for what the candidate did wrong, `None` where nothing is known."""
        return None if self.outcome in ("unused", "lost") else float(self.outcome == "passed")


def check_platform() -> None:
    """Raises [`SandboxError`] where candidates cannot be confined: elsewhere than on Linux, on x86-64 or AArch64."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ("x86_64", "aarch64") or sys.maxsize < 2**32:
        raise SandboxError(
            "Code that a model wrote is run on 64-bit Linux alone, on x86_64 or aarch64; this is "
            f"{sys.platform} on {machine}, where it cannot be confined. Use a reward that does not run code, or a "
            "Linux machine, virtual or not."
        )


def default_workers() -> int:
    """Processor cores that this process may use, shared with the other ranks of this machine."""
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)


def run_programs(
    programs: Sequence[Program],
    limits: Limits | None = None,
    packages: bool = False,
    workers: int | None = None,
    landlock: bool = True,
) -> list[Result]:
    """
    Runs candidates against their tests, several at once.

    Leaves nothing behind, also when it is interrupted: processes are killed and waited for, folders removed.

    Args:
        programs (`Sequence[Program]`): candidates with tests.
        limits (`Limits`, *optional*): what each may use.
        packages (`bool`, *optional*, defaults to `False`): whether they may import the installed packages, not the
            standard library alone.
        workers (`int`, *optional*): how many at once; [`default_workers`] if not set.
        landlock (`bool`, *optional*, defaults to `True`): whether to use Landlock where the kernel has it; for tests.

    Returns:
        `list[Result]`: one for each candidate.

    Raises:
        SandboxError: if candidates cannot be run here, with the cause.
    """
    check_platform()
    from . import sandbox_child  # noqa: F401 - not on Windows; here it is compiled once for all

    stop = threading.Event()
    limits = limits or Limits()
    with ThreadPoolExecutor(workers or default_workers(), thread_name_prefix="sandbox") as pool:
        try:
            futures = [pool.submit(_run, program, limits, packages, landlock, stop) for program in programs]
            return [future.result() for future in futures]
        finally:  # Ctrl-C, or an error of one of them: the others end too, before the pool is left
            stop.set()
            pool.shutdown(cancel_futures=True)


def _run(program: Program, limits: Limits, packages: bool, landlock: bool, stop: threading.Event) -> Result:
    folder = tempfile.mkdtemp(prefix="trl_gspo-candidate-")
    try:
        with _Pair(program, limits, packages, landlock, folder) as pair:
            return pair.watch(stop)
    finally:
        _remove(folder)


class _Pair:
    """The two processes of one candidate, from their start until they are killed and waited for."""

    def __init__(self, program: Program, limits: Limits, packages: bool, landlock: bool, folder: str):
        self.limits, self.folder = limits, folder
        self.output, self.written, self.verdict = b"", 0, b""
        self.processes: list[subprocess.Popen] = []
        self.open: list[int] = []
        self.program, self.packages, self.landlock = program, packages, landlock

    def __enter__(self) -> "_Pair":
        try:
            self._start()
        except OSError as error:
            self.__exit__()
            raise SandboxError(f"A process for a candidate cannot be started: {error}") from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        limits, program = self.limits, self.program
        ask, to_do = self._pipe()
        replies, reply = self._pipe()
        self.verdict_end, verdict = self._pipe()
        self.output_end, output = self._pipe()
        common = {
            "prefix": program.code_prefix,
            "entry_point": program.entry_point,
            "parent": os.getpid(),
            "cpu_seconds": limits.cpu_seconds,
            "memory": limits.memory_mib * 2**20,
            "disk": limits.disk_mib * 2**20,
            "open_files": limits.open_files,
            "landlock": self.landlock,
            "library_path": [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path],
        }
        self._spawn("candidate", common | {"code": program.code, "pipes": [ask, reply]}, self.folder, output)
        judge = {"tests": program.tests, "pipes": [replies, to_do], "verdict": verdict}
        self._spawn("judge", common | judge, "/", output)
        for end in (ask, to_do, replies, reply, verdict, output):
            self._close(end)

    def _pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        self.open += ends
        return ends

    def _close(self, end: int) -> None:
        self.open.remove(end)
        os.close(end)

    def _spawn(self, role: str, job: dict, cwd: str, output: int) -> None:
        # The same completion has the same score: sets of strings keep their order from run to run.
        environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
        if "LD_LIBRARY_PATH" in os.environ:  # without it some interpreters do not start
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        flags = ["-B"] if self.packages else ["-B", "-s", "-S"]
        handed = [*job["pipes"], *([job["verdict"]] if "verdict" in job else [])]
        with open(os.memfd_create("job"), "w+b") as file:
            file.write(json.dumps(job).encode())
            file.seek(0)
            process = subprocess.Popen(
                [sys.executable, *flags, "-c", _CHILD, role],
                stdin=file,
                stdout=output,
                stderr=output,
                cwd=cwd,
                env=environment,
                pass_fds=handed,
                start_new_session=True,
            )
        self.processes.append(process)

    def watch(self, stop: threading.Event) -> Result:
        """Waits until the judge has spoken, or a limit is reached."""
        poll = select.poll()
        poll.register(self.verdict_end, select.POLLIN)
        poll.register(self.output_end, select.POLLIN)
        deadline, ready = time.monotonic() + _START_SECONDS, False
        while True:
            for end, _ in poll.poll(1000 * _WATCH_SECONDS):
                data = os.read(end, 65536)
                if not data:
                    poll.unregister(end)
                if end == self.verdict_end:
                    self.verdict += data
                    # The second line is the verdict. Waiting for the end as well would wait for any process that the
                    # host has forked in the meantime, which holds a copy of this pipe.
                    if not data or self.verdict.count(b"\n") == 2:
                        return self._result()
                else:
                    self.written += len(data)
                    self.output = (self.output + data)[: self.limits.output_kib * 1024]
            if not ready and b"\n" in self.verdict:
                ready, deadline = True, time.monotonic() + self.limits.wall_seconds
                self._warn_without_landlock()
            if self.written > self.limits.output_kib * 1024:
                return self._end("output", f"more than {self.limits.output_kib} KiB were printed")
            if time.monotonic() > deadline:
                if not ready:
                    return self._end("lost", f"it could not start within {_START_SECONDS:g} s")
                return self._end("timeout", f"more than {self.limits.wall_seconds:g} s")
            if _size(self.folder) > self.limits.disk_mib * 2**20:
                return self._end(
                    "disk", f"more than {self.limits.disk_mib} MiB or {_MOST_FILES} files, or out of sight"
                )
            if stop.is_set():
                return self._end("lost", "interrupted")

    def _end(self, outcome: str, message: str) -> Result:
        self._drain(0.0)
        return Result(outcome, message, self.output.decode(errors="replace"))

    def _result(self) -> Result:
        lines = self.verdict.splitlines()
        if not lines:
            self._drain(0.2)
            raise SandboxError(
                "A candidate's processes did not get as far as running it. Likely causes: a kernel or container that "
                "forbids seccomp, `memory_mib` too small for the interpreter, or memory that ran out. They said: "
                f"{self.output.decode(errors='replace').strip() or 'nothing'}"
            )
        if len(lines) == 1:
            status, _ = _wait(self.processes[1], 5.0)
            if status == -signal.SIGXCPU:
                return self._end("timeout", f"the tests took more than {self.limits.cpu_seconds} s of processor time")
            return self._end("lost", f"the judge ended with status {status}")
        said = json.loads(lines[1])
        if said["outcome"] != "died":
            return self._end(said["outcome"], said["message"])
        status, seconds = _wait(self.processes[0], 1.0)
        # The kernel counts for the limit in ticks, which is coarser than what it reports.
        if status == -signal.SIGXCPU or (status == -signal.SIGKILL and seconds > 0.5 * self.limits.cpu_seconds):
            return self._end("timeout", f"more than {self.limits.cpu_seconds} s of processor time")
        if status == -signal.SIGKILL:
            return self._end("memory", "killed, likely by the system for want of memory")
        return self._end("error", f"{said['message']} (status {status})")

    def _drain(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self.output_end, select.POLLIN)
        while len(self.output) < self.limits.output_kib * 1024:
            if not poll.poll(1000 * seconds):
                return
            data = os.read(self.output_end, self.limits.output_kib * 1024 - len(self.output))
            if not data:
                return
            self.output += data

    def _warn_without_landlock(self) -> None:
        if json.loads(self.verdict.splitlines()[0])["ready"] or "landlock" in _warned:
            return
        _warned.add("landlock")
        logger.warning(
            "This kernel has no Landlock (Linux 5.13 and later, where it is not turned off): candidates cannot write "
            "any file, nor reach the network, but can read those that this user can read. docs/code_reward.md."
        )

    def __exit__(self, *_) -> None:
        for process in self.processes:
            if process.returncode is None:  # not waited for yet: its number is still its own
                with contextlib.suppress(ProcessLookupError):  # but where the host ignores SIGCHLD
                    os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            _wait(process, None)
        for end in self.open[:]:
            self._close(end)


def _wait(process: subprocess.Popen, seconds: float | None) -> tuple[int | None, float]:
    """Exit status (negative: the signal; `None`: still running) and processor time of a process."""
    deadline = time.monotonic() + (seconds or 0)
    while process.returncode is None:
        try:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG if seconds is not None else 0)
        except ChildProcessError:  # a host that ignores SIGCHLD has the system wait for them
            process.returncode = 0
            break
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            process.seconds = usage.ru_utime + usage.ru_stime
        elif time.monotonic() > deadline:
            return None, 0.0
        else:
            time.sleep(0.001)
    return process.returncode, getattr(process, "seconds", 0.0)


def _size(folder: str) -> float:
    """Bytes in a folder; infinite if there are too many files to count."""
    total, count, folders = 0, 0, [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    count += 1
                    if count > _MOST_FILES:
                        return float("inf")
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        except FileNotFoundError:  # it is at work
            continue
        except OSError:  # a folder that may be written, not read; or a name too long: folders in folders in folders
            return float("inf")
    return total


def _remove(folder: str) -> None:
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):  # folders without rights, or nested deeper than Python can follow
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", folder], check=False, stderr=subprocess.DEVNULL)
    if os.path.exists(folder):
        logger.warning(f"The folder {folder} of a candidate could not be removed.")
