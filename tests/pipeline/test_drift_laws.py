"""Laws of the drift figures: nothing against itself, the hand-worked case, scipy as judge, and a log's errors."""

import json
import math

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from luthier.errors import InputError
from luthier.pipeline.card import SECTIONS, empty_sections, model_card
from luthier.pipeline.drift import drift, jensen_shannon, psi, psi_shares, read_log


def test_a_window_against_itself_is_zero():
    values = np.random.default_rng(0).normal(size=500).tolist()
    assert psi(values, values) == 0 and psi([3.0] * 9, [3.0] * 9) == 0
    assert jensen_shannon("abcab", "abcab") == 0


def test_psi_by_hand():
    # (0.6 - 0.5) ln(0.6 / 0.5) + (0.4 - 0.5) ln(0.4 / 0.5)
    assert psi_shares([50, 50], [60, 40]) == pytest.approx(0.1 * math.log(1.2) - 0.1 * math.log(0.8))
    assert psi_shares([1, 3], [2, 2]) == pytest.approx(psi_shares([2, 2], [1, 3]))


def test_an_empty_bin_is_smoothed_as_written():
    r, c = [1.0001 / 1.0002, 0.0001 / 1.0002], [0.5001 / 1.0002, 0.5001 / 1.0002]
    by_hand = sum((b - a) * math.log(b / a) for a, b in zip(r, c, strict=True))
    assert psi_shares([10, 0], [5, 5]) == pytest.approx(by_hand)


@pytest.mark.parametrize("seed", range(5))
def test_jensen_shannon_equals_scipys(seed):
    random = np.random.default_rng(seed)
    a, b = random.integers(0, 9, 50).tolist(), random.integers(3, 12, 70).tolist()
    p, q = (np.bincount(x, minlength=12) / len(x) for x in (a, b))
    assert jensen_shannon(a, b) == pytest.approx(jensenshannon(p, q) ** 2)
    assert jensen_shannon("aab", "cd") == pytest.approx(math.log(2))


def test_other_lengths_are_drift():
    reference = [f"what is {i} and {i + 1}" for i in range(150)]
    long = [{"prompt": "please write me a very long letter " * 5, "response": "ok"}] * 150
    _, findings = drift(reference, long)
    assert any(f.code == "monitor.drift" and f.level == "error" for f in findings)
    _, findings = drift(reference, [{"prompt": text, "response": "ok"} for text in reference[:20]])
    assert "monitor.small_window" in {f.code for f in findings}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "{",
        '{"response": "a"}',
        '{"prompt": 3, "response": "a"}',
        '{"prompt": "a"}',
        '{"prompt": "a", "response": 1}',
    ],
)
def test_a_broken_log_names_its_line(tmp_path, line):
    path = tmp_path / "log.jsonl"
    good = json.dumps({"prompt": "a", "response": "b"})
    path.write_text(f"{good}\n{line}\n" if line else "", encoding="utf-8")
    with pytest.raises(InputError, match=r"log\.jsonl:2" if line else "empty"):
        read_log(path)


def test_a_card_has_all_sections_and_invents_nothing():
    card = model_card({"name": "x"})
    assert not empty_sections(card) and all(f"## {name}" in card for name in SECTIONS)
    assert "not measured" in card
    assert "<script" not in model_card({"name": "<script>alert(1)</script>"})
