"""Routers found, the experts they chose, and how many of them changed."""

import statistics
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3PreTrainedModel,
    GptOssConfig,
    JetMoeConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)
from trl.trainer import utils

from trl_gspo.routing import RoutingRecorder, changed_slots, find_routers


VOCABULARY = 64
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    pad_token_id=0,
    num_experts_per_tok=2,
)
DEEPSEEK = dict(
    n_routed_experts=8,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
)


def build(config_class, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**SHAPE | options)).float()
    for name, parameter in model.named_parameters():
        if "gate" in name or "router" in name:  # gpt-oss starts its routers empty; let none be near a tie
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def model():
    return build(Qwen3MoeConfig, num_experts=6)


@pytest.fixture
def input_ids():
    return torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))


def record(model, input_ids, **arguments):
    recorder = RoutingRecorder(find_routers(model))
    with recorder:
        model(input_ids, **arguments)
    return recorder.experts(*input_ids.shape)


# ---- which experts


@pytest.mark.parametrize(
    "config_class, options",
    [
        (Qwen3MoeConfig, dict(num_experts=6)),
        (Qwen3MoeConfig, dict(num_experts=6, decoder_sparse_step=2)),
        (MixtralConfig, dict(num_local_experts=6)),
        (GptOssConfig, dict(num_local_experts=6)),
        (OlmoeConfig, dict(num_experts=6)),
    ],
    ids=["qwen3_moe", "qwen3_moe_every_second_layer", "mixtral", "gpt_oss", "olmoe"],
)
def test_experts_are_those_of_the_router_logits(config_class, options, input_ids):
    model = build(config_class, **options)
    experts = record(model, input_ids)
    router_logits = model(input_ids, output_router_logits=True).router_logits
    assert len(router_logits) == (1 if "decoder_sparse_step" in options else 3)
    assert experts.shape == (3, 7, len(router_logits), 2) and experts.dtype == torch.uint8
    for layer, logits in enumerate(router_logits):
        expected = logits.view(3, 7, 6).argsort(descending=True)[..., :2]
        assert torch.equal(experts[:, :, layer].long().sort().values, expected.sort().values)


@pytest.mark.skipif(
    "router_logits" not in DeepseekV3PreTrainedModel._can_record_outputs,
    reason="this version of transformers does not declare DeepSeek-V3's routers",
)
def test_experts_of_limited_groups_with_a_bias(input_ids):
    # Source: DeepSeek-V3, https://huggingface.co/papers/2412.19437, section 2.1.2: the bias decides who is chosen. Of
    # 4 groups of 2 experts the best 2 may be chosen from.
    model = build(DeepseekV3Config, **DEEPSEEK)
    routers = find_routers(model)
    for router in routers:
        router.e_score_correction_bias.normal_(std=0.5, generator=torch.Generator().manual_seed(2))
    logits = []
    for router in routers:
        router.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    experts = record(model, input_ids)
    assert len(routers) == 2 and experts.shape == (3, 7, 2, 2)  # the first layer is dense
    is_plain_top_k = []
    for layer, router in enumerate(routers):
        for chosen, row in zip(experts[:, :, layer].flatten(0, 1).tolist(), logits[layer], strict=True):
            scores = (row.sigmoid() + router.e_score_correction_bias).tolist()
            groups = sorted(range(4), key=lambda group: -(scores[2 * group] + scores[2 * group + 1]))[:2]
            allowed = [expert for group in groups for expert in (2 * group, 2 * group + 1)]
            assert set(chosen) == set(sorted(allowed, key=lambda expert: -scores[expert])[:2])
            is_plain_top_k.append(set(chosen) == set(row.topk(2).indices.tolist()))
    assert not all(is_plain_top_k)


def test_more_than_256_experts_need_two_bytes(input_ids):
    experts = record(build(Qwen3MoeConfig, num_experts=300, num_experts_per_tok=4), input_ids)
    assert experts.dtype == torch.int16 and 255 < experts.max() < 300 and experts.min() >= 0


def test_chunks_of_a_batch_follow_each_other(model, input_ids):
    recorder = RoutingRecorder(find_routers(model))
    with recorder:
        model(input_ids[:2])
        model(input_ids[2:])
    assert torch.equal(recorder.experts(3, 7), record(model, input_ids))


def test_packed_rows_are_one_row(model, input_ids):
    lengths = [5, 7, 2]
    packed = torch.cat([row[:length] for row, length in zip(input_ids, lengths, strict=True)]).unsqueeze(0)
    position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    experts = record(model, packed, position_ids=position_ids, use_cache=False)
    apart = [record(model, row[None, :length])[0] for row, length in zip(input_ids, lengths, strict=True)]
    assert torch.equal(experts, torch.cat(apart).unsqueeze(0))


def test_recorder_forgets_what_it_gave(model, input_ids):
    recorder = RoutingRecorder(find_routers(model))
    with recorder:
        model(input_ids)
    first = recorder.experts(3, 7)
    with pytest.raises(ValueError, match="heard from no router"):
        recorder.experts(3, 7)
    model(input_ids.flip(1))  # outside: nobody listens
    with recorder:
        model(input_ids)
    assert torch.equal(recorder.experts(3, 7), first)
    with recorder, pytest.raises(RuntimeError, match="stop"):
        model(input_ids)
        raise RuntimeError("stop")
    with recorder:  # what was never fetched is not in the next
        model(input_ids[:1])
    assert torch.equal(recorder.experts(1, 7), first[:1])


# ---- under what surrounds a model in training


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_repeated_forward_of_gradient_checkpointing_adds_nothing(model, input_ids, use_reentrant):
    expected = record(model, input_ids)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # reentrant checkpointing repeats nothing otherwise
    routers = find_routers(model)
    forwards = []
    routers[0].register_forward_hook(lambda *_: forwards.append(1))
    recorder = RoutingRecorder(routers)
    with recorder:
        loss = model(input_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    assert len(forwards) == 2
    assert torch.equal(recorder.experts(3, 7), expected)


@pytest.mark.skipif(not hasattr(utils, "add_fused_lm_head"), reason="TRL 1.14 scores with the model's own forward")
def test_recording_changes_no_bit_of_a_training_step(model, input_ids):
    utils.add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
    model.train()
    recorder = RoutingRecorder(find_routers(model))

    def step():
        model.zero_grad()
        outputs = model(input_ids, labels=input_ids, fused_lm_head=True)
        outputs.log_probs.sum().backward()
        return [outputs.log_probs, outputs.entropy, *(parameter.grad for parameter in model.parameters())]

    expected = step()
    with recorder:
        recorded = step()
    for one, other in zip(recorded, expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    experts = recorder.experts(3, 7)
    assert not experts.requires_grad
    with torch.no_grad(), recorder:
        model(input_ids, labels=input_ids, fused_lm_head=True)
    assert torch.equal(recorder.experts(3, 7), experts)


def test_nothing_is_read_back_from_the_device(model):
    # A tensor on `meta` has a shape and no values, and raises where one is asked for: so would a wait for the device.
    model = model.to("meta")
    routers = find_routers(model)
    recorder = RoutingRecorder(routers)
    with recorder:
        for router in routers:
            router(torch.empty(21, 32, device="meta"))
    experts = recorder.experts(3, 7)
    assert experts.shape == (3, 7, 3, 2) and experts.is_meta
    assert all(count.is_meta for count in changed_slots(experts, experts, torch.ones(3, 7, device="meta")))


def test_peft_model_and_an_adapter_on_the_router(model, input_ids):
    expected = record(model, input_ids)
    peft_model = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.gate.weight"], init_lora_weights=False)
    )
    assert len(find_routers(peft_model)) == 3
    with torch.no_grad():
        adapted = record(peft_model, input_ids)
        with peft_model.disable_adapter():
            assert torch.equal(record(peft_model, input_ids), expected)
    router_logits = peft_model(input_ids, output_router_logits=True).router_logits
    chosen = torch.stack([logits.view(3, 7, 6).topk(2).indices for logits in router_logits], dim=2)
    assert torch.equal(adapted.long().sort().values, chosen.sort().values)
    assert not torch.equal(adapted, expected)


@pytest.mark.slow
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_compiled_model(model, input_ids, gradient_checkpointing):
    expected = record(model, input_ids)
    if gradient_checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    recorder = RoutingRecorder(find_routers(model))
    compiled = torch.compile(model, backend="eager")
    assert find_routers(compiled) == find_routers(model)
    for _ in range(2):
        compiled(input_ids, use_cache=False)
        with recorder:
            logits = compiled(input_ids, use_cache=False).logits
        logits.sum().backward()
        assert torch.equal(recorder.experts(3, 7), expected)


# ---- what cannot be recorded


def test_dense_model_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"model type 'qwen3'.*Set `log_expert_change=False`"):
        find_routers(make_model(tokenizer))


@pytest.mark.parametrize(
    "config_class, options, router",
    [
        (Llama4TextConfig, dict(num_local_experts=4, interleave_moe_layer_step=1), "llama4|Llama4Router"),
        (JetMoeConfig, dict(num_local_experts=4, kv_channels=8), "JetMoe"),
    ],
    ids=["llama4", "jetmoe"],
)
def test_router_without_indices_is_refused(config_class, options, router, input_ids):
    with pytest.raises(ValueError, match=rf"({router}).*Set `log_expert_change=False`"):
        record(build(config_class, **options), input_ids)


def test_routers_that_the_model_bypasses_are_an_error(model, input_ids):
    recorder = RoutingRecorder(find_routers(model))
    for layer in model.model.layers:  # as a kernel from the hub does
        layer.mlp.forward = lambda hidden_states: hidden_states
    with recorder:
        model(input_ids)
    with pytest.raises(ValueError, match=r"heard from no router.*`use_kernels=True`"):
        recorder.experts(3, 7)


def test_tokens_missing_from_the_forward_are_an_error(model, input_ids):
    recorder = RoutingRecorder(find_routers(model))
    with recorder:
        model(input_ids[:, :4])
    with pytest.raises(ValueError, match="each of 3 x 7 tokens, and a router saw 12"):
        recorder.experts(3, 7)


# ---- how many changed


# (T, L, K): four tokens in two layers of two experts each.
OLD = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[0, 1], [0, 1]], [[2, 3], [4, 5]]], dtype=torch.uint8)
NEW = torch.tensor(
    [
        [[1, 0], [2, 3]],  # another order, the same experts: 0
        [[4, 9], [6, 7]],  # one of two in the first layer: 1
        [[1, 2], [3, 2]],  # one, which moved its slot too, and both: 3
        [[3, 2], [9, 4]],  # an order, and one: 1
    ],
    dtype=torch.uint8,
)


@pytest.mark.parametrize(
    "mask, changed, total",
    [
        ([1, 1, 1, 1], 5, 16),
        ([1, 1, 0, 1], 2, 12),
        ([1, 0, 0, 0], 0, 4),
        ([0, 0, 1, 0], 3, 4),
        ([0, 0, 0, 0], 0, 0),
    ],
)
def test_changed_slots_worked_by_hand(mask, changed, total):
    counts = changed_slots(NEW[None], OLD[None], torch.tensor([mask]))
    assert [count.item() for count in counts] == [changed, total]
    assert all(count.dtype == torch.int64 and count.dim() == 0 for count in counts)


def test_changed_slots_against_a_loop_over_sets():
    generator = torch.Generator().manual_seed(3)
    old, new = (torch.rand(4, 9, 3, 300, generator=generator).argsort()[..., :200].short() for _ in range(2))
    mask = torch.rand(4, 9, generator=generator) < 0.6
    changed = sum(
        len(set(old[row, token, layer].tolist()) - set(new[row, token, layer].tolist()))
        for row, token in mask.nonzero().tolist()
        for layer in range(3)
    )
    counts = changed_slots(new, old, mask)
    assert [count.item() for count in counts] == [changed, mask.sum().item() * 3 * 200]
    # Nothing at a token without the mask is looked at.
    new[~mask] = -1
    assert changed_slots(new, old, mask)[0] == changed


def test_changed_slots_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"\(B, T, L, K\).*\(1, 4, 2, 2\), \(1, 1, 2, 2\) and \(1, 4\)"):
        changed_slots(NEW[None], OLD[None, :1], torch.ones(1, 4))


def test_a_policy_that_moved_changes_experts(model, input_ids):
    old = record(model, input_ids)
    mask = torch.ones_like(input_ids)
    assert [count.item() for count in changed_slots(record(model, input_ids), old, mask)] == [0, 3 * 7 * 3 * 2]
    # All tokens of the last layer to experts 0 and 1: what it chose of these before is all that stays.
    with torch.no_grad():
        router = find_routers(model)[-1]
        router.weight.zero_()
        router.register_forward_pre_hook(lambda module, args: (torch.ones_like(args[0]),))
        router.weight[0], router.weight[1] = 2.0, 1.0
    changed, _ = changed_slots(record(model, input_ids), old, mask)
    assert changed == (old[:, :, 2] > 1).sum() > 0


# ---- cost


@pytest.mark.exhaustive
@pytest.mark.timing
def test_recording_and_comparing_cost_little(tokenizer):
    torch.manual_seed(0)
    model = make_model(tokenizer, moe=True, hidden_size=256, layers=4, num_experts=16, num_experts_per_tok=4)
    input_ids = torch.randint(8, len(tokenizer), (8, 256))
    mask = torch.ones_like(input_ids)
    recorder = RoutingRecorder(find_routers(model))
    with torch.no_grad(), recorder:
        model(input_ids)
    old = recorder.experts(8, 256)
    assert old.nbytes == input_ids.numel() * 4 * 4  # a byte for each layer and slot

    def seconds(is_recorded):
        start = time.perf_counter()
        if is_recorded:
            with recorder:
                loss = model(input_ids, labels=input_ids).loss
            changed_slots(recorder.experts(8, 256), old, mask)
        else:
            loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        return time.perf_counter() - start

    seconds(True)
    pairs = [(seconds(True), seconds(False)) for _ in range(9)]
    # Measured: the step takes 740 ms, recording 0.1 and comparing 0.5. The bound is that of a busy machine's clock.
    assert statistics.median(one / other for one, other in pairs) < 1.1
