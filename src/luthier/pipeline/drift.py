"""Monitoring: do today's requests still look like the rows that the model was tuned and tested on?

The reference window is the prompts of the validation split, the current window a log of requests. Two shapes of both
are compared, each as shares c_i (current) and r_i (reference) of the requests in bins i:

    psi = sum_i (c_i - r_i) ln(c_i / r_i)        population stability index, >= 0, the same both ways round

    length   words of a prompt; the bins lie between the deciles of the reference window, equal deciles merged
    topics   clusters of the reference prompts, found by k-means on their words

and the words themselves by the Jensen-Shannon divergence. By the usual rule of credit scoring, 0.2 deserves a look and
0.3 means that what was measured at release says little about now (both are settings).

By chance alone two honest windows of 50 differ by a PSI of about 0.36 on ten bins. The report states what chance
exceeds once in a hundred times, and a window with fewer requests than `min_requests` is held against the larger of
that and the limits.

    monitor.drift          warn, error   a PSI above its limit
    monitor.small_window   warn          fewer requests than `min_requests`
    monitor.errors         error         more requests than `max_errors` failed or were answered with nothing
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.cluster.vq import kmeans2, vq

from luthier.data.json_rows import json_lines
from luthier.errors import InputError
from luthier.findings import Finding

SMOOTHING = 1e-4  # added to every bin's share where some bin is empty
TOPICS = 8  # clusters at most
_BUCKETS = 512  # words are hashed to so many places
_LINE_BYTES = 2**26
_WORD = re.compile(r"\w+")
_REFUSAL = re.compile(  # English only: the share is told, no finding hangs on it
    r"\s*(i(['’]m| am) (very |so )?(sorry|unable|not able)|sorry|i apologi[sz]e|i (can ?not|can['’]t|won['’]t)|"
    r"i(['’]m| am) (just )?an ai|as an ai)\b",
    re.IGNORECASE,
)


# -- figures


def psi_shares(reference: Sequence[float], current: Sequence[float]) -> float:
    """PSI of two lists of shares (or counts: they are divided by their sum), one number per bin, in the same order."""
    r, c = np.asarray(reference, float), np.asarray(current, float)
    both = np.concatenate([r, c]) if r.ndim == c.ndim == 1 else np.array([-1.0])
    if r.shape != c.shape or not np.isfinite(both).all() or (both < 0).any() or not r.sum() > 0 or not c.sum() > 0:
        raise InputError("PSI needs two lists of shares of equal length, none negative and neither all zero")
    r, c = r / r.sum(), c / c.sum()
    if (r == 0).any() or (c == 0).any():
        r, c = (r + SMOOTHING) / (1 + SMOOTHING * r.size), (c + SMOOTHING) / (1 + SMOOTHING * c.size)
    return float(((c - r) * np.log(c / r)).sum())


def decile_edges(reference: Sequence[float]) -> list[float]:
    """The edges between bins: the nine inner deciles of `reference`, ascending, without doubles.

    A decile is a value of the window (no interpolation), and one that equals the largest merges with it. Bin i holds
    edge[i-1] < x <= edge[i]. A window of one value only gets edges on both sides of it, so that smaller ones are told
    from larger ones.
    """
    values = np.asarray(reference, float)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise InputError("the reference window needs at least one value, all of them finite")
    low, high = float(values.min()), float(values.max())
    if low == high:
        return [math.nextafter(low, -math.inf), low]
    deciles = np.unique(np.quantile(values, np.arange(1, 10) / 10, method="inverted_cdf"))
    return [float(edge) for edge in deciles if edge < high]


def psi(reference: Sequence[float], current: Sequence[float], bins: Sequence[float] | None = None) -> float:
    """PSI of two windows of numbers over `bins` (ascending inner edges; default `decile_edges(reference)`)."""
    edges = decile_edges(reference) if bins is None else list(bins)
    if any(not a < b for a, b in itertools.pairwise(edges)):
        raise InputError(f"the edges of the bins must ascend, got {edges}")
    return psi_shares(_counts(reference, edges), _counts(current, edges))


def chance(reference: Sequence[float], size: int, *, seed: int = 0) -> float:
    """The PSI that honest requests exceed once in a hundred windows of `size`, found by drawing 1,000 of them.

    Both windows are drawn from the shares of the `reference` counts, so that it too is taken as one of many. For
    bins with many requests this is (1/n + 1/m) times the 99% point of chi-square with (bins - 1) degrees of freedom
    (Yurdakul 2018); empty bins, which small windows have, make it larger.
    """
    counts = np.asarray(reference, float)
    generator = np.random.default_rng(seed)
    before = generator.multinomial(int(counts.sum()), counts / counts.sum(), 1000)
    after = generator.multinomial(size, counts / counts.sum(), 1000)
    drawn = [psi_shares(a.tolist(), b.tolist()) for a, b in zip(before, after, strict=True)]
    return float(np.quantile(drawn, 0.99))


def jensen_shannon(tokens_a: Iterable[Any], tokens_b: Iterable[Any]) -> float:
    """Jensen-Shannon divergence in nats (0 alike, ln 2 nothing in common) of the unigrams of two streams of tokens."""
    a, b = Counter(tokens_a), Counter(tokens_b)
    if not a or not b:
        raise InputError("the Jensen-Shannon divergence needs at least one token on either side")
    tokens = list(a.keys() | b.keys())
    p = np.array([a[token] for token in tokens], float) / a.total()
    q = np.array([b[token] for token in tokens], float) / b.total()
    half = (p + q) / 2
    parts = [side[side > 0] * np.log(side[side > 0] / half[side > 0]) / 2 for side in (p, q)]
    exact = math.fsum(np.concatenate(parts).tolist())  # of no influence: the order of tokens, and which window is first
    return float(min(max(exact, 0.0), math.log(2)))


def topic_counts(
    reference: Sequence[str], current: Sequence[str], *, topics: int = TOPICS, seed: int = 0
) -> tuple[list[int], list[int], list[list[str]]]:
    """How many prompts of both windows fall in each cluster of the reference window, and the words of each cluster.

    A prompt is the bag of its lower-case words, each hashed to one of 512 places and weighted by how few reference
    prompts have it (inverse document frequency), scaled to length 1; k-means with a seeded k-means++ start, at most
    one cluster for every ten reference prompts. Up to five words tell a cluster's name: those most over-represented.
    """
    rarity = _rarity(reference)
    points, others = _vectors(reference, rarity), _vectors(current, rarity)
    k = max(1, min(topics, len(reference) // 10, len(np.unique(points, axis=0))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cluster that loses all its points stays where it was; it is dropped below
        centres, _ = kmeans2(points, _first_centres(points, k, np.random.default_rng(seed)), minit="matrix", iter=20)
    near, _ = vq(points, centres)
    kept = np.unique(near)
    near, there = vq(points, centres[kept])[0], vq(others, centres[kept])[0]
    before, after = np.bincount(near, minlength=len(kept)), np.bincount(there, minlength=len(kept))
    return before.tolist(), after.tolist(), _names(reference, near.tolist(), len(kept))


def _counts(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    found = np.asarray(values, float)
    if found.ndim != 1 or found.size == 0 or not np.isfinite(found).all():
        raise InputError("a window needs at least one value, all of them finite")
    return [float(n) for n in np.bincount(np.searchsorted(edges, found, side="left"), minlength=len(edges) + 1)]


def words(text: str) -> list[str]:
    """The lower-case words of `text`: runs of letters, digits and underscores."""
    return _WORD.findall(text.lower())


def _places(text: str) -> list[int]:
    return [zlib.crc32(word.encode("utf-8", "surrogatepass")) % _BUCKETS for word in words(text)]


def _rarity(texts: Sequence[str]) -> Any:
    seen = np.zeros(_BUCKETS)
    for text in texts:
        seen[list(set(_places(text)))] += 1
    return np.log((1 + len(texts)) / (1 + seen)) + 1e-3


def _vectors(texts: Sequence[str], rarity: Any) -> Any:
    """(texts, places) float64, rows of length 1, or 0 where a text has no word."""
    rows = np.zeros((len(texts), _BUCKETS))
    for row, text in zip(rows, texts, strict=True):
        np.add.at(row, _places(text), 1.0)
    rows *= rarity
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _first_centres(points: Any, k: int, generator: np.random.Generator) -> Any:
    """k-means++ (Arthur and Vassilvitskii 2007): each next centre with probability by squared distance."""
    chosen = [int(generator.integers(len(points)))]
    distance = np.full(len(points), np.inf)
    while len(chosen) < k:
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(generator.choice(len(points), p=distance / distance.sum())))
    return points[chosen]


def _names(texts: Sequence[str], near: Sequence[int], k: int) -> list[list[str]]:
    inside: list[Counter[str]] = [Counter() for _ in range(k)]
    for text, cluster in zip(texts, near, strict=True):
        inside[cluster].update(set(words(text)))
    everywhere = sum(inside, Counter())
    named = []
    for part in inside:
        weight = {word: count**2 / everywhere[word] for word, count in part.items()}
        named.append(sorted(weight, key=lambda word, weight=weight: (-weight[word], word))[:5])  # type: ignore[misc]
    return named


# -- the log


def prompt_text(row: Mapping[str, Any]) -> str:
    """What the user said: a row's `prompt`, or the users' messages of `messages` (or of a prompt that is a list)."""
    said = row.get("messages", row.get("prompt"))
    if isinstance(said, str):
        return said
    contents = [m.get("content") for m in said or () if isinstance(m, Mapping) and m.get("role") == "user"]
    parts = [p for c in contents for p in (c if isinstance(c, list) else [c])]
    texts = [p.get("text") if isinstance(p, Mapping) else p for p in parts]
    return "\n".join(text for text in texts if isinstance(text, str))


def read_log(path: Path | str) -> list[dict[str, Any]]:
    """The requests of a log: one JSON object a line, each also given its place as `where`.

    Keys: `prompt` (text) or `messages`; `response` (text or null; may be missing where there is an `error`); optional
    `latency_ms` (number >= 0), `error` (text or true; null, false and "" mean none), `time` (text or number). Other
    keys are kept. Raises `InputError` with file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("there is no such request log", where=str(path))
    try:
        requests = [_request(row, f"{path}:{number}") for number, row in json_lines(path, _LINE_BYTES)]
    except OSError as error:
        raise InputError(f"the request log cannot be read ({error.strerror})", where=str(path)) from error
    if not requests:
        raise InputError("the request log is empty", where=str(path))
    return requests


def _request(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"a request is an object, got {type(row).__name__}", where=where)
    if ("prompt" in row) == ("messages" in row):
        raise InputError("a request has either 'prompt' or 'messages', and not both", where=where)
    if "prompt" in row and not isinstance(row["prompt"], str):
        raise InputError(f"'prompt' must be a text, got {type(row['prompt']).__name__}", where=where)
    messages = row.get("messages", [{}])
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise InputError("'messages' must be a list of objects with role and content", where=where)
    if not isinstance(row.get("error"), (str, bool, type(None))):
        raise InputError(f"'error' must be a text, true, false or null, got {row['error']!r}", where=where)
    if "response" not in row and not row.get("error"):
        raise InputError("the request has neither 'response' nor 'error'", where=where)
    if not isinstance(row.get("response"), (str, type(None))):
        raise InputError(f"'response' must be a text or null, got {type(row['response']).__name__}", where=where)
    latency = row.get("latency_ms")
    number = isinstance(latency, (int, float)) and not isinstance(latency, bool)
    if latency is not None and not (number and 0 <= latency < math.inf):
        raise InputError(f"'latency_ms' must be a number of at least 0, got {latency!r}", where=where)
    if isinstance(row.get("time"), bool) or not isinstance(row.get("time"), (str, int, float, type(None))):
        raise InputError(f"'time' must be a text or a number, got {row['time']!r}", where=where)
    return {**row, "where": where}


# -- the comparison


def drift(
    reference_prompts: Sequence[str],
    requests: Sequence[Mapping[str, Any]],
    *,
    warn: float = 0.2,
    error: float = 0.3,
    min_requests: int = 100,
    max_errors: float = 0.05,
    seed: int = 0,
) -> tuple[dict[str, Any], list[Finding]]:
    """Compare a window of requests (as `read_log` gives them) with the reference prompts.

    Args:
        reference_prompts: texts, as `prompt_text` gives them of the validation rows.
        requests: the current window; those that failed count as requests too.
        warn, error: limits of each PSI, 0 < warn <= error.
        min_requests: below it a window is small.
        max_errors: largest share of requests that may fail or be answered with nothing, in [0, 1].
        seed: of the topic clusters.

    Returns the report (json-able; keys that have no figure are None) and the findings.
    """
    if not 0 < warn <= error or not 0 <= max_errors <= 1:
        raise InputError(f"drift needs 0 < warn <= error and 0 <= max_errors <= 1, got {warn}, {error}, {max_errors}")
    if not reference_prompts or not requests:
        raise InputError("drift needs at least one reference prompt and one request")
    prompts = [prompt_text(request) for request in requests]
    lengths = [[float(len(words(text))) for text in window] for window in (reference_prompts, prompts)]
    edges = decile_edges(lengths[0])
    before, after, names = topic_counts(reference_prompts, prompts, seed=seed)
    tokens = [[word for text in window for word in words(text)] for window in (reference_prompts, prompts)]
    sizes = (len(reference_prompts), len(prompts))
    report: dict[str, Any] = {
        "reference": sizes[0],
        "requests": sizes[1],
        "psi": {"length": psi(lengths[0], lengths[1], bins=edges), "topics": psi_shares(before, after)},
        "by_chance": {
            "length": chance(_counts(lengths[0], edges), sizes[1], seed=seed),
            "topics": chance(before, sizes[1], seed=seed),
        },
        "limits": {"warn": warn, "error": error, "min_requests": min_requests, "max_errors": max_errors},
        "length": {
            "edges": edges,
            "reference": _counts(lengths[0], edges),
            "current": _counts(lengths[1], edges),
            "median": [float(np.median(window)) for window in lengths],
        },
        "topics": [{"words": w, "reference": r, "current": c} for w, r, c in zip(names, before, after, strict=True)],
        "jensen_shannon_nats": jensen_shannon(*tokens) if tokens[0] and tokens[1] else None,
    } | _responses(requests)
    return report, _findings(report)


def _responses(requests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares of failed, empty and refusing answers, and the latency where it was logged."""
    answered = [request for request in requests if not request.get("error")]
    texts = [request.get("response") or "" for request in answered]
    times = [float(r["latency_ms"]) for r in requests if r.get("latency_ms") is not None]
    empty = sum(not text.strip() for text in texts)
    p50, p95 = (float(x) for x in np.quantile(times, [0.5, 0.95])) if times else (None, None)
    return {
        "error_rate": 1 - len(answered) / len(requests),
        "empty_rate": empty / len(requests),
        "refusal_rate": sum(bool(_REFUSAL.match(text)) for text in texts) / len(texts) if texts else None,
        "latency_ms": {"count": len(times), "p50": p50, "p95": p95} if times else None,
    }


def _findings(report: Mapping[str, Any]) -> list[Finding]:
    found = []
    limits = report["limits"]
    small = report["requests"] < limits["min_requests"]
    if small:
        text = (
            f"the window has {report['requests']} requests, fewer than {limits['min_requests']}: figures are unsteady"
        )
        found.append(
            Finding(
                level="warn",
                code="monitor.small_window",
                message=text,
                value=report["requests"],
                limit=limits["min_requests"],
            )
        )
    for name, value in report["psi"].items():
        by_chance = report["by_chance"][name]
        if small and value <= by_chance:
            continue
        if value > limits["warn"]:
            level: Any = "error" if value > limits["error"] else "warn"
            shape = "lengths" if name == "length" else "topics"
            text = f"the {shape} of the requests have moved away from the validation rows: PSI {value:.3f}"
            text += f" (chance exceeds {by_chance:.3f} once in a hundred windows of this size)"
            found.append(
                Finding(level=level, code="monitor.drift", message=text, value=round(value, 6), limit=limits[level])
            )
    failed = report["error_rate"] + report["empty_rate"]
    if failed > limits["max_errors"]:
        text = f"{100 * report['error_rate']:.1f}% of the requests failed and {100 * report['empty_rate']:.1f}% were "
        text += "answered with nothing"
        found.append(
            Finding(
                level="error",
                code="monitor.errors",
                message=text,
                value=round(failed, 6),
                limit=limits["max_errors"],
            )
        )
    return found
