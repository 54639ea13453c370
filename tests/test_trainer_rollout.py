"""What is remembered of a rollout for its loss: the routing of its tokens, and the engine's own log-probabilities."""

import copy
import math

import pytest
import torch
from test_trainer import Synchronized, build, rollout, starts_lowercase

from trl_gspo import GSPOTrainer
from trl_gspo.host import HAS_FUSED_HEAD


# ---- experts


class CountingTrainer(GSPOTrainer):
    """Counts changed experts row by row with sets, from the router's logits under the weights of before and of now."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.counted, self.expected = [0, 0], []

    def _generate_and_score_completions(self, inputs):
        if self.model.training:
            self.weights_of_rollout = copy.deepcopy(self.model.state_dict())
        return super()._generate_and_score_completions(inputs)

    @torch.no_grad()
    def routes(self, inputs):
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logits = self.model(input_ids=input_ids, attention_mask=mask, output_router_logits=True).router_logits
        chosen = torch.stack([layer.view(*input_ids.shape, -1).topk(2).indices for layer in logits], 2)
        return chosen[:, inputs["prompt_ids"].size(1) - 1 : -1].tolist()

    def _compute_loss(self, model, inputs):
        if self.model.training:
            after, current = self.routes(inputs), copy.deepcopy(self.model.state_dict())
            self.model.load_state_dict(self.weights_of_rollout)
            before = self.routes(inputs)
            self.model.load_state_dict(current)
            mask = inputs["completion_mask"] * inputs.get("tool_mask", torch.ones_like(inputs["completion_mask"]))
            for row, advantage in enumerate(inputs["advantages"].tolist()):
                for t in mask[row].nonzero().flatten().tolist() if advantage else []:
                    for old, new in zip(before[row][t], after[row][t], strict=True):
                        self.counted[0] += len(set(old) - set(new))
                        self.counted[1] += 2
        return super()._compute_loss(model, inputs)

    def log(self, logs, *args):
        if self.model.training and "loss" in logs:
            self.expected.append(self.counted[0] / self.counted[1])
            self.counted = [0, 0]
        super().log(logs, *args)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pack_live_tokens": False},
        {"router_aux_loss_coef": 0.0},
        {"router_aux_loss_coef": 0.0, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"beta": 0.04, "gradient_checkpointing": True},
        {"importance_sampling_level": "sequence_token", "num_iterations": 2, "pack_live_tokens": False},
        {"router_aux_loss_coef": 0.0, "rollout_func": rollout},
    ],
    ids=["packed", "whole", "dead rows out", "accumulation", "reference", "token level", "tools"],
)
def test_expert_change_is_that_of_a_count_over_sets(options, moe_path, dataset, tmp_path):
    trainer = build(
        CountingTrainer, tmp_path, model=moe_path, train_dataset=dataset,
        **{"pack_live_tokens": True, "log_expert_change": True, "eval_strategy": "steps", "eval_steps": 3} | options,
        eval_dataset=dataset.select(range(8)),
    )  # fmt: skip
    trainer.train()
    logged = [entry["gspo/expert_change_fraction"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(trainer.expected, abs=1e-12)
    assert logged[0] == 0 and max(logged) > 0.05
    assert not any("eval_gspo/expert_change_fraction" in entry for entry in trainer.state.log_history)


def test_a_dense_model_has_no_experts_to_change(model_path, dataset, tmp_path):
    with pytest.raises(ValueError, match="`log_expert_change=True` compares .* it is dense"):
        build(GSPOTrainer, tmp_path, model=model_path, train_dataset=dataset, log_expert_change=True)


# ---- the engine's log-probabilities


class SpyTrainer(GSPOTrainer):
    """Keeps the inputs of its losses and counts the forwards without gradient."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.forwards = [], 0

        def count(model, args, kwargs):
            self.forwards += bool(kwargs.get("fused_lm_head")) and not torch.is_grad_enabled()

        self.model.register_forward_pre_hook(count, with_kwargs=True)

    def _score_for_loss(self, *args, **kwargs):
        scored = super()._score_for_loss(*args, **kwargs)
        self.seen.append((self._per_token_logps, self._old_per_token_logps, self._loss_inputs))
        return scored


def with_gaps(prompts, trainer):
    """`rollout`, whose engine has no value for the first token of each third completion."""
    output = rollout(prompts, trainer)
    for logprobs in output["logprobs"][::3]:
        logprobs[0] = math.nan
    return output


def rolled_out(output_dir, model_path, dataset, **script):
    script = {"rollout_func": rollout, "use_rollout_logps": True, "max_steps": 4, "learning_rate": 1e-3} | script
    trainer = build(SpyTrainer, output_dir, model=model_path, train_dataset=dataset, **script)
    trainer._find_way()
    trainer.forwards = 0
    trainer.train()
    return trainer


@pytest.mark.parametrize("pack_live_tokens", [True, False])
@pytest.mark.parametrize("level", ["sequence", "sequence_token", "turn"])
def test_engines_log_probs_are_the_old_ones(level, pack_live_tokens, model_path, dataset, tmp_path):
    trainer = rolled_out(
        tmp_path, model_path, dataset, pack_live_tokens=pack_live_tokens, importance_sampling_level=level
    )
    for _, old, inputs in trainer.seen:
        assert torch.equal(old, inputs["sampling_per_token_logps"])
    assert trainer.forwards == 0  # no rollout was scored


def test_without_the_option_the_model_scores_each_rollout(model_path, dataset, tmp_path):
    trainer = rolled_out(tmp_path, model_path, dataset, use_rollout_logps=False, pack_live_tokens=True)
    assert trainer.forwards == 4 * HAS_FUSED_HEAD  # one for each micro-batch; older heads are not counted
    logps, old, inputs = trainer.seen[0]
    live = inputs["advantages"] != 0
    assert torch.equal(old[live], logps[live]) and not torch.equal(old, inputs["sampling_per_token_logps"])


def test_mismatch_is_that_of_the_first_minibatch(model_path, dataset, tmp_path):
    trainer = rolled_out(tmp_path, model_path, dataset, logging_steps=4)
    logps, old, inputs = trainer.seen[0]
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool() & (inputs["advantages"] != 0).unsqueeze(1)
    difference = (logps.double() - old.double()).abs()[mask]
    log = trainer.state.log_history[0]
    assert log["gspo/rollout_logp_difference/mean"] == pytest.approx(difference.mean().item(), rel=1e-9)
    assert log["gspo/rollout_logp_difference/max"] == pytest.approx(difference.max().item(), rel=1e-9)
    assert log["gspo/rollout_logp_difference/mean"] > 0.01


@pytest.mark.parametrize("level", ["sequence", "turn"])
@pytest.mark.parametrize("pack_live_tokens", [True, False])
def test_a_token_without_a_value_counts_as_not_drifted(level, pack_live_tokens, model_path, dataset, tmp_path):
    trainer = rolled_out(
        tmp_path, model_path, dataset, rollout_func=with_gaps, pack_live_tokens=pack_live_tokens,
        importance_sampling_level=level,
    )  # fmt: skip
    gaps = 0
    for logps, old, inputs in trainer.seen:
        is_gap = inputs["sampling_per_token_logps"].isnan()
        gaps += is_gap.sum()
        assert torch.equal(old[is_gap], logps[is_gap]) and old.isfinite().all()
    assert gaps > 0
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert all(math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in logs)


def test_vllm_without_its_correction(model_path, dataset, tmp_path):
    trainer = rolled_out(
        tmp_path, model_path, dataset, use_vllm=True, vllm_generation=Synchronized(),
        vllm_importance_sampling_correction=False,
    )  # fmt: skip
    assert all(torch.equal(old, inputs["sampling_per_token_logps"]) for _, old, inputs in trainer.seen)


def test_an_engine_without_log_probs_is_refused(model_path, dataset, tmp_path):
    trainer = build(
        GSPOTrainer, tmp_path, model=model_path, train_dataset=dataset, use_rollout_logps=True,
        reward_funcs=starts_lowercase,
    )  # fmt: skip
    with pytest.raises(ValueError, match="`use_rollout_logps=True` needs a rollout engine that returns"):
        trainer.train()
