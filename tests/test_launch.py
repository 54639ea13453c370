"""The files for accelerate, DeepSpeed and SLURM: read by those who take them, and started."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from test_train import arguments
from tiny import sorting_rows, write_jsonl
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from trl_gspo import GSPOConfig


ROOT = Path(__file__).parents[1]
ACCELERATE = {path.stem: path for path in sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))}
DEEPSPEED = {path.stem: path for path in sorted((ROOT / "configs" / "deepspeed").glob("*.json"))}
SLURM = ROOT / "configs" / "slurm" / "train.sbatch"
ENGINES = {
    "ddp": ("MULTI_GPU", 1),
    "zero1": ("DEEPSPEED", 1),
    "zero2": ("DEEPSPEED", 1),
    "zero3": ("DEEPSPEED", 1),
    "zero3_offload": ("DEEPSPEED", 1),
    "fsdp2": ("FSDP", 1),
    "two_machines": ("DEEPSPEED", 2),
}


def validated(path, *words):
    """Arguments as `accelerate launch` has them once it has read a file."""
    parsed = launch_command_parser().parse_args(["--config_file", str(path), *words, "scripts/train.py"])
    return _validate_launch_command(parsed)


def test_the_promised_files_are_there():
    assert set(ACCELERATE) == set(ENGINES)
    assert set(DEEPSPEED) == {"zero1", "zero2", "zero3", "zero3_offload"}


@pytest.mark.parametrize("name", ENGINES)
def test_accelerate_reads_its_file(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    engine, machines = ENGINES[name]
    config = load_config_from_file(str(ACCELERATE[name]))
    assert config.distributed_type.value == engine
    assert (config.num_machines, config.num_processes) == (machines, 8 * machines)
    more = ["--main_process_ip", "host", "--machine_rank", "1"] if machines > 1 else []
    args, defaults, _ = validated(ACCELERATE[name], *more)
    assert (args.use_deepspeed, args.use_fsdp, args.multi_gpu) == (
        engine == "DEEPSPEED",
        engine == "FSDP",
        engine == "MULTI_GPU",
    )
    if engine == "DEEPSPEED":
        assert Path(args.deepspeed_config_file).is_file()
        # What `launch_command` hands on: fields that DeepSpeed's file has must not stand here too.
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        command, environment = prepare_deepspeed_cmd_env(args)
        # By torchrun, on each machine, and not by logging in.
        assert command is None
        assert environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == args.deepspeed_config_file
    else:
        environment = prepare_multi_gpu_env(args)
        assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert args.nproc_per_node == "8"
    if machines > 1:
        assert (args.nnodes, args.node_rank) == ("2", 1)
        assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "host:29500")


def test_fsdp2_is_what_accelerate_makes_of_its_file(monkeypatch):
    args, _, _ = validated(ACCELERATE["fsdp2"])
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, False)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.cpu_ram_efficient_loading


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_reads_its_file(name, tmp_path, monkeypatch):
    """Filled by transformers with the values of a run, as in training, and read by DeepSpeed's own class."""
    from deepspeed.runtime.config import DeepSpeedConfig

    args = GSPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=8, max_grad_norm=0.5, report_to="none"
    )
    args.bf16 = True
    config = HfTrainerDeepSpeedConfig(str(DEEPSPEED[name]))
    config.trainer_config_process(args)
    model = type("Model", (), {"config": type("Config", (), {"hidden_size": 64})})
    config.trainer_config_finalize(args, model, num_training_steps=10)
    assert "auto" not in json.dumps(config.config)
    read = DeepSpeedConfig(config.config)
    zero = read.zero_config
    assert zero.stage == int(name[4]) == config.config["zero_optimization"]["stage"]
    assert read.bfloat16_config.enabled
    assert (read.gradient_clipping, read.train_micro_batch_size_per_gpu) == (0.5, 8)
    offload = zero.offload_optimizer
    assert (offload is not None and offload.device == "cpu") == name.endswith("offload")
    assert zero.gather_16bit_weights_on_model_save == name.startswith("zero3")
    # Every key is one of DeepSpeed's: its class keeps strangers without a word.
    known = {field.alias or key for key, field in type(zero).model_fields.items()} | set(type(zero).model_fields)
    assert config.config["zero_optimization"].keys() <= known


def test_every_value_of_the_files_has_its_source_in_the_docs():
    docs = (ROOT / "docs" / "scale.md").read_text()
    for path in DEEPSPEED.values():
        for key in json.loads(path.read_text())["zero_optimization"]:
            assert f"`{key}`" in docs, f"{path.name}: {key}"
    for path in [*ACCELERATE.values(), SLURM]:
        assert path.read_text().count("#") > 3, path.name


# Started for real.


def on_cpu(name: str, folder: Path, processes: int = 2) -> str:
    """A shipped file, but for what needs a GPU: the device, half precision, the number of processes, a compiler."""
    config = yaml.safe_load(ACCELERATE[name].read_text())
    config |= {"use_cpu": True, "num_processes": processes}
    if "mixed_precision" in config:
        config["mixed_precision"] = "no"
    if "deepspeed_config" in config:
        shipped = ROOT / config["deepspeed_config"]["deepspeed_config_file"]
        options = json.loads(shipped.read_text()) | {"zero_force_ds_cpu_optimizer": False}
        if "offload_optimizer" in options["zero_optimization"]:
            options["zero_optimization"]["offload_optimizer"]["pin_memory"] = False
        (folder / shipped.name).write_text(json.dumps(options))
        config["deepspeed_config"]["deepspeed_config_file"] = str(folder / shipped.name)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def training(folder: Path, model_path: str) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of a run of one step that notes where it is."""
    data = write_jsonl(folder / "train.jsonl", sorting_rows(32, seed=0))
    argv = arguments(
        dataset_name=data,
        model_name_or_path=model_path,
        output_dir=folder / "out",
        reward_funcs="tests.placed_reward.share_of_digits",
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        max_steps=1,
        save_strategy="no",
        curves="false",
    )
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in launchers}
    return argv, environment | {"PLACED": str(folder), "OMP_NUM_THREADS": "1"}


def seen_by_ranks(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in ENGINES if name != "two_machines"])
def test_a_file_starts_what_it_says(name, model_path, tmp_path):
    argv, environment = training(tmp_path, model_path)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", on_cpu(name, tmp_path)]
    command += ["--main_process_port", free_port(), str(ROOT / "scripts" / "train.py"), *argv]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    seen = seen_by_ranks(tmp_path)
    assert len(seen) == 2 and all(one["processes"] == 2 for one in seen)
    # accelerate turns FSDP on for accelerators only.
    is_zero = name.startswith("zero")
    assert all(one["engine"] == ("DEEPSPEED" if is_zero else "MULTI_CPU") for one in seen)
    if is_zero:
        shipped = json.loads(DEEPSPEED[name].read_text())["zero_optimization"]
        assert all(one["zero"]["stage"] == shipped["stage"] for one in seen)
        assert all(("offload_optimizer" in one["zero"]) == ("offload_optimizer" in shipped) for one in seen)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.exhaustive
def test_deepspeed_of_the_training_configuration_wins(model_path, tmp_path):
    argv, environment = training(tmp_path, model_path)
    on_cpu("zero3", tmp_path)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", on_cpu("zero1", tmp_path)]
    command += ["--main_process_port", free_port(), str(ROOT / "scripts" / "train.py"), *argv]
    command += ["--deepspeed", str(tmp_path / "zero3.json")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    assert [one["zero"]["stage"] for one in seen_by_ranks(tmp_path)] == [3, 3]


# SLURM: its commands are stood in for, by ones that start a task on each "machine", as srun would.

SRUN = """#!/usr/bin/env bash
# Two tasks, on machines 0 and 1. The first argument is an option of srun's.
[[ "$1" == --kill-on-bad-exit=1 ]] || exit 9
shift
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait "$first"; a=$?
wait "$second"; b=$?
exit $((a | b))
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames node[1-2]" ]] || exit 9
printf '127.0.0.1\\n' && sleep 0.2 && printf 'node2\\n'
"""
RECORDER = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$PLACED/words_$SLURM_NODEID"
"""


def cluster(folder: Path, **programs: str) -> dict[str, str]:
    """The environment of a job, with stand-ins of the cluster's commands first on the path."""
    for name, text in programs.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    job = dict(SLURM_NNODES="2", SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_ID="1234567", SLURM_CPUS_PER_TASK="1")
    return job | {"PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_batch_script_starts_a_task_on_each_machine(tmp_path):
    subprocess.run(["bash", "-n", SLURM], check=True)
    environment = os.environ | cluster(tmp_path, srun=SRUN, scontrol=SCONTROL, accelerate=RECORDER)
    environment |= {"PLACED": str(tmp_path), "SLURM_GPUS_PER_NODE": "a100:4"}
    words = ["--config", "configs/qwen3_30b_a3b.yaml", "--system_prompt", "two words"]
    subprocess.run(["bash", SLURM, *words], check=True, cwd=ROOT, env=environment)
    for machine in (0, 1):
        seen = (tmp_path / f"words_{machine}").read_text().splitlines()
        args = launch_command_parser().parse_args(seen[1:])
        assert seen[0] == "launch"
        assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 8, machine)
        assert (args.main_process_ip, args.main_process_port) == ("127.0.0.1", 20000 + 4567)
        assert args.config_file == "configs/accelerate/two_machines.yaml"
        assert args.training_script == "scripts/train.py"
        assert args.training_script_args == ["--resume", *words]


def test_batch_script_fails_as_a_machine_does(tmp_path):
    fails = "#!/usr/bin/env bash\nexit $((7 * SLURM_NODEID))\n"
    environment = os.environ | cluster(tmp_path, srun=SRUN, scontrol=SCONTROL, accelerate=fails)
    assert subprocess.run(["bash", SLURM], cwd=ROOT, env=environment).returncode == 7


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_batch_script_is_clean():
    subprocess.run(["shellcheck", SLURM], check=True)


@pytest.mark.exhaustive
def test_batch_script_trains_on_two_machines(model_path, tmp_path):
    argv, environment = training(tmp_path, model_path)
    environment |= cluster(tmp_path, srun=SRUN, scontrol=SCONTROL)
    environment |= {"SLURM_JOB_ID": free_port(), "GPUS_PER_NODE": "1"}
    environment |= {"ACCELERATE_CONFIG": on_cpu("two_machines", tmp_path)}
    run = subprocess.run(
        ["bash", SLURM, *argv], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    seen = seen_by_ranks(tmp_path)
    assert [(one["machine"], one["processes"], one["engine"]) for one in seen] == [
        ("0", 2, "DEEPSPEED"),
        ("1", 2, "DEEPSPEED"),
    ]
    assert all(one["zero"]["stage"] == 3 for one in seen)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.gpu
def test_fsdp2_trains_and_saves_on_gpus(model_path, tmp_path):
    """Never run: no machine of this project has two GPUs."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    argv, environment = training(tmp_path, model_path)
    keys = argv[::2]
    for name, value in {"--use_cpu": "false", "--bf16": "true"}.items():
        argv[2 * keys.index(name) + 1] = value
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE["fsdp2"])]
    command += ["--num_processes", "2", str(ROOT / "scripts" / "train.py"), *argv]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    assert [one["engine"] for one in seen_by_ranks(tmp_path)] == ["FSDP", "FSDP"]
    before = AutoModelForCausalLM.from_pretrained(model_path).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name].to(before[name].dtype)) for name in before)
