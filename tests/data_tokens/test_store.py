"""What is stored is what was encoded; what is left out or cut is always said."""

from __future__ import annotations

import hashlib
import tracemalloc

import numpy as np
import pytest

from luthier.data.encode import encode, loss_tokens
from luthier.data.roles import CHOSEN, DESIRABLE, PLAIN, REJECTED
from luthier.data.store import Encodings, automatic_max_length, encode_split, limit_split
from luthier.errors import InputError


def rows(count=600):
    answers = [" " + "fox " * (i % 7) + str(2 * i) for i in range(count)]
    return [
        {"prompt": f"what is {i} plus {i}?", "completion": answer, "where": f"a.jsonl:{i + 1}"}
        for i, answer in enumerate(answers)
    ]


def codes(encodings):
    return {finding.code: finding for finding in encodings.findings}


def hashes(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_stored_equals_encoded(tmp_path, byte_tokenizer, settings):
    stored = encode_split(iter(rows()), byte_tokenizer, settings(), tmp_path / "train")
    plain = [example for row in rows() for example in encode(row, byte_tokenizer, settings())]
    assert list(stored) == plain and len(stored) == 600
    assert [stored[i] for i in (0, 255, 256, 599, -1)] == [plain[i] for i in (0, 255, 256, 599, -1)]
    assert stored.lengths.tolist() == [len(example["input_ids"]) for example in plain]
    assert stored.loss_tokens.tolist() == [loss_tokens(example) for example in plain]
    assert stored.row.tolist() == list(range(600))
    assert stored.findings == [] and stored.facts["tokens"] == stored.lengths.sum()
    again = Encodings(tmp_path / "train")
    assert list(again) == plain and again.facts == stored.facts
    with pytest.raises(IndexError):
        stored[600]


def test_same_rows_same_bytes_and_nothing_else_in_the_folder(tmp_path, byte_tokenizer, settings):
    for name in ("a", "b"):
        encode_split(rows(), byte_tokenizer, settings(), tmp_path / name, 20)
    encode_split(rows(10), byte_tokenizer, settings(), tmp_path / "b", 20)
    encode_split(rows(), byte_tokenizer, settings(), tmp_path / "b", 20)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert sorted(hashes(tmp_path / "a")) == ["encoding.json", "examples.arrow"]


def test_rows_without_loss_are_reported_with_their_place(tmp_path, byte_tokenizer, settings):
    long = {"prompt": "fox " * 60, "completion": "b", "where": "a.jsonl:9"}
    stored = encode_split([*rows(3), long], byte_tokenizer, settings(), tmp_path, 50)
    finding = codes(stored)["data.no_loss_tokens"]
    assert (finding.level, finding.value) == ("error", 1) and "a.jsonl:9" in finding.message
    assert stored.facts["no_loss_rows"] == ["a.jsonl:9"] and len(stored) == 3
    assert (stored.loss_tokens > 0).all()


def test_answers_that_a_template_never_marks_are_reported(tmp_path, byte_tokenizer, settings):
    """Marks around the second answer only: the row with one answer has nothing to learn, and that is said."""
    byte_tokenizer.chat_template = (
        "{% for message in messages %}{% if loop.index == 4 %}{% generation %}{{ message['content'] + '</s>' }}"
        "{% endgeneration %}{% else %}{{ '[INST]' + message['content'] }}{% endif %}{% endfor %}"
    )
    talk = [{"role": role, "content": content} for role, content in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    both = [{"messages": talk, "where": "x:1"}, {"messages": talk[:2], "where": "x:2"}]
    stored = encode_split(both, byte_tokenizer, settings(), tmp_path)
    assert stored.loss_tokens.tolist() == [2]
    assert "x:2" in codes(stored)["data.no_loss_tokens"].message


def test_truncated_dropped_and_refused(tmp_path, byte_tokenizer, settings):
    uncut = encode_split(rows(), byte_tokenizer, settings(), tmp_path / "uncut")
    limit = int(np.median(uncut.lengths))
    longer = int((uncut.lengths > limit).sum())
    cut = encode_split(rows(), byte_tokenizer, settings(), tmp_path / "cut", limit)
    assert cut.facts["truncated"] == longer and cut.lengths.max() == limit
    assert codes(cut)["data.truncated"].level == "warn"
    assert codes(cut)["data.truncated"].value == pytest.approx(longer / 600)
    dropped = encode_split(rows(), byte_tokenizer, settings(too_long="drop"), tmp_path / "dropped", limit)
    assert len(dropped) == 600 - longer and codes(dropped)["data.too_long"].value == longer
    with pytest.raises(InputError, match=r"a\.jsonl:\d+: the row has \d+ tokens"):
        encode_split(rows(), byte_tokenizer, settings(too_long="error"), tmp_path / "refused", limit)
    assert list((tmp_path / "refused").iterdir()) == []


def test_a_failure_leaves_the_earlier_split_whole(tmp_path, byte_tokenizer, settings):
    encode_split(rows(5), byte_tokenizer, settings(), tmp_path)
    before = hashes(tmp_path)
    with pytest.raises(InputError, match="b:1"):
        encode_split([*rows(300), {"prompt": 1, "where": "b:1"}], byte_tokenizer, settings(), tmp_path)
    assert hashes(tmp_path) == before


def test_automatic_length(tmp_path, byte_tokenizer, settings):
    uncut = encode_split(rows(), byte_tokenizer, settings(), tmp_path / "s")
    limit = automatic_max_length(uncut.lengths, None)
    assert (uncut.lengths > limit).mean() <= 0.01 and limit in uncut.lengths
    assert automatic_max_length(uncut.lengths, 12) == 12
    assert automatic_max_length(np.array([7]), 100) == 7
    automatic = encode_split(rows(), byte_tokenizer, settings(), tmp_path / "automatic", "auto", context=100)
    assert automatic.facts["max_length"] == automatic.lengths.max() == limit
    strict = encode_split(rows(), byte_tokenizer, settings(too_long="error"), tmp_path / "strict", "auto")
    assert strict.facts["max_length"] == uncut.lengths.max()
    with pytest.raises(InputError, match="more than max_length 12"):
        encode_split(rows(), byte_tokenizer, settings(too_long="error"), tmp_path / "strict", "auto", context=12)
    direct = encode_split(rows(), byte_tokenizer, settings(), tmp_path / "direct", 20)
    limited = limit_split(uncut, rows(), byte_tokenizer, settings(), tmp_path / "s", 20)
    assert hashes(tmp_path / "s") == hashes(tmp_path / "direct")
    assert list(limited) == list(direct)
    with pytest.raises(InputError, match="already cut to 20"):
        limit_split(limited, rows(), byte_tokenizer, settings(), tmp_path / "s", 10)


def test_answers_without_an_end(tmp_path, byte_tokenizer, templates, settings):
    byte_tokenizer.chat_template = templates["last_end"].replace("{{ eos_token }}", "")
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "where": "x:1"}
    stored = encode_split([talk], byte_tokenizer, settings(), tmp_path)
    assert codes(stored)["data.no_eos"].level == "warn"
    byte_tokenizer.chat_template = templates["last_end"]
    assert encode_split([talk], byte_tokenizer, settings(), tmp_path).findings == []


def test_pairs_stay_pairs(tmp_path, byte_tokenizer, settings):
    pairs = [{"prompt": "a", "chosen": "b" * n, "rejected": "c", "where": f"p:{n}"} for n in range(1, 40)]
    stored = encode_split(pairs, byte_tokenizer, settings(too_long="drop"), tmp_path, 12)
    kept = stored.row.tolist()
    assert kept[::2] == kept[1::2] and 0 < len(kept) < 78
    assert stored.role.tolist() == [CHOSEN, REJECTED] * (len(kept) // 2)


@pytest.mark.parametrize("limit", [10, "then 10"])
def test_a_judged_row_without_an_answer_is_left_out_and_counted(tmp_path, byte_tokenizer, settings, limit):
    """Cut away by the limit, or empty from the start; found in one pass or while cutting an uncut split."""
    judged = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a" * 20, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": " "},
        {"prompt": "a", "completion": "b", "desirable": True},
        {"prompt": "a" * 20, "completion": "b", "desirable": False},
        {"prompt": "b", "completion": "c"},
    ]
    judged = [row | {"where": f"p:{n}"} for n, row in enumerate(judged, start=1)]
    if limit == 10:
        stored = encode_split(judged, byte_tokenizer, settings(), tmp_path, limit)
    else:
        whole = encode_split(judged, byte_tokenizer, settings(), tmp_path)
        assert whole.facts["no_answer_rows"] == ["p:3"]
        stored = limit_split(whole, judged, byte_tokenizer, settings(), tmp_path, 10)
    assert stored.role.tolist() == [CHOSEN, REJECTED, DESIRABLE, PLAIN] and stored.row.tolist() == [0, 0, 3, 5]
    finding = codes(stored)["data.no_answer_left"]
    assert (finding.level, finding.value) == ("warn", 3)
    assert sorted(stored.facts["no_answer_rows"]) == ["p:2", "p:3", "p:5"]
    assert "data.no_loss_tokens" not in codes(stored)


def test_empty_and_foreign_folders(tmp_path, byte_tokenizer, settings):
    assert len(encode_split([], byte_tokenizer, settings(), tmp_path / "empty")) == 0
    assert list(Encodings(tmp_path / "empty")) == []
    with pytest.raises(InputError, match="no whole encoded split"):
        Encodings(tmp_path)
    encode_split(rows(4), byte_tokenizer, settings(), tmp_path / "cut")
    whole = (tmp_path / "cut" / "examples.arrow").read_bytes()
    (tmp_path / "cut" / "examples.arrow").write_bytes(whole[:-20])
    with pytest.raises(InputError, match="no whole encoded split"):
        Encodings(tmp_path / "cut")
    with pytest.raises(InputError, match=r"data\.max_length: max_length must be at least 2"):
        encode_split(rows(4), byte_tokenizer, settings(), tmp_path / "x", 1)


def test_memory_does_not_grow_with_the_rows(tmp_path, byte_tokenizer, settings):
    def peak(count):
        tracemalloc.start()
        encode_split((row for row in rows(10) * (count // 10)), byte_tokenizer, settings(), tmp_path / str(count))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(300)
    assert peak(6000) < 1.5 * peak(1500)
