"""Laws of the two sources that watch for forgetting."""

from __future__ import annotations

import pytest

from luthier.errors import InputError
from luthier.worlds import everyday, text
from luthier.worlds.parts import part_of


def test_passages_repeat_differ_and_have_the_asked_length():
    passages = [row["text"] for row in text.rows("scripture", count=80, words=40)]
    assert passages == [row["text"] for row in text.rows("scripture", count=80, words=40)]
    assert len(set(passages)) == 80
    assert all(len(passage.split()) == 40 for passage in passages)
    assert passages != [row["text"] for row in text.rows("scripture", count=80, words=40, seed=1)]


def test_the_story_is_prose():
    pytest.importorskip("reasoning_gym")
    passages = [row["text"] for row in text.rows("story", count=40)]
    assert len(set(passages)) == 40
    assert all("\n" not in passage and 30 <= len(passage.split()) <= 60 for passage in passages)


def test_every_everyday_answer_passes_its_grader():
    rows = list(everyday.rows(count=200))
    assert len({row["messages"][0]["content"] for row in rows}) == 200
    for row in rows:
        canonical = {"messages": row["messages"], "extra": {"keys": row["keys"]}}
        assert everyday.grade(canonical, row["messages"][-1]["content"]) == 1.0
        assert everyday.grade(canonical, row["keys"][-1].upper() + "!") == 1.0
        assert everyday.grade(canonical, "42 or so") == everyday.grade(canonical, "") == 0.0


def test_everyday_keys_match_whole_words_only():
    row = {"keys": ["ice"]}
    assert everyday.grade(row, "It is ice.") == 1.0
    assert everyday.grade(row, "Nice.") == 0.0


def test_everyday_parts_never_meet():
    test = list(everyday.rows(count=50, part="test"))
    assert all(part_of(row["messages"][0]["content"]) == "test" for row in test)
    train = {row["messages"][0]["content"] for row in everyday.rows(count=150, part="train")}
    assert not train & {row["messages"][0]["content"] for row in test}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: text.rows("storey"), "did you mean 'story'"),
        (lambda: text.rows(count=10_000), "10000 were asked"),
        (lambda: text.rows(words=0), "got 0"),
        (lambda: everyday.rows(count=10_000), "10000 were asked"),
        (lambda: everyday.rows(part="dev"), "unknown part 'dev'"),
        (lambda: [everyday.grade({}, "x")], "lacks keys"),
    ],
)
def test_wrong_arguments_are_told(call, words):
    with pytest.raises(InputError, match=words):
        list(call())
