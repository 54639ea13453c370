import json
import re
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from trl.rewards import get_soft_overlong_punishment

from trl_gspo import turn_reward
from trl_gspo.rewards import (
    _EVALUATED_FAMILIES,
    UNFIT_FAMILIES,
    _is_safe,
    check_columns,
    exact_match_reward,
    final_number,
    final_number_reward,
    keywords_reward,
    load_reward,
    reasoning_entry,
    reasoning_families,
    reasoning_reward,
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
    needs["get_pattern_reward"] = {"pattern": "."}
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


# Of a customer service.


def test_keywords():
    keywords = [["#12", "Lamp"], ["refund"], [], None]
    completions = ["Your LAMP ...", message("We refund #12"), "x", "x"]
    assert keywords_reward(completions, keywords) == [0.5, 1.0, None, None]


def test_a_pattern_is_that_of_the_whole_text():
    reward = load_reward("get_pattern_reward", {"pattern": "Dear .*Regards,.+"})
    completions = ["  Dear you,\nyes.\nRegards, we\n", message("Dear you. Regards,"), "O Dear you. Regards, we"]
    assert reward(completions=completions) == [1.0, 0.0, 0.0]
    assert reward.__name__ == "pattern_reward"
    with pytest.raises(ValueError, match=r"gives `get_pattern_reward` the pattern '\(': missing"):
        load_reward("get_pattern_reward", {"pattern": "("})
    with pytest.raises(ValueError, match="`reward_kwargs` does not fit get_pattern_reward"):
        load_reward("get_pattern_reward")


# reasoning-gym.


def item(family, index=0, **params):
    return json.dumps({"family": family, "seed": 0, "index": index, "params": params})


def test_reasoning_reward_leaves_out_other_rows():
    pytest.importorskip("reasoning_gym")
    entry = reasoning_entry(item("gcd"))[1]
    completions = [entry["answer"], f"<answer>{entry['answer']}</answer>", message(entry["answer"]), "0", "0"]
    assert reasoning_reward(completions, [item("gcd")] * 4 + [None]) == [1.0, 1.0, 1.0, 0.0, None]


# Each would run something, or not end.
HOSTILE = [
    "__import__('os').system('touch {file}')",
    "open('{file}', 'w').write('x')",
    "[c for c in ().__class__.__base__.__subclasses__() if open('{file}', 'w')]",
    "exec(chr(111))",
    "x.__class__",
    "9**9**9**9",
    "9**(9**(9**9))",
    "((((9**99)**99)**99)**99)**99",
    "9!!!!!!!",
    "factorial(10**9)",
    "9999999999 + 1",
    "f'{{open}}'",
    "lambda: 0",
    "(" * 5000,
]


@pytest.mark.parametrize("family", sorted(_EVALUATED_FAMILIES))
def test_nothing_a_model_wrote_is_run(family, tmp_path):
    pytest.importorskip("reasoning_gym")
    kind = _EVALUATED_FAMILIES[family]
    file = tmp_path / "written"
    answers = [text.format(file=file) for text in HOSTILE]
    assert [text for text in answers if _is_safe(text, kind)] == []
    entry = reasoning_entry(item(family))[1]
    assert reasoning_reward(answers, [item(family)] * len(answers)) == [0.0] * len(answers)
    assert not file.exists()
    assert reasoning_reward([entry["answer"]], [item(family)]) == [1.0]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("literal", "[[1, 0], [0, 1]]"),
        ("arithmetic", "(1 + 2) * 3 - 4 / 5"),
        ("arithmetic", "44 - 19 + 35"),
        ("algebra", "x**2/2 + sin(x)**2 - 3.5*x*exp(x) + C"),
        ("algebra", "-18*y**(-3) + x**(1/2) + log(x)"),
        (None, "__import__('os')"),
    ],
)
def test_what_is_an_answer_reaches_the_verifier(kind, text):
    assert _is_safe(text, kind)


def test_other_verifiers_evaluate_nothing():
    """Each place of reasoning-gym that evaluates, in a file whose families are known to: a new one fails here."""
    root = Path(pytest.importorskip("reasoning_gym").__file__).parent
    pattern = re.compile(r"(?<![\w.])(?:eval|exec)\(|(?:sympy|sp)\.(?:parse_expr|sympify)\(|(?<!def )\bparse_expr\(")
    found = {path.stem for path in root.rglob("*.py") if pattern.search(path.read_text())}
    # These evaluate what they made themselves, or have a parser of that name.
    trusted = {"codeio", "generators_00_49", "generators_50_99", "bitwise_arithmetic", "basic_arithmetic"}
    trusted |= {"number_sorting", "propositional_logic"}
    assert found - trusted == set(_EVALUATED_FAMILIES)


GARBAGE = [
    "",
    "0",
    "[]",
    "{",
    "\n\n",
    "None",
    "-1/0",
    "a" * 3000,
    "1 " * 500,
    "[[1, 2], [3]]",
    "\x00\ud7ff",
    "nan",
    "1e999",
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["all"])
def test_every_family_scores_its_own_answer_and_survives_garbage(family):
    pytest.importorskip("reasoning_gym")
    families = reasoning_families()
    assert len(families) > 100 and not set(families) & set(UNFIT_FAMILIES)
    for name in families:
        for index in range(3):
            entry, again = (reasoning_entry.__wrapped__(item(name, index))[1] for _ in range(2))
            assert entry["question"] == again["question"] and entry["answer"] == again["answer"], name
            (right, tagged) = reasoning_reward(
                [str(entry["answer"]), f"<answer>{entry['answer']}</answer>"], [item(name, index)] * 2
            )
            # Five have no reference: their verifiers try what is given.
            assert right == tagged and (right == 1.0 or entry["answer"] is None), (name, index, right, entry["answer"])
            scores = reasoning_reward(GARBAGE, [item(name, index)] * len(GARBAGE))
            for score, answer in zip(scores, GARBAGE, strict=True):
                is_right = answer == entry["answer"] or (answer == "0" and entry["answer"] == "0.0")
                assert 0 <= score < 1 or is_right, (name, answer, score, entry["answer"])
