import json
from pathlib import Path

import pytest
import train
from trl import get_peft_config, get_quantization_config

from trl_gspo.rewards import load_reward
from trl_gspo.tasks import TASKS


ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
NAMES = {"tiny", "gsm8k_0.5b", "qwen7b", "qwen7b_lora", "qwen7b_qlora", "qwen3_30b_a3b"}
NAMES |= {"math_1.5b", "code_1.5b", "reasoning_1.5b", "reasoning_tiny", "mixed_1.5b", "customer_service"}


def test_the_promised_configs_are_there():
    assert NAMES <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_its_objects(path, monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    # A test machine has no GPU for bf16; nothing else is overridden.
    script_args, training_args, model_args, _ = train.parse(["--config", str(path), "--use_cpu", "true"])
    get_peft_config(model_args)
    get_quantization_config(model_args)
    for name in script_args.reward_funcs:
        if name != "code_reward":  # refused without `--allow_code_execution`, which no file gives
            kwargs = (script_args.reward_kwargs or {}).get(name)
            load_reward(name, kwargs, max_completion_length=training_args.max_completion_length)
    assert len(training_args.reward_weights or script_args.reward_funcs) == len(script_args.reward_funcs)
    assert training_args.steps_per_generation == 4 * training_args.gradient_accumulation_steps
    assert model_args.load_in_4bit == (path.stem == "qwen7b_qlora")
    assert model_args.use_peft == path.stem.startswith("qwen7b_")
    assert (training_args.deepspeed is not None) == (path.stem in ("qwen7b", "qwen3_30b_a3b"))
    if path.stem not in ("tiny", "reasoning_tiny"):
        assert (training_args.epsilon, training_args.epsilon_high) == (3e-4, 4e-4)
    assert not [record for record in caplog.records if record.name.startswith("trl_gspo")]


# What says for itself what it is.
PLAIN = {"model_name_or_path", "dtype", "dataset_name", "reward_funcs", "output_dir", "use_peft", "bf16"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_group_of_values_has_its_reason_above_it(path):
    header, *groups = path.read_text().split("\n\n")
    assert header.startswith("# ") and "accelerate launch" in header
    for group in groups:
        keys = [line.split(":")[0] for line in group.splitlines() if line[0] not in "# "]
        assert group.startswith("# ") or set(keys[:1]) <= PLAIN, f"{path.name}: no reason above {keys}"


def test_zero3_saves_whole_weights():
    zero3 = json.loads((ROOT / "configs/deepspeed/zero3.json").read_text())
    assert zero3["zero_optimization"]["stage"] == 3
    assert zero3["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


def test_each_task_has_a_config():
    named = {train.parse(["--config", str(path), "--use_cpu", "true"])[0].task for path in CONFIGS}
    assert named >= set(TASKS)
