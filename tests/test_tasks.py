import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tiny import write_jsonl

from trl_gspo.tasks import load_rows, to_prompts


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
