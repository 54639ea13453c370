"""
The two ends of `make demo`, with `scripts/train.py --config configs/tiny.yaml` between them.

    python scripts/demo.py prepare [--seed 0]
    accelerate launch scripts/train.py --config configs/tiny.yaml [--seed 0]
    python scripts/demo.py report

`prepare` pretrains a Qwen3 of 0.17M parameters to sort five digits, on answers of which 70% are shuffled, so that it
samples about one in four right. `report` samples the held-out prompts before and after the training, and adds both
accuracies to `summary.json`.
"""

import argparse
import json
import random
import shutil
import string
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tiny import make_model, make_tokenizer, pretrain, sorting_rows, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer


OUTPUT = Path("outputs/tiny")
BASE_MODEL = OUTPUT / "base"
TRAIN_ROWS, TEST_ROWS = 4096, 2048
PRETRAIN_STEPS, PRETRAIN_BATCH = 400, 128
CORRUPTED = 0.7


def prepare(seed: int, output: Path = OUTPUT) -> None:
    """Writes data and the pretrained model of `seed` into `output`, which is emptied first."""
    started, base = time.time(), output / BASE_MODEL.name
    shutil.rmtree(output, ignore_errors=True)
    # All digits of all three sets come from one stream, and a held-out prompt is in neither of the others.
    rows = {row["prompt"]: row for row in sorting_rows(40_000, seed)}
    test, train, pretraining = split(list(rows.values()), TEST_ROWS, TRAIN_ROWS)
    write_jsonl(output / "data" / "test.jsonl", test)
    write_jsonl(output / "data" / "train.jsonl", train)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(string.digits + "=")
    model = make_model(tokenizer, hidden_size=96)
    pretrain(model, corrupted_answers(tokenizer, pretraining, random.Random(seed)), PRETRAIN_STEPS)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    (output / "started.json").write_text(json.dumps({"started": started, "seed": seed}))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"pretrained  {base}, {parameters} parameters, {time.time() - started:.0f} s")


def split(rows: list, *sizes: int) -> list[list]:
    parts, start = [], 0
    for size in sizes:
        parts.append(rows[start : start + size])
        start += size
    return [*parts, rows[start:]]


def corrupted_answers(
    tokenizer,
    rows: list[dict],
    generator: random.Random,
    batch_size: int = PRETRAIN_BATCH,
    corrupted: float = CORRUPTED,
) -> Iterator[tuple]:
    """Batches for `pretrain`, without end: the answers of `rows`, of which the share `corrupted` is shuffled."""
    while True:
        texts, lengths = [], []
        for row in generator.sample(rows, batch_size):
            answer = list(row["solution"])
            if generator.random() < corrupted:
                generator.shuffle(answer)
            texts.append(row["prompt"] + "".join(answer) + tokenizer.eos_token)
            lengths.append(len(row["prompt"]))  # a character is a token
        input_ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")["input_ids"]
        labels = input_ids.masked_fill(input_ids == tokenizer.pad_token_id, -100)
        for label, length in zip(labels, lengths, strict=True):
            label[:length] = -100
        yield input_ids, labels


@torch.no_grad()
def accuracy(folder: Path, rows: list[dict], seed: int) -> float:
    """Share of `rows` answered right by one sample each, at temperature 1 and without truncation."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt", return_token_type_ids=False)
    sampled = model.generate(**prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=8)
    answers = tokenizer.batch_decode(sampled[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(answer == row["solution"] for answer, row in zip(answers, rows, strict=True)) / len(rows)


def report() -> None:
    facts = json.loads((OUTPUT / "started.json").read_text())
    rows = [json.loads(line) for line in (OUTPUT / "data" / "test.jsonl").read_text().splitlines()]
    path = OUTPUT / "summary.json"
    summary = json.loads(path.read_text())
    summary["seed"] = facts["seed"]
    summary["accuracy_before"] = accuracy(BASE_MODEL, rows, facts["seed"])
    summary["accuracy_after"] = accuracy(OUTPUT, rows, facts["seed"])
    summary["seconds"] = round(time.time() - facts["started"], 1)
    path.write_text(json.dumps(summary, indent=2) + "\n")
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    print(f"accuracy    {before:.3f} -> {after:.3f} on {len(rows)} held-out prompts, sampled at temperature 1")
    print(f"curves      {OUTPUT / 'curves.png'}")
    print(f"seconds     {summary['seconds']}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "report"))
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and pretraining")
    args = parser.parse_args(argv)
    prepare(args.seed) if args.step == "prepare" else report()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
