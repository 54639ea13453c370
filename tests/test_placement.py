"""Whether a run fits on its GPUs, said before anything is loaded; GPUs are pretended."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import memory as script
import pytest
import torch
import train
from safetensors import safe_open
from test_train import arguments
from tiny import make_tokenizer, sorting_rows, write_jsonl
from transformers.integrations import deepspeed as hf_deepspeed

from trl_gspo import placement
from trl_gspo.memory import GIB, estimate


ROOT = Path(__file__).parents[1]
# What torch reports of such cards.
GPU_10, GPU_24, GPU_40, GPU_80, GPU_141 = (int(size * GIB) for size in (9.6, 22.1, 39.4, 79.2, 139.8))


@pytest.fixture(scope="module")
def qwen7b(tmp_path_factory):
    """A folder with the configuration of Qwen2.5-7B and its tokenizer's like, and no weights."""
    folder = tmp_path_factory.mktemp("qwen7b")
    config = script.CONFIGS["Qwen2.5-7B"]
    config.architectures, config.dtype = ["Qwen2ForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def no_process_group(monkeypatch):
    """The variables of a launcher are this test's own, and DeepSpeed's configuration is nobody else's."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    yield
    hf_deepspeed.unset_hf_deepspeed_config()


@pytest.fixture
def pretend(monkeypatch):
    """Pretends GPUs of some bytes, of which a launcher started a process each."""

    def pretend(*sizes, launched=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=sizes[index])
        )
        if launched:
            monkeypatch.setenv("LOCAL_RANK", "0")
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(sizes)))

    return pretend


def read(config, model, monkeypatch, gpus=1, **options):
    """The arguments of a configuration as `gpus` processes on GPUs would have them."""
    monkeypatch.chdir(ROOT)
    words = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # of GPUs that were pretended before
    argv = ["--config", f"configs/{config}.yaml", "--model_name_or_path", model, "--use_cpu", "true", *words]
    _, training_args, model_args, _ = train.parse(argv)
    if training_args.deepspeed_plugin is not None:
        training_args.deepspeed_plugin.hf_ds_config.config["bf16"] = {"enabled": True}
    training_args.use_cpu = False
    monkeypatch.setattr(type(training_args), "world_size", property(lambda self: gpus))
    return training_args, model_args


# Configuration, GPUs and their size; whether it is refused, warned of, or found to fit; what is said of it, and what
# is proposed in its place.
TABLE = [
    ("qwen7b", 1, GPU_24, "refused", "at least 113.5 GiB", ["qwen7b_qlora.yaml"]),
    ("qwen7b", 1, GPU_40, "refused", "at least 113.5 GiB", ["zero3_offload.json`", "qwen7b_qlora.yaml", "16 GPUs"]),
    ("qwen7b", 1, GPU_80, "refused", "at least 113.5 GiB", ["zero3_offload.json` with 113.5 GiB", "4 GPUs"]),
    ("qwen7b", 2, GPU_24, "refused", "at least 63.8 GiB", ["qwen7b_qlora.yaml"]),
    ("qwen7b", 2, GPU_40, "refused", "at least 63.8 GiB", ["zero3_offload.json`"]),
    ("qwen7b", 2, GPU_80, "warned", "up to 81.7 GiB", ["zero3_offload.json`", "4 GPUs"]),
    ("qwen7b", 4, GPU_24, "refused", "at least 39.0 GiB", ["zero3_offload.json --ds3_gather_for_generation false`"]),
    ("qwen7b", 4, GPU_40, "warned", "up to 53.3 GiB", ["zero3_offload.json`"]),
    ("qwen7b", 4, GPU_80, "fits", "up to 53.3 GiB", []),
    ("qwen7b", 8, GPU_24, "refused", "at least 26.6 GiB", ["zero3_offload.json --ds3_gather_for_generation false`"]),
    ("qwen7b", 8, GPU_40, "warned", "up to 39.1 GiB", ["zero3_offload.json`"]),
    ("qwen7b", 8, GPU_80, "fits", "up to 39.1 GiB", []),
    ("qwen7b", 1, GPU_141, "fits", "up to 129.5 GiB", []),
    ("qwen7b_lora", 1, GPU_80, "fits", "LoRA without sharding", []),
    ("qwen7b_lora", 1, GPU_24, "warned", "LoRA without sharding", []),
    ("qwen7b_qlora", 1, GPU_24, "fits", "LoRA in 4 bits", []),
    # Frozen layers beyond one GPU are kept on the host by transformers, which DDP forbids.
    ("qwen7b_lora", 1, GPU_10, "warned", "LoRA without sharding", []),
    ("qwen7b_lora", 2, GPU_10, "refused", "LoRA without sharding", []),
]


@pytest.mark.parametrize(
    ("config", "gpus", "size", "outcome", "said", "proposed"),
    TABLE,
    ids=[f"{config}-{gpus}x{size // GIB}" for config, gpus, size, *_ in TABLE],
)
def test_a_configuration_is_told_before_loading(
    config, gpus, size, outcome, said, proposed, qwen7b, pretend, monkeypatch, caplog
):
    training_args, model_args = read(config, qwen7b, monkeypatch, gpus)
    pretend(*[size] * gpus)
    caplog.set_level(logging.INFO, "trl_gspo")
    is_distributed = gpus > 1 or training_args.deepspeed is not None
    if not is_distributed:  # as `accelerate launch` starts one process
        monkeypatch.delenv("LOCAL_RANK")
    if outcome == "refused":
        with pytest.raises(ValueError, match="cannot fit") as error:
            placement.check_memory(training_args, model_args, f"configs/{config}.yaml")
        message = str(error.value)
        assert "--memory_check false" in message
        assert not caplog.records
    else:
        placement.check_memory(training_args, model_args, f"configs/{config}.yaml")
        (record,) = caplog.records
        message = record.getMessage()
        assert record.levelname == {"warned": "WARNING", "fits": "INFO"}[outcome]
        assert ("may run out of memory" in message) == (outcome == "warned")
    assert said in message
    for words in proposed:
        assert words in message
    assert len(message) < 1000


@pytest.mark.parametrize("use_cpu", [False, True])
@pytest.mark.parametrize(("option", "launcher"), [("full_shard", ""), ("", "true")])
def test_fsdp_is_on_for_accelerators_only(option, launcher, use_cpu, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", launcher)
    assert placement.uses_fsdp(SimpleNamespace(fsdp=option, use_cpu=use_cpu)) == (not use_cpu)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_the_batch_of_qwen7b_divides_on_each_number_of_gpus(gpus, qwen7b, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.world_size", property(lambda self: gpus))
    training_args, _ = read("qwen7b", qwen7b, monkeypatch, gpus)
    assert training_args.generation_batch_size == 4 * 16 * gpus
    assert training_args.generation_batch_size % training_args.num_generations == 0
    assert training_args.steps_per_generation == 4 * training_args.gradient_accumulation_steps


def test_what_is_proposed_is_told_to_fit(qwen7b, pretend, monkeypatch, caplog):
    """Whoever follows the advice is not refused, nor warned."""
    caplog.set_level(logging.INFO, "trl_gspo")
    advised = dict(deepspeed="configs/deepspeed/zero3_offload.json")
    for config, options in (("qwen7b", advised), ("qwen7b_lora", {}), ("qwen7b_qlora", {})):
        training_args, model_args = read(config, qwen7b, monkeypatch, 1, **options)
        pretend(GPU_80)
        placement.check_memory(training_args, model_args)
    for size, options in (
        (GPU_80, advised),
        (GPU_80, dict(ds3_gather_for_generation="false")),
        (int(82 * GIB), dict(per_device_train_batch_size=2)),
    ):
        training_args, model_args = read("qwen7b", qwen7b, monkeypatch, 2, **options)
        pretend(size, size)
        placement.check_memory(training_args, model_args)
    assert [record.levelname for record in caplog.records] == ["INFO"] * 6


@pytest.mark.parametrize(
    "options",
    [
        dict(optim="adamw_bnb_8bit"),
        dict(optim="sgd"),
        dict(optim="adafactor"),
    ],
)
def test_smaller_optimizers_are_not_refused(options, qwen7b, pretend, monkeypatch, caplog):
    """On one GPU of 80 GB, 7B parameters with master weights take 57 GiB; only Adam's states are too much."""
    training_args, model_args = read("qwen7b", qwen7b, monkeypatch, 1, **options)
    pretend(GPU_80)
    placement.check_memory(training_args, model_args)


@pytest.mark.parametrize(
    "change",
    [
        dict(bf16=dict(enabled=True, bf16_master_weights_and_grads=True)),
        dict(zero_optimization=dict(stage=3, zero_quantized_weights=True)),
        dict(zero_optimization=dict(stage=0)),
    ],
)
def test_what_the_arithmetic_does_not_know_is_not_refused(change, qwen7b, pretend, monkeypatch, caplog):
    training_args, model_args = read("qwen7b", qwen7b, monkeypatch, 1)
    pretend(GPU_24)
    training_args.deepspeed_plugin.hf_ds_config.config.update(change)
    caplog.set_level(logging.INFO, "trl_gspo")
    placement.check_memory(training_args, model_args)
    assert not caplog.records


@pytest.mark.parametrize(
    "given", [dict(device_map="auto"), dict(quantization_config={"load_in_4bit": True}), dict(dtype="auto")]
)
def test_arguments_of_the_model_are_heard(given, qwen7b, pretend, monkeypatch):
    training_args, model_args = read("gsm8k_0.5b", qwen7b, monkeypatch, 1)
    training_args.model_init_kwargs = given
    _, config, _ = placement.read_shape(model_args, training_args)
    run = placement.run_of(training_args, model_args, config)
    # The configuration of the model says bfloat16, gsm8k_0.5b.yaml float32.
    assert run is None if "dtype" not in given else run.weight_bytes == 2


def test_options_reach_the_arithmetic(qwen7b, pretend, monkeypatch):
    training_args, model_args = read("qwen7b", qwen7b, monkeypatch, 2, beta=0.1, optim="sgd")
    pretend(GPU_80, GPU_80)
    shape, config, trained = placement.read_shape(model_args, training_args)
    assert (shape.parameters, shape.layers, shape.cache_width, trained) == (7_615_616_512, 28, 2 * 4 * 128, None)
    run = placement.run_of(training_args, model_args, config)
    assert (run.gpus, run.engine, run.weight_bytes, run.bits, run.state_bytes) == (2, "zero3", 2, None, None)
    assert (run.rollout_rows, run.micro_batch_rows, run.completion_tokens) == (64, 4, 2048)
    assert (run.offloads_optimizer, run.gathers, run.has_reference, run.is_checkpointed) == (False, True, True, True)
    training_args, model_args = read("qwen7b_qlora", qwen7b, monkeypatch, 1)
    run = placement.run_of(training_args, model_args, config)
    assert (run.engine, run.bits, run.is_half, run.has_reference) == ("ddp", 4, True, False)
    # r = 16 on the seven linear layers of each of the 28 layers: PEFT's count for this model.
    per_layer = 2 * (3584 + 3584) + 2 * (3584 + 512) + 2 * (3584 + 18944) + (18944 + 3584)
    assert placement.read_shape(model_args, training_args)[2] == 16 * 28 * per_layer


def test_memory_is_that_of_the_smallest_gpu_of_this_machine(pretend, monkeypatch):
    args = SimpleNamespace(use_cpu=False)
    pretend(GPU_80, GPU_40, GPU_24)
    assert placement.gpu_bytes(args) == GPU_24
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert placement.gpu_bytes(args) == GPU_40
    # A model that no launcher shares out is spread over all that its process sees.
    monkeypatch.delenv("LOCAL_RANK")
    assert placement.gpu_bytes(args) == GPU_80 + GPU_40 + GPU_24
    assert placement.gpu_bytes(SimpleNamespace(use_cpu=True)) == 0


def test_silent_on_cpu_and_without_a_configuration(qwen7b, pretend, monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.INFO, "trl_gspo")
    training_args, model_args = read("qwen7b", qwen7b, monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    placement.check_memory(training_args, model_args)
    pretend(GPU_24)
    model_args.model_name_or_path = str(tmp_path)
    placement.check_memory(training_args, model_args)
    assert not caplog.records


def test_no_weights_are_read_nor_shared_out(qwen7b, monkeypatch):
    """ZeRO-3 is on, and would make each model it hears of with the weights on the device."""
    training_args, model_args = read("qwen7b", qwen7b, monkeypatch, 1)
    assert hf_deepspeed.is_deepspeed_zero3_enabled()
    with placement.without_zero_init():
        assert not hf_deepspeed.is_deepspeed_zero3_enabled()
    placement.read_shape(model_args, training_args)
    assert hf_deepspeed.is_deepspeed_zero3_enabled()
    assert not list(Path(qwen7b).glob("*.safetensors"))


def test_deepspeed_of_a_configuration_can_be_left_out(qwen7b, monkeypatch):
    training_args, model_args = read("qwen7b", qwen7b, monkeypatch, 1, deepspeed="")
    assert training_args.deepspeed_plugin is None
    assert placement.run_of(training_args, model_args, script.CONFIGS["Qwen2.5-7B"]).engine == "ddp"


def test_parsing_alone_starts_nothing(qwen7b, monkeypatch):
    read("qwen7b", qwen7b, monkeypatch, 1)
    assert "LOCAL_RANK" not in os.environ and "MASTER_PORT" not in os.environ


def test_alternatives_fit_better(qwen7b):
    shape, _ = script.read_models()["Qwen2.5-7B"]
    run = replace(script.Run(gpus=2, engine="zero3", rollout_rows=64, micro_batch_rows=4))
    found = placement.alternatives(run, str(ROOT / "configs" / "qwen7b.yaml"), num_generations=8)
    names = " ".join(words for words, _ in found)
    for words in ("zero3_offload.json", "qwen7b_lora.yaml", "qwen7b_qlora.yaml", "ds3_gather_for_generation false"):
        assert words in names
    assert all(estimate(shape, other).peak < estimate(shape, run).peak for _, other in found)
    # Half of 64 sequences on 2 GPUs are 8 groups of 8, and no whole groups of 48.
    assert "--per_device_train_batch_size" not in " ".join(w for w, _ in placement.alternatives(run, None, 48))


# One process that no launcher started as one of several.


@pytest.mark.parametrize(
    ("deepspeed", "environment", "devices", "starts"),
    [
        (None, {}, 1, False),
        ("zero3.json", {}, 1, True),
        ("zero3.json", {}, 0, True),
        ({"zero_optimization": {"stage": 2}}, {}, 1, True),
        (None, {"ACCELERATE_USE_DEEPSPEED": "true"}, 1, True),
        ("zero3.json", {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, 1, False),
        # TRL refuses one process with several GPUs, and names the launchers.
        ("zero3.json", {}, 2, False),
        ("", {}, 1, False),
    ],
)
def test_a_single_process_gets_what_deepspeed_needs(deepspeed, environment, devices, starts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(os, "environ", dict(environment))
    placement.start_alone(deepspeed, use_cpu=devices == 0)
    needed = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    assert (needed.items() <= os.environ.items()) == starts
    assert ("MASTER_PORT" in os.environ) == starts


PRETENDED = """
import sys
import torch
import trl_gspo.placement
trl_gspo.placement.gpu_bytes = lambda training_args: {size}
from transformers import PreTrainedModel
def refuse(*args, **kwargs):
    raise SystemExit("a model was loaded")
PreTrainedModel.from_pretrained = refuse
sys.path.insert(0, "scripts")
import train
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.exhaustive
def test_two_processes_refuse_before_loading(qwen7b, tmp_path):
    """As a user starts it, on two processes: exit code 2, one message, and nothing loaded."""
    program = tmp_path / "train.py"
    program.write_text(PRETENDED.format(size=GPU_40))
    data = write_jsonl(tmp_path / "train.jsonl", sorting_rows(64, seed=0))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    command += ["--config", "configs/qwen7b.yaml", "--use_cpu", "true", "--model_name_or_path", qwen7b]
    command += ["--dataset_name", str(data), "--reward_funcs", "exact_match_reward", "--output_dir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert run.returncode == 1 and "exitcode  : 2" in run.stderr, run.stderr
    assert run.stderr.count("cannot fit: it takes at least 63.8 GiB") == 1
    assert "configs/deepspeed/zero3_offload.json" in run.stderr
    assert "a model was loaded" not in run.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [2, 3])
def test_one_process_trains_under_deepspeed(stage, model_path, tmp_path):
    """`accelerate launch` and plain python start it alike, without the variables of a distributed run."""
    options = json.loads((ROOT / f"configs/deepspeed/zero{stage}.json").read_text())
    (tmp_path / "zero.json").write_text(json.dumps(options | {"zero_force_ds_cpu_optimizer": False}))
    data = write_jsonl(tmp_path / "train.jsonl", sorting_rows(16, seed=0))
    argv = arguments(
        dataset_name=data,
        model_name_or_path=model_path,
        output_dir=tmp_path / "out",
        deepspeed=tmp_path / "zero.json",
        max_steps=1,
        save_strategy="no",
        curves="false",
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *argv]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        assert weights.keys()


def test_the_check_can_be_left_out(qwen7b, monkeypatch, tmp_path):
    monkeypatch.setattr(placement, "gpu_bytes", lambda training_args: GPU_24)
    monkeypatch.chdir(ROOT)
    data = write_jsonl(tmp_path / "train.jsonl", sorting_rows(64, seed=0))
    loaded = []
    monkeypatch.setattr(train, "make_trainer", lambda *args: loaded.append(args) or sys.exit("loading"))
    argv = ["--config", "configs/gsm8k_0.5b.yaml", "--model_name_or_path", qwen7b, "--use_cpu", "true"]
    argv += ["--bf16", "false", "--dataset_name", str(data), "--prompt_column", "prompt", "--solution_column"]
    argv += ["solution", "--eval_strategy", "no", "--output_dir", str(tmp_path / "out")]
    assert train.main(argv) == 2 and not loaded
    with pytest.raises(SystemExit, match="loading"):
        train.main([*argv, "--memory_check", "false"])
    assert loaded
