"""`scripts/evidence.py`: statistics against numbers by hand, and verdicts that follow from intervals."""

import math
from pathlib import Path

import evidence
import numpy as np
import pytest
from evidence import CONTRADICTS, NEITHER, SUPPORTS, Runs, interval, paired
from pages import has_markers


METHODS = {"grpo": "GRPO", "gspo": "GSPO", "gspo_token": "GSPO-token"}
SETTINGS = {
    "dense": "dense",
    "moe": "mixture",
    "medium": "medium",
    "long": "long",
    "stale_8": "8",
    "noise_0.1": "noise",
}


def make_run(setting, method, seed, **changes):
    facts = dict(setting=setting, method=method, seed=seed, before=0.2, after=0.9, broken=None, seconds=10.0)
    facts |= dict(options=dict(steps_per_generation=4, max_steps=8))
    facts |= {name: changes.pop(name) for name in ("before", "after", "broken") if name in changes}
    logs = [
        {"step": step, "reward": 0.1 * step, "gspo/clip_fraction/tokens": 0.2, "gspo/ratio/noise": 0.0, "entropy": 0.1}
        for step in (4, 8)
    ]
    measures = evidence.measures(facts, logs) | changes
    return facts | dict(curve=evidence.curve(logs), measures=measures)


def make_results(*runs, **changes):
    return dict(
        settings=SETTINGS, methods=METHODS, noise={"noise_0.1": 0.1}, runs=list(runs), tuning=[], guide=[],
        machine="a machine", command="a command", minutes=1.0, taken_over=0,
    ) | changes  # fmt: skip


def pairs(setting, base, ours, name="after"):
    """Runs of both methods, a value a seed."""
    return [
        make_run(setting, method, seed, **{name: value})
        for method, values in (("grpo", base), ("gspo", ours))
        for seed, value in enumerate(values)
    ]


# ---- statistics


def test_interval_by_hand():
    # Mean 3, standard deviation sqrt(2.5), t of 4 degrees of freedom 2.776445.
    found = interval([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-5)
    assert str(interval([0.5])) == "+0.5" and interval([0.5]).sign == 0
    assert math.isnan(interval([]).mean) and str(interval([])) == "-"


def test_difference_is_of_the_seeds_that_both_have():
    found = paired({0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.0, 3: 7.0})
    # 0.5 and 1.0: t of one degree of freedom 12.7062, standard deviation 0.353553.
    assert found.count == 2 and found.mean == 0.75
    assert found.high - found.mean == pytest.approx(12.7062 * 0.353553 / math.sqrt(2), rel=1e-4)


@pytest.mark.parametrize(
    ("values", "sign"),
    [((0.1, 0.2, 0.3), 0), ((0.19, 0.2, 0.21), 1), ((-0.19, -0.2, -0.21), -1), ((1, 1), 1), ((0, 0), 0)],
)
def test_sign_of_an_interval(values, sign):
    # Of 0.1, 0.2, 0.3: 0.2 ± 0.248.
    assert interval(list(values)).sign == sign


def test_largest_fall_by_hand():
    assert evidence.largest_fall(np.array([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]), 5) == pytest.approx(0.2)
    assert evidence.largest_fall(np.array([0.1, 0.5, 0.3, 0.6]), 1) == pytest.approx(0.2)
    assert evidence.largest_fall(np.array([0.1, 0.2, 0.3]), 5) == 0.0


@pytest.mark.parametrize(
    ("options", "logs"),
    [
        (dict(logging_steps=4), 5),
        # A log of 16 steps, four times four on the same completions.
        (dict(logging_steps=16, num_iterations=4), 5),
        (dict(logging_steps=64, num_iterations=4), 1),
        (dict(logging_steps=100), 1),
        ({}, 20),
    ],
)
def test_falls_are_of_as_many_completions_everywhere(options, logs):
    assert evidence.smoothing(options) == logs


def test_measures_of_a_run_by_hand():
    logs = [
        {
            "step": 4 * i,
            "reward": reward,
            "entropy": 1.0 / i,
            "gspo/ratio/std": None,
            "gspo/clip_fraction/tokens": 0.1 * i,
        }
        for i, reward in enumerate((0.2, 0.4, 0.6, 0.8), start=1)
    ]
    facts = dict(before=0.1, after=0.9, broken=None, seconds=7.0)
    facts |= dict(options=dict(steps_per_generation=8, gradient_accumulation_steps=2))
    found = evidence.measures(facts, logs)
    # 16 optimizer steps of two micro-batches, eight micro-batches a rollout.
    assert found["per_rollout"] == pytest.approx(0.8 / 4) and found["per_step"] == pytest.approx(0.8 / 16 * 100)
    assert found["reward"] == pytest.approx(0.5) and found["clipped"] == pytest.approx(0.25)
    assert found["entropy"] == 0.25 and found["ratio_std"] is None and found["broken"] == 0.0
    twice = facts | dict(options=facts["options"] | dict(num_iterations=2))
    assert evidence.measures(twice, logs)["per_rollout"] == pytest.approx(0.8 / 2)
    assert evidence.measures(facts | dict(after=0.05), logs)["broken"] == 1.0
    assert evidence.measures(facts | dict(broken="not finite"), [])["reward"] is None


def test_reward_is_what_all_methods_are_rewarded_for():
    logs = [{"step": 4, "reward": 9.0, "rewards/last_line_reward/mean": 0.5, "gspo/clip_fraction/tokens": 0.1}]
    assert evidence.curve(logs) == {"step": [4], "reward": [0.5], "clipped": [0.1]}


# ---- verdicts


def test_verdict_by_rule():
    assert evidence.verdict([1, 0, 0]) == SUPPORTS and evidence.verdict([0, -1]) == CONTRADICTS
    assert evidence.verdict([0, 0]) == evidence.verdict([1, -1]) == NEITHER


@pytest.mark.parametrize(
    ("base", "ours", "expected"),
    [
        ((0.8, 0.81, 0.79), (0.9, 0.91, 0.9), SUPPORTS),
        ((0.9, 0.91, 0.9), (0.8, 0.81, 0.79), CONTRADICTS),
        ((0.8, 0.9, 0.7), (0.8, 0.7, 0.9), NEITHER),
        # GRPO ends below its base model on each seed.
        ((0.1, 0.15, 0.19), (0.1, 0.5, 0.9), NEITHER),
        ((0.1, 0.15, 0.19), (0.5, 0.7, 0.9), SUPPORTS),
    ],
)
def test_experts(base, ours, expected):
    text = evidence.on_experts(Runs(make_results(*pairs("moe", base, ours))))
    assert text.endswith(f"Verdict: {expected}.\n") and "| mixture | held-out accuracy |" in text


@pytest.mark.parametrize(
    ("base", "ours", "accuracies", "expected"),
    [
        ((0.001, 0.00101), (0.15, 0.151), ((0.9, 0.9), (0.9, 0.9)), SUPPORTS),
        ((0.01, 0.011), (0.15, 0.151), ((0.9, 0.9), (0.9, 0.9)), CONTRADICTS),
        ((0.001, 0.00101), (0.15, 0.151), ((0.9, 0.9), (0.8, 0.8)), CONTRADICTS),
        # Clipped enough, and whether it learns as well cannot be told.
        ((0.001, 0.00101), (0.15, 0.151), ((0.9, 0.9), (0.95, 0.8)), NEITHER),
        ((0.001, 0.00101), (0.15, 0.151), ((0.9, 0.9), (1.0, 0.82)), NEITHER),
    ],
)
def test_clipping_needs_both_halves(base, ours, accuracies, expected):
    runs = [
        make_run("dense", method, seed, clipped=clipped, after=after)
        for method, shares, ends in (("grpo", base, accuracies[0]), ("gspo", ours, accuracies[1]))
        for seed, (clipped, after) in enumerate(zip(shares, ends, strict=True))
    ]
    row = evidence.on_clipping(Runs(make_results(*runs))).splitlines()[2]
    assert row.endswith(f"| {expected} |")


def test_noise_is_judged_by_what_it_costs():
    # GRPO loses 0.3, GSPO 0.1, by one seed a little more than by the other.
    runs = pairs("medium", (0.9, 0.8), (0.7, 0.6)) + pairs("noise_0.1", (0.6, 0.5), (0.6, 0.5001))
    lines = evidence.on_noise(Runs(make_results(*runs))).splitlines()
    assert lines[2].startswith("| 0.1 | GRPO |") and "| -0.3 [" in lines[2]
    assert lines[3].startswith("| 0.1 | GSPO |") and lines[3].endswith(f"| {SUPPORTS} |")


def test_length_needs_a_difference_that_grows():
    short, long = pairs("dense", (0.9, 0.9), (0.9, 0.9)), pairs("long", (0.5, 0.6), (0.7, 0.801))
    assert evidence.on_length(Runs(make_results(*short, *long))).endswith(f"Verdict: {SUPPORTS}.\n")
    short = pairs("dense", (0.5, 0.6), (0.7, 0.801))
    assert evidence.on_length(Runs(make_results(*short, *long))).endswith(f"Verdict: {NEITHER}.\n")
    # Behind by less than with short ones is behind.
    short, long = pairs("dense", (0.9, 0.9), (0.5, 0.5)), pairs("long", (0.5, 0.5), (0.4, 0.4))
    assert evidence.on_length(Runs(make_results(*short, *long))).endswith(f"Verdict: {CONTRADICTS}.\n")


def test_stale_and_token_hold_what_was_run():
    runs = pairs("stale_8", (0.9, 0.9), (0.8, 0.8)) + [make_run("dense", m, 0) for m in ("gspo", "gspo_token")]
    found = Runs(make_results(*runs))
    assert evidence.on_staleness(found).splitlines()[2].endswith(f"| {CONTRADICTS} |")
    assert "| dense | 0 | none in 8 steps |" in evidence.on_token(found)
    found.of("dense", "gspo_token")[0]["curve"]["reward"] = [0.4, 0.7]
    assert "| dense | 0 | 8 |" in evidence.on_token(found)
    assert evidence.on_staleness(Runs(make_results())) == evidence.on_noise(Runs(make_results())) == "Not run.\n"


# ---- table, guide, page


def test_broken_runs_are_in_the_table():
    runs = [make_run("dense", "grpo", 0), make_run("dense", "grpo", 1, broken="w not finite at step 3", after=0.0)]
    rows = evidence.table(Runs(make_results(*runs))).splitlines()
    assert rows[2].startswith("| dense | base models | 0.200 ± 0.000 |")
    assert rows[3].startswith("| dense | GRPO | 0.450 ± 5.718 |")
    assert rows[3].endswith("| 1 of 2: w not finite at step 3 |") and len(rows) == 4


def test_guide_by_hand():
    entries = [
        dict(setting="dense", length=6.0, learning_rate=1e-4, steps_per_generation=4)
        | dict(epsilon_high=high, is_controlled=is_controlled, reward=reward, clipped=0.15, epsilon_high_end=end)
        for high, is_controlled, reward, end in (
            (4e-4, False, 0.3, 4e-4),
            (4e-3, False, 0.5, 4e-3),
            (0.02, True, 0.4, 0.006),
        )
    ]
    lines = evidence.guide(entries).splitlines()
    assert lines[2] == "| 6 | 0.0001 | 4 | 0.300 (0.15) | **0.500 (0.15)** | 0.400 (0.15) | 0.006 |"


def test_page_holds_what_the_results_say(tmp_path):
    page = tmp_path / "evidence.md"
    page.write_text("# Title\n" + "".join("{}\n{}\nprose\n".format(*evidence.markers(b)) for b in evidence.BLOCKS))
    results = make_results(
        *pairs("moe", (0.8, 0.81), (0.9, 0.9)),
        tuning=[
            dict(
                setting="moe",
                method="gspo",
                learning_rate=rate,
                accuracy=after,
                broken=None,
                epsilon=0.01,
                epsilon_high=0.02,
            )
            for rate, after in ((1e-4, 0.8), (2e-4, 0.9))
        ],
    )
    evidence.write(results, tmp_path / "out", page)
    text = page.read_text()
    for name, block in evidence.blocks(results, "evidence.png").items():
        begin, end = evidence.markers(name)
        assert f"{begin}\n\n{block}\n{end}\nprose\n" in text
    assert "| moe | gspo | 0.800 | **0.900** (end of the search) | 0.01, 0.02 |" in text and "(evidence.png)" in text
    assert (tmp_path / "evidence.png").stat().st_size > 10_000
    evidence.write(results, tmp_path / "out", page)
    assert page.read_text() == text


def test_page_of_this_repository_has_a_place_for_each_block():
    page = Path(__file__).parents[1] / "docs" / "evidence.md"
    assert all(has_markers(page, *evidence.markers(block)) for block in evidence.BLOCKS)
