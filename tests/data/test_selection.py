"""Selections: what is kept is what the rule says, whatever the order, and only numbers are held of what is not."""

from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from luthier.data import Scored, Selected, SelectionContext, prepare
from luthier.data.perplexity import PerplexityFilter, perplexity, ranked, within
from luthier.data.selection import needs_scorer, stand_ins
from luthier.errors import InputError


def context(score=None):
    """A context whose scorer gives each row the loss that stands in it, as `nats` over `tokens`."""

    def plain(rows):
        for row in rows:
            tokens = row.get("tokens", 10)
            yield Scored(-row["nats"] * tokens, tokens)

    return SelectionContext(lambda name: score or plain)


def rows_of(losses, **extra):
    return [
        {"where": f"r:{n}", "id": f"{n:016x}", "text": f"text {n}", "nats": x, **extra} for n, x in enumerate(losses)
    ]


def kept(selected):
    return [int(number) for number in selected.kept]


losses = st.lists(st.floats(0, 20, allow_nan=False), min_size=1, max_size=60)
densities = st.floats(0.01, 1)


@given(losses, densities)
def test_the_smallest_are_kept(values, density):
    count = int(len(values) * density)
    filter_ = PerplexityFilter(density=density)
    if count == 0:
        with pytest.raises(InputError, match="keeps none"):
            filter_.apply(rows_of(values), context())
        return
    selected = filter_.apply(rows_of(values), context())
    by_hand = sorted(sorted(range(len(values)), key=lambda n: -(-values[n] * 10) / 10)[:count])  # sorted is stable
    assert kept(selected) == by_hand and len(selected) == count == filter_.count(len(values))
    for row, number in zip(selected, by_hand, strict=True):
        assert row["id"] == f"{number:016x}" and row["ppl"] == pytest.approx(math.exp(values[number]))


@given(st.permutations(range(30)), densities, st.sampled_from(["lowest", "highest", "middle"]))
def test_the_order_of_the_rows_does_not_matter(order, density, part):
    rows = rows_of([n / 7 for n in range(30)])
    if int(30 * density) == 0:
        return
    filter_ = PerplexityFilter(density=density, order=part)
    plain = filter_.apply(rows, context())
    mixed = filter_.apply([rows[n] for n in order], context())
    assert {(r["id"], r["ppl_rank"]) for r in plain} == {(r["id"], r["ppl_rank"]) for r in mixed}


@given(losses, densities)
def test_lowest_and_highest_are_complements_and_the_middle_lies_between(values, density):
    ranks = ranked(np.array(values))
    n, count = len(values), int(len(values) * density)
    low, high, middle = (within(ranks, count, part) for part in ("lowest", "highest", "middle"))
    assert low.sum() == high.sum() == middle.sum() == count
    assert np.array_equal(within(ranks, n - count, "lowest"), ~high)
    if count:
        below, above = int((ranks < ranks[middle].min()).sum()), int((ranks > ranks[middle].max()).sum())
        assert below + above == n - count and above - below in (0, 1)


def test_equal_rows_keep_their_order():
    selected = PerplexityFilter(density=0.5).apply(rows_of([2.0, 1.0, 2.0, 2.0, 1.0, 2.0]), context())
    assert kept(selected) == [0, 1, 4] and [row["ppl_rank"] for row in selected] == [3, 1, 2]


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    for vocabulary, tokens in ((2, 1), (50_000, 37)):
        loss = np.array([tokens * math.log(vocabulary) / tokens])
        assert perplexity(loss) == pytest.approx(vocabulary)
    assert np.isfinite(perplexity(np.array([1e9])))


def test_all_rows_at_density_1_and_the_given_ones_stay_as_they_are():
    rows = rows_of([3.0, 1.0, 2.0])
    before = json.dumps(rows)
    selected = PerplexityFilter(density=1.0).apply(rows, context())
    assert kept(selected) == [0, 1, 2] and [row["ppl_rank"] for row in selected] == [3, 1, 2]
    assert json.dumps(rows) == before and selected[-1]["text"] == "text 2" and len(selected[1:]) == 2


def test_empty_rows_are_left_out_counted_and_not_part_of_the_whole():
    rows = rows_of([5.0, 1.0, 2.0, 3.0, 4.0, 0.5])
    rows[1]["text"] = "  "
    rows[5]["tokens"] = 0  # the scorer finds nothing of the answer within its context
    selected = PerplexityFilter(density=0.5).apply(rows, context())
    assert kept(selected) == [2, 3]  # half of four
    assert selected.stats["empty"] == 2 and selected.stats["scored"] == 4
    (finding,) = [f for f in selected.findings if f.code == "data.select_empty"]
    assert finding.level == "warn" and finding.value == 2


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"text": "a cat"}, {"prompt": "Describe.", "completion": "a cat"}),
        ({"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c"}),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, None),
    ],
)
def test_a_prompt_goes_before_bare_texts_only(row, asked):
    seen = []

    def score(rows):
        for row in rows:
            seen.append(row)
            yield Scored(-1.0, 1)

    selected = PerplexityFilter(density=1, prompt="Describe.").apply([row], context(score))
    assert seen == [row if asked is None else asked]
    assert {key: value for key, value in selected[0].items() if not key.startswith("ppl")} == row


def test_what_is_short_or_repeated_is_noticed():
    narrow = [{"text": f"t{n % 2}", "nats": 0.1, "tokens": 2} for n in range(20)]
    wide = [{"text": f"long {n}", "nats": 2.0, "tokens": 40} for n in range(80)]
    selected = PerplexityFilter(density=0.2).apply(narrow + wide, context())
    (finding,) = [f for f in selected.findings if f.code == "data.select_narrow"]
    assert finding.value == 0.05 and selected.stats["copies_kept"] == 18
    calm = PerplexityFilter(density=0.2).apply(wide, context())
    assert [f.code for f in calm.findings] == ["data.select"]


def test_a_bad_scorer_is_found_out():
    def too_few(rows):
        yield Scored(-1.0, 1)

    def broken(rows):
        yield from (Scored(float("nan"), 1) for _ in rows)

    with pytest.raises(InputError, match="1 scores for 3 rows"):
        PerplexityFilter().apply(rows_of([1, 2, 3]), context(too_few))
    with pytest.raises(InputError, match=r"r:0: the scoring model gives a log-probability of nan"):
        PerplexityFilter().apply(rows_of([1, 2, 3]), context(broken))
    with pytest.raises(InputError, match="none is at hand"):
        PerplexityFilter().apply(rows_of([1, 2, 3]), SelectionContext(needs_scorer))
    for settings in ({"density": 0}, {"density": 1.1}, {"order": "best"}, {"densty": 0.1}):
        with pytest.raises(ValidationError):
            PerplexityFilter(**settings)


def test_a_view_refuses_what_does_not_fit():
    for numbers in ([1, 0], [0, 0], [0, 3], [-1, 1]):
        with pytest.raises(ValueError, match="ascending"):
            Selected([{}, {}, {}], np.array(numbers))
    with pytest.raises(ValueError, match="columns"):
        Selected([{}, {}], np.array([0, 1]), {"a": np.array([1.0])})


@given(st.integers(1, 300), densities)
def test_stand_ins_are_as_many_and_spread(count, density):
    filter_ = PerplexityFilter(density=density)
    chosen = stand_ins(filter_, [{}] * count)
    assert len(chosen) == max(1, filter_.count(count))
    gaps = np.diff([*chosen.kept, count])
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_only_numbers_are_held():
    """500 rows of 100 kB stream by, 50 MB in all; no more than a few copies of one of them are there at a time."""

    class Large:
        def __len__(self):
            return 500

        def __getitem__(self, number):
            return {"text": f"{number:05d}" * 20_000, "nats": number % 17}

        def __iter__(self):
            return (self[number] for number in range(500))

    tracemalloc.start()
    selected = PerplexityFilter(density=0.1).apply(Large(), context())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(selected) == 50 and peak < 1_000_000, peak


# -- in `prepare`


@pytest.fixture
def run(tmp_path, write, data):
    def runner(source, select, **keys):
        path = write("source.jsonl", source)
        settings = data(str(path), select=select, **keys)

        def score(rows):
            for row in rows:
                yield Scored(-row["extra"]["nats"] * 10, 10)

        apply = lambda rows: settings.select.apply(rows, SelectionContext(lambda name: score))  # noqa: E731
        done = prepare(settings, tmp_path / "out", seed=0, select=apply)
        return done, {n: [json.loads(line) for line in p.open()] for n, p in done.files.items()}

    return runner


def source(count, **extra):
    return [{"text": f"row number {n} says {n * n}", "nats": (n * 37 % count) / count, **extra} for n in range(count)]


def test_training_rows_are_selected_and_held_out_rows_are_not(run):
    done, rows = run(source(600), {"method": "perplexity", "density": 0.25})
    assert [len(rows[name]) for name in ("train", "validation", "test")] == [120, 60, 60]
    assert all("ppl" not in row for name in ("validation", "test") for row in rows[name])
    assert sorted(row["ppl_rank"] for row in rows["train"]) == list(range(1, 121))
    for row in rows["train"]:
        assert row["ppl"] == pytest.approx(math.exp(row["extra"]["nats"]))
    assert done.card["rows"]["train"] == 120 and done.card["selection"]["scored"] == 480
    assert done.card["selection"]["settings"]["density"] == 0.25
    assert json.loads((done.files["train"].parent / "datacard.json").read_text()) == done.card
    assert [f.code for f in done.findings] == ["data.few_rows", "data.select"]


def test_a_density_of_1_keeps_every_row_as_it_was(run, tmp_path, data):
    _, rows = run(source(100), {"method": "perplexity", "density": 1})
    plain = prepare(data(str(tmp_path / "source.jsonl")), tmp_path / "plain", seed=0)
    bare = [{k: v for k, v in row.items() if not k.startswith("ppl")} for row in rows["train"]]
    assert bare == [json.loads(line) for line in plain.files["train"].open()]


def test_copies_go_before_and_classes_are_balanced_after(run):
    rows = source(200, kind="a") + source(200, kind="a") + [{**r, "kind": "b"} for r in source(300)[200:]]
    _, made = run(
        rows,
        {"method": "perplexity", "density": 0.5},
        label_key="kind",
        balance="oversample",
        split=[1.0, 0.0, 0.0],
    )
    train = made["train"]
    different = {row["id"]: row for row in train}
    assert len(different) == 150  # half of 300 different rows
    assert sorted(row["ppl_rank"] for row in different.values()) == list(range(1, 151))
    counts = [sum(row["label"] == kind for row in train) for kind in "ab"]
    assert counts[0] == counts[1] > 0


def test_empty_training_rows_are_the_selections_business(run):
    rows = [*source(100), {"text": " ", "nats": 1.0}, {"text": "", "nats": 2.0}]  # the second is a copy of the first
    done, made = run(rows, {"method": "perplexity", "density": 0.5}, split=[1.0, 0.0, 0.0])
    codes = {f.code: f for f in done.findings}
    assert len(made["train"]) == 50 and codes["data.select_empty"].value == 1 and "data.empty_answer" not in codes
    assert done.card["empty"] == 2


def test_empty_rows_that_are_held_out_still_close_the_gate(run, write):
    held_out = str(write("test.jsonl", [{"text": " ", "nats": 1.0}]))
    done, _ = run(source(100), {"method": "perplexity", "density": 0.5}, test_source=held_out)
    (finding,) = [f for f in done.findings if f.code == "data.empty_answer"]
    assert finding.level == "error" and "test.jsonl:1, text" in finding.message


def test_without_a_model_it_says_so(tmp_path, write, data):
    settings = data(str(write("a.jsonl", source(10))), select="perplexity")
    with pytest.raises(InputError, match=r"data\.select: the selection scores rows with a model"):
        prepare(settings, tmp_path / "out", seed=0)
    assert list((tmp_path / "out").iterdir()) == []
