"""
The GSPO objective as pure tensor maths: torch in, torch out, no trainer and no TRL.

Shapes: B sequences, T completion tokens, U units of ratio. Log-probabilities and log-ratios are in nats. Reductions
are in float32, or float64 where that is what comes in: in bfloat16 a ratio of 1 +- 1e-3 rounds to 1 and nothing would
ever be clipped. Where a ratio stands at each token, they are in float64, so that all tokens of a unit agree on the
clip.

Source: GSPO, https://huggingface.co/papers/2507.18071
"""

from typing import NamedTuple

import torch
from torch import Tensor


# Clip range of the ratio, section 5.1 of the paper. Three orders of magnitude below a token-level range, because the
# ratio is a geometric mean over the tokens of a sequence.
EPSILON_LOW = 3e-4
EPSILON_HIGH = 4e-4

# exp(20) = 4.9e8: far outside any clip range, far inside float32. A ratio that overflows to infinity would make the
# gradient NaN for the whole batch.
_MAX_LOG_RATIO = 20.0

# What shares one ratio, one clip decision and one length normaliser. At "sequence" the gradient is the sequence's too;
# at the others it is each token's own, so that advantages may differ from token to token.
LEVELS = ("sequence", "sequence_token", "turn")


class GSPOStatistics(NamedTuple):
    """
    What [`gspo_loss`] saw, detached. `(B,)`, one value for each sequence; at level `"turn"` `(B, U)`, one for each
    turn, where U is the most turns that T tokens can hold, `(T + 1) // 2`.

    Args:
        ratio (`Tensor`): the importance ratio of each unit; 1 for one without trained tokens.
        is_live (`Tensor`): bool: at least one of its trained tokens has an advantage that is not 0. Only such a unit
            has a gradient, so only such units belong in the denominator of a clip fraction.
        is_clipped_low (`Tensor`): bool: ratio below `1 - epsilon_low`, and a token with negative advantage.
        is_clipped_high (`Tensor`): bool: ratio above `1 + epsilon_high`, and a token with positive advantage.
        clip_fraction (`Tensor`): scalar, clipped units / live units; 0 where none is live.
    """

    ratio: Tensor
    is_live: Tensor
    is_clipped_low: Tensor
    is_clipped_high: Tensor
    clip_fraction: Tensor


class Units(NamedTuple):
    """
    The units of ratio of a batch, and what the clip does to them, detached: the raw material of all statistics.

    Args:
        log_ratio (`Tensor`): `(B, U)`, nats, mean over the unit; 0 for one without trained tokens.
        lengths (`Tensor`): `(B, U)`, trained tokens.
        has_negative (`Tensor`): `(B, U)`, bool: a trained token has a negative advantage, so that the ratio can be
            clipped from below.
        has_positive (`Tensor`): `(B, U)`, bool: a trained token has a positive advantage.
        is_live (`Tensor`): `(B, U)`, bool: a trained token has an advantage that is not 0.
        is_clipped_low (`Tensor`): `(B, U)`, bool.
        is_clipped_high (`Tensor`): `(B, U)`, bool.
        clipped_tokens (`Tensor`): `(B, U)`, trained tokens whose gradient the clip stops.
    """

    log_ratio: Tensor
    lengths: Tensor
    has_negative: Tensor
    has_positive: Tensor
    is_live: Tensor
    is_clipped_low: Tensor
    is_clipped_high: Tensor
    clipped_tokens: Tensor


def turn_ids(mask: Tensor) -> Tensor:
    """
    Numbers the turns that the model wrote: the maximal runs of trained tokens.

    Args:
        mask (`Tensor`): `(B, T)`, true on trained tokens, so false on those of tools and environments.

    Returns:
        `Tensor`: `(B, T)`, int64, from 0 in each sequence; -1 on tokens that are not trained.
    """
    mask = mask.bool()
    starts = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return (starts.cumsum(-1) - 1).masked_fill(~mask, -1)


def unit_ids(mask: Tensor, level: str) -> tuple[Tensor, int]:
    """
    The unit of ratio that each token belongs to.

    Args:
        mask (`Tensor`): `(B, T)`, true on trained tokens.
        level (`str`): one of [`LEVELS`].

    Returns:
        `tuple[Tensor, int]`: `(B, T)`, int64, -1 on tokens that are not trained, and U.

    Raises:
        ValueError: if there is no such level.
    """
    if level not in LEVELS:
        raise ValueError(f"`level` must be one of {', '.join(map(repr, LEVELS))}, got {level!r}.")
    if level == "turn":
        return turn_ids(mask), max((mask.size(1) + 1) // 2, 1)
    return mask.long() - 1, 1


def sum_by_unit(values: Tensor, ids: Tensor, units: int) -> Tensor:
    """`(B, U)` sums of `values`, `(B, T)`, over units; tokens that are not trained (`ids` -1) are in none."""
    sums = values.new_zeros(len(ids), units + 1)
    return sums.scatter_add(1, ids + 1, values)[:, 1:]


def at_tokens(by_unit: Tensor, ids: Tensor) -> Tensor:
    """`(B, U)` values of units at their tokens, `(B, T)`; 0 on tokens that are not trained (`ids` -1)."""
    return by_unit.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0)


def _check_shapes(per_token_logps: Tensor, old_per_token_logps: Tensor, mask: Tensor) -> None:
    if not (per_token_logps.dim() == 2 and per_token_logps.shape == old_per_token_logps.shape == mask.shape):
        raise ValueError(
            "`per_token_logps`, `old_per_token_logps` and `mask` must all be (B, T), got "
            f"{tuple(per_token_logps.shape)}, {tuple(old_per_token_logps.shape)} and {tuple(mask.shape)}."
        )


def sequence_log_ratio(per_token_logps: Tensor, old_per_token_logps: Tensor, mask: Tensor) -> Tensor:
    """
    Length-normalised log importance ratio of each sequence.

        log s = (1/n) sum_t m_t (log pi(y_t) - log pi_old(y_t)),   n = max(sum_t m_t, 1)

    Source: GSPO, equation 7, https://huggingface.co/papers/2507.18071

    Args:
        per_token_logps (`Tensor`): `(B, T)`, nats. Gradient flows.
        old_per_token_logps (`Tensor`): `(B, T)`, nats, under the policy that sampled. Detached.
        mask (`Tensor`): `(B, T)`, true on trained tokens. Values elsewhere may be anything, NaN too.

    Returns:
        `Tensor`: `(B, 1)`, nats, float32 (float64 if an input is); 0 for a row without trained tokens.

    Raises:
        ValueError: if the shapes differ. A silent broadcast would train, wrongly.
    """
    _check_shapes(per_token_logps, old_per_token_logps, mask)
    dtype = torch.promote_types(torch.promote_types(per_token_logps.dtype, old_per_token_logps.dtype), torch.float32)
    mask = mask.bool()
    log_ratio = per_token_logps.to(dtype) - old_per_token_logps.detach().to(dtype)
    # Fill, do not multiply: padding may hold NaN, and NaN * 0 is NaN.
    log_ratio = log_ratio.masked_fill(~mask, 0.0)
    return log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def token_log_ratio(
    per_token_logps: Tensor, old_per_token_logps: Tensor, mask: Tensor, level: str = "sequence_token"
) -> Tensor:
    """
    Log importance ratio at each token: the value of its unit, the gradient of the token.

        log s_t = log pi(y_t) - sg[log pi(y_t)] + sg[mean over the unit of t of (log pi(y) - log pi_old(y))]

    The mean is added last: `log pi - (sg[log pi] - mean)` would lose it to cancellation in float32.

    Source: GSPO, equation 14 (GSPO-token), https://huggingface.co/papers/2507.18071

    Args:
        per_token_logps (`Tensor`): `(B, T)`, nats. Gradient flows, each token's to itself.
        old_per_token_logps (`Tensor`): `(B, T)`, nats, under the policy that sampled. Detached.
        mask (`Tensor`): `(B, T)`, true on trained tokens. Values elsewhere may be anything, NaN too.
        level (`str`, *optional*, defaults to `"sequence_token"`): the unit, a sequence or a `"turn"`.

    Returns:
        `Tensor`: `(B, T)`, nats, float64 (float32 on Apple's GPUs); 0 on tokens that are not trained.

    Raises:
        ValueError: if the shapes differ or there is no such level.
    """
    _check_shapes(per_token_logps, old_per_token_logps, mask)
    ids, units = unit_ids(mask, level)
    dtype = exact_dtype(mask)
    is_padding = ids < 0
    logps = per_token_logps.to(dtype).masked_fill(is_padding, 0.0)
    mean = _mean_by_unit(logps.detach() - old_per_token_logps.detach().to(dtype), ids, units)
    return (logps - logps.detach()) + at_tokens(mean, ids)


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _mean_by_unit(values: Tensor, ids: Tensor, units: int) -> Tensor:
    # Fill, do not multiply: padding may hold NaN, and NaN * 0 is NaN.
    sums = sum_by_unit(values.masked_fill(ids < 0, 0.0), ids, units)
    return sums / sum_by_unit((ids >= 0).to(values.dtype), ids, units).clamp(min=1)


def clip_masks(ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> tuple[Tensor, Tensor]:
    """
    Where the clip stops the gradient. The sign of the advantage decides which side can.

        low  = s < 1 - eps_low  and A < 0
        high = s > 1 + eps_high and A > 0

    Args:
        ratio (`Tensor`): importance ratios, any shape.
        advantages (`Tensor`): of a shape that broadcasts with `ratio`.
        epsilon_low (`float`): width of the clip range below 1.
        epsilon_high (`float`): width of the clip range above 1.

    Returns:
        `tuple[Tensor, Tensor]`: bool, low and high, in the broadcast shape.
    """
    return (ratio < 1 - epsilon_low) & (advantages < 0), (ratio > 1 + epsilon_high) & (advantages > 0)


def check_epsilon(name: str, value: float) -> None:
    """Raises `ValueError` unless `value` is a finite number in (0, 1); `name` is the option the message names."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and 0 < value < 1):
        raise ValueError(
            f"`{name}` must be a finite number in (0, 1), got {value!r}. The GSPO paper (section 5.1) clips the "
            f"ratio to 1 - {EPSILON_LOW} and 1 + {EPSILON_HIGH}; short completions need a wider range."
        )


@torch.no_grad()
def clipped_units(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon_low: float,
    epsilon_high: float,
    level: str = "sequence",
) -> Units:
    """
    Ratio and clipping of each unit, for statistics. Nothing is synchronised with the host.

    Args:
        per_token_logps (`Tensor`): `(B, T)`, nats, under the policy in training.
        old_per_token_logps (`Tensor`): `(B, T)`, nats, under the policy that sampled.
        advantages (`Tensor`): `(B,)` or `(B, T)`.
        mask (`Tensor`): `(B, T)`, true on trained tokens. Values elsewhere may be anything, NaN too.
        epsilon_low (`float`): width of the clip range below 1, as the loss used it.
        epsilon_high (`float`): width of the clip range above 1, as the loss used it.
        level (`str`, *optional*, defaults to `"sequence"`): one of [`LEVELS`].

    Returns:
        [`Units`].

    Raises:
        ValueError: if shapes differ or there is no such level.
    """
    _check_shapes(per_token_logps, old_per_token_logps, mask)
    ids, units = unit_ids(mask, level)
    if level == "sequence":
        log_ratio = sequence_log_ratio(per_token_logps, old_per_token_logps, mask)
    else:
        dtype = exact_dtype(mask)
        log_ratio = _mean_by_unit(per_token_logps.to(dtype) - old_per_token_logps.to(dtype), ids, units)
    advantages = _per_token(advantages, mask, level).expand_as(mask)
    ratio = at_tokens(torch.exp(log_ratio), ids)
    is_trained = ids >= 0
    is_low, is_high = (m & is_trained for m in clip_masks(ratio, advantages, epsilon_low, epsilon_high))

    def count(m):
        return sum_by_unit(m.long(), ids, units)

    return Units(
        log_ratio=log_ratio,
        lengths=count(is_trained),
        has_negative=count((advantages < 0) & is_trained) > 0,
        has_positive=count((advantages > 0) & is_trained) > 0,
        is_live=count((advantages != 0) & is_trained) > 0,
        is_clipped_low=count(is_low) > 0,
        is_clipped_high=count(is_high) > 0,
        clipped_tokens=count(is_low | is_high),
    )


def _per_token(advantages: Tensor, mask: Tensor, level: str) -> Tensor:
    """`advantages` as `(B, 1)` or `(B, T)`, checked against `level`."""
    batch = tuple(mask.shape[:1])
    if advantages.shape == batch:
        return advantages.unsqueeze(1)
    if level == "sequence":
        raise ValueError(
            f"`advantages` must be (B,) = {batch}, one for each sequence, got {tuple(advantages.shape)}. At level "
            "'sequence' the ratio spreads an advantage evenly over the tokens, and credit for single tokens would be "
            "lost; 'sequence_token' and 'turn' keep it."
        )
    if advantages.shape != mask.shape:
        raise ValueError(
            f"`advantages` must be (B,) = {batch} or (B, T) = {tuple(mask.shape)}, got {tuple(advantages.shape)}."
        )
    return advantages


def gspo_loss(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon_low: float = EPSILON_LOW,
    epsilon_high: float = EPSILON_HIGH,
    level: str = "sequence",
) -> tuple[Tensor, GSPOStatistics]:
    """
    GSPO loss of one batch, for a training loop of one's own.

        loss_i = -(1/n_i) sum_t m_t min(s_t A_t, clip(s_t, 1 - eps_low, 1 + eps_high) A_t),   n_i = max(sum_t m_t, 1)
        loss   = (1/B) sum_i loss_i

    At level `"sequence"` all `s_t` are the sequence's ratio ([`sequence_log_ratio`]) and all `A_t` its advantage, so
    that `loss_i = -min(s A, clip(s) A)`: GSPO. At `"sequence_token"` and `"turn"` `s_t` has the value of its unit and
    the gradient of its token ([`token_log_ratio`]): GSPO-token.

    The denominator B is the rows handed in: rows with advantage 0 and rows without trained tokens count, with loss 0
    and gradient 0. To accumulate gradients, divide by the number of micro-batches.

    Source: GSPO, equations 5 to 7 and 13 to 14, https://huggingface.co/papers/2507.18071

    Args:
        per_token_logps (`Tensor`): `(B, T)`, nats, under the policy in training. Gradient flows.
        old_per_token_logps (`Tensor`): `(B, T)`, nats, under the policy that sampled. Detached.
        advantages (`Tensor`): `(B,)`, one for each sequence; or `(B, T)`, one for each token, at the levels that keep
            them apart. Finite. Detached.
        mask (`Tensor`): `(B, T)`, true on trained tokens. What the others hold elsewhere may be anything, NaN too.
        epsilon_low (`float`, *optional*, defaults to 3e-4): width of the clip range below 1.
        epsilon_high (`float`, *optional*, defaults to 4e-4): width of the clip range above 1.
        level (`str`, *optional*, defaults to `"sequence"`): one of [`LEVELS`].

    Returns:
        `tuple[Tensor, GSPOStatistics]`: the scalar loss and what it saw.

    Raises:
        ValueError: if shapes differ, an epsilon is not in (0, 1), there is no such level, or `advantages` is `(B, T)`
            at level `"sequence"`, which would spread each of them evenly over the tokens.
    """
    check_epsilon("epsilon_low", epsilon_low)
    check_epsilon("epsilon_high", epsilon_high)
    units = clipped_units(per_token_logps, old_per_token_logps, advantages, mask, epsilon_low, epsilon_high, level)
    if level == "sequence":
        log_ratio = sequence_log_ratio(per_token_logps, old_per_token_logps, mask)
    else:
        log_ratio = token_log_ratio(per_token_logps, old_per_token_logps, mask, level)
    advantages = _per_token(advantages.detach().to(log_ratio.dtype), mask, level)

    ratio = torch.exp(log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    # min(s A, clip(s) A), chosen by the masks and not by the products: next to the edge these round to one number, and
    # `torch.min` would give a clipped token half of its gradient.
    is_low, is_high = clip_masks(ratio, advantages, epsilon_low, epsilon_high)
    clipped_ratio = ratio.masked_fill(is_low, 1 - epsilon_low).masked_fill(is_high, 1 + epsilon_high)
    per_token_loss = -clipped_ratio * advantages
    if level == "sequence":
        # A row without trained tokens has ratio 1, hence a constant -A that is no loss of anything.
        per_sequence_loss = per_token_loss.masked_fill(units.lengths == 0, 0.0)
    else:
        mask = mask.bool()
        per_sequence_loss = per_token_loss.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)

    is_clipped = units.is_clipped_low | units.is_clipped_high
    clip_fraction = is_clipped.sum() / units.is_live.sum().clamp(min=1)
    by_unit = (torch.exp(units.log_ratio), units.is_live, units.is_clipped_low, units.is_clipped_high)
    if level != "turn":
        by_unit = (tensor.squeeze(1) for tensor in by_unit)
    return per_sequence_loss.mean(), GSPOStatistics(*by_unit, clip_fraction)
