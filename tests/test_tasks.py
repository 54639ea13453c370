import functools
import importlib
import json
import logging
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from own_task import OPTIONS
from tiny import sorting_rows, write_jsonl

from trl_gspo import tasks
from trl_gspo.rewards import load_reward, reasoning_reward
from trl_gspo.tasks import TASKS, DataArguments, Task, find_task, load_rows, load_task, scope_rewards, to_prompts


DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not there")

ROWS = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(5)]


@pytest.fixture(params=["jsonl", "json", "csv", "parquet", "disk", "disk_dict", "folder"])
def source(request, tmp_path):
    rows = Dataset.from_list(ROWS)
    path = tmp_path / f"rows.{request.param}"
    if request.param == "jsonl":
        write_jsonl(path, ROWS)
    elif request.param == "json":
        path.write_text(json.dumps(ROWS))
    elif request.param == "csv":
        rows.to_csv(path)
    elif request.param == "parquet":
        rows.to_parquet(path)
    elif request.param == "disk":
        rows.save_to_disk(path)
    elif request.param == "disk_dict":
        DatasetDict({"train": rows}).save_to_disk(path)
    else:
        write_jsonl(path / "train.jsonl", ROWS)
    return str(path)


def test_rows_come_from_every_kind_of_file(source):
    rows = load_rows(source, "train")
    assert rows["question"][:] == [row["question"] for row in ROWS]
    assert str(rows[4]["answer"]) == "5"


def test_a_file_is_its_own_split_and_takes_a_slice(tmp_path):
    path = str(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    assert len(load_rows(path, "test")) == 5
    assert load_rows(path, "test[1:3]")["answer"][:] == ["2", "3"]


def test_streaming(tmp_path):
    path = str(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    rows = load_rows(path, "train", streaming=True)
    assert isinstance(rows, IterableDataset)
    prompts = to_prompts(rows, prompt_column="question", solution_column="answer")
    assert next(iter(prompts)) == ROWS[0] | {"prompt": "0 + 1?", "solution": "1"}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "missing.jsonl",
            FileNotFoundError,
            "does not exist. In .* there is broken.jsonl, empty.csv, empty.jsonl, notes.txt, rows.jsonl",
        ),
        (
            "deeper/missing.jsonl",
            FileNotFoundError,
            "does not exist. In .* there is broken.jsonl, empty.csv, empty.jsonl, notes.txt, rows.jsonl",
        ),
        ("notes.txt", ValueError, r"ends in '.txt'; read are .json, .jsonl, .parquet, .csv"),
        ("empty.jsonl", ValueError, "is empty"),
        ("empty.csv", ValueError, "cannot be read as csv, split 'train'"),
        ("broken.jsonl", ValueError, "cannot be read as json"),
    ],
)
def test_what_cannot_be_read_says_what_there_is(tmp_path, name, error, message):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.csv").write_text("prompt,solution\n")
    with pytest.raises(error, match=message):
        load_rows(str(tmp_path / name), "train")


def test_an_unknown_split_of_a_saved_data_set_lists_the_known(tmp_path):
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        load_rows(str(tmp_path / "saved"), "test")


def test_prompt_from_a_column_keeps_the_other_columns():
    rows = to_prompts(Dataset.from_list(ROWS), prompt_column="question", solution_column="answer")
    assert rows[2] == {"question": "2 + 1?", "answer": "3", "prompt": "2 + 1?", "solution": "3"}


def test_prompt_from_a_template():
    rows = to_prompts(Dataset.from_list(ROWS), prompt_template="Q: {question}\nA:")
    assert rows[0]["prompt"] == "Q: 0 + 1?\nA:"


def test_messages():
    rows = Dataset.from_list(ROWS)
    user = {"role": "user", "content": "0 + 1?"}
    system = {"role": "system", "content": "Add."}
    assert to_prompts(rows, "question", conversational=True)[0]["prompt"] == [user]
    assert to_prompts(rows, "question", system_prompt="Add.")[0]["prompt"] == [system, user]
    chats = Dataset.from_list([{"prompt": [user]}, {"prompt": [{"role": "system", "content": "Old."}, user]}])
    prompts = to_prompts(chats, system_prompt="Add.")["prompt"][:]
    assert [prompt[0]["content"] for prompt in prompts] == ["Add.", "Old."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`prompt_column` names the column 'prompt'.* It has question, answer"),
        ({"prompt_column": "qestion"}, "did you mean 'question'"),
        ({"prompt_template": "{question} {hint}"}, "`prompt_template` names the column 'hint'"),
        (
            {"prompt_column": "question", "solution_column": "solution"},
            "`solution_column` names the column 'solution'",
        ),
    ],
)
def test_a_missing_column_lists_what_there_is(options, message):
    with pytest.raises(ValueError, match=message):
        to_prompts(Dataset.from_list(ROWS), **options)


@pytest.mark.parametrize("prompt", ["", None])
def test_a_row_without_a_prompt_is_named(prompt):
    with pytest.raises(ValueError, match="Row 1 has no prompt"):
        to_prompts(Dataset.from_list([{"prompt": "a"}, {"prompt": prompt}]))


# Named tasks.


def task_arguments(task, **options):
    """As the parser makes them: what the task sets, then what is given."""
    given = tasks.defaults_of(task, options) | options
    return DataArguments(task=task, **given)


def test_the_tasks_by_name():
    assert list(TASKS) == ["gsm8k", "math", "code", "reasoning", "mixed", "sort"]
    assert find_task(None) == Task({})
    for path in ("tests.own_task.TASK", "tests.own_task.make"):
        assert find_task(path).options == OPTIONS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gsm8",
            "`task=gsm8` is not known, did you mean 'gsm8k'.* Known are gsm8k, math, code, reasoning, mixed, sort",
        ),
        ("nothing.like.it", "`task=nothing.like.it` cannot be imported: No module"),
        ("tests.own_task.GONE", "cannot be imported.*GONE"),
        ("tests.own_task.OPTIONS", "is a dict, not a"),
    ],
)
def test_an_unknown_task_is_named_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        find_task(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_funcs": ["r"]}, "`dataset_name` is not set: .* or a `task` that brings its data"),
        ({"dataset_name": "d"}, "`reward_funcs` is not set"),
        (
            {"dataset_name": "d", "reward_funcs": ["r"], "num_train_samples": 0},
            "`num_train_samples` must be at least 1",
        ),
        ({"dataset_name": "d", "reward_funcs": ["r"], "reward_kwargs": "{r"}, "`reward_kwargs={r` is not JSON"),
        ({"dataset_name": "d", "reward_funcs": ["r"], "task_options": "[1]"}, r"`task_options=\[1\]` must map names"),
        ({"task": "mixed"}, "needs `task_weights`"),
        ({"task": "mixed", "task_weights": {"sort": 1}, "dataset_name": "d"}, "takes `dataset_name` and the like for"),
        ({"task": "mixed", "task_weights": {"sort": 0}}, "gives 'sort' the weight 0; weights are positive"),
        ({"task": "mixed", "task_weights": {"mixed": 1}}, "cannot be a part of itself"),
        ({"task": "mixed", "task_weights": {"sorted": 1}}, "did you mean 'sort'"),
        (
            {"task": "mixed", "task_weights": {"sort": 1}, "task_options": {"math": {}}},
            "has options for math, not among",
        ),
        (
            {"task": "mixed", "task_weights": {"sort": 1}, "task_options": {"sort": {"num_train": 1}}},
            "gives 'sort' the option 'num_train', which is not one of a single task; did you mean 'num_train_samples'",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**options)


def prompts(rows):
    return [json.dumps(prompt) for prompt in rows["prompt"]]


def test_what_a_task_sets_are_defaults(tmp_path):
    path = str(write_jsonl(tmp_path / "rows.jsonl", [{"question": "1 + 1?", "answer": "so #### 2", "q": "Q"}] * 2))
    args = task_arguments("gsm8k", dataset_name=path)
    assert args.dataset_config is None  # the configuration is that of the hub's data set
    (row,) = load_task(args, evaluation=False)[0].select([0])
    assert row["prompt"] == [
        {"role": "system", "content": TASKS["gsm8k"].options["system_prompt"]},
        {"role": "user", "content": "1 + 1?"},
    ]
    assert row["solution"] == "so #### 2"
    args = task_arguments("gsm8k", dataset_name=path, system_prompt="", prompt_column="q")
    assert load_task(args, evaluation=False)[0][0]["prompt"] == "Q"
    assert task_arguments("gsm8k").dataset_config == "main"


# Which rows are trained on, and which are held out.


@pytest.fixture
def numbers(tmp_path):
    """A file of 20 rows."""
    return str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"{i}", "solution": f"{i}"} for i in range(20)]))


def numbered(path, **options):
    return DataArguments(dataset_name=path, reward_funcs=["exact_match_reward"], **options)


def test_rows_of_a_file_are_held_out_by_the_seed(numbers):
    train, held_out = load_task(numbered(numbers, num_eval_samples=5))
    assert len(train) == 15 and len(held_out) == 5
    assert sorted(prompts(train) + prompts(held_out)) == sorted(f'"{i}"' for i in range(20))
    # The same rows without an evaluation in the training, in `scripts/evaluate.py`, and for fewer training rows.
    assert prompts(load_task(numbered(numbers, num_eval_samples=5), evaluation=False)[0]) == prompts(train)
    assert prompts(load_task(numbered(numbers, num_eval_samples=5), train=False)[1]) == prompts(held_out)
    few, same = load_task(numbered(numbers, num_eval_samples=5, num_train_samples=3))
    assert prompts(few) == prompts(train)[:3] and prompts(same) == prompts(held_out)
    assert prompts(load_task(numbered(numbers, num_eval_samples=5, task_seed=1))[1]) != prompts(held_out)
    with pytest.raises(ValueError, match="`num_train_samples` and `num_eval_samples` ask for 21 rows of 20"):
        load_task(numbered(numbers, num_eval_samples=5, num_train_samples=16))
    with pytest.raises(ValueError, match="a stream .`dataset_streaming`. does not allow: set `eval_dataset_name`"):
        load_task(numbered(numbers, num_eval_samples=5, dataset_streaming=True))


def test_rows_are_drawn_not_cut(numbers):
    train = load_task(numbered(numbers, num_train_samples=8), evaluation=False)[0]
    assert len(set(prompts(train))) == 8 and prompts(train) != [f'"{i}"' for i in range(8)]
    assert prompts(load_task(numbered(numbers, num_train_samples=8), evaluation=False)[0]) == prompts(train)
    with pytest.raises(ValueError, match="`num_train_samples` ask for 21 rows of 20"):
        load_task(numbered(numbers, num_train_samples=21), evaluation=False)
    stream = load_task(numbered(numbers, num_train_samples=8, dataset_streaming=True), evaluation=False)[0]
    assert len({row["prompt"] for row in stream}) == 8


def test_a_file_without_rows_to_evaluate_on_is_refused(numbers):
    with pytest.raises(
        ValueError, match="no split to evaluate on that was not trained on. Hold rows out with `num_ev"
    ):
        load_task(numbered(numbers))
    assert len(load_task(numbered(numbers), train=False)[1]) == 20
    train, test = load_task(numbered(numbers, dataset_train_split="train[4:]", dataset_test_split="test[:4]"))
    assert (len(train), len(test)) == (16, 4)


@pytest.mark.parametrize("streaming", [False, True])
def test_no_prompt_is_both_trained_and_evaluated_on(numbers, tmp_path, caplog, streaming):
    other = str(write_jsonl(tmp_path / "test.jsonl", [{"prompt": p, "solution": p} for p in ("3", "7", "new")]))
    args = numbered(numbers, eval_dataset_name=other)
    held_out = load_task(args)[1]
    train = tasks.load_rows(numbers, "train", streaming=streaming)
    caplog.clear()
    with caplog.at_level(logging.INFO, "trl_gspo"):
        kept = tasks._without_prompts_of(held_out, train)
    assert {row["prompt"] for row in kept} == {str(i) for i in range(20)} - {"3", "7"}
    assert ("2 of 20 rows to train on are left out" in caplog.text) is not streaming
    assert len(load_task(args)[0]) == 18
    with pytest.raises(ValueError, match="Each of the 20 prompts to train on is in the data to evaluate on"):
        load_task(numbered(numbers, eval_dataset_name=numbers, num_train_samples=20, dataset_test_split="test[:]"))


def test_messages_are_compared_too(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{i % 4}"}], "solution": "0"} for i in range(8)]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    train, held_out = load_task(numbered(path, num_eval_samples=2))
    assert not set(prompts(train)) & set(prompts(held_out)) and len(train) < 6


# Sort.


def test_the_rows_of_sort_are_those_of_the_demo():
    train, held_out = load_task(task_arguments("sort", num_train_samples=30, num_eval_samples=10))
    # All different, so that some of the generator's may be passed over; the held-out ones come first.
    every = list(dict.fromkeys(row["prompt"] for row in sorting_rows(200, seed=0)))
    assert held_out["prompt"][:] == every[:10] and train["prompt"][:] == every[10:40]
    assert all(row["solution"] == "".join(sorted(row["prompt"][:-1])) for row in train)
    assert load_task(task_arguments("sort", num_eval_samples=10), train=False)[1]["prompt"][:] == every[:10]


def test_a_generator_that_runs_out_says_so(monkeypatch):
    few = Task({"reward_funcs": ["exact_match_reward"]}, generate=lambda args: iter([{"prompt": "a"}] * 10_000))
    monkeypatch.setitem(TASKS, "few", few)
    with pytest.raises(
        ValueError, match="'few' has 1 different prompts .*`num_train_samples=2`.*ask for 3: ask for fe"
    ):
        load_task(task_arguments("few", num_train_samples=2, num_eval_samples=1))
    with pytest.raises(ValueError, match="set `num_train_samples` and `num_eval_samples`"):
        load_task(task_arguments("few", num_train_samples=2))


# GSM8K and MATH.


@needs_data
def test_gsm8k_from_a_folder_and_from_files():
    train, test = load_task(task_arguments("gsm8k", dataset_name=str(DATA / "gsm8k")))
    assert (len(train), len(test)) == (7473, 1319)
    assert not set(prompts(train)) & set(prompts(test))
    reward = load_reward("final_number_reward")
    rows = test.select(range(200))
    assert reward(completions=rows["answer"][:], solution=rows["solution"][:]) == [1.0] * 200
    assert sum(reward(completions=rows["answer"][1:] + rows["answer"][:1], solution=rows["solution"][:])) < 20
    files = {"dataset_name": str(DATA / "gsm8k/train.jsonl"), "eval_dataset_name": str(DATA / "gsm8k/test.jsonl")}
    train, test = load_task(task_arguments("gsm8k", **files, num_train_samples=100, num_eval_samples=20))
    assert (len(train), len(test)) == (100, 20)


MATH = [
    {
        "problem": "What is $\\frac{1}{2} + \\frac{1}{3}$?",
        "solution": "The sum is $\\frac{3}{6} + \\frac{2}{6}$, which is $\\boxed{\\frac{5}{6}}$.",
    },
    {"problem": "Solve $x^2 = 4$, $x > 0$.", "solution": "As $x^2 = 4$, $x = \\pm 2$, so $x = \\boxed{2}$."},
]


def test_math_is_verified_by_its_value(tmp_path):
    path = str(write_jsonl(tmp_path / "math.jsonl", MATH))
    rows = load_task(task_arguments("math", dataset_name=path), evaluation=False)[0]
    assert rows[0]["prompt"][0]["content"] == "Reason step by step, and put the final answer in \\boxed{}."
    reward = load_reward("accuracy_reward")

    def score(*texts):
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        return reward(completions=completions, solution=rows["solution"][:])

    assert score("So \\boxed{10/12}.", "$\\boxed{2.0}$") == [1.0, 1.0]
    assert score("So \\boxed{\\frac{3}{6}}.", "$\\boxed{-2}$") == [0.0, 0.0]


# Code.

MBPP = {
    "text": "Write a function to add.",
    "code": "def add(a, b):\n    return a + b",
    "task_id": 1,
    "test_setup_code": "import math",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
    "challenge_test_list": [],
}
SANITIZED = {
    "prompt": "Write a function to add.",
    "test_imports": ["import math"],
    "test_list": ["assert add(1, 2) == 3"],
}


@functools.cache
def code_reward():
    return load_reward("code_reward", allow_code_execution=True)


def run(row, completion):
    columns = {name: [row[name]] for name in ("tests", "code_prefix", "entry_point")}
    (score,) = code_reward()(completions=[completion], **columns)
    return score


@pytest.mark.parametrize("row", [MBPP, SANITIZED], ids=["full", "sanitized"])
def test_code_in_the_form_of_mbpp(row, tmp_path):
    path = str(write_jsonl(tmp_path / "mbpp.jsonl", [row]))
    (row,) = load_task(task_arguments("code", dataset_name=path), evaluation=False)[0]
    text = row["prompt"][1]["content"]
    assert text.startswith("Write a function to add.\n\n") and "assert add(1, 2) == 3" in text
    assert row["tests"].startswith("import math\nassert add(1, 2) == 3")
    assert (row["code_prefix"], row["entry_point"]) == ("", None)
    assert run(row, MBPP["code"]) == 1 and run(row, MBPP["code"].replace("+", "-")) == 0 and run(row, "") == 0


@needs_data
def test_code_in_the_form_of_humaneval():
    path = str(DATA / "humaneval" / "HumanEval.jsonl")
    rows = load_task(task_arguments("code", dataset_name=path), evaluation=False)[0]
    assert len(rows) == 164
    assert "```python\nfrom typing import List\n\n\ndef has_close_elements(" in rows[0]["prompt"][1]["content"]
    assert rows[0]["entry_point"] == "has_close_elements"
    for row in rows.select(range(10)):
        assert run(row, row["canonical_solution"]) == 1 and run(row, "    pass\n") == 0
    plain = load_task(
        task_arguments("code", dataset_name=path, system_prompt="", prompt_column="code_prefix"), True, False
    )
    assert plain[0][0]["prompt"].startswith("from typing import List")


def test_a_changed_task_is_not_read_from_the_cache(tmp_path, monkeypatch):
    path = str(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    monkeypatch.syspath_prepend(tmp_path)
    for text in ("first", "second"):
        (tmp_path / "changing_task.py").write_text(
            f"from trl_gspo.tasks import Task\n\ndef convert(row):\n    return {{'prompt': '{text}'}}\n\n"
            "TASK = Task({'reward_funcs': ['exact_match_reward']}, convert=convert)\n"
        )
        sys.modules.pop("changing_task", None)
        importlib.invalidate_caches()
        args = task_arguments("changing_task.TASK", dataset_name=path)
        assert load_task(args, evaluation=False)[0]["prompt"][:] == [text] * 5


def test_code_in_another_form_is_refused(tmp_path):
    path = str(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    with pytest.raises(ValueError, match="reads `prompt`, `test` and `entry_point` .* The data has question, answer"):
        load_task(task_arguments("code", dataset_name=path), evaluation=False)


# reasoning-gym.


def reasoning(*families, train=20, held_out=10, **options):
    return task_arguments(
        "reasoning",
        reasoning_families=list(families),
        num_train_samples=train,
        num_eval_samples=held_out,
        **options,
    )


def test_reasoning_is_generated_by_the_seed_and_scored_by_its_own_verifier():
    pytest.importorskip("reasoning_gym")
    args = reasoning("chain_sum:3", "spell_backward", reasoning_params={"chain_sum": {"max_terms": 2}}, train=60)
    train, held_out = load_task(args)
    assert (len(train), len(held_out)) == (60, 10)
    assert len(set(prompts(train)) | set(prompts(held_out))) == 70
    families = Counter(json.loads(item)["family"] for item in train["reasoning_item"])
    assert families["chain_sum"] > families["spell_backward"] > 5
    assert load_task(args, train=False)[1]["prompt"][:] == held_out["prompt"][:]
    assert all(question.count(" + ") + question.count(" - ") == 1 for question in train["question"] if "=" in question)
    other = load_task(reasoning("chain_sum:3", "spell_backward", task_seed=1))[1]
    assert prompts(other) != prompts(held_out)
    items = train["reasoning_item"][:]
    assert reasoning_reward(train["answer"][:], items) == [1.0] * 60
    tagged = [f"<think>0</think> so <answer>{answer}</answer>." for answer in train["answer"]]
    assert reasoning_reward(tagged, items) == [1.0] * 60
    assert max(reasoning_reward(["?"] * 60, items)) < 0.5


def test_generated_rows_have_more_seeds_than_one_row_apart():
    # reasoning-gym's entry 1 of seed 0 is its entry 0 of seed 1: a held-out set by another seed would be trained on.
    rows = {seed: list(islice(tasks.reasoning_rows(reasoning("gcd", task_seed=seed)), 30)) for seed in (0, 1)}
    assert [row["question"] for row in rows[0][1:]] == [row["question"] for row in rows[1][:-1]]
    train, held_out = load_task(reasoning("gcd"))
    assert not set(train["question"]) & set(held_out["question"])


@pytest.mark.parametrize(
    ("families", "params", "message"),
    [
        (
            ["composite"],
            None,
            "`reasoning_families` names 'composite', which is refused: it is made of other families",
        ),
        (["chain_sun"], None, "`reasoning_families` has no 'chain_sun', did you mean 'chain_sum'"),
        (["gcd:0"], None, "gives 'gcd:0' no positive weight: write `gcd:2`"),
        (["gcd:x"], None, "gives 'gcd:x' no positive weight"),
        ([], None, "`reasoning_families` is empty"),
        (["gcd"], {"lcm": {}}, "`reasoning_params` has lcm, not among"),
        (
            ["gcd"],
            {"gcd": {"max_digits": 2}},
            "`reasoning_params` for 'gcd': .*unexpected keyword argument 'max_digits'",
        ),
        (["chain_sum"], {"chain_sum": {"min_terms": 9}}, "`reasoning_params` for 'chain_sum': max_terms must be >="),
        (["gcd"], {"gcd": {"seed": 2}}, "`reasoning_params` for 'gcd': .*'seed'"),
    ],
)
def test_families_and_parameters_that_are_not_there_are_named(families, params, message):
    with pytest.raises(ValueError, match=message):
        load_task(reasoning(*families, reasoning_params=params))


def test_a_family_with_few_rows_says_so():
    params = {"chain_sum": {"max_terms": 2, "max_digits": 1}}
    with pytest.raises(ValueError, match=r"has \d+ different prompts at these parameters"):
        load_task(reasoning("chain_sum", reasoning_params=params, train=300))


# Mixtures.


def mixture(tmp_path, **options):
    rows = {
        "sums": [{"question": f"{i} + 1?", "answer": f"#### {i + 1}", "level": i} for i in range(60)],
        "chats": [
            {"prompt": [{"role": "user", "content": f"say {i}"}], "solution": f"{i}", "level": "a"} for i in range(60)
        ],
    }
    paths = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", parts)) for name, parts in rows.items()}
    return DataArguments(
        **{
            "task": "mixed",
            "task_weights": {"gsm8k": 3, "tests.own_task.make": 1},
            "task_options": {
                "gsm8k": {"dataset_name": paths["sums"], "num_eval_samples": 20},
                "tests.own_task.make": {
                    "dataset_name": paths["chats"],
                    "num_eval_samples": 20,
                    "prompt_column": "prompt",
                    "solution_column": "solution",
                },
            },
        }
        | options
    )


def test_a_mixture_goes_by_its_weights_and_repeats_nothing(tmp_path):
    args = mixture(tmp_path)
    train, held_out = load_task(args)
    assert train.to_list() == load_task(args)[0].to_list()  # by the seed
    assert load_task(mixture(tmp_path, task_seed=1))[0].to_list() != train.to_list()
    counts = Counter(train["task"])
    assert counts["gsm8k"] == 40  # which ends the mixture: it has no row left
    assert 6 <= counts["tests.own_task.make"] <= 22
    assert len(set(prompts(train))) == len(train)
    assert not set(prompts(train)) & set(prompts(held_out))
    assert {row["task"] for row in held_out} == set(counts)
    assert all(isinstance(prompt, list) for prompt in train["prompt"])
    assert "level" not in train.column_names  # a number in one task, text in the other
    assert len(load_task(mixture(tmp_path, num_train_samples=10))[0]) == 10
    with pytest.raises(
        ValueError, match="`num_train_samples` ask for 200 rows of .*which ends with the first of its tas"
    ):
        load_task(mixture(tmp_path, num_train_samples=200))


def test_each_row_of_a_mixture_has_the_rewards_of_its_task(tmp_path):
    args = mixture(tmp_path, reward_funcs=None)
    assert args.reward_funcs == ["final_number_reward", "exact_match_reward"]
    number, exact = scope_rewards(args, [load_reward(name) for name in args.reward_funcs])
    columns = {
        "task": ["gsm8k", "tests.own_task.make", "gsm8k"],
        "solution": ["#### 4", "4", "#### 5"],
        "log_extra": None,
    }
    assert number(completions=["4", "4", "4"], **columns) == [1.0, None, 0.0]
    assert exact(completions=["4", "4", "4"], **columns) == [None, 1.0, None]
    assert exact(completions=["4"], task=["gsm8k"], solution=["4"]) == [None]
    # One that no task of the mixture brings scores every row.
    args = mixture(tmp_path, reward_funcs=["final_number_reward", "keywords_reward"])
    scoped = scope_rewards(args, [load_reward(name) for name in args.reward_funcs])
    assert scoped[1] is load_reward("keywords_reward")
    assert (scoped[0].__name__, scoped[0](completions=["4"] * 3, **columns)) == (
        "final_number_reward",
        [1.0, None, 0.0],
    )


def test_what_cannot_be_kept_to_a_task_is_refused(tmp_path):
    async def answer(completions, **kwargs):
        return [0.0]

    args = mixture(tmp_path)
    with pytest.raises(ValueError, match="The reward model 'final_number_reward' of gsm8k cannot be kept to one task"):
        scope_rewards(args, ["some/model", load_reward("exact_match_reward")])
    with pytest.raises(ValueError, match="'final_number_reward' is async"):
        scope_rewards(args, [answer, load_reward("exact_match_reward")])
    assert scope_rewards(numbered("d"), ["some/model"]) == ["some/model"]
