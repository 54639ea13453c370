"""Configurations of other systems: how they are read and told apart, and what becomes of each field."""

import itertools
import re
from pathlib import Path

import pytest
import train
import yaml
from transformers import TrainingArguments

from trl_gspo import GSPOConfig, migration
from trl_gspo.migration import MigrationError, detect, gspo_name, migrate_config, read_command, read_config, to_yaml
from trl_gspo.migration_tables import SYSTEMS, VERL_SECTIONS
from trl_gspo.rewards import load_reward


FIXTURES = sorted(path for path in Path(__file__).with_name("migration").iterdir() if path.suffix != ".py")
ROOT = Path(__file__).parents[1]


def read(path):
    text = path.read_text()
    return read_command(text) if path.suffix == ".sh" else read_config(text)


def fixture(name):
    return read(next(path for path in FIXTURES if path.name == name))


# What each fixture becomes, worked out by hand.
EXPECTED = {
    # 0.2 and 0.28 are for tokens; KL 0.001 is small; a rollout was one step of 4 x 2 completions.
    "trl_grpo.yaml": ("trl", dict(
        model_name_or_path="Qwen/Qwen2.5-0.5B-Instruct", dtype="bfloat16", epsilon=3e-4, epsilon_high=4e-4, beta=0.0,
        loss_type="grpo", importance_sampling_level="sequence", per_device_train_batch_size=4, num_generations=8,
        gradient_accumulation_steps=2, steps_per_generation=8, warmup_steps=0.1, lora_dropout=0.0, lora_r=16,
        lora_target_modules=["all-linear"], output_dir="outputs/Qwen2.5-0.5B-GSPO", run_name="Qwen2.5-0.5B-GSPO",
        hub_model_id="me/Qwen-GSPO", env={"WANDB_PROJECT": "math"}, reward_weights=[1.0, 0.2],
    )),
    # GSPO already; 8 micro-batches at an accumulation of 2 are four steps.
    "trl_flags.sh": ("trl", dict(
        epsilon=3e-4, epsilon_high=4e-4, beta=0.0, loss_type="grpo", steps_per_generation=8, use_peft=True,
        lora_target_modules=["q_proj", "v_proj"], log_completions=True, output_dir="gspo-Qwen3-0.6B",
    )),
    # 256 micro-batches of 1 to a step, times four: 1,024 completions, 64 prompts. Evaluation wants groups of 16.
    "trl_nemo_gym.yaml": ("trl", dict(
        model_name_or_path="Qwen/Qwen2.5-1.5B-Instruct", dataset_name="train.jsonl", steps_per_generation=1024,
        per_device_eval_batch_size=16, output_dir="outputs/nemo_gym-gspo", top_p=0.999,
    )),
    "stateset_grpo.json": ("stateset", dict(
        model_name_or_path="meta-llama/Llama-2-7b-hf", use_peft=True, lora_r=16, epsilon=3e-4, epsilon_high=4e-4,
        beta=0.1, num_generations=4, per_device_train_batch_size=1, gradient_accumulation_steps=4,
        steps_per_generation=16, max_completion_length=256, lora_dropout=0.0, output_dir="./outputs/gspo",
    )),
    # 1,000 episodes at an accumulation of 4 are 250 steps; LoRA is its default.
    "stateset_small_kl.yaml": ("stateset", dict(
        beta=0.0, max_steps=250, use_peft=True, temperature=0.7, gradient_accumulation_steps=4, num_generations=4,
    )),
    # 100 prompts x 4 = 400 completions: four steps of 100 = 2 x 50, and 4 x 100 iterations are 400 steps.
    "stateset_gspo.yaml": ("stateset", dict(
        epsilon=2e-4, epsilon_high=3e-4, per_device_train_batch_size=2, gradient_accumulation_steps=50,
        steps_per_generation=200, max_steps=400, load_in_4bit=True, load_in_8bit=False, lora_dropout=0.0,
        env={"WANDB_PROJECT": "my-gspo-project", "WANDB_TAGS": "gspo,customer-service"}, run_name="gspo-exp-001",
        output_dir="./outputs/gspo-trl_gspo", importance_sampling_level="sequence",
    )),
    # 8 prompts x 4 = 32 completions to a step, in micro-batches of 2 prompts x 4 = 8.
    "standalone.sh": ("standalone", dict(
        dataset_name="openai/gsm8k", dataset_config="main", dataset_train_split="train[:2000]",
        reward_funcs=["final_number_reward"], epsilon=2e-4, epsilon_high=5e-4, num_generations=4,
        per_device_train_batch_size=8, gradient_accumulation_steps=4, steps_per_generation=16, num_train_epochs=15,
        max_completion_length=1024, report_to="wandb", learning_rate=1e-6,
    )),
    # 2e-3 was chosen for sequences. 4 prompts x 6 = 24 completions, one prompt to a micro-batch.
    "standalone_mixed.json": ("standalone", dict(
        epsilon=0.002, epsilon_high=0.002, num_generations=6, per_device_train_batch_size=6,
        gradient_accumulation_steps=4, steps_per_generation=16, dataset_train_split="train[:50]",
        output_dir="./gspo_outputs-trl_gspo", seed=42,
    )),
    # 256 prompts x 5 = 1,280 completions to a step on 8 processes: 160 each, 40 x 4. 1,024 prompts are four steps.
    "verl_grpo.yaml": ("verl", dict(
        per_device_train_batch_size=40, gradient_accumulation_steps=4, steps_per_generation=16, num_generations=5,
        epsilon=3e-4, epsilon_high=4e-4, beta=0.0, loss_type="grpo", eval_steps=20, warmup_steps=40, use_vllm=True,
        eval_dataset_name="data/gsm8k/test.parquet", save_strategy="no", adam_beta2=0.95,
        per_device_eval_batch_size=10, vllm_importance_sampling_correction=False, report_to=["wandb"],
        output_dir="outputs/qwen2_7b_gspo",
    )),
    # 128 x 16 = 2,048 completions to a step on 8: 256 each, 8 x 32; 512 prompts are four steps; 500 rollouts 2,000.
    "verl_gspo.sh": ("verl", dict(
        per_device_train_batch_size=8, gradient_accumulation_steps=32, steps_per_generation=128, num_generations=16,
        epsilon=3e-4, epsilon_high=4e-4, max_completion_length=8192, max_steps=2000, save_steps=40, top_k=0,
        dataset_name="/data/gsm8k/train.parquet", warmup_steps=0.05, vllm_importance_sampling_mode="token_truncate",
        output_dir="/checkpoints/gspo-0.0003-trl_gspo", env={"WANDB_PROJECT": "RL-GSPO"}, learning_rate=1e-6,
    )),
    # Accumulation 8 and 4 micro-batches a rollout: one step, so the ratio was 1.
    "swift_gspo.sh": ("ms-swift", dict(
        importance_sampling_level="sequence_token", epsilon=3e-4, epsilon_high=4e-4, steps_per_generation=32,
        dataset_name="AI-MO/NuminaMath-TIR", dataset_train_split="train[:10000]", use_peft=False,
        reward_funcs=["accuracy_reward"], deepspeed="configs/deepspeed/zero3.json", vllm_enable_sleep_mode=True,
        temperature=0.9, warmup_steps=0.05, vllm_max_model_length=16384,
    )),
    "swift_lora.yaml": ("ms-swift", dict(
        use_peft=True, lora_r=8, lora_dropout=0.0, load_in_4bit=True, loss_type="grpo", epsilon=3e-4,
        epsilon_high=4e-4, reward_funcs=["accuracy_reward", "think_format_reward", "get_soft_overlong_punishment"],
        beta=0.0,
        reward_kwargs={"get_soft_overlong_punishment": {"soft_punish_cache": 256, "max_completion_len": 1024}},
        mask_truncated_completions=True, output_dir="output/GSPO_zero",
    )),
}  # fmt: skip


RESHAPED = {
    "deepspeed",
    "env",
    "eval_strategy",
    "lora_target_modules",
    "lr_scheduler_type",
    "optim",
    "report_to",
    "save_strategy",
}


def test_every_fixture_is_expected():
    assert {path.name for path in FIXTURES} == set(EXPECTED)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_a_fixture_becomes_what_it_means(path):
    system, values = EXPECTED[path.name]
    assert detect(read(path)) == system
    result = migrate_config(read(path))
    assert {name: result.values.get(name) for name in values} == values


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_no_field_is_lost_without_a_word(path):
    result = migrate_config(read(path))
    text = " ".join(re.sub(r"^# *", "", line, flags=re.M) for line in to_yaml(result, "x").splitlines())
    flat = migration._flat(read(path)) if result.system == "verl" else read(path)
    for name in flat:
        is_said = re.search(rf"(?<![\w.]){re.escape(name)}\b", text) is not None
        assert is_said or (name in result.values and not result.remarks.get(name)), name


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_the_yaml_holds_the_values_and_passes_the_script(path, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    result = migrate_config(read(path))
    text = to_yaml(result, path.name, "c.yaml")
    assert yaml.safe_load(text) == result.values
    assert max(map(len, text.splitlines())) <= 119
    (tmp_path / "c.yaml").write_text(text)
    gaps = {"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": "exact_match_reward"}
    given = [part for name, value in gaps.items() if name not in result.values for part in (f"--{name}", value)]
    # A test machine has no GPU for bf16; nothing else is overridden.
    options = ["--config", str(tmp_path / "c.yaml"), "--use_cpu", "true", *given]
    script_args, training_args, model_args, _ = train.parse(options)
    for name, value in result.values.items():
        holder = next((held for held in (script_args, training_args, model_args) if hasattr(held, name)), None)
        # TRL makes lists and enumerations of these, takes a list of one for its element, and reads DeepSpeed's file.
        if name not in RESHAPED:
            assert getattr(holder, name) == value, name
    for name in script_args.reward_funcs:
        load_reward(name, (script_args.reward_kwargs or {}).get(name), training_args.max_completion_length)
    doubts = [record.getMessage() for record in caplog.records if record.name.startswith("trl_gspo")]
    assert doubts == []


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_our_own_configuration_stays_as_it_is(path):
    first = migrate_config(read(path))
    # With the processes of the source, which ours does not name.
    assert migrate_config(first.values, "trl", 8).values == first.values


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_of_this_project_need_nothing(path):
    config = yaml.safe_load(path.read_text())
    result = migrate_config(config)
    assert result.system == "trl" and not result.unknown and not result.questions and not result.dropped
    changed = {name for name, value in config.items() if result.values[name] != value}
    assert changed <= {"output_dir", "beta"}


# The rules of the objective.


def objective(**config):
    return migrate_config({"model_name_or_path": "m"} | config, "trl")


@pytest.mark.parametrize(
    ("config", "low", "high"),
    [
        ({}, 3e-4, 4e-4),
        ({"epsilon": 0.2}, 3e-4, 4e-4),
        ({"epsilon": 0.2, "epsilon_high": 0.28}, 3e-4, 4e-4),
        ({"epsilon": 0.1, "importance_sampling_level": "sequence"}, 3e-4, 4e-4),
        # Alone it is the width on both sides.
        ({"epsilon": 1e-3}, 1e-3, 1e-3),
        ({"epsilon": 1e-3, "epsilon_high": 2e-3}, 1e-3, 2e-3),
        ({"epsilon_high": 2e-3}, 3e-4, 2e-3),
        # Chosen for the ratio of short sequences, which spreads widely; not if it was chosen for tokens.
        ({"epsilon": 0.05, "importance_sampling_level": "sequence", "max_completion_length": 16}, 0.05, 0.05),
        ({"epsilon": 0.05, "max_completion_length": 16}, 3e-4, 4e-4),
        ({"epsilon": 0.2, "importance_sampling_level": "sequence", "max_completion_length": 16}, 3e-4, 4e-4),
        ({"epsilon": 0}, 3e-4, 4e-4),
        ({"epsilon": "3e-3"}, 3e-3, 3e-3),
    ],
)
def test_the_clip_range(config, low, high):
    result = objective(**config)
    assert (result.values["epsilon"], result.values["epsilon_high"]) == (low, high)
    assert result.remarks["epsilon"] and (result.remarks["epsilon_high"])


@pytest.mark.parametrize(
    ("beta", "kept"), [(0, 0.0), (0.001, 0.0), (0.04, 0.0), (0.0499, 0.0), (0.05, 0.05), (0.1, 0.1)]
)
def test_a_small_kl_becomes_none(beta, kept):
    result = objective(beta=beta)
    assert result.values["beta"] == kept
    assert bool(result.remarks["beta"]) == (beta > 0)


@pytest.mark.parametrize("loss", ["dapo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo", "mine"])
def test_other_losses_become_the_mean_over_sequences(loss):
    result = objective(loss_type=loss, vespo_k_pos=1.0)
    assert result.values["loss_type"] == "grpo"
    assert loss in " ".join(result.remarks["loss_type"])
    assert "vespo_k_pos" not in result.values and "vespo_k_pos: 1.0" in result.dropped[0]


def test_what_was_chosen_on_purpose_stays():
    chosen = dict(
        loss_type="luspo", importance_sampling_level="turn", delta=2.0, num_iterations=2, scale_rewards="batch"
    )
    result = objective(**chosen)
    assert {name: result.values[name] for name in chosen} == chosen
    assert "on purpose" in result.remarks["loss_type"][0] and "Kept" in result.remarks["delta"][0]


def test_dropout_is_turned_off():
    assert objective(disable_dropout=False).values["disable_dropout"] is True
    assert objective(use_peft=True).values["lora_dropout"] == 0.0
    assert "lora_dropout" not in objective(lora_dropout=0.1).values


# The batch.


def batches():
    """Configurations of TRL that it accepts on `processes` processes."""
    for processes, micro, accumulation, group, iterations, steps in itertools.product(
        (1, 3, 8), (1, 2, 3, 8), (1, 4), (2, 3, 8, 16), (1, 2), (None, 1, 3, 4, 16)
    ):
        if micro * (steps or accumulation) * processes % group == 0:
            yield processes, micro, accumulation, group, iterations, steps


def test_every_batch_is_one_that_the_trainer_takes(monkeypatch):
    count = 0
    for processes, micro, accumulation, group, iterations, steps in batches():
        config = dict(
            model_name_or_path="m",
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            num_generations=group,
            num_iterations=iterations,
            steps_per_generation=steps,
        )
        values = migrate_config(config, "trl", processes).values
        # An optimizer step has as many completions as before.
        assert (values["per_device_train_batch_size"], values["gradient_accumulation_steps"]) == (micro, accumulation)
        monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self, n=processes: n))
        options = {name: value for name, value in values.items() if name in GSPOConfig.__dataclass_fields__}
        made = GSPOConfig(**options | dict(use_cpu=True, bf16=False))
        assert not made._takes_one_step
        if steps is not None and accumulation % (steps * iterations):
            assert made.steps_per_generation == steps
        elif iterations == 1:
            assert made.steps_per_generation == 4 * accumulation
        count += 1
    assert count > 300


@pytest.mark.parametrize(
    ("config", "processes", "steps"),
    [
        # 64 completions a rollout on 2 processes of 4: 8 micro-batches, two steps of 4.
        (dict(per_device_train_batch_size=4, gradient_accumulation_steps=4, generation_batch_size=64), 2, 8),
        # On one process 16, four steps.
        (dict(per_device_train_batch_size=4, gradient_accumulation_steps=4, generation_batch_size=64), 1, 16),
        # One step: the ratio would be 1.
        (dict(per_device_train_batch_size=8, gradient_accumulation_steps=1, generation_batch_size=8), 1, 4),
        (dict(per_device_train_batch_size=8, generation_batch_size=20), 1, 4),
    ],
)
def test_a_generation_batch_counts_completions_of_all_processes(config, processes, steps):
    result = migrate_config({"model_name_or_path": "m"} | config, "trl", processes)
    assert result.values["steps_per_generation"] == steps
    assert "generation_batch_size" not in result.values


@pytest.mark.parametrize("prompts", [1, 3, 64, 100, 256])
@pytest.mark.parametrize("step", [1, 32, 100])
@pytest.mark.parametrize("group", [2, 5, 16])
@pytest.mark.parametrize("gpus", [1, 8])
def test_verl_counts_prompts(prompts, step, group, gpus):
    names = ["data.train_batch_size", "actor_rollout_ref.actor.ppo_mini_batch_size", "actor_rollout_ref.rollout.n"]
    config = dict(zip(names, (prompts, step, group), strict=True)) | {"trainer.n_gpus_per_node": gpus}
    values = migrate_config(config, "verl").values
    micro, accumulation, steps = (
        values[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    )
    done = micro * accumulation * gpus
    # As many completions to an optimizer step, up to what the processes cannot share evenly.
    assert step * group <= done < step * group + gpus
    assert micro <= 8 and micro * steps * gpus % group == 0
    assert steps // accumulation >= (prompts // step if prompts // step > 1 else 4)


def test_verl_by_the_names_of_one_section():
    result = migrate_config(
        dict(clip_ratio_low=3e-4, clip_ratio_high=4e-4, loss_agg_mode="seq-mean-token-mean", ppo_epochs=2)
    )
    assert result.system == "verl" and result.values["num_iterations"] == 2 and not result.unknown


# Reading.


def test_a_shell_script_of_variables():
    config = read_command(
        'A=4 # it\'s four\nB=$((A * 3)) C="x $A"\nexport D=${NOWHERE:-7}\n# --not 1\n'
        'torchrun --nproc_per_node 2 train.py --a $A --b=${B} --c "$C" --d $D --e $E --flag --list x y \\\n --neg -1\n'
    )
    assert config == dict(num_processes=2, a=4, b=12, c="x 4", d=7, e="$E", flag=True, list=["x", "y"], neg=-1)


def test_hydra_overrides():
    config = read_command("python3 -m verl.main_ppo --config-name=x a.b=1e-6 +c.d=True ~e.f=null g.h='[1,2]' $@")
    assert config == {"--config-name": "x", "a.b": 1e-6, "c.d": True, "e.f": None, "g.h": [1, 2]}


def test_a_variable_from_elsewhere_is_asked_for():
    result = migrate_config(read_command("swift rlhf --rlhf_type grpo --model $MODEL --lora_rank 8"))
    assert "`model: $MODEL` holds a variable" in result.questions[0]
    assert "model_name_or_path" not in result.values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("# nothing\n", "it is empty"),
        ("- a\n", "it holds a list"),
        ("3", "it holds a int"),
        ("a: [", "neither YAML nor JSON"),
        ('{"cells": [], "nbformat": 4}', "jupyter nbconvert --to script"),
    ],
)
def test_what_is_no_configuration(text, message):
    with pytest.raises(MigrationError, match=re.escape(message)):
        read_config(text)


@pytest.mark.parametrize(("text", "message"), [("echo hello", "there is no option"), ("x --a 'b", "cannot be read")])
def test_what_is_no_command(text, message):
    with pytest.raises(MigrationError, match=message):
        read_command(text)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"foo": 1, "bar": 2}, "no system is known by these fields: foo, bar. Known are trl, stateset"),
        ({}, "no system is known"),
        ({"group_size": 4, "cliprange": 0.2}, "fit stateset and standalone equally well.*--from stateset or --from"),
        ({"rlhf_type": "dpo", "model": "m"}, "`rlhf_type: dpo` is not GRPO"),
        ({"model_name_or_path": "m", "epsilon": "abc"}, "`epsilon: 'abc'` is not a number"),
        ({"model_name_or_path": "m", "num_generations": [4]}, r"`num_generations: \[4\]` is not a number"),
        ({"model_name_or_path": "m", "gradient_accumulation_steps": 0}, "must be at least 1"),
        ({"model_name_or_path": "m", "beta": float("nan")}, "is not finite"),
        ({"data.train_batch_size": 2.5, "data.max_response_length": 8}, "must be a whole number, at least 1"),
    ],
)
def test_what_cannot_be_migrated(config, message):
    with pytest.raises(MigrationError, match=message):
        migrate_config(config)


def test_an_unknown_system_is_named():
    with pytest.raises(MigrationError, match="`--from foo` is not known; known are trl"):
        migrate_config({"a": 1}, "foo")


def test_unknown_fields_are_listed_and_not_carried():
    result = migrate_config({"model_name_or_path": "m", "learning_rat": 1, "epsilon": None})
    assert result.unknown == {"learning_rat": 1} and result.unset == ["epsilon"]
    text = to_yaml(result, "x")
    assert "# Not understood, and so not carried over:\n#   learning_rat: 1\n" in text
    assert "# Not set in the source (null):\n#   epsilon\n" in text


def test_a_misspelt_field_of_verl_is_none_of_its_section():
    config = fixture("verl_grpo.yaml")
    config["actor_rollout_ref"]["rollout"] |= {"temprature": 0.5, "enforce_eager": True}
    config["actor_rollout_ref"]["actor"]["clip_rato_low"] = 0.1
    result = migrate_config(config)
    prefix = "actor_rollout_ref."
    assert result.unknown == {f"{prefix}rollout.temprature": 0.5, f"{prefix}actor.clip_rato_low": 0.1}
    assert any(entry.startswith(f"{prefix}rollout.enforce_eager: true.") for entry in result.dropped)


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("outputs/grpo", "outputs/gspo"),
        ("Qwen-GRPO", "Qwen-GSPO"),
        ("Grpo/run-grpo_1", "Gspo/run-gspo_1"),
        ("outputs/run/", "outputs/run-gspo"),
        ("outputs/gspo", "outputs/gspo"),
        (".", "./gspo"),
        ("..", "../gspo"),
        ("/", "/gspo"),
        ("", "gspo"),
    ],
)
def test_names(name, new):
    assert gspo_name(name) == new
    assert gspo_name(new) == new


# The tables.


def test_the_tables_lead_to_options_of_the_script():
    options = {action.dest for action in train.Parser()._actions} - {"help"}
    assert set(migration.known_options()) - {"env"} <= options
    # The script's own that start a run are not those of a configuration.
    assert options - set(migration.known_options()) <= {
        "resume",
        "overwrite_output_dir",
        "dry_run",
        "dry_run_processes",
    }
    for system, rows in SYSTEMS.items():
        for name, row in rows.items():
            if row.to is None:
                assert row.why, (system, name)
            elif not row.to.startswith("@"):
                assert row.to in options, (system, name)


def test_the_guide_has_the_tables():
    guide = (ROOT / "docs" / "migration.md").read_text()
    for system in SYSTEMS:
        assert migration.table(system) in guide, f"python scripts/migrate.py --docs docs/migration.md ({system})"


def test_sections_of_verl_go_from_the_longer_name_to_the_shorter():
    names = list(VERL_SECTIONS)
    for index, name in enumerate(names):
        assert not any(later.startswith(f"{name}.") for later in names[index + 1 :])
