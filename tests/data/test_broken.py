"""Broken rows, files, callables and settings: each gives one sentence with its place, and no traceback."""

from __future__ import annotations

import json

import pytest

from luthier.data.read import import_callable, read_rows
from luthier.errors import InputError

# -- what is broken: name, bytes, keys of the settings, the sentence from behind the name on

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello"}


def chat(*messages, **columns):
    return json.dumps({"messages": messages, **columns})


def shared(*turns):
    return json.dumps({"conversations": turns})


def assistant(**keys):
    return chat(USER, {"role": "assistant", **keys})


BROKEN = [
    # files
    ("empty.jsonl", b"", {}, ": there are no rows"),
    ("empty.json", b"", {}, ": there are no rows"),
    ("empty_array.json", b"[ ]", {}, ": there are no rows"),
    ("empty.csv", b"", {}, ": there are no rows"),
    ("header_only.csv", b"text\n", {}, ": there are no rows"),
    ("white.jsonl", b" \n\t\r\n  ", {}, ": there are no rows"),
    ("a.docx", b"PK", {}, ": files that end in '.docx' cannot be read; known are .jsonl"),
    ("noending", b"x", {}, ": files without an ending cannot be read"),
    ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', {}, ":2: byte 0xe9 at column 14 is not UTF-8"),
    ("latin.json", b'[{"text": "a"},\n\n{"text": "caf\xe9"}]', {}, ":3: byte 0xe9 at column 14 is not UTF-8"),
    ("latin.csv", b"text\nok\ncaf\xe9\n", {}, ":3: byte 0xe9 at column 4 is not UTF-8"),
    ("wide.jsonl", '{"text": "a"}'.encode("utf-16"), {}, ":1: the text is UTF-16"),
    ("cut.jsonl", b'{"text": "a"}\n{"text": "b', {}, ":2: the JSON breaks off in the middle of a value"),
    ("cut.json", b'[{"text": "a"},\n{"text": "b"', {}, ":2: the JSON breaks off in the middle of a value"),
    ("cut_between.json", b'[{"text": "a"},\n{"text": "b"}\n', {}, ":3: the array breaks off"),
    ("cut_comma.json", b'[{"text": "a"},\n', {}, ":2: the JSON breaks off"),
    ("comma.json", b'[{"text": "a"},\n]', {}, ":2: a comma before the end of the array"),
    ("no_comma.json", b'[{"text": "a"}\n{"text": "b"}]', {}, ":2: expected ',' or ']', found '{'"),
    ("more.json", b'[{"text": "a"}] x', {}, ":1: 'x' follows the end of the array"),
    ("python.json", b"[{'text': 'a'}]", {}, ":1: not valid JSON: Expecting property name"),
    ("python.jsonl", b"{'text': 'a'}", {}, ":1: not valid JSON at column 2"),
    ("one_object.json", b'{\n"text": "a"}', {}, ":1: the JSON breaks off"),
    ("two.jsonl", b'{"text": "a"} {"text": "b"}', {}, ":1: not valid JSON at column 15: Extra data"),
    ("nan.jsonl", b'{"text": "a", "s": {"b": [1, NaN]}}', {}, ":1, s.b[1]: NaN is not a JSON number"),
    ("infinity.json", b'[{"text": "a", "s": -Infinity}]', {}, ":1, s: -Infinity is not a JSON number"),
    ("digits.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", {}, ":1: not readable as JSON"),
    ("deep.jsonl", b"[" * 10, {}, ":1: the first row is a list, not an object; if the file is one JSON array"),
    ("nested.jsonl", b'{"text":' + b"[" * 200000, {}, ":1: the JSON is nested too deeply"),
    ("list.jsonl", b'{"text": "a"}\n["a"]\n', {}, ":2: the row is of type list, not a mapping"),
    ("text.json", b'["a", "b"]', {}, ":1: the row is of type str, not a mapping"),
    ("number.jsonl", b"7\n", {}, ":1: the row is of type int, not a mapping"),
    ("surrogate.jsonl", b'{"text": "\\ud800"}', {}, ":1: the text holds half of a surrogate pair"),
    ("giant.jsonl", b'{"text": "a"}\n{"text": "' + b"x" * 2000 + b'"}', {}, ":2: the line is longer than 1000 bytes"),
    ("giant.json", b'[\n{"text": "' + b"x" * 4000 + b'"}]', {}, ":2: the element that begins here is longer"),
    ("giant.csv", b"text\nok\n" + b"x" * 2000, {}, ":3: the line is longer than 1000 bytes"),
    ("open.csv", b'text\nok\n"x\n' + b"x\n" * 2000, {}, ":3: the row that begins here is longer than 1000 bytes"),
    ("quote.csv", b'text\nok\n"x\nx\n', {}, ":3: a quotation mark is left open"),
    ("behind.csv", b'text\n"x"y\n', {}, ":2: not a table"),
    ("ragged.csv", b"prompt,completion\na,b\nc,d,e\n", {}, ":3: the row has 3 columns, the header has 2"),
    ("double.csv", b"text,text\na,b\n", {}, ":1: the header names the column 'text' twice"),
    ("unnamed.csv", b"text,\na,b\n", {}, ":1: column 2 has no name"),
    ("no_match.csv", b"alpha,beta\na,b\n", {}, ":2: no form has the columns alpha, beta; name them in"),
    ("cut.parquet", b"PAR1 and then nothing", {}, ": not a whole Parquet file"),
    ("cut.arrow", b"ARROW1 and then nothing", {}, ": not a whole Arrow file"),
    ("empty.parquet", b"", {}, ": not a whole Parquet file"),
    # forms and columns
    ("near.jsonl", b'{"promt": "a", "completion": "b"}', {}, ":1: the column 'prompt' is missing beside"),
    ("nothing.jsonl", b"{}", {}, ":1: no form has the columns (none)"),
    ("texts.jsonl", b'{"texts": "a"}', {}, ":1: no form has the columns texts; for 'texts', did you mean 'text'?"),
    ("missing.jsonl", b'{"prompt": "a"}', {}, ":1: the column 'completion' is missing beside 'prompt'"),
    (
        "later.jsonl",
        b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}',
        {},
        ":2, completion: the column is missing",
    ),
    ("null.jsonl", b'{"prompt": "a", "completion": null}', {}, ":1, completion: the column is null"),
    ("typed.jsonl", b'{"prompt": "a", "completion": 5}', {}, ":1, completion: expected text, got int"),
    ("text_list.jsonl", b'{"text": ["a"]}', {}, ":1, text: expected text, got list"),
    ("mixed.jsonl", b'{"text": "a"}\n' + chat(USER, REPLY).encode(), {}, ":2: mixed forms: the row is messages"),
    ("schema.jsonl", b'{"text": "a"}', {"schema": "completion"}, ":1, prompt: the column is missing"),
    (
        "columns.jsonl",
        b'{"text": "a", "answer": "b"}',
        {"columns": {"prompt": "question", "completion": "answer"}, "schema": "completion"},
        ":1, question: the column is missing",
    ),
    (
        "label.jsonl",
        b'{"text": "a", "clas": 1}',
        {"label_key": "class"},
        ":1, class: the column is missing; data.label_key names it; did you mean 'clas'?",
    ),
    (
        "label_type.jsonl",
        b'{"text": "a", "c": 1.5}',
        {"label_key": "c"},
        ":1, c: expected text or a whole number, got float",
    ),
    (
        "group.jsonl",
        b'{"text": "a", "g": null}',
        {"group_key": "g"},
        ":1, g: expected text or a whole number, got null",
    ),
    # conversations
    ("none.jsonl", chat(), {}, ":1, messages: the list of messages is empty"),
    ("word.jsonl", json.dumps({"messages": "hello"}), {}, ":1, messages: expected a list, got text"),
    ("map.jsonl", json.dumps({"messages": {"role": "user"}}), {}, ":1, messages: expected a list, got dict"),
    ("entry.jsonl", chat("hi"), {}, ":1, messages[0]: expected a message (a mapping), got str"),
    ("norole.jsonl", chat(USER, {"content": "x"}), {}, ":1, messages[1].role: the message has no role"),
    (
        "role.jsonl",
        chat(USER, {"role": "asistant", "content": "x"}),
        {},
        ":1, messages[1].role: unknown role 'asistant'; did you mean 'assistant'?",
    ),
    (
        "human.jsonl",
        chat({"role": "human", "content": "x"}),
        {},
        ":1, messages[0].role: unknown role 'human'; in ShareGPT's form",
    ),
    ("role_type.jsonl", chat({"role": ["user"], "content": "x"}), {}, ":1, messages[0].role: unknown role"),
    ("null_content.jsonl", assistant(content=None), {}, ":1, messages[1].content: content is null without tool_calls"),
    (
        "no_content.jsonl",
        assistant(contents="x"),
        {},
        ":1, messages[1].content: the message has no content; did you mean 'contents'?",
    ),
    ("number_content.jsonl", assistant(content=7), {}, ":1, messages[1].content: expected text, got int"),
    (
        "image.jsonl",
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, REPLY),
        {},
        ":1, messages[0].content[0]: a part of kind 'image_url' cannot be learned from",
    ),
    (
        "part.jsonl",
        assistant(content=[{"type": "text", "text": 5}]),
        {},
        ":1, messages[1].content[0].text: expected text, got int",
    ),
    ("silent.jsonl", chat(USER, USER), {}, ":1, messages: the assistant never speaks"),
    ("first.jsonl", chat(REPLY, USER), {}, ":1, messages: the first message is the assistant's"),
    (
        "calls.jsonl",
        assistant(content=None, tool_calls=[{"function": {}}]),
        {},
        ":1, messages[1].tool_calls[0]: a tool call needs a function with a name",
    ),
    ("tools.jsonl", chat(USER, REPLY, tools=["t"]), {}, ":1, tools[0]: expected a tool (a mapping), got str"),
    (
        "weight.jsonl",
        assistant(content="x", weight=0),
        {},
        ":1, messages[1]: the mark weight: 0 on a message is not supported",
    ),
    (
        "from.jsonl",
        shared({"from": "humn", "value": "x"}),
        {},
        ":1, conversations[0].from: unknown speaker 'humn'; did you mean 'human'",
    ),
    ("value.jsonl", shared({"from": "human"}), {}, ":1, conversations[0].value: the turn has no value"),
    (
        "call.jsonl",
        shared({"from": "human", "value": "x"}, {"from": "function_call", "value": "run()"}),
        {},
        ":1, conversations[1].value: a function_call must be JSON",
    ),
    # Alpaca
    (
        "no_output.jsonl",
        b'{"instruction": "a", "input": ""}',
        {},
        ":1: the column 'output' is missing beside 'instruction'",
    ),
    (
        "history.jsonl",
        b'{"instruction": "a", "output": "b", "history": [["q"]]}',
        {},
        ":1, history[0]: expected a pair of texts",
    ),
    (
        "no_question.jsonl",
        b'{"instruction": " ", "output": "b"}',
        {},
        ":1, instruction: instruction and input are both empty",
    ),
    # preference
    (
        "no_rejected.jsonl",
        b'{"prompt": "a", "chosen": "b"}',
        {},
        ":1: the column 'rejected' is missing beside 'chosen'",
    ),
    ("no_prompt.jsonl", b'{"chosen": "a", "rejected": "b"}', {}, ":1, prompt: the column is missing"),
    (
        "sides.jsonl",
        json.dumps({"chosen": [USER, REPLY], "rejected": [USER]}),
        {},
        ":1, rejected: the answer does not begin with the assistant",
    ),
    (
        "apart.jsonl",
        json.dumps({"chosen": [USER, REPLY], "rejected": [{**USER, "content": "ho"}, REPLY]}),
        {},
        ":1, prompt: no prompt, and the two sides begin differently",
    ),
    (
        "equal.jsonl",
        json.dumps({"chosen": [REPLY], "rejected": [REPLY]}),
        {},
        ":1, prompt: no prompt, and the two sides begin differently",
    ),
    # unpaired
    (
        "label.jsonl",
        b'{"prompt": "a", "completion": "b", "label": true}\n{"prompt": "a", "completion": "c", "label": 1}',
        {},
        ":2, label: expected true or false (a good or a bad answer), got '1'",
    ),
    (
        "class.jsonl",
        b'{"prompt": "a", "completion": "b", "label": "spam"}',
        {"form": "unpaired"},
        ":1, label: expected true or false (a good or a bad answer), got 'spam'",
    ),
    (
        "null.jsonl",
        b'{"prompt": "a", "completion": "b", "label": null}',
        {"form": "unpaired"},
        ":1, label: the column is null, which rows of the form unpaired need",
    ),
    (
        "no_label.jsonl",
        b'{"prompt": "a", "completion": "b", "label": false}\n{"prompt": "a", "completion": "c"}',
        {},
        ":2: mixed forms: the row is completion, those before it are unpaired",
    ),
    (
        "turns.jsonl",
        json.dumps({"prompt": [USER], "completion": [REPLY, USER], "label": True}),
        {},
        ":1, completion: expected one message of the assistant",
    ),
]


@pytest.mark.parametrize(("name", "content", "keys", "sentence"), BROKEN, ids=[case[0] for case in BROKEN])
def test_what_is_broken_is_said_with_its_place(write, data, monkeypatch, name, content, keys, sentence):
    path = write(name, content)
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr("luthier.data.json_rows.CHUNK_BYTES", 512)
    limit = 1000 if name.startswith(("giant", "open")) else 64 * 2**20
    with pytest.raises(InputError) as caught:
        list(read_rows(name, data(name, **keys), max_row_bytes=limit))
    assert str(caught.value).startswith(name + sentence), caught.value
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


CALLABLES = """
def number(): return 7
def mapping(): return {"text": "a"}
def text(): return "rows"
def lists(): return [["a"]]
def nothing(): return []
def breaks():
    yield {"text": "a"}
    raise RuntimeError("no more")
def fails(): raise OSError("no way")
def picture(): return [{"text": "a", "image": b"\\x00"}]
value = 3
"""


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("no_such_module_here:rows", {}, "no_such_module_here:rows: there is no module 'no_such_module_here'"),
        ("house_broken:lsits", {}, "house_broken:lsits: house_broken has no 'lsits'; did you mean 'lists'"),
        ("house_broken:value", {}, "house_broken:value: value is of type int, not a function"),
        ("house_syntax:rows", {}, "house_syntax:rows: importing failed: SyntaxError"),
        ("house_broken:number", {}, "house_broken:number: the callable gave int, not rows"),
        ("house_broken:mapping", {}, "house_broken:mapping: the callable gave dict, not rows"),
        ("house_broken:text", {}, "house_broken:text: the callable gave str, not rows"),
        ("house_broken:lists", {}, "house_broken:lists:1: the row is of type list, not a mapping"),
        ("house_broken:nothing", {}, "house_broken:nothing: there are no rows"),
        ("house_broken:nothing", {"x": 1}, "house_broken:nothing: the callable failed: TypeError"),
        ("house_broken:breaks", {}, "house_broken:breaks:2: the callable failed at this row: RuntimeError: no more"),
        ("house_broken:fails", {}, "house_broken:fails: the callable failed: OSError: no way"),
        ("house_broken:picture", {}, "house_broken:picture:1, image: a value of type bytes cannot be kept"),
    ],
)
def test_broken_callables(write, data, monkeypatch, name, arguments, sentence):
    monkeypatch.chdir(write("house_broken.py", CALLABLES).parent)
    write("house_syntax.py", "def rows(:\n")
    source = {"callable": name, "arguments": arguments}
    with pytest.raises(InputError) as caught:
        list(read_rows(source, data(source)))
    assert str(caught.value).startswith(sentence), caught.value


def test_broken_paths(tmp_path, write, data, monkeypatch):
    """A folder for a file, a file that is not there, a saved data set in pieces."""
    monkeypatch.chdir(tmp_path)
    write("chats.jsonl", [{"text": "a"}])
    write("plain/rows.jsonl", [{"text": "a"}])
    write("empty_folder/readme", "x")
    write("set/state.json", "{}")
    write("parts/dataset_dict.json", '{"splits": ["a", "b"]}')
    write("unlisted/dataset_dict.json", "[]")
    write("gone/dataset_dict.json", '{"splits": ["train"]}')
    expected = {
        "plain": "plain: the folder holds no saved data set (no state.json); name a file in it: rows.jsonl.",
        "empty_folder": "empty_folder: the folder holds no saved data set (no state.json)",
        "set": "set: not a whole saved data set",
        "parts": "parts: the data set has the parts a, b; name one of them, such as parts/a",
        "unlisted": "unlisted/dataset_dict.json: does not list the parts",
        "gone": "gone/train: the folder holds no saved data set",
        "chat.jsonl": "chat.jsonl: there is no such file; did you mean 'chats.jsonl'?",
        "nowhere/a.jsonl": "nowhere/a.jsonl: there is no folder 'nowhere'",
        "/dev/null": "/dev/null: files without an ending cannot be read",
    }
    for path, sentence in expected.items():
        with pytest.raises(InputError) as caught:
            list(read_rows(path, data(path)))
        assert str(caught.value).startswith(sentence), caught.value


@pytest.mark.parametrize("name", ["plain", "a:", ":b", ""])
def test_a_callable_needs_module_and_function(name):
    with pytest.raises(InputError, match="expected module:function"):
        import_callable(name)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"split": [0.5, 0.5, 0.5]}, "sum to 1"),
        ({"split": [float("nan"), 0.5, 0.5]}, "sum to 1"),
        ({"split": [0.0, 0.5, 0.5]}, "training rows is 0"),
        ({"split": [0.9, 0.1]}, "split"),
        ({"columns": {"promt": "a"}}, "did you mean 'prompt'"),
        ({"columns": {"prompt": "a", "completion": "a"}}, "two canonical"),
        ({"source": []}, "empty"),
        ({"source": 5}, "expected a path"),
        ({"source": {"path": "a", "callable": "b:c"}}, "not both"),
        ({"source": {"callable": "b"}}, "module:function"),
        ({"source": {"path": "a", "weight": 0}}, "greater than 0"),
        ({"source": {"path": "a", "arguments": {"n": 1}}}, "belong to a callable"),
        ({"balance": "oversample"}, "needs label_key"),
        ({"max_length": 1}, "greater than or equal to 2"),
        ({"schema": "openai"}, "'messages'"),
        ({"sorce": "a"}, "Extra inputs"),
    ],
)
def test_settings_refuse_what_makes_no_sense(data, keys, words):
    keys = {"source": "a.jsonl", **keys}
    with pytest.raises(ValueError, match=words):
        data(keys.pop("source"), **keys)
