"""
Writes the made-up messages that configs/customer_service.yaml trains on.

    python scripts/customer_service.py [--rows 2000] [--output outputs/customer_service/data.jsonl]

Each line has a `prompt`, a customer's message, and `keywords`, what a good reply names: the order, the article, and
what the shop does in such a case. Your own data takes the same form. The reward model of the configuration is yours to
bring: a sequence classifier with one label, trained on preferences.
"""

import argparse
import random
import sys
from pathlib import Path

from tiny import write_jsonl


ARTICLES = [
    "kettle",
    "desk lamp",
    "rain jacket",
    "coffee grinder",
    "backpack",
    "keyboard",
    "garden hose",
    "headphones",
]
# What happened, and what the reply has to offer.
CASES = [
    ("has not arrived", "tracking"),
    ("arrived broken", "replacement"),
    ("is the wrong colour", "exchange"),
    ("does not fit", "return label"),
    ("was charged twice", "refund"),
    ("stopped working after a week", "warranty"),
]
MOODS = ["", "I am rather annoyed. ", "It is a present, so it is urgent. ", "This is the second time. "]


def messages(count: int, seed: int) -> list[dict]:
    """So many different messages."""
    generator, rows = random.Random(seed), {}
    while len(rows) < count:
        order = f"#{generator.randrange(10_000, 100_000)}"
        article, (case, remedy), mood = (generator.choice(options) for options in (ARTICLES, CASES, MOODS))
        prompt = f"{mood}My order {order}, a {article}, {case}. What can you do?"
        rows[prompt] = {"prompt": prompt, "keywords": [order, article, remedy]}
    return list(rows.values())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/customer_service/data.jsonl"))
    args = parser.parse_args(argv)
    print(write_jsonl(args.output, messages(args.rows, args.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
