"""The arithmetic of memory: by hand, against DeepSpeed's own estimate, and the tables of the docs."""

import math
from dataclasses import replace

import memory as script
import pytest
import torch
from tiny import make_model

from trl_gspo.memory import RESERVE, ModelShape, Run, estimate, model_shape


# 1,000 parameters, of which 100 are the head's; two layers of 400.
SHAPE = ModelShape(
    parameters=1000,
    head=100,
    largest_layer=400,
    quantizable=800,
    layers=2,
    hidden=8,
    intermediate=16,
    vocabulary=10,
    cache_width=4,
)
RUN = Run(rollout_rows=6, micro_batch_rows=2, prompt_tokens=3, completion_tokens=7)


def parts(**options):
    memory = estimate(SHAPE, replace(RUN, **options))
    return memory.weights, memory.gradients, memory.optimizer


# Full fine-tuning of 1,000 parameters on 4 GPUs: bytes of weights, gradients, and master weights with states.
@pytest.mark.parametrize(
    ("options", "expected", "floor"),
    [
        # float32: 4 + 4 + 8; autocast's copy, 2, and DDP's buckets, 4, are no part of the least.
        (dict(gpus=1, weight_bytes=4), (4000 + 2000, 4000, 8000), 16000),
        (dict(gpus=4, weight_bytes=4), (4000 + 2000, 4000 + 4000, 8000), 16000),
        # bfloat16 without an engine: Adam's states are bfloat16 too.
        (dict(gpus=1), (2000, 2000, 4000), 8000),
        # bfloat16 under ZeRO: 2 + 2 + 12. Stage 1 shares out the 12, stage 2 the gradients too, stage 3 all.
        (dict(gpus=4, engine="zero1"), (2000, 2000, 3000), 2000 + 500 + 3000),
        (dict(gpus=4, engine="zero2"), (2000, 500, 3000), 2000 + 500 + 3000),
        # A rollout gathers all weights, which are more than the gradients.
        (dict(gpus=4, engine="zero3"), (500, 500, 3000), 500 + 3000 + 2000),
        (dict(gpus=4, engine="zero3", gathers=False), (500, 500, 3000), 500 + 3000 + 500),
        (dict(gpus=4, engine="zero3", in_vllm=True), (500, 500, 3000), 500 + 3000 + 500),
        # One GPU gathers from nobody.
        (dict(gpus=1, engine="zero3"), (2000, 2000, 12000), 16000),
        (dict(gpus=4, engine="zero3", offloads_optimizer=True), (500, 0, 0), 500 + 2000),
        (dict(gpus=4, engine="zero3", offloads_optimizer=True, offloads_weights=True), (0, 0, 0), 2000),
        # accelerate makes FSDP2's weights float32, and gathers layers, not all.
        (dict(gpus=4, engine="fsdp2"), (1000, 1000, 2000), 4000),
        # A reference model is not in the least: TRL might load it elsewhere.
        (dict(gpus=1, weight_bytes=2, has_reference=True), (4000, 2000, 4000), 8000),
        # An optimizer that is not known may have no states, and use gradients up as they come.
        (dict(gpus=1, weight_bytes=4, state_bytes=None), (6000, 4000, 0), 4000),
        (dict(gpus=4, engine="zero2", state_bytes=None), (2000, 500, 1000), 2000),
        # An adapter of 10 parameters in float32 on weights in bfloat16, 900 or 200 of which are not packed in 4 bits.
        (dict(gpus=1, trained=10), (2000 + 40 + 20, 40, 80), 2000 + 40 + 120),
        (dict(gpus=1, trained=10, bits=4), (400 + 400 + 40 + 20, 40, 80), 800 + 40 + 120),
        (dict(gpus=4, engine="zero3", trained=10), (505, 5, 30), 505 + 30 + 2020),
    ],
)
def test_parts_are_those_worked_out_by_hand(options, expected, floor):
    assert parts(**options) == pytest.approx(expected)
    assert estimate(SHAPE, replace(RUN, **options)).floor == pytest.approx(floor)


def test_cache_and_activations_are_those_worked_out_by_hand():
    memory = estimate(SHAPE, RUN)
    # 6 sequences of 10 tokens, 2 layers of 4 elements of 2 bytes.
    assert memory.cache == 6 * 10 * 2 * 4 * 2
    assert memory.prefill == 6 * 3 * (4 * 8 + 3 * 16) * 2
    # 2 sequences of 10 tokens: what 2 layers hand on, and the inside of one, forward and backward.
    one_layer = 20 * (8 * 8 + 4 * 16) * 2
    assert memory.activations == 2 * 20 * 8 * 2 + 2 * one_layer
    assert estimate(SHAPE, replace(RUN, is_checkpointed=False)).activations == 2 * one_layer + 2 * one_layer
    # A tile of 20 tokens in float32, and the gradient of the head's 100 weights in float32.
    assert memory.logits == 20 * 10 * 4 + 4 * 100
    assert estimate(SHAPE, replace(RUN, has_fused_head=False)).logits == 2 * 7 * 10 * 10
    assert memory.rollout == 2000 + 2000 + 4000 + RESERVE + max(memory.cache, memory.prefill)
    assert memory.update == 2000 + 2000 + 4000 + RESERVE + memory.activations + memory.logits
    assert memory.peak == max(memory.rollout, memory.update)
    in_vllm = estimate(SHAPE, replace(RUN, in_vllm=True, vllm_bytes=77))
    assert (in_vllm.cache, in_vllm.prefill, in_vllm.reserve) == (0, 0, RESERVE + 77)


def test_offloaded_states_are_in_the_host_memory():
    # Gradients, master weights and two states in float32.
    assert estimate(SHAPE, replace(RUN, gpus=4, engine="zero3", offloads_optimizer=True)).host == 16000
    assert estimate(SHAPE, replace(RUN, gpus=4, engine="zero3")).host == 0


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("gpus", [1, 2, 8])
@pytest.mark.parametrize("offloads", [False, True])
def test_the_least_is_less_than_deepspeed_says(stage, gpus, offloads):
    """DeepSpeed's own estimate is of model states alone, with gradients in float32: 18 bytes a parameter, not 16."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    shape = SHAPE._replace(parameters=7_000_000_000, largest_layer=200_000_000)
    run = replace(RUN, gpus=gpus, engine=f"zero{stage}", offloads_optimizer=offloads, gathers=False)
    if stage == 3:
        theirs = zero3(shape.parameters, shape.largest_layer, gpus, cpu_offload=offloads, cpu_offload_params=False)[1]
    else:
        theirs = zero2(shape.parameters, gpus, cpu_offload=offloads)[1]
    ours = estimate(shape, run)
    assert 0.55 * theirs < ours.floor <= theirs
    assert ours.floor < ours.peak


@pytest.mark.parametrize("is_moe", [False, True])
def test_shape_is_that_of_the_model(is_moe, tokenizer):
    model = make_model(tokenizer, moe=is_moe)
    with torch.device("meta"):
        empty = type(model)(model.config)
    shape = model_shape(empty, empty.config)
    assert shape == model_shape(model, model.config)
    assert shape.parameters == model.num_parameters()
    assert shape.head == shape.vocabulary * 32
    assert shape.largest_layer == sum(part.numel() for part in model.model.layers[0].parameters())
    # Hidden 32, 2 layers, 2 heads of 8 for keys and values; 2 of 4 experts of 32, or an MLP of 64.
    assert (shape.layers, shape.hidden, shape.intermediate, shape.cache_width) == (2, 32, 64, 2 * 2 * 8)
    if not is_moe:
        # Attention 2 x 32 x 32 + 2 x 32 x 16, MLP 3 x 32 x 64, in 2 layers.
        assert shape.quantizable == 2 * (2 * 1024 + 2 * 512 + 3 * 2048)


def test_cache_is_as_large_as_transformers_makes_it(tokenizer):
    model = make_model(tokenizer, layers=3)
    output = model(torch.ones(5, 11, dtype=torch.long), use_cache=True)
    tensors = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
    run = replace(RUN, rollout_rows=5, prompt_tokens=4, completion_tokens=7, is_half=False, weight_bytes=4)
    cache = estimate(model_shape(model, model.config), run).cache
    assert cache == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture(scope="module")
def models():
    return script.read_models()


def test_models_of_the_tables_have_their_known_sizes(models):
    # As their model cards have it, rounded: 0.49B, 1.54B, 7.61B, 14.7B, 32.5B, 30.5B.
    sizes = {name: shape.parameters / 1e9 for name, (shape, _) in models.items()}
    known = [0.49, 1.54, 7.61, 14.8, 32.8, 30.5]
    assert list(sizes.values()) == pytest.approx(known, rel=0.01)


def test_the_tables_of_the_docs_are_those_the_command_prints(models):
    text = script.DOCS.read_text()
    begin, end = text.index(script.BEGIN) + len(script.BEGIN), text.index(script.END)
    expected = "\n".join([*script.choices(models, 32), *script.parts(models, 32)])
    assert text[begin:end].strip() == expected.strip()


def test_more_gpus_and_larger_ones_never_need_a_slower_way(models):
    ways = ["full", *(name for name, _ in script.WAYS), "no"]
    for shape, adapter in models.values():
        # The order of a larger card is by its speed; on one GPU there is no other to gather from.
        ranks = [
            [ways.index(script.choose(shape, adapter, gpus, card, 32)) for gpus in script.GPUS[1:]]
            for card in script.CARDS
        ]
        for by_gpus in ranks:
            assert by_gpus == sorted(by_gpus, reverse=True)
        for by_card in zip(*ranks, strict=True):
            assert list(by_card) == sorted(by_card, reverse=True)


def test_a_way_is_chosen_only_where_it_fits(models):
    shape, adapter = models["Qwen2.5-7B"]
    for card in script.CARDS:
        for gpus in script.GPUS:
            name = script.choose(shape, adapter, gpus, card, 32)
            found = dict(script.runs(gpus, adapter, 32))
            assert name == "no" or estimate(shape, found[name]).peak <= card * script.USABLE
            earlier = list(found)[: list(found).index(name)] if name in found else list(found)
            assert all(estimate(shape, found[other]).peak > card * script.USABLE for other in earlier)
    assert math.isclose(script.USABLE, 0.92 * 1024**3)
