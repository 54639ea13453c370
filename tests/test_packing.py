"""Which tokens go through the model and where their values come back: small batches, worked out by hand."""

import pytest
import torch

from trl_gspo.packing import Cut, Pack, balance, cut, pack, row_tokens


# Three columns of prompt, four of completion. Row 0: two and three tokens; row 1: all seven, none of them wanted;
# row 2: one and two.
MASK = torch.tensor([[0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0]])
WANTED = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
IDS = torch.arange(100, 121).view(3, 7)
NOTHING = torch.zeros(3, 4, dtype=torch.bool)


def same(one, other):
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(one, other, strict=True))


# ---- packed


def test_rows_stand_one_after_the_other_without_padding():
    packed = pack(MASK, WANTED)
    # The last wanted token of a row predicts nothing that is wanted: it is left out too.
    assert packed.tokens.tolist() == [1, 2, 3, 4, 16, 17]
    assert packed.positions.tolist() == [[1, 2, 3, 4, 2, 3]]
    assert packed.lengths == (4, 2)
    assert packed.sources.tolist() == [1, 2, 3, 4, 5]
    assert packed.targets.tolist() == [0, 1, 2, 8, 9]
    assert packed.is_packed and not packed.is_stub
    assert packed.input_ids(IDS).tolist() == [[101, 102, 103, 104, 116, 117]]
    assert packed.next_tokens(IDS).tolist() == [[-100, 103, 104, 105, 117, 118]]


def test_tokens_that_are_not_wanted_stay_before_the_last_wanted_one():
    # A tool's answer in the middle, and a turn at the end that nothing needs.
    packed = pack(torch.ones(1, 7), torch.tensor([[True, False, True, False]]))
    assert packed.tokens.tolist() == [0, 1, 2, 3, 4]
    assert packed.sources.tolist() == [2, 4] and packed.targets.tolist() == [0, 2]
    ids = IDS[:1]
    assert packed.next_tokens(ids).tolist() == [[-100, -100, 103, -100, 105]]


def test_holes_in_the_attention_mask_are_padding():
    packed = pack(torch.tensor([[1, 0, 1, 1, 1, 0, 0]]), torch.tensor([[True, True, False, False]]))
    assert packed.tokens.tolist() == [0, 2, 3]
    # The column stays the position, as without packing.
    assert packed.positions.tolist() == [[0, 2, 3]]
    assert packed.sources.tolist() == [1, 2] and packed.targets.tolist() == [0, 1]


@pytest.mark.parametrize(
    "mask, wanted",
    [
        ([[1, 1, 1, 1], [0, 0, 1, 1]], [[1, 1], [1, 0]]),  # an empty prompt
        ([[1, 1, 1, 0, 1]], [[1, 0, 1]]),  # padding where it is predicted from
        ([[1, 1], [1, 1]], [[0, 1], [1, 1]]),  # no columns of the prompt: the token before is of another row
    ],
)
def test_wanted_token_without_one_before_cannot_be_packed(mask, wanted):
    for keeps_all in (False, True):
        assert pack(torch.tensor(mask), torch.tensor(wanted), keeps_all) is None


def test_later_tokens_of_an_empty_prompt_can_be_packed():
    packed = pack(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[False, True]]))
    assert packed.tokens.tolist() == [2] and packed.sources.tolist() == [0] and packed.targets.tolist() == [1]


def test_rows_of_equal_length_stay_rows():
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    wanted = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    packed = pack(mask, wanted)
    assert packed.lengths == (2, 2) and not packed.is_packed
    assert packed.positions.tolist() == [[1, 2], [0, 1]]
    assert packed.input_ids(torch.arange(15).view(3, 5)).tolist() == [[1, 2], [10, 11]]
    assert packed.next_tokens(torch.arange(15).view(3, 5)).tolist() == [[2, 3], [-100, 12]]
    assert packed.sources.tolist() == [0, 1, 3] and packed.targets.tolist() == [0, 1, 6]


def test_one_row_is_not_packed():
    assert not pack(MASK[:1], WANTED[:1]).is_packed


def test_all_tokens_can_be_kept():
    packed = pack(MASK, WANTED, keeps_all=True)
    assert packed.tokens.tolist() == [1, 2, 3, 4, 5, *range(7, 14), 16, 17, 18]
    assert packed.lengths == (5, 7, 3)
    assert packed.positions.tolist() == [[1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 2, 3, 4]]
    assert packed.sources.tolist() == [1, 2, 3, 12, 13] and packed.targets.tolist() == [0, 1, 2, 8, 9]
    nothing = pack(MASK, NOTHING, keeps_all=True)
    assert not nothing.is_stub and nothing.lengths == (5, 7, 3) and not nothing.sources.numel()


def test_a_stub_stands_for_nothing():
    for packed in (pack(MASK, NOTHING), pack(MASK * 0, NOTHING, keeps_all=True)):
        assert packed.is_stub and not packed.is_packed
        assert packed.tokens.tolist() == [0, 1] and packed.positions.tolist() == [[0, 1]] and packed.lengths == (2,)
        assert packed.next_tokens(IDS).tolist() == [[-100, -100]]
    values = torch.randn(1, 2, requires_grad=True)
    base = torch.arange(12.0).view(3, 4)
    scattered = packed.scatter(values, base)
    assert torch.equal(scattered, base)
    scattered.sum().backward()
    assert values.grad.tolist() == [[0, 0]]


def test_values_come_back_where_their_next_token_stands():
    values = torch.tensor([[9.0, 1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64, requires_grad=True)
    base = torch.full((3, 4), -1.0, requires_grad=True)
    packed = pack(MASK, WANTED)
    scattered = packed.scatter(values, base)
    assert scattered.dtype == torch.float64
    assert scattered.tolist() == [[1, 2, 3, -1], [-1, -1, -1, -1], [4, 5, -1, -1]]
    assert packed.scored(values, None).tolist() == [1, 2, 3, 4, 5]
    (scattered * torch.arange(1.0, 13).view(3, 4)).sum().backward()
    assert values.grad.tolist() == [[0, 1, 2, 3, 9, 10]]
    assert base.grad is None and (base == -1).all()


def test_garbage_in_padding_does_not_come_back():
    # Place 0 is a token of the prompt, which predicts nothing wanted.
    values = torch.tensor([[torch.nan, 1.0, 2.0, 3.0, 4.0, 5.0]], requires_grad=True)
    scattered = pack(MASK, WANTED).scatter(values, torch.zeros(3, 4))
    assert scattered.isfinite().all()
    scattered.sum().backward()
    assert values.grad.tolist() == [[0, 1, 1, 1, 1, 1]]
    garbage = torch.where(MASK.bool(), IDS, torch.tensor(10**9))
    assert torch.equal(pack(MASK, WANTED).input_ids(garbage), pack(MASK, WANTED).input_ids(IDS))
    assert torch.equal(pack(MASK, WANTED).next_tokens(garbage), pack(MASK, WANTED).next_tokens(IDS))


def test_values_may_have_more_dimensions():
    packed = pack(MASK[:1], WANTED[:1])
    values = torch.arange(4 * 2 * 3).view(1, 4, 2, 3)
    scattered = packed.scatter(values, torch.full((1, 4, 2, 3), -1))
    assert torch.equal(scattered[0, :3], values[0, 1:]) and (scattered[0, 3] == -1).all()


def test_masks_of_any_kind_are_taken():
    expected = pack(MASK, WANTED)
    assert same(pack(MASK.bool(), WANTED.long()), expected)
    assert same(pack(MASK.float(), WANTED.float()), expected)


def test_a_pack_moves_to_a_device():
    moved = pack(MASK, WANTED).to(torch.device("meta"))
    assert all(tensor.device.type == "meta" for tensor in moved if torch.is_tensor(tensor))
    assert isinstance(moved, Pack) and moved.lengths == (4, 2)


@pytest.mark.parametrize("seed", range(20))
def test_packed_rows_are_those_of_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, prompt, width = 6, 5, 9
    prompts = torch.randint(1, prompt + 1, (rows, 1), generator=generator)
    completions = torch.randint(0, width + 1, (rows, 1), generator=generator)
    is_prompt = torch.arange(prompt) >= prompt - prompts
    is_completion = torch.arange(width) < completions
    mask = torch.cat([is_prompt, is_completion], 1)
    wanted = is_completion & (torch.rand(rows, width, generator=generator) < 0.5)
    wanted[torch.rand(rows, generator=generator) < 0.4] = False
    ids = torch.randint(0, 1000, mask.shape, generator=generator)

    tokens, labels, lengths, places = [], [], [], []
    for row in range(rows):
        columns = [prompt + column for column in range(width) if wanted[row, column]]
        kept = [column for column in range(prompt + width) if columns and mask[row, column] and column < columns[-1]]
        tokens += [ids[row, column].item() for column in kept]
        labels += [ids[row, column + 1].item() if column + 1 in columns else -100 for column in kept]
        places += [(row, column - prompt) for column in columns]
        lengths.append(len(kept))
    assert row_tokens(mask, wanted) == lengths
    packed = pack(mask, wanted)
    if not tokens:
        assert packed.is_stub
        return
    assert packed.input_ids(ids).flatten().tolist() == tokens
    assert packed.next_tokens(ids).flatten().tolist() == labels
    assert list(packed.lengths) == [length for length in lengths if length]
    assert [divmod(target, width) for target in packed.targets.tolist()] == places


def test_tokens_of_each_row():
    assert row_tokens(MASK, WANTED) == [4, 0, 2]
    assert row_tokens(MASK, NOTHING) == [0, 0, 0]


# ---- cut


def test_rows_and_columns_of_padding_are_cut():
    # Column 0 is padding in rows 0 and 2, and the last wanted token stands in column 5.
    assert cut(MASK, WANTED) == Cut([0, 2], 1, 6, False)
    assert cut(MASK, WANTED, keeps_rows=True) == Cut([0, 1, 2], 0, 7, False)
    assert cut(MASK[[0, 2]], WANTED[[0, 2]], keeps_rows=True) == Cut([0, 1], 1, 6, False)
    assert cut(MASK[2:], WANTED[2:]) == Cut([0], 2, 5, False)
    # Nothing needs the tokens after the last wanted one.
    assert cut(MASK, torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])) == Cut([0], 1, 4, False)


def test_a_cut_keeps_the_column_before_the_completion():
    mask = torch.tensor([[0, 0, 0, 1, 1, 0]])
    wanted = torch.tensor([[True, True, False]])
    assert cut(mask, wanted) == Cut([0], 2, 5, False)
    assert cut(mask * 0, wanted * 0, keeps_rows=True) == Cut([0], 0, 4, False)


def test_what_is_scored_goes_into_the_columns_that_it_has():
    layout = Cut([0, 2], 1, 6, False)
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], requires_grad=True)
    base = torch.full((3, 4), -1.0, dtype=torch.float64, requires_grad=True)
    scattered = layout.scatter(values, base)
    assert scattered.dtype == torch.float32
    assert scattered.tolist() == [[1, 2, 3, -1], [-1, -1, -1, -1], [4, 5, 6, -1]]
    (scattered * torch.arange(1.0, 13).view(3, 4)).sum().backward()
    assert values.grad.tolist() == [[1, 2, 3], [9, 10, 11]]
    assert base.grad is None and (base == -1).all()
    # Of the rows that are here, those on tokens.
    mask = MASK[[0, 2], 1:6]
    assert layout.scored(values, mask).tolist() == [1, 2, 3, 4, 5]


def test_stub_of_a_cut_is_one_row_of_two_columns():
    layout = cut(MASK, NOTHING)
    assert layout == Cut([0], 2, 4, True)
    values = torch.tensor([[7.0]], requires_grad=True)
    base = torch.arange(12.0).view(3, 4)
    scattered = layout.scatter(values, base)
    assert torch.equal(scattered, base)
    scattered.sum().backward()
    assert values.grad.tolist() == [[0]]
    assert not layout.scored(values, torch.ones(1, 2)).numel()
    assert cut(MASK, NOTHING, keeps_rows=True) == Cut([0, 1, 2], 0, 7, False)


# ---- balance


@pytest.mark.parametrize(
    "lengths, parts, order",
    [
        # 5 | 4; 3 to the second, 2 to the first, 1 to the first of equals, and 0 where a place is left.
        ([5, 1, 3, 0, 2, 4], 2, [0, 1, 4, 2, 3, 5]),
        ([0, 0, 0, 0], 2, [0, 1, 2, 3]),
        # The long row shares its part with one that the other has no place for, and comes first.
        ([1, 1, 9, 1], 2, [2, 3, 0, 1]),
        ([1, 2, 3], 3, [2, 1, 0]),
        ([4, 2], 1, [0, 1]),
    ],
)
def test_balance_by_hand(lengths, parts, order):
    assert balance(lengths, parts) == order


def test_fullest_part_has_little_more_than_its_share():
    generator = torch.Generator().manual_seed(1)
    lengths = (5 + torch.randn(64, generator=generator)).exp().long().tolist()
    lengths[::2] = [0] * 32  # dead rows
    order = balance(lengths, 4)
    assert sorted(order) == list(range(64))

    def totals(order):
        return [sum(lengths[row] for row in order[start : start + 16]) for start in range(0, 64, 16)]

    assert totals(order) == sorted(totals(order), reverse=True)
    share = sum(lengths) / 4
    assert totals(order)[0] < 1.02 * share
    assert max(totals(range(64))) > 1.2 * share
