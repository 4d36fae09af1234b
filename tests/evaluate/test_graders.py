"""Graders: what counts as right, what an answer cannot break, and what is refused."""

from __future__ import annotations

import json
import sys
import types
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import InputError
from luthier.evaluate.graders import GRADERS, expected, find_grader, last_number, question


def row(answer, **columns):
    return {"where": "rows.jsonl:7", "id": "abc", "prompt": "q", "completion": answer, **columns}


CASES = [
    ("exact", "Paris", "  Paris\n", 1),
    ("exact", "Paris", "paris", 0),
    ("exact", "Paris", "Paris.", 0),
    ("contains", "Paris", "It is PARIS, of course", 1),
    ("contains", "New  York", "in new\nyork city", 1),
    ("contains", "4", "It is 14", 0),
    ("contains", "4", "14 or 4?", 1),
    ("contains", "art", "start", 0),
    ("contains", "C++", "use C++20", 1),
    ("contains", "東京", "答えは東京です", 1),
    ("contains", "Stra\u00dfe", "Die STRASSE", 1),
    ("contains", "caf\u00e9", "a cafe\u0301 here", 1),
    ("number", "42", "First 7, then 42.", 1),
    ("number", "42", "42, not 7", 0),
    ("number", "1234.5", "$1,234.50", 1),
    ("number", "1,000,000", "about 1000000 people", 1),
    ("number", "3", "[1,2,3]", 1),
    ("number", "-5", "so x = -5", 1),
    ("number", "-5", "so x = \u22125", 1),
    ("number", "3", "5-3", 1),
    ("number", "2", "f(x)-2", 1),
    ("number", "0.5", "1/2", 1),
    ("number", "3/2", "6/4", 1),
    ("number", "1/2", "3/2", 0),
    ("number", "0.1", ".1", 1),
    ("number", "7", "7.0", 1),
    ("number", "#### 18", "The total is 18", 1),
    ("number", "7", "none", 0),
    ("number", "7", "9" * 9000, 0),
    ("number", "7", "7/0", 0),
    ("choice-letter", "B", "B", 1),
    ("choice-letter", "B", "**(b)**", 1),
    ("choice-letter", "B", "B) Paris", 1),
    ("choice-letter", "(B)", "The answer is B.", 1),
    ("choice-letter", "B", "The correct answer is: **B**", 1),
    ("choice-letter", "B", "A looks right, but the answer is (B)", 1),
    ("choice-letter", "A", "A cat is no bird", 0),
    ("choice-letter", "B", "I think it is B", 1),
    ("choice-letter", "I", "I think it is B", 0),
    ("choice-letter", "C", r"so \boxed{C}", 1),
    ("choice-letter", "B", "Answer: A\nNo, wait. Answer: B", 1),
    ("choice-letter", "E", "e.g. a cat", 0),
    ("choice-letter", "B", "", 0),
    ("choice-letter", "C. 12", "c", 1),
    ("json", '{"a": 1, "b": [true, null]}', '{"b": [true, null], "a": 1.0}', 1),
    ("json", '{"a": 1}', '```json\n{"a": 1}\n```', 1),
    ("json", '{"a": 1}', '{"a": true}', 0),
    ("json", "[0]", "[false]", 0),
    ("json", "[1, 2]", "[2, 1]", 0),
    ("json", '{"a": 1}', '{"a": 1, "b": 2}', 0),
    ("json", "[1]", "[1", 0),
    ("json", "[1]", "[NaN]", 0),
    ("json", "[1]", "[" * 100_000, 0),
    ("json", "[1]", "9" * 9000, 0),
    ("json", '"1"', "1", 0),
]


@pytest.mark.parametrize("name, wanted, answer, mark", CASES)
def test_cases(name, wanted, answer, mark):
    assert find_grader(name)(row(wanted), answer) == mark


@pytest.mark.parametrize("name", sorted(GRADERS))
@pytest.mark.parametrize("wanted", ["12", '{"a": [1, "B"]}', "B", "-3.50", "1,000"])
def test_the_expected_answer_is_right_by_every_grader_that_can_read_it(name, wanted):
    try:
        assert find_grader(name)(row(wanted), wanted) == 1.0
    except InputError as refusal:
        assert "expected answer" in str(refusal) and "rows.jsonl:7" in str(refusal)


@pytest.mark.parametrize("name", sorted(GRADERS))
@given(answer=st.text(max_size=200))
def test_no_answer_breaks_a_grader(name, answer):
    wanted = {"json": "[1]", "choice-letter": "B"}.get(name, "42")
    assert find_grader(name)(row(wanted), answer) in (0.0, 1.0)


@given(st.decimals(min_value=-(10**9), max_value=10**9, places=3))
def test_a_number_is_read_back_with_or_without_thousands_separators(value):
    assert last_number(f"it is {value}.") == last_number(f"it is {value:,}.") == Fraction(value)


@pytest.mark.parametrize("name", sorted(GRADERS))
@pytest.mark.parametrize(
    "given_row",
    [
        {"where": "r:1", "id": "x", "text": "plain"},
        {"where": "r:1", "id": "x", "prompt": "q", "completion": "  "},
        {"where": "r:1", "id": "x", "messages": [{"role": "user", "content": "q"}]},
        {"where": "r:1", "id": "x", "messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
    ],
)
def test_a_row_without_expected_answer_is_refused(name, given_row):
    with pytest.raises(InputError, match=r"^r:1: the row has no expected answer"):
        find_grader(name)(given_row, "an answer")


def test_expected_and_question_of_every_form():
    chat = [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
    ]
    answered = [*chat, {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "2"}]}]
    assert (question({"messages": answered}), expected({"messages": answered})) == ("q2", "a2")
    assert (question({"messages": chat}), expected({"messages": chat})) == ("q2", None)
    assert (question(row("a")), expected(row("a"))) == ("q", "a")
    preference = {"prompt": chat, "chosen": [{"role": "assistant", "content": "yes"}], "rejected": "no"}
    assert (question(preference), expected(preference)) == ("q2", "yes")
    assert (question({"text": "t"}), expected({"text": "t"})) == ("t", None)


@pytest.fixture
def own_graders(monkeypatch):
    module = types.ModuleType("own_graders")
    monkeypatch.setitem(sys.modules, "own_graders", module)
    module.half = lambda row, answer: 0.5
    module.counted = lambda row, answer: np.float32(1.0) if answer == row["extra"]["key"] else np.bool_(False)
    module.returns = lambda row, answer: json.loads(answer)
    module.number = 3

    def score(answer, entry):
        return float(answer == entry["answer"]) if entry["metadata"]["kind"] == "x" else entry["question"]

    def broken(row, answer):
        raise KeyError("solution")

    module.score, module.broken = score, broken
    return module


def test_graders_of_ones_own(own_graders):
    assert find_grader("own_graders:half")(row("x"), "y") == 0.5
    assert find_grader("own_graders:counted")(row("x", extra={"key": "k"}), "k") == 1.0
    assert find_grader("own_graders:counted")(row("x", extra={"key": "k"}), "l") == 0.0


def test_a_scorer_in_the_style_of_reasoning_gym_gets_the_entry(own_graders):
    scorer = find_grader("own_graders:score")
    given_row = row("long form", extra={"answer": "5", "metadata": {"kind": "x"}})
    assert scorer(given_row, "5") == 1.0 and scorer(given_row, "long form") == 0.0
    assert scorer(row("6", extra={"metadata": {"kind": "x"}}), "6") == 1.0


@pytest.mark.parametrize("value", ["2.0", "-0.1", "NaN", "Infinity", '"1"', "null", "[1]"])
def test_a_grader_that_returns_no_share_is_refused_by_name_and_row(own_graders, value):
    with pytest.raises(InputError, match=r"^rows.jsonl:7: the grader own_graders:returns returned .*0 to 1\.$"):
        find_grader("own_graders:returns")(row("x"), value)


def test_a_grader_that_raises_names_the_row(own_graders):
    with pytest.raises(
        InputError, match=r"^rows.jsonl:7: the grader own_graders:broken failed .* KeyError: 'solution'"
    ):
        find_grader("own_graders:broken")(row("x"), "y")


@pytest.mark.parametrize(
    "name, words",
    [
        ("exct", "unknown grader 'exct'; did you mean 'exact'"),
        ("", "unknown grader"),
        ("own_graders:", "unknown grader"),
        ("no_such_module_here:f", "there is no module 'no_such_module_here'"),
        ("own_graders:halv", "did you mean 'half'"),
        ("own_graders:number", "not a function"),
    ],
)
def test_a_grader_that_is_not_there(own_graders, name, words):
    with pytest.raises(InputError) as caught:
        find_grader(name)
    assert words in str(caught.value)


@pytest.mark.parametrize("name, wanted", [("number", "none"), ("choice-letter", "Paris"), ("json", "[1")])
def test_an_expected_answer_the_grader_cannot_read_is_the_rows_fault(name, wanted):
    with pytest.raises(InputError, match=r"^rows.jsonl:7: the expected answer"):
        find_grader(name)(row(wanted), "1")
