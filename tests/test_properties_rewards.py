"""What rewards and the names of rewards make of any text."""

import os
import re
from decimal import Decimal

from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import NESTED, SCALARS

from trl_gspo.rewards import (
    check_columns,
    exact_match_reward,
    final_number,
    final_number_reward,
    load_reward,
    reward_names,
)


# `code_reward` needs a permission, and has tests of its own.
NAMES = [name for name in reward_names() if name != "code_reward"]
# What numbers are made of, among them digits and signs of other scripts, beside any text.
PIECES = st.sampled_from([*"0123456789.,+-$%#{} \n", "####", r"\boxed{", "٣", "１８", "²", "½", "−", "1e5", "\ud800"])
TEXT = st.text() | st.lists(PIECES).map("".join)
WITHOUT_DIGITS = st.text(st.characters(exclude_categories=["Nd"], exclude_characters=".,+-#\\")).filter(
    lambda text: "####" not in text
)
NUMBERS = st.decimals(-(10**12), 10**12, places=2) | st.integers(-(10**30), 10**30).map(Decimal)


@given(TEXT)
@example("١٨")
@example("1" * 5000)
def test_a_final_number_is_finite_or_none(text):
    number = final_number(text)
    assert number is None or number.is_finite()
    assert (number is None) or any(character.isdecimal() for character in text)


@given(TEXT, NUMBERS, WITHOUT_DIGITS, st.sampled_from(["#### {}", "\\boxed{{{}}}", "{}", "${:,}.", "#### {:,} %"]))
def test_the_number_that_a_text_ends_on_is_read(before, number, after, form):
    if "####" not in form and "boxed" not in form:
        assume("####" not in before and "\\boxed{" not in before)
    if "boxed" in form:
        assume("####" not in before)
    # Not part of a longer number.
    text = f"{before} {form.format(number)} {after}"
    assume(form != "${:,}." or number >= 0)
    assert final_number(text) == number


MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["assistant", "tool"])},
    optional={
        "content": st.none()
        | TEXT
        | st.lists(st.fixed_dictionaries({"type": st.just("text")}, optional={"text": TEXT})),
        "tool_calls": st.just([]),
    },
)
COMPLETIONS = TEXT | st.lists(MESSAGE, max_size=2)


@given(st.lists(st.tuples(COMPLETIONS, SCALARS | TEXT), max_size=3))
@example([([{"role": "assistant", "tool_calls": []}], "1")])
@example([([{"role": "assistant", "content": None}], "1")])
@example([([{"role": "assistant", "content": [{"type": "text", "text": "1"}]}], "1")])
@example([([], "1")])
def test_a_reward_is_0_or_1_or_none_whatever_was_said(rows):
    completions, solutions = [row[0] for row in rows], [row[1] for row in rows]
    for reward in (exact_match_reward, final_number_reward):
        for value, solution in zip(reward(completions, solutions, other=[]), solutions, strict=True):
            assert value in (0.0, 1.0) or value is None
            assert value is None or solution is not None
            assert solution is not None or value is None


@given(
    TEXT, st.sampled_from([str, lambda text: [{"role": "assistant", "content": text}]]), st.text(" \n\t", max_size=3)
)
def test_what_is_right_is_right_in_any_form(text, form, space):
    assert exact_match_reward([form(space + text + space)], [text]) == [1.0]
    assert final_number_reward([form(text)], [text]) == ([None] if final_number(text) is None else [1.0])
    assert exact_match_reward([form(text)], [text + "x"]) == [float(text.strip() == (text + "x").strip())]


# What these cannot do without.
NEEDS = {
    "get_repetition_penalty_reward": {"ngram_size": 2, "max_penalty": -0.5},
    "get_pattern_reward": {"pattern": "."},
}

# Names that no module has, and of modules that have no such function.
NAME = st.text("xq._/ -\0é") | st.sampled_from(
    ["math.x", "json.x.y", "trl_gspo.rewards.x", "math", "get_x", "os.path"]
)


@given(NAME | st.sampled_from(NAMES), st.none() | st.dictionaries(st.text("abc_", max_size=3), NESTED))
@example(".x.y", None)
@example("..x", None)
@example("x.", None)
@example("", None)
def test_a_name_loads_or_says_why_not(name, kwargs):
    try:
        loaded = load_reward(name, kwargs, max_completion_length=100)
    except ValueError as error:
        assert "`reward_" in str(error)
        assert name not in NAMES or kwargs or name in NEEDS
    else:
        assert callable(loaded) or loaded == name and ("/" in name or os.path.isdir(name))
        assert not kwargs or isinstance(loaded, str)


@given(st.sampled_from(NAMES), st.lists(st.text(max_size=5) | st.sampled_from(["solution", "prompt"])))
def test_columns_are_there_or_named(name, columns):
    reward = load_reward(name, NEEDS.get(name), max_completion_length=100)
    try:
        check_columns(reward, columns)
    except ValueError as error:
        (needed,) = re.findall("needs the column '(\\w+)'", str(error))
        assert needed in ("solution", "keywords", "reasoning_item") and needed not in columns
