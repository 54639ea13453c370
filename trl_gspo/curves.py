"""
One picture of a run, from its logs: drawn by [`CurvesCallback`] while it trains, by `scripts/plot.py` afterwards.

matplotlib is optional, so it is imported where it draws. Only its objects are used: `pyplot` and its backend belong to
the notebook that may be training here.
"""

import io
import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback


if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


logger = logging.getLogger(__name__)

_REWARD, _CLIPPED, _RATIO = "Reward", "Clipped share", "Importance ratio - 1"
_NOISE = "Noise of the log-ratio (nats)"
# By panel its lines, and by line its label; the ratio has a drawing of its own. A panel without data is left out.
_PANELS = {
    _REWARD: {"reward": "training", "eval_reward": "evaluation"},
    _CLIPPED: {
        "gspo/clip_fraction/sequences": "sequences",
        "gspo/clip_fraction/low": "low side",
        "gspo/clip_fraction/high": "high side",
        "gspo/clip_fraction/tokens": "tokens",
    },
    _RATIO: {"gspo/ratio/p50": "", "gspo/ratio/mean": ""},
    _NOISE: {"gspo/ratio/noise": "before the first update of a rollout"},
    "Entropy (nats a token)": {"entropy": "training"},
    "Completion length (tokens)": {"completions/mean_length": "mean"},
}
_LINE_STYLES = ("-", "--", ":", "-.")

# Around 0.15 of the tokens are clipped in the paper (section 5.2); the width is ours.
_PAPER_CLIPPED = (0.10, 0.20)
_PAPER_LABEL = "paper: 0.15 of tokens, ± 0.05"

_QUANTILE_BANDS = ("p01 to p99", "p10 to p90")


def draw(runs: dict[str, list[dict]], output: Path, epsilon: tuple[float, float] | None = None) -> None:
    """
    Writes the picture of some runs over each other, in the format that the suffix of `output` names, or as PNG.

    The file is put in place whole: a viewer that has it open never reads half of it.

    Args:
        runs (`dict[str, list[dict]]`): the `log_history` of each run, by its label.
        output (`Path`): its folder is made.
        epsilon (`tuple[float, float]`, *optional*): clip range below and above 1, for runs that did not log theirs.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    buffer = io.BytesIO()
    figure_of(runs, epsilon).savefig(buffer, format=output.suffix[1:] or "png", dpi=120)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def has_curves(logs: list[dict]) -> bool:
    """Whether a `log_history` holds anything that [`draw`] draws."""
    return any(_has_data(logs, lines) for lines in _PANELS.values())


def figure_of(runs: dict[str, list[dict]], epsilon: tuple[float, float] | None = None) -> "Figure":
    """
    The picture that [`draw`] writes. What shows a metric carries its key as `gid`.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Curves need matplotlib: pip install 'trl_gspo[plot]'") from error
    # Color tells the runs apart where there are several, and the lines of a panel where there is one.
    colors = [f"C{index % 10}" for index in range(len(runs))] if len(runs) > 1 else [None]
    panels = {
        title: lines for title, lines in _PANELS.items() if any(_has_data(logs, lines) for logs in runs.values())
    }
    rows = max(math.ceil(len(panels) / 2), 1)
    figure = Figure(figsize=(12, 2.9 * rows + 0.3 * (len(runs) > 1)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        for logs, color in zip(runs.values(), colors, strict=True):
            if title == _RATIO:
                _draw_ratio(axes, logs, color, epsilon)
            else:
                _draw_lines(axes, logs, lines, color)
            if title == _NOISE:
                _draw_noise_bound(axes, logs, color, epsilon)
        if title == _CLIPPED:
            axes.axhspan(*_PAPER_CLIPPED, color="C2", alpha=0.15, linewidth=0, label=_PAPER_LABEL, gid="paper")
        if title not in (_REWARD, _RATIO):
            # Into what is scaled to, before the margin below it is cut off.
            axes.axhline(0, color="black", linewidth=0.5)
            axes.set_ylim(bottom=0)
        _finish(axes, title, is_neutral=len(runs) > 1)
    for axes in grid[len(panels) :]:
        axes.remove()
    if len(runs) > 1:
        _name_runs(figure, dict(zip(runs, colors, strict=True)))
    return figure


def _has_data(logs: list[dict], lines: dict[str, str]) -> bool:
    return any(_series(logs, key)[0] for key in lines)


def _series(logs: list[dict], *keys: str) -> list[list]:
    """
    Steps, and the values of each of `keys`, where all of them have one.

    A metric is absent, or `None`, in a log without anything to say of it: TRL's reward in all but those of a step that
    generated. Its line goes on to the next value.
    """
    rows = [[entry.get(name) for name in ("step", *keys)] for entry in logs]
    rows = [row for row in rows if all(isinstance(value, (int, float)) for value in row)]
    return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in ("step", *keys)]


def _clip_range(logs: list[dict], epsilon: tuple[float, float] | None) -> list[list]:
    """Steps, and epsilon below and above 1: as logged, else as given, else empty."""
    logged = _series(logs, "gspo/epsilon_low", "gspo/epsilon_high")
    if logged[0] or epsilon is None:
        return logged
    steps = _series(logs, "gspo/ratio/mean")[0]
    return [steps, *([bound] * len(steps) for bound in epsilon)]


def _marker(steps: list[int]) -> str:
    # A value that stands alone would be a line of no length; where there are many, dots only thicken it.
    return "." if len(steps) <= 100 else ""


def _draw_lines(axes: "Axes", logs: list[dict], lines: dict[str, str], color: str | None) -> None:
    for index, (key, label) in enumerate(lines.items()):
        steps, values = _series(logs, key)
        if steps:
            axes.plot(
                steps,
                values,
                color=color or f"C{index}",
                linestyle=_LINE_STYLES[index],
                linewidth=1.0 if index else 1.6,
                marker=_marker(steps),
                markersize=3,
                label=label,
                gid=key,
            )


def _draw_ratio(axes: "Axes", logs: list[dict], color: str | None, epsilon: tuple[float, float] | None) -> None:
    """Less 1, as the clip range is a few 1e-4 around it. In logs without quantiles, mean and standard deviation."""
    key, label = "gspo/ratio/p50", "median"
    bands = [(name, *_series(logs, *(f"gspo/ratio/{end}" for end in name.split(" to ")))) for name in _QUANTILE_BANDS]
    if not _series(logs, key)[0]:
        key, label = "gspo/ratio/mean", "mean"
        steps, mean, std = _series(logs, key, "gspo/ratio/std")
        edges = [[m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1)]
        bands = [("mean ± standard deviation", steps, *edges)]
    steps, middle = _series(logs, key)
    if not steps:
        return
    axes.axhline(0, color="black", linewidth=0.5)
    for index, (name, where, *edges) in enumerate(bands):
        low, high = ([value - 1 for value in values] for values in edges)
        alpha = 0.2 * (index + 1)
        axes.fill_between(where, low, high, color=color or "C0", alpha=alpha, linewidth=0, label=name, gid=name)
    excess = [value - 1 for value in middle]
    axes.plot(steps, excess, color=color or "C0", marker=_marker(steps), markersize=3, label=label, gid=key)
    steps, low, high = _clip_range(logs, epsilon)
    for gid, bound in (("gspo/epsilon_low", [-value for value in low]), ("gspo/epsilon_high", high)):
        if steps:
            axes.plot(steps, bound, "--", color=color or "black", label="clip range", gid=gid)


def _draw_noise_bound(axes: "Axes", logs: list[dict], color: str | None, epsilon: tuple[float, float] | None) -> None:
    steps, low, high = _clip_range(logs, epsilon)
    if steps:
        bound = [min(pair) / 3 for pair in zip(low, high, strict=True)]
        axes.plot(steps, bound, "--", color=color or "black", label="a third of epsilon", gid="epsilon/3")


def _finish(axes: "Axes", title: str, is_neutral: bool) -> None:
    """Title, and under it a legend where there are several things to tell apart; gray where color means the run."""
    handles, labels = axes.get_legend_handles_labels()
    # Of several runs, each label once.
    handles = dict(zip(labels, map(_without_color, handles) if is_neutral else handles, strict=True))
    if len(handles) > 1:
        axes.legend(
            list(handles.values()),
            list(handles),
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=len(handles),
            fontsize="x-small",
            frameon=False,
            borderaxespad=0,
            columnspacing=1.2,
            handlelength=1.8,
        )
    axes.set_title(title, loc="left", fontsize="medium", fontweight="bold", pad=18 if len(handles) > 1 else 6)
    axes.set_xlabel("optimizer step", fontsize="small")
    axes.tick_params(labelsize="small")
    # Whole numbers at the ticks: a power of ten above the axis would lie on the legend.
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)


def _without_color(handle: "Artist") -> "Artist":
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if isinstance(handle, Line2D):
        return Line2D([], [], color="0.3", linestyle=handle.get_linestyle())
    return handle if handle.get_gid() == "paper" else Patch(color="0.3", alpha=handle.get_alpha(), linewidth=0)


def _name_runs(figure: "Figure", colors: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, linewidth=3) for color in colors.values()]
    legend = figure.legend(handles, ["run"] * len(colors), loc="outside upper left", ncols=2, frameon=False)
    for text, name in zip(legend.get_texts(), colors, strict=True):
        # Afterwards and unparsed: a path may hold `$`, and matplotlib drops labels that start with `_`.
        text.set(text=name, parse_math=False)


class CurvesCallback(TrainerCallback):
    """
    Keeps one picture of the run current: reward, clipped share, quantiles of the ratio, noise, entropy and length.

    Drawn on the main process from the whole `log_history`, which a resumed run has too: at a log, if the last drawing
    was long enough ago, and at the end. A picture that cannot be drawn, for want of matplotlib or of disk, costs one
    warning and never the run: no more is tried.

    Args:
        output (`str` or `Path`, *optional*):
            File to write; `curves.png` in the run's `output_dir` if not given.
        seconds (`float`, *optional*, defaults to `60.0`):
            Least time between two drawings, each of which takes about a second. Where one takes longer, fifty times as
            long passes before the next.
    """

    def __init__(self, output: str | Path | None = None, seconds: float = 60.0):
        self.output = output
        self.seconds = seconds
        self._next_at = -math.inf
        self._is_on = True

    def on_log(self, args, state, control, **kwargs):
        if time.monotonic() >= self._next_at:
            self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(args, state)

    def _draw(self, args, state) -> None:
        if not (self._is_on and state.is_world_process_zero and has_curves(state.log_history)):
            return
        output = Path(self.output or Path(args.output_dir) / "curves.png")
        started = time.monotonic()
        try:
            draw({output.stem: state.log_history}, output, _epsilon(args))
        except Exception as error:
            self._is_on = False
            logger.warning(f"{output} is not drawn any more in this run: {type(error).__name__}: {error}")
        now = time.monotonic()
        self._next_at = now + max(self.seconds, 50 * (now - started))


def _epsilon(args: Any) -> tuple[float, float] | None:
    """The clip range of a configuration, if it has one."""
    low, high = getattr(args, "epsilon", None), getattr(args, "epsilon_high", None)
    return None if low is None else (low, low if high is None else high)
