"""
Moves the clip range so that a chosen share of the live units is clipped.

Which epsilon that is depends on the length of the completions, the learning rate and the minibatches of a rollout, and
changes during a run. Here it is read off the ratios themselves, once for each rollout batch.
"""

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .diagnostics import gather_units


# Share of the way, in log space, to the range that would have clipped the target share of the last rollout batch, and
# the most that the range changes in one of them: slow enough that the policy's answer to one change is seen before the
# next, fast enough to cross three orders of magnitude in some fifteen rollout batches.
_RATE = 0.3
_MAX_FACTOR = 2.0


class ClipRangeController(TrainerCallback, ExportableState):
    """
    Moves `epsilon_low` and `epsilon_high` towards a clip fraction, after each rollout batch, alike on all ranks.

    Each side has its own share of the target: of the units that can be clipped from below (those with a negative
    advantage) the same fraction as of those that can be clipped from above. With `q` that fraction,

        eps_low*  = 1 - quantile_q(s | A < 0),    eps_high* = quantile_{1-q}(s | A > 0) - 1

    are the widths that would have clipped just so many; the range goes three tenths of the way there in log space, by
    a factor of 2 at most, within `[epsilon_min, epsilon_max]` and never below the noise floor, the standard deviation
    of log s before the first update of the rollout batch.

    It is a callback for its state alone: transformers keeps that in `trainer_state.json`, and it comes back on resume.

    Args:
        epsilon_low (`float`): where the width below 1 starts.
        epsilon_high (`float`): where the width above 1 starts.
        target (`float`): clipped live units / live units, over all minibatches of a rollout batch.
        epsilon_min (`float`): least width of either side.
        epsilon_max (`float`): largest width of either side.

    Attributes:
        rows (`list[Tensor]`): what was observed since the last update; goes with a checkpoint, rank by rank.
    """

    def __init__(self, epsilon_low: float, epsilon_high: float, target: float, epsilon_min: float, epsilon_max: float):
        self.target = target
        self.epsilon_min, self.epsilon_max = epsilon_min, epsilon_max
        self.epsilon_low, self.epsilon_high = epsilon_low, epsilon_high
        self.rows: list[Tensor] = []

    def state(self) -> dict:
        return {
            "args": {
                "epsilon_low": self.epsilon_low,
                "epsilon_high": self.epsilon_high,
                "target": self.target,
                "epsilon_min": self.epsilon_min,
                "epsilon_max": self.epsilon_max,
            },
            "attributes": {},
        }

    def on_train_begin(self, args, state, control, **kwargs):
        # transformers restores callbacks only on demand, and fails to save one that the checkpoint did not know.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["args"]
        self.epsilon_low, self.epsilon_high = saved["epsilon_low"], saved["epsilon_high"]

    def observe(self, rows: Tensor) -> None:
        """Takes what [`~trl_gspo.diagnostics.RatioStatistics.update`] returned for a micro-batch."""
        self.rows.append(rows)

    def update(self, gather: Callable[[Tensor], Tensor], pad: Callable[[Tensor], Tensor]) -> None:
        """
        Moves the range, at the end of a rollout batch. All ranks must call it together. `gather` and `pad` are as in
        [`~trl_gspo.diagnostics.RatioStatistics.compute`].
        """
        units, _ = gather_units(self.rows, gather, pad)
        self.rows = []
        self.epsilon_low, self.epsilon_high = self._moved(units)

    def _moved(self, units: dict[str, np.ndarray]) -> tuple[float, float]:
        is_live = units["sides"] > 0
        log_ratio, sides = units["log_ratio"][is_live], units["sides"][is_live].astype(int)
        below, above = log_ratio[(sides & 1) > 0], log_ratio[(sides & 2) > 0]
        if not np.isfinite(log_ratio).all() or not len(log_ratio):
            return self.epsilon_low, self.epsilon_high
        # A unit with advantages of both signs can be clipped from either side, and counts once.
        share = self.target * len(log_ratio) / (len(below) + len(above))
        first = log_ratio[units["minibatch"][is_live] == 0]
        floor = max(self.epsilon_min, float(first.std()) if len(first) else 0.0)
        return (
            self._step(self.epsilon_low, -math.expm1(np.quantile(below, share)) if len(below) else None, floor),
            self._step(self.epsilon_high, math.expm1(np.quantile(above, 1 - share)) if len(above) else None, floor),
        )

    def _step(self, epsilon: float, wanted: float | None, floor: float) -> float:
        if wanted is not None:
            limit = math.log(_MAX_FACTOR)
            distance = math.log(max(wanted, floor) / epsilon)
            epsilon *= math.exp(min(max(_RATE * distance, -limit), limit))
        return min(max(epsilon, floor), self.epsilon_max)
