"""`GSPOTrainer` on two processes, under each way to share a model out: the same training as without packing."""

import collections
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from ranks import run_on_two_ranks
from test_trainer import backward, build, make_batch, text
from tiny import make_tokenizer, sorting_rows
from transformers import AutoModelForCausalLM

from trl_gspo import GSPOTrainer
from trl_gspo.host import HAS_FUSED_HEAD


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_FUSED_HEAD, reason="rows are packed from TRL 1.15"),
]

# Two rollout batches of eight groups, and two optimizer steps of two micro-batches on each. Plain gradient descent:
# Adam would make whole steps of rounding.
SCRIPT = dict(
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    steps_per_generation=4,
    max_steps=4,
    max_completion_length=48,
    optim="sgd",
    learning_rate=0.5,
    lr_scheduler_type="constant",
    max_grad_norm=1e9,
)


def zero(stage):
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


ENGINES = {"ddp": {}, "zero_2": {"deepspeed": zero(2)}, "zero_3": {"deepspeed": zero(3)}}
# The first is what the others must match. With `own_rows`, rows stay on their rank: one has live rows, the other none.
RUNS = {
    "whole": {"pack_live_tokens": False},
    **ENGINES,
    **{f"{name}_own_rows": {"own_rows": True} | options for name, options in ENGINES.items()},
}
PACKED = [name for name in RUNS if name != "whole"]
SEEN_BY_ALL = ("gspo/", "reward", "loss", "grad_norm", "clip_ratio/low_mean", "clip_ratio/high_mean")


def letters_of_second_rank(completions, **_):
    """The share of lowercase letters; on the first rank 0, so that all of its groups are dead."""
    rewards = [sum(character.islower() for character in text(one)) / max(len(text(one)), 1) for one in completions]
    return [reward * int(os.environ["RANK"]) for reward in rewards]


def prompts_of_many_lengths():
    """TRL pads prompts to the longest of a rank's rollout batch, which is then another on each rank."""
    return Dataset.from_list([sorting_rows(1, seed=row, digits=3 + row % 7)[0] for row in range(64)])


class RecordingTrainer(GSPOTrainer):
    """Keeps the rows of each optimizer step, and counts the tokens of each forward of the loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows, self.tokens, self.own_rows = [], [], False
        self.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        if self._loss_inputs is not None:
            self.tokens.append(kwargs["input_ids"].numel())

    def _balanced(self, batches):
        return batches if self.own_rows else super()._balanced(batches)

    def _compute_loss(self, model, inputs):
        prompts = [ids[mask.bool()] for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)]
        completions = zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)
        completions = [ids[mask.bool()] for ids, mask in completions]
        for prompt, completion, advantage in zip(prompts, completions, inputs["advantages"], strict=True):
            row = (*prompt.tolist(), "->", *completion.tolist(), round(advantage.item(), 5))
            self.rows.append((self.state.global_step, row))
        return super()._compute_loss(model, inputs)


def whole_weights(trainer):
    parameters = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    import deepspeed

    with deepspeed.zero.GatheredParameters([one for one in parameters if hasattr(one, "ds_id")]):
        return torch.cat([parameter.detach().flatten() for parameter in parameters])


def train_on_rank(output_dir, model_path):
    """Run by each of two processes: all of `RUNS`, one after the other."""
    import deepspeed
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    deepspeed.comm.init_distributed("gloo")
    results = {}
    for name, options in RUNS.items():
        options = {"pack_live_tokens": True, "router_aux_loss_coef": 0.0} | SCRIPT | options
        own_rows = options.pop("own_rows", False)
        dataset, reward = prompts_of_many_lengths(), letters_of_second_rank
        trainer = build(
            RecordingTrainer, output_dir, model=model_path, train_dataset=dataset, reward_funcs=reward, **options
        )
        trainer.own_rows = own_rows
        start = whole_weights(trainer)
        trainer.train()
        results[name] = dict(
            moved=whole_weights(trainer) - start,
            logs=[entry for entry in trainer.state.log_history if "loss" in entry],
            rows=trainer.rows,
            tokens=trainer.tokens,
            way=trainer._scorer.way,
            engine=trainer.accelerator.distributed_type.value,
        )
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(True)
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    results["fsdp"] = shard(output_dir, model_path)
    torch.save(results, Path(output_dir) / f"rank_{os.environ['RANK']}.pt")


def shard(output_dir, model_path):
    """Gradients of a model of shards, packed, and of a whole one, whole; only the second rank's rows are live."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, gradients = int(os.environ["RANK"]), []
    for is_packed in (False, True):
        script = dict(model=model_path, train_dataset=Dataset.from_list(sorting_rows(64, seed=0)))
        trainer = build(GSPOTrainer, output_dir, **script, pack_live_tokens=is_packed, router_aux_loss_coef=0.0)
        if not is_packed:
            batches = [make_batch(trainer, seed=2 * rank + index) for index in range(2)]
            for batch in batches:
                batch["advantages"] = batch["advantages"] * rank
        else:
            mesh = init_device_mesh("cpu", (2,))
            for layer in trainer.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(trainer.model, mesh=mesh)
            trainer._find_way()
        _, found, _ = backward(trainer, batches)
        found = {name: one.full_tensor() if is_packed else one for name, one in found.items()}
        gradients.append(found)
    return {"whole": gradients[0], "packed": gradients[1], "way": trainer._scorer.way}


@pytest.fixture(scope="module", params=["dense", "moe"])
def ranks(request, tokenizer, model_path, moe_path, tmp_path_factory):
    """What the two processes found, for a model whose completions have many lengths."""
    folder = tmp_path_factory.mktemp("engines")
    model = AutoModelForCausalLM.from_pretrained(model_path if request.param == "dense" else moe_path)
    ends = tokenizer.convert_tokens_to_ids(list("ABCDE"))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    run_on_two_ranks(train_on_rank, folder, folder, folder / "model")
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]


def test_runs_are_what_they_say(ranks):
    for results in ranks:
        assert results["whole"]["way"] == "whole"
        assert all(results[name]["way"] == "packed" for name in (*PACKED, "fsdp"))
        engines = {name: results[name]["engine"] for name in RUNS}
        assert all((engine == "DEEPSPEED") == name.startswith("zero") for name, engine in engines.items())
        assert all(engine == "MULTI_CPU" for name, engine in engines.items() if not name.startswith("zero"))
    live = [entry["gspo/live_fraction"] for entry in ranks[0]["whole"]["logs"]]
    assert len(live) == 4 and max(live) < 0.9 and min(live) > 0.2
    assert max(entry["gspo/clip_fraction/sequences"] for entry in ranks[0]["whole"]["logs"]) > 0


@pytest.mark.parametrize("name", PACKED)
def test_weights_are_those_without_packing(name, ranks):
    expected = ranks[0]["whole"]["moved"]
    for results in ranks:
        assert (results[name]["moved"] - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", PACKED)
def test_metrics_are_those_without_packing(name, ranks):
    logs, expected_logs = ranks[0][name]["logs"], ranks[0]["whole"]["logs"]
    assert len(logs) == len(expected_logs) == 4
    for entry, expected in zip(logs, expected_logs, strict=True):
        assert entry.keys() == expected.keys()
        for key in entry:
            if key.startswith(SEEN_BY_ALL) and expected[key] is None:  # no spread to correlate with
                assert entry[key] is None, key
            elif key.startswith(SEEN_BY_ALL):
                assert entry[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
        # That of dead rows is taken to be the mean of the live ones.
        assert entry["entropy"] == pytest.approx(expected["entropy"], rel=1e-2)


@pytest.mark.parametrize("name", PACKED)
def test_rows_of_a_step_are_those_drawn(name, ranks):
    def drawn(name):
        return collections.Counter(row for results in ranks for row in results[name]["rows"])

    rows = drawn(name)
    assert rows == drawn("whole") and rows.total() == 2 * 4 * 2 * 4
    is_moved = [set(results[name]["rows"]) != set(results["whole"]["rows"]) for results in ranks]
    assert is_moved == [not name.endswith("own_rows")] * 2


@pytest.mark.parametrize("name", ENGINES)
def test_ranks_score_about_as_many_tokens(name, ranks):
    tokens = [results[name]["tokens"] for results in ranks]
    # One forward for each micro-batch: ranks that run more would wait for the others for ever.
    assert [len(one) for one in tokens] == [8, 8]
    # The fullest first, and beside one another: the two parts of a step of each rank, as they run.
    for start in range(0, 8, 2):
        parts = [one[place] for place in (start, start + 1) for one in tokens]
        assert parts == sorted(parts, reverse=True)
    first, second = map(sum, tokens)
    assert max(first, second) < 1.15 * min(first, second)
    own = [results[f"{name}_own_rows"]["tokens"] for results in ranks]
    assert own[0] == [2] * 8 and sum(own[1]) == first + second
    assert 2 * (first + second) < sum(sum(results["whole"]["tokens"]) for results in ranks)


def test_gradients_of_shards_are_those_of_the_whole_model(ranks):
    first, second = (results["fsdp"] for results in ranks)
    assert first["packed"].keys() == first["whole"].keys()
    for name, gradient in first["packed"].items():
        # Shards have the mean of what the ranks found.
        expected = (first["whole"][name] + second["whole"][name]) / 2
        assert not first["whole"][name].any()
        assert torch.equal(gradient, second["packed"][name])
        assert (gradient - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name
    assert max(gradient.norm() for gradient in second["packed"].values()) > 1e-4
