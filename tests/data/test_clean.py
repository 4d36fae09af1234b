"""Checks on rows: copies, near copies, contamination, empty answers, private data, against slow or exact oracles."""

from __future__ import annotations

import random

import numpy as np
import pytest

from luthier.data.clean import content_key, empty_parts, mixed, ngrams, private_data, prompt_text, row_text, word_hashes
from luthier.data.contamination import Evaluation
from luthier.data.near_duplicates import clusters, resemblance, sketch

WORDS = [f"word{number}" for number in range(3000)]


def sentence(rng, length):
    return " ".join(rng.choices(WORDS, k=length))


def test_copies_differ_in_case_and_white_space_only():
    assert content_key("A  b\n\tC ") == content_key("a b c")
    assert content_key("a b c") != content_key("ab c")
    assert content_key("\u00c4\u00d6") == content_key("\u00e4\u00f6")


def test_mixing_is_a_bijection_and_differs_by_seed():
    numbers = np.arange(100_000, dtype=np.uint64)
    assert len(np.unique(mixed(numbers, 3))) == len(numbers)
    assert (mixed(numbers, 3) != mixed(numbers, 4)).all()
    assert (mixed(numbers, -1) != mixed(numbers, 2**70)).all()


def test_words_are_the_same_whatever_stands_between_them():
    assert np.array_equal(word_hashes("Hello, world! It's 5.0"), word_hashes("hello world (it S)\n5-0"))
    assert len(word_hashes("\u4f60\u597d world\u4f60")) == 4  # letter by letter where no spaces part words
    assert len(word_hashes(" ...\n")) == 0


@pytest.mark.parametrize("size", [1, 2, 5, 13])
def test_windows_are_equal_where_their_words_are(size):
    rng = random.Random(0)
    words = [rng.choice("abc") for _ in range(60)]
    windows = ngrams(word_hashes(" ".join(words)), size)
    plain = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    assert len(windows) == len(plain)
    assert len(set(windows.tolist())) == len(set(plain))
    assert all((windows[i] == windows[j]) == (plain[i] == plain[j]) for i in range(40) for j in range(40))
    assert len(ngrams(word_hashes("a b"), 3)) == 0


def test_the_sketch_estimates_the_jaccard_index():
    """Five standard errors of 128 draws around the exact index of the sets of 5-word windows."""
    rng = random.Random(1)
    for changed in (0, 5, 20, 60, 200):
        words = sentence(rng, 200).split()
        other = [rng.choice(WORDS) if place < changed else word for place, word in enumerate(words)]
        sets = [{tuple(text[i : i + 5]) for i in range(196)} for text in (words, other)]
        exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        estimate = resemblance(*(sketch(word_hashes(" ".join(text))) for text in (words, other)))
        assert abs(estimate - exact) <= 5 * (exact * (1 - exact) / 128) ** 0.5 + 1e-12


def test_near_duplicates_are_found_and_others_are_not():
    rng = random.Random(2)
    texts = [sentence(rng, 150) for _ in range(200)]
    near = [" ".join([*text.split()[:-3], "one", "two"]) for text in texts[:40]]
    far = [" ".join([*text.split()[:70], *sentence(rng, 80).split()]) for text in texts[40:80]]
    sketches = np.stack([sketch(word_hashes(text)) for text in [*texts, *near, *far]])
    found = clusters(sketches)
    assert np.array_equal(found[200:240], np.arange(40))
    assert np.array_equal(np.delete(found, np.s_[200:240]), np.delete(np.arange(280), np.s_[200:240]))


def test_clusters_at_the_edges():
    assert len(clusters(np.empty((0, 128), dtype=np.uint32))) == 0
    texts = ["", "...", "a b c", "c b a", "A, b: c", "a b c d e f"]
    sketches = np.stack([sketch(word_hashes(text)) for text in texts])
    assert clusters(sketches).tolist() == [0, 1, 2, 3, 2, 5]
    assert clusters(np.repeat(sketches[2:3], 5000, axis=0)).max() == 0


def row(text):
    return {"text": text}


def contaminated(rows, texts):
    evaluation = Evaluation(texts)
    seen = [evaluation.count(single) for single in rows]
    return [touched and evaluation.contaminates(single) for touched, single in zip(seen, rows, strict=True)]


def test_contamination_by_whole_half_and_window():
    rng = random.Random(3)
    secret, other = sentence(rng, 40), sentence(rng, 40)
    words = secret.split()
    rows = [
        row(f"{sentence(rng, 50)} {secret.upper()} {sentence(rng, 50)}"),
        row(" ".join(words[:38])),  # 26 of 28 windows
        row(" ".join(words[:20])),  # 8 of 28 windows
        row(" ".join(words[:12])),  # none
        row(other),
    ]
    assert contaminated(rows, [secret]) == [True, True, False, False, False]
    assert contaminated(rows, []) == [False] * 5


def test_contamination_of_long_texts_is_judged_by_a_sample():
    rng = random.Random(4)
    book = sentence(rng, 5000)
    words = book.split()
    rows = [row(book), row(" ".join(words[:4800])), row(" ".join(words[:2000]))]
    assert contaminated(rows, [book]) == [True, True, False]


def test_what_many_rows_share_is_no_contamination():
    """The same long instruction in all rows, different questions: only the row with the question counts."""
    rng = random.Random(5)
    instruction = sentence(rng, 60)
    questions = [sentence(rng, 25) for _ in range(40)]
    rows = [row(f"{instruction} {question}") for question in questions]
    assert contaminated(rows, [f"{instruction} {questions[7]}"]) == [index == 7 for index in range(40)]
    assert not any(contaminated(rows, [f"{instruction} {sentence(rng, 25)}" for _ in range(30)]))


def test_contamination_by_short_texts():
    rows = [
        row("Add 2 and 3."),
        {"prompt": "add 2 and  3.", "completion": "5"},
        {"messages": [{"role": "user", "content": "Add 2 and 3."}, {"role": "assistant", "content": "5"}]},
        row("Please: Add 2 and 3."),
        row("first one two three four five six seven eight last"),
    ]
    assert contaminated(rows, ["Add 2 and 3.", "!!!"]) == [True, True, True, False, False]
    assert contaminated(rows, ["One two three four five six, seven eight"]) == [False] * 4 + [True]


def test_what_a_row_says():
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]},
        {"role": "assistant", "content": "hello"},
    ]
    assert row_text({"messages": messages}).splitlines()[:2] == ["Be kind.", "hi"]
    assert "add" in row_text({"messages": messages}, system=False)
    assert prompt_text({"messages": messages}) == 'hi\n\n[{"function": {"name": "add"}}]'
    assert row_text({"prompt": [messages[1]], "chosen": "a", "rejected": "b"}) == "hi\na\nb"
    assert prompt_text(row("a")) == ""


def test_empty_answers():
    user, call = {"role": "user", "content": ""}, {"role": "assistant", "content": None, "tool_calls": [{}]}
    silent = {"role": "assistant", "content": " \n"}
    assert empty_parts({"messages": [user, silent, user, call]}) == ["messages[1].content"]
    assert empty_parts({"prompt": "", "completion": "\t"}) == ["completion"]
    assert empty_parts({"prompt": [user], "chosen": [silent], "rejected": " "}) == ["chosen[0].content", "rejected"]
    assert empty_parts(row(" ")) == ["text"] and empty_parts(row("x")) == []


@pytest.mark.parametrize(
    ("kind", "text", "wrong"),
    [
        ("email", "write to ann.lee+x@mail.example.org now", "write @ann, a@b"),
        ("phone", "call +49 30 1234567 or (555) 123-4567", "2024-11-05, 1234567890123"),
        ("card", "4111 1111 1111 1111", "4111 1111 1111 1112"),
        ("account", "DE89 3704 0044 0532 0130 00", "DE88 3704 0044 0532 0130 00"),
        ("address", "from 192.168.0.12", "version 1.2.3.4.5 or 300.1.1.1"),
        ("social_security", "078-05-1120", "1078-05-1120"),
        ("key", "AKIAIOSFODNN7EXAMPLE", "AKIA is a prefix"),
    ],
)
def test_private_data(kind, text, wrong):
    assert kind in private_data(text) and kind not in private_data(wrong)


def test_private_data_in_hostile_texts_takes_no_time():
    import time

    start = time.perf_counter()
    for text in ("a" * 200_000 + "@", "1" * 200_000, "1 " * 100_000, "AB12 " * 40_000, "a@" * 100_000, "1." * 100_000):
        private_data(text)
    assert time.perf_counter() - start < 10
