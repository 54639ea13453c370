"""
The GSPO objective as pure tensor maths: torch in, torch out, no trainer and no TRL.

Shapes: B sequences, T completion tokens. Log-probabilities and log-ratios are in nats. Reductions are in float32, or
float64 where that is what comes in: in bfloat16 a ratio of 1 +- 1e-3 rounds to 1 and nothing would ever be clipped.

Source: GSPO, https://huggingface.co/papers/2507.18071
"""

import math
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


class GSPOStatistics(NamedTuple):
    """
    What [`gspo_loss`] saw, detached.

    Args:
        ratio (`Tensor`): `(B,)`, the importance ratio of each sequence; 1 for a row without trained tokens.
        is_live (`Tensor`): `(B,)`, bool: the advantage is not 0 and at least one token is trained. Only such a row has
            a gradient, so only such rows belong in the denominator of a clip fraction.
        is_clipped_low (`Tensor`): `(B,)`, bool: ratio below `1 - epsilon_low` and negative advantage.
        is_clipped_high (`Tensor`): `(B,)`, bool: ratio above `1 + epsilon_high` and positive advantage.
        clip_fraction (`Tensor`): scalar, clipped sequences / live sequences; 0 where none is live.
    """

    ratio: Tensor
    is_live: Tensor
    is_clipped_low: Tensor
    is_clipped_high: Tensor
    clip_fraction: Tensor


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
    if not (per_token_logps.dim() == 2 and per_token_logps.shape == old_per_token_logps.shape == mask.shape):
        raise ValueError(
            "`per_token_logps`, `old_per_token_logps` and `mask` must all be (B, T), got "
            f"{tuple(per_token_logps.shape)}, {tuple(old_per_token_logps.shape)} and {tuple(mask.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(per_token_logps.dtype, old_per_token_logps.dtype), torch.float32)
    mask = mask.bool()
    log_ratio = per_token_logps.to(dtype) - old_per_token_logps.detach().to(dtype)
    # Fill, do not multiply: padding may hold NaN, and NaN * 0 is NaN.
    log_ratio = log_ratio.masked_fill(~mask, 0.0)
    return log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


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
    if not (is_number and math.isfinite(value) and 0 < value < 1):
        raise ValueError(
            f"`{name}` must be a finite number in (0, 1), got {value!r}. The GSPO paper (section 5.1) clips the "
            f"ratio to 1 - {EPSILON_LOW} and 1 + {EPSILON_HIGH}; short completions need a wider range."
        )


def gspo_loss(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon_low: float = EPSILON_LOW,
    epsilon_high: float = EPSILON_HIGH,
) -> tuple[Tensor, GSPOStatistics]:
    """
    GSPO loss of one batch, for a training loop of one's own.

        s_i    = exp(log s_i)
        loss_i = -min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i)
        loss   = (1/B) sum_i loss_i

    The denominator is B, the rows handed in: rows with advantage 0 and rows without trained tokens count, with loss 0
    and gradient 0. To accumulate gradients, divide by the number of micro-batches.

    Source: GSPO, equations 5 to 7, https://huggingface.co/papers/2507.18071

    Args:
        per_token_logps (`Tensor`): `(B, T)`, nats, under the policy in training. Gradient flows.
        old_per_token_logps (`Tensor`): `(B, T)`, nats, under the policy that sampled. Detached.
        advantages (`Tensor`): `(B,)`, one for each sequence, finite. Detached.
        mask (`Tensor`): `(B, T)`, true on trained tokens. Values elsewhere may be anything, NaN too.
        epsilon_low (`float`, *optional*, defaults to 3e-4): width of the clip range below 1.
        epsilon_high (`float`, *optional*, defaults to 4e-4): width of the clip range above 1.

    Returns:
        `tuple[Tensor, GSPOStatistics]`: the scalar loss and what it saw.

    Raises:
        ValueError: if shapes differ, an epsilon is not in (0, 1), or `advantages` is not `(B,)`. Advantages of one
            value a token are refused: the sequence's ratio would spread each of them evenly over its tokens.
    """
    check_epsilon("epsilon_low", epsilon_low)
    check_epsilon("epsilon_high", epsilon_high)
    log_ratio = sequence_log_ratio(per_token_logps, old_per_token_logps, mask).squeeze(1)
    if advantages.shape != log_ratio.shape:
        raise ValueError(
            f"`advantages` must be (B,) = {tuple(log_ratio.shape)}, one for each sequence, got "
            f"{tuple(advantages.shape)}. One ratio for each sequence cannot carry an advantage for each token."
        )
    advantages = advantages.detach().to(log_ratio.dtype)

    ratio = torch.exp(log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    clipped_ratio = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    per_sequence_loss = -torch.min(ratio * advantages, clipped_ratio * advantages)
    # A row without trained tokens has ratio 1, hence a constant -A that is no loss of anything.
    has_tokens = mask.bool().any(-1)
    loss = per_sequence_loss.masked_fill(~has_tokens, 0.0).mean()

    ratio = ratio.detach()
    is_live = (advantages != 0) & has_tokens
    is_clipped_low, is_clipped_high = (
        is_clipped & is_live for is_clipped in clip_masks(ratio, advantages, epsilon_low, epsilon_high)
    )
    clip_fraction = (is_clipped_low | is_clipped_high).sum() / is_live.sum().clamp(min=1)
    return loss, GSPOStatistics(ratio, is_live, is_clipped_low, is_clipped_high, clip_fraction)
