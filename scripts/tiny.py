"""Tiny models and data that the demo and the tests make in seconds: nothing is downloaded."""

import json
import string
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_gspo import tasks


# What `Qwen3` renders, without its tools: enough for chat prompts and for TRL's tests of a template.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(alphabet: str = string.printable) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, with a chat template; anything outside `alphabet` becomes `<unk>`."""
    special = ["<pad>", "<eos>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    vocabulary = {token: index for index, token in enumerate([*special, *dict.fromkeys(alphabet)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer, moe: bool = False, hidden_size: int = 32, layers: int = 2, **overrides):
    """A Qwen3 (`moe=True`: Qwen3-MoE, 4 experts, 2 for each token) with random weights that fits `tokenizer`."""
    config = dict(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    if moe:
        config |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=hidden_size)
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**config | overrides))
    return Qwen3ForCausalLM(Qwen3Config(**config | overrides))


def pretrain(
    model, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int, learning_rate: float = 3e-3
) -> None:
    """Trains `model` on `batches` of `(input_ids, labels)`, both `(B, T)`; a label of -100 is not learnt."""
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps)
    for input_ids, labels in islice(batches, steps):
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sorting_rows(count: int, seed: int, digits: int = 5) -> list[dict]:
    """The first `count` rows of the task `sort`, as `{"prompt": "73914=", "solution": "13479"}`."""
    return list(islice(tasks.sorting_rows(seed, digits), count))
