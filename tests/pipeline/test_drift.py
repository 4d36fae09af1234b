"""Drift figures against hand-worked numbers, scipy, and laws; the request log's errors."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import chi2

from luthier.errors import InputError
from luthier.pipeline.drift import chance, decile_edges, drift, jensen_shannon, prompt_text, psi, psi_shares, read_log

ORDERS = ("where is my order number", "it has not arrived yet", "and the parcel is late please help")
POEMS = ("write a poem about autumn leaves", "rivers mountains clouds", "stars moonlight and silence")
ORDERS, POEMS = [[word for line in lines for word in line.split()] for lines in (ORDERS, POEMS)]


def _prompts(words, count, lengths, seed):
    generator = random.Random(seed)
    return [" ".join(generator.choices(words, k=generator.choice(lengths))) for _ in range(count)]


def _requests(prompts, **more):
    return [{"prompt": prompt, "response": "Fine.", **more} for prompt in prompts]


def test_psi_of_identical_windows_is_zero():
    window = list(np.random.default_rng(0).integers(1, 40, 200))
    assert psi(window, window) == 0
    assert psi(window, list(reversed(window))) == 0
    assert psi([3, 3, 3], [3, 3]) == 0


def test_psi_worked_by_hand():
    # shares 1/2, 1/2 against 1/4, 3/4: (-1/4) ln(1/2) + (1/4) ln(3/2) = ln(3) / 4
    assert psi_shares([0.5, 0.5], [1, 3]) == pytest.approx(math.log(3) / 4, abs=1e-12)
    assert psi([1, 1, 5, 5], [1, 5, 5, 5], bins=[3]) == pytest.approx(math.log(3) / 4, abs=1e-12)


def test_an_empty_bin_is_smoothed():
    r, c = (0.5 + 1e-4) / 1.0002, (1 + 1e-4) / 1.0002
    e = 1e-4 / 1.0002
    assert psi_shares([1, 1], [2, 0]) == pytest.approx((c - r) * math.log(c / r) + (e - r) * math.log(e / r), abs=1e-12)


def test_psi_is_symmetric_and_never_negative():
    generator = np.random.default_rng(1)
    for _ in range(50):
        a, b = generator.integers(0, 5, (2, 6)) + np.eye(2, 6, dtype=int)
        assert psi_shares(a, b) == pytest.approx(psi_shares(b, a), abs=1e-12)
        assert psi_shares(a, b) >= 0


def test_deciles_merge_and_a_constant_window_tells_both_sides():
    assert decile_edges(range(101)) == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert decile_edges([1] * 60 + [2] * 40) == [1]
    assert psi([5] * 100, [4] * 100) > 1 < psi([5] * 100, [6] * 100)


def test_chance_is_chi_square_where_bins_are_full_and_covers_small_windows():
    assert chance([100] * 10, 500) == pytest.approx(chi2.ppf(0.99, 9) * (1 / 1000 + 1 / 500), rel=0.15)
    generator = np.random.default_rng(2)
    before, after = (generator.multinomial(size, np.full(10, 0.1), 1000) for size in (300, 20))
    bound = chance([30] * 10, 20)
    assert 0.001 < np.mean([psi_shares(a, b) > bound for a, b in zip(before, after, strict=True)]) < 0.03


def test_jensen_shannon_bounds_and_scipy():
    assert jensen_shannon("abab", "ba") == 0
    assert jensen_shannon("aab", "cd") == pytest.approx(math.log(2))
    a, b = ([*letters] for letters in ("theccatsatt", "ddogsatinaa"))
    vocabulary = sorted({*a, *b})
    expected = jensenshannon([a.count(w) for w in vocabulary], [b.count(w) for w in vocabulary]) ** 2
    assert jensen_shannon(a, b) == pytest.approx(expected, abs=1e-12)
    assert jensen_shannon(a, b) == jensen_shannon(b, a)


@pytest.mark.parametrize(
    "call", [lambda: psi([], [1]), lambda: psi([1.0], [math.nan]), lambda: jensen_shannon([], "a")]
)
def test_windows_without_figures_are_refused(call):
    with pytest.raises(InputError):
        call()


def test_the_same_requests_raise_nothing():
    reference = _prompts(ORDERS, 400, range(4, 20), 0) + _prompts(POEMS, 400, range(4, 20), 1)
    report, findings = drift(reference, _requests(reference, latency_ms=5), warn=0.2, error=0.3, min_requests=100)
    assert findings == []
    assert report["psi"] == {"length": 0, "topics": 0} and report["jensen_shannon_nats"] == 0
    assert report["latency_ms"] == {"count": 800, "p50": 5, "p95": 5}
    fresh = _prompts(ORDERS, 400, range(4, 20), 2) + _prompts(POEMS, 400, range(4, 20), 3)
    assert drift(reference, _requests(fresh), warn=0.2, error=0.3, min_requests=100)[1] == []
    json.dumps(report, allow_nan=False)


def test_other_lengths_and_other_topics_are_errors():
    reference = _prompts(ORDERS, 300, range(4, 20), 0) + _prompts(POEMS, 100, range(4, 20), 1)
    longer = drift(reference, _requests(_prompts(ORDERS + POEMS, 200, range(30, 50), 2)))[1]
    assert ("error", "monitor.drift") in {(f.level, f.code) for f in longer}
    report, findings = drift(reference, _requests(_prompts(POEMS, 200, range(4, 20), 3)))
    assert report["psi"]["length"] < 0.2 and report["psi"]["topics"] > 0.3
    assert [(f.level, f.code) for f in findings] == [("error", "monitor.drift")]
    assert drift(reference, _requests(_prompts(POEMS, 200, range(4, 20), 3)))[0] == report


def test_between_the_limits_is_a_warning():
    reference = _prompts(ORDERS, 300, range(4, 20), 0)
    requests = _requests(_prompts(ORDERS, 200, range(8, 24), 1))
    value = drift(reference, requests)[0]["psi"]["length"]
    findings = drift(reference, requests, warn=value / 2, error=value * 2)[1]
    assert "warn" in {f.level for f in findings if "lengths" in f.message}


def test_a_small_window_is_held_against_chance():
    reference = _prompts(ORDERS, 300, range(4, 20), 0)
    small = drift(reference, _requests(_prompts(ORDERS, 20, range(4, 20), 1)))[1]
    assert [f.code for f in small] == ["monitor.small_window"]
    moved = drift(reference, _requests(_prompts(ORDERS, 20, range(60, 80), 1)))[1]
    assert ("error", "monitor.drift") in {(f.level, f.code) for f in moved}


def test_failed_empty_and_refusing_answers_are_counted():
    reference = _prompts(ORDERS, 200, range(4, 20), 0)
    requests = _requests(reference)
    requests[0] = {"prompt": "x", "error": "timeout"}
    requests[1] = {"prompt": "x", "response": " "}
    requests[2] = {"prompt": "x", "response": "I'm sorry, but I can't help with that."}
    report, findings = drift(reference, requests, max_errors=0.009)
    assert report["error_rate"] == pytest.approx(1 / 200) and report["empty_rate"] == pytest.approx(1 / 200)
    assert report["refusal_rate"] == pytest.approx(1 / 199)
    assert [f.code for f in findings] == ["monitor.errors"]


def test_words_that_are_all_strange_still_give_a_report():
    report, _ = drift(["???", "!"], _requests(["...", "hello"]))
    assert report["jensen_shannon_nats"] is None


def test_prompt_text_takes_what_the_user_said():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert prompt_text({"messages": [*messages, {"role": "user", "content": "b"}]}) == "a\nb"
    assert prompt_text({"prompt": "p"}) == "p"


def test_read_log(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"prompt": "a", "response": "b", "latency_ms": 1.5}, {"messages": [{"role": "user"}], "error": "no"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert [row["where"] for row in read_log(path)] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[1]", "object"),
        ("{", "breaks off"),
        ('{"response": "a"}', "either 'prompt' or 'messages'"),
        ('{"prompt": "a"}', "neither 'response' nor 'error'"),
        ('{"prompt": 1, "response": ""}', "must be a text"),
        ('{"prompt": "a", "response": "", "latency_ms": NaN}', "NaN"),
        ('{"prompt": "a", "response": "", "latency_ms": -1}', "at least 0"),
        ('{"messages": "a", "response": ""}', "list of objects"),
        ('{"prompt": "a", "response": "", "error": 5}', "'error'"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, says):
    path = tmp_path / "log.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(InputError, match=says) as error:
        read_log(path)
    assert "log.jsonl:2" in str(error.value)


def test_an_empty_or_missing_log_is_refused(tmp_path):
    (tmp_path / "log.jsonl").write_text("\n")
    for name in ("log.jsonl", "none.jsonl"):
        with pytest.raises(InputError, match=name):
            read_log(tmp_path / name)
