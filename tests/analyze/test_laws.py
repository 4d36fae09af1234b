"""Laws that every analysis keeps, from one table: a new one gets them by one row. And the contract's own parts."""

from __future__ import annotations

import json

import pytest

from luthier.analyze import Novelty, Report
from luthier.analyze.base import Journal
from luthier.errors import InputError

ROWS = [{"text": text, "where": f"rows:{i}"} for i, text in enumerate(["abc", "def gh", "zzz!", "a b c d"], start=1)]
SMALL = {"n": 3, "max_length": 8, "base_samples": 2}
TABLE = {
    "novelty": (Novelty(**SMALL, lr=1e-2), None),
    "novelty, static": (Novelty(**SMALL, iterative=False), None),
    "novelty, with replay": (Novelty(**SMALL, lr=1e-2, steps=2, replay=2), None),
    "novelty, of rows": (Novelty(**SMALL, lr=1e-2), ROWS),
    "novelty, of rows, static": (Novelty(**SMALL, iterative=False), ROWS),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_pair_is_as_it_was_and_the_report_is_jsonable_and_the_same_twice(make_pair, tmp_path, name):
    analysis, rows = TABLE[name]
    pair = make_pair()
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in (pair.base, pair.tuned)]
    report = analysis.run(pair, rows)
    for old, model in zip(before, (pair.base, pair.tuned), strict=True):
        assert all(bool((old[key] == value).all()) for key, value in model.state_dict().items())
        assert not model.training and all(weight.grad is None for weight in model.parameters())
    out = tmp_path / "deep" / "rows.jsonl"
    again = analysis.run(pair, rows, out=out)
    assert report == again and len(report.rows) == 3
    assert [json.loads(line) for line in out.read_text().splitlines()] == report.rows
    assert json.loads((out.parent / "rows.summary.json").read_text()) == report.summary
    assert sorted(path.name for path in out.parent.iterdir()) == ["rows.jsonl", "rows.summary.json"]
    with pytest.raises(InputError, match="there already"):
        analysis.run(pair, rows, out=out)


@pytest.mark.parametrize("name", TABLE)
def test_a_run_that_broke_off_goes_on_to_the_same_file(make_pair, tmp_path, name):
    analysis, rows = TABLE[name]
    pair = make_pair("gpt2")  # with dropout, while it learns
    analysis.run(pair, rows, out=tmp_path / "whole.jsonl")

    def breaks(done, of):
        assert of == 3
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analysis.run(pair, rows, out=tmp_path / "broken.jsonl", progress=breaks)
    part = tmp_path / "broken.jsonl.part"
    lines = part.read_text().splitlines()[:2]  # the key and a text
    part.write_text("\n".join([*lines, '{"text": "cut in the mid']))
    done = []
    analysis.run(pair, rows, out=tmp_path / "broken.jsonl", progress=lambda *at: done.append(at))
    assert (tmp_path / "broken.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert done[-1] == (3, 3) and not part.exists()


def test_a_journal_belongs_to_its_key(tmp_path):
    out = tmp_path / "a.jsonl"
    Journal(out, {"n": 1}).add({"text": "x"})
    assert Journal(out, {"n": 1}).rows == [{"text": "x"}]
    with pytest.raises(InputError, match="other settings, models or rows"):
        Journal(out, {"n": 2})
    assert Journal(None, {}).rows == []
    (tmp_path / "b.jsonl.part").write_text("notes of mine\n")
    with pytest.raises(InputError, match="no journal"):
        Journal(tmp_path / "b.jsonl", {})
    with pytest.raises(InputError, match="cannot be written"):
        Journal(tmp_path / "b.jsonl.part" / "c.jsonl", {})


def test_a_report_is_saved_with_its_pictures(tmp_path):
    paths = Report({"a": 1}, [{"b": 2}, {"b": 3}], {"by-step": "<svg/>"}).save(tmp_path / "found.jsonl")
    assert {p.name for p in paths} == {"found.jsonl", "found.summary.json", "found.by-step.svg"}
    assert (tmp_path / "found.by-step.svg").read_text() == "<svg/>" and len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / "found.jsonl").read_text() == '{"b": 2}\n{"b": 3}\n'
