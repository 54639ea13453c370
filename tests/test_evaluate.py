"""`scripts/evaluate.py`, in this process."""

import json
from pathlib import Path

import evaluate
import pytest
from peft import LoraConfig, get_peft_model
from tiny import sorting_rows, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


def arguments(model_path, output, **options):
    options = {
        "task": "sort",
        "model_name_or_path": model_path,
        "num_eval_samples": 6,
        "num_samples": 3,
        "max_completion_length": 6,
        "use_cpu": "true",
        "bf16": "false",
        "output_dir": output,
        "disable_tqdm": "true",
    } | options
    words = []
    for key, value in options.items():
        words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def read(output):
    folder = Path(output) / "evaluation"
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return json.loads((folder / "report.json").read_text()), rows, (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "`num_samples` must be at least 1, got 0"),
        ({"k": [1, 4]}, "`k` must be from 1 to `num_samples=3`, got 4"),
        ({"num_shown": -1}, "`num_shown` must be at least 0"),
        ({"task": "sorts"}, "`task=sorts` is not known, did you mean 'sort'"),
        ({"befor": "m"}, "did you mean `before`"),
        ({"model_name_or_path": "no/such"}, "The model 'no/such' cannot be loaded"),
        ({"before": "no/such"}, "The model 'no/such' cannot be loaded"),
        ({"temperature": 0}, "`temperature=0` is greedy, so that `num_samples=3` samples are equal"),
        ({"reward_weights": [1, 2]}, "`reward_weights` has 2 numbers for 1 `reward_funcs`"),
        ({"reward_funcs": "keywords_reward"}, "needs the column 'keywords'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line(options, message, model_path, tmp_path, capsys):
    assert evaluate.main(arguments(model_path, tmp_path, **options)) == 2
    error = capsys.readouterr().err
    assert "evaluate.py: " in error and message in error and "Traceback" not in error
    assert not (tmp_path / "evaluation" / "report.json").exists()


def test_a_model_is_equal_to_itself_and_an_earlier_report_is_kept(model_path, tmp_path, capsys):
    argv = arguments(model_path, tmp_path, before=model_path, k=[1, 2])
    assert evaluate.main(argv) == 0
    report, rows, text = read(tmp_path)
    assert [row["samples"]["before"] for row in rows] == [row["samples"]["after"] for row in rows]
    assert report["difference"]["1"]["unchanged"] == report["problems"] == 6
    assert set(report["models"]["after"]["pass_at"]) == {"1", "2"}
    assert "| pass@2 | +0.000 [" in text and "### Problem 5" in text
    assert evaluate.main(argv) == 2
    assert "holds an earlier report: choose another --report_dir" in capsys.readouterr().err
    changed = [*argv, "--per_device_eval_batch_size", "1", "--overwrite_output_dir"]
    assert evaluate.main(changed) == 0
    assert read(tmp_path)[1] == rows  # whatever the batch
    assert evaluate.main([*changed, "--seed", "7"]) == 0
    assert read(tmp_path)[1] != rows


def test_rows_and_figures_are_those_of_the_samples(model_path, tmp_path):
    own = "tests.varied_reward.share_of_digits"
    argv = arguments(model_path, tmp_path, reward_funcs=["exact_match_reward", own], reward_weights=[1, 0.5])
    assert evaluate.main([*argv, "--pass_threshold", "0.1", "--report_dir", str(tmp_path / "evaluation")]) == 0
    report, rows, _ = read(tmp_path)
    prompts = list(dict.fromkeys(row["prompt"] for row in sorting_rows(50, seed=0)))
    assert [row["row"]["prompt"] for row in rows] == prompts[:6]
    samples = [sample for row in rows for sample in row["samples"]["model"]]
    assert len(samples) == 18
    shares = [sample["rewards"][own] for sample in samples]
    assert report["models"]["model"]["rewards"][own] == pytest.approx(sum(shares) / 18) and sum(shares) > 0
    assert [sample["passed"] for sample in samples] == [share * 0.5 >= 0.1 for share in shares]
    assert report["models"]["model"]["pass_at"]["1"]["mean"] == pytest.approx(sum(s["passed"] for s in samples) / 18)
    assert report["difference"] is None


def test_a_training_config_and_a_lora_adapter(model_path, tmp_path):
    adapter = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_path),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj", "lm_head"], init_lora_weights=False),
    )
    adapter.save_pretrained(tmp_path / "adapter")  # without a tokenizer: that of its base is taken
    config = ["--config", str(ROOT / "configs" / "tiny.yaml")]
    argv = arguments(tmp_path / "adapter", tmp_path, before=model_path)
    data = write_jsonl(tmp_path / "rows.jsonl", sorting_rows(8, seed=3))
    assert evaluate.main([*config, *argv, "--dataset_name", str(data)]) == 0
    report, rows, _ = read(tmp_path)
    assert report["data"] == "sort, rows.jsonl (held-out rows)" and report["problems"] == 6
    before, after = ([row["samples"][name] for row in rows] for name in ("before", "after"))
    assert before != after
    adapter.eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    inputs = tokenizer(rows[0]["row"]["prompt"], return_tensors="pt", return_token_type_ids=False)
    model, _ = evaluate.load_model(
        str(tmp_path / "adapter"), *evaluate.train.parse(argv, script_type=evaluate.EvaluationArguments)[1:3]
    )
    assert model(**inputs).logits.allclose(adapter(**inputs).logits, atol=1e-5)


def test_messages_need_a_chat_template(tokenizer, model_path, tmp_path, capsys):
    plain = AutoTokenizer.from_pretrained(model_path)
    plain.chat_template = None
    AutoModelForCausalLM.from_pretrained(model_path).save_pretrained(tmp_path / "plain")
    plain.save_pretrained(tmp_path / "plain")
    argv = arguments(tmp_path / "plain", tmp_path, system_prompt="Sort.")
    assert evaluate.main(argv) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert evaluate.main([*argv, "--system_prompt", ""]) == 0
    assert evaluate.main(arguments(model_path, tmp_path, system_prompt="Sort.", report_dir=tmp_path / "chat")) == 0
    first = json.loads((tmp_path / "chat" / "samples.jsonl").read_text().splitlines()[0])
    assert [message["role"] for message in first["row"]["prompt"]] == ["system", "user"]


def test_a_reward_that_raises_has_its_exit_code(model_path, tmp_path, capsys):
    argv = arguments(model_path, tmp_path, reward_funcs="tests.own_task.raising")
    assert evaluate.main(argv) == 4
    assert "a reward function raised ZeroDivisionError" in capsys.readouterr().err
