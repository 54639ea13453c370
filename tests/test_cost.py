from fractions import Fraction

import pytest

from trl_gspo import GSPOConfig
from trl_gspo.cost import describe, run_cost


def config(tmp_path, **options):
    options = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 100} | options
    return GSPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)


def test_completions_prompts_and_tokens(tmp_path):
    args = config(tmp_path, gradient_accumulation_steps=2, max_steps=10)
    cost = run_cost(args, train_rows=60, processes=3)
    assert cost.step_completions == 8 * 2 * 3
    assert args.steps_per_generation == 8  # four optimizer steps a rollout, of two micro-batches each
    assert (cost.rollout_completions, cost.rollout_prompts, cost.steps_per_rollout) == (192, 48, 4)


@pytest.mark.parametrize(
    ("options", "rows", "steps", "rollouts", "epochs"),
    [
        # 32 completions, 8 prompts to a rollout batch of four steps: 5 batches in 40 rows, 20 steps.
        ({}, 40, 60, 15, 3.0),
        ({"num_train_epochs": 1}, 40, 20, 5, 1.0),
        # Three rows are left out, as they fill no batch.
        ({"num_train_epochs": 1}, 43, 20, 5, 1.0),
        ({"max_steps": 30}, 40, 30, 8, 1.5),
        ({"max_steps": 30, "num_iterations": 2}, 40, 30, 4, 0.75),
        # A step of two rollout batches: 8 micro-batches of 8 for 4 of a batch.
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 8, "max_steps": 3}, 40, 3, 6, 1.0),
        ({"max_steps": 30}, None, 30, 8, None),
        ({}, None, None, None, None),
    ],
)
def test_length_of_a_run(tmp_path, options, rows, steps, rollouts, epochs):
    cost = run_cost(config(tmp_path, **options), rows)
    assert (cost.steps, cost.rollouts, cost.epochs) == (steps, rollouts, epochs)


def test_a_step_of_several_rollout_batches(tmp_path):
    args = config(tmp_path, steps_per_generation=4, gradient_accumulation_steps=8)
    assert run_cost(args, 40).steps_per_rollout == Fraction(1, 2)
    assert any("lasts 1/2 of an optimizer step" in line for line in describe(run_cost(args, 40), args, 40))


@pytest.mark.parametrize(
    ("options", "checkpoints", "evaluations"),
    [
        ({"save_strategy": "no"}, 0, 0),
        ({"save_steps": 8, "eval_strategy": "steps", "eval_steps": 7}, 3, 3),  # 8 16 20, and 7 14 20
        ({"save_steps": 10, "eval_strategy": "steps", "eval_steps": 0.25}, 2, 4),
        ({"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 3}, 3, 3),
        ({"eval_strategy": "steps", "eval_steps": 5, "eval_delay": 10, "eval_on_start": True}, 1, 4),  # 0 10 15 20
    ],
)
def test_checkpoints_and_evaluations(tmp_path, options, checkpoints, evaluations):
    options = {"per_device_eval_batch_size": 8, "num_train_epochs": 1} | options
    cost = run_cost(config(tmp_path, **options), 40, eval_rows=10)
    assert (cost.checkpoints, cost.evaluations, cost.evaluation_completions) == (checkpoints, evaluations, 40)


def test_what_cannot_be_divided_is_named(tmp_path):
    args = config(tmp_path, generation_batch_size=32)
    assert run_cost(args, 40, processes=2, keeps_generation_batch_size=True).steps_per_rollout == 2
    with pytest.raises(ValueError, match="`generation_batch_size=32` must be divisible by 24"):
        run_cost(args, 40, processes=3, keeps_generation_batch_size=True)
    with pytest.raises(ValueError, match="The data has 7 prompts to train on, and one rollout batch takes 8"):
        run_cost(args, 7)
    args = config(tmp_path, per_device_train_batch_size=1, steps_per_generation=8, num_generations=8)
    assert run_cost(args, 40, processes=3).rollout_prompts == 3
    args.num_generations = 5
    with pytest.raises(ValueError, match="A rollout batch of 24 completions .* by `num_generations=5`"):
        run_cost(args, 40, processes=3)


def test_what_is_printed(tmp_path):
    args = config(tmp_path, max_steps=30, save_total_limit=2, save_steps=10)
    lines = "\n".join(describe(run_cost(args, 40), args, 40, prompt_tokens=[10, 20]))
    for words in (
        "optimizer step  8 completions; at most 800 generated tokens, about 120 of prompts, through forward",
        "8 prompts x 4 = 32 completions; at most 3,200 generated tokens, about 480 of prompts; lasts 4",
        "15 tokens in the mean, 20 at most, of 2 drawn",
        "30 optimizer steps, 8 rollout batches: 256 completions; at most 25,600 generated tokens",
        "40 prompts, gone over 1.50 times",
        "checkpoints     3, 2 kept",
        "evaluation      none",
    ):
        assert words in lines
    args.max_completion_length = None
    assert "`max_completion_length` sets no bound" in "\n".join(describe(run_cost(args, 40), args, 40))


def test_the_trainer_takes_as_many_steps(tmp_path, model_path, dataset):
    from trl_gspo import GSPOTrainer

    args = config(
        tmp_path, gradient_accumulation_steps=2, steps_per_generation=3, num_train_epochs=2, save_strategy="no"
    )
    args.max_completion_length, args.learning_rate = 4, 0.0
    rows = dataset.select(range(19))  # three batches of six prompts, one row left
    cost = run_cost(args, len(rows))
    trainer = GSPOTrainer(
        model_path, reward_funcs=lambda completions, **kwargs: [0.0] * len(completions), args=args, train_dataset=rows
    )
    trainer.train()
    assert trainer.state.global_step == cost.steps == 10
    assert trainer.state.epoch == pytest.approx(cost.epochs)
