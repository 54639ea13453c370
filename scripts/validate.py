"""
Checks an installation, from the objective to a tiny training run, against references of its own. No network.

    python scripts/validate.py                            about two minutes; validate.md in outputs/validate
    python scripts/validate.py --quick                    without training runs, a quarter of a minute
    python scripts/validate.py --only host objective/clip the checks whose names begin so

For whoever has just installed trl_gspo, or changed TRL, torch or this package. The references are slow loops over
sequences in float64, written from the GSPO paper (https://huggingface.co/papers/2507.18071) and, for credit, from
DeepSeekMath (https://huggingface.co/papers/2402.03300, section 4.1.3). They call nothing of `trl_gspo` and no loss of
TRL, so that a fault in either shows, one that both share too. Runs on the GPU if there is one; `--cpu` keeps it off.

Left out: several processes, and rollout engines.

Exit codes: 0 no check failed; 1 one did, each named at the top of the report with what to do; 2 bad input.
"""

import argparse
import copy
import dataclasses
import functools
import json
import logging
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets  # noqa: E402 - the environment has to stand before anything of Hugging Face is imported
import numpy as np  # noqa: E402
import torch  # noqa: E402
import trl  # noqa: E402
import yaml  # noqa: E402
from datasets import Dataset  # noqa: E402
from demo import accuracy, prepare  # noqa: E402
from pages import machine  # noqa: E402
from peft import LoraConfig  # noqa: E402
from tiny import make_model, make_tokenizer, sorting_rows  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import PrinterCallback  # noqa: E402
from transformers.utils import is_flash_attn_2_available  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

import trl_gspo  # noqa: E402
from trl_gspo import GSPOConfig, GSPOTrainer, turn_reward  # noqa: E402
from trl_gspo.clip_range import ClipRangeController  # noqa: E402
from trl_gspo.curves import draw  # noqa: E402
from trl_gspo.diagnostics import RatioStatistics  # noqa: E402
from trl_gspo.host import HAS_FUSED_HEAD  # noqa: E402
from trl_gspo.objective import gspo_loss  # noqa: E402
from trl_gspo.rewards import exact_match_reward  # noqa: E402


LEVELS = ("sequence", "sequence_token", "turn")

# What the paper gives: the ratio of the sequence (equation 7), sequences that count the same (5), rewards normalised
# in their group (6), no KL term (5), and by section 5.1 the clip range and four minibatches for each rollout batch.
# One pass over a rollout batch, sampling from the policy itself and no dropout are what the formulas are stated for.
PAPER = dict(
    importance_sampling_level="sequence",
    loss_type="grpo",
    scale_rewards="group",
    epsilon=3e-4,
    epsilon_high=4e-4,
    beta=0.0,
    num_iterations=1,
    temperature=1.0,
    top_p=1.0,
    delta=None,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    disable_dropout=True,
)
MINIBATCHES = 4
REFUSED = (
    *({"loss_type": name} for name in ("dapo", "bnpo", "dr_grpo", "cispo")),
    {"importance_sampling_level": "token"},
    {"epsilon": 0.0},
    {"epsilon": math.nan},
    {"epsilon_high": 3.0},
)

# ---- bounds: each a multiple of what rounding gives. On two x86-64 cores and the seeds 0 to 4 the largest figure is a
# fifth of its bound.

# A float64 sum over a dozen tokens rounds to some 1e-15; ten thousand times that.
EXACT = 1e-11
# float32 rounds to 6e-8, and a log-probability of the tiny model carries some tens of such roundings, as do the
# gradients; in the loss they cancel, as signs are mixed.
LOSS = 1e-6
GRADIENT = 1e-4
OLD_LOGPS = 2e-5  # nats
# A spread of 5e-3 in log-ratios that are known to 1e-7 is known to 2e-5, and its square to twice that.
METRIC = 1e-3
# Four steps, each from weights that carry the rounding of the steps before.
WEIGHTS = 1e-3
# float32 has 24 bits, and the group's deviation is at least a tenth of its largest reward.
ADVANTAGE = 1e-5
# Log-probabilities and gradients of packed rows against padded ones, as shares: of what another context does to the
# log-probabilities, and of the gradient. Other shapes are other orders of summation, which round in the last place, of
# size `eps` of the dtype, at some ten places of each of four layers and of its backward pass.
PACKED_EPS = 32


class Seen(NamedTuple):
    """
    A figure that a check saw, and where it has to lie.

    Args:
        name (`str`): appended to the check's.
        figure (`float`): what was seen; NaN is outside every bound.
        most (`float`): upper bound.
        least (`float`, *optional*): lower bound.
        note (`str`, *optional*): what the figure is of.
    """

    name: str
    figure: float
    most: float
    least: float | None = None
    note: str = ""

    @property
    def is_ok(self) -> bool:
        return (self.least is None or self.figure >= self.least) and self.figure <= self.most

    @property
    def bound(self) -> str:
        if self.least is None:
            return "exactly 0" if self.most == 0 else f"at most {self.most:.2g}"
        return f"at least {self.least:.3g}" if self.most == math.inf else f"{self.least:.3g} to {self.most:.3g}"


class Check(NamedTuple):
    name: str
    run: Callable[["Setting"], Iterator[Seen]]
    remedy: str


@dataclasses.dataclass
class Result:
    """A line of the report: `state` is `"ok"`, `"FAIL"` or `"skipped"`."""

    name: str
    state: str
    figure: str
    bound: str
    seconds: float
    note: str
    remedy: str


class SkippedError(Exception):
    """The check cannot run here; says why."""


class Setting:
    """
    The tiny model and data that all checks share.

    Args:
        folder (`Path`): for what trainers and runs write.
        seed (`int`, *optional*, defaults to 0): of weights and data.
        device (`str`, *optional*, defaults to `"cpu"`): or `"cuda"`.
    """

    def __init__(self, folder: Path, seed: int = 0, device: str = "cpu"):
        self.folder, self.seed, self.device = folder, seed, device
        self.tokenizer = make_tokenizer()
        torch.manual_seed(seed)
        # Five times the usual spread of the weights, or a random model would hardly look at its context.
        self.network = make_model(self.tokenizer, initializer_range=0.1)
        # In a folder, too: TRL loads its reference model from where the model came from.
        self.network.save_pretrained(folder / "model")
        self.network.config._name_or_path = str(folder / "model")
        self.deeper = make_model(self.tokenizer, initializer_range=0.05, hidden_size=128, layers=4)
        prompts = list(dict.fromkeys(row["prompt"] for row in sorting_rows(256, seed)))
        self.dataset = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
        self.noise: list[dict] = []
        self.runs: dict[str, dict] = {}

    def reference_model(self) -> torch.nn.Module:
        return copy.deepcopy(self.network).double().to(self.device)

    def trainer(self, trainer_class: type[GRPOTrainer], network: torch.nn.Module | None = None, **options):
        """A trainer of the tiny model, or of a copy of `network`, with `options` of its config or of its own."""
        own = ("rollout_func", "reward_funcs", "peft_config", "callbacks")
        arguments = {name: options.pop(name) for name in own if name in options}
        is_ours = issubclass(trainer_class, GSPOTrainer)
        if options.get("pack_live_tokens") and not HAS_FUSED_HEAD:
            raise SkippedError("rows are packed from TRL 1.15")
        options = dict(
            output_dir=str(self.folder / "trainer"),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=24,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=self.device == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            seed=self.seed,
        ) | (options if is_ours else stock_options(options))
        trainer = trainer_class(
            copy.deepcopy(network or self.network),
            args=(GSPOConfig if is_ours else GRPOConfig)(**options),
            train_dataset=self.dataset,
            processing_class=self.tokenizer,
            **{"reward_funcs": outcome} | arguments,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.model.train()
        if is_ours:
            trainer._find_way()
            if trainer.args.pack_live_tokens and HAS_FUSED_HEAD and trainer._scorer.way != "packed":
                raise RuntimeError(f"rows are not packed: {trainer._scorer.reason}")
        return trainer


def stock_options(options: dict) -> dict:
    """What a script of TRL's own trainer has to write to train GSPO."""
    spelt_out = PAPER | {"steps_per_generation": MINIBATCHES * options.get("gradient_accumulation_steps", 1)}
    return spelt_out | {name: value for name, value in options.items() if name != "pack_live_tokens"}


# ---- the reference: loops over sequences, turns and tokens


class Batch(NamedTuple):
    """A micro-batch as the objective sees it, `(B, T)` each; `mask` is bool, and `advantages` may be `(B,)`."""

    logps: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor


def units_of(mask: Tensor, level: str) -> list[list[int]]:
    """The trained tokens of one row by unit of ratio: all of them, or each run of tokens without a gap."""
    tokens = [t for t, is_trained in enumerate(mask.tolist()) if is_trained]
    if level != "turn":
        return [tokens] if tokens else []
    starts = [t for t in tokens if t - 1 not in tokens]
    ends = [t + 1 for t in tokens if t + 1 not in tokens]
    return [list(range(start, end)) for start, end in zip(starts, ends, strict=True)]


def reference_loss(batch: Batch, epsilon_low: float, epsilon_high: float, level: str) -> Tensor:
    """
    Equations 5 to 7 of the paper, or 13 and 14 at the levels where each token has its own gradient: minus the mean
    over the sequences of the mean over their tokens of `min(s A, clip(s) A)`.
    """
    objectives = []
    for logps, old, advantages, mask in zip(*batch, strict=True):
        advantages = advantages.expand(len(mask))
        objective, length = torch.zeros((), dtype=torch.float64, device=mask.device), 0
        for unit in units_of(mask, level):
            ratio = torch.exp(sum(logps[t] - old[t] for t in unit) / len(unit))
            for t in unit:
                if level != "sequence":
                    ratio = ratio.detach() * torch.exp(logps[t] - logps[t].detach())
                is_inside = 1 - epsilon_low <= ratio.item() <= 1 + epsilon_high
                edge = 1 - epsilon_low if ratio.item() < 1 else 1 + epsilon_high
                clipped = ratio if is_inside else torch.full_like(ratio, edge).detach()
                objective = objective + min(ratio * advantages[t], clipped * advantages[t])
            length += len(unit)
        objectives.append(objective / max(length, 1))
    return -sum(objectives) / len(objectives)


def reference_logps(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """`(B, T)`, float64: each row alone and without padding through the model; 0 on padding."""
    rows = []
    for index, answer_mask in enumerate(inputs["completion_mask"].bool()):
        prompt = inputs["prompt_ids"][index][inputs["prompt_mask"][index].bool()]
        answer = inputs["completion_ids"][index][answer_mask]
        logits = model(input_ids=torch.cat([prompt, answer]).unsqueeze(0), use_cache=False).logits[0]
        logps = logits[len(prompt) - 1 : -1].double().log_softmax(-1).gather(1, answer.unsqueeze(1)).squeeze(1)
        rows.append(torch.nn.functional.pad(logps, (0, len(answer_mask) - len(answer))))
    return torch.stack(rows)


def reference_batch(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Batch:
    """What TRL's `inputs` of the loss are to the objective."""
    mask = inputs["completion_mask"].bool() & inputs.get("tool_mask", torch.ones(())).bool()
    logps = reference_logps(model, inputs)
    return Batch(logps, inputs["old_per_token_logps"].double(), inputs["advantages"].double(), mask)


def reference_metrics(
    batches: list[Batch], minibatches: list[int], epsilon_low: float, epsilon_high: float, level: str
) -> dict[str, float]:
    """The definitions of docs/metrics.md, in NumPy, over all units of `batches`."""
    units, live = 0, []
    for batch, minibatch in zip(batches, minibatches, strict=True):
        for row in zip(*(tensor.detach().cpu().numpy() for tensor in batch), strict=True):
            logps, old, advantages, mask = row
            found = units_of(torch.from_numpy(mask), level)
            units += len(found) if level == "turn" else 1
            for unit in found:
                signs = np.sign(np.broadcast_to(advantages, mask.shape)[unit])
                distance = logps[unit] - old[unit]
                ratio = np.exp(distance.mean())
                low, high = (ratio < 1 - epsilon_low) & (signs < 0), (ratio > 1 + epsilon_high) & (signs > 0)
                kl = (np.exp(distance) - 1 - distance).sum()
                if signs.any():
                    live.append((ratio, len(unit), low.any(), high.any(), (low | high).sum(), kl, minibatch))
    ratio, length, low, high, clipped_tokens, kl, minibatch = map(np.array, zip(*live, strict=True))
    clipped, logs = low | high, np.log(ratio)
    percentiles = {f"gspo/ratio/p{q:02d}": np.percentile(ratio, q) for q in (1, 10, 50, 90, 99)}
    by_minibatch = {
        f"gspo/clip_fraction/minibatch_{k}": clipped[minibatch == k].mean() for k in sorted(set(minibatches))
    }
    return by_minibatch | percentiles | {
        "gspo/clip_fraction/sequences": clipped.mean(),
        "gspo/clip_fraction/low": low.mean(),
        "gspo/clip_fraction/high": high.mean(),
        "gspo/clip_fraction/tokens": clipped_tokens.sum() / length.sum(),
        "gspo/ratio/mean": ratio.mean(),
        "gspo/ratio/std": ratio.std(),
        "gspo/ratio/min": ratio.min(),
        "gspo/ratio/max": ratio.max(),
        "gspo/ratio/ess": ratio.sum() ** 2 / len(ratio) / (ratio**2).sum(),
        "gspo/ratio/noise": logs[minibatch == 0].std(),
        "gspo/ratio/length_correlation": np.corrcoef(logs, length)[0, 1],
        "gspo/kl_old": kl.sum() / length.sum(),
        "gspo/live_fraction": len(live) / units,
        "gspo/epsilon_low": epsilon_low,
        "gspo/epsilon_high": epsilon_high,
    }  # fmt: skip


def metric_difference(logged: dict, expected: dict[str, float]) -> tuple[float, str]:
    """
    Largest difference and the key that it is at: as a share of the value; of the ratio's spread where the value is a
    ratio, all of which are near 1; of what is missing from 1 in the effective sample size.
    """
    spread = expected["gspo/ratio/std"]
    scales = dict.fromkeys((key for key in expected if key.startswith("gspo/ratio/")), spread)
    scales |= {"gspo/ratio/ess": 1 - expected["gspo/ratio/ess"], "gspo/ratio/length_correlation": 1.0}

    def difference(key: str) -> float:
        value, wanted = logged.get(key), expected[key]
        return math.inf if value is None else abs(value - wanted) / (scales.get(key) or abs(wanted) or 1.0)

    worst = max(expected, key=difference)
    return difference(worst), worst


def gradient_of(model: torch.nn.Module) -> Tensor:
    """All gradients of `model` in one vector, float64."""
    grads = (p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.parameters())
    return torch.cat([grad.double().flatten() for grad in grads])


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# ---- checks of the objective as a function


def random_batch(setting: Setting, shape: str, spread: float, rows: int = 16, columns: int = 12) -> Batch:
    """Uneven lengths, tokens of tools between trained ones, a row of advantage 0, one without trained tokens."""
    generator = torch.Generator().manual_seed(1000 + setting.seed)

    def random(*size: int, normal: bool = False) -> Tensor:
        draw_ = torch.randn if normal else torch.rand
        return draw_(*size, generator=generator, dtype=torch.float64)

    old = -3 * random(rows, columns)
    logps = old + spread * random(rows, columns, normal=True)
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=generator)
    mask = (torch.arange(columns) < lengths) & (random(rows, columns) < 0.7)
    advantages = random(rows, *([columns] if shape == "BT" else []), normal=True)
    mask[0, 0], mask[2], advantages[1] = True, False, 0
    return Batch(logps, old, advantages, mask)


def check_objective(setting: Setting, level: str) -> Iterator[Seen]:
    """Loss, gradient and ratios at log-ratios far inside, around and far outside of the clip range."""
    differences = {"loss": [], "gradient": [], "ratio": []}
    shapes = ("B",) if level == "sequence" else ("B", "BT")
    for shape, spread in ((shape, spread) for shape in shapes for spread in (1e-5, 1e-3, 0.3)):
        batch = random_batch(setting, shape, spread)
        leaf, reference_leaf = (batch.logps.clone().requires_grad_() for _ in range(2))
        loss, statistics = gspo_loss(leaf, batch.old, batch.advantages, batch.mask, level=level)
        expected = reference_loss(batch._replace(logps=reference_leaf), 3e-4, 4e-4, level)
        loss.backward()
        expected.backward()
        differences["loss"].append(abs(loss.item() - expected.item()))
        differences["gradient"].append(relative(leaf.grad, reference_leaf.grad))
        distance = batch.logps - batch.old
        for row, mask in enumerate(batch.mask):
            ratios = statistics.ratio[row].view(-1).tolist()
            for unit, ratio in zip(units_of(mask, level), ratios, strict=False):
                differences["ratio"].append(
                    abs(ratio - math.exp(sum(distance[row, t].item() for t in unit) / len(unit)))
                )
    for name, found in differences.items():
        yield Seen(name, max(found), EXACT)


def check_clip(setting: Setting) -> Iterator[Seen]:
    """
    The four meetings of a side of the clip range with a sign of the advantage, by hand: the gradient is exactly 0
    where the objective is clipped, `-s A / (B n)` at each token where it is not.
    """
    wrong, clipped = [], []
    for level in LEVELS:
        for sign in (1.0, -1.0):
            for log_ratio in (1e-3, -1e-3, 3.5e-4, -3.5e-4):
                leaf = torch.full((1, 4), log_ratio, dtype=torch.float64).requires_grad_()
                mask, old = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.float64)
                loss, statistics = gspo_loss(leaf, old, torch.tensor([sign]).double(), mask, level=level)
                loss.backward()
                # 3e-4 below 1 and 4e-4 above it: 3.5e-4 is clipped below and not above.
                is_clipped = log_ratio > 4e-4 if sign > 0 else log_ratio < -3e-4
                expected = 0.0 if is_clipped else -sign * math.exp(log_ratio) / 4
                difference = (leaf.grad - expected).abs().max().item()
                wrong.append(difference if not is_clipped else difference * math.inf if difference else 0.0)
                clipped.append(statistics.clip_fraction.item() != is_clipped)
    yield Seen("gradient", max(wrong), EXACT, note="infinite: a clipped token has a gradient")
    yield Seen("counts", sum(clipped), 0, note=f"of {len(clipped)}")


def check_padding(setting: Setting) -> Iterator[Seen]:
    """NaN and infinity off the trained tokens change nothing; loss and gradient of rows that are all masked are 0."""
    differences, masked = [], []
    for level in LEVELS:
        batch = random_batch(setting, "B", 1e-3)
        results = []
        for garbage in (None, math.nan, math.inf):
            logps, old = (
                tensor if garbage is None else tensor.masked_fill(~batch.mask, garbage) for tensor in batch[:2]
            )
            leaf = logps.clone().requires_grad_()
            loss, _ = gspo_loss(leaf, old, batch.advantages, batch.mask, level=level)
            results.append(torch.cat([loss.view(1), *torch.autograd.grad(loss, leaf)[0]]))
        differences += [_largest(result - results[0]) for result in results[1:]]
        leaf = batch.logps.clone().requires_grad_()
        loss, _ = gspo_loss(leaf, batch.old, batch.advantages, torch.zeros_like(batch.mask), level=level)
        masked += [_largest(loss), _largest(torch.autograd.grad(loss, leaf)[0])]
    yield Seen("garbage", max(differences), 0)
    yield Seen("all_masked", max(masked), 0)


def _largest(difference: Tensor) -> float:
    """Largest absolute value; infinity for NaN, which `max` would lose."""
    return difference.detach().abs().nan_to_num(nan=math.inf).max().item()


# ---- checks of the trainers on prepared inputs


# Sign of the advantage and log-ratio of each row: both signs on both sides of the paper's clip range, between its two
# widths and inside it; 0 for a row that is dead. Two more rows follow: one whose tokens are all a tool's, and one
# without any.
LOG_RATIOS = (5e-3, 3.5e-4, 2e-4, -2e-4, -3.5e-4, -5e-3)
ROWS = [*((sign, log_ratio) for sign in (1, -1) for log_ratio in LOG_RATIOS), (0, 5e-3), (0, -5e-3)]
WIDTH = 12


def make_inputs(setting: Setting, level: str, seed: int, shape: str = "B") -> dict[str, Tensor]:
    """
    What TRL hands to the loss, with units whose log-ratios are those of `ROWS`, turned round at every other unit, so
    that none lies near the edge of the clip range; garbage where the masks are 0.
    """
    generator = torch.Generator().manual_seed(100 * setting.seed + seed)
    rows = len(ROWS) + 2
    integers = functools.partial(torch.randint, generator=generator)
    lengths = integers(1, WIDTH, (rows, 1))
    lengths[0], lengths[-1] = WIDTH, 0
    inputs = {
        "prompt_ids": integers(7, 100, (rows, 6)),
        "prompt_mask": (torch.arange(6) >= 6 - integers(1, 7, (rows, 1))).long(),
        "completion_ids": integers(7, 100, (rows, WIDTH)),
        "completion_mask": (torch.arange(WIDTH) < lengths).long(),
        "tool_mask": (torch.rand(rows, WIDTH, generator=generator) < 0.7).long(),
    }
    inputs["tool_mask"][:, 0] = 1
    inputs["tool_mask"][-2] = 0
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    signs = torch.tensor([*(sign for sign, _ in ROWS), 1, 1])
    inputs["advantages"] = signs * (0.3 + torch.rand(rows, generator=generator))
    if shape == "BT":
        flips = torch.rand(rows, WIDTH, generator=generator) < 0.2
        inputs["advantages"] = inputs["advantages"].unsqueeze(1) * torch.where(flips, -0.7, 1.3)
    inputs = {name: value.to(setting.device) for name, value in inputs.items()}

    with torch.no_grad():
        logps = reference_logps(setting.reference_model(), inputs)
    mask = inputs["completion_mask"].bool() & inputs["tool_mask"].bool()
    old = torch.full_like(logps, -70.0)
    for row, (_, log_ratio) in enumerate(ROWS):
        for index, unit in enumerate(units_of(mask[row], level)):
            spread = 1e-2 * torch.randn(len(unit), generator=generator).to(logps)
            old[row, unit] = logps[row, unit] - log_ratio * (-1) ** index - spread + spread.mean()
    return inputs | {"old_per_token_logps": old.float()}


def backward(trainer: GRPOTrainer, batches: list[dict]) -> tuple[list[float], Tensor]:
    """Losses and gradient of `batches`, micro-batches of one optimizer step."""
    trainer.current_gradient_accumulation_steps = len(batches)
    trainer.model.zero_grad()
    losses = []
    for inputs in batches:
        loss = trainer.compute_loss(trainer.model, dict(inputs))
        loss.backward()
        losses.append(loss.item())
    return losses, gradient_of(trainer.model)


def reference_backward(setting: Setting, batches: list[dict], level: str) -> tuple[list[float], Tensor, list[Batch]]:
    model, losses, seen = setting.reference_model(), [], []
    for inputs in batches:
        seen.append(reference_batch(model, inputs))
        loss = reference_loss(seen[-1], 3e-4, 4e-4, level) / len(batches)
        loss.backward()
        losses.append(loss.item())
    return losses, gradient_of(model), seen


def differences_of(found: tuple, expected: tuple) -> Iterator[Seen]:
    pairs = zip(found[0], expected[0], strict=True)
    yield Seen("loss", max(abs(one - other) for one, other in pairs), LOSS)
    yield Seen("gradient", relative(found[1], expected[1]), GRADIENT)


def check_trainer(setting: Setting, level: str, packs: bool) -> Iterator[Seen]:
    """`GSPOTrainer`'s loss, gradient and metrics on prepared inputs, over two micro-batches."""
    shape = "B" if level == "sequence" else "BT"
    batches = [make_inputs(setting, level, seed, shape) for seed in (0, 1)]
    *expected, seen = reference_backward(setting, batches, level)
    trainer = setting.trainer(GSPOTrainer, importance_sampling_level=level, pack_live_tokens=packs)
    yield from differences_of(backward(trainer, batches), expected)

    trainer.log({"loss": 0.0})
    trainer.state.log_history.clear()
    for minibatch, inputs in enumerate(batches):
        trainer.state.global_step = minibatch
        trainer.compute_loss(trainer.model, dict(inputs))
    trainer.log({"loss": 0.0})
    figure, key = metric_difference(trainer.state.log_history[-1], reference_metrics(seen, [0, 1], 3e-4, 4e-4, level))
    yield Seen("metrics", figure, METRIC, note=key)


def check_microbatches(setting: Setting) -> Iterator[Seen]:
    """However a batch is cut into micro-batches, the gradient is that of the mean over its sequences."""
    inputs = make_inputs(setting, "sequence", 2)
    _, expected, _ = reference_backward(setting, [inputs], "sequence")
    trainer = setting.trainer(GSPOTrainer)
    for size in (1, 4, 8):
        parts = [
            {name: value[rows] if value.dim() else value for name, value in inputs.items()}
            for rows in torch.arange(len(inputs["prompt_ids"])).split(size)
        ]
        yield Seen(f"of_{size}", relative(backward(trainer, parts)[1], expected), GRADIENT)


def check_function(setting: Setting) -> Iterator[Seen]:
    """`gspo_loss` on the log-probabilities of the trainer's model gives the trainer's gradient."""
    for level in LEVELS:
        inputs = make_inputs(setting, level, 3, "B" if level == "sequence" else "BT")
        found = backward(setting.trainer(GSPOTrainer, importance_sampling_level=level), [inputs])
        model = setting.reference_model()
        loss, _ = gspo_loss(*reference_batch(model, inputs), level=level)
        loss.backward()
        yield Seen(level, relative(found[1], gradient_of(model)), GRADIENT)


def check_controller(setting: Setting) -> Iterator[Seen]:
    """The clip range that the controller comes to clips the share that it is to."""
    controller = ClipRangeController(3e-4, 4e-4, target=0.15, epsilon_min=1e-6, epsilon_max=0.5)
    generator = torch.Generator().manual_seed(setting.seed)
    log_ratios, advantages = (torch.randn(4000, 1, generator=generator).double() for _ in range(2))
    log_ratios = 0.02 * log_ratios
    for _ in range(60):
        rows = RatioStatistics().update(
            log_ratios, torch.zeros_like(log_ratios), advantages[:, 0], torch.ones(4000, 1).bool(),
            controller.epsilon_low, controller.epsilon_high, minibatch=1,
        )  # fmt: skip
        controller.observe(rows)
        controller.update(lambda tensor: tensor, lambda tensor: tensor)
    ratios = log_ratios.exp()
    low, high = ratios < 1 - controller.epsilon_low, ratios > 1 + controller.epsilon_high
    is_clipped = (low & (advantages < 0)) | (high & (advantages > 0))
    # A share of 4,000 units has a resolution of 3e-4, and 60 updates leave 0.7^60 of the way.
    yield Seen("clip_fraction", is_clipped.double().mean().item(), 0.155, 0.145, "the target is 0.15")


# ---- checks of the configuration


def check_defaults(setting: Setting) -> Iterator[Seen]:
    """The defaults are the paper's, and each optimizer step takes a quarter of a rollout batch."""
    config = GSPOConfig(
        output_dir=str(setting.folder / "config"),
        gradient_accumulation_steps=3,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    expected = PAPER | {"steps_per_generation": 3 * MINIBATCHES}
    wrong = [f"{name}={getattr(config, name)!r}" for name in expected if getattr(config, name) != expected[name]]
    yield Seen("paper", len(wrong), 0, note=", ".join(wrong) or f"{len(expected)} fields")


def check_refusals(setting: Setting) -> Iterator[Seen]:
    """What is not GSPO does not run as GSPO."""
    accepted = []
    for options in REFUSED:
        try:
            GSPOConfig(
                output_dir=str(setting.folder / "config"), bf16=False, use_cpu=True, report_to="none", **options
            )
            accepted.append(str(options))
        except ValueError:
            pass
    yield Seen("", len(accepted), 0, note=", ".join(accepted) or f"{len(REFUSED)} options")


def check_dropout(setting: Setting) -> Iterator[Seen]:
    """Dropout of layers, of attention and of an adapter is off, so that two forwards in train mode are one."""
    network = copy.deepcopy(setting.network)
    for module in network.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3, init_lora_weights=False)
    inputs = make_inputs(setting, "sequence", 4)
    for disable, name in ((True, "off"), (False, "on")):
        trainer = setting.trainer(
            GSPOTrainer, network, peft_config=adapter, disable_dropout=disable, pack_live_tokens=False
        )
        first, second = (backward(trainer, [inputs])[1] for _ in range(2))
        if disable:
            yield Seen(name, (first - second).abs().max().item(), 0)
        else:
            yield Seen(name, relative(first, second), math.inf, 1e-2, "left on, it shows")


# ---- checks of the installed TRL


def check_host(setting: Setting) -> Iterator[Seen]:
    """TRL's own trainer, with the options that make its loss GSPO, against the reference."""
    batches = [make_inputs(setting, "sequence", seed) for seed in (5, 6)]
    *expected, _ = reference_backward(setting, batches, "sequence")
    yield from differences_of(backward(setting.trainer(GRPOTrainer), batches), expected)


# Options that both trainers take, and what of them is in the loss beside the objective.
PARITY = {
    "defaults": {},
    "kl": dict(beta=0.1),
    "luspo": dict(loss_type="luspo"),
    "entropy": dict(entropy_coef=0.05),
    "off_policy_mask": dict(off_policy_mask_threshold=2e-3),
}


def check_parity(setting: Setting) -> Iterator[Seen]:
    """Both trainers are the same to the last bit where all tokens go through the model; to rounding on a GPU."""
    most = 0 if setting.device == "cpu" else GRADIENT
    known = GRPOConfig.__dataclass_fields__
    for name, options in PARITY.items():
        if not options.keys() <= known.keys():
            continue
        batches = [make_inputs(setting, "sequence", seed) for seed in (7, 8)]
        if "beta" in options:
            batches = [inputs | {"ref_per_token_logps": inputs["old_per_token_logps"] * 1.01} for inputs in batches]
        stock = backward(setting.trainer(GRPOTrainer, **options), batches)
        ours = backward(setting.trainer(GSPOTrainer, pack_live_tokens=False, **options), batches)
        difference = max(abs(one - other) for one, other in zip(stock[0], ours[0], strict=True))
        yield Seen(name, max(difference, _largest(stock[1] - ours[1])), most)


# ---- checks of a rollout batch, its rewards, and the optimizer steps that it gives


def is_dead(prompt: str) -> bool:
    return int(prompt[0]) < 3


def score(prompt: str, ids: list[int]) -> float:
    """The reward of a completion; all those of a prompt are equal where it is to be dead."""
    return 0.5 if is_dead(prompt) else float(sum(ids) % 7)


def turn_score(prompt: str, ids: list[int], turn: int) -> float:
    return 0.5 if is_dead(prompt) else float((sum(ids) + 7 * turn) % 5) / 2


def outcome(prompts, completion_ids, **_) -> list[float]:
    return [score(prompt, ids) for prompt, ids in zip(prompts, completion_ids, strict=True)]


@turn_reward
def turns(prompts, completion_ids, num_turns, **_) -> list[list[float]]:
    rows = zip(prompts, completion_ids, num_turns, strict=True)
    return [[turn_score(prompt, ids, turn) for turn in range(count)] for prompt, ids, count in rows]


def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
    """Random completions of one to four turns with an environment's tokens after each."""
    generator = torch.Generator().manual_seed(trainer.args.seed)
    tokenizer, masks = trainer.processing_class, []
    for _ in prompts:
        own, others = torch.randint(1, 4, (2, 4), generator=generator).tolist()
        count = int(torch.randint(1, 5, (), generator=generator))
        masks.append([bit for turn in range(count) for bit in [1] * own[turn] + [0] * others[turn]])
    ids = [torch.randint(7, 100, (len(mask),), generator=generator).tolist() for mask in masks]
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": ids,
        "env_mask": masks,
        "logprobs": [[-4.6] * len(row) for row in ids],
    }


class Recording:
    """Keeps what each loss is computed from."""

    def _compute_loss(self, model, inputs):
        self.__dict__.setdefault("seen", []).append(
            {name: value.detach().clone() for name, value in inputs.items() if torch.is_tensor(value)}
        )
        return super()._compute_loss(model, inputs)


class RecordingGSPOTrainer(Recording, GSPOTrainer):
    pass


class RecordingGRPOTrainer(Recording, GRPOTrainer):
    pass


ACCUMULATION = 2
LEARNING_RATE = 0.02  # moves log-ratios by about 1e-2 a step: far past the clip range, so that few lie at its edge


def check_rollout(setting: Setting, trainer_class: type[GRPOTrainer], level: str = "sequence") -> Iterator[Seen]:
    """One rollout batch in training, replayed in float64: advantages, old log-probabilities, weights, metrics."""
    options = dict(
        rollout_func=rollout,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=LEARNING_RATE,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=MINIBATCHES,
        logging_steps=MINIBATCHES,
    )
    if level != "sequence":
        options |= dict(importance_sampling_level=level, reward_funcs=[outcome, turns])
    trainer = setting.trainer(trainer_class, **options)
    trainer.train()
    micro_batches = MINIBATCHES * ACCUMULATION
    yield Seen("micro_batches", abs(len(trainer.seen) - micro_batches), 0, note=f"{micro_batches} of one rollout")
    advantages = reference_advantages(setting, trainer.seen, level)
    yield Seen("advantages", max(map(_largest_on_trained, trainer.seen, advantages)), ADVANTAGE)

    model, seen = setting.reference_model(), []
    start = parameters_of(model)
    old = []
    for step in range(MINIBATCHES):
        for inputs in trainer.seen[step * ACCUMULATION : (step + 1) * ACCUMULATION]:
            with torch.no_grad():
                old.append(reference_logps(setting.reference_model(), inputs))
            seen.append(reference_batch(model, inputs))
            (reference_loss(seen[-1], 3e-4, 4e-4, level) / ACCUMULATION).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
        model.zero_grad()
    is_live = [(batch.advantages.view(len(batch.mask), -1) != 0) & batch.mask for batch in seen]
    differences = [(batch.old - exact)[live] for batch, exact, live in zip(seen, old, is_live, strict=True)]
    yield Seen("old_logps", _largest(torch.cat(differences)), OLD_LOGPS)
    yield Seen("weights", relative(parameters_of(trainer.model) - start, parameters_of(model) - start), WEIGHTS)
    if issubclass(trainer_class, GSPOTrainer):
        log = next(entry for entry in trainer.state.log_history if "gspo/ratio/mean" in entry)
        minibatches = [index // ACCUMULATION for index in range(micro_batches)]
        expected = reference_metrics(seen, minibatches, 3e-4, 4e-4, level)
        # Before any update the ratio is 1: rounding alone is left, of which no two computations have the same.
        yield Seen("noise", mean_of([log], "gspo/ratio/noise"), 1e-6)
        figure, key = metric_difference(log, {key: expected[key] for key in expected if key != "gspo/ratio/noise"})
        yield Seen("metrics", figure, WEIGHTS, note=key)


def parameters_of(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def _largest_on_trained(inputs: dict[str, Tensor], expected: Tensor) -> float:
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    advantages = inputs["advantages"].double()
    return _largest((advantages.view(len(mask), -1).expand(mask.shape) - expected)[mask])


def normalised(rewards: list[float]) -> list[float]:
    """Equation 6 of the paper, as TRL has it: 1e-4 is added to the deviation of the sample."""
    array = np.array(rewards, dtype=np.float64)
    return ((array - array.mean()) / (array.std(ddof=1) + 1e-4)).tolist()


def reference_advantages(setting: Setting, seen: list[dict], level: str) -> list[Tensor]:
    """`(B, T)` for each micro-batch: the outcome's, and at token levels the credit of the turns."""
    groups: dict[str, list] = {}
    places = [(batch, row) for batch, inputs in enumerate(seen) for row in range(len(inputs["prompt_ids"]))]
    for batch, row in places:
        prompt = setting.tokenizer.decode(seen[batch]["prompt_ids"][row], skip_special_tokens=True)
        groups.setdefault(prompt, []).append((batch, row))
    advantages = [torch.zeros(inputs["completion_ids"].shape, dtype=torch.float64) for inputs in seen]
    for prompt, members in groups.items():
        ids = [
            seen[batch]["completion_ids"][row][seen[batch]["completion_mask"][row].bool()] for batch, row in members
        ]
        outcomes = normalised([score(prompt, answer.tolist()) for answer in ids])
        units = [
            units_of(seen[batch]["completion_mask"][row] * seen[batch]["tool_mask"][row], "turn")
            for batch, row in members
        ]
        steps = [
            [turn_score(prompt, answer.tolist(), turn) for turn in range(len(runs))]
            for answer, runs in zip(ids, units, strict=True)
        ]
        flat = iter(normalised([step for row in steps for step in row]))
        for (batch, row), runs, value in zip(members, units, outcomes, strict=True):
            credit = [next(flat) for _ in runs]
            for turn, unit in enumerate(runs):
                # The sum of the normalised rewards of the turns that end at or after the token.
                later = sum(credit[turn:]) if level != "sequence" else 0.0
                advantages[batch][row, unit] = value + later
    return [tensor.to(setting.device) for tensor in advantages]


# ---- checks of each attention implementation and dtype


def kinds_of_attention(device: str) -> list[tuple[str, torch.dtype]]:
    dtypes = [torch.float32, torch.bfloat16, *([torch.float16] if device == "cuda" else [])]
    kinds = [(name, dtype) for name in ("sdpa", "eager", "flex_attention") for dtype in dtypes]
    return kinds + [("flash_attention_2", dtype) for dtype in dtypes[1:]]


def long_inputs(setting: Setting, rows: int = 16, longest: int = 96) -> dict[str, Tensor]:
    """A rollout batch of lognormal lengths, padded to the longest: the shares that fill up and the gaps between."""
    generator = torch.Generator().manual_seed(setting.seed)
    lengths = (torch.empty(rows, 1).log_normal_(-1, 0.6, generator=generator) * longest).long().clamp(4, longest)
    lengths[0] = longest
    inputs = {
        "prompt_ids": torch.randint(7, 100, (rows, 8), generator=generator),
        "prompt_mask": (torch.arange(8) >= torch.randint(0, 6, (rows, 1), generator=generator)).long(),
        "completion_ids": torch.randint(7, 100, (rows, longest), generator=generator),
        "completion_mask": (torch.arange(longest) < lengths).long(),
    }
    return {name: value.to(setting.device) for name, value in inputs.items()}


def scored(trainer: GSPOTrainer, inputs: dict[str, Tensor], packs: bool, rows: int) -> Tensor:
    """`(B, T)`, log-probabilities by the trainer's scorer, `rows` rows at a time, packed or padded."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].size(1)
    parts = []
    for part in torch.arange(len(ids)).split(rows):
        layout = trainer._scorer.layout(mask[part], mask[part][:, -width:]) if packs else None
        parts.append(trainer._scorer(trainer.model, ids[part], mask[part], width, layout)[0].float())
    return torch.cat(parts)


def check_attention(setting: Setting, implementation: str, dtype: torch.dtype) -> Iterator[Seen]:
    """Packed rows against padded ones, and how far the ratio goes by rounding alone."""
    if implementation == "flash_attention_2" and not (setting.device == "cuda" and is_flash_attn_2_available()):
        raise SkippedError("flash attention needs a GPU and the package flash-attn")
    if implementation == "flex_attention" and setting.device == "cpu":
        raise SkippedError("flex attention has no backward pass on a CPU")
    network = copy.deepcopy(setting.deeper).to(dtype)
    network.set_attn_implementation(implementation)
    trainer, most = setting.trainer(GSPOTrainer, network, pack_live_tokens=True), PACKED_EPS * torch.finfo(dtype).eps
    inputs, rows = long_inputs(setting), 4
    mask = inputs["completion_mask"].bool()
    with torch.no_grad():
        padded, packed = (scored(trainer, inputs, packs, rows) for packs in (False, True))
        other = inputs | {"prompt_ids": inputs["prompt_ids"].flip(0)}
        context = (scored(trainer, other, True, rows) - packed)[mask].abs().mean().item()
    yield Seen("logps", (packed - padded)[mask].abs().mean().item() / context, most)

    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(setting.seed)).to(setting.device)
    gradients = []
    for packs in (False, True):
        trainer.model.zero_grad()
        (scored(trainer, inputs, packs, rows) * weights)[mask].mean().backward()
        gradients.append(gradient_of(trainer.model))
    yield Seen("gradient", relative(gradients[1], gradients[0]), most)

    with torch.no_grad():
        reshaped = scored(trainer, inputs, True, 1)
    # As in a first minibatch: the old ones without gradient, the new ones with it.
    same_shape = scored(trainer, inputs, True, rows).detach()
    noise = {"attention": implementation, "dtype": str(dtype).removeprefix("torch.")}
    noise["token"] = (reshaped - padded)[mask].std().item()
    noise["other_shape"] = log_ratio_spread(reshaped, padded, mask)
    noise["as_trained"] = log_ratio_spread(same_shape, packed, mask)
    noise["length"] = mask.sum(1).float().mean().item()
    setting.noise.append(noise)
    # A third of the paper's range: with a normal spread, 0.3% of the ratios leave it by themselves.
    yield Seen("noise", noise["as_trained"], 1e-4, note="log-ratio of a sequence, as it is trained")


def log_ratio_spread(logps: Tensor, old: Tensor, mask: Tensor) -> float:
    """Standard deviation over the sequences of the mean log-ratio of their tokens, nats."""
    return (
        torch.stack([values[row].double().mean() for values, row in zip(logps - old, mask, strict=True)]).std().item()
    )


# ---- training runs, the same but for the clip range


RANGES = {
    "too tight": dict(epsilon=3e-6, epsilon_high=4e-6),
    "paper's": dict(epsilon=3e-4, epsilon_high=4e-4),
    "controller": dict(epsilon=3e-4, epsilon_high=4e-4, clip_fraction_target=0.15),
    # GRPO's in the paper's comparison, section 5.1: for ratios of tokens, not of sequences.
    "token-level": dict(epsilon=0.2, epsilon_high=0.27),
}
STEPS = 120
TEST_ROWS = 1024
SMOOTHED = 5  # rollout batches at the start and at the end of a run, by which it is judged
CONFIG = Path(__file__).parents[1] / "configs" / "tiny.yaml"
# Fields of scripts/train.py, which is not run here.
OF_TRAIN_SCRIPT = ("model_name_or_path", "task", "dataset_name", "output_dir", "save_steps", "save_total_limit")


def train_with(setting: Setting, name: str) -> dict:
    """A run of the demo from the same base model, seed and budget, under one of `RANGES`; what came of it."""
    root = setting.folder / "training"
    base, folder = root / "base", root / name.replace(" ", "_").replace("'", "")
    if not base.is_dir():
        prepare(setting.seed, root)
    rows = [json.loads(line) for line in (root / "data" / "test.jsonl").read_text().splitlines()][:TEST_ROWS]
    if "before" not in setting.runs:
        setting.runs["before"] = accuracy(base, rows, setting.seed)
    options = {key: value for key, value in yaml.safe_load(CONFIG.read_text()).items() if key not in OF_TRAIN_SCRIPT}
    options |= dict(output_dir=str(folder), max_steps=STEPS, save_strategy="no", disable_tqdm=True, seed=setting.seed)
    options |= dict(use_cpu=setting.device == "cpu", clip_fraction_target=None) | RANGES[name]
    started = time.perf_counter()
    trainer = GSPOTrainer(
        str(base),
        reward_funcs=exact_match_reward,
        args=GSPOConfig(**options),
        train_dataset=Dataset.from_json(str(root / "data" / "train.jsonl")),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model(str(folder))
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {"logs": logs, "seconds": seconds, "after": accuracy(folder, rows, setting.seed)}


def mean_of(logs: list[dict], key: str) -> float:
    """Mean of a metric over the logs that have it: where no answer is live there is no ratio."""
    values = [entry[key] for entry in logs if entry.get(key) is not None]
    return float(np.mean(values)) if values else math.nan


def check_training(setting: Setting, name: str) -> Iterator[Seen]:
    """No run collapses; under the controller the reward rises, with ratio and clipped share where they should be."""
    run = setting.runs[name] = train_with(setting, name)
    logs = run["logs"]
    yield Seen("logs", abs(len(logs) - STEPS // MINIBATCHES), 0, note="one for each rollout batch")
    values = [entry[key] for entry in logs for key in ("loss", "grad_norm", "entropy", "reward")]
    yield Seen("not_finite", sum(value is None or not math.isfinite(value) for value in values), 0)
    # The health watch warns outside of 0.1 to 10.
    extremes = {key: [entry[f"gspo/ratio/{key}"] for entry in logs] for key in ("min", "max", "noise")}
    extremes = {key: [value for value in values if value is not None] for key, values in extremes.items()}
    yield Seen("ratio_max", max(extremes["max"]), 10.0, 1.0)
    yield Seen("ratio_min", min(extremes["min"]), 1.0, 0.1)
    yield Seen("noise", max(extremes["noise"]), 1e-6)
    # An answer is five digits and the end.
    yield Seen("length", mean_of(logs[-SMOOTHED:], "completions/mean_length"), 6.0, 5.5)
    if name == "controller":
        before, after = (mean_of(part, "reward") for part in (logs[:SMOOTHED], logs[-SMOOTHED:]))
        # Over the seeds 0 to 2 both rise by more than twice as much.
        yield Seen("reward_rise", after - before, 1.0, 0.2, f"{before:.2f} to {after:.2f}")
        gain = run["after"] - setting.runs["before"]
        yield Seen("accuracy_rise", gain, 1.0, 0.25, f"{TEST_ROWS} prompts held out")
        # The target is 0.15 of the sequences, and the first third of the run is on the way to it.
        rest = logs[len(logs) // 3 :]
        yield Seen("clip_fraction", mean_of(rest, "gspo/clip_fraction/sequences"), 0.3, 0.05)
        yield Seen("ratio_std", mean_of(rest, "gspo/ratio/std"), 0.1, 1e-3)
        # 2.3 nats are a digit by chance, and 0 is a policy that samples one answer to everything.
        yield Seen("entropy", mean_of(logs[-SMOOTHED:], "entropy"), 2.3, 5e-3, "nats a token")


def check_order(setting: Setting) -> Iterator[Seen]:
    """The wider the range, the less is clipped."""
    shares = {
        name: mean_of(setting.runs[name]["logs"], "gspo/clip_fraction/tokens")
        for name in ("too tight", "paper's", "token-level")
    }
    tight, paper, token = shares.values()
    yield Seen("tight_over_papers", tight - paper, 1.0, 0.0)
    yield Seen("papers_over_token_level", paper - token, 1.0, 0.2)
    yield Seen("token_level", token, 0.05, 0.0)


# ---- all checks, and what to do about each


OURS = (
    "trl_gspo itself is not as released: `pip install --force-reinstall --no-deps` it, or look at `git diff trl_gspo`."
)
HOST = (
    "The installed TRL computes another loss than the one this package builds on: `pip install --force-reinstall "
    "--no-deps 'trl>=1.14.2,<1.17'`. If TRL is patched on purpose, do not call the result GSPO."
)
PACKING = (
    "Packed rows are not kept apart, or not put back in place: train with `pack_live_tokens=False`, and report it "
    "with the versions below."
)
PRECISION = (
    "This attention implementation and dtype do not give packed rows what they give padded ones: set another "
    "`attn_implementation`, or `pack_live_tokens=False`."
)
DYNAMICS = (
    "The technical checks say where; if they pass, compare `training.png` with the README's figures for the demo."
)


def technical_checks(device: str) -> list[Check]:
    checks = [
        Check("config/defaults", check_defaults, f"A default is not the paper's. {OURS}"),
        Check("config/refusals", check_refusals, OURS),
        Check("config/dropout", check_dropout, f"Dropout moves the ratio past the clip range. {OURS}"),
    ]
    checks += [Check(f"objective/{level}", functools.partial(check_objective, level=level), OURS) for level in LEVELS]
    checks += [Check("objective/clip", check_clip, OURS), Check("objective/padding", check_padding, OURS)]
    checks += [Check("host/reference", check_host, HOST), Check("host/parity", check_parity, f"{OURS} {HOST}")]
    checks += [
        Check("host/rollout", functools.partial(check_rollout, trainer_class=RecordingGRPOTrainer), HOST),
    ]
    for level in LEVELS:
        for packs, name in ((False, "whole"), (True, "packed")):
            run = functools.partial(check_trainer, level=level, packs=packs)
            remedy = PACKING if packs else f"If host/reference fails too: {HOST} Else: {OURS}"
            checks.append(Check(f"trainer/{level}/{name}", run, remedy))
    checks += [
        Check("trainer/microbatches", check_microbatches, f"{OURS} {HOST}"),
        Check("trainer/function", check_function, OURS),
        Check("trainer/controller", check_controller, OURS),
    ]
    for level in LEVELS:
        run = functools.partial(check_rollout, trainer_class=RecordingGSPOTrainer, level=level)
        checks.append(Check(f"rollout/{level}", run, f"If host/rollout fails too: {HOST} Else: {OURS}"))
    for implementation, dtype in kinds_of_attention(device):
        run = functools.partial(check_attention, implementation=implementation, dtype=dtype)
        name = f"attention/{implementation}/{str(dtype).removeprefix('torch.')}"
        checks.append(Check(name, run, PRECISION))
    return checks


def training_checks() -> list[Check]:
    runs = [
        Check(f"training/{name.replace(' ', '_')}", functools.partial(check_training, name=name), DYNAMICS)
        for name in RANGES
    ]
    return [*runs, Check("training/clip_ranges", check_order, DYNAMICS)]


def run_check(check: Check, setting: Setting) -> Iterator[Result]:
    """One result for each figure; one that failed, with the error, where the check raises."""
    started, any_seen = time.perf_counter(), False

    def seconds() -> float:
        nonlocal started
        begun, started = started, time.perf_counter()
        return started - begun

    def result(name: str, state: str, figure: str = "", bound: str = "", note: str = "") -> Result:
        return Result(name, state, figure, bound, seconds(), note, check.remedy)

    try:
        for seen in check.run(setting):
            any_seen = True
            name = f"{check.name}/{seen.name}" if seen.name else check.name
            yield result(name, "ok" if seen.is_ok else "FAIL", f"{seen.figure:.3g}", seen.bound, seen.note)
        if not any_seen:
            yield result(check.name, "FAIL", note="the check compared nothing")
    except SkippedError as error:
        yield result(check.name, "skipped", note=str(error))
    except Exception as error:  # a broken installation may raise anything, and the other checks still have to run
        yield result(check.name, "FAIL", figure="error", note=f"{type(error).__name__}: {error}".splitlines()[0])


@contextmanager
def quiet() -> Iterator[None]:
    """What trainers warn of and say about tiny models is not news here."""
    disable_progress_bar()
    datasets.disable_progress_bars()
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            torch.set_num_threads(threads)


def run_checks(checks: list[Check], setting: Setting) -> list[Result]:
    results = []
    for check in checks:
        for result in run_check(check, setting):
            results.append(result)
            print(line_of(result), flush=True)
    return results


def line_of(result: Result) -> str:
    end = f"{result.seconds:5.1f} s  {result.note}".rstrip()
    return f"{result.state:8}{result.name:44}{result.figure:>10}  {result.bound:18}{end}"


# ---- the report


PACKAGES = ("torch", "trl", "transformers", "peft", "deepspeed", "accelerate", "datasets", "flash-attn", "trl_gspo")


def environment(device: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": machine().split(";")[0], "device": device}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    # Which of several installations runs is half of the question.
    for package in (trl, trl_gspo):
        found[package.__name__] += f", in {Path(package.__file__).parent}"
    return found


def markdown_table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |\n" for line in lines)


def report(results: list[Result], setting: Setting, command: str, seconds: float) -> str:
    """`validate.md`: what failed first, and what to do."""
    failed = [result for result in results if result.state == "FAIL"]
    skipped = [result for result in results if result.state == "skipped"]
    passed = len(results) - len(failed) - len(skipped)
    verdict = f"**{len(failed)} failed**" if failed else "None failed"
    counts = f"{verdict}, {passed} passed, {len(skipped)} skipped."
    sections = [f"# Validation of trl_gspo\n\n{counts} `{command}`, {seconds:.0f} s.\n"]
    if failed:
        rows = [[result.name, result.figure, result.bound, result.note, result.remedy] for result in failed]
        sections.append("## What failed\n\n" + markdown_table(["check", "seen", "bound", "note", "what to do"], rows))
    rows = [[name, value] for name, value in environment(setting.device).items()]
    sections.append("## Environment\n\n" + markdown_table(["", ""], rows))
    if skipped:
        rows = [[result.name, result.note] for result in skipped]
        sections.append("## Skipped\n\n" + markdown_table(["check", "why"], rows))
    if setting.noise:
        sections.append(noise_section(setting.noise))
    if set(RANGES) <= setting.runs.keys():
        sections.append(training_section(setting.runs))
    rows = [
        [result.name, result.figure, result.bound, result.state, f"{result.seconds:.1f}", result.note]
        for result in results
    ]
    sections.append("## All checks\n\n" + markdown_table(["check", "seen", "bound", "", "seconds", "note"], rows))
    return "\n".join(sections)


def noise_section(noise: list[dict]) -> str:
    header = ["attention", "dtype", "of a token", "of a sequence", "range from", "at 1,000 tokens", "as trained here"]
    rows = []
    for row in noise:
        at_thousand = row["token"] / math.sqrt(1000)
        figures = (row["token"], row["other_shape"], 3 * row["other_shape"], 3 * at_thousand, row["as_trained"])
        rows.append([row["attention"], row["dtype"], *(f"{figure:.1e}" for figure in figures)])
    return (
        "## Noise floor of this machine\n\n"
        "Standard deviation of the log-ratio, in nats, where the same weights score the same tokens again: of a token "
        f"and of a sequence ({noise[0]['length']:.0f} tokens in the mean), if rows that were scored four at a "
        "time, padded, are scored one at a time. A clip range has to be three times as wide, or rounding alone "
        "decides over a part of what is clipped: `range from`, at this length and, if tokens round independently, at "
        "1,000 tokens. The paper's range is 3e-4 and 4e-4. `as trained here` is the spread where old and new "
        "log-probabilities come from the same packs of tokens, as `GSPOTrainer` lays them out. The model is tiny and "
        "random: a deep one rounds more.\n\n" + markdown_table(header, rows) + "\n![Noise floor](noise.png)\n"
    )


def training_section(runs: dict) -> str:
    header = [
        "clip range", "reward: first", "last", "accuracy: before", "after", "clipped tokens", "spread of the ratio",
        "range at the end", "seconds",
    ]  # fmt: skip
    rows = []
    for name in RANGES:
        logs = runs[name]["logs"]
        first, last = (mean_of(part, "reward") for part in (logs[:SMOOTHED], logs[-SMOOTHED:]))
        spread, tokens = (mean_of(logs, key) for key in ("gspo/ratio/std", "gspo/clip_fraction/tokens"))
        low, high = logs[-1]["gspo/epsilon_low"], logs[-1]["gspo/epsilon_high"]
        rows.append([
            name, f"{first:.3f}", f"{last:.3f}", f"{runs['before']:.3f}", f"{runs[name]['after']:.3f}",
            f"{tokens:.3f}", f"{spread:.2g}", f"{low:.1g}, {high:.1g}", f"{runs[name]['seconds']:.0f}",
        ])  # fmt: skip
    return (
        f"## Training and clip ranges\n\nSorting five digits, {STEPS} optimizer steps of 256 answers, four to a "
        "rollout batch; the same base model, data, seed and budget. Reward: mean of the first and the last "
        f"{SMOOTHED} rollout batches. Accuracy: {TEST_ROWS} held-out prompts, one sample each. Clipped tokens and the "
        "standard deviation of the ratio: means over the run. One seed of one model of 0.17M parameters whose answers "
        "are six tokens long: this checks the machinery, and is no evidence for one range over another. The ratio of "
        "six tokens spreads far wider than that of thousands, for which the paper's range is.\n\n"
        + markdown_table(header, rows)
        + "\n![Training runs](training.png)\n"
    )


def draw_noise(noise: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.5 * len(noise)), layout="constrained")
    axes = figure.subplots()
    places = range(len(noise))
    # Rounding that is exactly 0 has no place on a logarithmic axis.
    for key, marker, label in (
        ("other_shape", "o", "in another shape"),
        ("as_trained", "x", "as trained here"),
    ):
        axes.plot([max(row[key], 1e-10) for row in noise], places, marker, label=label)
    axes.axvline(3e-4, color="0.5", label="paper's clip range")
    axes.set_yticks(places, [f"{row['attention']}, {row['dtype']}" for row in noise])
    axes.set_xscale("log")
    axes.set_xlabel("standard deviation of the log-ratio of a sequence, nats; 0 stands at 1e-10")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_all(setting: Setting, output: Path) -> str:
    """Writes the pictures, and returns what to add to the report where they cannot be drawn."""
    try:
        if setting.noise:
            draw_noise(setting.noise, output / "noise.png")
        if set(RANGES) <= setting.runs.keys():
            draw({name: setting.runs[name]["logs"] for name in RANGES}, output / "training.png")
    except ImportError as error:
        return f"\nThere are no pictures: {error}. `pip install matplotlib` brings them.\n"
    return ""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the technical checks alone")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="checks whose names begin so")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and runs")
    parser.add_argument("--cpu", action="store_true", help="not on the GPU, if there is one")
    parser.add_argument("--output", type=Path, default=Path("outputs/validate"))
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    checks = technical_checks(device) + ([] if args.quick else training_checks())
    known = [check.name for check in checks]
    if args.only:
        checks = [check for check in checks if check.name.startswith(tuple(args.only))]
        missing = [name for name in args.only if not any(other.startswith(name) for other in known)]
        if missing:
            print(f"validate.py: no check begins with {missing[0]!r}; there are {', '.join(known)}", file=sys.stderr)
            return 2
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            setting = Setting(Path(folder), args.seed, device)
            results = run_checks(checks, setting)
    args.output.mkdir(parents=True, exist_ok=True)
    command = f"python scripts/validate.py{''.join(' ' + word for word in argv)}"
    note = draw_all(setting, args.output)
    (args.output / "validate.md").write_text(report(results, setting, command, time.perf_counter() - started) + note)
    failed = [result.name for result in results if result.state == "FAIL"]
    skipped = sum(result.state == "skipped" for result in results)
    passed = len(results) - len(failed) - skipped
    print(f"\n{passed} passed, {len(failed)} failed, {skipped} skipped; {args.output / 'validate.md'}")
    for name in failed:
        print(f"FAILED {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
