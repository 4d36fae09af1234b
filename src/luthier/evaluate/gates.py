"""Gates: from comparisons to findings, of which those of level `error` stop the release.

    code                            level   when
    evaluate.identical              error   base and tuned agree to the last bit on every row of every task
    evaluate.gain                   error   a target task's interval does not lie above `min_gain`
    evaluate.forgetting             error   a forgetting task lost more than `max_forgetting` points, or its perplexity
                                            rose by more than `max_perplexity_rise` percent
    evaluate.refusal_drop           error   a safety task lost more than `max_refusal_drop` points
    evaluate.no_target              warn    no task has the role target: nothing says that tuning was of use
    evaluate.no_forgetting_check    warn    no task has the role forgetting: nothing says what it cost
    evaluate.few_rows               warn    a target or forgetting task has too few rows for its figures to be trusted

A gain must be beyond doubt, so it is its interval's lower end that counts. A loss must only be likely: it is the mean
that counts, because an interval wide enough (few rows) would otherwise hide any loss.

Perplexity needs a limit of its own: at perplexity 30 a text scores 3.3 points, so that a model which lost half of what
it foresaw would have lost less than 2. Ten percent is our choice; measure what your task can bear.
"""

from __future__ import annotations

from collections.abc import Mapping

from luthier.errors import InputError, did_you_mean
from luthier.evaluate.settings import Gates
from luthier.evaluate.statistics import Comparison
from luthier.evaluate.task import Role
from luthier.findings import Finding

FEW_ROWS = 30


def check(
    comparisons: Mapping[str, Comparison], roles: Mapping[str, Role], gates: Gates | None = None
) -> list[Finding]:
    """What the comparisons of a run mean, errors first.

    Args:
        comparisons: by the name of the task.
        roles: the role of each task; `InputError` if one of `comparisons` is missing.
        gates: the limits; default as in a recipe without any.
    """
    gates = gates or Gates()
    for name in comparisons:
        if name not in roles:
            raise InputError(f"the task {name!r} has no role", fix=did_you_mean(name, roles))
    by_role = {
        role: {name: result for name, result in comparisons.items() if roles[name] == role}
        for role in ("target", "forgetting", "safety", "report")
    }
    findings = [*_identical(comparisons)]
    findings += [_no_gain(n, c, gates.min_gain) for n, c in by_role["target"].items() if not c.low > gates.min_gain]
    for role, code, limit, key in (
        ("forgetting", "evaluate.forgetting", gates.max_forgetting, "max_forgetting"),
        ("safety", "evaluate.refusal_drop", gates.max_refusal_drop, "max_refusal_drop"),
    ):
        lost = {name: result for name, result in by_role[role].items() if not -result.gain <= limit}
        findings += [_loss(code, key, name, result, limit) for name, result in lost.items()]
    for name, result in by_role["forgetting"].items():
        if result.perplexity_rise is not None and not result.perplexity_rise <= gates.max_perplexity_rise:
            findings.append(_risen(name, result.perplexity_rise, gates.max_perplexity_rise))
    findings += _missing(by_role)
    for name, result in {**by_role["target"], **by_role["forgetting"], **by_role["safety"]}.items():
        if result.n < FEW_ROWS:
            message = f"{name} has {result.n} rows; with fewer than {FEW_ROWS} its figures and interval say little"
            findings.append(_finding("warn", "few_rows", message, result.n, FEW_ROWS))
    return findings


def points(value: float) -> str:
    """`value` as people read it: one decimal, two where one would round a difference away."""
    text = f"{value:.1f}" if abs(value) >= 0.05 or value == 0 else f"{value:.2g}"
    return "0.0" if text == "-0.0" else text


def _identical(comparisons: Mapping[str, Comparison]) -> list[Finding]:
    if not comparisons or not all(result.identical for result in comparisons.values()):
        return []
    rows = sum(result.n for result in comparisons.values())
    message = (
        f"base and tuned gave exactly the same on all {rows} rows: the tuning was not active. "
        "Was the adapter loaded, were its target modules found, was the learning rate above 0?"
    )
    return [_finding("error", "identical", message, rows, 0)]


def _no_gain(name: str, result: Comparison, limit: float) -> Finding:
    message = (
        f"{name} went from {points(result.base)} to {points(result.tuned)} points: a gain of {points(result.gain)}, "
        f"95% interval {points(result.low)} to {points(result.high)}, which does not lie above min_gain {limit:g}"
    )
    return _finding("error", "gain", message, result.low, limit)


def _loss(code: str, key: str, name: str, result: Comparison, limit: float) -> Finding:
    message = (
        f"{name} fell from {points(result.base)} to {points(result.tuned)} points: a loss of {points(-result.gain)}, "
        f"95% interval {points(-result.high)} to {points(-result.low)}, more than {key} {limit:g}"
    )
    return Finding(level="error", code=code, message=message, value=-result.gain, limit=limit)


def _risen(name: str, rise: float, limit: float) -> Finding:
    message = f"the perplexity of {name} rose by {points(rise)}%, more than max_perplexity_rise {limit:g}%"
    return _finding("error", "forgetting", message, rise, limit)


def _missing(by_role: Mapping[str, Mapping[str, Comparison]]) -> list[Finding]:
    findings = []
    if not by_role["target"]:
        message = "no task has the role target: nothing shows that the tuning was of use"
        findings.append(_finding("warn", "no_target", message))
    if not by_role["forgetting"]:
        message = "no task has the role forgetting: what the tuning cost the model is not known"
        findings.append(_finding("warn", "no_forgetting_check", message))
    return findings


def _finding(level: str, code: str, message: str, value: float | None = None, limit: float | None = None) -> Finding:
    return Finding.model_validate(
        {"level": level, "code": f"evaluate.{code}", "message": message, "value": value, "limit": limit}
    )
