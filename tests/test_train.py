"""`scripts/train.py`: its checks in this process, its runs as a user starts them."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import train
from tiny import sorting_rows, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_gspo.objective import EPSILON_LOW


ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
TINY = {
    "reward_funcs": "exact_match_reward",
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 6,
    "use_cpu": "true",
    "bf16": "false",
    "gradient_checkpointing": "false",
    "report_to": "none",
    "learning_rate": 1e-3,
    "logging_steps": 1,
}


def arguments(**options):
    return [part for key, value in (TINY | options).items() for part in (f"--{key}", str(value))]


def run_arguments(data, model_path, output, **options):
    options = {"reward_funcs": "tests.varied_reward.share_of_digits"} | options
    return arguments(dataset_name=data, model_name_or_path=model_path, output_dir=output, **options)


@pytest.fixture
def data(tmp_path):
    return str(write_jsonl(tmp_path / "data" / "train.jsonl", sorting_rows(32, seed=0)))


def launch(argv, processes=1):
    """Starts the script as a user does: by its path, in a process of its own."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*launcher, str(ROOT / "scripts" / "train.py"), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(process, pattern, seconds=120):
    """Reads the output until a line matches; a run that says nothing is killed, so that the test ends."""
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.start()
    seen = []
    for line in process.stdout:
        seen.append(line)
        if re.search(pattern, line):
            watchdog.cancel()
            return
    raise AssertionError(f"no line matches {pattern!r} in\n{''.join(seen)}")


# What is refused before a model is loaded.


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epsilonn", "0.1"], "`--epsilonn` is not an option, did you mean `epsilon`?"),
        (["--epsilon_hig=0.1"], "`--epsilon_hig=0.1` is not an option, did you mean `epsilon_high`?"),
        (["--dataset_name", "x.jsonl"], "`reward_funcs` is not set"),
        (["--reward_funcs", "exact_match_reward"], "`dataset_name` is not set"),
        (arguments(dataset_name="x.jsonl"), "`model_name_or_path` is not set"),
        (arguments(dataset_name="x.jsonl", model_name_or_path="m"), "`x.jsonl` does not exist. In"),
        (arguments(dataset_name="x.jsonl", epsilon=2), "`epsilon` must be a finite number in (0, 1), got 2.0"),
        (arguments(dataset_name="x.jsonl", loss_type="dapo"), "`loss_type='dapo'` is refused"),
        (arguments(dataset_name="x", model_name_or_path="m", reward_funcs="acc"), "`reward_funcs` has no 'acc'"),
        (arguments(dataset_name="x", reward_kwargs='{"a": {}}'), "`reward_kwargs` has arguments for a"),
        (arguments(dataset_name="x", model_name_or_path="m", resume_from_checkpoint="no"), "is no folder"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_arguments_end_with_one_line(argv, message, capsys):
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("train.py: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 0.1", "`learning_rat` is not an option, did you mean `learning_rate`?"),
        ("num_generations: [4]", "`num_generations: [4]` is not one value"),
        ("num_generations: 4.5", "num_generations/--num-generations: invalid int value: '4.5'"),
        ("- 1", "must contain a YAML mapping"),
        ("epsilon:\t- {", "while scanning"),
    ],
)
def test_a_bad_config_ends_with_one_line(text, message, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    assert train.main([f"--config={tmp_path / 'c.yaml'}"]) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_wins_over_the_config(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model_name_or_path: m\ndataset_name: d\nreward_funcs: [a, b]\nepsilon: 3e-2\nepsilon_high: 0.04\n"
        "scale_rewards: false\nuse_cpu: true\nbf16: false\nlora_target_modules: [q, v]\nmodel_init_kwargs: {a: 1}\n"
    )
    script_args, training_args, model_args = train.parse(
        ["--config", str(tmp_path / "c.yaml"), "--epsilon_high", "0.05", "--output_dir", str(tmp_path)]
    )
    assert script_args.reward_funcs == ["a", "b"]
    assert (training_args.epsilon, training_args.epsilon_high) == (0.03, 0.05)
    assert training_args.scale_rewards == "none"
    assert training_args.model_init_kwargs == {"a": 1}
    assert model_args.lora_target_modules == ["q", "v"]


def test_missing_column_is_found_before_the_model_is_loaded(capsys, data, tmp_path):
    options = dict(dataset_name=data, model_name_or_path="no/such", output_dir=tmp_path / "o")
    assert train.main(arguments(**options, prompt_column="question")) == 2
    assert "It has prompt, solution" in capsys.readouterr().err
    write_jsonl(Path(data), [{"prompt": "a"}])
    assert train.main(arguments(**options)) == 2
    assert "needs the column 'solution'" in capsys.readouterr().err


def test_an_earlier_run_is_neither_mixed_nor_overwritten(capsys, data, tmp_path):
    (tmp_path / "o" / "checkpoint-3").mkdir(parents=True)
    argv = arguments(dataset_name=data, model_name_or_path="no/such", output_dir=tmp_path / "o")
    assert train.main(argv) == 2
    assert "holds checkpoint-3 of an earlier run: go on with --resume" in capsys.readouterr().err
    parsed = train.parse([*argv, "--resume"])
    assert train.find_checkpoint(parsed[0], parsed[1]) == str(tmp_path / "o" / "checkpoint-3")
    parsed = train.parse([*argv, "--overwrite_output_dir"])
    assert train.find_checkpoint(parsed[0], parsed[1]) is None


def test_summary_of_start_and_end():
    key = "gspo/clip_fraction/sequences"
    logs = [
        {"step": 1, "reward": 0.1, key: 0.0, "num_tokens": 100},
        {"step": 2, key: 0.5},
        {"step": 3, "reward": 0.2, key: None, "num_tokens": 250},
        {"step": 3, "eval_reward": 0.3},
        {"step": 4, key: 0.7},
        {"step": 5, "reward": 0.4, key: 0.0, "num_tokens": 80},  # counted from zero again
        {"step": 6, key: 0.2},
        {"step": 6, "train_loss": 0.0},
    ]
    assert train.summarize(logs, rollout_steps=2, steps=6) == {
        "steps": 6,
        "tokens": 330,
        "reward_start": 0.1,
        "reward_end": 0.4,
        "eval_reward_start": 0.3,
        "eval_reward_end": 0.3,
        "clip_fraction_start": 0.25,
        "clip_fraction_end": 0.1,
    }
    nothing = train.summarize([], rollout_steps=2)
    assert nothing.pop("tokens") == 0 and set(nothing.values()) == {None}


# Whole runs.


@pytest.mark.slow
def test_a_run_leaves_model_card_and_summary(data, model_path, tmp_path):
    output = tmp_path / "run"
    process = launch(run_arguments(data, model_path, output, max_steps=4))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert re.search(r"step 4/4: reward [\d.]+, clipped [\d.]+", printed), printed
    assert re.search(r"^reward +[\d.]+ -> [\d.]+$", printed, re.M)
    AutoModelForCausalLM.from_pretrained(output)
    assert AutoTokenizer.from_pretrained(output).pad_token == "<pad>"
    card = (output / "README.md").read_text()
    assert "GSPO" in card and "2507.18071" in card
    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["tokens"] > 0 and summary["output_dir"] == str(output)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_from_which_the_run_goes_on(signum, data, model_path, tmp_path):
    output = tmp_path / "run"
    argv = run_arguments(data, model_path, output, save_strategy="no", max_steps=2000)
    process = launch(argv)
    wait_for(process, "step 3/2000")
    process.send_signal(signum)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, printed
    stopped = re.search(rf"Stopped by {signum.name} at step (\d+), saved in {output}/checkpoint-(\d+)", printed)
    assert stopped and stopped[1] == stopped[2], printed
    assert printed.rstrip().endswith("--resume")

    last = int(stopped[1]) + 2
    process = launch([*argv, "--resume", "--max_steps", str(last)])
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, last + 1))


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(data, model_path, tmp_path):
    output = tmp_path / "run"
    argv = run_arguments(data, model_path, output, save_strategy="no", max_steps=2000)
    process = launch(argv, processes=2)
    wait_for(process, "step 3/2000")
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert re.search(r"Stopped by SIGTERM at step \d+, saved in", printed), printed
    (checkpoint,) = output.glob("checkpoint-*")
    AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs GSM8K in {DATA}")
def test_gsm8k_with_evaluation_kill_and_resume(model_path, tmp_path):
    output = tmp_path / "run"
    argv = run_arguments(
        DATA / "gsm8k" / "train.jsonl",
        model_path,
        output,
        reward_funcs="accuracy_reward",
        eval_dataset_name=DATA / "gsm8k" / "test.jsonl",
        dataset_test_split="test[:8]",
        prompt_column="question",
        solution_column="answer",
        system_prompt="Answer with a number.",
        max_completion_length=16,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=2,
        max_steps=8,
    )
    where = argv.index("accuracy_reward") + 1
    argv[where:where] = ["final_number_reward", "get_soft_overlong_punishment"]
    process = launch(argv)
    wait_for(process, "step 5/8")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "summary.json").exists()
    assert (output / "checkpoint-4" / "trainer_state.json").is_file()

    process = launch([*argv, "--resume"])
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 9))
    assert [entry["step"] for entry in history if "eval_reward" in entry] == [4, 8]
    assert {"rewards/accuracy_reward/mean", "rewards/final_number_reward/mean"} <= history[0].keys()
    AutoModelForCausalLM.from_pretrained(output)
    assert json.loads((output / "summary.json").read_text())["steps"] == 8


# Other people's scripts, with the class swapped and nothing else.


def run_swapped(source, argv, cwd):
    script = cwd / "swapped.py"
    script.write_text(source)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(script), *argv], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_the_grpo_script_of_trl_with_the_class_swapped(model_path, tmp_path):
    import trl.scripts.grpo

    source = Path(trl.scripts.grpo.__file__).read_text()
    before = "from trl import GRPOTrainer, get_dataset, get_peft_config, get_quantization_config"
    assert source.count(before) == 1
    source = source.replace(
        before,
        "from trl import get_dataset, get_peft_config, get_quantization_config\n"
        "    from trl_gspo import GSPOTrainer as GRPOTrainer",
    )
    write_jsonl(tmp_path / "data" / "train.jsonl", sorting_rows(32, seed=0))
    (tmp_path / "mine.py").write_text(
        "def sorted_reward(completions, solution, **kwargs):\n"
        "    return [float(c == s) for c, s in zip(completions, solution)]\n"
    )
    options = {key: value for key, value in TINY.items() if key != "reward_funcs"}
    argv = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    argv += ["--dataset_name", "data", "--reward_funcs", "mine.sorted_reward", "--model_name_or_path", model_path]
    ran = run_swapped(source, [*argv, "--output_dir", "out", "--max_steps", "5"], tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "GRPOConfig was converted to GSPOConfig" in ran.stderr
    assert f"epsilon 0.2 -> {EPSILON_LOW}" in ran.stderr
    assert "gspo/clip_fraction/sequences" in ran.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_the_grpo_example_of_trl_with_the_class_swapped(model_path, tmp_path):
    import importlib.metadata

    readme = importlib.metadata.metadata("trl").get_payload() or importlib.metadata.metadata("trl")["Description"]
    (source,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "GRPOTrainer(" in block]
    # Neither hub can be reached from a test: the names of model and data set become local ones.
    local = {
        '"trl-lib/DeepMath-103K"': '"data"',
        '"Qwen/Qwen2.5-0.5B-Instruct"': repr(model_path),
        "from trl import GRPOTrainer": "from trl_gspo import GSPOTrainer as GRPOTrainer",
    }
    for theirs, ours in local.items():
        assert source.count(theirs) == 1, theirs
        source = source.replace(theirs, ours)
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1="}], "solution": rf"\boxed{{{i + 1}}}"} for i in range(4)]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    # The example takes TRL's bf16, which transformers refuses on a machine without a GPU unless `use_cpu` is set.
    no_gpu = "import transformers.training_args as t\nt.is_torch_bf16_gpu_available = lambda: True\n"
    ran = run_swapped(no_gpu + source, [], tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "train_runtime" in ran.stdout
    (saved,) = tmp_path.glob("*-GSPO/checkpoint-*")
    AutoModelForCausalLM.from_pretrained(saved)
