"""Reading: every format gives the same rows, what is broken is named with its place, memory does not grow."""

from __future__ import annotations

import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq

from luthier.data.read import read_rows

ROWS = [
    {"prompt": "one", "completion": "eins", "note": "a, b"},
    {"prompt": 'two "2"\nlines', "completion": "zwei \u20ac", "note": ""},
    {"prompt": "three", "completion": "drei", "note": "\U0001f3bb"},
]


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows, separator):
    def cell(text):
        return '"' + text.replace('"', '""') + '"'

    return "\n".join(
        separator.join(cell(text) for text in line) for line in [list(rows[0]), *(r.values() for r in rows)]
    )


def test_all_formats_give_the_same_rows(tmp_path, write, data):
    """One content, ten files: equal ids, equal columns."""
    from datasets import Dataset, DatasetDict

    paths = [
        write("a.jsonl", json_lines(ROWS)),
        write("a.ndjson", "\n\n" + json_lines(ROWS) + "\n"),
        write("array.json", json.dumps(ROWS)),
        write("pretty.json", " \n" + json.dumps(ROWS, indent=4)),
        write("lines.json", json_lines(ROWS)),
        write("bom.jsonl", b"\xef\xbb\xbf" + json_lines(ROWS).encode()),
        write("bom.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        write("windows.jsonl", json_lines(ROWS).replace("\n", "\r\n")),
        write("a.csv", table(ROWS, ",")),
        write("bom.csv", b"\xef\xbb\xbf" + table(ROWS, ",").encode()),
        write("semicolon.csv", table([{k: v.replace(",", "") for k, v in row.items()} for row in ROWS], ";")),
        write("a.tsv", table(ROWS, "\t")),
    ]
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, pa.Table.from_pylist(ROWS).schema) as f,
    ):
        f.write_table(pa.Table.from_pylist(ROWS))
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "single")
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "both")
    paths += [tmp_path / name for name in ("a.parquet", "a.arrow", "single", "both", "both/train")]
    expected = list(read_rows(paths[0], data("unused")))
    assert [row["prompt"] for row in expected] == [row["prompt"] for row in ROWS]
    assert expected[0]["extra"] == {"note": "a, b"} and expected[0]["where"] == "a.jsonl:1"
    for path in paths:
        rows = list(read_rows(path, data("unused")))
        for row, wanted in zip(rows, expected, strict=True):
            assert {**row, "where": 0, "extra": 0} == {**wanted, "where": 0, "extra": 0}, path
    assert len(list(read_rows(tmp_path / "both" / "test", data("unused")))) == 1


def test_where_is_the_line_a_row_begins_on(write, data):
    texts = {
        "a.jsonl": '\n{"text": "a"}\n\n{"text": "b"}\n',
        "a.json": '[\n{"text":\n\n"a"},{"text": "b"}]',
        "a.csv": 'text\n"one\ntwo"\nthree\n\nfour\n',
    }
    lines = {name: [r["where"] for r in read_rows(write(name, text), data("x"))] for name, text in texts.items()}
    assert lines["a.jsonl"] == ["a.jsonl:2", "a.jsonl:4"]
    assert lines["a.json"] == ["a.json:2", "a.json:4"]
    assert lines["a.csv"] == ["a.csv:2", "a.csv:4", "a.csv:6"]


def test_arrays_are_read_alike_whatever_the_window(write, data, monkeypatch):
    rows = [{"text": f"{'x' * n} \\ \u20ac {n}", "n": [1.5, -2e3, None, {"a": []}]} for n in range(40)]
    path = write("a.json", json.dumps(rows, indent=1, ensure_ascii=False))
    expected = list(read_rows(path, data("x")))
    assert [row["text"] for row in expected] == [row["text"] for row in rows]
    for size in (1, 2, 7, 64):
        monkeypatch.setattr("luthier.data.json_rows.CHUNK_BYTES", size)
        assert list(read_rows(path, data("x"))) == expected


def test_several_sources_limit_and_callables(tmp_path, write, data, monkeypatch):
    write(
        "house_rows.py", "def made(count, word='w'):\n    yield from ({'text': f'{word}{i}'} for i in range(count))\n"
    )
    monkeypatch.chdir(tmp_path)
    path = write("a.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "c"}])
    called = {"callable": "house_rows:made", "arguments": {"count": 10**9}}
    settings = data([str(path), called], limit=2)
    rows = list(read_rows(settings.source, settings))
    assert [row["text"] for row in rows] == ["a", "b", "w0", "w1"]
    assert rows[2]["where"] == "house_rows:made:1"


def test_the_same_row_has_the_same_id_wherever_it_stands(write, data):
    a = list(read_rows(write("a.jsonl", [{"text": "x", "score": 1}, {"text": "y"}]), data("x")))
    b = list(read_rows(write("b.jsonl", [{"text": "y"}, {"text": "x", "score": 2}]), data("x")))
    assert [row["id"] for row in a] == [row["id"] for row in reversed(b)]
    assert len(a[0]["id"]) == 16 and int(a[0]["id"], 16) >= 0


def test_reading_holds_one_row_at_a_time(write, data):
    """A file of 16 MiB is read within 4 MiB, as lines, as one array and as a table."""
    body = "word " * 400
    lines = json_lines({"text": f"{n} {body}"} for n in range(8000))
    files = {
        "a.jsonl": lines,
        "a.json": "[" + ",".join(lines.splitlines()) + "]",
        "a.csv": "text\n" + "\n".join(f"{n} {body}" for n in range(8000)),
    }
    for name, text in files.items():
        path = write(name, text)
        tracemalloc.start()
        count = sum(1 for _ in read_rows(path, data("x")))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 8000 and peak < 4 * 2**20, (name, peak)


def test_settings_survive_being_written_down(data):
    for source in ("a.jsonl", [{"path": "a", "weight": 2.0}, "b", {"callable": "m:f", "arguments": {"n": 1}}]):
        settings = data(source, schema="messages", test_source="t.jsonl")
        dumped = json.loads(json.dumps(settings.model_dump()))
        assert dumped["source"] == source and dumped["schema"] == "messages"
        assert type(settings).model_validate(dumped) == settings
