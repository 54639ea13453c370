"""
Loss step of `GSPOTrainer` against TRL's `GRPOTrainer` at sequence level: same weights, same rollout batch, one process.

    python scripts/benchmark.py                  a table, a picture and results.json in outputs/benchmark
    python scripts/benchmark.py --quick --check  a minute; exit code 1 if a bound is broken
    python scripts/benchmark.py --docs docs/speed.md    also puts table and picture there

A row of the table is one rollout batch: old log-probabilities, then forward and backward of each of its micro-batches,
gradients added up, no optimizer. Stock and ours take turns; the speed-up is the median over neighbours in that order.
Weights are random and nothing is downloaded. Models named after Qwen2.5 have its shapes and run in bfloat16, where
there is a GPU. Left out: generation, rewards, several processes.
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402 - the environment has to stand before anything of Hugging Face is imported
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
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

from trl_gspo import GSPOConfig, GSPOTrainer  # noqa: E402


GROUP = 8  # completions of a prompt
STEPS = 4  # optimizer steps of a rollout batch

# Of the issue that asked for this script.
MOST_TOKENS = 1.02  # through the model, of those with gradient
LEAST_SPEED = {0.5: 0.9, 0.0: 0.8}  # of the bound, by dead share, with lognormal lengths
LEAST_SPEED_OF_NOTHING = 0.98  # where there is nothing to save
MOST_GRADIENT_DIFFERENCE = 1e-5
MOST_METRICS = 1.02
MOST_IMPORT = 0.05  # seconds
SPEED_MICRO_BATCHES = (1, 8)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table. `longest` is the longest completion, `dead` the share of groups without advantage."""

    model: str = "dense"
    micro_batch: int = 8
    dead: float = 0.5
    lengths: str = "lognormal"
    longest: int = 512
    rows: int = 64
    router_loss: bool = False


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
        model (`str`): name in [`model_config`].
        folder (`Path`): for what trainers write.
        options (`dict`, *optional*): of our trainer, beside its defaults.
        dtype (`torch.dtype`, *optional*): of the weights; float32 on the CPU, bfloat16 elsewhere.
    """

    def __init__(
        self,
        model: str,
        folder: Path,
        router_loss: bool = False,
        dtype: torch.dtype | None = None,
        options: dict[str, Any] | None = None,
    ):
        self.is_gpu = model in GPU_MODELS
        config = model_config(model)
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(
            config, dtype=dtype or (torch.bfloat16 if self.is_gpu else torch.float32)
        )
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
            shared["router_aux_loss_coef"] = config.router_aux_loss_coef if router_loss else 0.0
        arguments = dict(
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_list([{"prompt": "-"}] * 64),
            processing_class=make_tokenizer(),
        )
        self.stock = GRPOTrainer(copy.deepcopy(network), args=GRPOConfig(**shared), **arguments)
        self.ours = GSPOTrainer(network, args=GSPOConfig(**shared, **options or {}), **arguments)
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
            trainer.args.gradient_accumulation_steps = max(count // STEPS, 1)
            trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


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
    group = min(GROUP, max(case.rows // 2, 1))
    groups = case.rows // group
    prompt_lengths = torch.randint(20, 61, (groups,), generator=generator).repeat_interleave(group)
    lengths = completion_lengths(case, generator)
    prompt, width = int(prompt_lengths.max()), int(lengths.max())
    prompt_ids = torch.randint(vocabulary, (groups, prompt), generator=generator).repeat_interleave(group, 0)
    advantages = torch.randn(groups, group, generator=generator)
    advantages -= advantages.mean(1, keepdim=True)
    advantages[torch.randperm(groups, generator=generator)[: round(case.dead * groups)]] = 0.0
    rollout = {
        "prompt_ids": prompt_ids,
        "prompt_mask": (torch.arange(prompt) >= prompt - prompt_lengths[:, None]).long(),
        "completion_ids": torch.randint(vocabulary, (case.rows, width), generator=generator),
        "completion_mask": (torch.arange(width) < lengths[:, None]).long(),
        "advantages": advantages.flatten(),
    }
    return {name: value.to(device) for name, value in rollout.items()}


def micro_batches(case: Case, rollout: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """TRL's shuffle and split."""
    order = torch.randperm(case.rows, generator=torch.Generator().manual_seed(1))
    tokens = {"num_items_in_batch": rollout["completion_mask"].sum()}
    return [{name: value[rows] for name, value in rollout.items()} | tokens for rows in order.split(case.micro_batch)]


def score_stock(trainer: GRPOTrainer, case: Case, rollout: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rollout with old log-probabilities, as TRL gets them: all rows, before it shuffles."""
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
    mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
    with torch.no_grad(), checkpointing_off(trainer):
        logps, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, rollout["completion_ids"].size(1), case.micro_batch
        )
    return rollout | {"old_per_token_logps": logps}


def score_ours(trainer: GSPOTrainer, batches: list[dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """Micro-batches with layouts and old log-probabilities, as our trainer makes them of TRL's."""
    batches = trainer._balanced([dict(batch) for batch in batches])
    if trainer._scorer.way == "whole":
        with torch.no_grad(), checkpointing_off(trainer):
            for batch in batches:
                ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
                mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
                batch["old_per_token_logps"], *_ = trainer._get_per_token_logps_and_entropies(
                    trainer.model, ids, mask, batch["completion_ids"].size(1)
                )
    else:
        trainer._lay_out(batches)
    return batches


def checkpointing_off(trainer: GRPOTrainer) -> Any:
    from trl.models.utils import disable_gradient_checkpointing

    return disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs)


def loss_step(trainer: GRPOTrainer, batches: list[dict[str, Any]]) -> None:
    """Forward and backward of the micro-batches; gradients are added to what is there."""
    for batch in batches:
        trainer.accelerator.backward(trainer.compute_loss(trainer.model, batch))
    trainer._metrics["train"].clear()
    if isinstance(trainer, GSPOTrainer):
        statistics_of = trainer._ratio_statistics["train"]
        statistics_of._units.clear()


# ---- what is measured


class LiveBytes(TorchDispatchMode):
    """
    Most bytes of tensors that were there at once, over what was there before. A kernel's own scratch memory is not in
    it. On a GPU the allocator's figure is taken instead.
    """

    def __init__(self):
        super().__init__()
        self._now = self._most = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
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
        self._most = max(self._most, self._now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._now -= size
