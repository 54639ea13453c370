"""What holds of packing, cutting and balancing for any batch: every wanted value comes from its own row, and back."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import BOOLEANS, UNIFORM, drawn
from test_scorer import needs_fused_head
from test_trainer import build
from tiny import make_model
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from trl_gspo import GSPOTrainer
from trl_gspo.attention import row_wise
from trl_gspo.packing import Cut, balance, cut, pack, row_tokens


class Batch(NamedTuple):
    """`attention_mask`, `(B, S)`, and of its last T columns `is_wanted`, `(B, T)`."""

    attention_mask: Tensor
    is_wanted: Tensor

    @property
    def prompt(self):
        return self.attention_mask.size(1) - self.is_wanted.size(1)


def of(attention_mask, is_wanted):
    return Batch(torch.tensor(attention_mask).bool(), torch.tensor(is_wanted).bool())


@st.composite
def batches(draw, has_holes=True, min_prompt=1, can_be_packed=False):
    """
    As TRL lays rows out, padded on both sides, or with holes anywhere; wanted are any tokens of the completion, or any
    that have a token before them.
    """
    rows, prompt, size = draw(st.integers(1, 4)), draw(st.integers(min_prompt, 3)), draw(st.integers(1, 5))
    attention_mask = torch.zeros(rows, prompt + size, dtype=torch.bool)
    if has_holes and draw(st.booleans()):
        attention_mask = drawn(draw, attention_mask.shape, BOOLEANS)
    else:
        for row in attention_mask:
            row[draw(st.integers(0, prompt)) : prompt + draw(st.integers(0, size))] = True
    completion = attention_mask[:, prompt:]
    if can_be_packed:
        completion = completion & attention_mask[:, prompt - 1 : -1]
    which = draw(st.sampled_from(["some", "some", "some", "some", "all", "none"]))
    if which == "some":
        completion = completion & drawn(draw, completion.shape, BOOLEANS)
    return Batch(attention_mask, completion & (which != "none"))


def kept_of(batch, keeps_all):
    """Of each row the columns that go through the model, one by one."""
    kept = []
    for attended, wanted in zip(batch.attention_mask.tolist(), batch.is_wanted.tolist(), strict=True):
        last = max((batch.prompt + t for t, is_wanted in enumerate(wanted) if is_wanted), default=-1)
        kept.append([s for s, is_token in enumerate(attended) if is_token and (keeps_all or s < last)])
    return kept


def can_be_packed(batch, kept):
    wanted = batch.is_wanted.nonzero().tolist()
    return all(batch.prompt + t - 1 in kept[row] for row, t in wanted)


@given(batches(min_prompt=0), st.booleans())
@example(of([[0, 1]], [[1]]), False)  # an empty prompt, and nothing else in the batch
def test_tokens_of_a_pack_are_those_before_the_last_wanted_one(batch, keeps_all):
    assume(batch.attention_mask.numel() > 1)
    kept = kept_of(batch, keeps_all)
    packed, columns = pack(*batch, keeps_all), batch.attention_mask.size(1)
    if not can_be_packed(batch, kept):
        assert packed is None
        return
    if not any(kept):
        assert packed.is_stub and not batch.is_wanted.any()
        return
    assert not packed.is_stub
    assert packed.tokens.tolist() == [row * columns + s for row, places in enumerate(kept) for s in places]
    assert packed.lengths == tuple(len(places) for places in kept if places)
    assert packed.positions.flatten().tolist() == [s for places in kept for s in places]
    assert packed.positions.size(0) == (len(packed.lengths) if len(set(packed.lengths)) == 1 else 1)
    if not keeps_all:
        assert row_tokens(*batch) == [len(places) for places in kept]
    # Where a wanted token stands, and the one before it in the same row.
    row, t = batch.is_wanted.nonzero(as_tuple=True)
    assert torch.equal(packed.targets, row * batch.is_wanted.size(1) + t)
    assert torch.equal(packed.tokens[packed.sources] + 1, row * columns + batch.prompt + t)


def check_round_trip(layout, batch, values, base, place, is_scored):
    """
    `values`, of the layout's shape, were at `place` of `(B, S)`: what is scored is what stands one column before, and
    the gradient of each value is what its token has, once.
    """
    values = values.clone().requires_grad_()
    scattered = layout.scatter(values, base)
    before = place[:, batch.prompt - 1 : -1]
    assert torch.equal(scattered, torch.where(is_scored, before, base))
    weights = torch.arange(1.0, base.numel() + 1, dtype=base.dtype).view(base.shape)
    (scattered * weights).sum().backward()
    by_place = torch.zeros_like(place)
    by_place[:, batch.prompt - 1 : -1] = torch.where(is_scored, weights, 0.0)
    return values.grad, by_place


@given(batches(can_be_packed=True), st.booleans())
def test_a_pack_brings_each_value_back_once(batch, keeps_all):
    packed = pack(*batch, keeps_all)
    if packed.is_stub:
        return
    place = torch.arange(1.0, batch.attention_mask.numel() + 1, dtype=torch.float64).view(batch.attention_mask.shape)
    base = -torch.arange(1.0, batch.is_wanted.numel() + 1, dtype=torch.float64).view(batch.is_wanted.shape)
    values = packed.input_ids(place)
    found, expected = check_round_trip(packed, batch, values, base, place, batch.is_wanted)
    assert torch.equal(found, packed.input_ids(expected))
    assert found.sum() == expected.sum()
    # What the head has to predict at each place.
    ids = torch.arange(batch.attention_mask.numel()).view(batch.attention_mask.shape)
    labels = packed.next_tokens(ids).flatten()
    assert torch.equal(labels[packed.sources], ids[:, batch.prompt :][batch.is_wanted])
    assert (labels != -100).sum() == batch.is_wanted.sum()


@given(batches(can_be_packed=True), st.data())
def test_a_pack_of_rows_in_another_order_holds_the_same_rows(batch, data):
    order = data.draw(st.permutations(range(len(batch.is_wanted))))
    one, other = pack(*batch), pack(*(mask[order] for mask in batch))
    assert one.is_stub == other.is_stub
    if one.is_stub:
        return
    columns = batch.attention_mask.size(1)

    def rows(packed, names):
        return sorted((names[token // columns], token % columns) for token in packed.tokens.tolist())

    assert rows(one, range(len(order))) == rows(other, order)
    assert sorted(one.lengths) == sorted(other.lengths)


@given(batches(), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))
def test_padding_adds_nothing_to_a_pack(batch, left, right, rows):
    padded = Batch(
        torch.nn.functional.pad(batch.attention_mask, (left, right, 0, rows)),
        torch.nn.functional.pad(batch.is_wanted, (0, right, 0, rows)),
    )
    one, other = pack(*batch), pack(*padded)
    assert (one is None) == (other is None)
    if one is not None:
        assert (one.lengths, one.is_stub) == (other.lengths, other.is_stub)
        assert torch.equal(one.sources, other.sources)
        assert one.is_stub or torch.equal(one.positions + left, other.positions)


@given(batches(), st.booleans())
def test_a_cut_is_the_smallest_rectangle_and_brings_each_value_back_once(batch, keeps_rows):
    layout = cut(*batch, keeps_rows)
    rows = list(range(len(batch.is_wanted))) if keeps_rows else batch.is_wanted.any(1).nonzero().flatten().tolist()
    if not rows:
        assert layout == Cut([0], batch.prompt - 1, batch.prompt + 1, True)
        return
    assert layout.rows == rows and not layout.is_stub
    attended = [s for row in rows for s, is_token in enumerate(batch.attention_mask[row].tolist()) if is_token]
    wanted = [batch.prompt + t for _, t in batch.is_wanted.nonzero().tolist()]
    # The column before the completion predicts its first token.
    assert layout.first == min([*attended[:1], *attended, batch.prompt - 1] if attended else [0])
    last = max(attended, default=0) if keeps_rows else max(wanted)
    assert layout.end == max(last, batch.prompt) + 1

    size = layout.end - batch.prompt
    is_scored = torch.zeros_like(batch.is_wanted)
    is_scored[rows, :size] = True
    assert (is_scored | ~batch.is_wanted).all()
    place = torch.arange(1.0, batch.attention_mask.numel() + 1, dtype=torch.float64).view(batch.attention_mask.shape)
    base = -torch.arange(1.0, batch.is_wanted.numel() + 1, dtype=torch.float64).view(batch.is_wanted.shape)
    values = place[rows, batch.prompt - 1 : layout.end - 1]
    found, expected = check_round_trip(layout, batch, values, base, place, is_scored)
    assert torch.equal(found, expected[rows, batch.prompt - 1 : layout.end - 1])


@st.composite
def lengths_and_parts(draw):
    parts, size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    length = st.integers(0, 12) | st.sampled_from([0, 1, 1000, 4096])
    return draw(st.lists(length, min_size=parts * size, max_size=parts * size)), parts


@given(lengths_and_parts())
@example(([3, 3, 0, 2, 2, 2], 2))
def test_balance_moves_every_row_once_and_never_makes_the_fullest_fuller(case):
    lengths, parts = case
    order, size = balance(lengths, parts), len(lengths) // parts
    assert sorted(order) == list(range(len(lengths)))

    def totals(order):
        return [sum(lengths[row] for row in order[start : start + size]) for start in range(0, len(order), size)]

    balanced = totals(order)
    assert balanced == sorted(balanced, reverse=True)
    assert balanced[0] <= max(totals(range(len(lengths))))
    # The last row went where the fewest tokens were.
    assert balanced[0] <= sum(lengths) / parts + max(lengths)
    for start in range(0, len(order), size):
        assert order[start : start + size] == sorted(order[start : start + size])


# ---- attention


def masked_attention(query, key, value, lengths, window):
    """All packed rows at once, in float64, with a mask of the square of their length."""
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    places = torch.arange(len(rows))
    distance = places.unsqueeze(1) - places
    is_seen = (rows.unsqueeze(1) == rows) & (distance >= 0) & (distance < (window or len(rows)))
    key, value = (tensor.repeat_interleave(query.size(1) // key.size(1), 1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3) * query.size(3) ** -0.5).masked_fill(~is_seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.fixture(scope="module")
def layer(tokenizer):
    return Qwen3Attention(make_model(tokenizer).config, 0).eval()


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.none() | st.integers(1, 6),
    st.sampled_from([sdpa_attention_forward, None]),
    st.data(),
)
def test_packed_rows_see_themselves_alone(layer, lengths, window, attention, data):
    tokens = sum(lengths)
    inputs = [4 * drawn(data.draw, (1, count, tokens, 2), UNIFORM) for count in (4, 2, 2)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    options = dict(scaling=2**-0.5, sliding_window=window, packed_row_lengths=tuple(lengths))
    output, _ = row_wise(attention)(layer, *inputs, None, **options)
    expected = masked_attention(*inputs, lengths, window)
    # The eager attention of transformers has its softmax in float32.
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=2e-6)
    weights = torch.arange(1.0, output.numel() + 1, dtype=torch.float64).view(output.shape)
    gradients = (torch.autograd.grad((values * weights).sum(), inputs) for values in (output, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=2e-6 * weights.sum().item())


# ---- the scorer, around a model


@pytest.fixture(scope="module")
def scorer_and_model(tokenizer, dataset, tmp_path_factory):
    torch.manual_seed(0)
    trainer = build(
        GSPOTrainer,
        tmp_path_factory.mktemp("scorer"),
        model=make_model(tokenizer),
        processing_class=tokenizer,
        train_dataset=dataset,
        pack_live_tokens=True,
    )
    trainer._find_way()
    return trainer._scorer, trainer.model.eval()


@needs_fused_head
@given(batches(has_holes=False, can_be_packed=True), st.sampled_from(["packed", "cut"]), st.booleans(), st.data())
def test_what_is_wanted_has_the_log_probs_and_gradient_of_the_whole_batch(
    scorer_and_model, batch, way, needs_all, data
):
    scorer, model = scorer_and_model
    scorer.way = way
    layout = scorer.layout(*batch, needs_all=needs_all)  # `None` where there is nothing to save
    ids = drawn(data.draw, batch.attention_mask.shape, torch.arange(7, model.config.vocab_size))
    garbage = torch.where(batch.attention_mask, ids, 3)
    size, base = batch.is_wanted.size(1), -torch.rand(batch.is_wanted.shape)

    def evaluate(ids, layout):
        model.zero_grad()
        logps = scorer(model, ids, batch.attention_mask.long(), size, layout, logps=base)[0]
        weights = torch.linspace(1, 2, logps.numel()).view(logps.shape)
        (logps * weights * batch.is_wanted).sum().backward()
        return logps.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    (expected, expected_gradients), (found, gradients) = evaluate(ids, None), evaluate(garbage, layout)
    torch.testing.assert_close(found[batch.is_wanted], expected[batch.is_wanted], rtol=0, atol=5e-6)
    # Where all tokens are alike, the gradient of queries and keys is 0, and what either has there is rounding: in
    # float64 it is 1e-17 of that of all parameters together, in float32 up to 1e-7.
    whole = sum(gradient.square().sum() for gradient in expected_gradients).sqrt()
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-6 * whole
    if way == "packed" and layout is not None:
        assert torch.equal(found[~batch.is_wanted], base[~batch.is_wanted])
