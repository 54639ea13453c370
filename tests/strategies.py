"""What the property tests draw: batches of the objective, masks, epsilons, and values that are anything."""

import datetime
import decimal
import fractions
import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from trl_gspo.objective import LEVELS, clipped_units


GARBAGE = (math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0, -3.0)


class Case(NamedTuple):
    """A call of `gspo_loss`: its tensors and its options."""

    logps: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    options: dict

    @property
    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self[:4]

    @property
    def units(self):
        return clipped_units(*self.batch, *self.options.values())


def epsilons():
    """The paper's, a token-level range, and any."""
    any_width = st.floats(1e-6, 0.999)
    return st.sampled_from([(3e-4, 4e-4), (0.2, 0.28)]) | st.tuples(any_width, any_width)


# Tables to draw from, the simplest value first. In [-1, 1], with the special ones often.
BOOLEANS = torch.tensor([False, True])
_SPREAD = (torch.arange(1, 245, dtype=torch.float64) * (5**0.5 - 1) % 2) - 1
UNIFORM = torch.cat([torch.tensor([0.0, 1.0, -1.0] * 4, dtype=torch.float64), _SPREAD])


@functools.cache
def _bytes(size):
    return st.binary(min_size=size, max_size=size)


def drawn(draw, shape, table):
    """
    A tensor of `shape`, of values of `table`, which has 256 at most. Each takes a byte of a single draw: a draw for
    each value takes ten times as long, and a test is mostly drawing.
    """
    raw = torch.tensor(list(draw(_bytes(math.prod(shape)))), dtype=torch.long)
    return table[raw % len(table)].view(tuple(shape))


@st.composite
def masks(draw, max_rows=5, max_tokens=7, min_tokens=1):
    shape = draw(st.integers(1, max_rows)), draw(st.integers(min_tokens, max_tokens))
    return drawn(draw, shape, BOOLEANS)


def like(mask, elements, dtype=np.float64):
    """Arrays of the shape of `mask`, each element drawn by itself: any float, where it matters which."""
    return hnp.arrays(dtype, tuple(mask.shape), elements=elements, fill=st.nothing()).map(torch.from_numpy)


# A third are 0: dead rows and tokens.
_SOME_ZERO = torch.cat([UNIFORM[:160], torch.zeros(80, dtype=torch.float64)])


@st.composite
def cases(draw, levels=LEVELS, dtype=torch.float64, per_token=True, max_log_ratio=10.0, min_tokens=0):
    """
    Ratios around both edges of the clip range and far outside, of rows with holes, dead rows, and rows without trained
    tokens; advantages of sequences or, where the level takes them and `per_token`, of tokens.
    """
    mask = draw(masks(min_tokens=min_tokens))
    level = draw(st.sampled_from(levels))
    low, high = draw(epsilons())
    old = 4 * drawn(draw, mask.shape, UNIFORM) - 4
    # A row moves as one, by about a width of the range or by far more; its tokens scatter around that.
    edges = [math.log1p(-low), math.log1p(high)]
    moves = [0.0, -low / 2, -2 * low, high / 2, 2 * high, 0.3, -0.3, max_log_ratio / 2, *edges]
    move = drawn(draw, (len(mask), 1), torch.tensor(moves, dtype=torch.float64))
    scatter = draw(st.sampled_from([0.0, low / 4, 0.1, max_log_ratio / 2]))
    logps = old + move + scatter * drawn(draw, mask.shape, UNIFORM)
    is_per_token = per_token and level != "sequence" and draw(st.booleans())
    advantages = 3 * drawn(draw, mask.shape if is_per_token else (len(mask),), _SOME_ZERO)
    tensors = (tensor.to(dtype) for tensor in (logps, old, advantages))
    return Case(*tensors, mask, dict(epsilon_low=low, epsilon_high=high, level=level))


def is_clear_of_the_edges(case, distance=1e-9):
    """Whether rounding cannot decide about a clip. A case on the edge is either of two right ones."""
    ratio = torch.exp(case.units.log_ratio)
    edges = 1 - case.options["epsilon_low"], 1 + case.options["epsilon_high"]
    return all(((ratio - edge).abs() > distance * edge).all() for edge in edges)


def dirty(draw, tensor, mask):
    """`tensor` with garbage where `mask` is false."""
    garbage = drawn(draw, mask.shape, torch.tensor(GARBAGE, dtype=tensor.dtype))
    return torch.where(mask.bool(), tensor, garbage)


# Whatever a YAML file or a caller may hand over.
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**63, 0, 1, -1])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["3e-4", "1e-3", "nan", "inf", "true", "None", "sequence", "token", "{", "[]", "{}", "1", "auto"]
    )
)
ODDITIES = st.sampled_from(
    [
        b"1",
        1j,
        object(),
        int,
        decimal.Decimal("0.1"),
        decimal.Decimal("sNaN"),
        fractions.Fraction(1, 3),
        datetime.date(2024, 1, 1),
        np.float32(0.5),
        np.float64(0.5),
        np.int64(4),
        np.bool_(True),
        np.array(1.0),
        np.array([1.0, 2.0]),
        torch.tensor(1.0),
        torch.tensor([1.0, 2.0]),
        {1, 2},
        (1, 2),
        range(2),
    ]
)
NESTED = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
ANYTHING = NESTED | ODDITIES
