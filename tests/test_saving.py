"""What a run saves under each engine loads, alone, and is the model that was trained."""

import gc
import json
import os
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train
from peft import LoraConfig, get_peft_model
from ranks import run_on_two_ranks
from test_train import run_arguments
from tiny import sorting_rows, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_gspo import saving
from trl_gspo.memory import Run, estimate, model_shape


ROOT = Path(__file__).parents[1]
PROMPTS = torch.arange(7, 47).view(4, 10)


# What is refused before training.


def arguments_of(zero=None, fsdp=None):
    plugin = zero and SimpleNamespace(hf_ds_config=SimpleNamespace(config={"zero_optimization": zero}))
    return SimpleNamespace(deepspeed_plugin=plugin, fsdp=fsdp is not None, fsdp_plugin_args=fsdp, use_cpu=False)


def model_arguments(use_peft=False, bits=None):
    return SimpleNamespace(use_peft=use_peft, load_in_4bit=bits == 4, load_in_8bit=bits == 8)


@pytest.fixture
def shipped():
    return {stage: json.loads((ROOT / f"configs/deepspeed/zero{stage}.json").read_text()) for stage in (1, 2, 3)}


def test_shipped_engines_save_what_loads(shipped):
    for options in shipped.values():
        saving.check_saving(arguments_of(options["zero_optimization"]), model_arguments())
    saving.check_saving(arguments_of(fsdp={"state_dict_type": "FULL_STATE_DICT"}), model_arguments())
    saving.check_saving(arguments_of(), model_arguments())


def test_zero3_that_saves_shards_is_refused(shipped):
    zero = shipped[3]["zero_optimization"] | {"stage3_gather_16bit_weights_on_model_save": False}
    with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save.*zero3.json"):
        saving.check_saving(arguments_of(zero), model_arguments())
    # Adapters are gathered in any case.
    saving.check_saving(arguments_of(zero), model_arguments(use_peft=True))


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", None])
def test_fsdp_that_saves_shards_is_refused(kind, monkeypatch):
    with pytest.raises(ValueError, match="FULL_STATE_DICT, as configs/accelerate/fsdp2.yaml"):
        saving.check_saving(arguments_of(fsdp={"state_dict_type": kind}), model_arguments())
    # By accelerate's configuration, whose launcher hands it on so.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", str(kind))
    with pytest.raises(ValueError, match="FULL_STATE_DICT"):
        saving.check_saving(arguments_of(), model_arguments())
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    saving.check_saving(arguments_of(), model_arguments())


def test_two_engines_are_refused(shipped, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match='--deepspeed ""'):
        saving.check_saving(arguments_of(shipped[3]["zero_optimization"]), model_arguments())


def test_a_merge_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="needs an adapter"):
        saving.check_saving(arguments_of(), model_arguments(), merge_adapter=True)
    for bits in (4, 8):
        with pytest.raises(ValueError, match="quantized"):
            saving.check_saving(arguments_of(), model_arguments(use_peft=True, bits=bits), merge_adapter=True)
    saving.check_saving(arguments_of(), model_arguments(use_peft=True), merge_adapter=True)


def test_refusals_come_before_the_model(tmp_path, model_path, monkeypatch, capsys):
    data = str(write_jsonl(tmp_path / "train.jsonl", sorting_rows(16, seed=0)))
    monkeypatch.setattr(train, "make_trainer", lambda *args: pytest.fail("a model was loaded"))
    assert train.main(run_arguments(data, model_path, tmp_path / "out", merge_adapter="true")) == 2
    assert "`merge_adapter=True` needs an adapter" in capsys.readouterr().err


# Merging.


@torch.no_grad()
def logits_of(model):
    return model.eval()(PROMPTS).logits


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_merged_model_is_base_and_adapter(kind, dtype, model_path, moe_path, tokenizer, tmp_path):
    path = model_path if kind == "dense" else moe_path
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(path), config)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    saving.merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    merged, base = (AutoModelForCausalLM.from_pretrained(one) for one in (tmp_path / "merged", path))
    assert not list((tmp_path / "merged").glob("adapter*"))
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), atol=1e-4, rtol=1e-4)
    assert (logits_of(merged) - logits_of(base)).abs().max() > 0.05
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == tokenizer.get_vocab()


def test_what_a_merge_that_was_cut_off_left_is_no_part_of_the_model(model_path, tokenizer, tmp_path):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), LoraConfig(target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    for folder in ("merged", "merged.saving"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter_config.json").write_text("{}")  # with which it would load as an adapter
    saving.merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert not (tmp_path / "merged.saving").exists()


# Runs of two processes. The first are part of every run of the tests, the others of a long one.

ADAPTER = dict(
    use_peft="true",
    lora_target_modules="all-linear",
    lora_r=4,
    lora_dropout=0.0,
    merge_adapter="true",
    learning_rate=1e-2,
)
OFTEN = [("zero3", "dense", "lora"), ("zero3", "moe", "full")]
ENGINES = ("ddp", "zero1", "zero2", "zero3")
ALL = [(engine, kind, what) for engine in ENGINES for kind in ("dense", "moe") for what in ("full", "lora")]
SELDOM = [run for run in ALL if run not in OFTEN]
RUNS = [
    pytest.param(run, id="-".join(run), marks=pytest.mark.slow if run in OFTEN else pytest.mark.exhaustive)
    for run in ALL
]


def cpu_engine(name: str, folder: Path) -> dict[str, str]:
    """A shipped file for DeepSpeed, but for its optimizer, which needs a compiler here."""
    if name == "ddp":
        return {}
    options = json.loads((ROOT / "configs" / "deepspeed" / f"{name}.json").read_text())
    path = folder / f"{name}.json"
    path.write_text(json.dumps(options | {"zero_force_ds_cpu_optimizer": False}))
    return {"deepspeed": str(path)}


def live_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.is_floating_point()]


def bytes_of(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Each storage once, by its address."""
    storages = [one.untyped_storage() for one in tensors]
    return {one.data_ptr(): one.nbytes() for one in storages}


def train_and_save(folder, model_path, moe_path, often):
    """Run by each of two processes: the script, from its arguments to its end, once for each run."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    folder, rank = Path(folder), int(os.environ["RANK"])
    data = str(folder / "train.jsonl")
    make_trainer = train.make_trainer
    train.finish = lambda trainer: None  # the process group is another run's too
    for engine, kind, what in OFTEN if often == "True" else SELDOM:
        name, trainers = f"{engine}-{kind}-{what}", []
        # Of runs before, some of which the collector finds only while this one runs.
        before = [weakref.ref(one) for one in live_tensors()]
        train.make_trainer = lambda *args, trainers=trainers: trainers.append(make_trainer(*args)) or trainers[-1]
        options = cpu_engine(engine, folder) | (ADAPTER if what == "lora" else {})
        argv = run_arguments(
            data,
            model_path if kind == "dense" else moe_path,
            folder / name,
            max_steps=2,
            save_steps=2,
            curves="false",
            gradient_accumulation_steps=1,
            steps_per_generation=2,
            **options,
        )
        assert train.main(argv) == 0
        (trainer,) = trainers
        survivors = bytes_of([one() for one in before if one() is not None])
        held = sum(size for place, size in bytes_of(live_tensors()).items() if place not in survivors)
        logits = logits_of(trainer.accelerator.unwrap_model(trainer.model))
        facts = dict(logits=logits, held=held, engine=trainer.accelerator.distributed_type.value)
        torch.save(facts, folder / f"{name}_rank{rank}.pt")
        del trainer, trainers, logits, facts, before
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(True)
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


@pytest.fixture(scope="module")
def folders(model_path, moe_path, tmp_path_factory):
    """Starts the runs, those of every run of the tests together, and the others together, when one is asked for."""
    started = {}

    def started_with(run):
        often = run in OFTEN
        if often not in started:
            folder = started[often] = tmp_path_factory.mktemp("runs")
            write_jsonl(folder / "train.jsonl", sorting_rows(32, seed=0))
            run_on_two_ranks(train_and_save, folder, folder, model_path, moe_path, often)
        return started[often]

    return started_with


@pytest.fixture
def saved(request, folders):
    folder, name = folders(request.param), "-".join(request.param)
    facts = [torch.load(folder / f"{name}_rank{rank}.pt") for rank in range(2)]
    return SimpleNamespace(folder=folder / name, facts=facts, run=request.param)


def base_of(run, model_path, moe_path):
    return AutoModelForCausalLM.from_pretrained(model_path if run[1] == "dense" else moe_path)


@pytest.mark.parametrize("saved", RUNS, indirect=True)
def test_saved_model_loads_and_is_the_one_trained(saved, model_path, moe_path):
    first, second = saved.facts
    assert first["engine"] == ("DEEPSPEED" if saved.run[0].startswith("zero") else "MULTI_CPU")
    trained = first["logits"]
    torch.testing.assert_close(trained, second["logits"])
    before = logits_of(base_of(saved.run, model_path, moe_path))
    assert (trained - before).abs().max() > 1e-4
    # The run's folder, and its last checkpoint: each a model of its own.
    for folder in (saved.folder, saved.folder / "checkpoint-2"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits_of(model), trained, atol=1e-5, rtol=1e-5)
        assert (folder / "adapter_config.json").is_file() == (saved.run[2] == "lora")
        assert AutoTokenizer.from_pretrained(folder).pad_token == "<pad>"


@pytest.mark.parametrize("saved", [run for run in RUNS if run.values[0][2] == "lora"], indirect=True)
def test_merged_model_loads_alone(saved):
    merged = AutoModelForCausalLM.from_pretrained(saved.folder / "merged")
    assert not hasattr(merged, "peft_config") and not list((saved.folder / "merged").glob("adapter*"))
    torch.testing.assert_close(logits_of(merged), saved.facts[0]["logits"], atol=1e-5, rtol=1e-5)
    AutoTokenizer.from_pretrained(saved.folder / "merged")


@pytest.mark.parametrize(
    "saved", [run for run in RUNS if run.values[0][0] != "ddp" and run.values[0][2] == "full"], indirect=True
)
def test_shards_of_a_checkpoint_become_whole_float32_weights(saved):
    """DeepSpeed's own way, for a checkpoint whose model was not gathered."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights = get_fp32_state_dict_from_zero_checkpoint(str(saved.folder / "checkpoint-2"))
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(weights[name].to(expected.dtype), expected, msg=name)


@pytest.mark.parametrize("saved", [run for run in RUNS if run.values[0][2] == "full"], indirect=True)
def test_processes_hold_what_the_arithmetic_says(saved, model_path, moe_path):
    """The least that `trl_gspo.memory` computes, against the tensors that lived at the end of the run."""
    model = base_of(saved.run, model_path, moe_path)
    run = Run(gpus=2, engine=saved.run[0], weight_bytes=4, is_half=False, gathers=False)
    memory = estimate(model_shape(model, model.config), run)
    for facts in saved.facts:
        # Gradients of the last step may be gone.
        assert memory.weights + memory.optimizer <= facts["held"] * 1.01
