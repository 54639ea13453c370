"""
Tables, verdicts and figure of scripts/compare.py, from its results alone: the page says what the numbers say.

Each claim's verdict follows from intervals by a rule that stands beside it in `claims`. Means are over seeds, with 95%
t intervals; methods are compared by their difference on the same seed, which has the same base model and prompts.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from benchmark import into_docs
from matplotlib.figure import Figure
from scipy.special import stdtrit


# What `--docs` fills in, each between markers of its own.
BLOCKS = ("method", "settings", "claims", "guide")
CONFIDENCE = 0.95
BASELINE, OURS = "grpo", "gspo"
# Rollouts at the end of a run that its entropy and length are of, and in the running mean by which falls are measured.
LAST, SMOOTHED = 0.25, 5


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
        the accuracy gained for each rollout and for each 100 optimizer steps; `fall`, the largest fall of the smoothed
        reward from what it had reached; `clipped`, `noise`, `ratio_std`, `kl_old` and `experts`, means over the run;
        `entropy`, `length` of its last quarter; `epsilon_high_end`; `seconds`. `None` where there was nothing to log.
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
        "fall": largest_fall(rewards) if len(rewards) else None,
        "clipped": mean_of(values_of(logs, "gspo/clip_fraction/tokens")),
        "noise": mean_of(values_of(logs, "gspo/ratio/noise")),
        "ratio_std": mean_of(values_of(logs, "gspo/ratio/std")),
        "kl_old": mean_of(values_of(logs, "gspo/kl_old")),
        "experts": mean_of(values_of(logs, "gspo/expert_change_fraction")),
        "entropy": mean_of(values_of(last, "entropy")),
        "length": mean_of(values_of(last, "completions/mean_length")),
        "epsilon_high_end": mean_of(values_of(logs[-1:], "gspo/epsilon_high")),
        "seconds": facts["seconds"],
    }


def largest_fall(rewards: np.ndarray) -> float:
    """How far the running mean of the reward fell below the highest that it had had before."""
    width = min(SMOOTHED, len(rewards))
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
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]" if self.count > 1 else f"{self.mean:+.3g}"


def interval(values: list[float]) -> Interval:
    """mean ± t s / sqrt(n), t the 0.975 quantile of Student's distribution with n - 1 degrees of freedom."""
    count = len(values)
    mean = float(np.mean(values)) if count else math.nan
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2) * np.std(values, ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half, count)


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

    def broken(self, setting: str, method: str) -> str:
        runs = self.of(setting, method).values()
        return f"{sum(what_broke(run) is not None for run in runs)} of {len(runs)}"


def paired(first: dict[int, float], second: dict[int, float]) -> Interval:
    return interval([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def markers(block: str) -> tuple[str, str]:
    return f"<!-- {block}: written by scripts/compare.py -->", f"<!-- end of {block} -->"


def write(results, output, docs):
    return ""
