"""
Which tokens carry gradient, and how they go through the model: packed one row after the other, without padding.

Shapes: B sequences, S columns of prompt and completion, of which the last T are the completion; N tokens that go
through the model, M of which predict a token that is wanted. Pure functions on tensors; nothing of TRL.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


_IGNORED = -100  # label that the head leaves out


class Pack(NamedTuple):
    """
    A micro-batch as it goes through the model: N tokens in R rows of the same length, or in one row that holds rows of
    several lengths, one after the other.

    Args:
        tokens (`Tensor`): `(N,)`, places in `(B, S)`, row by row.
        positions (`Tensor`): `(R, N / R)`, columns in `(B, S)`: what a model takes as positions without packing, too.
        lengths (`tuple[int, ...]`): tokens of each row of the batch that is here.
        sources (`Tensor`): `(M,)`, places in `(N,)` whose next token is wanted.
        targets (`Tensor`): `(M,)`, places in `(B, T)` of the tokens that are wanted.
        is_stub (`bool`): nothing is wanted, and two tokens stand here for the collectives of the model.
    """

    tokens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    sources: Tensor
    targets: Tensor
    is_stub: bool

    @property
    def is_packed(self) -> bool:
        """Whether rows stand behind one another, and have to be kept apart."""
        return len(self.positions) < len(self.lengths)

    def to(self, device: torch.device) -> "Pack":
        return self._replace(
            **{name: getattr(self, name).to(device) for name in ("tokens", "positions", "sources", "targets")}
        )

    def input_ids(self, input_ids: Tensor) -> Tensor:
        """`(R, N / R)` of `(B, S)`."""
        return input_ids.flatten()[self.tokens].view(self.positions.shape)

    def next_tokens(self, input_ids: Tensor) -> Tensor:
        """`(R, N / R)` of `(B, S)`: the token to predict at each place, -100 where it is not wanted."""
        labels = torch.full_like(self.tokens, _IGNORED)
        labels[self.sources] = input_ids.flatten()[self.tokens[self.sources] + 1]
        return labels.view(self.positions.shape)

    def scored(self, values: Tensor, attention_mask: Tensor) -> Tensor:
        """`(M,)`, those of `values`, `(R, N / R)`, that are wanted."""
        return values.flatten(0, 1)[self.sources]

    def scatter(self, values: Tensor, base: Tensor) -> Tensor:
        """
        Puts what the model gave at each token where the token that it predicts belongs.

        Args:
            values (`Tensor`): `(R, N / R, ...)`. Gradient flows.
            base (`Tensor`): `(B, T, ...)`, what stands where nothing was wanted. Detached.

        Returns:
            `Tensor`: `(B, T, ...)`, of the dtype of `values`.
        """
        # The index is empty for a stub, whose gradient is then 0 but there: ranks must run the same backward pass.
        wanted = values.flatten(0, 1)[self.sources]
        base = base.detach().to(values.dtype)
        return base.flatten(0, 1).index_copy(0, self.targets, wanted).view(base.shape)


def pack(attention_mask: Tensor, is_wanted: Tensor, keeps_all: bool = False) -> Pack | None:
    """
    Packs what the log-probabilities of the wanted tokens depend on: of each row with a wanted token all tokens before
    the last wanted one.

    Args:
        attention_mask (`Tensor`): `(B, S)`, true on tokens, false on padding; on the CPU.
        is_wanted (`Tensor`): `(B, T)`, true on completion tokens whose log-probability is wanted; on the CPU.
        keeps_all (`bool`, *optional*, defaults to `False`): leaves out nothing but padding, because something else
            needs the tokens.

    Returns:
        [`Pack`], on the CPU; `None` if a wanted token has no token before it (an empty prompt).
    """
    wanted = is_wanted.bool().numpy()
    is_kept = attention_mask.bool().numpy() if keeps_all else _kept(attention_mask, is_wanted)
    rows, columns = is_kept.shape
    prompt = columns - wanted.shape[1]
    tokens, lengths = np.flatnonzero(is_kept), is_kept.sum(1)
    lengths = lengths[lengths > 0]
    if not len(tokens) and not wanted.any():
        stub = torch.arange(2)
        return Pack(stub, stub.unsqueeze(0), (2,), stub[:0], stub[:0], True)

    row, column = np.nonzero(wanted)
    before = row * columns + prompt + column - 1
    # Where a kept token stands among the kept ones, -1 for the others: column 0 has no token before it.
    place = np.full(rows * columns, -1)
    place[tokens] = np.arange(len(tokens))
    sources = np.where(prompt + column > 0, place[before], -1)
    if (sources < 0).any():
        return None
    is_even = (lengths == lengths[0]).all()
    return Pack(
        torch.from_numpy(tokens),
        torch.from_numpy(tokens % columns).view(len(lengths) if is_even else 1, -1),
        tuple(lengths.tolist()),
        torch.from_numpy(sources),
        torch.from_numpy(row * wanted.shape[1] + column),
        False,
    )


def _kept(attention_mask: Tensor, is_wanted: Tensor) -> np.ndarray:
    """`(B, S)`: of each row with a wanted token, the tokens before the last wanted one."""
    attended, wanted = attention_mask.bool().numpy(), is_wanted.bool().numpy()
    last = attended.shape[1] - 1 - wanted[:, ::-1].argmax(1)
    return attended & (np.arange(attended.shape[1]) < last[:, None]) & wanted.any(1, keepdims=True)


def row_tokens(attention_mask: Tensor, is_wanted: Tensor) -> list[int]:
    """How many tokens of each row [`pack`] sends through the model. Its arguments."""
    return _kept(attention_mask, is_wanted).sum(1).tolist()


class Cut(NamedTuple):
    """
    The smallest rectangle of rows and columns that holds what is wanted, for models whose rows cannot be packed.

    Args:
        rows (`list[int]`): of the B sequences.
        first (`int`): column of `(B, S)` where it begins.
        end (`int`): column of `(B, S)` where it ends.
        is_stub (`bool`): nothing is wanted, and two tokens stand here for the collectives of the model.
    """

    rows: list[int]
    first: int
    end: int
    is_stub: bool

    def scored(self, values: Tensor, attention_mask: Tensor) -> Tensor:
        """`(M,)`, those of `values`, `(R, T')`, that stand on completion tokens of `attention_mask`, `(R, S')`."""
        return values[:, :0].flatten() if self.is_stub else values[attention_mask[:, -values.size(1) :].bool()]

    def scatter(self, values: Tensor, base: Tensor) -> Tensor:
        """
        Puts the columns of the completion that were scored into all of them.

        Args:
            values (`Tensor`): `(R, T', ...)`, the first T' columns of R rows. Gradient flows.
            base (`Tensor`): `(B, T, ...)`, what stands where nothing was scored. Detached.

        Returns:
            `Tensor`: `(B, T, ...)`, of the dtype of `values`.
        """
        # No value of a stub is used, but the backward pass, and its collectives, run.
        values = values[:, :0] if self.is_stub else values
        base = base.detach().to(values.dtype, copy=True)
        size = values.size(1)
        rows = torch.tensor(self.rows, device=values.device)
        return torch.cat([base[:, :size].index_copy(0, rows, values), base[:, size:]], 1)


def cut(attention_mask: Tensor, is_wanted: Tensor, keeps_rows: bool = False) -> Cut:
    """
    Leaves out rows without a wanted token, and the columns that are padding in all others.

    Args:
        attention_mask (`Tensor`): `(B, S)`, true on tokens, false on padding; on the CPU.
        is_wanted (`Tensor`): `(B, T)`, true on completion tokens whose log-probability is wanted; on the CPU.
        keeps_rows (`bool`, *optional*, defaults to `False`): leaves out nothing but columns that are padding in all
            rows, because something else needs the tokens.
    """
    attended, wanted = attention_mask.bool(), is_wanted.bool()
    prompt = attended.size(1) - wanted.size(1)
    rows = list(range(len(wanted))) if keeps_rows else wanted.any(1).nonzero().flatten().tolist()
    if not rows:
        return Cut([0], max(prompt - 1, 0), prompt + 1, True)
    columns = attended[rows].any(0).nonzero()
    first, end = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
    if not keeps_rows:
        end = prompt + int(wanted[rows].any(0).nonzero()[-1]) + 1
    # The first wanted token is predicted from the column before the completion.
    return Cut(rows, min(first, max(prompt - 1, 0)), max(end, prompt + 1), False)


class Skip(NamedTuple):
    """Nothing is wanted, and no other process waits for the model: it does not run."""

    is_stub: bool = True


def balance(lengths: list[int], parts: int) -> list[int]:
    """
    An order of the rows in which each of `parts` micro-batches, of as many rows, holds about as many tokens: the
    longest row next goes where the fewest tokens are. The fullest micro-batch comes first, on every rank, and is never
    fuller than that of the given order.

    Args:
        lengths (`list[int]`): tokens of each row, a multiple of `parts` of them.
    """
    size = len(lengths) // parts
    members, totals = [[] for _ in range(parts)], [0] * parts
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        part = min((part for part in range(parts) if len(members[part]) < size), key=totals.__getitem__)
        members[part].append(row)
        totals[part] += lengths[row]

    def total(rows: list[int]) -> int:
        return sum(lengths[row] for row in rows)

    # The rule is a good one, not the best: of rows 3, 3, 0 and 2, 2, 2 it makes parts of 7 and 5.
    given = [list(range(start, start + size)) for start in range(0, len(lengths), size)]
    if max(map(total, given)) < max(totals):
        members = given
    return [row for rows in sorted(members, key=total, reverse=True) for row in sorted(rows)]
