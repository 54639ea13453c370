"""What is known before a model is loaded. The rows of bad input are in test_bad_input.py."""

import pytest
from datasets import Dataset
from tiny import make_model, make_tokenizer
from transformers import LlamaConfig, MambaConfig, Qwen3Config

from trl_gspo import GSPOConfig, GSPOTrainer, checks
from trl_gspo.checks import check_prompt_ids, context_length


@pytest.fixture
def args(tmp_path):
    return GSPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 5e5,
}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (Qwen3Config(max_position_embeddings=32768), 32768),
        # Qwen counts the factor in no field, Llama 3.1 in `max_position_embeddings`.
        (Qwen3Config(max_position_embeddings=32768, rope_parameters=YARN), 131072),
        (LlamaConfig(max_position_embeddings=131072, rope_parameters=LLAMA3), 131072),
        (MambaConfig(), None),
    ],
    ids=["plain", "yarn", "llama3", "no bound"],
)
def test_context_length(config, length, args):
    assert context_length(config, args) == length


def test_the_context_of_vllm_is_a_bound_too(args):
    args.use_vllm, args.vllm_max_model_length = True, 1000
    assert context_length(Qwen3Config(max_position_embeddings=32768), args) == 1000
    args.use_vllm = False
    assert context_length(Qwen3Config(max_position_embeddings=32768), args) == 32768


@pytest.mark.parametrize("tracker", ["azure_ml", "flyte"])
def test_trackers_that_transformers_cannot_look_for_are_not_refused(tracker, args):
    args.report_to = [tracker]
    checks._check_installed(args)
    args.report_to = [tracker, "clearml"]
    with pytest.raises(ImportError, match="`report_to` names clearml, which is not installed"):
        checks._check_installed(args)


def test_each_empty_dataset_is_named(args):
    some, none = Dataset.from_dict({"prompt": ["1"] * 64}), Dataset.from_dict({"prompt": []})
    with pytest.raises(ValueError, match=r"`eval_dataset\['b'\]` has no row"):
        checks.check_before_loading(make_model(make_tokenizer()), args, some, {"a": some, "b": none}, None)


def test_a_prompt_without_messages_is_named(tokenizer, args):
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "1"}], []]})
    with pytest.raises(ValueError, match=r"Row 1 of `rows` has no prompt, but \[\]"):
        checks._check_lengths("rows", rows, tokenizer, make_model(tokenizer).config, args)


@pytest.mark.parametrize(("size", "is_told"), [(2048 - 256, False), (2048 - 255, True)])
def test_a_completion_that_may_pass_the_context_is_told_of(size, is_told, tokenizer, args, caplog):
    args.max_completion_length = 256
    rows = Dataset.from_dict({"prompt": ["1" * size]})
    checks._check_lengths("rows", rows, tokenizer, make_model(tokenizer).config, args)
    assert ("set `max_completion_length=255`" in caplog.text) == bool(caplog.records) == is_told


def test_prompts_at_the_bounds(args):
    config = Qwen3Config(max_position_embeddings=8, vocab_size=10)
    check_prompt_ids([[1] * 7, [9]], config, args)
    for ids, message in (([1] * 8, "A prompt has 8 tokens, and"), ([10], "token 10, .* ends at 9"), ([], "no token")):
        with pytest.raises(ValueError, match=message):
            check_prompt_ids([[1], ids], config, args)


def test_only_prompts_that_may_be_too_long_are_tokenized(model_path, tokenizer, args, monkeypatch):
    seen = []
    tokenize = checks.tokenize
    monkeypatch.setattr(checks, "tokenize", lambda prompt, *rest: seen.append(prompt) or tokenize(prompt, *rest))
    texts = ["1" * 10, "1" * 1000, "1" * 1024, "1" * 1025, "é" * 600]
    config = make_model(tokenizer).config
    checks._check_lengths("rows", Dataset.from_dict({"prompt": texts}), tokenizer, config, args)
    # 2048 positions, less 1024 for a template; "é" has two bytes. The first row is always tried.
    assert seen == [texts[0], *texts[3:]]


def test_the_longest_are_tokenized_of_many(tokenizer, args, monkeypatch):
    monkeypatch.setattr(checks, "_MOST_PROMPTS", 2)
    config = make_model(tokenizer).config
    texts = ["1" * 10, *["1" * 1500] * 5, "1" * 1600, "1" * 3000]
    with pytest.raises(ValueError, match="Row 7 of `rows`: A prompt has 3000 tokens"):
        checks._check_lengths("rows", Dataset.from_dict({"prompt": texts}), tokenizer, config, args)


def test_messages_are_rendered_with_their_template(tokenizer, args):
    # Of one token for each character, beside three of the template.
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "1" * 2045}]]})
    with pytest.raises(ValueError, match="Row 0 of `rows`: A prompt has 2048 tokens"):
        checks._check_lengths("rows", rows, tokenizer, make_model(tokenizer).config, args)
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "1" * 2044}]]})
    checks._check_lengths("rows", rows, tokenizer, make_model(tokenizer).config, args)


def test_a_model_that_is_loaded_already_finds_its_tokenizer(model_path, tokenizer, args):
    model = make_model(tokenizer)
    model.config._name_or_path = model_path
    model.resize_token_embeddings(50)
    with pytest.raises(ValueError, match="embeddings for 50 tokens"):
        GSPOTrainer(model, lambda **_: [], args, Dataset.from_dict({"prompt": ["1="] * 8}))


def test_pad_and_eos_beyond_the_embeddings_are_refused(args):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    model = make_model(make_tokenizer())
    rows = Dataset.from_dict({"prompt": ["1="] * 8})
    with pytest.raises(ValueError, match="The tokenizer has `pad_token` 107, and the model has embeddings for 107"):
        GSPOTrainer(model, lambda **_: [], args, rows, processing_class=tokenizer)
    model.resize_token_embeddings(108)
    GSPOTrainer(model, lambda **_: [], args, rows, processing_class=tokenizer)
