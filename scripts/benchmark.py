"""
Loss step of `GSPOTrainer` against TRL's `GRPOTrainer` at sequence level: same weights, same rollout batch, one
process.

    python scripts/benchmark.py                         table.md, speed.png and results.json in outputs/benchmark
    python scripts/benchmark.py --quick --check         two minutes; exit code 1 if a bound is broken
    python scripts/benchmark.py --metrics --check --docs docs/speed.md    puts table and picture there, too
    python scripts/benchmark.py --models moe --micro-batches 1 8 --dead 0 0.5    all combinations of these

A row of the table is one rollout batch: forward and backward of its micro-batches, gradients added up, no optimizer.
Stock and ours take turns at each micro-batch, so that whatever else the machine does meets both; a speed-up is the
median over rounds. Weights are random and nothing is downloaded. Models named after Qwen2.5 have its shapes, run in
bfloat16 with gradient checkpointing, and need a GPU: 8 GB for 0.5B, 120 GB for the two copies of 7B with their
gradients, by arithmetic; they have not been run. Left out: generation, rewards, several processes.

Exit codes: 0 done; 1 a bound of `--check` is broken, each named in one line; 2 bad input.
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402 - the environment has to stand before anything of Hugging Face is imported
from datasets import Dataset  # noqa: E402
from pages import has_markers, into_docs, machine  # noqa: E402
from tiny import make_tokenizer  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.models.utils import disable_gradient_checkpointing  # noqa: E402

from trl_gspo import GSPOConfig, GSPOTrainer  # noqa: E402


GROUP = 2  # completions of a prompt; few, so that a few rows can have any share of dead groups
STEPS = 2  # optimizer steps of a rollout batch

# What `--check` holds rows to.
MOST_TOKENS = 1.02  # through the model, of those with gradient
LEAST_SHARE = {0.5: 0.9, 0.0: 0.8}  # of the bound, by dead share, at the micro-batches below
SHARE_MICRO_BATCHES = (1, 8)
LEAST_SPEED = 0.98  # where there is nothing to save
MOST_GRADIENT_DIFFERENCE = 1e-5  # in float32
METRIC_BYTES = 72  # beyond stock's peak memory: what metrics keep of each sequence until the log
MOST_METRICS = 1.02  # time with the metrics over time without
MOST_IMPORT = 0.05  # seconds beside TRL's trainer

# Where there is nothing to save two percent have to be told apart, and more rounds are run.
ROUNDS_OF_NOTHING = 4

BEGIN, END = "<!-- benchmark: written by scripts/benchmark.py -->", "<!-- end of benchmark -->"


@dataclasses.dataclass(frozen=True)
class Case:
    """
    One row of the table. `longest` is the longest completion, `dead` the share of groups without advantage (one group
    lives in any case), `rows` the completions of the rollout batch.
    """

    model: str = "dense"
    lengths: str = "lognormal"
    longest: int = 512
    micro_batch: int = 8
    dead: float = 0.5
    rows: int = 32
    router_loss: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        model = self.model + ", router loss" * self.router_loss + ", bfloat16" * (self.dtype == "bfloat16")
        return f"{model}, {self.lengths} {self.longest}, micro-batch {self.micro_batch}, dead {self.dead:g}"

    @property
    def saves_nothing(self) -> bool:
        return self.lengths == "equal" and self.dead == 0


def default_cases() -> list[Case]:
    """Each value of each axis, not all combinations. Fewer rows and a smaller model where completions are long."""
    cases = [Case(micro_batch=1, dead=dead, rows=16) for dead in (0.5, 0.0)]
    cases += [Case(micro_batch=8, dead=dead) for dead in (0.5, 0.0)]
    cases += [Case(micro_batch=4, rows=16), Case(micro_batch=16)]
    cases += [Case(micro_batch=1, dead=0.9, rows=20), Case(micro_batch=4, dead=0.9, rows=40)]
    cases += [Case(lengths="equal", micro_batch=size, dead=0.0, rows=2 * size) for size in (1, 4)]
    cases += [Case(lengths="equal", longest=128, dead=dead, rows=16) for dead in (0.5, 0.0)]
    moe = dict(model="moe", rows=16)
    cases += [Case(**moe, micro_batch=size, dead=dead) for dead in (0.5, 0.0) for size in (1, 8)]
    cases += [Case(**moe, micro_batch=size, router_loss=True) for size in (1, 8)]
    cases += [Case(dtype="bfloat16", rows=16)]
    cases += [Case("tiny", longest=2048, micro_batch=size, rows=16) for size in (1, 8)]
    cases += [Case("tiny", "equal", 2048, 1, dead=0.0, rows=4)]
    cases += [Case("tiny", longest=8192, micro_batch=size, dead=dead, rows=4) for size, dead in ((1, 0.5), (2, 0.0))]
    cases += [Case("tiny", "equal", 8192, 1, dead=0.0, rows=2)]
    if torch.cuda.is_available():
        for model, longest, size in itertools.product(GPU_MODELS, (512, 2048, 8192), (1, 8)):
            cases += [Case(model, longest=longest, micro_batch=size, dtype="bfloat16")]
        cases += [Case(model, "equal", 512, 8, dead=0.0, dtype="bfloat16") for model in GPU_MODELS]
    return cases


def quick_cases() -> list[Case]:
    cases = [Case(longest=256, micro_batch=size, dead=dead, rows=16) for dead in (0.5, 0.0) for size in (1, 8)]
    cases += [Case(lengths="equal", longest=256, micro_batch=2, dead=0.0, rows=4)]
    return cases + [Case("moe", longest=256, micro_batch=2, rows=16, router_loss=True)]


def small_shape(hidden: int, layers: int) -> dict[str, Any]:
    return dict(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 192,
        head_dim=64,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )


def model_config(name: str) -> PretrainedConfig:
    """Shapes by name. On the CPU small ones; those of Qwen2.5 are published in its `config.json`."""
    if name == "tiny":
        return Qwen3Config(**small_shape(192, 2))
    if name == "dense":
        return Qwen3Config(**small_shape(384, 4))
    if name == "moe":
        experts = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256, router_aux_loss_coef=0.001)
        return Qwen3MoeConfig(**small_shape(384, 4) | experts)
    qwen = dict(max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6)
    if name == "qwen2.5-0.5b":
        shape = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14)
        return Qwen2Config(vocab_size=151936, num_key_value_heads=2, tie_word_embeddings=True, **shape, **qwen)
    shape = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
    return Qwen2Config(vocab_size=152064, num_key_value_heads=4, tie_word_embeddings=False, **shape, **qwen)


CPU_MODELS = ("tiny", "dense", "moe")
GPU_MODELS = ("qwen2.5-0.5b", "qwen2.5-7b")


# ---- the two trainers and their rollout batch


class Bench:
    """
    A stock trainer and ours on the same weights.

    Args:
        case ([`Case`]): whose model, router loss and dtype they have.
        folder (`Path`): for what trainers write.
    """

    def __init__(self, case: Case, folder: Path):
        self.is_gpu = case.model in GPU_MODELS
        config = model_config(case.model)
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
        shared = dict(
            output_dir=str(folder),
            per_device_train_batch_size=GROUP,
            steps_per_generation=STEPS,
            num_generations=GROUP,
            epsilon=3e-4,
            epsilon_high=4e-4,
            loss_type="grpo",
            beta=0.0,
            disable_dropout=True,
            importance_sampling_level="sequence",
            report_to="none",
            save_strategy="no",
            bf16=False,
            use_cpu=not self.is_gpu,
            gradient_checkpointing=self.is_gpu,  # without it, a 7B and 8192 tokens of 16 rows fit nowhere
        )
        if hasattr(config, "router_aux_loss_coef"):
            shared["router_aux_loss_coef"] = config.router_aux_loss_coef if case.router_loss else 0.0
        arguments = dict(
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_list([{"prompt": "-"}] * 64),
            processing_class=make_tokenizer(),
        )
        self.stock = GRPOTrainer(copy.deepcopy(network), args=GRPOConfig(**shared), **arguments)
        self.ours = GSPOTrainer(network, args=GSPOConfig(**shared), **arguments)
        self.ours._find_way()
        for trainer in (self.stock, self.ours):
            trainer.model.train()
        self.device = self.ours.accelerator.device
        self.vocabulary = config.vocab_size

    def set_up(self, case: Case) -> None:
        """The trainers' numbers of micro-batches."""
        count = case.rows // case.micro_batch
        for trainer in (self.stock, self.ours):
            trainer.args.per_device_train_batch_size = case.micro_batch
            trainer.args.steps_per_generation = count
            trainer.args.gradient_accumulation_steps = count // STEPS
            trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps


def completion_lengths(case: Case, generator: torch.Generator) -> torch.Tensor:
    if case.lengths == "equal":
        return torch.full((case.rows,), case.longest)
    # Mean 190 where the longest is 512, which one row is.
    lengths = torch.empty(case.rows).log_normal_(math.log(0.29), 0.7, generator=generator) * case.longest
    lengths[torch.randint(case.rows, (), generator=generator)] = case.longest
    return lengths.long().clamp(1, case.longest)


def make_rollout(case: Case, vocabulary: int, device: torch.device, seed: int = 0) -> dict[str, torch.Tensor]:
    """What TRL has after a rollout, all padded to the longest of it; groups one after the other."""
    generator = torch.Generator().manual_seed(seed)
    group = min(GROUP, case.rows)
    groups = case.rows // group
    prompt_lengths = torch.randint(20, 61, (groups,), generator=generator).repeat_interleave(group)
    if case.lengths == "equal":
        prompt_lengths[:] = 40
    lengths = completion_lengths(case, generator)
    prompt, width = int(prompt_lengths.max()), int(lengths.max())
    prompt_ids = torch.randint(vocabulary, (groups, prompt), generator=generator).repeat_interleave(group, 0)
    advantages = torch.randn(groups, group, generator=generator)
    advantages -= advantages.mean(1, keepdim=True)
    advantages[torch.randperm(groups, generator=generator)[: min(round(case.dead * groups), groups - 1)]] = 0.0
    rollout = {
        "prompt_ids": prompt_ids,
        "prompt_mask": (torch.arange(prompt) >= prompt - prompt_lengths[:, None]).long(),
        "completion_ids": torch.randint(vocabulary, (case.rows, width), generator=generator),
        "completion_mask": (torch.arange(width) < lengths[:, None]).long(),
        "advantages": advantages.flatten(),
    }
    return {name: value.to(device) for name, value in rollout.items()}


def tokens_with_gradient(case: Case, rollout: dict[str, torch.Tensor]) -> int:
    """Tokens that the loss depends on: of live rows all but the last, whose successor nobody asks for."""
    lengths = rollout["prompt_mask"].sum(1) + rollout["completion_mask"].sum(1)
    if case.router_loss:
        return int(lengths.sum())  # the routers' loss is of all tokens of all rows
    return int((lengths - 1)[rollout["advantages"] != 0].sum())


def micro_batches(case: Case, rollout: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """TRL's shuffle and split."""
    order = torch.randperm(case.rows, generator=torch.Generator().manual_seed(1))
    tokens = {"num_items_in_batch": rollout["completion_mask"].sum()}
    return [{name: value[rows] for name, value in rollout.items()} | tokens for rows in order.split(case.micro_batch)]


def score_stock(trainer: GRPOTrainer, case: Case, rollout: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Micro-batches with old log-probabilities, as TRL gets them: all rows, before it shuffles."""
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
    mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
    with torch.no_grad(), checkpointing_off(trainer):
        logps, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, rollout["completion_ids"].size(1), batch_size=case.micro_batch
        )
    return micro_batches(case, rollout | {"old_per_token_logps": logps})


def score_ours(trainer: GSPOTrainer, case: Case, rollout: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Micro-batches with layouts and old log-probabilities, as our trainer makes them of TRL's."""
    if trainer._scorer.way == "whole":
        return score_stock(trainer, case, rollout)
    batches = trainer._balanced(micro_batches(case, rollout))
    trainer._lay_out(batches)
    return batches


def checkpointing_off(trainer: GRPOTrainer) -> contextlib.AbstractContextManager:
    return disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs)


def loss_step(trainer: GRPOTrainer, batch: dict[str, Any]) -> None:
    """Forward and backward of a micro-batch; gradients are added to what is there."""
    trainer.accelerator.backward(trainer.compute_loss(trainer.model, batch))


def forget(trainer: GRPOTrainer) -> None:
    """Gradients, and what was collected for a log."""
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    if isinstance(trainer, GSPOTrainer):
        trainer._ratio_statistics["train"]._units.clear()


# ---- what is measured


class LiveBytes(TorchDispatchMode):
    """
    Most bytes of tensors that were there at once, over what was there before. A kernel's own scratch memory is not in
    it. On a GPU the allocator's figure is taken instead.
    """

    def __init__(self):
        super().__init__()
        self._now = self.most = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if torch.is_tensor(value):
                self._known.add(value.untyped_storage())  # there before, if it is new here
        result = function(*args, **kwargs or {})
        for value in tree_leaves(result):
            if torch.is_tensor(value):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._now -= size


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Gives a function that says by how many bytes memory rose at most since."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as live:
            yield lambda: live.most


@dataclasses.dataclass
class Side:
    """What one pass of one of the two trainers over a rollout batch shows beside its time."""

    tokens: int  # through the model in the loss step
    stub_tokens: int  # of them in forwards that score nothing
    peak_bytes: int  # of a loss step over the weights: activations and gradients
    noise: float  # standard deviation of log s over the live rows, nats: no weight has changed since they were scored
    gradients: list[torch.Tensor]


def one_pass(trainer: GRPOTrainer, batches: list[dict[str, Any]]) -> Side:
    tokens, logps = [], []
    score = trainer._get_per_token_logps_and_entropies

    def recording(*args, **kwargs):
        scored = score(*args, **kwargs)
        logps.append(scored[0].detach().double())
        return scored

    def count(module, args, kwargs):
        tokens[-1] += kwargs["input_ids"].numel()

    forget(trainer)
    hook = trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer._get_per_token_logps_and_entropies = recording
    try:
        with peak_memory(trainer.accelerator.device) as peak:
            for batch in batches:
                tokens.append(0)
                loss_step(trainer, batch)
            peak_bytes = peak()
    finally:
        del trainer._get_per_token_logps_and_entropies
        hook.remove()
    log_ratios = []
    for batch, new in zip(batches, logps, strict=True):
        mask, is_live = batch["completion_mask"], batch["advantages"] != 0
        difference = (new - batch["old_per_token_logps"].double()) * mask
        log_ratios.append((difference.sum(1) / mask.sum(1))[is_live])
    is_stub = [getattr(batch.get("layout"), "is_stub", False) for batch in batches]
    return Side(
        sum(tokens),
        sum(itertools.compress(tokens, is_stub)),
        peak_bytes,
        torch.cat(log_ratios).std(correction=0).item(),
        [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None],
    )


Clocks = tuple[float, float]  # wall, CPU; seconds


def timed(action: Callable[[], Any], device: torch.device) -> Clocks:
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def ratios_of_a_round(first: list[Callable], second: list[Callable], device: torch.device) -> Clocks:
    """Time of all `first` over time of all `second`, by wall and by CPU, taking turns with who begins."""
    totals = torch.zeros(2, 2, dtype=torch.float64)
    for index, pair in enumerate(zip(first, second, strict=True)):
        for side in (0, 1) if index % 2 == 0 else (1, 0):
            totals[side] += torch.tensor(timed(pair[side], device), dtype=torch.float64)
    wall, cpu = (totals[0] / totals[1]).tolist()
    return wall, cpu


@dataclasses.dataclass
class Result:
    """A row of the table: [`Case`], and what was measured. Speed-ups of the loss step are by round."""

    case: Case
    stock_tokens: int
    our_tokens: int
    stub_tokens: int
    tokens_with_gradient: int
    speed_by_wall: list[float]
    speed_by_cpu: list[float]
    scoring_speed_by_wall: float
    scoring_speed_by_cpu: float
    stock_peak_bytes: int
    our_peak_bytes: int
    stock_noise: float
    our_noise: float
    gradient_difference: float

    @property
    def bound(self) -> float:
        return self.stock_tokens / self.tokens_with_gradient

    @property
    def speed(self) -> float:
        """The speed-up that counts: on the CPU by CPU time, which others on the machine disturb less."""
        return statistics.median(self.speed_by_wall if self.case.model in GPU_MODELS else self.speed_by_cpu)

    @property
    def share(self) -> float:
        return self.speed / self.bound

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"bound": self.bound, "speed": self.speed, "share_of_bound": self.share}


def measure(bench: Bench, case: Case, rounds: int) -> Result:
    bench.set_up(case)
    rollout = make_rollout(case, bench.vocabulary, bench.device)
    stock_batches, our_batches = score_stock(bench.stock, case, rollout), score_ours(bench.ours, case, rollout)
    stock, ours = one_pass(bench.stock, stock_batches), one_pass(bench.ours, our_batches)
    pairs = zip(ours.gradients, stock.gradients, strict=True)
    difference = sum((one.double() - other.double()).square().sum().item() for one, other in pairs)
    size = sum(other.double().square().sum().item() for other in stock.gradients)

    def steps(trainer, batches):
        return [lambda batch=batch: loss_step(trainer, batch) for batch in batches]

    speeds = []
    for index in range(rounds * ROUNDS_OF_NOTHING if case.saves_nothing else rounds):
        forget(bench.stock)
        forget(bench.ours)
        both = steps(bench.stock, stock_batches), steps(bench.ours, our_batches)
        speeds.append(ratios_of_a_round(*both, bench.device))
        if index == 0:
            both = [lambda: score_stock(bench.stock, case, rollout)], [lambda: score_ours(bench.ours, case, rollout)]
            scoring_by_wall, scoring_by_cpu = ratios_of_a_round(*both, bench.device)
    by_wall, by_cpu = map(list, zip(*speeds, strict=True))
    return Result(
        case,
        stock.tokens,
        ours.tokens,
        ours.stub_tokens,
        tokens_with_gradient(case, rollout),
        by_wall,
        by_cpu,
        scoring_by_wall,
        scoring_by_cpu,
        stock.peak_bytes,
        ours.peak_bytes,
        stock.noise,
        ours.noise,
        math.sqrt(difference / size),
    )


def metrics_cost(bench: Bench, case: Case, rounds: int) -> list[float]:
    """CPU time of our loss step with `gspo/*` metrics over that without, by round; a log at each optimizer step."""
    bench.set_up(case)
    trainer = bench.ours
    batches = score_ours(trainer, case, make_rollout(case, bench.vocabulary, bench.device))
    metrics = trainer._ratio_statistics["train"]
    every = trainer.args.gradient_accumulation_steps

    def with_metrics(index):
        loss_step(trainer, batches[index])
        if (index + 1) % every == 0:
            metrics.compute(trainer.accelerator.gather)

    def without_metrics(index):
        metrics.update = lambda *args, **kwargs: None
        loss_step(trainer, batches[index])
        del metrics.update

    ratios = []
    for _ in range(rounds + 1):
        forget(trainer)
        indices = range(len(batches))
        both = [lambda i=i: with_metrics(i) for i in indices], [lambda i=i: without_metrics(i) for i in indices]
        ratios.append(ratios_of_a_round(*both, bench.device)[1])
    return ratios[1:]  # the first warms up


IMPORTS = """
import time
from trl import GRPOConfig, GRPOTrainer
before = time.process_time()
from trl_gspo import GSPOConfig, GSPOTrainer
print(before, time.process_time() - before)
"""


def import_cost(rounds: int) -> tuple[float, float]:
    """
    CPU seconds of TRL's trainer and of ours after it, each the median over fresh processes. In one process, because
    two imports of TRL differ by more than ours takes.
    """
    seconds = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
        seconds.append([float(word) for word in done.stdout.split()[-2:]])
    stock, ours = zip(*seconds, strict=True)
    return statistics.median(stock), statistics.median(ours)


# ---- what it is held to


def broken(result: Result) -> list[str]:
    """What of a row is not as it must be."""
    case, found = result.case, []
    if case.dtype == "float32" and not result.gradient_difference <= MOST_GRADIENT_DIFFERENCE:
        found.append(f"gradient differs by {result.gradient_difference:.1e}, more than {MOST_GRADIENT_DIFFERENCE:.0e}")
    most = MOST_TOKENS * result.tokens_with_gradient
    if result.our_tokens - result.stub_tokens > most:
        found.append(f"tokens through the model: {result.our_tokens}, more than {most:.0f}")
    if case.saves_nothing:
        if result.speed < LEAST_SPEED:
            found.append(f"speed-up {result.speed:.3f}, less than {LEAST_SPEED}, where there is nothing to save")
    elif case.micro_batch in SHARE_MICRO_BATCHES and result.share < LEAST_SHARE.get(case.dead, 0.0):
        found.append(f"speed-up {result.share:.2f} of the bound, less than {LEAST_SHARE[case.dead]}")
    if result.our_peak_bytes > result.stock_peak_bytes + METRIC_BYTES * case.rows:
        found.append(f"memory: {result.our_peak_bytes} bytes at the peak, stock {result.stock_peak_bytes}")
    if result.our_noise > result.stock_noise:
        found.append(f"noise {result.our_noise:.1e} nats, stock {result.stock_noise:.1e}")
    return found


# ---- what it writes

COLUMNS = (
    "model", "lengths, longest", "micro-batch", "dead", "tokens: stock", "ours", "with gradient", "bound",
    "speed-up by CPU time (range)", "by wall", "of the bound", "old log-probs", "memory, MB: stock", "ours",
    "noise: stock", "ours", "gradient difference",
)  # fmt: skip


def table(results: list[Result]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    for result in results:
        case = result.case
        cells = (
            case.model + " + router loss" * case.router_loss + " bf16" * (case.dtype == "bfloat16"),
            f"{case.lengths}, {case.longest}",
            case.micro_batch,
            f"{case.dead:g}",
            result.stock_tokens,
            result.our_tokens,
            result.tokens_with_gradient,
            f"{result.bound:.2f}",
            f"**{statistics.median(result.speed_by_cpu):.2f}** "
            f"({min(result.speed_by_cpu):.2f} to {max(result.speed_by_cpu):.2f})",
            f"{statistics.median(result.speed_by_wall):.2f}",
            f"{result.share:.2f}",
            f"{result.scoring_speed_by_cpu:.2f}",
            f"{result.stock_peak_bytes / 1e6:.0f}",
            f"{result.our_peak_bytes / 1e6:.0f}",
            f"{result.stock_noise:.0e}",
            "0" if result.our_noise == 0 else f"{result.our_noise:.0e}",
            f"{result.gradient_difference:.0e}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def draw(results: list[Result], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1 + 0.28 * len(results)), constrained_layout=True)
    places = range(len(results))
    axes.barh(places, [result.speed for result in results], color="C0", label="measured")
    label = "bound: its tokens / tokens with gradient"
    axes.plot([result.bound for result in results], places, "|", color="black", markersize=12, label=label)
    axes.axvline(1.0, color="0.5", linewidth=0.8)
    axes.set_yticks(places, [str(result.case) for result in results], fontsize="small")
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("loss step: times the speed of TRL's GRPOTrainer")
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(output, dpi=120)
    plt.close(figure)


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    if args.quick:
        return quick_cases()
    if not any((args.models, args.lengths, args.micro_batches, args.dead)):
        return default_cases()
    axes = (args.models or ["dense"], args.lengths or [512], args.micro_batches or [1, 8], args.dead or [0.5])
    cases = []
    for model, longest, size, dead in itertools.product(*axes):
        dtype = "bfloat16" if model in GPU_MODELS else "float32"
        rows = max(STEPS * size, min(32, 32 * 512 // longest) // (STEPS * size) * STEPS * size)
        cases.append(Case(model, longest=longest, micro_batch=size, dead=dead, rows=rows, dtype=dtype))
    return cases


def _missing(cases: list[Case], page: Path | None) -> str | None:
    needs_gpu = [case.model for case in cases if case.model in GPU_MODELS]
    if needs_gpu and not torch.cuda.is_available():
        return f"{needs_gpu[0]} needs a GPU, and there is none: --models {' '.join(CPU_MODELS)}"
    if page is not None and not has_markers(page, BEGIN, END):
        return f"{page} does not hold the two lines {BEGIN!r} and {END!r}, between which the table goes."
    return None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small rows")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a bound is broken")
    parser.add_argument("--models", nargs="+", choices=(*CPU_MODELS, *GPU_MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, help="longest completions, tokens")
    parser.add_argument("--micro-batches", nargs="+", type=int)
    parser.add_argument("--dead", nargs="+", type=float, help="shares of groups without advantage")
    parser.add_argument("--repeats", type=int, default=2, help="rounds of each row")
    parser.add_argument("--metrics", action="store_true", help="also what the `gspo/*` metrics cost")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--docs", type=Path, help="page that gets the table, with the picture beside it")
    args = parser.parse_args(argv)
    cases, begin = chosen_cases(args), time.perf_counter()
    missing = _missing(cases, args.docs)
    if missing is not None:
        print(f"benchmark.py: {missing}", file=sys.stderr)
        return 2

    results, complaints, notes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        bench, kind = None, None
        for case in cases:
            if (case.model, case.router_loss, case.dtype) != kind:
                bench = None  # frees the last one's memory first
                kind, bench = (case.model, case.router_loss, case.dtype), Bench(case, Path(folder))
            result = measure(bench, case, args.repeats)
            results.append(result)
            print(f"{case}: {result.speed:.2f} of {result.bound:.2f}, {time.perf_counter() - begin:.0f} s", flush=True)
            complaints += [f"{case}: {message}" for message in broken(result)]
        costs = {}
        if args.metrics:
            for size in SHARE_MICRO_BATCHES:
                case = Case(micro_batch=size, longest=256 if args.quick else 512, rows=16)
                costs[size] = statistics.median(metrics_cost(Bench(case, Path(folder)), case, 5 * args.repeats))
                notes.append(f"Metrics at micro-batch {size}: {100 * costs[size] - 100:+.1f}% of the loss step.")
                if costs[size] > MOST_METRICS:
                    complaints.append(f"metrics, {case}: {costs[size]:.3f} of the time without, most {MOST_METRICS}")
    stock_import, our_import = import_cost(max(args.repeats, 3))
    notes.append(f"Import: TRL's trainer {stock_import:.2f} s, ours {1000 * our_import:.0f} ms more.")
    if our_import > MOST_IMPORT:
        complaints.append(f"import: {1000 * our_import:.0f} ms beside TRL's trainer, most {1000 * MOST_IMPORT:.0f}")

    minutes = (time.perf_counter() - begin) / 60
    command = f"`python scripts/benchmark.py{''.join(' ' + word for word in argv)}`"
    heading = f"{machine()}. {command}, {minutes:.0f} minutes.\n\n" + "".join(f"- {note}\n" for note in notes) + "\n"
    args.output.mkdir(parents=True, exist_ok=True)
    everything = {
        "machine": machine(),
        "command": command.strip("`"),
        "rows": [result.as_json() for result in results],
        "metrics_cost": costs,
        "import_seconds": {"trl": stock_import, "trl_gspo": our_import},
        "broken": complaints,
    }
    (args.output / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
    (args.output / "table.md").write_text(heading + table(results))
    draw(results, args.output / "speed.png")
    if args.docs is not None:
        picture = args.docs.with_suffix(".png")
        draw(results, picture)
        into_docs(
            f"\n![Speed-up of the loss step]({picture.name})\n\n{heading}{table(results)}\n", args.docs, BEGIN, END
        )
    print(heading + table(results))
    for complaint in complaints if args.check else ():
        print(f"BROKEN {complaint}")
    return 1 if args.check and complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
