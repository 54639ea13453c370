"""Runs a function of a test file in two processes, as `torchrun` would."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def run_on_two_ranks(function: Callable, folder: Path, *arguments) -> None:
    """Calls `function`, of the top of a test file, with `arguments` on both ranks; fails with what they printed."""
    root = Path(__file__).parents[1]
    script = folder / "ranks.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = {[str(root / 'tests'), str(root / 'scripts'), str(root)]!r}\n"
        "import conftest\n"
        f"from {function.__module__} import {function.__name__}\n"
        f"{function.__name__}(*{tuple(map(str, arguments))!r})\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # DeepSpeed compiles for a minute where it runs for the first time; ranks that wait for one another never end.
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-8000:]
