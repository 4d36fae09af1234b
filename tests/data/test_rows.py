"""Rows at random: the same rows as reading the file from the front, whatever its line ends."""

from __future__ import annotations

import json
import pickle
import tracemalloc

import pytest

from luthier.data.rows import Rows
from luthier.errors import InputError

MADE = [{"n": n, "text": "\u20ac\u2028" * n} for n in range(50)]


@pytest.mark.parametrize("end", ["\n", "", "\n\n"])
def test_rows_are_those_of_the_file(write, end):
    rows = Rows(write("a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in MADE) + end))
    assert len(rows) == 50 and list(rows) == MADE
    assert rows[7] == MADE[7] and rows[-1] == MADE[-1] and rows[3:20:4] == MADE[3:20:4]
    for index in (50, -51):
        with pytest.raises(IndexError):
            rows[index]


def test_no_rows(write):
    rows = Rows(write("a.jsonl", b""))
    assert len(rows) == 0 and list(rows) == [] and rows[:] == []


def test_rows_go_to_other_processes(write):
    rows = pickle.loads(pickle.dumps(Rows(write("a.jsonl", MADE))))
    assert rows[9] == MADE[9]


def test_what_cannot_be_read_is_said(write, tmp_path):
    with pytest.raises(InputError, match=r"gone\.jsonl: cannot be read"):
        Rows(tmp_path / "gone.jsonl")
    rows = Rows(write("a.jsonl", "{}\n[1]\nnot json\n"))
    with pytest.raises(InputError, match=r"a\.jsonl:2: the row is of type list"):
        rows[1]
    with pytest.raises(InputError, match=r"a\.jsonl:3: the line is not JSON"):
        rows[2]


def test_the_file_is_not_held_in_memory(write):
    path = write("a.jsonl", [{"text": "x" * 10_000}] * 1000)
    tracemalloc.start()
    rows = Rows(path)
    assert sum(len(row["text"]) for row in rows) == 10**7
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 200_000
