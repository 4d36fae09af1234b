"""Forms: what is recognised, and that each one becomes the canonical columns it stands for."""

from __future__ import annotations

import json
from datetime import date

import numpy as np
import pytest

from luthier.data.forms import canonical, recognise
from luthier.data.read import read_rows
from luthier.errors import InputError

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.fixture
def made(data):
    """`made(row, **keys)` is the canonical row without `where` and `id`, as reading makes it."""

    def maker(row, **keys):
        settings = data("x", **keys)
        form = recognise(row, settings) if settings.form == "auto" else settings.form
        result = canonical(row, settings, form=form, where="f:1")
        assert result.pop("where") == "f:1" and len(result.pop("id")) == 16
        return result

    return maker


@pytest.mark.parametrize(
    ("form", "keys"),
    [
        ("text", ["text"]),
        ("text", ["text", "prompt", "score"]),
        ("completion", ["prompt", "completion"]),
        ("completion", ["question", "answer", "text"]),
        ("completion", ["prompt", "response"]),
        ("alpaca", ["instruction", "input", "output", "text"]),
        ("sharegpt", ["conversations", "id"]),
        ("messages", ["messages", "prompt", "prompt_id"]),
        ("preference", ["prompt", "chosen", "rejected", "messages"]),
        ("completion", ["prompt", "completion", "label"]),  # a label that is neither true nor false
        (None, ["input", "output"]),
        (None, []),
    ],
)
def test_the_keys_decide(data, form, keys):
    assert recognise(dict.fromkeys(keys), data("x")) == form


def test_own_column_names(made, data):
    columns = {"prompt": "input", "completion": "output"}
    row = {"input": "a", "output": "b", "prompt": "not this one"}
    assert recognise(row, data("x", columns=columns)) == "completion"
    expected = {"prompt": "a", "completion": "b", "extra": {"prompt": "not this one"}}
    assert made(row, columns=columns) == expected


def test_three_ways_to_say_the_same(made):
    """OpenAI's, ShareGPT's and Alpaca's form of one conversation are one canonical row."""
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    forms = [
        {"messages": [SYSTEM, USER, REPLY]},
        {"messages": json.dumps([SYSTEM, USER, REPLY])},
        {"conversations": [{"from": "system", "value": "Be kind."}, *shared]},
        {"conversations": shared, "system": "Be kind."},
        {"conversations": [SYSTEM, USER, REPLY]},
        {"instruction": "hi", "input": "", "output": "hello", "system": "Be kind."},
        {"instruction": "", "input": "hi", "output": "hello", "system": "Be kind."},
        {"prompt": [SYSTEM, USER], "completion": [REPLY]},
    ]
    for form in forms:
        assert made(form) == {"messages": [SYSTEM, USER, REPLY]}, form


def test_alpaca_joins_instruction_and_input_and_tells_the_history(made):
    row = {"instruction": "Translate.", "input": "eins", "output": "one", "history": [["hi", "hello"], ["a", "b"]]}
    contents = [message["content"] for message in made(row)["messages"]]
    assert contents == ["hi", "hello", "a", "b", "Translate.\n\neins", "one"]


def test_messages_keep_what_templates_read(made):
    """Tool calls, names and reasoning stay; keys that a table filled with null go; text parts are joined."""
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "2 "}, {"type": "text", "text": "and 2?"}],
            "name": "Ann",
        },
        {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None},
        {"role": "tool", "content": "4", "tool_call_id": "c1", "tool_calls": None},
        {"role": "assistant", "content": "Four.", "reasoning_content": "2 + 2", "weight": 1, "tool_calls": []},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"required": None}}}]
    row = made({"messages": messages, "tools": json.dumps(tools)})
    assert row == {
        "messages": [
            {"role": "user", "content": "2 and 2?", "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "4", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Four.", "reasoning_content": "2 + 2"},
        ],
        "tools": tools,
    }


def test_sharegpt_calls_become_tool_calls(made):
    turns = [
        {"from": "human", "value": "2 and 2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "Four."},
    ]
    messages = made({"conversations": turns, "tools": "[]"})["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    function = {"name": "add", "arguments": {"a": 2, "b": 2}}
    assert messages[1]["tool_calls"] == [{"type": "function", "function": function}]


def test_preference_in_four_ways(made):
    bad = {"role": "assistant", "content": "go away"}
    assert made({"prompt": "hi", "chosen": "a", "rejected": "b"}) == {"prompt": "hi", "chosen": "a", "rejected": "b"}
    expected = {"prompt": [USER], "chosen": [REPLY], "rejected": [bad]}
    assert made({"prompt": [USER], "chosen": [REPLY], "rejected": [bad]}) == expected
    assert made({"chosen": [USER, REPLY], "rejected": [USER, bad]}) == expected
    assert made({"prompt": "hi", "chosen": [USER, REPLY], "rejected": [USER, bad]}) == expected
    assert made({"prompt": "hi", "chosen": [REPLY], "rejected": [bad]}) == {**expected, "prompt": "hi"}


@pytest.mark.parametrize("label", [True, np.bool_(True), "true", " True "])
def test_a_label_that_is_true_or_false_makes_an_unpaired_row(made, label):
    plain = {"prompt": "hi", "completion": "a", "desirable": True}
    for names in (("prompt", "completion"), ("prompt", "response"), ("question", "answer")):
        row = made(dict(zip(names, ("hi", "a"), strict=True)) | {"label": label})
        assert {**row, "extra": None} == {**plain, "extra": None} and set(row["extra"]) == {"label"}
    row = made({"prompt": "hi", "completion": "a", "liked": "FALSE"}, columns={"label": "liked"})
    assert row["desirable"] is False
    talk = made({"prompt": [SYSTEM, USER, REPLY, USER], "completion": [REPLY], "label": label})
    assert (talk["prompt"], talk["completion"]) == ([SYSTEM, USER, REPLY, USER], [REPLY])


def test_a_label_that_the_recipe_calls_a_class_stays_one(made):
    row = {"prompt": "hi", "completion": "a", "label": True}
    assert made(row, label_key="label") == {"prompt": "hi", "completion": "a", "label": "true"}
    both = made(row, label_key="label", form="unpaired")
    assert both == {"prompt": "hi", "completion": "a", "desirable": True, "label": "true"}


def test_equal_sides_are_read(made):
    expected = {"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY]}
    assert made({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}) == expected
    assert made({"prompt": "hi", "chosen": "a", "rejected": "a"}) == {"prompt": "hi", "chosen": "a", "rejected": "a"}


def test_a_prompt_with_answers_in_it_is_not_made_a_conversation(made):
    with pytest.raises(InputError, match="a prompt with earlier answers"):
        made({"prompt": [USER, REPLY, USER], "completion": [REPLY]})


def test_labels_groups_and_extra_columns(made):
    row = {"text": "a", "class": np.int64(3), "who": 7, "when": date(2026, 1, 2), "score": float("nan"), "n": [1, None]}
    expected = {"text": "a", "label": 3, "group": "7", "extra": {"when": "2026-01-02", "score": None, "n": [1, None]}}
    assert made(row, label_key="class", group_key="who") == expected
    assert made({"text": "a", "c": True}, label_key="c")["label"] == "true"
    assert made({"text": "a", "c": 2.0}, label_key="c")["label"] == 2
    row = {"prompt": "p", "completion": "yes"}
    assert made(row, label_key="completion") == {**row, "label": "yes"}


def test_rows_to_generate_from_need_no_answer(write, data):
    files = [[{"prompt": "p", "answer": 5}], [{"question": "p"}], [{"messages": [USER]}], [{"prompt": [USER]}]]
    made = []
    for rows in files:
        path = write("a.jsonl", rows)
        with pytest.raises(InputError):
            list(read_rows(path, data("x")))
        made += read_rows(path, data("x"), answers=False)
    assert [{**row, "where": 0, "id": 0} for row in made] == [
        {"where": 0, "id": 0, "prompt": "p", "extra": {"answer": 5}},
        {"where": 0, "id": 0, "prompt": "p"},
        {"where": 0, "id": 0, "messages": [USER]},
        {"where": 0, "id": 0, "messages": [USER]},
    ]


def test_the_id_is_of_the_content_alone(data):
    def identity(row, **keys):
        return canonical(row, data("x", **keys), form="text", where="anywhere")["id"]

    assert identity({"text": "a"}) == identity({"text": "a", "b": 1}, label_key="b")
    assert identity({"text": "a"}) != identity({"text": "A"})


def test_the_row_that_came_is_not_changed(made):
    row = {"chosen": [USER, REPLY], "rejected": [USER, {"role": "assistant", "content": "no"}], "n": [1]}
    before = json.dumps(row)
    made(row)
    assert json.dumps(row) == before
