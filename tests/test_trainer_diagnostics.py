"""
What `GSPOTrainer` logs in whole runs, against plain NumPy over what its losses were computed from; the clip-range
controller in training; what the metrics cost.
"""

import json
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from ranks import run_on_two_ranks
from test_diagnostics import reference_metrics
from test_objective import units_of
from test_trainer import assert_all_equal, build, trained_tokens, weights
from test_trainer_credit import Rollout, by_turn, outcome
from tiny import make_model, sorting_rows

from trl_gspo import GSPOTrainer, gspo_loss, turn_reward
from trl_gspo.diagnostics import RatioStatistics


RANK = int(os.environ.get("RANK", 0))

EPSILONS = dict(epsilon=1e-3, epsilon_high=1.5e-3)


# ---- the metrics of whole runs


class RecordingTrainer(GSPOTrainer):
    """
    Keeps each loss, what it was computed from and the clip range in force, in order. The old log-probs are moved by
    noise of spread 2e-3, so that the first minibatch and evaluation have ratios other than 1.
    """

    noise = 2e-3

    def __init__(self, *args, **kwargs):
        self.batches = {"train": [], "eval": []}
        self.epsilons, self.losses = [], []
        self.generator = torch.Generator().manual_seed(RANK)
        super().__init__(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.seen_logps = logps.detach()
        return logps, *others

    def _compute_loss(self, model, inputs):
        old, advantages = inputs["old_per_token_logps"], inputs["advantages"]
        old = old + self.noise * torch.randn(old.shape, generator=self.generator)
        loss = super()._compute_loss(model, inputs | {"old_per_token_logps": old})
        mode = "train" if model.training else "eval"
        batch = (self.seen_logps.double(), old.double(), advantages.double(), trained_tokens(inputs))
        self.batches[mode].append(batch)
        if mode == "train":
            self.epsilons.append((self.epsilon_low, self.epsilon_high))
            self.losses.append(loss.item())
        return loss


class UnevenRollout(Rollout):
    """As `Rollout`, with rows that are all of the environment's; more turns on rank 0, and fewer in evaluation."""

    def __call__(self, prompts, trainer):
        self.turns = (4, 2)[RANK] if trainer.model.training else 1
        return super().__call__(prompts, trainer)

    def row(self, tokenizer, seed):
        ids, mask = super().row(tokenizer, seed)
        is_silent = int(seed.split()[-1]) % 8 == 3
        return ids, [0] * len(mask) if is_silent else mask


def is_of_dead_group(row, state):
    """Every third group; all those of the second rank in the second rollout batch."""
    return row // 4 % 3 == 1 or (RANK == 1 and state.global_step == 3)


def outcome_of_some_groups(completion_ids, trainer_state, **_):
    rewards = outcome(completion_ids)
    return [0.5 if is_of_dead_group(row, trainer_state) else reward for row, reward in enumerate(rewards)]


@turn_reward
def turns_of_some_groups(completion_ids, num_turns, trainer_state, **_):
    rewards = by_turn(completion_ids, num_turns)
    return [
        [0.5] * num_turns[row] if is_of_dead_group(row, trainer_state) else steps for row, steps in enumerate(rewards)
    ]


# Three minibatches of two micro-batches to a rollout batch, and logs of five: a window starts and ends inside a
# rollout batch, and the last two steps are logged with the summary of the run.
WINDOWED = EPSILONS | dict(
    reward_funcs=outcome_of_some_groups,
    learning_rate=3e-4,
    per_device_train_batch_size=16,
    gradient_accumulation_steps=2,
    steps_per_generation=6,
    logging_steps=5,
    max_steps=12,
)
WITH_STEP_REWARDS = dict(reward_funcs=[turns_of_some_groups, outcome_of_some_groups])
SCRIPTS = {
    "sequence": {},
    "two_iterations": dict(num_iterations=2),
    "sequence_token": WITH_STEP_REWARDS | dict(importance_sampling_level="sequence_token"),
    "turn": WITH_STEP_REWARDS | dict(importance_sampling_level="turn"),
    "all_tokens": WITH_STEP_REWARDS | dict(importance_sampling_level="turn", pack_live_tokens=False),
    # With seed 42 two sevenths of the turns are clipped in each of the last two minibatches.
    "turn_of_one_advantage": dict(importance_sampling_level="turn", seed=1),
}


def record(output_dir, model_path, dataset, **script):
    script = WINDOWED | dict(rollout_func=UnevenRollout(), pack_live_tokens=True) | script
    trainer = build(RecordingTrainer, output_dir, model=model_path, train_dataset=dataset, **script)
    trainer.train()
    return trainer


def minibatch_of(micro_batch, gradient_accumulation_steps, steps_per_generation, num_iterations):
    """Optimizer steps that were done when the loss of `micro_batch` was computed, since its rollout."""
    per_rollout = steps_per_generation * num_iterations
    rollout = micro_batch // per_rollout
    return micro_batch // gradient_accumulation_steps - rollout * per_rollout // gradient_accumulation_steps


def assert_logged(entry, expected, prefix=""):
    logged = {key.removeprefix(prefix) for key in entry if key.startswith(f"{prefix}gspo/")}
    epsilons = {"gspo/epsilon_low", "gspo/epsilon_high"}
    assert epsilons < logged and logged - epsilons - {"gspo/unscored_fraction"} == expected.keys()
    for key, value in expected.items():
        # Log-probs are float32: that is 1e-7 of a ratio, and more of what is left after 1 is taken from it.
        is_ratio = key.startswith(("gspo/clip", "gspo/live")) or 0.9 < value < 1.1
        assert entry[prefix + key] == pytest.approx(value, rel=1e-6 if is_ratio else 1e-4, abs=0), key


def assert_windows(log, ranks, script):
    """
    All of `log` that is about the ratio is the metrics of the micro-batches since the entry before.

    Args:
        log: entries of the main process.
        ranks: for each rank its micro-batches, in order.
        script: what the run was built with.

    Returns:
        `list[dict]`: what was to be logged.
    """
    script = WINDOWED | dict(num_iterations=1, importance_sampling_level="sequence") | script
    accumulation, level = script["gradient_accumulation_steps"], script["importance_sampling_level"]
    counts = accumulation, script["steps_per_generation"], script["num_iterations"]
    entries = [entry for entry in log if "gspo/ratio/mean" in entry]
    rest = [(12, False)] if script["max_steps"] == 12 else []
    assert [(entry["step"], "loss" in entry) for entry in entries] == [(5, True), (10, True), *rest]
    start, windows = 0, []
    for entry in entries:
        end = entry["step"] * accumulation
        batches = [rank[index] for index in range(start, end) for rank in ranks]
        minibatches = [minibatch_of(index, *counts) for index in range(start, end) for _ in ranks]
        windows.append(reference_metrics(batches, script["epsilon"], script["epsilon_high"], level, minibatches))
        assert_logged(entry, windows[-1])
        assert (entry["gspo/epsilon_low"], entry["gspo/epsilon_high"]) == (script["epsilon"], script["epsilon_high"])
        start = end
    assert {len(rank) for rank in ranks} == {start}
    return windows


def assert_tells_apart(windows, batches):
    """The run holds what a wrong definition would trip over: both sides of the clip, dead rows, masks with holes."""
    for window in windows:
        assert len({value for key, value in window.items() if "/minibatch_" in key}) > 1
        assert 0.2 < window["gspo/live_fraction"] < 0.9
        assert window["gspo/clip_fraction/tokens"] != pytest.approx(window["gspo/clip_fraction/sequences"])
    for side in ("low", "high"):
        assert min(window[f"gspo/clip_fraction/{side}"] for window in windows[:2]) > 0.01
    masks = [mask for *_, mask in batches]
    assert any(not mask.any(1).all() for mask in masks)
    assert any((mask[:, 1:] & ~mask[:, :-1]).any() for mask in masks)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_every_metric_is_that_of_all_units_of_its_window(script, model_path, dataset, tmp_path):
    trainer = record(tmp_path, model_path, dataset, **script)
    windows = assert_windows(trainer.state.log_history, [trainer.batches["train"]], script)
    assert_tells_apart(windows, trainer.batches["train"])
    # Steps 1 to 5, 6 to 10 and 11 to 12, of three to a rollout batch or, passed over twice, of six.
    minibatches = ["".join(key[-1] for key in window if "/minibatch_" in key) for window in windows]
    assert minibatches == (["01234", "01235", "45"] if "num_iterations" in script else ["012", "012", "12"])


# ---- the same on two processes


TWO_PROCESSES = {name: SCRIPTS[name] for name in ("sequence", "sequence_token", "turn", "all_tokens")}


def record_distributed(folder, model_path):
    """Run by each rank of `test_two_processes_log_what_all_their_units_did`."""
    dataset = Dataset.from_list(sorting_rows(64, seed=0))
    for name, script in (TWO_PROCESSES | CONTROLLED).items():
        trainer = record(Path(folder) / name, model_path, dataset, **script)
        kept = trainer.batches["train"], trainer.epsilons, trainer.state.log_history
        torch.save(kept, Path(folder) / f"{name}-{RANK}.pt")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_log_what_all_their_units_did(model_path, tmp_path):
    run_on_two_ranks(record_distributed, tmp_path, tmp_path, model_path)

    for name, script in TWO_PROCESSES.items():
        ranks, _, (log, _) = zip(*(torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1)), strict=True)
        assert_tells_apart(assert_windows(log, ranks, script), ranks[0] + ranks[1])
    # The last of them leaves each row on the rank that sampled it: all of the second rollout batch of the second rank,
    # micro-batches 6 to 11, is dead, and its rows have fewer turns.
    assert name == "all_tokens"
    assert all((batch[2] == 0).all() == (6 <= index < 12) for index, batch in enumerate(ranks[1]))
    most = [max(len(units_of(row, "turn")) for *_, mask in rank for row in mask.numpy()) for rank in ranks]
    assert most == [4, 2]

    for name, script in CONTROLLED.items():
        ranks, epsilons, (log, _) = zip(*(torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1)), strict=True)
        assert epsilons[0] == epsilons[1]
        assert_controlled(log, ranks, epsilons[0], script)


# ---- evaluation


@pytest.mark.parametrize("script", TWO_PROCESSES.values(), ids=TWO_PROCESSES)
def test_an_evaluation_logs_its_own_and_leaves_the_window_of_training_alone(script, model_path, dataset, tmp_path):
    # 16 prompts of four completions in batches of 24, after steps 4 and 8 and at the end: those are in the middle of
    # a window and of a rollout batch.
    script = dict(script, eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=24, max_steps=10)
    trainer = record(tmp_path, model_path, dataset, eval_dataset=dataset.select(range(16)), **script)
    log, level = trainer.state.log_history, script.get("importance_sampling_level", "sequence")
    assert_tells_apart(assert_windows(log, [trainer.batches["train"]], script), trainer.batches["train"])
    entries = [entry for entry in log if "eval_gspo/ratio/mean" in entry]
    assert [entry["step"] for entry in entries] == [4, 8, 10] and len(trainer.batches["eval"]) == 9
    for index, entry in enumerate(entries):
        expected = reference_metrics(trainer.batches["eval"][3 * index : 3 * index + 3], *EPSILONS.values(), level)
        assert expected["gspo/clip_fraction/sequences"] > expected["gspo/clip_fraction/high"] >= 0
        assert expected["gspo/ratio/noise"] > 1e-4 and expected["gspo/live_fraction"] < 1
        assert_logged(entry, expected, prefix="eval_")
        assert not any(key.startswith("gspo/") for key in entry)


# ---- the noise floor


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, init_lora_weights=False)


def noise_warnings(caplog):
    messages = [record.getMessage() for record in caplog.records if record.name == "trl_gspo.trainer"]
    return [message for message in messages if "gspo/ratio/noise" in message]


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "whole"])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_before_any_update_there_is_no_noise_in_float32(peft_config, packs, model_path, dataset, tmp_path, caplog):
    script = dict(peft_config=peft_config, pack_live_tokens=packs, max_steps=12)
    trainer = build(GSPOTrainer, tmp_path, model=model_path, train_dataset=dataset, **script)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    firsts = [entry for entry in entries if "gspo/clip_fraction/minibatch_0" in entry]
    assert [entry["step"] for entry in firsts] == [1, 5, 9]
    for entry in firsts:
        assert entry["gspo/ratio/noise"] < 1e-6
        assert entry["gspo/clip_fraction/minibatch_0"] == entry["gspo/clip_fraction/sequences"] == 0
        assert entry["gspo/live_fraction"] > 0
    assert not any("gspo/ratio/noise" in entry for entry in entries if entry not in firsts)
    assert max(entry["gspo/clip_fraction/sequences"] for entry in entries) > 0.5
    assert not noise_warnings(caplog)


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "whole"])
def test_dropout_of_an_adapter_is_warned_of_once_with_its_figures(packs, model_path, dataset, tmp_path, caplog):
    script = dict(peft_config=LORA, disable_dropout=False, pack_live_tokens=packs, max_steps=12, logging_steps=2)
    trainer = build(GSPOTrainer, tmp_path, model=model_path, train_dataset=dataset, **script)
    trainer.train()
    noisy = [entry for entry in trainer.state.log_history if "gspo/ratio/noise" in entry]
    assert [entry["step"] for entry in noisy] == [2, 6, 10]
    assert all(entry["gspo/ratio/noise"] > 1e-4 for entry in noisy)
    (message,) = noise_warnings(caplog)
    noise, epsilon, clipped, least = re.search(
        r"noise` is (\S+), .* clip range \((\S+)\).* (\S+)% of the live .* at least (\S+)\.$", message
    ).groups()
    assert float(epsilon) == 3e-4
    assert float(noise) == pytest.approx(noisy[0]["gspo/ratio/noise"], rel=0.05)
    assert float(least) == pytest.approx(3 * noisy[0]["gspo/ratio/noise"], rel=0.05)
    assert float(clipped) == pytest.approx(100 * noisy[0]["gspo/clip_fraction/minibatch_0"], abs=0.05)
    assert float(clipped) > 5


# ---- the clip-range controller


# A log for each rollout batch, so that one clip range was in force for all that it tells of.
CONTROLLED = {
    f"controlled_{name}": dict(
        importance_sampling_level=name,
        clip_fraction_target=0.15,
        logging_steps=3,
        epsilon=0.01,
        epsilon_high=1e-4,
        lr_scheduler_type="constant",
    )
    for name in ("sequence", "turn")
}


def next_epsilons(epsilons, batches, level, minibatches):
    """What the controller makes of a rollout batch with one advantage for each row, unit by unit in float64."""
    log_ratios, signs, noise = [], [], []
    for batch, minibatch in zip(batches, minibatches, strict=True):
        for new, old, advantage, mask in zip(*(tensor.numpy() for tensor in batch), strict=True):
            for unit in units_of(mask, level) if advantage else []:
                log_ratios.append((new[unit] - old[unit]).mean())
                signs.append(np.sign(advantage))
                noise += [log_ratios[-1]] if minibatch == 0 else []
    ratios, signs, floor = np.exp(log_ratios), np.array(signs), np.std(noise)
    wanted = 1 - np.quantile(ratios[signs < 0], 0.15), np.quantile(ratios[signs > 0], 0.85) - 1
    return [
        max(epsilon * np.clip((max(width, floor) / epsilon) ** 0.3, 1 / 2, 2), floor)
        for epsilon, width in zip(epsilons, wanted, strict=True)
    ]


def assert_controlled(log, ranks, epsilons, script):
    """Each rollout batch was clipped by one range, which was logged, and the next follows from all of its units."""
    script = WINDOWED | script
    size, level = script["steps_per_generation"], script["importance_sampling_level"]
    entries = [entry for entry in log if "loss" in entry]
    assert len(entries) == len(epsilons) // size == 4
    expected = script["epsilon"], script["epsilon_high"]
    for rollout, entry in enumerate(entries):
        micro_batches = range(size * rollout, size * (rollout + 1))
        (in_force,) = {epsilons[index] for index in micro_batches}
        assert in_force == (entry["gspo/epsilon_low"], entry["gspo/epsilon_high"])
        assert in_force == pytest.approx(expected, rel=1e-4)
        batches = [rank[index] for index in micro_batches for rank in ranks]
        minibatches = [minibatch_of(index, 2, size, 1) for index in micro_batches for _ in ranks]
        assert_logged(entry, reference_metrics(batches, *in_force, level, minibatches))
        expected = next_epsilons(in_force, batches, level, minibatches)
    assert len({entry["gspo/epsilon_low"] for entry in entries}) == 4


@pytest.mark.parametrize("script", CONTROLLED.values(), ids=CONTROLLED)
def test_a_rollout_batch_is_clipped_by_the_range_that_the_one_before_asks_for(script, model_path, dataset, tmp_path):
    # Evaluations in the middle of the rollout batches are of no concern to the controller.
    evaluation = dict(eval_strategy="steps", eval_steps=4, eval_dataset=dataset.select(range(8)))
    trainer = record(tmp_path, model_path, dataset, **script, **evaluation)
    assert len(trainer.batches["eval"]) > 0
    assert_controlled(trainer.state.log_history, [trainer.batches["train"]], trainer.epsilons, script)
    # That range is the loss's own, not only the log's. Its micro-batches are halves of a minibatch.
    level, is_moved = script["importance_sampling_level"], []
    for loss, batch, epsilons in zip(trainer.losses, trainer.batches["train"], trainer.epsilons, strict=True):
        value, start = (
            gspo_loss(*batch, epsilon_low=low, epsilon_high=high, level=level)[0].item() / 2
            for low, high in (epsilons, (script["epsilon"], script["epsilon_high"]))
        )
        assert loss == pytest.approx(value, rel=1e-5, abs=1e-7)
        is_moved.append(abs(value - start) > 1e-5)
    assert not any(is_moved[:6]) and all(any(is_moved[first : first + 6]) for first in (6, 12, 18))


def control(output_dir, model_path, dataset, resume=None, **script):
    """Four minibatches to a rollout batch and a log for each of them."""
    options = dict(clip_fraction_target=0.15, learning_rate=3e-4, lr_scheduler_type="constant", pack_live_tokens=True)
    script = options | script
    trainer = build(GSPOTrainer, output_dir, model=model_path, train_dataset=dataset, logging_steps=4, **script)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def by_rollout(trainer, name):
    return [entry[f"gspo/{name}"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("start", [0.2, pytest.param(1e-5, marks=pytest.mark.exhaustive)])
def test_it_brings_a_run_to_the_target_and_holds_it(start, model_path, tmp_path):
    trainer = control(
        tmp_path,
        model_path,
        Dataset.from_list(sorting_rows(512, seed=0)),
        epsilon=start,
        epsilon_high=start,
        per_device_train_batch_size=64,
        num_generations=8,
        max_steps=160,
    )
    fractions = np.array(by_rollout(trainer, "clip_fraction/sequences"))
    assert len(fractions) == 40 and abs(fractions[0] - 0.15) > 0.1
    # Means of five rollout batches, the first of them those from 26 to 30.
    means = np.convolve(fractions, np.ones(5) / 5, mode="valid")[25:]
    assert np.abs(means - 0.15).max() < 0.05


def saved_range(checkpoint):
    state = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["ClipRangeController"]
    return state["args"]["epsilon_low"], state["args"]["epsilon_high"]


# The range starts ten times too wide, so that each rollout batch moves it.
RESUMED = dict(epsilon=0.01, epsilon_high=0.02, max_steps=24, save_strategy="steps", save_steps=12)


@pytest.mark.parametrize("restores_callbacks", [False, True])
def test_resumed_it_continues_as_if_uninterrupted(restores_callbacks, model_path, dataset, tmp_path):
    whole = control(tmp_path / "whole", model_path, dataset, **RESUMED)
    script = RESUMED | dict(restore_callback_states_from_checkpoint=restores_callbacks)
    checkpoint = tmp_path / "whole" / "checkpoint-12"
    resumed = control(tmp_path / "resumed", model_path, dataset, str(checkpoint), **script)
    for side, start in (("low", 0.01), ("high", 0.02)):
        epsilons = by_rollout(whole, f"epsilon_{side}")
        assert epsilons[0] == start and len(set(epsilons)) == 6
        assert by_rollout(resumed, f"epsilon_{side}") == epsilons
    assert_all_equal(weights(resumed), weights(whole))
    # The range that the last rollout batch asked for is kept, for a run that goes on from there.
    kept = [saved_range(tmp_path / name / "checkpoint-24") for name in ("whole", "resumed")]
    assert kept[0] == kept[1] and kept[0][0] not in by_rollout(whole, "epsilon_low")


def test_it_takes_up_a_run_that_had_none_and_leaves_one(model_path, dataset, tmp_path):
    plain = RESUMED | dict(clip_fraction_target=None)
    control(tmp_path / "plain", model_path, dataset, **plain)
    checkpoint = str(tmp_path / "plain" / "checkpoint-12")
    taken_up = control(tmp_path / "taken_up", model_path, dataset, checkpoint, **RESUMED)
    epsilons = by_rollout(taken_up, "epsilon_low")
    assert epsilons[:4] == [0.01] * 4 and epsilons[3] > epsilons[4] > epsilons[5]
    checkpoint = tmp_path / "taken_up" / "checkpoint-24"
    assert saved_range(checkpoint)[0] < epsilons[5]
    left = control(tmp_path / "left", model_path, dataset, str(checkpoint), **plain | dict(max_steps=28))
    assert by_rollout(left, "epsilon_low") == [*epsilons, 0.01]


# ---- completions without a reward


# Of two functions for eight completions. Unscored are the first three, which have no reward at all.
SCORES = [(None, None), (math.nan, None), (math.nan, math.nan), (None, 1), (0, math.nan), (1, 1), (1, 0), (0, 1)]


def test_unscored_completions_are_a_share_of_the_rollout_batch(model_path, dataset, tmp_path):
    def first(completions, trainer_state, **_):
        return [SCORES[row % 8][0] if trainer_state.global_step == 0 else 1.0 for row in range(len(completions))]

    def second(completions, trainer_state, **_):
        return [SCORES[row % 8][1] if trainer_state.global_step == 0 else 0.0 for row in range(len(completions))]

    trainer = build(
        GSPOTrainer,
        tmp_path,
        model=model_path,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(4)),
        reward_funcs=[first, second],
        logging_steps=8,
        max_steps=16,
    )
    assert trainer.evaluate()["eval_gspo/unscored_fraction"] == 3 / 8
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    # The first of the two rollout batches of the first window, none of the second's.
    assert [entry["gspo/unscored_fraction"] for entry in entries] == [3 / 16, 0]
    assert all(math.isfinite(weight.sum()) for weight in weights(trainer))


def test_a_step_reward_is_a_reward(model_path, dataset, tmp_path):
    @turn_reward
    def turns(completion_ids, num_turns, **_):
        return [None if row % 4 < 2 else [1.0] * count for row, count in enumerate(num_turns)]

    def outcome(completions, **_):
        return [None if row % 2 else 0.5 for row in range(len(completions))]

    trainer = build(
        GSPOTrainer,
        tmp_path,
        model=model_path,
        train_dataset=dataset,
        importance_sampling_level="turn",
        reward_funcs=[turns, outcome],
        rollout_func=Rollout(),
        max_steps=1,
    )
    trainer.train()
    assert trainer.state.log_history[0]["gspo/unscored_fraction"] == 1 / 4


# ---- what it costs


@pytest.mark.slow
@pytest.mark.timing
def test_the_metrics_cost_at_most_two_percent_of_the_loss_step(tokenizer, dataset, tmp_path, monkeypatch):
    torch.manual_seed(0)
    make_model(tokenizer, hidden_size=256, layers=4).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = build(GSPOTrainer, tmp_path, model=str(tmp_path / "model"), train_dataset=dataset)
    trainer.model.train()
    generator = torch.Generator().manual_seed(0)
    rows, length = 8, 256
    batch = {
        "prompt_ids": torch.randint(7, 100, (rows, 8), generator=generator),
        "prompt_mask": torch.ones(rows, 8, dtype=torch.long),
        "completion_ids": torch.randint(7, 100, (rows, length), generator=generator),
        "completion_mask": torch.ones(rows, length, dtype=torch.long),
        "advantages": torch.randn(rows, generator=generator),
        "old_per_token_logps": torch.full((rows, length), -4.6),
        "num_items_in_batch": torch.tensor(rows * length),
    }
    update, log, spent = RatioStatistics.update, trainer.log, []

    def timed(function):
        def run(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent.append(time.perf_counter() - start)
            return result

        return run

    def seconds(with_metrics):
        """Of a step, and of what measures and logs in it."""
        spent.clear()
        replacement = timed(update) if with_metrics else lambda *args, **kwargs: None
        monkeypatch.setattr(RatioStatistics, "update", replacement)
        start = time.perf_counter()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        # A log after each step is the most that there can be. Without an update it has nothing to reduce.
        timed(log)({"loss": 0.0})
        taken = time.perf_counter() - start
        trainer.model.zero_grad()
        assert ("gspo/ratio/mean" in trainer.state.log_history[-1]) == with_metrics
        assert len(spent) == 1 + with_metrics
        return taken, sum(spent)

    # The difference of whole steps drowns in their spread, which is that of the model's kernels.
    seconds(True), seconds(False)
    pairs = [(seconds(True)[1], *seconds(False)) for _ in range(10)]
    with_metrics, step, without = np.median(pairs, axis=0)
    share = (with_metrics - without) / step
    print(f"\n{100 * share:.2f}% of {step:.3f} s")
    assert share < 0.02
