"""A run that goes on from a checkpoint is the run that was not stopped, to the last bit."""

import json
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import sorting_rows
from varied_reward import share_of_digits

from trl_gspo import GSPOConfig, GSPOTrainer


ROLLOUT = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "steps_per_generation": 4,
    "max_completion_length": 6,
}
DAYTIME = ("time", "per_second", "runtime")


def make(model, folder, prompts=16, streams=False, peft=False, **options):
    """A trainer of 10 steps. Two rollout batches of four optimizer steps each are an epoch; a log is of three steps."""
    args = GSPOConfig(
        **{
            "output_dir": str(folder),
            "max_steps": 10,
            "save_strategy": "steps",
            "save_steps": 1,
            "logging_steps": 3,
            "learning_rate": 1e-3,
            "clip_fraction_target": 0.3,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
        }
        | ROLLOUT
        | options
    )
    rows = Dataset.from_list(sorting_rows(prompts, seed=0))
    # What is random before a run must not matter to one that goes on.
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(len(str(folder)))
    return GSPOTrainer(
        model=model,
        reward_funcs=share_of_digits,
        args=args,
        train_dataset=rows.to_iterable_dataset() if streams else rows,
        eval_dataset=Dataset.from_list(sorting_rows(4, seed=1)) if "eval_steps" in options else None,
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]) if peft else None,
    )


def outcome(trainer):
    """Weights, and what was logged but for the time it took; without the summary of the call."""
    weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    logs = [
        {name: value for name, value in entry.items() if not any(word in name for word in DAYTIME)}
        for entry in trainer.state.log_history
        if "train_loss" not in entry
    ]
    return weights, json.dumps(logs, indent=1, sort_keys=True).splitlines()


def check_same(trainer, expected):
    weights, logs = outcome(trainer)
    assert logs == expected[1]
    assert weights.keys() == expected[0].keys()
    differences = {name: (weights[name] - weight).abs().max().item() for name, weight in expected[0].items()}
    assert all(torch.equal(weights[name], weight) for name, weight in expected[0].items()), differences


VARIANTS = {
    "plain": {},
    "accumulation, evaluation": {
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "steps_per_generation": 8,
        "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4,
    },
    "iterations, stream": {"num_iterations": 2, "streams": True, "prompts": 64, "clip_fraction_target": None},
    "LoRA, reference": {"peft": True, "beta": 0.04, "learning_rate": 1e-2},
    "experts, tokens": {"importance_sampling_level": "sequence_token", "log_expert_change": True},
    "turns, whole": {"importance_sampling_level": "turn", "pack_live_tokens": False},
    "steps across rollouts": {"gradient_accumulation_steps": 3, "steps_per_generation": 4, "prompts": 24},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_going_on_is_as_if_it_had_not_been_stopped(variant, model_path, moe_path, tmp_path, request):
    options = VARIANTS[variant]
    model = moe_path if options.get("log_expert_change") else model_path
    first = make(model, tmp_path / "run", **options)
    before = {name: weight.clone() for name, weight in first.model.state_dict().items()}
    first.train()
    expected = outcome(first)
    assert any(not torch.equal(before[name], weight) for name, weight in expected[0].items())
    for step in (3, 6) if variant != "plain" else (4, 8, 9, 10):
        second = make(model, tmp_path / f"from {step}", **options)
        second.train(str(tmp_path / "run" / f"checkpoint-{step}"))
        check_same(second, expected)
