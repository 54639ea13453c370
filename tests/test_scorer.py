"""`Scorer`: which way it takes for which model, what it sends through the model, and what comes back."""

import logging

import pytest
import torch
import transformers
from test_trainer import build
from tiny import make_model
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import trl_gspo.scorer
import trl_gspo.trainer
from trl_gspo import GSPOTrainer
from trl_gspo.host import HAS_FUSED_HEAD
from trl_gspo.packing import Cut, Pack
from trl_gspo.routing import RoutingRecorder, find_routers
from trl_gspo.scorer import Scorer


needs_fused_head = pytest.mark.skipif(not HAS_FUSED_HEAD, reason="rows are packed from TRL 1.15")
DTYPES = [torch.float32, torch.bfloat16]
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
}
DELTA = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
)  # fmt: skip
MAMBA = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)

# Name of the architecture, attention, config, the way and what its reason says.
FAMILIES = {
    "qwen3": ("Qwen3", "sdpa", {}, "packed", "alone differ by"),
    "qwen3_eager": ("Qwen3", "eager", {}, "packed", "alone differ by"),
    "mistral_window": ("Mistral", "sdpa", {"sliding_window": 4}, "packed", "alone differ by"),
    "gpt2": ("GPT2", "sdpa", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "packed", "alone differ"),
    "mixtral": ("Mixtral", "sdpa", EXPERTS, "packed", "alone differ by"),
    "gpt_oss": ("GptOss", "eager", EXPERTS | SLIDING, "packed", "alone differ by"),
    "lfm2": ("Lfm2", "sdpa", {"layer_types": ["conv", "full_attention"]}, "cut", "keep a state"),
    "falcon_h1": ("FalconH1", "sdpa", MAMBA, "cut", "keep a state"),
    "qwen3_next": ("Qwen3Next", "sdpa", DELTA, "cut", "keep a state"),
    "mamba": ("Mamba", None, {"state_size": 4}, "cut", "keep a state"),
    # Biases by position of the mask, which is not made for packed rows.
    "bloom": ("Bloom", None, {"n_head": 4, "n_layer": 2}, "cut", "packed rows see one another"),
    # Looks at padding.
    "rwkv": ("Rwkv", None, {"attention_hidden_size": 32, "context_length": 64}, "whole", "without their padding"),
    "recurrent_gemma": (
        "RecurrentGemma", None,
        {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
        "whole", "without their padding",
    ),
    "phi3_longrope": (
        "Phi3", "sdpa",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "max_position_embeddings": 64},
        "whole", "type 'longrope'",
    ),
}  # fmt: skip


def family(name, vocabulary):
    architecture, attention, options, *_ = FAMILIES[name]
    options = dict(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    ) | options  # fmt: skip
    suffix = "LMHeadModel" if architecture == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{architecture}Config")(**options)
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(0)
    return getattr(transformers, architecture + suffix)(config)


@pytest.fixture
def trainer_of(tokenizer, dataset, tmp_path):
    def make(model, **options):
        options = {"pack_live_tokens": True} | options
        return build(GSPOTrainer, tmp_path, model=model, processing_class=tokenizer, train_dataset=dataset, **options)

    return make


@pytest.fixture
def proven(trainer_of):
    """The scorer that a trainer of a model has made, after its proof."""

    def prove(model, **options):
        trainer = trainer_of(model, **options)
        trainer._find_way()
        return trainer._scorer

    return prove


@pytest.fixture
def qwen3(tokenizer):
    torch.manual_seed(0)
    return make_model(tokenizer)


# ---- the way


@needs_fused_head
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_way_and_reason_of_each_family(name, dtype, proven, tokenizer):
    *_, way, reason = FAMILIES[name]
    scorer = proven(family(name, len(tokenizer)).to(dtype))
    assert scorer.way == way
    assert reason in scorer.reason


def make_leaky(model):
    """Attention that does not hear of the rows, and so is over all tokens before."""

    def forget_rows(module, args, kwargs):
        kwargs.pop("packed_row_lengths", None)
        return args, kwargs

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(forget_rows, with_kwargs=True)
    return model


@needs_fused_head
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["qwen3", "mistral_window", "mixtral"])
def test_rows_that_see_one_another_are_found_out(name, dtype, proven, tokenizer):
    scorer = proven(make_leaky(family(name, len(tokenizer)).to(dtype)))
    assert scorer.way == "cut"
    assert "packed rows see one another" in scorer.reason


class Neighbour(nn.Module):
    """Adds a little of the hidden state of the token before, whichever row it is of."""

    def __init__(self, layer, share):
        super().__init__()
        self.layer, self.share = layer, share

    def forward(self, hidden, *args, **kwargs):
        return self.layer(hidden + self.share * hidden.roll(1, 1), *args, **kwargs)


@needs_fused_head
@pytest.mark.parametrize("share", [1.0, 1e-2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_that_is_declared_nowhere_is_found_out(dtype, share, proven, qwen3):
    qwen3.model.layers[0].mlp = Neighbour(qwen3.model.layers[0].mlp, share)
    assert proven(qwen3.to(dtype)).way != "packed"


@needs_fused_head
def test_unknown_attention_is_not_packed(proven, qwen3, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "my_attention", ALL_ATTENTION_FUNCTIONS["sdpa"])
    # Of the class, as its `register` does: transformers makes no mask for a name that is in the instance alone.
    masks = ALL_MASK_ATTENTION_FUNCTIONS
    monkeypatch.setitem(masks._global_mapping, "my_attention", masks["sdpa"])
    qwen3.config._attn_implementation = "my_attention"
    scorer = proven(qwen3)
    assert scorer.way == "cut"
    assert (
        "packed rows fail with ValueError" in scorer.reason and "attn_implementation='my_attention'" in scorer.reason
    )


@needs_fused_head
def test_positions_that_are_not_taken_are_found_out(proven, tokenizer):
    # Rows do not see one another, but the second one's places are counted from the first of the first one; and without
    # the columns of padding, all are counted from another.
    model = family("gpt2", len(tokenizer))
    model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"position_ids": None}), with_kwargs=True
    )
    scorer = proven(model)
    assert scorer.way == "whole"
    assert "differ from rows alone" in scorer.reason and "without their padding rows differ" in scorer.reason


@needs_fused_head
def test_padding_that_is_seen_is_not_cut(proven, qwen3):
    # Of both ways only one that keeps all columns gives the same.
    make_leaky(qwen3)
    qwen3.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"attention_mask": torch.ones_like(kwargs["input_ids"])}),
        with_kwargs=True,
    )
    scorer = proven(qwen3)
    assert scorer.way == "whole"
    assert "packed rows see one another" in scorer.reason and "without their padding rows differ" in scorer.reason


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(pack_live_tokens=False), "`pack_live_tokens=False`"),
        pytest.param(dict(torch_compile=True), "`torch_compile=True`", marks=needs_fused_head),
    ],
)
def test_options_that_need_the_whole_batch(options, reason, trainer_of, qwen3):
    scorer = trainer_of(qwen3, **options)._scorer
    assert scorer.way == "whole" and reason in scorer.reason
    assert scorer.layout(torch.ones(1, 3), torch.ones(1, 2)) is None


def test_older_trl_needs_the_whole_batch(trainer_of, qwen3, monkeypatch):
    monkeypatch.setattr(trl_gspo.trainer, "HAS_FUSED_HEAD", False)
    scorer = trainer_of(qwen3)._scorer
    assert scorer.way == "whole" and "TRL 1.15" in scorer.reason


@needs_fused_head
@pytest.mark.parametrize(
    "name, level, text",
    [
        ("qwen3", "INFO", "only live tokens go through the model, packed without padding (rows packed and alone"),
        ("mamba", "WARNING", "rows are not packed, and padding is cut in each micro-batch (its layers keep a state"),
        ("rwkv", "WARNING", "all tokens go through the model, padding and dead sequences too (its layers keep"),
    ],
)
def test_one_line_says_which_way_and_why(name, level, text, trainer_of, tokenizer, caplog):
    trainer = trainer_of(family(name, len(tokenizer)))
    with caplog.at_level(logging.INFO, logger="trl_gspo.trainer"):
        trainer._find_way()
        trainer._find_way()
    (record,) = [record for record in caplog.records if record.name == "trl_gspo.trainer"]
    assert record.levelname == level
    assert f"Loss step: {text}" in record.getMessage()


@needs_fused_head
def test_proof_leaves_no_trace(trainer_of, tokenizer):
    # With dropout, which must not be in it, and one part that somebody has put in evaluation.
    trainer = trainer_of(family("gpt2", len(tokenizer)), disable_dropout=False)
    model = trainer.model.train()
    model.transformer.h[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    flags = [module.training for module in model.modules()]
    assert any(flags) and not all(flags)
    values = [parameter.detach().clone() for parameter in model.parameters()]
    state, has_graph = torch.get_rng_state(), []
    model.register_forward_pre_hook(lambda module, args: has_graph.append(torch.is_grad_enabled()))
    trainer._find_way()
    assert trainer._scorer.way == "packed"
    assert has_graph and not any(has_graph)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert all((parameter.grad == 2.0).all() for parameter in model.parameters())
    assert all(map(torch.equal, model.parameters(), values))


# ---- what goes through the model

# Row 0: a prompt of two tokens in three columns, three tokens of completion. Row 1: one and two.
ATTENTION = torch.tensor([[0, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0]])
FIRST_ROW = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]]).bool()


def ready(way, score=None):
    scorer = Scorer(score)
    scorer.way = way
    return scorer


def test_layout_of_each_way():
    packed = ready("packed").layout(ATTENTION, FIRST_ROW)
    assert isinstance(packed, Pack) and packed.tokens.tolist() == [1, 2, 3, 4]
    cut = ready("cut").layout(ATTENTION, FIRST_ROW)
    assert isinstance(cut, Cut) and cut == Cut([0], 1, 6, False)
    assert ready("whole").layout(ATTENTION, FIRST_ROW) is None


@pytest.mark.parametrize("way", ["packed", "cut"])
def test_images_keep_all_rows(way):
    assert ready(way).layout(ATTENTION, FIRST_ROW, has_images=True) == Cut([0, 1], 1, 6, False)


def test_loss_of_routers_keeps_all_tokens():
    packed = ready("packed").layout(ATTENTION, FIRST_ROW, needs_all=True)
    assert packed.tokens.tolist() == ATTENTION.flatten().nonzero().flatten().tolist()
    assert packed.lengths == (5, 3)
    # Row 0's completion is predicted from places 1, 2 and 3 of what is packed.
    assert packed.sources.tolist() == [1, 2, 3] and packed.targets.tolist() == [0, 1, 2]
    assert ready("cut").layout(ATTENTION, FIRST_ROW, needs_all=True) == Cut([0, 1], 1, 6, False)


def test_empty_prompt_takes_the_whole_batch():
    mask = torch.tensor([[0, 0, 1, 1]])
    assert ready("packed").layout(mask, torch.tensor([[True, True]])) is None


@needs_fused_head
def test_rows_that_are_longer_than_the_proof_are_not_packed(proven, tokenizer, monkeypatch):
    def layout(window, length):
        model = transformers.MistralForCausalLM(
            transformers.MistralConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                num_attention_heads=4, num_key_value_heads=2, sliding_window=window,
            )
        )  # fmt: skip
        mask = torch.ones(2, length + 1)
        mask[1, 3:] = 0  # of another length
        return proven(model).layout(mask, mask[:, 1:].bool())

    monkeypatch.setattr(trl_gspo.scorer, "_LONGEST_PROOF", 16)
    assert layout(20, 20).lengths == (20, 2)
    assert layout(20, 21) is None
    # The proof has rows beyond this window.
    assert layout(16, 64).lengths == (64, 2)


@needs_fused_head
@pytest.mark.parametrize("window, length", [(None, 8), (6, 10), (40, 44)])
def test_proof_goes_beyond_the_window(window, length, trainer_of, tokenizer):
    model = family("mistral_window", len(tokenizer))
    model.config.sliding_window = window
    trainer, seen = trainer_of(model), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    trainer._find_way()
    # Prompts in six columns, the longer completion and two of padding; packed, all but the last token of each row.
    assert seen[0] == (2, 6 + length + 2)
    assert (1, 3 + 5 - 1 + 4 + length - 1) in seen


# ---- what comes back


WANTED = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
MASK = torch.tensor([[0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0]])


def tokens_of(vocabulary, seed=0):
    return torch.randint(7, vocabulary, MASK.shape, generator=torch.Generator().manual_seed(seed))


@needs_fused_head
@pytest.mark.parametrize("way", ["packed", "cut"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_those_of_the_whole_batch(way, temperature, trainer_of, qwen3):
    trainer = trainer_of(qwen3, temperature=temperature)
    scorer, model = trainer._scorer, trainer.model.eval()
    trainer._find_way()
    scorer.way = way
    ids = tokens_of(qwen3.config.vocab_size)
    expected = scorer(model, ids, MASK, 4, None, compute_entropy=True)
    base = torch.arange(12.0).view(3, 4)
    layout = scorer.layout(MASK, WANTED)
    logps, entropies, _, experts = scorer(model, ids, MASK, 4, layout, logps=base, compute_entropy=True)
    assert experts is None
    torch.testing.assert_close(logps[WANTED], expected[0][WANTED], rtol=0, atol=2e-6)
    torch.testing.assert_close(entropies[WANTED], expected[1][WANTED], rtol=0, atol=2e-6)
    assert torch.equal(logps[1], base[1]) and logps[0, 3] == base[0, 3]
    # Of five tokens that were scored.
    torch.testing.assert_close(entropies[1], expected[1][WANTED].mean().expand(4), rtol=1e-6, atol=0)
    # Garbage in padding changes nothing, not even a bit.
    other = torch.where(MASK.bool(), ids, tokens_of(qwen3.config.vocab_size, seed=1))
    assert torch.equal(scorer(model, other, MASK, 4, layout)[0][WANTED], logps[WANTED])


@needs_fused_head
@pytest.mark.parametrize("way", ["packed", "cut"])
def test_gradient_flows_to_what_is_wanted_alone(way, trainer_of, qwen3):
    trainer = trainer_of(qwen3)
    trainer._find_way()
    trainer._scorer.way = way
    ids = tokens_of(50)
    ids[1] += 50  # tokens that the other rows have not
    weights = torch.where(WANTED, torch.randn(3, 4), torch.tensor(1e6))
    layout = trainer._scorer.layout(MASK, WANTED)
    base = torch.zeros(3, 4, requires_grad=True)
    logps = trainer._scorer(trainer.model, ids, MASK, 4, layout, logps=base)[0]
    (logps * weights * WANTED).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    (trainer._scorer(trainer.model, ids, MASK, 4, None)[0] * weights * WANTED).sum().backward()
    for name, parameter in trainer.model.named_parameters():
        assert (found[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + 1e-9, name
    assert base.grad is None
    assert not found["model.embed_tokens.weight"][57:].any() and found["model.embed_tokens.weight"][:57].any()


@needs_fused_head
@pytest.mark.parametrize("way", ["packed", "cut"])
def test_stub_has_a_backward_pass_of_zero(way, trainer_of, qwen3):
    trainer, seen = trainer_of(qwen3), []
    trainer._find_way()
    trainer._scorer.way = way
    qwen3.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    mask = MASK * torch.tensor([[0], [1], [1]])  # where it is taken from there is but padding
    layout = trainer._scorer.layout(mask, torch.zeros_like(WANTED))
    assert layout.is_stub
    base, entropy = torch.arange(12.0).view(3, 4), torch.tensor(1.25)
    ids = tokens_of(qwen3.config.vocab_size)
    logps, entropies, *_ = trainer._scorer(
        trainer.model, ids, mask, 4, layout, logps=base, entropy=entropy, compute_entropy=True
    )
    (given,) = seen
    assert given["input_ids"].shape == (1, 2)
    assert given.get("attention_mask") is None or given["attention_mask"].all()
    assert torch.equal(logps, base) and (entropies == 1.25).all()
    logps.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters())
    assert not trainer._scorer(trainer.model, ids, mask, 4, layout, compute_entropy=True)[1].any()


@needs_fused_head
@pytest.mark.parametrize("way", ["packed", "cut"])
def test_experts_are_those_of_the_whole_batch(way, trainer_of, tokenizer):
    torch.manual_seed(0)
    model = make_model(tokenizer, moe=True)
    trainer = trainer_of(model)
    routing = RoutingRecorder(find_routers(model))
    scorer = Scorer(trainer._scorer._score, routing=routing)
    scorer.way = way
    ids = tokens_of(len(tokenizer))
    with torch.no_grad():
        *_, expected = scorer(model, ids, MASK, 4, None, records=True)
        *_, experts = scorer(model, ids, MASK, 4, scorer.layout(MASK, WANTED), records=True)
    assert expected.shape == experts.shape == (3, 4, 2, 2)
    assert torch.equal(experts[WANTED], expected[WANTED])
    assert len(experts[WANTED].unique()) == 4


def test_columns_of_what_is_by_token_are_cut_too():
    calls = []

    def score(model, input_ids, attention_mask, logits_to_keep, **kwargs):
        calls.append((input_ids, attention_mask, logits_to_keep, kwargs))
        return input_ids[:, -logits_to_keep:].float(), None, None

    ids = torch.arange(14).view(2, 7)
    types = torch.arange(14).view(2, 7) + 100
    pixels = torch.zeros(5, 3)
    scorer = ready("cut", score)
    layout = scorer.layout(ATTENTION, FIRST_ROW, has_images=True)
    logps, *_ = scorer(
        None, ids, ATTENTION, 4, layout, token_type_ids=types, mm_token_type_ids=None, pixel_values=pixels
    )
    ((seen_ids, seen_mask, size, kwargs),) = calls
    assert seen_ids.tolist() == [[1, 2, 3, 4, 5], [8, 9, 10, 11, 12]]
    assert seen_mask.tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]]
    assert size == 3
    assert kwargs["token_type_ids"].tolist() == [[101, 102, 103, 104, 105], [108, 109, 110, 111, 112]]
    assert kwargs["mm_token_type_ids"] is None and kwargs["pixel_values"] is pixels
    assert logps.tolist() == [[3, 4, 5, 0], [10, 11, 12, 0]]
