"""
Attention over rows that are packed one after the other into a single one, each row for itself.

transformers keeps packed rows apart by a mask of the square of the packed length, and pays the square of it in
attention under `sdpa` and `eager`. Here the attention of a layer runs row by row instead: the same kernels, causal
without a mask, and work that is the sum of the squares of the rows. What is given to a layer travels in its keyword
arguments, so that gradient checkpointing, which runs a layer again in the backward pass, gives it again.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


# Layers get the lengths under this name. Python integers: nothing is read back from the device.
ROW_LENGTHS = "packed_row_lengths"

_makes_no_mask = ContextVar("makes_no_mask", default=False)


@contextmanager
def without_mask() -> Iterator[None]:
    """
    No mask is made for the whole packed row. Around a model's forward: masks are made there once, not in the layers,
    and so not when gradient checkpointing runs those again.
    """
    token = _makes_no_mask.set(True)
    try:
        yield
    finally:
        _makes_no_mask.reset(token)


def packed_arguments(implementation: str, lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """
    What a model needs beside tokens and positions to keep packed rows apart, in a forward under [`without_mask`].

    Args:
        implementation (`str`): `config._attn_implementation` of the model.
        lengths (`tuple[int, ...]`): tokens of each row, in their order.
        device (`torch.device`): of the tokens.

    Raises:
        ValueError: if rows cannot be packed under this implementation.
    """
    if implementation in ("sdpa", "eager"):
        _register(implementation)
        return {ROW_LENGTHS: lengths}
    if implementation == "flex_attention":
        return {}  # its block mask is made from the jumps of the positions, and costs the blocks that hold something
    if implementation in ("flash_attention_2", "flash_attention_3"):
        ends = torch.tensor((0, *lengths), device=device).cumsum(0, dtype=torch.int32)
        return {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
    raise ValueError(f"rows are not packed under `attn_implementation={implementation!r}`")


@functools.cache
def _register(implementation: str) -> None:
    # Under the name that the model has already: its config, its generation and whoever reads the name see no change,
    # and a call without the lengths goes to the function of before.
    before = ALL_ATTENTION_FUNCTIONS.get(implementation)
    ALL_ATTENTION_FUNCTIONS[implementation] = row_wise(before)
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation]

    @functools.wraps(make_mask)
    def make_mask_or_none(*args: Any, **kwargs: Any) -> Tensor | None:
        return None if _makes_no_mask.get() else make_mask(*args, **kwargs)

    ALL_MASK_ATTENTION_FUNCTIONS[implementation] = make_mask_or_none


def row_wise(attention: Callable | None) -> Callable:
    """
    `attention`, which also takes packed rows. Queries, keys and values are `(1, heads, tokens, head size)`, the output
    is `(1, tokens, heads, head size)`.

    Args:
        attention (`Callable`): in the form of transformers' `sdpa_attention_forward`; `None` for the
            `eager_attention_forward` of the file that the layer stands in.
    """

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        forward = attention or sys.modules[type(module).__module__].eager_attention_forward
        lengths = kwargs.pop(ROW_LENGTHS, None)
        if lengths is None:
            return forward(module, query, key, value, attention_mask, **kwargs)
        rows = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
        is_eager = attention is None
        outputs = [
            forward(module, *row, _mask(row[0], kwargs.get("sliding_window"), is_eager), **kwargs)[0] for row in rows
        ]
        return torch.cat(outputs, dim=1), None

    return attend


def _mask(query: Tensor, sliding_window: int | None, is_eager: bool) -> Tensor | None:
    """Causal mask of one row, within its window; `None` where the kernel is causal by itself."""
    length = query.size(2)
    is_windowed = sliding_window is not None and sliding_window < length
    if not (is_windowed or is_eager):
        return None
    positions = torch.arange(length, device=query.device)
    distance = positions.unsqueeze(1) - positions
    is_seen = distance >= 0
    if is_windowed:
        is_seen &= distance < sliding_window
    is_seen = is_seen.expand(1, 1, length, length)
    if not is_eager:
        return is_seen
    return torch.zeros_like(is_seen, dtype=query.dtype).masked_fill(~is_seen, torch.finfo(query.dtype).min)
