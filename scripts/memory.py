"""
Prints, as Markdown, which engine to take for which model, GPU and number of GPUs, by arithmetic.

    python scripts/memory.py                # the tables of docs/scale.md
    python scripts/memory.py --sequences 64 # with rollouts of 64 sequences on each GPU
    python scripts/memory.py --write        # puts them into docs/scale.md

Nothing is downloaded, and no GPU is needed: the models are made on the meta device, from the sizes below.
"""

import argparse
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig

from trl_gspo.memory import GIB, ModelShape, Run, estimate, model_shape


DOCS = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- python scripts/memory.py --write -->", "<!-- end -->"

# From the config.json of each model.
CONFIGS = {
    "Qwen2.5-0.5B": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-1.5B": Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-7B": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
    "Qwen2.5-14B": Qwen2Config(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
    "Qwen2.5-32B": Qwen2Config(
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=False,
    ),
}
CARDS = (24, 48, 80, 141)
GPUS = (1, 2, 4, 8, 16)
# Of a card of that many GB. Assumed: cards of one name differ, and torch sees less than the name says.
USABLE = 0.92 * GIB

# In the order in which to take them, by our guess at their speed: the first that fits. Name, and what differs from
# full fine-tuning on one GPU.
WAYS = (
    ("DDP", dict(engine="ddp", weight_bytes=4)),
    ("ZeRO-2", dict(engine="zero2")),
    ("ZeRO-3", dict(engine="zero3")),
    ("offload", dict(engine="zero3", offloads_optimizer=True)),
    ("ZeRO-3*", dict(engine="zero3", gathers=False)),
    ("offload*", dict(engine="zero3", offloads_optimizer=True, gathers=False)),
    ("LoRA", dict(engine="ddp", trained=0)),
    ("LoRA, ZeRO-3", dict(engine="zero3", trained=0)),
    ("QLoRA", dict(engine="ddp", trained=0, bits=4)),
)


@cache
def read_models() -> dict[str, tuple[ModelShape, int]]:
    """Shape of each model, and the parameters of an adapter of rank 16 on all of its linear layers."""
    models = {}
    for name, config in CONFIGS.items():
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config)
            shape = model_shape(model, config)
            adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"), low_cpu_mem_usage=True)
        models[name] = shape, sum(part.numel() for part in adapted.parameters() if part.requires_grad)
    return models


def runs(gpus: int, adapter: int, sequences: int) -> list[tuple[str, Run]]:
    """The ways to train on so many GPUs, in order."""
    found = []
    for name, options in WAYS:
        is_sharded = options["engine"] != "ddp" and not options.get("offloads_optimizer")
        if gpus == 1 and (is_sharded or "*" in name):
            continue
        trained = adapter if "trained" in options else None
        run = replace(Run(gpus=gpus, rollout_rows=sequences), **options | {"trained": trained})
        found.append(("full" if (gpus, name) == (1, "DDP") else name, run))
    return found


def choose(shape: ModelShape, adapter: int, gpus: int, card: int, sequences: int) -> str:
    ways = runs(gpus, adapter, sequences)
    return next((name for name, run in ways if estimate(shape, run).peak <= card * USABLE), "no")


def choices(models: dict, sequences: int) -> list[str]:
    lines = []
    for card in CARDS:
        lines += [f"**GPUs of {card} GB**", "", "| model | " + " | ".join(f"{n} GPU" for n in GPUS) + " |"]
        lines.append("| --- " * (len(GPUS) + 1) + "|")
        for name, (shape, adapter) in models.items():
            cells = [choose(shape, adapter, gpus, card, sequences) for gpus in GPUS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def parts(models: dict, sequences: int, name: str = "Qwen2.5-7B", gpus: int = 8) -> list[str]:
    shape, adapter = models[name]
    fields = ("weights", "gradients", "optimizer", "gathered", "cache", "activations", "logits")
    lines = [
        f"**{name} on {gpus} GPUs, GiB on each**",
        "",
        "| way | " + " | ".join(fields) + " | rollout | update | at least | host memory |",
        "| --- " * (len(fields) + 5) + "|",
    ]
    for way, run in runs(gpus, adapter, sequences):
        memory = estimate(shape, run)
        sizes = [getattr(memory, field) for field in fields]
        sizes += [memory.rollout, memory.update, memory.floor, memory.host]
        lines.append(f"| {way} | " + " | ".join(f"{size / GIB:.1f}" for size in sizes) + " |")
    return [*lines, ""]


def tables(sequences: int) -> str:
    models = read_models()
    return "\n".join([*choices(models, sequences), *parts(models, sequences)])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=32, help="sequences of a rollout on each GPU")
    parser.add_argument("--write", action="store_true", help="puts the tables into docs/scale.md")
    options = parser.parse_args(argv)
    text = tables(options.sequences)
    if not options.write:
        print(text)
        return 0
    before, _, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
