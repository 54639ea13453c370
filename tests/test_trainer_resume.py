"""A run that goes on from a checkpoint is the run that was not stopped, to the last bit."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from ranks import run_on_two_ranks
from tiny import sorting_rows
from varied_reward import share_of_digits

from trl_gspo import GSPOConfig, GSPOTrainer
from trl_gspo.checkpoints import options_of


ROLLOUT = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "steps_per_generation": 4,
    "max_completion_length": 6,
}
DAYTIME = ("time", "per_second", "runtime")


def make(model, folder, prompts=16, streams=False, peft=False, **options):
    """A trainer of 10 steps: two rollout batches of four optimizer steps are an epoch, and a log is of three steps."""
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
    for step in (3, 6) if variant != "plain" else (3, 8, 9, 10):
        second = make(model, tmp_path / f"from {step}", **options)
        second.train(str(tmp_path / "run" / f"checkpoint-{step}"))
        check_same(second, expected)


def go_on_with_two_ranks(model, folder):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "steps_per_generation": 8}
    first = make(model, Path(folder, "run"), prompts=32, **options)
    first.train()
    expected = outcome(first)
    for step in (3, 8):
        second = make(model, Path(folder, f"from {step}"), prompts=32, **options)
        second.train(str(Path(folder, "run", f"checkpoint-{step}")))
        check_same(second, expected)
    files = {path.name for path in Path(folder, "run", "checkpoint-3").iterdir()}
    assert {"gspo_state_0.pt", "gspo_state_1.pt", "rng_state_0.pth", "rng_state_1.pth"} <= files


@pytest.mark.slow
def test_two_ranks_go_on_as_if_they_had_not_been_stopped(model_path, tmp_path):
    run_on_two_ranks(go_on_with_two_ranks, tmp_path, model_path, tmp_path)


@pytest.fixture(scope="module")
def run(model_path, tmp_path_factory):
    """A run of 6 steps, and its folder."""
    trainer = make(model_path, tmp_path_factory.mktemp("run"), max_steps=6)
    trainer.train()
    return trainer


@pytest.fixture
def copy(run, tmp_path):
    """A copy of its folder that may be changed."""
    shutil.copytree(run.args.output_dir, tmp_path / "copy")
    return tmp_path / "copy"


def warnings_of(trainer, checkpoint, caplog):
    caplog.clear()
    with caplog.at_level("WARNING", "trl_gspo"):
        trainer.train(checkpoint)
    return caplog.text


@pytest.mark.slow
def test_what_differs_is_said_by_name_and_the_rollout_batch_is_sampled_anew(copy, model_path, caplog):
    path = str(copy / "checkpoint-3")
    assert options_of(path)["seed"] == 42
    said = warnings_of(make(model_path, copy, max_steps=6, save_strategy="no"), path, caplog)
    assert "sampled anew" not in said and "does not go on as it was" not in said
    said = warnings_of(make(model_path, copy, max_steps=6, save_strategy="no", seed=1), path, caplog)
    assert "The run does not go on as it was: `seed` 42 in the checkpoint and 1 now. The place in the data" in said
    assert "sampled anew" not in said
    said = warnings_of(
        make(model_path, copy, max_steps=6, save_strategy="no", num_generations=8, prompts=32), path, caplog
    )
    assert "`rows of train_dataset` 16 in the checkpoint and 32 now, `num_generations` 4 in the check" in said
    assert "The rollout batch of steps 4 to 4 is sampled anew, from the same place in the data" in said
    # The tensors of that batch have no log-probabilities of a reference model.
    said = warnings_of(make(model_path, copy, max_steps=6, save_strategy="no", beta=0.04), path, caplog)
    assert "`beta` 0.0 in the checkpoint and 0.04 now." in said and "The place in the data" not in said
    assert "The rollout batch of steps 4 to 4 is sampled anew" in said
    said = warnings_of(
        make(model_path, copy, max_steps=6, save_strategy="no", beta=0.04), str(copy / "checkpoint-4"), caplog
    )
    assert "`beta` 0.0 in the checkpoint" in said and "sampled anew" not in said


@pytest.mark.slow
def test_a_checkpoint_of_another_trainer_keeps_the_place_in_the_data(copy, model_path, caplog):
    path = copy / "checkpoint-1"
    for name in ("checkpoint.json", "gspo_state_0.pt"):
        (path / name).unlink()
    trainer = make(model_path, copy, max_steps=6)
    seen = []
    sample, seen_at = trainer._generate_and_score_completions, seen.append

    def watched(inputs):
        seen_at((trainer.state.global_step, sorted({row["prompt"] for row in inputs})))
        return sample(inputs)

    trainer._generate_and_score_completions = watched
    said = warnings_of(trainer, str(path), caplog)
    assert "has no gspo_state_0.pt: it was saved by another trainer, by fewer processes or with" in said
    assert "The rollout batch of steps 2 to 4 is sampled anew" in said
    # Step 5 begins the second half of the prompts; TRL would have gone on with the first until step 6.
    assert [step for step, _ in seen] == [1, 4] and not {*seen[0][1]} & {*seen[1][1]}


@pytest.mark.slow
def test_resuming_takes_the_last_whole_checkpoint(run, copy, model_path, caplog):
    (copy / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    (copy / "checkpoint-5" / "health.json").write_text('{"alarms": ["loss"]}')
    trainer = make(model_path, copy, max_steps=6)
    said = warnings_of(trainer, True, caplog)
    assert "checkpoint-6 is passed over: optimizer.pt has 0 of" in said
    assert "checkpoint-5 is passed over: it was saved near an alarm" in said
    check_same(trainer, outcome(run))
    with pytest.raises(ValueError, match="checkpoint-9` is not whole: trainer_state.json is missing"):
        (copy / "checkpoint-9").mkdir()
        trainer.train(str(copy / "checkpoint-9"))
    with pytest.raises(ValueError, match="holds no checkpoint to resume from"):
        make(model_path, copy / "new").train(True)


@pytest.mark.slow
def test_a_stream_that_began_anew_is_told_of(model_path, tmp_path, caplog):
    make(model_path, tmp_path, streams=True).train()  # 16 prompts are 8 steps
    said = {
        step: warnings_of(make(model_path, tmp_path, streams=True), str(tmp_path / f"checkpoint-{step}"), caplog)
        for step in (7, 9)
    }
    assert "The stream of prompts ended and began anew" not in said[7]
    assert "The stream of prompts ended and began anew" in said[9]


@pytest.mark.slow
def test_what_is_asked_for_holds(copy, model_path, tmp_path):
    trainer = make(model_path, tmp_path / "again", max_steps=6, save_steps=2, logging_steps=1)
    trainer.train(str(copy / "checkpoint-3"))
    assert sorted(path.name for path in (tmp_path / "again").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 4, 5, 6]


@pytest.mark.slow
def test_at_the_end_no_step_is_trained(run, copy, model_path):
    trainer = make(model_path, copy, max_steps=6)
    trainer.train(True)
    assert trainer.state.global_step == 6
    check_same(trainer, outcome(run))


@pytest.mark.slow
def test_the_best_mixture_of_experts_is_loaded_whole(moe_path, tmp_path):
    options = {
        "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4,
        "load_best_model_at_end": True, "metric_for_best_model": "num_tokens", "greater_is_better": False,
    }  # fmt: skip
    trainer = make(moe_path, tmp_path, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    expected = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1").state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in trainer.model.state_dict().items())


@pytest.mark.slow
def test_the_table_of_completions_is_that_of_the_uninterrupted_run(model_path, tmp_path):
    import pandas

    first = make(model_path, tmp_path / "run", max_steps=6, log_completions=True)
    first.train()
    second = make(model_path, tmp_path / "again", max_steps=6, log_completions=True)
    second.train(str(tmp_path / "run" / "checkpoint-5"))
    tables = [pandas.read_parquet(next((tmp_path / name).glob("completions/*6.parquet"))) for name in ("run", "again")]
    assert len(tables[0]) == 32
    pandas.testing.assert_frame_equal(*tables)
