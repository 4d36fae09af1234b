"""Laws of the arithmetic world: right answers by independent code, seeds that repeat, parts that never meet."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest

from luthier.errors import InputError
from luthier.worlds import arithmetic
from luthier.worlds.parts import belongs, part_of


def oracle(skill: str, question: str) -> str:
    """The answer, read from the question's words alone."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    spaced = " ".join
    return {
        "add": lambda: str(sum(numbers)),
        "subtract": lambda: str(numbers[1] - numbers[0]),
        "larger": lambda: str(max(numbers)),
        "smaller": lambda: str(min(numbers)),
        "copy": lambda: spaced(map(str, numbers)),
        "reverse": lambda: spaced(map(str, numbers[::-1])),
        "sort": lambda: spaced(map(str, sorted(numbers))),
        "swap": lambda: spaced(map(str, [numbers[-1], *numbers[1:-1], numbers[0]])),
    }[skill]()


def questions(**arguments) -> list[str]:
    return [row["messages"][0]["content"] for row in arithmetic.rows(**arguments)]


@pytest.mark.parametrize("skill", sorted(arithmetic.SKILLS))
def test_answers_agree_with_the_oracle_and_the_grader(skill):
    for row in arithmetic.rows(skill, count=200, seed=5):
        question, answer = (message["content"] for message in row["messages"])
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert answer == row["answer"] == oracle(skill, question)
        assert arithmetic.grade(row, f" {answer}\n") == 1.0
        assert arithmetic.grade(row, answer + "0") == arithmetic.grade(row, "") == 0.0


@pytest.mark.parametrize("skill", sorted(arithmetic.SKILLS))
def test_seeds_repeat_and_parts_never_meet(skill):
    train = questions(skill=skill, count=300, seed=0, part="train")
    assert train == questions(skill=skill, count=300, seed=0, part="train")
    assert train[:50] == questions(skill=skill, count=50, seed=0, part="train")
    assert train != questions(skill=skill, count=300, seed=1, part="train")
    assert len(set(train)) == 300
    for seed in (0, 1):
        assert not set(train) & set(questions(skill=skill, count=200, seed=seed, part="test"))


def test_several_skills_take_turns():
    names = [row["skill"] for row in arithmetic.rows(["sort", "add"], count=6)]
    assert names == ["sort", "add"] * 3


def test_learned_and_unseen_divide_the_skills():
    assert not set(arithmetic.LEARNED) & set(arithmetic.UNSEEN)
    assert set(arithmetic.SKILLS) == set(arithmetic.LEARNED) | set(arithmetic.UNSEEN)


def test_global_random_state_is_left_alone():
    before = random.getstate()
    list(arithmetic.rows("add", count=10))
    assert random.getstate() == before


def test_a_quarter_of_all_questions_are_test_questions():
    share = sum(part_of(f"question {i}") == "test" for i in range(4000)) / 4000
    assert abs(share - 0.25) < 0.03  # four standard deviations of a fair draw
    assert all(belongs(f"question {i}", "all") for i in range(10))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"skill": "addd"}, "did you mean 'add'"),
        ({"skill": []}, "no skill is named"),
        ({"part": "valid"}, "unknown part 'valid'"),
        ({"count": 0}, "got 0"),
        ({"count": "many"}, "got 'many'"),
        ({"count": True}, "got True"),
        ({"seed": 0.5}, "seed: expected a whole number, got 0.5"),
        ({"skill": "add", "count": 20_000, "part": "test"}, "ask for fewer rows"),
    ],
)
def test_wrong_arguments_are_told(arguments, words):
    with pytest.raises(InputError, match=re.escape(words)):
        list(arithmetic.rows(**arguments))


def test_the_room_imports_nothing_heavy():
    code = (
        "import sys; from luthier.worlds import arithmetic, everyday, parts, reasoning, text, tiny; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'reasoning_gym')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pairs_are_the_rows_with_a_right_and_a_wrong_answer():
    for row, pair in zip(arithmetic.rows("swap", 30, seed=2), arithmetic.pairs("swap", 30, seed=2), strict=True):
        assert pair["prompt"] == row["messages"][:1] and pair["chosen"] == row["messages"][1:]
        assert arithmetic.grade(row, pair["chosen"][0]["content"]) == 1
        assert arithmetic.grade(row, pair["rejected"][0]["content"]) == 0
