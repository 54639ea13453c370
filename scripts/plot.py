"""
Draws a run's curves over the optimizer steps: reward, clipped share, importance ratio, noise, entropy and length.

    python scripts/plot.py outputs/tiny
    python scripts/plot.py outputs/run_a outputs/run_b --output compare.png
    python scripts/plot.py outputs/run_a --epsilon 3e-4 4e-4

Each argument is an output folder or a `trainer_state.json`; several are drawn over each other. A run of TRL's own
`GRPOTrainer` has reward, entropy and length. The clip range is drawn where the run logged it, or as given here:
`trainer_state.json` does not hold the configuration.

Exit codes: 0 done; 2 bad input, named in one line.
"""

import argparse
import json
import sys
from pathlib import Path

from trl_gspo.curves import draw, has_curves


def load_logs(path: Path) -> list[dict]:
    """The `log_history` of a run, by its output folder or its `trainer_state.json`."""
    candidates = [path] if path.is_file() else [path / "trainer_state.json", *_by_step(path)]
    for candidate in candidates:
        if candidate.is_file():
            try:
                logs = json.loads(candidate.read_text())["log_history"]
                if not (isinstance(logs, list) and all(isinstance(entry, dict) for entry in logs)):
                    raise TypeError("`log_history` is no list of logs")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{candidate} is not a trainer_state.json: {error!r}") from error
            if has_curves(logs):
                return logs
            raise ValueError(f"{candidate} holds no training log of a GSPO or GRPO run.")
    raise FileNotFoundError(f"No trainer_state.json in {path} or in its checkpoints.")


def _by_step(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()]
    checkpoints = sorted(found, key=lambda path: int(path.name.split("-")[-1]), reverse=True)
    return [checkpoint / "trainer_state.json" for checkpoint in checkpoints]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders or trainer_state.json files")
    parser.add_argument("--output", type=Path, help="picture to write; curves.png beside the first run if not given")
    parser.add_argument(
        "--epsilon",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="clip range below and above 1, for runs that did not log theirs",
    )
    args = parser.parse_args(argv)
    first = args.runs[0]
    output = args.output or (first if first.is_dir() else first.parent) / "curves.png"
    try:
        draw({str(path): load_logs(path) for path in args.runs}, output, args.epsilon)
    except (ValueError, OSError, ImportError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    print(f"{'curves':12}{output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
