"""
Makes the tiny model that configs/reasoning_tiny.yaml trains on a family of reasoning-gym.

    python scripts/reasoning.py [--seed 0]
    accelerate launch scripts/train.py --config configs/reasoning_tiny.yaml [--seed 0]
    python scripts/evaluate.py --config configs/reasoning_tiny.yaml --model_name_or_path outputs/reasoning_tiny \\
        --before outputs/reasoning_tiny/base

It pretrains a Qwen3 of 0.09M parameters on the rows of that configuration's training data, with half of the answers
shuffled. The rows that the configuration holds out are in neither training.
"""

import argparse
import random
import string
import sys
import time
from pathlib import Path

import torch
import train
from demo import corrupted_answers
from tiny import make_model, make_tokenizer, pretrain

from trl_gspo.tasks import load_task


CONFIG = Path(__file__).parents[1] / "configs" / "reasoning_tiny.yaml"
STEPS, BATCH, LEARNING_RATE = 400, 64, 5e-3
CORRUPTED = 0.5


def prepare(seed: int, steps: int, config: str, folder: str | None) -> Path:
    started = time.time()
    args, _, model_args, _ = train.parse(["--config", config])
    rows = load_task(args, evaluation=False)[0]
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(string.ascii_letters + string.digits + string.punctuation + " ")
    model = make_model(tokenizer, hidden_size=64)
    pairs = [{"prompt": row["prompt"], "solution": row["answer"]} for row in rows]
    batches = corrupted_answers(tokenizer, pairs, random.Random(seed), BATCH, CORRUPTED)
    pretrain(model, batches, steps, LEARNING_RATE)
    base = Path(folder or model_args.model_name_or_path)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"pretrained  {base}, {parameters} parameters, {len(pairs)} rows, {time.time() - started:.0f} s")
    return base


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of weights and pretraining")
    parser.add_argument("--steps", type=int, default=STEPS, help="of pretraining")
    parser.add_argument("--config", default=str(CONFIG), help="whose task is pretrained on")
    parser.add_argument("--folder", help="where the model goes; the configuration's `model_name_or_path` if not set")
    args = parser.parse_args(argv)
    prepare(args.seed, args.steps, args.config, args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
