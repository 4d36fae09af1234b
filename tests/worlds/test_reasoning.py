"""Laws of the reasoning-gym source: rows that repeat and never leak, and a grader that rebuilds the puzzle."""

from __future__ import annotations

import json
import re
import sys

import pytest

from luthier.errors import InputError
from luthier.worlds import reasoning

pytest.importorskip("reasoning_gym")

SIBLINGS = {"task_type_weights": [1.0, 0.0, 0.0]}
TASKS = {
    "aiw": SIBLINGS,
    "chain_sum": {"min_terms": 2, "max_terms": 3, "max_digits": 2},
    "basic_arithmetic": {"max_terms": 3},
    "spell_backward": {"max_word_len": 5},
    "letter_counting": {"max_words": 6},
    "gcd": {},
    "lcm": {},
    "simple_equations": {},
    "number_sequence": {},
    "fraction_simplification": {},
    "family_relationships": {},
    "syllogism": {},
    "calendar_arithmetic": {},
    "number_filtering": {},
    "prime_factorization": {},
    "time_intervals": {},
}


def questions(*arguments, **named) -> list[str]:
    return [row["messages"][-2]["content"] for row in reasoning.rows(*arguments, **named)]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_row_passes_its_own_grader_even_after_json(task):
    for row in reasoning.rows(task, count=8, seed=2, config=TASKS[task]):
        canonical = json.loads(json.dumps({"messages": row.pop("messages"), "extra": row}))
        assert reasoning.grade(canonical, row["answer"]) == 1.0
        assert reasoning.grade(canonical, "no idea") == 0.0


def test_seeds_repeat_neighbours_differ_and_parts_never_meet():
    train = questions("aiw", 150, 0, "train", config=SIBLINGS)
    assert train == questions("aiw", 150, 0, "train", config=SIBLINGS)
    assert len(set(train)) == 150
    assert len(set(train) & set(questions("aiw", 150, 1, "train", config=SIBLINGS))) < 30
    assert not set(train) & set(questions("aiw", 60, 0, "test", config=SIBLINGS))
    assert not set(train) & set(questions("aiw", 60, 1, "test", config=SIBLINGS))


def test_a_sum_of_the_training_part_is_not_asked_of_other_people_in_the_test_part():
    def numbers(part):
        found = questions("aiw", 80, 0, part, config={**SIBLINGS, "max_entities": 9})
        return {tuple(re.findall(r"\d+", question)) for question in found}

    assert not numbers("train") & numbers("test")


def test_chatty_answers_are_graded_by_their_last_number():
    row = next(reasoning.rows("chain_sum", count=1, config={"max_terms": 2, "max_digits": 1}))
    right = row["answer"]
    assert reasoning.grade(row, f"The answer is {right}.") == 1.0
    assert reasoning.grade(row, f"It is {right}, or perhaps 1234.") == 0.0
    assert reasoning.grade(row, "") == 0.0


def test_partial_credit_is_not_full_marks():
    row = next(reasoning.rows("spell_backward", count=1, config={"min_word_len": 5}))
    wrong = row["answer"][:-1] + ("x" if row["answer"][-1] != "x" else "y")
    assert reasoning.grade(row, wrong) == 0.0


def test_the_system_message_comes_first():
    row = next(reasoning.rows("aiw", count=1, system="Answer with a number."))
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"task": "chain_summ"}, "did you mean 'chain_sum'"),
        ({"task": "aiw", "config": {"colour": 1}}, "refuses the settings of aiw"),
        ({"task": "chain_sum", "config": {"min_terms": 5, "max_terms": 2}}, "refuses the settings of chain_sum"),
        ({"task": "aiw", "part": "dev"}, "unknown part 'dev'"),
        ({"task": "aiw", "count": -1}, "got -1"),
        ({"task": "aiw", "seed": "0"}, "seed: expected a whole number, got '0'"),
        ({"task": ["aiw"]}, "expected the name of a task"),
        ({"task": "aiw", "config": "max_entities"}, "expected settings made of"),
        ({"task": "aiw", "config": {"max_entities": {1, 2}}}, "expected settings made of"),
        ({"task": "products", "count": 500, "config": {"max_digits": 1}}, "ask for fewer rows"),
    ],
)
def test_wrong_arguments_are_told(arguments, words):
    with pytest.raises(InputError, match=re.escape(words)):
        list(reasoning.rows(**arguments))


def test_rows_of_another_source_are_refused():
    with pytest.raises(InputError, match="lacks task, config, seed, index"):
        reasoning.grade({"messages": []}, "1")


def test_a_missing_package_is_told_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    reasoning._puzzles.cache_clear()
    with pytest.raises(InputError, match="pip install reasoning-gym"):
        list(reasoning.rows("aiw", count=1))
