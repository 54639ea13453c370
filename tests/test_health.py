"""The health watch: what it says of logs, what it does to checkpoints, and when it stops a run."""

import dataclasses
import functools
import json
import math
import random
import statistics
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState

from trl_gspo.checkpoints import alarms_of
from trl_gspo.health import HealthBounds, HealthWatchCallback, non_finite_weight, reward_that_raised


HEALTHY = {
    "loss": 0.01,
    "grad_norm": 0.5,
    "reward": 0.5,
    "reward_std": 0.4,
    "entropy": 0.6,
    "gspo/ratio/min": 0.99,
    "gspo/ratio/p10": 0.995,
    "gspo/ratio/max": 1.01,
    "gspo/clip_fraction/minibatch_0": 0.0,
    "gspo/clip_fraction/minibatch_1": 0.1,
    "gspo/live_fraction": 0.9,
    "gspo/unscored_fraction": 0.0,
}


class Run:
    """The Trainer's loop, as far as a callback sees it: log before evaluation before checkpoint."""

    def __init__(self, folder, bounds=None, history=(), is_main=True, step=0, **args):
        self.args = SimpleNamespace(
            **{
                "output_dir": str(folder),
                "save_total_limit": None,
                "save_strategy": "steps",
                "should_save": is_main,
                "fp16": False,
                "world_size": 1,
                "logging_nan_inf_filter": True,
            }
            | args
        )
        self.state = TrainerState(max_steps=10_000, global_step=step, is_world_process_zero=is_main)
        self.state.log_history = list(history)
        self.control = TrainerControl()
        self.model = nn.Linear(2, 2)
        self.folder = folder
        self.watch = HealthWatchCallback(bounds)
        self.watch.on_train_begin(self.args, self.state, self.control)

    def step(self, save=False, changes=None, base=HEALTHY):
        """One optimizer step, its log, and a checkpoint if the watch lets it be saved."""
        self.state.global_step += 1
        self.control.should_save = save
        self.watch.on_step_end(self.args, self.state, self.control, model=self.model)
        self.watch.on_log(self.args, self.state, self.control, logs=base | (changes or {}))
        if self.control.should_save:
            path = self.folder / f"checkpoint-{self.state.global_step}"
            path.mkdir(exist_ok=True)
            (path / "trainer_state.json").write_text(json.dumps({"global_step": self.state.global_step}))
            self.control.should_save = False
            self.watch.on_save(self.args, self.state, self.control)

    def steps(self, count, **kwargs):
        for _ in range(count):
            self.step(**kwargs)

    @property
    def saved(self):
        return sorted(int(path.name.split("-")[1]) for path in self.folder.glob("checkpoint-*"))

    @property
    def marked(self):
        return {step: alarms for step in self.saved if (alarms := alarms_of(self.folder / f"checkpoint-{step}"))}


# Bounds.


def test_every_bound_says_what_it_is():
    for entry in dataclasses.fields(HealthBounds):
        assert entry.name.startswith("health_")
        assert entry.metadata["help"].endswith(".")
        kind = entry.type if isinstance(entry.type, str) else entry.type.__name__
        assert f"{entry.name} (`{kind}`, *optional*, defaults to `{entry.default}`)" in HealthBounds.__doc__


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("health_patience", 0, "at least 1"),
        ("health_overflow_logs", 0, "at least 1"),
        ("health_unscored_logs", 0, "at least 1"),
        ("health_reward_window", 0, "at least 1"),
        ("health_reward_logs", -1, "at least 1"),
        ("health_ratio_warn", 1.0, "above 1"),
        ("health_ratio_stop", 0.5, "above 1"),
        ("health_clip_fraction", 1.5, "a share in [0, 1]"),
        ("health_live_fraction", -0.1, "a share in [0, 1]"),
        ("health_entropy", math.nan, "a share in [0, 1]"),
        ("health_unscored", 2, "a share in [0, 1]"),
        ("health_reward_drop", -1.0, "at least 0"),
        ("health_reward_noise", math.nan, "at least 0"),
    ],
)
def test_a_bound_out_of_range_is_refused_by_name(name, value, allowed):
    with pytest.raises(ValueError, match=f"`{name}` must be ") as error:
        HealthBounds(**{name: value})
    assert allowed in str(error.value) and f"got {value}" in str(error.value)


def test_the_bound_that_stops_is_not_below_the_one_that_warns():
    with pytest.raises(ValueError, match="`health_ratio_stop=5.0` must not be below `health_ratio_warn=10.0`"):
        HealthBounds(health_ratio_stop=5.0)
    HealthBounds(health_ratio_warn=5.0, health_ratio_stop=5.0, health_reward_drop=0)


# What stops at once.


@pytest.mark.parametrize(
    ("changes", "figures"),
    [
        ({"loss": math.nan}, "loss is nan, grad_norm 0.5; both must be finite"),
        ({"loss": -math.inf, "grad_norm": None}, "loss is -inf, grad_norm not logged"),
        ({"grad_norm": math.inf}, "grad_norm inf"),
        ({"grad_norm": math.nan}, "grad_norm nan"),
        ({"grad_norm": -1.0}, "grad_norm -1"),  # DeepSpeed's sign of an overflow
        ({"reward": math.inf}, "reward is inf"),
        ({"reward_std": math.inf}, "reward_std is inf"),
        ({"gspo/ratio/max": 1000.5}, "gspo/ratio/max is 1e+03, bound 1000"),
        ({"gspo/ratio/max": math.inf}, "gspo/ratio/max is inf"),
        ({"gspo/ratio/min": 1e-9, "gspo/ratio/p10": 9.9e-4}, "gspo/ratio/p10 is 0.00099, bound 0.001"),
    ],
)
def test_damage_stops_the_run_before_a_checkpoint(changes, figures, tmp_path, capsys):
    run = Run(tmp_path)
    run.steps(3)
    run.control.should_evaluate = True
    run.step(save=True, changes=changes)
    assert figures in run.watch.stopped
    assert run.control.should_training_stop and not run.control.should_save and not run.control.should_evaluate
    assert run.saved == []
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("The run stops, step 4: ") and figures in line
    assert ". Likely cause: " in line and ". Remedy: " in line


def test_a_weight_that_is_not_finite_is_found_before_a_checkpoint(tmp_path, capsys):
    run = Run(tmp_path)
    with torch.no_grad():
        run.model.bias[1] = math.nan
    run.step()
    assert run.watch.stopped is None  # looked at only when it would be saved
    run.step(save=True)
    assert run.watch.stopped == "a weight is not finite: bias"
    assert run.control.should_training_stop and run.saved == []
    assert "The run stops, step 2: a weight is not finite: bias" in capsys.readouterr().err


def test_just_within_the_bounds_nothing_is_said(tmp_path, capsys):
    run = Run(tmp_path)
    edge = {
        "gspo/ratio/min": 0.1,
        "gspo/ratio/max": 10.0,
        "gspo/clip_fraction/minibatch_1": 0.8,
        "gspo/live_fraction": 0.05,
        "grad_norm": 1e-9,
    }
    run.steps(30, changes=edge)
    run.steps(30, changes={"entropy": 0.6 * 0.03 + 1e-9})
    assert capsys.readouterr().err == "" and run.watch.stopped is None


def test_a_tenth_of_the_sequences_far_below_only_warns_until_the_bound(tmp_path, capsys):
    run = Run(tmp_path)
    run.step(changes={"gspo/ratio/min": 1e-9, "gspo/ratio/p10": 1.01e-3, "gspo/ratio/max": 999.0})
    assert run.watch.stopped is None and "Warning, step 1: gspo/ratio/max is 999" in capsys.readouterr().err


def test_a_run_that_stops_does_not_warn_of_the_rest(tmp_path, capsys):
    run = Run(tmp_path)
    run.step(changes={"loss": math.nan, "reward": math.inf, "gspo/ratio/max": 50.0})
    reward, loss = capsys.readouterr().err.splitlines()  # the likelier cause first
    assert "reward is inf" in reward and "loss is nan" in loss
    assert run.watch.stopped.startswith("reward is inf")


def test_metrics_without_a_value_say_nothing(tmp_path, capsys):
    run = Run(tmp_path)
    run.steps(30, base={"loss": 0.0})
    run.steps(30, base={"loss": 0.0} | {key: None for key in HEALTHY if key not in ("loss", "reward")})
    assert capsys.readouterr().err == "" and run.watch.stopped is None


def test_only_the_logs_of_training_are_judged(tmp_path, capsys):
    run = Run(tmp_path)
    for logs in ({"eval_loss": math.nan, "eval_reward": math.inf}, {"train_loss": math.nan}, {}, None):
        run.watch.on_log(run.args, run.state, run.control, logs=logs)
    assert capsys.readouterr().err == "" and run.watch.stopped is None


def test_the_filter_that_hides_a_nan_loss_is_turned_off(tmp_path):
    assert Run(tmp_path).args.logging_nan_inf_filter is False


def test_other_ranks_decide_the_same_and_say_nothing(tmp_path, capsys):
    run = Run(tmp_path, is_main=False, save_total_limit=1)
    run.steps(2, save=True)
    run.steps(5)
    assert run.saved == [1, 2]  # the main process deletes
    run.step(changes={"loss": math.nan})
    assert "loss is nan" in run.watch.stopped and run.control.should_training_stop
    assert capsys.readouterr() == ("", "") and run.marked == {}


# What stops if it lasts.


def test_the_loss_scaler_of_fp16_has_some_logs_to_find_its_scale(tmp_path, capsys):
    run = Run(tmp_path, fp16=True)
    for _ in range(3):
        run.steps(4, changes={"grad_norm": math.inf})
        run.step()
    assert run.watch.stopped is None
    assert "grad_norm inf; both must be finite; the run stops after 5 such logs in a row" in capsys.readouterr().err
    run.steps(5, changes={"grad_norm": math.inf})
    assert run.watch.stopped.endswith("5 logs in a row")

    run = Run(tmp_path, fp16=True)
    run.step(changes={"loss": math.nan})
    assert run.watch.stopped is not None


@pytest.mark.parametrize(
    "changes",
    [{"reward": None, "gspo/unscored_fraction": 1.0}, {"reward": None}, {"gspo/unscored_fraction": 1.0}],
)
def test_three_rollouts_without_a_reward_stop_the_run(changes, tmp_path, capsys):
    run = Run(tmp_path)
    within_a_rollout = {key: value for key, value in HEALTHY.items() if key not in ("reward", "reward_std")}
    within_a_rollout.pop("gspo/unscored_fraction")
    dead = {"gspo/live_fraction": 0.0, "grad_norm": 0.0}
    for _ in range(2):
        run.step(changes=changes | dead)
        run.steps(3, base=within_a_rollout, changes=dead)
    assert run.watch.stopped is None
    (line,) = capsys.readouterr().err.splitlines()  # and none of the live fraction: this one says why
    assert "gspo/unscored_fraction is 1: no completion has a finite reward; the run stops after 3" in line
    run.step(changes=changes | dead)
    assert "no completion has a finite reward, 3 logs in a row" in run.watch.stopped


def test_some_unscored_completions_warn_once(tmp_path, capsys):
    run = Run(tmp_path)
    run.steps(30, changes={"gspo/unscored_fraction": 0.25})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Warning, step 1: gspo/unscored_fraction is 0.25, bound 0.")
    run = Run(tmp_path, HealthBounds(health_unscored=0.25))
    run.steps(30, changes={"gspo/unscored_fraction": 0.25})
    assert capsys.readouterr().err == "" and run.watch.stopped is None


# What only warns.


@pytest.mark.parametrize(
    ("changes", "figures", "first_step"),
    [
        ({"gspo/ratio/max": 12.0}, "gspo/ratio/max is 12, bound 10.", 6),
        ({"gspo/ratio/min": 0.05}, "gspo/ratio/min is 0.05, bound 0.1.", 6),
        (
            {"gspo/clip_fraction/minibatch_1": 0.75, "gspo/clip_fraction/minibatch_2": 0.95},
            "gspo/clip_fraction is 0.85 after the first minibatch, bound 0.8, 5 logs in a row.",
            10,
        ),
        ({"gspo/live_fraction": 0.04}, "gspo/live_fraction is 0.04, bound 0.05, 5 logs in a row.", 10),
        ({"grad_norm": 0.0}, "grad_norm is 0, and must be above, 5 logs in a row.", 10),
        ({"entropy": 0.015}, "entropy is 0.015, bound 0.018, first 0.6, 5 logs in a row.", 10),
    ],
)
def test_a_warning_comes_once_an_episode(changes, figures, first_step, tmp_path, capsys):
    run = Run(tmp_path)
    run.steps(5)
    run.steps(20, changes=changes)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Warning, step {first_step}: {figures} Likely cause: ")
    assert ". Remedy: " in line
    # Four healthy logs are no end of it.
    run.steps(4)
    run.steps(20, changes=changes)
    assert capsys.readouterr().err == ""
    run.steps(5)
    run.steps(20, changes=changes)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert run.watch.stopped is None and not run.control.should_training_stop


@pytest.mark.parametrize(
    ("bounds", "changes"),
    [
        ({"health_ratio_warn": 13.0}, {"gspo/ratio/max": 12.0, "gspo/ratio/min": 0.08}),
        ({"health_clip_fraction": 1.0}, {"gspo/clip_fraction/minibatch_1": 1.0}),
        ({"health_live_fraction": 0.0}, {"gspo/live_fraction": 0.0}),
        ({"health_entropy": 0.0}, {"entropy": 0.0}),
        ({"health_patience": 21}, {"grad_norm": 0.0}),
        ({"health_ratio_stop": 1e6, "health_ratio_warn": 1e6}, {"gspo/ratio/max": 9e5, "gspo/ratio/p10": 2e-6}),
    ],
)
def test_a_wider_bound_keeps_quiet(bounds, changes, tmp_path, capsys):
    run = Run(tmp_path, HealthBounds(**bounds))
    run.steps(5)
    run.steps(20, changes=changes)
    assert capsys.readouterr().err == "" and run.watch.stopped is None


def test_first_minibatches_are_no_break_in_clipping(tmp_path, capsys):
    # One log for each of two minibatches: the first of a rollout batch can clip nothing.
    run = Run(tmp_path)
    first = {key: value for key, value in HEALTHY.items() if key != "gspo/clip_fraction/minibatch_1"}
    second = {key: value for key, value in HEALTHY.items() if key != "gspo/clip_fraction/minibatch_0"}
    for _ in range(20):
        run.step(base=first)
        run.step(base=second, changes={"gspo/clip_fraction/minibatch_1": 0.9})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Warning, step 10: gspo/clip_fraction is 0.9")


def test_without_live_sequences_a_gradient_of_0_is_not_news(tmp_path, capsys):
    run = Run(tmp_path)
    run.steps(20, changes={"gspo/live_fraction": 0.0, "grad_norm": 0.0})
    (line,) = capsys.readouterr().err.splitlines()
    assert "gspo/live_fraction is 0" in line


# Collapse of the reward.

COLLAPSE = HealthBounds(health_reward_window=2, health_reward_drop=0.5, health_reward_noise=0.0, health_reward_logs=2)


def test_collapse_by_hand(tmp_path, capsys):
    run = Run(tmp_path, COLLAPSE)
    # Means of two: 0, 0.5, 1 (the best, at step 4), 0.625, 0.25, 0.25. Gained 1, so the bound is 1 - 0.5 * 1.
    for reward in (0.0, 0.0, 1.0, 1.0, 0.25):
        run.step(changes={"reward": reward})
    assert capsys.readouterr().err == ""
    run.step(changes={"reward": 0.25})
    assert (
        "Warning, step 6: reward is 0.25 on average of 2 logs, bound 0.5, best 1 at step 4; the run stops after 2 "
        "such logs in a row." in capsys.readouterr().err
    )
    assert run.watch.stopped is None
    run.step(base={"loss": 0.0})  # within a rollout batch: no reward, no count
    assert run.watch.stopped is None
    run.step(changes={"reward": 0.25})
    assert run.watch.stopped.startswith("reward is 0.25 on average of 2 logs")


def test_the_bound_of_a_collapse_by_spread_and_by_noise(tmp_path):
    # Nothing gained: half of the spread 0.4 below the best.
    run = Run(tmp_path, COLLAPSE)
    run.steps(3)
    rewards = run.watch._rewards
    assert rewards.bound(drop=0.5, noise=0.0) is None
    run.step()
    assert rewards.bound(drop=0.5, noise=0.0) == pytest.approx(0.5 - 0.2)
    # Changes 0.3, -0.3, 0.3: variance 3 * 0.09 / (2 * 3), of a mean of two half of it; the best mean is 0.65.
    run = Run(tmp_path, COLLAPSE)
    for reward in (0.5, 0.8, 0.5, 0.8):
        run.step(changes={"reward": reward})
    rewards = run.watch._rewards
    assert rewards.best == pytest.approx(0.65)
    assert rewards.bound(drop=0.0, noise=2.0) == pytest.approx(0.65 - 2 * math.sqrt(0.0225))


def scores(generator, probability, count=8):
    values = [float(generator.random() < probability) for _ in range(count)]
    return {"reward": statistics.mean(values), "reward_std": statistics.stdev(values)}


@pytest.mark.parametrize("probability", [0.02, 0.1, 0.5, 0.9])
def test_noise_is_no_collapse(probability, tmp_path, capsys):
    for seed in range(10):
        generator = random.Random(seed)
        run = Run(tmp_path)
        for _ in range(500):
            run.step(changes=scores(generator, probability))
        assert run.watch.stopped is None, seed
    assert "reward" not in capsys.readouterr().err


@pytest.mark.parametrize(("best", "after"), [(0.9, 0.0), (0.9, 0.3), (0.5, 0.0)])
def test_a_collapse_is_none_of_the_noise(best, after, tmp_path):
    for seed in range(10):
        generator = random.Random(seed)
        run = Run(tmp_path)
        for step in range(100):
            run.step(changes=scores(generator, 0.1 + (best - 0.1) * min(step / 60, 1), count=16))
        assert run.watch.stopped is None, seed
        for _ in range(40):
            if run.watch.stopped is None:
                run.step(changes=scores(generator, after, count=16))
        assert run.watch.stopped is not None, seed
        assert run.state.global_step >= 110  # ten logs, and not the first bad one


def test_a_resumed_run_is_measured_against_the_best_of_before(tmp_path, capsys):
    rewards = [0.0, 0.0, 1.0, 1.0]
    history = [HEALTHY | {"reward": reward, "step": step} for step, reward in enumerate(rewards, start=1)]
    history.insert(2, {"eval_loss": 0.0, "eval_reward": 9.0, "step": 2})
    run = Run(tmp_path, COLLAPSE, history=history, step=4)
    run.step(changes={"reward": 0.25})
    run.step(changes={"reward": 0.25})
    assert "best 1 at step 4" in capsys.readouterr().err
    # Where the alarm was on when it was resumed, it starts anew, with all its logs to go.
    history += [HEALTHY | {"reward": 0.25, "step": step} for step in (5, 6, 7)]
    run = Run(tmp_path, COLLAPSE, history=history, step=7)
    assert capsys.readouterr().err == ""
    run.step(changes={"reward": 0.25})
    assert run.watch.stopped is None and "Warning, step 8" in capsys.readouterr().err


# Checkpoints.


def test_a_checkpoint_is_preceded_by_a_log(tmp_path):
    run = Run(tmp_path)
    for asked, strategy, is_logged in [
        ({"should_save": True}, "steps", True),
        ({"should_evaluate": True}, "best", True),
        ({"should_evaluate": True}, "steps", False),
        ({}, "steps", False),
    ]:
        run.args.save_strategy = strategy
        control = TrainerControl(**asked)
        run.watch.on_step_end(run.args, run.state, control, model=run.model)
        assert control.should_log == is_logged, (asked, strategy)
        control = TrainerControl(**asked)
        run.watch.on_epoch_end(run.args, run.state, control, model=run.model)
        assert control.should_log == is_logged, (asked, strategy)


def test_the_end_of_the_epoch_saves_nothing_after_a_stop(tmp_path):
    run = Run(tmp_path)
    run.step(changes={"loss": math.nan})
    run.control.should_save = run.control.should_evaluate = True  # as transformers asks where an epoch ends
    run.watch.on_epoch_end(run.args, run.state, run.control, model=run.model)
    assert not run.control.should_save and not run.control.should_evaluate


def test_the_newest_trusted_checkpoint_is_kept_beyond_the_limit(tmp_path):
    run = Run(tmp_path, save_total_limit=1)
    run.step(save=True)
    run.steps(9)
    assert run.saved == [1]
    run.step(save=True)  # 11
    assert run.saved == [1, 11]
    run.steps(4)
    assert run.saved == [1, 11]
    run.step()  # the fifth healthy log since
    assert run.saved == [11] and run.marked == {}


def test_damage_marks_the_checkpoints_that_no_later_log_has_cleared(tmp_path):
    run = Run(tmp_path, save_total_limit=2)
    for _ in range(10):
        run.step(save=True)
    run.step(changes={"gspo/ratio/max": 2e3})
    # After 6 came logs 7 to 10, and the one that tells of the damage: 5 is the newest with five healthy ones.
    assert run.marked == {step: ["policy destroyed"] for step in (6, 7, 8, 9, 10)}
    assert run.saved == [5, 6, 7, 8, 9, 10]


def test_a_reward_that_breaks_is_no_fault_of_the_last_checkpoint(tmp_path):
    run = Run(tmp_path, save_total_limit=1)
    run.step(save=True)
    run.step(changes={"reward": math.inf})
    assert run.watch.stopped and run.marked == {} and run.saved == [1]


def test_while_a_collapse_lasts_nothing_is_deleted_and_what_is_saved_is_marked(tmp_path):
    bounds = dataclasses.replace(COLLAPSE, health_reward_logs=100)
    run = Run(tmp_path, bounds, save_total_limit=1)
    run.step(save=True, changes={"reward": 1.0})
    run.steps(9, changes={"reward": 1.0})
    run.steps(2, changes={"reward": 0.0})
    for _ in range(4):
        run.step(save=True, changes={"reward": 0.0})
    assert run.saved == [1, 13, 14, 15, 16]
    assert run.marked == {step: ["reward collapse"] for step in (13, 14, 15, 16)}
    # It recovers: five healthy logs end the episode, five in all make the last checkpoint a good one.
    run.steps(20, changes={"reward": 1.0})
    assert run.saved == [16] and run.marked == {}


def test_marked_checkpoints_of_an_abandoned_end_do_not_push_out_good_ones(tmp_path):
    for step, alarms in ((4, []), (6, ["policy destroyed"]), (20, ["policy destroyed"])):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        if alarms:
            (folder / "health.json").write_text(json.dumps({"alarms": alarms}))
    run = Run(tmp_path, save_total_limit=1, step=4)
    run.step(save=True)
    run.steps(5)
    assert run.saved == [5, 20]
    run.steps(9)
    run.step(save=True)  # the same place again, and its old mark goes
    run.steps(5)
    assert run.saved == [20] and run.marked == {}


def test_the_best_checkpoint_is_never_deleted(tmp_path):
    run = Run(tmp_path, save_total_limit=1)
    run.step(save=True)
    run.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    for _ in range(3):
        run.step(save=True)
        run.steps(5)
    assert run.saved == [1, 14]


def test_at_the_end_the_limit_holds_again(tmp_path):
    run = Run(tmp_path, save_total_limit=1)
    assert run.args.save_total_limit is None  # transformers would delete before anything is known
    run.step(save=True)
    run.step(save=True)
    run.state.max_steps = run.state.global_step
    assert run.saved == [1, 2]
    run.watch.on_log(run.args, run.state, run.control, logs={"train_loss": 0.0})
    assert run.saved == [2]
    assert run.args.save_total_limit is None  # transformers would delete the last checkpoint for the best
    run.watch.on_train_end(run.args, run.state, run.control)
    assert run.args.save_total_limit == 1


def test_a_run_that_was_interrupted_keeps_its_trusted_checkpoint(tmp_path):
    run = Run(tmp_path, save_total_limit=1)
    run.step(save=True)
    run.steps(5)
    run.step(save=True)
    run.watch.on_log(run.args, run.state, run.control, logs={"train_loss": 0.0})
    assert run.saved == [1, 7]


def test_the_checkpoint_that_is_gone_on_from_replaces_no_older_one_before_it_has_shown_its_worth(tmp_path):
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    run = Run(tmp_path, save_total_limit=1, step=4)
    run.steps(4, save=True)
    assert run.saved == [2, 4, 5, 6, 7, 8]
    run.step(changes={"gspo/ratio/max": 2e3})
    assert run.saved == [2, 4, 5, 6, 7, 8] and list(run.marked) == [5, 6, 7, 8]
    run = Run(tmp_path, save_total_limit=1, step=4)
    run.steps(6)
    assert run.saved == [4]


def test_without_a_limit_nothing_is_deleted(tmp_path):
    run = Run(tmp_path)
    for _ in range(12):
        run.step(save=True)
    assert run.saved == list(range(1, 13))


# Weights, and where an error came from.


def test_the_name_of_a_weight_that_is_not_finite():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert non_finite_weight(model) is None
    model.register_parameter("counts", nn.Parameter(torch.tensor([1, 2]), requires_grad=False))
    assert non_finite_weight(model) is None
    eight_bit = torch.ones(2).to(torch.float8_e4m3fn)
    model.register_parameter("frozen", nn.Parameter(eight_bit, requires_grad=False))
    assert non_finite_weight(model) is None
    with torch.no_grad():
        model[1].weight[0, 1] = math.inf
    assert non_finite_weight(model) == "1.weight"
    # ZeRO-3: the parameter is empty, and the shard hangs on it.
    model = nn.Linear(1, 1, bias=False)
    model.weight.data = torch.empty(0)
    assert non_finite_weight(model) is None
    model.weight.ds_tensor = torch.tensor([math.nan])
    assert non_finite_weight(model) == "weight"


def plain(completions, **kwargs):
    raise RuntimeError("plain")


def with_helper(completions, scale=1, **kwargs):
    def helper():
        return 1 / 0

    return helper()


@functools.wraps(plain)
def wrapper(completions, **kwargs):
    return plain(completions, **kwargs)


class Scorer:
    def __call__(self, completions, **kwargs):
        raise KeyError("scorer")


async def slow(completions, **kwargs):
    raise RuntimeError("slow")


def call(function):
    result = function(["a"])
    if hasattr(result, "send"):
        result.send(None)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (plain, "plain"),
        (with_helper, "with_helper"),
        (functools.partial(with_helper, scale=2), "with_helper"),
        (wrapper, "plain"),
        (Scorer(), "Scorer"),
        (slow, "slow"),
    ],
)
def test_the_reward_that_raised(function, name):
    def innocent(completions, **kwargs):
        return [0.0]

    with pytest.raises(Exception) as caught:  # noqa: B017 - whatever it is
        call(function)
    assert name in reward_that_raised(caught.value, [innocent, "a/reward-model", function])
    assert reward_that_raised(caught.value, [innocent, "a/reward-model"]) is None


def test_an_error_of_the_scoring_itself():
    def _calculate_rewards():
        raise ValueError("returned 3 rewards, but 8 were expected")

    with pytest.raises(ValueError) as caught:
        _calculate_rewards()
    assert reward_that_raised(caught.value, [plain]) == "a reward function"
