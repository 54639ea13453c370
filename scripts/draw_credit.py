"""
Draws docs/credit.png: where the gradient of one episode goes, by unit of ratio and credit.

    python scripts/draw_credit.py

The numbers are those of `gspo_loss` and of the credit in `trl_gspo/credit.py` on one made-up group of two episodes of
three turns each, of which the first is drawn: a good turn, a bad one, and one in between.
"""

import argparse
import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - the backend without a screen has to be chosen first
import torch  # noqa: E402

from trl_gspo.credit import credit_to_tokens, normalize_steps, place_steps  # noqa: E402
from trl_gspo.objective import gspo_loss, turn_ids  # noqa: E402


# Tokens of the three turns, and of the two answers of the environment between them.
TURNS, ANSWERS = (6, 4, 8), (3, 3)
# Per-token log-ratio of each turn since the rollout: the second has moved far.
LOG_RATIOS = (1e-4, -9e-4, 1e-4)
# Step rewards of the two episodes. Their outcome is the mean.
STEPS = [[2.0, -1.0, 1.0], [0.5, 0.5, 0.5]]


def gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mask of the first episode, and by case how far a step of gradient descent pushes each log-probability."""
    pieces = [torch.ones(TURNS[0])]
    for turn, answer in zip(TURNS[1:], ANSWERS, strict=True):
        pieces += [torch.zeros(answer), torch.ones(turn)]
    mask = torch.cat(pieces).bool().expand(2, -1)
    ids = turn_ids(mask)
    old = torch.full(mask.shape, -1.0, dtype=torch.float64)
    logps = old + torch.tensor([*LOG_RATIOS, 0.0], dtype=torch.float64)[ids]

    rewards, is_end = place_steps(STEPS, "turn", ids)
    by_turn = credit_to_tokens(normalize_steps(rewards, is_end, num_generations=2), is_end)
    outcome = torch.tensor([sum(steps) / len(steps) for steps in STEPS], dtype=torch.float64)
    outcome = (outcome - outcome.mean()) / (outcome.std() + 1e-4)

    def push(advantages, level):
        leaf = logps.clone().requires_grad_()
        loss, _ = gspo_loss(leaf, old, advantages, mask, level=level)
        return -torch.autograd.grad(loss, leaf)[0][0]

    return mask[0], {
        "sequence, outcome: one ratio, one advantage": push(outcome, "sequence"),
        "sequence_token, credit by turn: one ratio, the advantage of each turn": push(by_turn, "sequence_token"),
        "turn, credit by turn: the second turn left the clip range and is clipped alone": push(by_turn, "turn"),
    }


def draw(output: Path) -> None:
    mask, cases = gradients()
    figure, panels = plt.subplots(len(cases), 1, sharex=True, sharey=True, figsize=(8, 6), constrained_layout=True)
    positions = range(len(mask))
    for axes, (title, push) in zip(panels, cases.items(), strict=True):
        axes.bar(positions, push, color=["C0" if value >= 0 else "C3" for value in push])
        for position, trained in enumerate(mask):
            if not trained:
                axes.axvspan(position - 0.5, position + 0.5, color="0.9", linewidth=0)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_title(title, fontsize="small", loc="left")
        axes.set_ylabel("push on log-prob", fontsize="small")
    panels[-1].set_xlabel("token of the episode (grey: answers of the environment, which are not trained)")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/credit.png"), help="PNG to write")
    args = parser.parse_args(argv)
    draw(args.output)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
