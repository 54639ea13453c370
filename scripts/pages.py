"""What the scripts that write tables into pages of docs/ share: the place in the page, and the machine's name."""

import os
import platform
from pathlib import Path

import torch
import transformers
import trl


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    cpu = f"{os.cpu_count()} cores of {names[0]}" if names else f"{os.cpu_count()} cores ({platform.machine()})"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}"
    return f"{cpu}, {torch.get_num_threads()} thread{gpu}; {versions}"


def into_docs(text: str, page: Path, begin: str, end: str) -> None:
    """Puts `text` between the lines `begin` and `end` of a page."""
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n{text}{end}{rest.partition(end)[2]}")


def has_markers(page: Path, begin: str, end: str) -> bool:
    return page.is_file() and end in page.read_text().partition(begin)[2]
