"""What holds of the experts that changed, for any choice of them."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import UNIFORM, drawn, masks

from trl_gspo.routing import changed_slots


@st.composite
def routings(draw):
    """Mask, experts and old experts: K different ones of E for each token and layer, and anything in padding."""
    mask, layers = draw(masks(max_rows=3, max_tokens=4)), draw(st.integers(1, 3))
    experts = draw(st.integers(1, 5))
    chosen = draw(st.integers(1, experts))

    def choice():
        # Of the first places of an order, by chance: different along K.
        choice = drawn(draw, (*mask.shape, layers, experts), UNIFORM).argsort(-1)[..., :chosen].to(torch.uint8)
        garbage = drawn(draw, mask.shape, torch.arange(256)).to(torch.uint8)
        return torch.where(mask[..., None, None], choice, garbage[..., None, None])

    return mask, choice(), choice()


@given(routings())
def test_changed_are_those_that_the_new_set_lacks(routing):
    mask, experts, old = routing
    changed, total = changed_slots(experts, old, mask)
    expected = sum(
        len(set(old[row, t, layer].tolist()) - set(experts[row, t, layer].tolist()))
        for row, t in mask.nonzero().tolist()
        for layer in range(old.size(2))
    )
    assert (changed, total) == (expected, mask.sum() * old.size(2) * old.size(3))


@given(routings(), st.data())
def test_their_order_is_nothing_and_the_two_policies_are_alike(routing, data):
    mask, experts, old = routing
    order = data.draw(st.permutations(range(experts.size(3))))
    changed, total = changed_slots(experts, old, mask)
    assert changed_slots(experts[..., order], old, mask) == (changed, total)
    assert changed_slots(old, experts, mask) == (changed, total)
    assert changed_slots(experts, experts, mask) == (0, total)
    assert 0 <= changed <= total
