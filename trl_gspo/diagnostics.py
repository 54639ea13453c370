"""
Statistics of ratio and clipping: exact sums over micro-batches and ranks, divided once.

Tensors stay on the device while the loss runs; a log costs one collective and one copy to the host. B sequences,
T completion tokens; log-ratios in nats.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .objective import at_tokens, clipped_units, exact_dtype, unit_ids


# Over live units, those with a gradient to give: at least one trained token whose advantage is not 0.
_SUMS = (
    "units",
    "live",
    "clipped_low",
    "clipped_high",
    "tokens",
    "clipped_tokens",
    "excess",
    "squared_excess",
    "kl_old",
)


class RatioStatistics:
    """
    What the importance ratio did since the last log. A unit is a sequence, or at level `"turn"` a turn.

    `ratio - 1` is summed rather than `ratio`: near 1 the variance would drown in cancellation.
    """

    def __init__(self):
        self._sums: Tensor | None = None
        self._extremes: Tensor | None = None

    def __bool__(self) -> bool:
        return self._sums is not None

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
    ) -> None:
        """
        Adds one micro-batch. Nothing is synchronised with the host. Takes the arguments of
        [`~trl_gspo.objective.clipped_units`], and raises what it raises.
        """
        units = clipped_units(per_token_logps, old_per_token_logps, advantages, mask, epsilon_low, epsilon_high, level)
        # Counts of tokens outgrow float32's 24 bits within a few steps.
        dtype = exact_dtype(mask)
        log_ratio = units.log_ratio.to(dtype)
        is_live = units.is_live
        excess = torch.expm1(log_ratio).masked_fill(~is_live, 0.0)
        mask = mask.bool()
        is_live_token = mask & at_tokens(is_live, unit_ids(mask, level)[0])
        token_log_ratio = (per_token_logps.to(dtype) - old_per_token_logps.to(dtype)).masked_fill(~is_live_token, 0.0)
        per_token_kl = torch.expm1(token_log_ratio) - token_log_ratio

        sums = torch.stack(
            [
                # A sequence without trained tokens is a unit too; a turn without them is none.
                log_ratio.new_full((), len(mask)) if level != "turn" else (units.lengths > 0).sum().to(dtype),
                is_live.sum().to(dtype),
                units.is_clipped_low.sum().to(dtype),
                units.is_clipped_high.sum().to(dtype),
                is_live_token.sum().to(dtype),
                units.clipped_tokens.sum().to(dtype),
                excess.sum(),
                excess.square().sum(),
                per_token_kl.sum(),
            ]
        )
        ratio = torch.exp(units.log_ratio).to(dtype)
        extremes = torch.stack(
            [
                -ratio.masked_fill(~is_live, math.inf).amin(),
                ratio.masked_fill(~is_live, -math.inf).amax(),
            ]
        )
        self._sums = sums if self._sums is None else self._sums + sums
        self._extremes = extremes if self._extremes is None else torch.maximum(self._extremes, extremes)

    def compute(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """
        Metrics since the last call, over all ranks; then starts anew. All ranks must call it together.

        Args:
            gather (`Callable`): concatenates a 1-D tensor over the ranks, as `accelerator.gather` does.

        Returns:
            `dict[str, float]`: keyed as logged. NaN where there was no live unit.
        """
        state = torch.cat([self._sums, self._extremes])
        by_rank = gather(state).view(-1, len(state)).cpu().double()
        sums = dict(zip(_SUMS, by_rank[:, : len(_SUMS)].sum(0).tolist(), strict=True))
        negative_minimum, maximum = by_rank[:, len(_SUMS) :].amax(0).tolist()
        self._sums = self._extremes = None

        live = sums["live"] or math.nan
        tokens = sums["tokens"] or math.nan
        mean_excess = sums["excess"] / live
        mean_squared_excess = sums["squared_excess"] / live
        mean, mean_square = 1 + mean_excess, 1 + 2 * mean_excess + mean_squared_excess
        return {
            "gspo/clip_fraction/sequences": (sums["clipped_low"] + sums["clipped_high"]) / live,
            "gspo/clip_fraction/low": sums["clipped_low"] / live,
            "gspo/clip_fraction/high": sums["clipped_high"] / live,
            "gspo/clip_fraction/tokens": sums["clipped_tokens"] / tokens,
            "gspo/ratio/mean": mean,
            "gspo/ratio/std": math.sqrt(max(mean_squared_excess - mean_excess * mean_excess, 0.0)),
            "gspo/ratio/min": -negative_minimum if sums["live"] else math.nan,
            "gspo/ratio/max": maximum if sums["live"] else math.nan,
            # At most 1 but for rounding; without a value where all ratios underflow.
            "gspo/ratio/ess": min(mean * mean / mean_square, 1.0) if mean_square > 0 else math.nan,
            "gspo/kl_old": sums["kl_old"] / tokens,
            "gspo/live_fraction": sums["live"] / sums["units"],
        }
