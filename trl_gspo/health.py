"""
Watches what a run logs: says what is wrong and what helps, and stops where nothing is left to save.

Every rank reads the same logs and so decides the same. Nothing here touches the loss.
"""

import functools
import inspect
import math
import sys
import traceback
import typing
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import reduce
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from .checkpoints import delete_old, mark


@dataclass
class HealthBounds:
    """
    What [`HealthWatchCallback`] takes for healthy. "Logs" are those that hold the metric in question.

    Parameters:
        health_patience (`int`, *optional*, defaults to `5`):
            Logs in a row after which clip fraction, live fraction, entropy and a gradient of 0 warn, and healthy logs
            that end an episode or make a checkpoint trusted. A rollout batch lasts four optimizer steps by default:
            five logs see more than one.
        health_ratio_warn (`float`, *optional*, defaults to `10.0`):
            Importance ratio above which, or below whose inverse, a single sequence warns. The ratio is a mean over
            the tokens, and GSPO's clip range keeps it within 1e-3 of 1 on long completions. On the demo, six tokens
            long at a hundred times that range, it stays within 0.4 and 1.8.
        health_ratio_stop (`float`, *optional*, defaults to `1000.0`):
            Ratio above which one sequence stops the run, and below whose inverse a tenth of the sequences does.
            Nothing clips a large ratio where the advantage is negative, so one is enough. At 1/1000 for the mean token
            the policy no longer writes what it wrote one rollout ago.
        health_clip_fraction (`float`, *optional*, defaults to `0.8`):
            Share of clipped sequences above which to warn, in the minibatches after the first of a rollout batch. The
            paper has 0.15; 1 never warns.
        health_live_fraction (`float`, *optional*, defaults to `0.05`):
            Share of sequences with an advantage below which to warn; 0 never warns. A task that is nearly solved runs
            at 0.2.
        health_entropy (`float`, *optional*, defaults to `0.03`):
            Entropy below which to warn, as a share of its mean over the first `health_patience` logs; 0 never warns. A
            policy that learns its task grows surer too: the demo ends at 0.05 with 98% right.
        health_unscored (`float`, *optional*, defaults to `0.0`):
            Share of completions without a finite reward above which to warn.
        health_unscored_logs (`int`, *optional*, defaults to `3`):
            Logs in a row without any reward after which the run stops. A single one happens where a reward applies to
            few prompts, and costs nothing: the advantages are 0.
        health_overflow_logs (`int`, *optional*, defaults to `5`):
            Logs in a row with a non-finite gradient that stop the run under `fp16`, whose loss scaler skips such steps
            until it has found its scale. Otherwise the first one does.
        health_reward_window (`int`, *optional*, defaults to `10`):
            Logs over which the reward is averaged before it is compared with the best such mean.
        health_reward_drop (`float`, *optional*, defaults to `0.5`):
            Fall of that mean from its best that is a collapse, as a share of what had been gained since the start or
            of `reward_std`, whichever is larger.
        health_reward_noise (`float`, *optional*, defaults to `8.0`):
            Least fall that is a collapse, in standard errors of the mean, estimated from the changes from log to log.
            The best of many means is above the true one by three of them, and the worst as far below: with 8, none
            of 960 runs of 0/1 rewards, 4 to 64 a log, was stopped within 500 logs.
        health_reward_logs (`int`, *optional*, defaults to `10`):
            Logs in a row that a collapse lasts before the run stops. Waiting risks no checkpoint: from the first of
            them none is deleted.

    Raises:
        ValueError: if a bound is outside its range.
    """

    health_patience: int = field(
        default=5,
        metadata={
            "help": "Logs in a row after which clip fraction, live fraction, entropy and a gradient of 0 warn, and "
            "healthy logs that end an episode or make a checkpoint trusted."
        },
    )
    health_ratio_warn: float = field(
        default=10.0,
        metadata={"help": "Importance ratio above which, or below whose inverse, a single sequence warns."},
    )
    health_ratio_stop: float = field(
        default=1000.0,
        metadata={
            "help": "Importance ratio above which one sequence stops the run, and below whose inverse a tenth of "
            "the sequences does."
        },
    )
    health_clip_fraction: float = field(
        default=0.8,
        metadata={
            "help": "Share of clipped sequences above which to warn, in the minibatches after the first of a rollout "
            "batch; 1 never warns."
        },
    )
    health_live_fraction: float = field(
        default=0.05,
        metadata={"help": "Share of sequences with an advantage below which to warn; 0 never warns."},
    )
    health_entropy: float = field(
        default=0.03,
        metadata={
            "help": "Entropy below which to warn, as a share of its mean over the first `health_patience` logs; 0 "
            "never warns."
        },
    )
    health_unscored: float = field(
        default=0.0,
        metadata={"help": "Share of completions without a finite reward above which to warn."},
    )
    health_unscored_logs: int = field(
        default=3,
        metadata={"help": "Logs in a row without any reward after which the run stops."},
    )
    health_overflow_logs: int = field(
        default=5,
        metadata={
            "help": "Logs in a row with a non-finite gradient that stop the run under fp16, whose loss scaler skips "
            "such steps. Otherwise the first one does."
        },
    )
    health_reward_window: int = field(
        default=10,
        metadata={"help": "Logs over which the reward is averaged before it is compared with the best such mean."},
    )
    health_reward_drop: float = field(
        default=0.5,
        metadata={
            "help": "Fall of the mean reward from its best that is a collapse, as a share of what had been gained or "
            "of `reward_std`, whichever is larger."
        },
    )
    health_reward_noise: float = field(
        default=8.0,
        metadata={"help": "Least fall of the mean reward that is a collapse, in standard errors of that mean."},
    )
    health_reward_logs: int = field(
        default=10,
        metadata={"help": "Logs in a row that a collapse of the reward lasts before the run stops."},
    )

    def __post_init__(self):
        shares = ("health_clip_fraction", "health_live_fraction", "health_entropy", "health_unscored")
        for name, kind in typing.get_type_hints(HealthBounds).items():
            value = getattr(self, name)
            if name in shares:
                is_right, allowed = 0 <= value <= 1, "a share in [0, 1]"
            elif name.startswith("health_ratio"):
                is_right, allowed = value > 1, "above 1: its inverse is the bound on the other side"
            elif kind is int:
                is_right, allowed = value >= 1, "at least 1"
            else:
                is_right, allowed = value >= 0, "at least 0"
            if not is_right:
                raise ValueError(
                    f"`{name}` must be {allowed}, got {value}. Its default is {getattr(HealthBounds, name)}."
                )
        if self.health_ratio_stop < self.health_ratio_warn:
            raise ValueError(
                f"`health_ratio_stop={self.health_ratio_stop}` must not be below `health_ratio_warn="
                f"{self.health_ratio_warn}`: raise it, or lower the other."
            )


@dataclass
class _Finding:
    """One look at one condition. `name` is the episode it belongs to; `stop_after` is `None` where it only warns."""

    name: str
    is_bad: bool
    figures: str
    cause: str
    remedy: str
    warn_after: int = 1
    stop_after: int | None = None
    is_about_rewards: bool = False  # the weights are as good as they were


@dataclass
class _Episode:
    bad: int = 0
    healthy: int = 0
    is_open: bool = False
    may_stop: bool = False


class _Rewards:
    """Mean of the last logged rewards, and the best it has been."""

    def __init__(self, window: int):
        self._recent: deque[float] = deque(maxlen=window)
        self._count = self._spreads = 0
        self._squared_changes = self._sum_of_spreads = 0.0
        self._first = -math.inf
        self.best, self.best_step = -math.inf, 0

    @property
    def mean(self) -> float:
        return sum(self._recent) / len(self._recent)

    def add(self, reward: float, spread: float | None, step: int) -> None:
        if self._recent:
            self._squared_changes += (reward - self._recent[-1]) ** 2
        self._recent.append(reward)
        self._count += 1
        if _is_number(spread):
            self._sum_of_spreads += spread
            self._spreads += 1
        if self._count == self._recent.maxlen:
            self._first = self.mean
        if self._count >= self._recent.maxlen and self.mean > self.best:
            self.best, self.best_step = self.mean, step

    def bound(self, drop: float, noise: float) -> float | None:
        """The mean below which the reward has collapsed; `None` until two means share no log."""
        window = self._recent.maxlen
        if self._count < 2 * window:
            return None
        # Of the changes, not of the rewards: a reward that rises steadily is not a noisy one.
        variance = self._squared_changes / (2 * (self._count - 1))
        spread = self._sum_of_spreads / max(self._spreads, 1)
        fall = max(drop * (self.best - self._first), drop * spread, noise * math.sqrt(variance / window))
        # A reward that never moved has no spread at all, and its mean still rounds.
        return self.best - max(fall, 1e-9 * abs(self.best))


class HealthWatchCallback(TrainerCallback):
    """
    Warns once an episode, by metric, value, bound, likely cause and remedy; stops the run where it cannot recover.

    Stops at once: loss or gradient not finite, a reward infinite, a weight not finite at a checkpoint, a ratio beyond
    `health_ratio_stop`. Stops if it lasts: no completion scored, a reward that has collapsed. Only warns: clip
    fraction, live fraction, entropy, a gradient of 0, a ratio beyond `health_ratio_warn`, unscored completions.

    Nothing is saved once the run is damaged: each checkpoint is preceded by a log, which is judged, and by a look at
    the weights. What the last steps before it did to the policy only later logs show. So a checkpoint is trusted after
    `health_patience` healthy logs; the newest trusted one is kept, where need be beyond `save_total_limit`, and if the
    run is stopped the untrusted ones are marked. While something lasts that may yet stop the run, no checkpoint is
    deleted, and those saved are marked. [`~trl_gspo.checkpoints.alarms_of`] reads the mark.

    Goes after any callback of one's own that saves. Where `logging_strategy="no"`, only the logs before a checkpoint
    are judged.

    transformers by default logs the mean of earlier losses for a loss that is NaN; this callback turns that off
    (`logging_nan_inf_filter`).

    Args:
        bounds ([`HealthBounds`], *optional*): what is healthy.

    Attributes:
        stopped (`str` or `None`): why the run was stopped, on every rank; `None` if it was not.
    """

    def __init__(self, bounds: HealthBounds | None = None):
        self.bounds = bounds or HealthBounds()
        self.stopped: str | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        args.logging_nan_inf_filter = False
        self._save_total_limit = args.save_total_limit
        self.stopped = None
        args.save_total_limit = None  # old ones are deleted here, once a newer one is trusted
        # Step of a checkpoint -> healthy logs since. The one that is gone on from has to show again what it is worth
        # before older ones go; but what comes now may be of what was changed, and does not mark it.
        self._started_at = state.global_step
        self._untrusted: dict[int, int] = {self._started_at: 0} if self._started_at else {}
        self._episodes: dict[str, _Episode] = {}
        self._rewards = _Rewards(self.bounds.health_reward_window)
        self._first_entropies: list[float] = []
        # What a resumed run is measured against. Its episodes start anew: what caused them may have been mended.
        for logs in state.log_history:
            if "loss" in logs:
                self._remember(logs, logs["step"])

    def on_step_end(self, args, state, control, **kwargs):
        # `save_strategy="best"` decides to save after an evaluation, too late for us.
        if control.should_save or (control.should_evaluate and args.save_strategy == "best"):
            self._before_saving(args, state, control, kwargs["model"])

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:
            _end(control)  # the end of the epoch has asked for its checkpoint all the same
        else:
            self.on_step_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.stopped or not logs:
            return
        if "train_loss" in logs and state.global_step >= state.max_steps and not self._is_threatened:
            # The end: nothing is going to show what the last checkpoint is worth.
            self._untrusted = {}
            self._delete_old(args, state)
        if "loss" not in logs:  # an evaluation's
            return
        for finding in self._judge(logs, state.global_step, args.fp16):
            self._weigh(finding, args, state, control)
        if not self._is_threatened:
            for step in list(self._untrusted):
                self._untrusted[step] += 1
                if self._untrusted[step] >= self.bounds.health_patience:
                    del self._untrusted[step]
                    if state.is_world_process_zero:
                        mark(_folder(args, step), [])  # saved during an alarm from which the run recovered
            self._delete_old(args, state)

    def on_save(self, args, state, control, **kwargs):
        alarms = [name for name, episode in self._episodes.items() if episode.may_stop]
        if state.is_world_process_zero:
            # Also without an alarm: a run that went this way before may have left its mark.
            mark(_folder(args, state.global_step), alarms)
        self._untrusted[state.global_step] = 0
        if not self._is_threatened:
            self._delete_old(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        args.save_total_limit = self._save_total_limit

    def _before_saving(self, args, state, control, model) -> None:
        name = non_finite_weight(model)
        if args.world_size > 1:
            # Ranks may hold different shards of the weights, and must stop together.
            is_bad = torch.tensor(float(name is not None), device=args.device)
            if reduce(is_bad, "sum") and name is None:
                name = "one on another rank"
        if name is not None:
            finding = _Finding(
                name="weights",
                is_bad=True,
                figures=f"a weight is not finite: {name}",
                cause="the last optimizer step overflowed, or something else wrote to the weights",
                remedy="lower `learning_rate`; with `fp16`, train in `bf16`",
                stop_after=1,
            )
            self._weigh(finding, args, state, control)
        else:
            control.should_log = True  # before the checkpoint is saved: `on_log` may yet call it off

    @property
    def _is_threatened(self) -> bool:
        return self.stopped is not None or any(episode.may_stop for episode in self._episodes.values())

    def mark_untrusted(self, args, alarm: str) -> None:
        """Marks the checkpoints of which no later log has shown that they are sound."""
        for step in self._untrusted:
            if step != self._started_at:
                mark(_folder(args, step), [alarm])

    def _delete_old(self, args, state) -> None:
        """Keeps `save_total_limit` checkpoints, and the newest trusted one; all ranks may call it."""
        if args.should_save and self._save_total_limit:
            kept = max(self._save_total_limit, len(self._untrusted) + 1)
            delete_old(args.output_dir, state.global_step, kept, state.best_model_checkpoint, self._untrusted)

    def _weigh(self, finding: _Finding, args, state, control) -> None:
        episode = self._episodes.setdefault(finding.name, _Episode())
        if finding.is_bad:
            episode.bad += 1
            episode.healthy = 0
            episode.may_stop = finding.stop_after is not None
        else:
            episode.bad = 0
            episode.healthy += 1
            if episode.healthy >= self.bounds.health_patience:
                episode.is_open = episode.may_stop = False
            return
        if finding.stop_after is not None and episode.bad >= finding.stop_after:
            lasted = f", {episode.bad} logs in a row" if finding.stop_after > 1 else ""
            self.stopped = self.stopped or finding.figures + lasted
            _end(control)
            if state.is_world_process_zero and not finding.is_about_rewards:
                self.mark_untrusted(args, finding.name)
            _say(state, "The run stops", finding, lasted)
        elif self.stopped is None and not episode.is_open and episode.bad >= finding.warn_after:
            episode.is_open = True
            lasted = f", {episode.bad} logs in a row" if finding.warn_after > 1 else ""
            if finding.stop_after is not None:
                lasted += f"; the run stops after {finding.stop_after} such logs in a row"
            _say(state, "Warning", finding, lasted)

    def _remember(self, logs: dict, step: int) -> None:
        if _is_number(logs.get("reward")):
            self._rewards.add(logs["reward"], logs.get("reward_std"), step)
        if _is_number(logs.get("entropy")) and len(self._first_entropies) < self.bounds.health_patience:
            self._first_entropies.append(logs["entropy"])

    def _judge(self, logs: dict, step: int, has_loss_scaler: bool) -> Iterator[_Finding]:
        """What these logs say. A metric without a value says nothing, and is no part of any count."""
        self._remember(logs, step)
        yield from self._judge_rewards(logs)
        yield from self._judge_numbers(logs, has_loss_scaler)
        yield from self._judge_ratio(logs)
        yield from self._judge_learning(logs)

    def _judge_rewards(self, logs: dict) -> Iterator[_Finding]:
        bounds = self.bounds
        if "reward" not in logs:  # no rollout in this window
            return
        reward = logs["reward"]
        infinite = [key for key in ("reward", "reward_std") if logs.get(key) is not None and math.isinf(logs[key])]
        if infinite:
            yield _Finding(
                name="reward",
                is_bad=True,
                figures=f"{infinite[0]} is {logs[infinite[0]]}, and must be finite",
                cause="a reward function returned infinity, or numbers whose sum or squares exceed float32",
                remedy="find the function in `rewards/*/mean`, and bound what it returns",
                stop_after=1,
                is_about_rewards=True,
            )
            return
        unscored = logs.get("gspo/unscored_fraction")
        if reward is None or math.isnan(reward):
            unscored = 1.0
        if unscored is not None:
            yield _Finding(
                name="no reward",
                is_bad=unscored == 1,
                figures="gspo/unscored_fraction is 1: no completion has a finite reward",
                cause="a reward function returns NaN or None for whatever it is given: a division by zero, answers "
                "that it cannot parse, or a scorer that is down",
                remedy="call the reward functions on some completions and their columns, and have them return numbers",
                stop_after=bounds.health_unscored_logs,
                is_about_rewards=True,
            )
            yield _Finding(
                name="unscored",
                is_bad=bounds.health_unscored < unscored < 1,
                figures=f"gspo/unscored_fraction is {unscored:.3g}, bound {bounds.health_unscored:g}",
                cause="no reward function gives these completions a number, and nothing is learnt from them",
                remedy="return a number for them too, or leave their prompts out; if they are meant to go unscored, "
                "raise `health_unscored`",
            )
        bound = self._rewards.bound(bounds.health_reward_drop, bounds.health_reward_noise)
        if bound is not None and _is_number(reward):
            rewards = self._rewards
            yield _Finding(
                name="reward collapse",
                is_bad=rewards.mean < bound,
                figures=f"reward is {rewards.mean:.3g} on average of {bounds.health_reward_window} logs, bound "
                f"{bound:.3g}, best {rewards.best:.3g} at step {rewards.best_step}",
                cause="steps too large for the policy, or a reward that the policy has learnt to game",
                remedy="lower `learning_rate`, narrow `epsilon`, or set `beta`; if the reward or the data changed on "
                "purpose, `--health_watch false`",
                stop_after=bounds.health_reward_logs,
            )

    def _judge_numbers(self, logs: dict, has_loss_scaler: bool) -> Iterator[_Finding]:
        loss, norm = logs["loss"], logs.get("grad_norm")
        # DeepSpeed says -1 for a norm that is not finite.
        norm_is_bad = norm is not None and (not math.isfinite(norm) or norm < 0)
        loss_is_bad = not math.isfinite(loss)
        if norm is not None or loss_is_bad:
            yield _Finding(
                name="not finite",
                is_bad=norm_is_bad or loss_is_bad,
                figures=f"loss is {loss:.3g}, grad_norm {'not logged' if norm is None else format(norm, '.3g')}; both "
                "must be finite",
                cause="an overflow: too high a learning rate, weights that are damaged, or rewards without bound",
                remedy="lower `learning_rate`, and train in `bf16` or float32 rather than `fp16`",
                stop_after=1 if loss_is_bad or not has_loss_scaler else self.bounds.health_overflow_logs,
            )

    def _judge_ratio(self, logs: dict) -> Iterator[_Finding]:
        bounds = self.bounds
        low, tenth, high = (logs.get(f"gspo/ratio/{name}") for name in ("min", "p10", "max"))
        cause = "too high a learning rate: within one rollout batch the policy moved far from the one that sampled"
        remedy = "lower `learning_rate` or `max_grad_norm`, or add `warmup_steps`"
        if not (_is_number(low) and high is not None):
            return
        is_destroyed = high > bounds.health_ratio_stop
        figures = f"gspo/ratio/max is {high:.3g}, bound {bounds.health_ratio_stop:g}"
        if not is_destroyed and _is_number(tenth) and tenth < 1 / bounds.health_ratio_stop:
            is_destroyed = True
            figures = f"gspo/ratio/p10 is {tenth:.3g}, bound {1 / bounds.health_ratio_stop:.3g}"
        yield _Finding("policy destroyed", is_destroyed, figures, cause, remedy, stop_after=1)
        is_high = high > bounds.health_ratio_warn
        yield _Finding(
            name="ratio",
            is_bad=not is_destroyed and (is_high or low < 1 / bounds.health_ratio_warn),
            figures=f"gspo/ratio/max is {high:.3g}, bound {bounds.health_ratio_warn:g}"
            if is_high
            else f"gspo/ratio/min is {low:.3g}, bound {1 / bounds.health_ratio_warn:.3g}",
            cause=cause,
            remedy=remedy,
        )

    def _judge_learning(self, logs: dict) -> Iterator[_Finding]:
        bounds, patience = self.bounds, self.bounds.health_patience
        # In the first minibatch the ratio is 1 and nothing can be clipped.
        later = [
            value
            for key, value in logs.items()
            if key.startswith("gspo/clip_fraction/minibatch_") and not key.endswith("_0") and _is_number(value)
        ]
        if later:
            clipped = sum(later) / len(later)
            yield _Finding(
                name="clip fraction",
                is_bad=clipped > bounds.health_clip_fraction,
                figures=f"gspo/clip_fraction is {clipped:.3g} after the first minibatch, bound "
                f"{bounds.health_clip_fraction:g}",
                cause="steps that are too large for the clip range, so that most sequences give no gradient",
                remedy="widen `epsilon` and `epsilon_high`, let `clip_fraction_target=0.15` find them, or lower "
                "`learning_rate`",
                warn_after=patience,
            )
        live = logs.get("gspo/live_fraction")
        has_live = not _is_number(live) or live >= bounds.health_live_fraction
        no_reward = self._episodes.get("no reward")
        if _is_number(live) and not (no_reward and no_reward.is_open):  # which says why nothing is live
            yield _Finding(
                name="live fraction",
                is_bad=not has_live,
                figures=f"gspo/live_fraction is {live:.3g}, bound {bounds.health_live_fraction:g}",
                cause="all answers to a prompt get the same reward: the prompts are too easy or too hard, the policy "
                "has stopped exploring, or a reward function returns a constant",
                remedy="mix in other prompts, raise `num_generations` or `temperature`, and look at the completions",
                warn_after=patience,
            )
        norm = logs.get("grad_norm")
        if _is_number(norm) and has_live:  # without live sequences 0 is right, and was spoken of
            yield _Finding(
                name="no gradient",
                is_bad=norm == 0,
                figures="grad_norm is 0, and must be above",
                cause="no trainable weight is reached, or every sequence is clipped",
                remedy="check that the model or the adapter has parameters that train, and look at "
                "`gspo/clip_fraction/sequences`",
                warn_after=patience,
            )
        entropy = logs.get("entropy")
        if _is_number(entropy) and len(self._first_entropies) == patience:
            first = sum(self._first_entropies) / patience
            yield _Finding(
                name="entropy",
                is_bad=entropy < bounds.health_entropy * first,
                figures=f"entropy is {entropy:.3g}, bound {bounds.health_entropy * first:.3g}, first {first:.3g}",
                cause="the policy has stopped exploring: its answers to a prompt are the same",
                remedy="widen `epsilon_high`, raise `temperature`, lower `learning_rate`, or stop here if the task is "
                "solved",
                warn_after=patience,
            )


def non_finite_weight(model: nn.Module) -> str | None:
    """Name of a parameter of which this rank holds NaN or infinity, `None` if all are finite."""
    for name, parameter in model.named_parameters():
        shard = getattr(parameter, "ds_tensor", parameter).detach()  # DeepSpeed ZeRO-3 leaves the parameter empty
        shard = shard.to_local() if hasattr(shard, "to_local") else shard
        # Quantised weights do not train, and torch knows no `isfinite` of 8-bit floats.
        if shard.is_floating_point() and shard.element_size() > 1 and not torch.isfinite(shard).all():
            return name
    return None


def reward_that_raised(error: BaseException, functions: list[Callable | str]) -> str | None:
    """
    Name of the reward function out of which `error` came; `None` if it came from elsewhere.

    Args:
        error (`BaseException`): as caught, with its traceback.
        functions (`list`): as given to the trainer.

    Returns:
        `str` or `None`: "a reward function" where it came from the scoring, but out of none of `functions`: one that
        returned too few numbers, or a reward model.
    """
    names = {}
    for function in functions:
        name = getattr(function, "__name__", repr(function))
        while isinstance(function, functools.partial):
            function = function.func
        function = inspect.unwrap(function) if callable(function) else function
        code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
        names[code] = name
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    for code in codes:
        if code in names:
            return f"the reward function {names[code]!r}"
    return "a reward function" if any(code.co_name == "_calculate_rewards" for code in codes) else None


def _folder(args, step: int) -> Path:
    return Path(args.output_dir, f"checkpoint-{step}")


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _end(control) -> None:
    control.should_training_stop = True
    control.should_save = control.should_evaluate = False


def _say(state, what: str, finding: _Finding, lasted: str) -> None:
    if state.is_world_process_zero:
        text = (
            f"{what}, step {state.global_step}: {finding.figures}{lasted}. Likely cause: {finding.cause}. "
            f"Remedy: {finding.remedy}."
        )
        tqdm.write(text, file=sys.stderr)  # around a progress bar, not into it
        sys.stderr.flush()
