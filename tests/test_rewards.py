import sys
from decimal import Decimal

import pytest
from trl.rewards import get_soft_overlong_punishment

from trl_gspo import turn_reward
from trl_gspo.rewards import (
    check_columns,
    exact_match_reward,
    final_number,
    final_number_reward,
    load_reward,
    reward_names,
)


def message(text):
    return [{"role": "assistant", "content": text}]


def test_exact_match_reads_strings_and_messages():
    completions = [" 13479\n", "13497", message("13479"), "x"]
    assert exact_match_reward(completions, ["13479", "13479", "13479", None]) == [1.0, 0.0, 1.0, None]


def test_exact_match_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError):
        exact_match_reward(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She sells 9 eggs for $2: 9 * 2 = <<9*2=18>>18\n#### 18", "18"),
        ("#### 1,234", "1234"),
        (r"so 7 apples, \boxed{-3.50} in all", "-3.5"),
        ("The answer is $18.00.", "18"),
        ("It costs 5 dollars, or 20%.", "20"),
        ("#### 18 (not 19)", "18"),
        ("half: .5", "0.5"),
        ("no number", None),
        ("12 ####", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_final_number_reward_is_none_without_a_right_answer():
    completions = ["18", message("#### 18.0"), "19", "eighteen", "18"]
    solutions = ["... #### 18"] * 4 + ["unknown"]
    assert final_number_reward(completions, solutions) == [1.0, 1.0, 0.0, 0.0, None]


def test_every_name_loads():
    needs = {"get_repetition_penalty_reward": {"ngram_size": 2, "max_penalty": -0.5}}
    names = reward_names()
    assert {"exact_match_reward", "code_reward", "accuracy_reward", "get_soft_overlong_punishment"} <= set(names)
    for name in names:
        assert callable(load_reward(name, needs.get(name), max_completion_length=100, allow_code_execution=True))


def test_a_made_reward_takes_its_arguments_from_the_completion_length():
    ids = [[0] * length for length in (80, 90, 100, 101)]
    ours = load_reward("get_soft_overlong_punishment", max_completion_length=100)
    theirs = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    assert ours(completions=["x"] * 4, completion_ids=ids) == theirs(completion_ids=ids) == [0, -0.5, -1.0, -1]
    given = load_reward("get_soft_overlong_punishment", {"soft_punish_cache": 50}, max_completion_length=100)
    assert given(completions=["x"] * 4, completion_ids=ids)[0] == pytest.approx(-0.6)


def test_rewards_of_trl_read_plain_text_too():
    reward = load_reward("think_format_reward")
    right = "<think>a</think>b"
    assert reward(completions=[right, "b"]) == reward(completions=[message(right), message("b")]) == [1.0, 0.0]
    assert reward.__name__ == "think_format_reward"


def test_a_reward_of_ones_own_is_found_on_pythons_path_and_not_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_this_test.py").write_text("def length(completions, **kw):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    # As `python scripts/train.py` has it: `python -m` and pytest put the working directory there, as "".
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(tmp_path))])
    before = list(sys.path)
    with pytest.raises(ValueError, match=r"No module named 'my_rewards_of_this_test'.* start with `PYTHONPATH=\. acc"):
        load_reward("my_rewards_of_this_test.length")
    assert sys.path == before
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("my_rewards_of_this_test.length")(completions=["x"]) == [1.0]
    with pytest.raises(ValueError, match="has no 'lenght'. It has length"):
        load_reward("my_rewards_of_this_test.lenght")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("exact_mach_reward", None, "did you mean 'exact_match_reward'"),
        ("nowhere.at_all", None, "No module named 'nowhere'"),
        ("exact_match_reward", {"a": 1}, "takes none"),
        ("get_soft_overlong_punishment", {"cache": 1}, "does not fit get_soft_overlong_punishment"),
    ],
)
def test_what_cannot_be_loaded_says_why(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name, kwargs, max_completion_length=8)


def test_a_reward_model_is_left_to_trl(model_path):
    assert load_reward(model_path) == model_path
    assert load_reward("org/reward-model") == "org/reward-model"


def test_a_missing_column_is_named_before_training():
    check_columns(exact_match_reward, ["prompt", "solution"])
    check_columns("org/reward-model", [])
    check_columns(turn_reward(lambda prompts, completions, num_turns, trainer_state: []), ["prompt"])
    with pytest.raises(ValueError, match="'exact_match_reward' needs the column 'solution'.* It has prompt, answer"):
        check_columns(exact_match_reward, ["prompt", "answer"])
