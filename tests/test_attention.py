"""Attention over packed rows against the attention of each row alone."""

import threading

import pytest
import torch
from tiny import make_model
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, eager_attention_forward

from trl_gspo.attention import packed_arguments, row_wise, without_mask


LENGTHS = (3, 1, 5)
CPU = torch.device("cpu")
# What is given to `row_wise`: the eager attention is that of the layer's own file.
KINDS = {"sdpa": sdpa_attention_forward, "eager": None}


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return make_model(tokenizer).eval()


@pytest.fixture
def layer(model):
    return Qwen3Attention(model.config, 0).eval()


def heads(count, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, sum(LENGTHS), 8, generator=generator).to(dtype)


def slow_attention(query, key, value, window=None, scaling=8**-0.5):
    """One row, one head and one token after the other, in float64; two heads of queries for one of keys."""
    _, count, tokens, size = query.shape
    output = torch.zeros(1, tokens, count, size, dtype=torch.float64)
    query, key, value = query.double(), key.double(), value.double()
    for head in range(count):
        for token in range(tokens):
            seen = range(0 if window is None else max(token - window + 1, 0), token + 1)
            scores = torch.stack([scaling * query[0, head, token] @ key[0, head // 2, other] for other in seen])
            output[0, token, head] = scores.softmax(0) @ value[0, head // 2, list(seen)]
    return output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "window, expected",
    [
        (None, [1, 1.5, 2, 10, 4, 4.5, 5, 5.5, 6]),
        (2, [1, 1.5, 2.5, 10, 4, 4.5, 5.5, 6.5, 7.5]),
        (1, [1, 2, 3, 10, 4, 5, 6, 7, 8]),
        (5, [1, 1.5, 2, 10, 4, 4.5, 5, 5.5, 6]),  # of the longest row
    ],
)
def test_each_token_sees_those_before_it_in_its_row(kind, window, expected, layer):
    # Without keys all tokens weigh the same, and the output is the mean of the values that are seen.
    value = torch.tensor([1.0, 2, 3, 10, 4, 5, 6, 7, 8]).view(1, 1, 9, 1).expand(1, 2, 9, 8)
    output, weights = row_wise(KINDS[kind])(
        layer, heads(4), torch.zeros(1, 2, 9, 8), value, None,
        scaling=1.0, sliding_window=window, packed_row_lengths=LENGTHS,
    )  # fmt: skip
    assert weights is None
    assert output.shape == (1, 9, 4, 8)
    for place, mean in enumerate(expected):
        assert torch.allclose(output[0, place], torch.tensor(float(mean)), rtol=1e-6), place


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 2, 9])
def test_rows_are_those_of_a_loop(kind, window, layer):
    query, key, value = heads(4), heads(2, seed=1), heads(2, seed=2)
    output, _ = row_wise(KINDS[kind])(
        layer, query, key, value, None, scaling=8**-0.5, sliding_window=window, packed_row_lengths=LENGTHS
    )
    rows = zip(*(tensor.split(LENGTHS, 2) for tensor in (query, key, value)), strict=True)
    expected = torch.cat([slow_attention(*row, window) for row in rows], 1)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_to_the_last_bit_those_of_a_row_alone(kind, dtype, layer):
    query, key, value = heads(4, dtype=dtype), heads(2, seed=1, dtype=dtype), heads(2, seed=2, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    weights = torch.randn(1, sum(LENGTHS), 4, 8, generator=torch.Generator().manual_seed(3))
    output, _ = row_wise(KINDS[kind])(layer, *leaves, None, scaling=0.3, packed_row_lengths=LENGTHS)
    gradients = torch.autograd.grad((output * weights).sum(), leaves)

    alone, expected = [], [[] for _ in leaves]
    start = 0
    for length in LENGTHS:
        row = [tensor.detach()[:, :, start : start + length].clone().requires_grad_() for tensor in leaves]
        if kind == "sdpa":
            alone.append(sdpa_attention_forward(layer, *row, None, scaling=0.3)[0])
        else:
            mask = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
            alone.append(eager_attention_forward(layer, *row, mask, scaling=0.3)[0])
        loss = (alone[-1] * weights[:, start : start + length]).sum()
        for kept, gradient in zip(expected, torch.autograd.grad(loss, row), strict=True):
            kept.append(gradient)
        start += length
    assert torch.equal(output, torch.cat(alone, 1))
    for gradient, rows in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, torch.cat(rows, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_other_rows_change_nothing(kind, layer):
    def middle(query, key, value):
        attend = row_wise(KINDS[kind])
        return attend(layer, query, key, value, None, scaling=0.3, packed_row_lengths=LENGTHS)[0][:, 3:4]

    first = [heads(4), heads(2, seed=1), heads(2, seed=2)]
    other = [torch.cat([t[:, :, :3] * 1e3, t[:, :, 3:4], t[:, :, 4:] + torch.inf], 2) for t in first]
    assert torch.equal(middle(*first), middle(*other))


def test_a_call_without_rows_goes_to_the_function_of_before(layer):
    calls = []

    def attention(*args, **kwargs):
        calls.append((args, kwargs))
        return "output", "weights"

    query, mask = heads(4), torch.ones(1, 1, 9, 9)
    assert row_wise(attention)(layer, query, query, query, mask, scaling=0.3, dropout=0.1) == ("output", "weights")
    (((module, *tensors), options),) = calls
    assert module is layer and tensors[0] is query and tensors[3] is mask
    assert options == {"scaling": 0.3, "dropout": 0.1}
    # That of the layer's file.
    expected = eager_attention_forward(layer, heads(4), heads(2), heads(2), mask, scaling=0.3)
    found = row_wise(None)(layer, heads(4), heads(2), heads(2), mask, scaling=0.3)
    assert all(map(torch.equal, found, expected))


def test_options_reach_each_row_and_the_lengths_do_not():
    seen = []

    def attention(module, query, key, value, mask, **kwargs):
        seen.append((query.size(2), mask, kwargs))
        return query.transpose(1, 2), None

    query = heads(4)
    output, _ = row_wise(attention)(
        nn.Identity(), query, query, query, torch.ones(1), sliding_window=5, packed_row_lengths=LENGTHS
    )
    # No mask, because no row is longer than the window: these kernels are causal by themselves.
    assert seen == [(length, None, {"sliding_window": 5}) for length in LENGTHS]
    assert torch.equal(output, query.transpose(1, 2))


# ---- registered with transformers


def test_arguments_of_each_implementation():
    for implementation in KINDS:
        assert packed_arguments(implementation, LENGTHS, CPU) == {"packed_row_lengths": LENGTHS}
    assert packed_arguments("flex_attention", LENGTHS, CPU) == {}
    for implementation in ("flash_attention_2", "flash_attention_3"):
        arguments = packed_arguments(implementation, LENGTHS, CPU)
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            assert arguments[name].dtype == torch.int32 and arguments.pop(name).tolist() == [0, 3, 4, 9]
        assert arguments == {"max_length_q": 5, "max_length_k": 5}
    with pytest.raises(ValueError, match="attn_implementation='paged'"):
        packed_arguments("paged", LENGTHS, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_functions_are_wrapped_once(kind):
    packed_arguments(kind, LENGTHS, CPU)
    functions = ALL_ATTENTION_FUNCTIONS.get(kind), ALL_MASK_ATTENTION_FUNCTIONS[kind]
    packed_arguments(kind, (2, 2), CPU)
    assert functions == (ALL_ATTENTION_FUNCTIONS.get(kind), ALL_MASK_ATTENTION_FUNCTIONS[kind])


def make_mask(model):
    embeddings, padding = torch.zeros(1, 4, 32), torch.tensor([[0, 1, 1, 1]])
    return create_causal_mask(model.config, embeddings, padding, None)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_made_again_afterwards(kind, model):
    model.set_attn_implementation(kind)
    expected = make_mask(model)
    packed_arguments(kind, LENGTHS, CPU)
    others = []
    with pytest.raises(RuntimeError, match="of the model"), without_mask():
        assert make_mask(model) is None
        with without_mask():
            pass
        assert make_mask(model) is None
        thread = threading.Thread(target=lambda: others.append(make_mask(model)))
        thread.start()
        thread.join()
        raise RuntimeError("of the model")
    assert expected.shape == (1, 1, 4, 4)
    assert torch.equal(make_mask(model), expected)
    assert torch.equal(others[0], expected)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_gives_what_it_gives_for_rows_alone(kind, checkpoints, model):
    model.set_attn_implementation(kind)
    ids = torch.randint(7, 100, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(4, 4 + length) for length in LENGTHS]).unsqueeze(0)
    model.train()  # checkpoints are made in training alone
    alone = [
        model(input_ids=row, position_ids=place, use_cache=False).logits
        for row, place in zip(ids.split(LENGTHS, 1), positions.split(LENGTHS, 1), strict=True)
    ]
    torch.cat(alone, 1).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    masks = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    with without_mask():
        arguments = packed_arguments(kind, LENGTHS, CPU)
        packed = model(input_ids=ids, position_ids=positions, use_cache=False, **arguments).logits
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=2e-6)
    packed.square().sum().backward()
    assert masks == [None] * (4 if checkpoints else 2)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_what_it_was(kind, model):
    model.set_attn_implementation(kind)
    ids = torch.tensor([[0, 0, 20, 21, 22], [30, 31, 32, 33, 34]])

    def generate():
        return model.generate(
            input_ids=ids, attention_mask=(ids > 0).long(), max_new_tokens=6, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip

    packed_arguments(kind, LENGTHS, CPU)
    wrapped = generate()
    originals = ALL_ATTENTION_FUNCTIONS._local_mapping.pop(kind), ALL_MASK_ATTENTION_FUNCTIONS._local_mapping.pop(kind)
    try:
        expected = generate()
    finally:
        ALL_ATTENTION_FUNCTIONS[kind], ALL_MASK_ATTENTION_FUNCTIONS[kind] = originals
    assert torch.equal(wrapped.sequences, expected.sequences)
    assert all(map(torch.equal, wrapped.logits, expected.logits))
