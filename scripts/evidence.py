"""
Tables, verdicts and figure of scripts/compare.py, from its results alone: the page says what the numbers say.

Each claim's verdict follows from intervals by a rule that stands beside it in `claims`. Means are over seeds, with 95%
t intervals; methods are compared by their difference on the same seed, which has the same base model and prompts.
"""

import json
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from pages import into_docs
from scipy.stats import ttest_1samp


# What `--docs` fills in, each between markers of its own.
BLOCKS = ("setup", "table", "experts", "clipping", "stale", "noise", "length", "token", "guide")
CONFIDENCE = 0.95
BASELINE, OURS = "grpo", "gspo"
# The share of a run, at its end, that entropy and length are of; and the optimizer steps whose completions are in the
# running mean by which falls are measured: that many completions, whether many rollouts or few.
LAST, SMOOTHED = 0.25, 20


# ---- one run


def values_of(logs: list[dict], key: str) -> np.ndarray:
    """A metric over a run's logs, without those that have none."""
    values = [entry.get(key) for entry in logs]
    return np.array([value for value in values if value is not None and math.isfinite(value)], dtype=float)


def mean_of(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def reward_key(logs: list[dict]) -> str:
    # Of a run that is rewarded for more than the others are, what all are rewarded for.
    return "rewards/last_line_reward/mean" if any("rewards/last_line_reward/mean" in log for log in logs) else "reward"


def curve(logs: list[dict]) -> dict[str, list]:
    """Reward and clipped tokens over the optimizer steps, for the figure."""
    key = reward_key(logs)
    rows = [entry for entry in logs if entry.get(key) is not None]
    return {
        "step": [entry["step"] for entry in rows],
        "reward": [entry[key] for entry in rows],
        "clipped": [entry.get("gspo/clip_fraction/tokens") for entry in rows],
    }


def measures(facts: dict[str, Any], logs: list[dict]) -> dict[str, float | None]:
    """
    The figures of a run that the tables hold.

    Returns:
        `dict`: `accuracy` on held-out rows; `reward`, the mean over all rollouts; `per_rollout` and `per_step`, what
        the accuracy gained for each rollout and for each 100 optimizer steps; `fall`, [`largest_fall`]; `broken`, 1
        or 0, by [`what_broke`]; `clipped`, `noise`, `ratio_std`, `kl_old` and `experts`, means over the run; `entropy`
        and `length` of its last quarter; `epsilon_high_end`; `seconds`.
        `None` where there was nothing to log.
    """
    rewards = values_of(logs, reward_key(logs))
    steps = max((entry["step"] for entry in logs), default=0)
    options = facts["options"]
    micro_batches = options["steps_per_generation"] * options.get("num_iterations", 1)
    rollouts = steps * options.get("gradient_accumulation_steps", 1) / micro_batches
    gain = facts["after"] - facts["before"]
    last = logs[-max(round(LAST * len(logs)), 1) :]
    return {
        "accuracy": facts["after"],
        "reward": mean_of(rewards),
        "per_rollout": gain / rollouts if rollouts else None,
        "per_step": 100 * gain / steps if steps else None,
        "fall": largest_fall(rewards, smoothing(options)) if len(rewards) else None,
        "clipped": mean_of(values_of(logs, "gspo/clip_fraction/tokens")),
        "noise": mean_of(values_of(logs, "gspo/ratio/noise")),
        "ratio_std": mean_of(values_of(logs, "gspo/ratio/std")),
        "kl_old": mean_of(values_of(logs, "gspo/kl_old")),
        "experts": mean_of(values_of(logs, "gspo/expert_change_fraction")),
        "entropy": mean_of(values_of(last, "entropy")),
        "length": mean_of(values_of(last, "completions/mean_length")),
        "broken": float(what_broke(facts) is not None),
        "epsilon_high_end": mean_of(values_of(logs[-1:], "gspo/epsilon_high")),
        "seconds": facts["seconds"],
    }


def smoothing(options: dict[str, Any]) -> int:
    """Logs that hold as many completions as [`SMOOTHED`] optimizer steps of one pass over a rollout take."""
    return max(round(SMOOTHED * options.get("num_iterations", 1) / options.get("logging_steps", 1)), 1)


def largest_fall(rewards: np.ndarray, width: int) -> float:
    """How far the mean reward of `width` logs fell below the highest that it had had before."""
    width = min(width, len(rewards))
    smooth = np.convolve(rewards, np.full(width, 1 / width), mode="valid")
    return float((np.maximum.accumulate(smooth) - smooth).max())


def what_broke(run: dict[str, Any]) -> str | None:
    """What is wrong with a run: weights that are not finite, or an accuracy below that of its base model."""
    if run["broken"]:
        return run["broken"]
    return "below its base model" if run["after"] < run["before"] else None


# ---- statistics


class Interval(NamedTuple):
    """A mean over seeds with its 95% t interval; `low` and `high` are NaN with less than two values."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def sign(self) -> int:
        """1 if the interval lies above 0, -1 if below, 0 if it holds 0 or there is none."""
        return int(self.low > 0) - int(self.high < 0)

    def __str__(self) -> str:
        if not self.count:
            return "-"
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]" if self.count > 1 else f"{self.mean:+.3g}"


def interval(values: list[float]) -> Interval:
    """Student's t interval of the mean, of no width where all values are the same."""
    count = len(values)
    mean = float(np.mean(values)) if count else math.nan
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # values that are all the same
        found = ttest_1samp(values, 0.0).confidence_interval(CONFIDENCE)
    return Interval(mean, float(found.low), float(found.high), count)


class Runs:
    """The runs of some results, by setting and method."""

    def __init__(self, results: dict[str, Any]):
        self.results = results
        self._by_key: dict[tuple[str, str], dict[int, dict]] = {}
        for run in results["runs"]:
            self._by_key.setdefault((run["setting"], run["method"]), {})[run["seed"]] = run

    def of(self, setting: str, method: str) -> dict[int, dict]:
        """Runs by seed."""
        return self._by_key.get((setting, method), {})

    def values(self, setting: str, method: str, name: str) -> dict[int, float]:
        """A measure by seed, where a run has it."""
        runs = self.of(setting, method)
        return {seed: run["measures"][name] for seed, run in runs.items() if run["measures"][name] is not None}

    def difference(self, setting: str, name: str, first: str = OURS, second: str = BASELINE) -> Interval:
        """`first` less `second`, by the seeds that both have."""
        return paired(self.values(setting, first, name), self.values(setting, second, name))

    def mean(self, setting: str, method: str, name: str) -> Interval:
        return interval(list(self.values(setting, method, name).values()))

    def settings(self, *methods: str) -> list[str]:
        """Settings in which all of `methods` have a run."""
        return [name for name in self.results["settings"] if all(self.of(name, method) for method in methods)]


def paired(first: dict[int, float], second: dict[int, float]) -> Interval:
    return interval([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


# ---- the table


# Measure, heading, format.
COLUMNS = (
    ("accuracy", "held-out accuracy", ".3f"),
    ("reward", "reward, mean of rollouts", ".3f"),
    ("per_rollout", "accuracy gained a rollout", ".4f"),
    ("per_step", "in 100 steps", ".3f"),
    ("clipped", "clipped tokens", ".2g"),
    ("noise", "ratio noise", ".2g"),
    ("ratio_std", "ratio spread", ".2g"),
    ("experts", "experts changed", ".2g"),
    ("entropy", "entropy", ".3f"),
    ("length", "length", ".1f"),
    ("seconds", "seconds", ".0f"),
)


def row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def header(*cells: str) -> list[str]:
    return [row(*cells), row(*["---"] * len(cells))]


def cell(found: Interval, form: str) -> str:
    """Mean ± half of the interval."""
    if not found.count:
        return "-"
    spread = "" if found.count < 2 else f" ± {found.high - found.mean:{form}}"
    return f"{found.mean:{form}}{spread}"


def count_broken(runs: dict[int, dict]) -> str:
    reasons = sorted({what_broke(run) for run in runs.values()} - {None})
    count = sum(what_broke(run) is not None for run in runs.values())
    return f"{count} of {len(runs)}" + (f": {'; '.join(reasons)}" if reasons else "")


def table(runs: Runs) -> str:
    """One row for each setting and method, and one for each setting's base models."""
    lines = header("setting", "method", *(heading for _, heading, _ in COLUMNS), "broken runs")
    for setting, label in runs.results["settings"].items():
        before = {}
        for method in runs.results["methods"]:
            before |= {seed: run["before"] for seed, run in runs.of(setting, method).items()}
        if before:
            lines.append(
                row(label, "base models", cell(interval(list(before.values())), ".3f"), *["-"] * len(COLUMNS))
            )
        for method, name in runs.results["methods"].items():
            found = runs.of(setting, method)
            if found:
                cells = [cell(runs.mean(setting, method, measure), form) for measure, _, form in COLUMNS]
                lines.append(row(label, name, *cells, count_broken(found)))
    return "\n".join(lines) + "\n"


def setup(results: dict[str, Any]) -> str:
    """Machine, command, and what the search found."""
    seeds = ", ".join(map(str, sorted({run["seed"] for run in results["runs"]})))
    steps = {run["setting"]: run["options"].get("max_steps") for run in results["runs"]}
    counts = (
        f"{len(results['runs'])} runs compared, {len(results['tuning'])} to search, {len(results['guide'])} to guide"
    )
    if results["taken_over"]:
        counts += f", {results['taken_over']} of them taken over from before"
    lines = [
        f"{results['machine']}. `{results['command']}`, {results['minutes']:.0f} minutes: {counts}. Seeds {seeds}.",
        "",
        "Optimizer steps: "
        + "; ".join(f"{label} {steps.get(name)}" for name, label in results["settings"].items())
        + ".",
        "",
    ]
    if results["tuning"]:
        rates = sorted({run["learning_rate"] for run in results["tuning"]})
        lines += header(
            "held-out accuracy on the seed of the search",
            "",
            *(f"{rate:g}" for rate in rates),
            "clip range found there",
        )
        by_family: dict[tuple[str, str], list[dict]] = {}
        for run in results["tuning"]:
            by_family.setdefault((run["setting"], run["method"]), []).append(run)
        for (setting, method), tried in by_family.items():
            best = max(tried, key=lambda run: run["accuracy"])
            by_rate = {run["learning_rate"]: run for run in tried}
            # A best one at the end of its row may not be the best there is.
            ends = {min(by_rate), max(by_rate)}
            cells = [tuning_cell(by_rate.get(rate), best, rate in ends) for rate in rates]
            found = f"{best['epsilon']:.2g}, {best['epsilon_high']:.2g}" if "epsilon" in best else "-"
            lines.append(row(setting, method, *cells, found))
    return "\n".join(lines) + "\n"


def tuning_cell(run: dict | None, best: dict, is_end: bool) -> str:
    if run is None:
        return "-"
    text = "broken" if run["broken"] else f"{run['accuracy']:.3f}"
    return f"**{text}**{' (end of the search)' * is_end}" if run is best else text


# ---- the claims


SUPPORTS, CONTRADICTS = "supports the claim at this scale", "contradicts the claim at this scale"
NEITHER = "neither supports nor contradicts the claim at this scale"
# Accuracy that "at least as well" allows to be lost.
MARGIN = 0.02
# "Two orders of magnitude".
FACTOR = 100


def verdict(signs: list[int]) -> str:
    """Supports with a comparison in favour (1) and none against (-1), contradicts the other way round."""
    if 1 in signs and -1 not in signs:
        return SUPPORTS
    return CONTRADICTS if -1 in signs and 1 not in signs else NEITHER


def comparison(runs: Runs, setting: str, names: dict[str, str]) -> list[str]:
    """A row for each measure: the baseline, ours, and the paired difference."""
    lines = []
    for name, heading in names.items():
        form = next((form for measure, _, form in COLUMNS if measure == name), ".3g")
        means = [cell(runs.mean(setting, method, name), form) for method in (BASELINE, OURS)]
        lines.append(row(runs.results["settings"][setting], heading, *means, runs.difference(setting, name)))
    return lines


COMPARISON = ("setting", "measure", "GRPO", "GSPO", "GSPO less GRPO")
MISSING = "Not run.\n"


def on_experts(runs: Runs) -> str:
    """In favour: a higher accuracy, a smaller fall of the reward, fewer broken runs."""
    settings = [name for name in ("moe", "dense") if name in runs.settings(OURS, BASELINE)]
    if "moe" not in settings:
        return MISSING
    names = {"accuracy": "held-out accuracy", "fall": "largest fall of the reward", "broken": "share of broken runs"}
    names |= {"ratio_std": "spread of the sequence ratio", "experts": "experts changed"}
    lines = header(*COMPARISON)
    for setting in settings:
        lines += comparison(runs, setting, names)
    signs = [runs.difference("moe", "accuracy").sign]
    signs += [-runs.difference("moe", name).sign for name in ("fall", "broken")]
    return "\n".join([*lines, "", f"Verdict: {verdict(signs)}."]) + "\n"


def on_clipping(runs: Runs) -> str:
    """In favour: GSPO clips over a hundred times GRPO's share, and its accuracy is lower by less than the margin."""
    lines = header(*COMPARISON, "GSPO less 100 x GRPO", "verdict")
    for setting in runs.settings(OURS, BASELINE):
        if setting in runs.results["noise"]:
            continue
        ours, base = (runs.values(setting, method, "clipped") for method in (OURS, BASELINE))
        orders = paired(ours, {seed: FACTOR * share for seed, share in base.items()})
        accuracy = runs.difference(setting, "accuracy")
        as_well = 1 if accuracy.low > -MARGIN else min(accuracy.sign, 0)
        # Both halves have to hold, and either can fail.
        found = verdict([min(orders.sign, as_well)])
        rows = comparison(runs, setting, {"clipped": "clipped tokens", "accuracy": "held-out accuracy"})
        lines += [f"{rows[0]} {orders} | {found} |", f"{rows[1]} - | - |"]
    return "\n".join(lines) + "\n" if len(lines) > 2 else MISSING


def on_staleness(runs: Runs) -> str:
    """In favour: a higher accuracy, a smaller fall of the reward."""
    settings = [name for name in runs.settings(OURS, BASELINE) if name.startswith("stale")]
    lines = header(*COMPARISON, "verdict")
    for setting in settings:
        names = {
            "accuracy": "held-out accuracy",
            "fall": "largest fall of the reward",
            "kl_old": "KL to the old policy",
        }
        found = verdict([runs.difference(setting, "accuracy").sign, -runs.difference(setting, "fall").sign])
        rows = comparison(runs, setting, names)
        lines += [f"{rows[0]} {found} |", *(f"{line} - |" for line in rows[1:])]
    return "\n".join(lines) + "\n" if settings else MISSING


def on_noise(runs: Runs) -> str:
    """In favour: the accuracy that noise costs GSPO is less than what it costs GRPO."""
    lines = header(
        "noise, nats a token", "method", "ratio noise", "accuracy less that without noise", "less GRPO's", "verdict"
    )
    for setting, noise in runs.results["noise"].items():
        for method in (BASELINE, OURS):
            if not (runs.of(setting, method) and runs.of("medium", method)):
                continue
            lost = lost_to(runs, setting, method)
            cells = [f"{noise:g}", runs.results["methods"][method], cell(runs.mean(setting, method, "noise"), ".2g")]
            cells.append(interval(list(lost.values())))
            against = paired(lost, lost_to(runs, setting, BASELINE))
            is_ours = method != BASELINE and against.count > 0
            lines.append(row(*cells, against if is_ours else "-", verdict([against.sign]) if is_ours else "-"))
    return "\n".join(lines) + "\n" if len(lines) > 2 else MISSING


def lost_to(runs: Runs, setting: str, method: str) -> dict[int, float]:
    """Accuracy under noise less that of the same seed without, negative where noise costs."""
    with_noise, without = (runs.values(name, method, "accuracy") for name in (setting, "medium"))
    return {seed: with_noise[seed] - without[seed] for seed in with_noise.keys() & without.keys()}


def on_length(runs: Runs) -> str:
    """In favour: at the longest completions a higher accuracy, and a difference above that at the shortest."""
    settings = [name for name in ("dense", "medium", "long") if name in runs.settings(OURS, BASELINE)]
    if not settings:
        return MISSING
    names = {"accuracy": "held-out accuracy", "reward": "reward, mean of rollouts", "length": "length at the end"}
    lines = header(*COMPARISON)
    for setting in settings:
        lines += comparison(runs, setting, names)
    if not {"dense", "long"} <= set(settings):
        return "\n".join(lines) + "\n"
    differences = [
        {seed: ours - base[seed] for seed, ours in runs.values(setting, OURS, "accuracy").items() if seed in base}
        for setting in ("long", "dense")
        for base in [runs.values(setting, BASELINE, "accuracy")]
    ]
    growth = paired(*differences)
    found = verdict([min(runs.difference("long", "accuracy").sign, growth.sign)])
    lines += ["", f"The difference at about 200 tokens less that at 6: {growth}. Verdict: {found}."]
    return "\n".join(lines) + "\n"


def on_token(runs: Runs) -> str:
    """GSPO-token where it should equal GSPO, and where it is given a reward for each line."""
    lines = []
    for setting in runs.settings(OURS, "gspo_token"):
        ours, token = runs.of(setting, OURS), runs.of(setting, "gspo_token")
        for seed in sorted(ours.keys() & token.keys()):
            lines.append(row(runs.results["settings"][setting], seed, first_difference(ours[seed], token[seed])))
    text = (
        "\n".join([*header("setting", "seed", "first step at which the reward differs"), *lines]) + "\n"
        if lines
        else ""
    )
    for setting in runs.settings(OURS, "gspo_token_lines"):
        rows = [*header("setting", "measure", "GSPO", "GSPO-token, a reward a line", "difference")]
        for name, heading in {"accuracy": "held-out accuracy", "reward": "reward, mean of rollouts"}.items():
            means = [cell(runs.mean(setting, method, name), ".3f") for method in (OURS, "gspo_token_lines")]
            difference = runs.difference(setting, name, "gspo_token_lines", OURS)
            rows.append(row(runs.results["settings"][setting], heading, *means, difference))
        text += "\n" * bool(text) + "\n".join(rows) + "\n"
    return text or MISSING


def first_difference(first: dict, second: dict) -> str:
    steps = zip(first["curve"]["step"], first["curve"]["reward"], second["curve"]["reward"], strict=False)
    at = next((step for step, one, other in steps if one != other), None)
    return f"none in {first['curve']['step'][-1]} steps" if at is None else str(at)


# ---- the guide


def guide(entries: list[dict[str, Any]]) -> str:
    """Reward and clipped tokens at each range, and what the controller does."""
    if not entries:
        return MISSING
    ranges = sorted({entry["epsilon_high"] for entry in entries if not entry["is_controlled"]})
    lines = header(
        "tokens", "learning rate", "minibatches", *(f"epsilon_high {high:g}" for high in ranges), "controller: reward",
        "epsilon_high at the end",
    )  # fmt: skip
    by_row: dict[tuple, list[dict]] = {}
    for entry in entries:
        by_row.setdefault((entry["setting"], entry["learning_rate"], entry["steps_per_generation"]), []).append(entry)
    for (_, rate, minibatches), tried in by_row.items():
        fixed = {entry["epsilon_high"]: entry for entry in tried if not entry["is_controlled"]}
        best = max((entry["reward"] for entry in fixed.values()), default=None)
        cells = [guide_cell(fixed[high], fixed[high]["reward"] == best) if high in fixed else "-" for high in ranges]
        controlled = next((entry for entry in tried if entry["is_controlled"]), None)
        end = ["-", "-"] if controlled is None else [guide_cell(controlled), f"{controlled['epsilon_high_end']:.2g}"]
        length = np.mean([entry["length"] for entry in tried])
        lines.append(row(f"{length:.0f}", f"{rate:g}", minibatches, *cells, *end))
    return "\n".join(lines) + "\n"


def guide_cell(entry: dict[str, Any], is_best: bool = False) -> str:
    text = f"{entry['reward']:.3f} ({entry['clipped']:.2f})"
    return f"**{text}**" if is_best else text


# ---- the page


def markers(block: str) -> tuple[str, str]:
    return f"<!-- {block}: written by scripts/compare.py -->", f"<!-- end of {block} -->"


def blocks(results: dict[str, Any], picture: str) -> dict[str, str]:
    """The text of each of [`BLOCKS`]."""
    runs = Runs(results)
    texts = (
        setup(results),
        f"![Reward and clipped tokens over the optimizer steps]({picture})\n\n{table(runs)}",
        *(claim(runs) for claim in (on_experts, on_clipping, on_staleness, on_noise, on_length, on_token)),
        guide(results["guide"]),
    )
    return dict(zip(BLOCKS, texts, strict=True))


def write(results: dict[str, Any], output: Path, page: Path | None) -> str:
    """Writes `results.json`, `compare.md` and `compare.png` into `output`, and the same into a page and beside it."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, output / "compare.png")
    text = "\n".join(f"## {name}\n\n{block}" for name, block in blocks(results, "compare.png").items())
    (output / "compare.md").write_text(text)
    if page is not None:
        picture = page.with_suffix(".png")
        draw(results, picture)
        for name, block in blocks(results, picture.name).items():
            into_docs(f"\n{block}\n", page, *markers(name))
    return text


# ---- the figure


ACROSS = 4  # settings in a row of the figure


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes one PNG: for each setting the reward, and under it the clipped tokens on a log axis."""
    runs = Runs(results)
    # Of the noises the largest.
    noisy = sorted(results["noise"], key=results["noise"].get)[:-1]
    settings = [name for name in results["settings"] if name not in noisy]
    colors = {method: f"C{index}" for index, method in enumerate(results["methods"])}
    bands = math.ceil(len(settings) / ACROSS)
    figure = Figure(figsize=(3.5 * ACROSS, 5.6 * bands + 0.5), layout="constrained")
    grid = figure.subplots(2 * bands, ACROSS, squeeze=False)
    handles = {}
    for index in range(bands * ACROSS):
        band, column = divmod(index, ACROSS)
        pair = grid[2 * band, column], grid[2 * band + 1, column]
        if index >= len(settings):
            for axes in pair:
                axes.remove()
            continue
        for method, label in results["methods"].items():
            curves = [run["curve"] for run in runs.of(settings[index], method).values()]
            for axes, name in zip(pair, ("reward", "clipped"), strict=True):
                # GSPO-token lies on GSPO where the two are one.
                style = "--" if method == "gspo_token" else "-"
                line = draw_spread(axes, curves, name, colors[method], style)
                if line is not None:
                    handles.setdefault(label, line)
        pair[0].set_title(results["settings"][settings[index]], fontsize="medium")
        pair[1].set_yscale("log")
        pair[1].set_xlabel("optimizer step", fontsize="small")
        for axes in pair:
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize="small")
        if column == 0:
            pair[0].set_ylabel("reward")
            pair[1].set_ylabel("clipped tokens")
    if handles:
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_spread(axes: Any, curves: list[dict], name: str, color: str, style: str) -> Any:
    """Mean over seeds, and the standard deviation around it; as far as the run goes that ended first."""
    length = min((len(curve["step"]) for curve in curves), default=0)
    if not length:
        return None
    values = np.array([curve[name][:length] for curve in curves], dtype=float)
    if name == "clipped":
        # No share of 0 has a place on a log axis.
        values[values == 0] = np.nan
    is_there = np.isfinite(values).any(0)
    if not is_there.any():
        return None
    at, values = np.array(curves[0]["step"][:length])[is_there], values[:, is_there]
    mean, deviation = np.nanmean(values, 0), np.nanstd(values, 0)
    (line,) = axes.plot(at, mean, style, color=color, linewidth=1.3)
    low = np.maximum(mean - deviation, mean / 10) if name == "clipped" else mean - deviation
    axes.fill_between(at, low, mean + deviation, color=color, alpha=0.15, linewidth=0)
    return line
