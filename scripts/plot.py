"""
Draws a run's curves: reward, clip fraction and importance ratio over the optimizer steps.

    python scripts/plot.py outputs/tiny
    python scripts/plot.py outputs/run_a outputs/run_b --output compare.png

Each argument is an output folder or a `trainer_state.json`; several are drawn over each other.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - the backend without a screen has to be chosen first


def load_logs(path: Path) -> list[dict]:
    """The training logs of a run, by its output folder or its `trainer_state.json`."""
    candidates = [path] if path.is_file() else [path / "trainer_state.json", *_by_step(path)]
    for candidate in candidates:
        if candidate.is_file():
            history = json.loads(candidate.read_text())["log_history"]
            logs = [entry for entry in history if "gspo/ratio/mean" in entry]
            if logs:
                return logs
            raise ValueError(f"{candidate} holds no training log of a GSPO run.")
    raise FileNotFoundError(f"No trainer_state.json in {path} or in its checkpoints.")


def _by_step(folder: Path) -> list[Path]:
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]), reverse=True)
    return [checkpoint / "trainer_state.json" for checkpoint in checkpoints]


def draw(runs: dict[str, list[dict]], output: Path) -> None:
    """Writes one PNG. `runs` holds the logs by label."""
    figure, (reward, clipped, ratio) = plt.subplots(3, 1, sharex=True, figsize=(8, 9), constrained_layout=True)
    for index, (label, logs) in enumerate(runs.items()):
        color = f"C{index}"
        steps = [entry["step"] for entry in logs]

        def series(key, logs=logs):
            return [float("nan") if entry.get(key) is None else entry[key] for entry in logs]

        reward.plot(steps, series("reward"), color=color, label=label)
        clipped.plot(steps, series("gspo/clip_fraction/sequences"), color=color, label=label)
        clipped.plot(steps, series("gspo/clip_fraction/low"), color=color, linestyle="--", linewidth=1)
        clipped.plot(steps, series("gspo/clip_fraction/high"), color=color, linestyle=":", linewidth=1)
        mean, spread = series("gspo/ratio/mean"), series("gspo/ratio/std")
        ratio.plot(steps, mean, color=color, label=label)
        ratio.fill_between(
            steps,
            [m - s for m, s in zip(mean, spread, strict=True)],
            [m + s for m, s in zip(mean, spread, strict=True)],
            color=color,
            alpha=0.2,
            linewidth=0,
        )
    reward.set_ylabel("reward")
    clipped.set_ylabel("clipped share of live sequences")
    clipped.set_title("solid: all, dashed: low side, dotted: high side", fontsize="small")
    ratio.set_ylabel("importance ratio")
    ratio.set_title("mean and one standard deviation, over live sequences", fontsize="small")
    ratio.axhline(1.0, color="black", linewidth=0.5)
    ratio.set_xlabel("optimizer step")
    if len(runs) > 1:
        reward.legend()
    for axes in (reward, clipped, ratio):
        axes.grid(alpha=0.3)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders or trainer_state.json files")
    parser.add_argument("--output", type=Path, help="PNG to write; curves.png beside the first run if not given")
    args = parser.parse_args(argv)
    try:
        runs = {str(path): load_logs(path) for path in args.runs}
    except (ValueError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    first = args.runs[0]
    output = args.output or (first if first.is_dir() else first.parent) / "curves.png"
    draw(runs, output)
    print(f"{'curves':12}{output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
