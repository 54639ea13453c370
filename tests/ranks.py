"""Runs a function of a file in tests/ in several processes, as `torchrun` would, on one machine or on two."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


PATIENCE = 300


def run_on_ranks(
    function: Callable, folder: Path, *arguments, ranks: int = 2, machines: int = 1, patience: float = PATIENCE
) -> None:
    """
    Calls `function`, of the top of a file in tests/, with `arguments`, as strings, in each of `ranks` processes; fails
    with what they printed.

    Args:
        folder (`Path`): for the script and what the processes print.
        ranks (`int`): 0 is one process of plain Python, without `torchrun`.
        machines (`int`): `torchrun` is launched once for each, and they find one another by rendezvous on this host.
        patience (`float`): seconds until all of it is ended.
    """
    root = Path(__file__).parents[1]
    script = folder / "ranks.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = {[str(root / 'tests'), str(root / 'scripts'), str(root)]!r}\n"
        "import conftest, ranks\n"
        "ranks.without_a_compiler()\n"
        f"from {function.__module__} import {function.__name__}\n"
        f"{function.__name__}(*{tuple(map(str, arguments))!r})\n"
    )
    command = [sys.executable, str(script)]
    if ranks:
        meeting = ["--standalone"]
        if machines > 1:
            endpoint = f"127.0.0.1:{_free_port()}"
            meeting = ["--nnodes", str(machines), "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
            meeting += ["--local-addr", "127.0.0.1"]
        launcher = [sys.executable, "-m", "torch.distributed.run", *meeting]
        command = [*launcher, "--nproc-per-node", str(ranks // machines), str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not ranks:  # TRL refuses several GPUs in one process
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    logs = [folder / f"machine_{index}.log" for index in range(machines)]
    end = time.monotonic() + patience
    processes = []
    try:
        for log in logs:
            with log.open("w") as output:
                processes.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
        codes = [process.wait(max(end - time.monotonic(), 0)) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [f"none after {patience} s"]
    finally:
        _end(processes)
    # Of two machines the one that failed by itself says why; the other, that it lost its peer.
    assert not any(codes), f"exit codes {codes}\n" + "\n".join(log.read_text()[-8000:] for log in logs)


def without_a_compiler() -> None:
    """Has DeepSpeed use gloo's collectives on CPU: its own it would compile first, for most of a minute."""
    if importlib.util.find_spec("deepspeed") is not None:
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False


def run_on_two_ranks(function: Callable, folder: Path, *arguments) -> None:
    """[`run_on_ranks`] on two of one machine."""
    run_on_ranks(function, folder, *arguments)


def _end(processes: list[subprocess.Popen]) -> None:
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)  # on which torchrun ends its workers
    for process in running:
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
