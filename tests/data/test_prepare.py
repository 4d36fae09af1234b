"""Preparing a data set: what goes where, what is noticed, and that nothing depends on order, place or memory."""

from __future__ import annotations

import errno
import json
import random
import shutil
import subprocess
import sys
import tracemalloc

import pytest

from luthier.data.prepare import prepare
from luthier.data.read import read_rows
from luthier.errors import CrashError, InputError

rng = random.Random(0)
WORDS = [f"word{number}" for number in range(5000)]


def text(length=20):
    return " ".join(rng.choices(WORDS, k=length))


@pytest.fixture
def run(tmp_path, write, data):
    """`run(rows or files, **settings)` prepares; the result has the rows of each split as `.train` and so on."""

    def runner(source, seed=0, texts=(), folder="out", **keys):
        if isinstance(source, list) and not (set(source[0]) & {"path", "callable"}):
            source = str(write("source.jsonl", source))
        done = prepare(data(source, **keys), tmp_path / folder, seed=seed, evaluation_texts=texts)
        rows = {name: [json.loads(line) for line in path.open()] for name, path in done.files.items()}
        return done, rows

    return runner


def found(done, code):
    return [finding for finding in done.findings if finding.code == code]


def test_every_row_goes_somewhere_once(run):
    source = [{"text": text()} for _ in range(600)]
    done, rows = run(source)
    assert [len(rows[name]) for name in ("train", "validation", "test")] == [480, 60, 60]
    everything = [row["text"] for part in rows.values() for row in part]
    assert sorted(everything) == sorted(row["text"] for row in source)
    assert done.card["rows"] == {"train": 480, "validation": 60, "test": 60} and done.findings == []
    assert set(rows["test"][0]) == {"where", "id", "text"}
    assert json.loads((done.files["train"].parent / "datacard.json").read_text()) == done.card
    assert sorted(path.name for path in done.files["train"].parent.iterdir()) == [
        "datacard.json",
        "test.jsonl",
        "train.jsonl",
        "validation.jsonl",
    ]


def test_the_same_rows_and_seed_give_the_same_bytes(run, tmp_path):
    source = [{"text": text(), "c": n % 3, "g": n // 4} for n in range(200)]
    keys = {"label_key": "c", "group_key": "g", "balance": "oversample"}
    one, _ = run(source, **keys)
    two, _ = run(source, folder="elsewhere/deep", **keys)
    for path in one.files["train"].parent.iterdir():
        assert path.read_bytes() == (two.files["train"].parent / path.name).read_bytes()
    assert str(tmp_path) not in json.dumps(one.card) + one.files["train"].read_text()
    other, _ = run(source, seed=1, folder="other", **keys)
    assert other.files["test"].read_bytes() != one.files["test"].read_bytes()


def test_the_order_of_the_file_does_not_matter(run):
    source = [{"text": text(), "c": n % 3, "g": n // 4} for n in range(200)]
    source += [{**row, "text": row["text"].upper()} for row in source[:20]]
    keys = {"label_key": "c", "group_key": "g", "balance": "undersample"}
    first, rows = run(source, **keys)
    again, shuffled = run(rng.sample(source, len(source)), folder="again", **keys)
    for name in rows:
        assert sorted(row["id"] for row in rows[name]) == sorted(row["id"] for row in shuffled[name])
    assert again.card["removed"] == first.card["removed"]


def test_groups_and_classes(run):
    source = [{"text": text(), "c": "rare" if n % 10 == 0 else "frequent", "g": n // 5} for n in range(1000)]
    _, rows = run(source, label_key="c", group_key="g")
    groups = [{row["group"] for row in part} for part in rows.values()]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    _, rows = run(source, label_key="c")
    for part in rows.values():
        assert abs(sum(row["label"] == "rare" for row in part) - 0.1 * len(part)) <= 1


def test_exact_copies_go_from_training_and_stay_together(run):
    source = [{"text": text(6)} for _ in range(300)]
    source += [{"text": f"  {row['text'].upper()}\n"} for row in source]
    done, rows = run(source)
    assert done.card["removed"]["duplicates"] == len(rows["train"]) and found(done, "data.split_overlap") == []
    spoken = {name: {row["text"].lower().strip() for row in part} for name, part in rows.items()}
    assert not spoken["train"] & (spoken["test"] | spoken["validation"])
    assert len(rows["test"]) == 2 * len(spoken["test"])
    assert found(done, "data.duplicates")[0].level == "warn"
    kept, _ = run(source, deduplicate="none", decontaminate=False)
    assert kept.card["rows"]["train"] == 480 and "kept" in found(kept, "data.duplicates")[0].message


def test_copies_among_held_out_rows_get_ids_of_their_own(run):
    _, rows = run([{"text": text()} for _ in range(50)] * 3, split=[0.4, 0.3, 0.3])
    for part in rows.values():
        assert len({row["id"] for row in part}) == len(part)
    assert {row["id"][16:] for row in rows["test"]} == {"", "-2", "-3"}


def test_near_copies_are_reported_or_removed(run):
    source = [{"text": text(80)} for _ in range(60)]
    source += [{"text": row["text"] + " again"} for row in source]
    done, rows = run(source, decontaminate=False)
    finding = found(done, "data.near_duplicates")[0]
    assert finding.level == "warn" and done.card["removed"]["near_duplicates"] > 30 and len(rows["train"]) == 96
    done, rows = run(source, decontaminate=False, deduplicate="near")
    train = [row["text"].removesuffix(" again") for row in rows["train"]]
    held_out = [row["text"].removesuffix(" again") for row in rows["validation"] + rows["test"]]
    assert len(train) == len(set(train)) and not set(train) & set(held_out)
    assert found(done, "data.near_duplicates")[0].level == "info"


def test_a_given_test_file_that_overlaps_is_an_error(run, write):
    source = [{"text": text()} for _ in range(100)]
    test = write("held_out.jsonl", [{"text": text()}, {"text": source[4]["text"].upper() + " \n"}])
    done, rows = run(source, test_source=str(test))
    finding = found(done, "data.split_overlap")[0]
    assert finding.level == "error" and finding.value == 1
    assert "held_out.jsonl:2" in finding.message and "source.jsonl:5" in finding.message
    assert len(rows["test"]) == 2 and len(rows["train"]) + len(rows["validation"]) in (99, 100)
    assert not {row["id"] for row in rows["train"]} & {row["id"] for row in rows["test"]}


def test_given_files_are_taken_whole_and_the_rest_is_shared_out(run, write):
    source = [{"text": text()} for _ in range(90)]
    validation = str(write("v.jsonl", [{"text": text()} for _ in range(7)]))
    test = str(write("t.jsonl", [{"text": text()} for _ in range(9)]))
    _, rows = run(source, test_source=test)
    assert [len(part) for part in rows.values()] == [80, 10, 9]
    _, rows = run(source, test_source=test, validation_source=validation)
    assert [len(part) for part in rows.values()] == [90, 7, 9]
    done, rows = run(source, split=[1, 0, 0])
    assert [len(part) for part in rows.values()] == [90, 0, 0] and done.files["test"].read_bytes() == b""


def test_a_saved_data_set_brings_its_own_splits(run, tmp_path):
    from datasets import Dataset, DatasetDict

    parts = {"train": 30, "validation": 4, "test": 5}
    saved = DatasetDict({name: Dataset.from_list([{"text": text()} for _ in range(n)]) for name, n in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    _, rows = run(str(tmp_path / "saved"))
    assert {name: len(part) for name, part in rows.items()} == parts
    _, rows = run(str(tmp_path / "saved" / "train"))
    assert [len(part) for part in rows.values()] == [24, 3, 3]


def test_groups_of_a_given_file_must_not_be_in_training(run, write):
    test = write("t.jsonl", [{"text": text(), "g": "a"}])
    done, _ = run([{"text": text(), "g": group} for group in "abcdefghij"], test_source=str(test), group_key="g")
    assert found(done, "data.group_overlap")[0].level == "warn"


def test_contaminated_rows_go_or_close_the_gate(run):
    secrets = [text(30) for _ in range(3)]
    source = [{"text": text(60)} for _ in range(200)] + [{"text": f"{text(9)} {s} {text(9)}"} for s in secrets]
    done, rows = run(source, texts=iter(secrets), split=[1, 0, 0])
    finding = found(done, "data.contamination")[0]
    assert finding.level == "warn" and finding.value == pytest.approx(3 / 203) and len(rows["train"]) == 200
    assert "source.jsonl:201" in finding.message
    done, rows = run(source, texts=secrets, split=[1, 0, 0], decontaminate=False)
    assert found(done, "data.contamination")[0].level == "error" and len(rows["train"]) == 203
    done, _ = run(source, texts=[text(30)], split=[1, 0, 0])
    assert not found(done, "data.contamination") and done.card["removed"]["evaluation_texts"] == 1


def test_empty_answers_few_rows_and_private_data(run, talk):
    source = [talk(text(), text()) for _ in range(40)]
    source[3] = talk("hi", " ")
    source[5] = talk("hi", "write to a.b@example.org")
    done, _ = run(source)
    finding = found(done, "data.empty_answer")[0]
    assert finding.level == "error" and finding.value == 1 and "source.jsonl:4, messages[1].content" in finding.message
    assert found(done, "data.few_rows")[0].value == 40
    assert found(done, "data.pii")[0].value == {"email": 1}
    assert "example.org" not in json.dumps(done.card)
    assert [finding.level for finding in done.findings] == ["error", "warn", "info"]


def test_balance_evens_the_classes_of_the_training_rows_only(run):
    source = [{"text": text(), "c": "rare" if n % 12 == 0 else "frequent"} for n in range(600)]
    done, rows = run(source, label_key="c")
    assert found(done, "data.imbalance")[0].value > 10
    before = done.card["labels"]["train"]
    done, balanced = run(source, label_key="c", balance="oversample")
    assert done.card["labels"]["train"] == dict.fromkeys(("frequent", "rare"), before["frequent"])
    assert done.card["labels"]["train_before_balance"] == before and not found(done, "data.imbalance")
    assert balanced["test"] == rows["test"] and done.card["different_training_rows"] == sum(before.values())


def test_samples_are_nested_exact_and_leave_held_out_rows_alone(run):
    source = [{"text": text()} for _ in range(400)]
    source += source[:40]  # copies are taken out before anything is drawn
    _, whole = run(source)
    names, drawn = ("validation", "test"), {}
    for size in (10, 100, 300):
        done, rows = run(source, sample=size)
        drawn[size] = [row["id"] for row in rows["train"]]
        assert len(set(drawn[size])) == size == done.card["rows"]["train"] == done.card["sample"]
        assert [rows[name] for name in names] == [whole[name] for name in names]
    assert set(drawn[10]) < set(drawn[100]) < set(drawn[300]) < {row["id"] for row in whole["train"]}
    # In the order of the source, not depending on it, and another draw for another seed.
    assert drawn[100] == [row["id"] for row in whole["train"] if row["id"] in set(drawn[100])]
    _, turned = run(source[::-1], sample=100)
    assert {row["id"] for row in turned["train"]} == set(drawn[100])
    _, other = run(source, sample=100, seed=1)
    assert {row["id"] for row in other["train"]} != set(drawn[100])


def test_a_sample_is_a_fair_draw(run):
    """Rows of each half of the file, and each group of classes, come as often as chance has it."""
    source = [{"text": text(), "kind": n % 2} for n in range(1000)]
    _, rows = run(source, sample=200, label_key="kind")
    ones = sum(row["label"] == 1 for row in rows["train"])
    assert abs(ones - 100) < 4 * (200 * 0.25) ** 0.5


def test_a_sample_larger_than_what_there_is_is_told(run):
    with pytest.raises(InputError, match=r"data.sample: 81 training rows are asked for, and there are 80"):
        run([{"text": text()} for _ in range(100)], sample=81)


def test_a_sample_is_drawn_before_rows_are_repeated(run, write):
    heavy = write("heavy.jsonl", [{"text": text()} for _ in range(50)])
    done, rows = run([{"path": str(heavy), "weight": 3}], sample=20)
    assert done.card["different_training_rows"] == 20 == len({row["id"] for row in rows["train"]})


def test_weights_of_sources(run, write):
    a = str(write("a.jsonl", [{"text": f"a {text()}"} for _ in range(100)]))
    b = str(write("b.jsonl", [{"text": f"b {text()}"} for _ in range(100)]))
    done, rows = run([{"path": a, "weight": 0.25}, {"path": b, "weight": 3}], split=[1, 0, 0])
    counts = [sum(row["text"][0] == letter for row in rows["train"]) for letter in "ab"]
    assert counts == [25, 300]
    assert [source["name"] for source in done.card["sources"]] == ["a.jsonl", "b.jsonl"]


def test_prepared_rows_can_be_read_again(run, data):
    """The files are rows of a known form themselves: reading them gives the same content and ids."""
    done, rows = run([{"prompt": text(), "completion": text()} for _ in range(60)])
    again = list(read_rows(done.files["train"], data("x")))
    assert [row["id"] for row in again] == [row["id"] for row in rows["train"]]


def test_bad_input_leaves_earlier_files_whole(run, write, tmp_path):
    run([{"text": text()} for _ in range(60)])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match=r"bad\.jsonl:2: the JSON breaks off"):
        run(str(write("bad.jsonl", '{"text": "a"}\n{"text":')))
    with pytest.raises(InputError, match="cannot be split into 3"):
        run([{"text": "a"}, {"text": "A "}])
    with pytest.raises(InputError, match="no training row is left"):
        run([{"text": "a b"}] * 9, texts=["A b"], split=[1, 0, 0])
    with pytest.raises(InputError, match="not one text"):
        run([{"text": "a b"}] * 9, texts="a b")
    with pytest.raises(InputError, match="more than 10000 different values"):
        run([{"text": "a", "c": n} for n in range(10_001)], label_key="c")
    with pytest.raises(InputError, match="half of a surrogate pair"):
        run(str(write("bad.jsonl", '{"text": "a", "note": "\\udc00"}')))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_full_disk_is_named_and_leaves_earlier_files_whole(run, tmp_path, monkeypatch):
    source = [{"text": text()} for _ in range(60)]
    run(source)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CrashError, match=r"No space left on device; earlier files are whole\."):
        run(source, seed=5)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_what_a_killed_run_left_is_cleared(run, tmp_path):
    (tmp_path / "out" / ".preparing").mkdir(parents=True)
    (tmp_path / "out" / ".preparing" / "rows.jsonl").write_text("half a row")
    done, _ = run([{"text": text()} for _ in range(60)])
    assert not (tmp_path / "out" / ".preparing").exists() and done.card["rows"]["train"] == 48


def test_memory_does_not_grow_with_the_size_of_the_file(data, tmp_path):
    """Ten times the bytes in as many rows: the peak stays where it was (the file is four times the allowance)."""
    peaks = []
    for size in (200, 2000):
        path = tmp_path / "big.jsonl"
        with path.open("w") as handle:
            for number in range(300):
                body = " ".join(random.Random(number).choices(WORDS, k=size))
                handle.write(json.dumps({"prompt": f"{number}", "completion": body}) + "\n")
        tracemalloc.start()
        prepare(data(str(path), deduplicate="none"), tmp_path / "out", seed=0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        shutil.rmtree(tmp_path / "out")
    assert path.stat().st_size > 5e6
    assert peaks[1] < peaks[0] + 1.25e6, peaks


def test_the_room_imports_neither_torch_nor_transformers():
    """Preparing needs no model library, and `prepare` and `encode` stay functions whatever is imported first."""
    code = (
        "import sys, luthier.data.prepare; from luthier.data import prepare, DataSettings, read_rows, Rows;"
        "assert callable(prepare); assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
