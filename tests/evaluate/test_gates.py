"""Gates: which comparisons close them, and with which code."""

from __future__ import annotations

from dataclasses import replace

import pytest

from luthier.errors import InputError
from luthier.evaluate import Comparison, Gates, Item, check, compare
from luthier.evaluate.gates import points

EVEN = Comparison(
    n=100, base=50, tuned=50, gain=0, low=-1, high=1, p_mcnemar=1.0, wins=5, losses=5, ties=90, identical=False
)


def gained(gain, low=None, high=None, **changes):
    ends = {"low": gain - 1 if low is None else low, "high": gain + 1 if high is None else high}
    return replace(EVEN, tuned=50 + gain, gain=gain, **ends, **changes)


def codes(findings):
    return [(finding.level, finding.code) for finding in findings]


def test_a_gain_beyond_doubt_without_a_loss_passes_in_silence():
    results = {"new": gained(10), "old": gained(-1.5), "refuses": gained(-2), "told": gained(-60)}
    roles = {"new": "target", "old": "forgetting", "refuses": "safety", "told": "report"}
    assert check(results, roles) == []


@pytest.mark.parametrize(
    "low, limit, passes", [(0.0, 0.0, False), (0.1, 0.0, True), (5, 5, False), (-0.9, -1.0, True), (-1, -1, False)]
)
def test_the_lower_end_must_lie_above_min_gain(low, limit, passes):
    results = {"new": gained(9, low=low), "old": EVEN}
    found = check(results, {"new": "target", "old": "forgetting"}, Gates(min_gain=limit))
    assert codes(found) == ([] if passes else [("error", "evaluate.gain")])
    if found:
        assert (found[0].value, found[0].limit) == (low, limit) and "new went from" in found[0].message


@pytest.mark.parametrize("role, code", [("forgetting", "evaluate.forgetting"), ("safety", "evaluate.refusal_drop")])
@pytest.mark.parametrize("gain, closed", [(-2.0, False), (-2.1, True), (3.0, False)])
def test_a_loss_beyond_the_limit_closes_the_gate_however_wide_its_interval(role, code, gain, closed):
    results = {"new": gained(9), "old": EVEN, "it": gained(gain, low=-40, high=40)}
    found = check(results, {"new": "target", "old": "forgetting", "it": role})
    assert codes(found) == ([("error", code)] if closed else [])
    if closed:
        assert found[0].value == pytest.approx(2.1) and found[0].limit == 2.0


@pytest.mark.parametrize("rise, closed", [(10.0, False), (10.1, True), (-40.0, False), (None, False)])
def test_perplexity_has_a_limit_of_its_own(rise, closed):
    # 3.3 points at perplexity 30: a rise by half costs 1.1 points and would pass the gate for points.
    results = {"new": gained(9), "old": gained(-1.1, perplexity_rise=rise)}
    found = check(results, {"new": "target", "old": "forgetting"})
    assert codes(found) == ([("error", "evaluate.forgetting")] if closed else [])
    told = {"new": gained(9), "old": EVEN, "told": results["old"]}
    assert check(told, {"new": "target", "old": "forgetting", "told": "report"}) == []


def test_what_was_not_looked_at_is_said():
    assert codes(check({"new": gained(9)}, {"new": "target"})) == [("warn", "evaluate.no_forgetting_check")]
    assert codes(check({"old": EVEN}, {"old": "forgetting"})) == [("warn", "evaluate.no_target")]
    assert codes(check({}, {})) == [("warn", "evaluate.no_target"), ("warn", "evaluate.no_forgetting_check")]


def test_too_few_rows_are_said():
    results = {"new": gained(9, n=29), "old": replace(EVEN, n=30), "told": replace(EVEN, n=1)}
    found = check(results, {"new": "target", "old": "forgetting", "told": "report"})
    assert codes(found) == [("warn", "evaluate.few_rows")] and found[0].value == 29


def test_identical_models_are_an_error_only_if_nothing_at_all_differs():
    same = [Item(str(i), 100.0 * (i % 2), answer="x", detail={"nll": 0.5}) for i in range(40)]
    one = compare(same, same)
    roles = {"new": "target", "old": "forgetting"}
    found = check({"new": one, "old": one}, roles)
    assert codes(found) == [("error", "evaluate.identical"), ("error", "evaluate.gain")]
    assert "80 rows" in found[0].message
    assert codes(check({"new": gained(9), "old": one}, roles)) == []


def test_a_task_without_a_role_is_refused():
    with pytest.raises(InputError, match="'knew' has no role; did you mean 'new'"):
        check({"knew": EVEN}, {"new": "target"})


@pytest.mark.parametrize(
    "value, text", [(0.0, "0.0"), (-0.0, "0.0"), (12.34, "12.3"), (-2.05, "-2.0"), (0.004, "0.004"), (-0.01, "-0.01")]
)
def test_points_for_people(value, text):
    assert points(value) == text
