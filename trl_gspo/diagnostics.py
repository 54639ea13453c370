"""
Statistics of ratio and clipping: one line is kept of each unit, over micro-batches and ranks, and metrics are of all.

Tensors stay on the device while the loss runs; a log costs one gather and one copy to the host. B sequences, T
completion tokens, U units of ratio to a sequence; log-ratios in nats.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .objective import clipped_units, exact_dtype, sum_by_unit, unit_ids


# What is kept of each unit. `length` is -1 where a row has fewer units than others, which is no unit; `sides` is 1
# if a token has a negative advantage, plus 2 if one has a positive, so that 0 is dead; `clipped` is -1 for low, 1 for
# high, 0 for neither.
_COLUMNS = (
    "log_ratio", "length", "sides", "clipped", "clipped_tokens", "kl_old", "difference", "largest", "minibatch",
)  # fmt: skip
_NO_UNIT = -1

_QUANTILES = {"p01": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}

# Above this share of the clip range, rounding and dropout decide over a visible part of what is clipped: with a normal
# spread, 0.3% of the ratios leave a range of three standard deviations by themselves.
_NOISE_SHARE = 1 / 3


class RatioStatistics:
    """
    What the importance ratio did since the last log. A unit is a sequence, or at level `"turn"` a turn. A unit is live
    if it has a gradient to give: at least one trained token whose advantage is not 0.

    Args:
        compares_rollout (`bool`, *optional*, defaults to `False`): whether the old log-probabilities are those that
            the rollout engine returned, so that their difference from the first minibatch's is the mismatch of the
            two.

    Attributes:
        ratios (`np.ndarray`): of the live units behind the last [`RatioStatistics.compute`], over all ranks.
    """

    def __init__(self, compares_rollout: bool = False):
        self._compares_rollout = compares_rollout
        self._units: list[Tensor] = []
        self._expert_changes: list[Tensor] = []
        self.ratios = np.empty(0)

    def __bool__(self) -> bool:
        return bool(self._units)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """What was added since the last [`RatioStatistics.compute`], for a checkpoint."""
        return {"units": self._units, "expert_changes": self._expert_changes}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        self._units, self._expert_changes = list(state["units"]), list(state["expert_changes"])

    @torch.no_grad()
    def update(
        self,
        per_token_logps: Tensor,
        old_per_token_logps: Tensor,
        advantages: Tensor,
        mask: Tensor,
        epsilon_low: float,
        epsilon_high: float,
        level: str = "sequence",
        minibatch: int = 0,
        max_units: int | None = None,
        expert_changes: Tensor | None = None,
    ) -> Tensor:
        """
        Adds one micro-batch. Nothing is synchronised with the host. The first arguments are those of
        [`~trl_gspo.objective.clipped_units`], which says what they raise.

        Args:
            minibatch (`int`, *optional*, defaults to 0): optimizer steps since the rollout.
            max_units (`int`, *optional*): no row has more units than this, where that is known: keeps what is stored
                small at level `"turn"`.
            expert_changes (`Tensor`, *optional*): `(2,)`, routings that changed and routings compared.

        Returns:
            `Tensor`: `(B * U, 9)`, what was added.
        """
        units = clipped_units(per_token_logps, old_per_token_logps, advantages, mask, epsilon_low, epsilon_high, level)
        # Counts of tokens outgrow float32's 24 bits within a few steps.
        dtype = exact_dtype(mask)
        mask = mask.bool()
        ids, size = unit_ids(mask, level)
        token_log_ratio = (per_token_logps.to(dtype) - old_per_token_logps.to(dtype)).masked_fill(~mask, 0.0)
        distance = token_log_ratio.abs()
        # A sequence without trained tokens is a unit too; a turn without them is none.
        is_unit = units.lengths > 0 if level == "turn" else torch.ones_like(units.is_live)
        columns = (
            units.log_ratio,
            units.lengths.masked_fill(~is_unit, _NO_UNIT),
            units.has_negative + 2 * units.has_positive,
            units.is_clipped_high.long() - units.is_clipped_low.long(),
            units.clipped_tokens,
            sum_by_unit(torch.expm1(token_log_ratio) - token_log_ratio, ids, size),
            sum_by_unit(distance, ids, size),
            distance.amax(1, keepdim=True).expand_as(units.lengths),
            torch.full_like(units.lengths, minibatch),
        )
        rows = torch.stack([column[:, :max_units].to(dtype) for column in columns], -1).flatten(0, 1)
        self._units.append(rows)
        if expert_changes is not None:
            self._expert_changes.append(expert_changes.to(dtype))
        return rows

    def compute(
        self, gather: Callable[[Tensor], Tensor], pad: Callable[[Tensor], Tensor] = lambda units: units
    ) -> dict[str, float]:
        """
        Metrics since the last call, over all ranks; then starts anew. All ranks must call it together.

        Args:
            gather (`Callable`): concatenates a 1-D tensor over the ranks, as `accelerator.gather` does.
            pad (`Callable`, *optional*): makes the first dimension as long as on the longest rank, with -1. Needed
                where ranks can have different numbers of units.

        Returns:
            `dict[str, float]`: keyed as logged. NaN where there was no live unit. `gspo/ratio/noise` is there only if
            a first minibatch was, `gspo/clip_fraction/minibatch_K` for each minibatch that was, and
            `gspo/expert_change_fraction` only if routings were compared.
        """
        changes = torch.stack(self._expert_changes).sum(0) if self._expert_changes else None
        units, changes = gather_units(self._units, gather, pad, changes)
        self._units, self._expert_changes = [], []
        self.ratios = live_ratios(units)
        metrics = ratio_metrics(units)
        if self._compares_rollout:
            metrics |= _mismatch(units)
        if changes is not None:
            changed, compared = changes
            metrics["gspo/expert_change_fraction"] = changed / compared if compared else math.nan
        return {name: float(value) for name, value in metrics.items()}


def gather_units(
    rows: list[Tensor],
    gather: Callable[[Tensor], Tensor],
    pad: Callable[[Tensor], Tensor],
    sums: Tensor | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """
    What [`RatioStatistics.update`] returned, of all ranks, on the host: columns by name, and `sums` added up.

    Args:
        rows (`list[Tensor]`): each `(N, 9)`.
        gather, pad (`Callable`): as in [`RatioStatistics.compute`].
        sums (`Tensor`, *optional*): `(M,)`, to add up over the ranks in the same gather.
    """
    state = pad(torch.cat(rows))
    size = state.numel()
    state = state.flatten() if sums is None else torch.cat([state.flatten(), sums])
    by_rank = gather(state).view(-1, len(state)).cpu().double().numpy()
    table = by_rank[:, :size].reshape(-1, len(_COLUMNS))
    table = table[table[:, _COLUMNS.index("length")] != _NO_UNIT]
    return dict(zip(_COLUMNS, table.T, strict=True)), None if sums is None else by_rank[:, size:].sum(0)


# An infinite ratio leaves no finite mean or spread, and NumPy would warn of it.
@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def ratio_metrics(units: dict[str, np.ndarray]) -> dict[str, float]:
    """
    Metrics of a logging window from one value for each unit, in NumPy and float64. All but
    `gspo/live_fraction` are of live units alone.

    Args:
        units (`dict[str, np.ndarray]`): by column: `log_ratio` in nats, `length` in trained tokens, `sides` (1 if a
            token has a negative advantage, plus 2 if one has a positive; 0 is dead), `clipped` (-1 low, 1 high),
            `clipped_tokens`, `kl_old` (k3 estimate summed over the unit, nats), `difference` (absolute log-ratios of
            the tokens, summed), `largest` (of those of the row), `minibatch`.
    """
    is_live = units["sides"] > 0
    live = {name: column[is_live] for name, column in units.items()}
    clipped, tokens = live["clipped"], live["length"].sum()
    first = live["log_ratio"][live["minibatch"] == 0]
    metrics = {
        "gspo/clip_fraction/sequences": _mean(clipped != 0),
        "gspo/clip_fraction/low": _mean(clipped < 0),
        "gspo/clip_fraction/high": _mean(clipped > 0),
        "gspo/clip_fraction/tokens": live["clipped_tokens"].sum() / tokens if tokens else math.nan,
    }
    for index in np.unique(units["minibatch"]):
        metrics[f"gspo/clip_fraction/minibatch_{int(index)}"] = _mean(clipped[live["minibatch"] == index] != 0)
    metrics |= {f"gspo/ratio/{name}": value for name, value in _distribution(live_ratios(units)).items()}
    if (units["minibatch"] == 0).any():
        metrics["gspo/ratio/noise"] = first.std() if len(first) else math.nan
    metrics["gspo/ratio/length_correlation"] = _correlation(live["log_ratio"], live["length"])
    metrics["gspo/kl_old"] = live["kl_old"].sum() / tokens if tokens else math.nan
    metrics["gspo/live_fraction"] = _mean(is_live)
    return metrics


def _mismatch(units: dict[str, np.ndarray]) -> dict[str, float]:
    """Difference between rollout engine and model on the same tokens, before any update, nats."""
    is_first = (units["sides"] > 0) & (units["minibatch"] == 0)
    tokens = units["length"][is_first].sum()
    if not (units["minibatch"] == 0).any():
        return {}
    return {
        "gspo/rollout_logp_difference/mean": units["difference"][is_first].sum() / tokens if tokens else math.nan,
        "gspo/rollout_logp_difference/max": units["largest"][is_first].max() if tokens else math.nan,
    }


def noise_warning(metrics: dict[str, float], epsilon_low: float, epsilon_high: float) -> str | None:
    """What to say if the ratio leaves the clip range by noise alone; `None` if it does not."""
    noise, epsilon = metrics.get("gspo/ratio/noise", math.nan), min(epsilon_low, epsilon_high)
    if not noise > _NOISE_SHARE * epsilon:
        return None
    clipped = metrics["gspo/clip_fraction/minibatch_0"]
    return (
        f"`gspo/ratio/noise` is {noise:.2g}, more than a third of the clip range ({epsilon:.2g}): before any update, "
        f"with the weights that sampled, {clipped:.1%} of the live sequences are clipped by noise alone. What helps: "
        "`disable_dropout=True`, a float32 head (`cast_lm_head_to_fp32=True`), or a wider `epsilon` and "
        f"`epsilon_high`, at least {3 * noise:.2g}."
    )


@np.errstate(over="ignore")
def live_ratios(units: dict[str, np.ndarray]) -> np.ndarray:
    """The importance ratios of the live units among `units`, which are by column as in [`ratio_metrics`]."""
    return np.exp(units["log_ratio"][units["sides"] > 0])


def _mean(values: np.ndarray) -> float:
    return values.mean() if len(values) else math.nan


def _distribution(ratios: np.ndarray) -> dict[str, float]:
    names = ("mean", "std", "min", "max", *_QUANTILES, "ess")
    if not len(ratios):
        return dict.fromkeys(names, math.nan)
    mean, mean_square = ratios.mean(), np.square(ratios).mean()
    values = (
        mean,
        ratios.std(),
        ratios.min(),
        ratios.max(),
        *np.quantile(ratios, list(_QUANTILES.values())),
        # (sum s)^2 / (N sum s^2): at most 1 but for rounding; without a value where all ratios underflow.
        min(mean * mean / mean_square, 1.0) if mean_square > 0 else math.nan,
    )
    return dict(zip(names, values, strict=True))


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    if len(first) < 2 or first.std() == 0 or second.std() == 0:
        return math.nan
    return np.corrcoef(first, second)[0, 1]
