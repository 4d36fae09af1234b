"""Compiled passes over stored weights: what torch does in twenty operations on a tile, in one that stays in the cache.

A tile of stored weights is one array `sides` (S, n): the elements of the base and of each model, as `Differences` and
`luthier.merge.fused` hand them on. Its type is uint16, the bits of bfloat16, or float32, into which all other types are
turned before. Every pass goes through it in runs of `RUN` elements, whose float32 values stay in the first cache, and
lets go of Python's lock once for the whole tile, so that all cores work.

    compare     counts above and at two values, of the magnitudes of model - base
    within      the magnitudes between two values
    balance     how many more places elect plus than minus
    combine     base + what is kept of the differences, in the stored type, and what the report counts
    blend       the weighted sum of models

The definitions are the torch functions of `luthier.weights.algebra`, `luthier.weights.ranks` and the methods; these
give the same to the last bit, which tests hold them to: float32 in the same order, products that torch adds in one
rounding added so (`fma`), the sign of a sum from float64. Only the squared norms of the report may be summed in
another order. All arithmetic is on finite numbers: a pass whose outcome or norms are not finite says so, and the caller
takes the general path, which finds and names the culprit.

Numba compiles each pass when it is first called, and keeps the code in its cache (beside this file, or in the user's
cache folder); where neither can be written, every process compiles anew. All passes stand in one file, because the
cache does not notice changes of another. Loops are short and use few arrays of one width: so LLVM vectorises them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numba.core import types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])
RUN = 2048
PLAIN, MEAN, SUM, MAX = 0, 1, 2, 3  # how `combine` brings the kept differences together
_ZERO, _ONE, _YES, _NO = np.float32(0), np.float32(1), np.int32(1), np.int32(0)


def _compiled(**settings: Any) -> Callable[[F], F]:
    """`numba.njit` that lets go of Python's lock; cached where there is a place for it."""

    def compiled(function: F) -> F:
        try:
            return njit(nogil=True, error_model="numpy", cache=True, **settings)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # numba found no folder that can be written
            return njit(nogil=True, error_model="numpy", **settings)(function)  # type: ignore[no-any-return]

    return compiled


@intrinsic  # type: ignore[untyped-decorator]
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float32 with one rounding, as torch.add(c, a, alpha=b) computes it."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), emit


@_compiled()
def _widen(stored, out):
    """stored.float() into `out`: (m,) uint16 bits of bfloat16, or float32."""
    if stored.itemsize == 2:
        bits = out.view(np.uint32)
        for i in range(len(stored)):
            bits[i] = np.uint32(stored[i]) << np.uint32(16)
    else:
        for i in range(len(stored)):
            out[i] = stored[i]


@_compiled()
def _narrow(values, out):
    """values.to(out's type): (m,) finite float32; bfloat16 rounded to nearest, ties to even."""
    if out.itemsize == 2:
        bits = values.view(np.uint32)
        for i in range(len(values)):
            odd = np.uint32((bits[i] >> np.uint32(16)) & np.uint32(1))
            out[i] = np.uint16(np.uint32(bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    else:
        for i in range(len(values)):
            out[i] = values[i]


@_compiled()
def _subtract(stored, base, out):
    """stored.float() - base into `out`."""
    _widen(stored, out)
    for i in range(len(base)):
        out[i] -= base[i]


@_compiled(fastmath={"reassoc"})
def _squares(values):
    """Sum of squares of (m,) float32, in any order."""
    total = _ZERO
    for i in range(len(values)):
        total += values[i] * values[i]
    return total


@_compiled(fastmath={"reassoc"})
def _total(values):
    """Sum of (m,) float32, in any order; finite only if all are."""
    total = _ZERO
    for i in range(len(values)):
        total += values[i]
    return total


@_compiled()
def _from(delta, value, out):
    """`delta` into `out` where its magnitude is not below `value`, 0 elsewhere; all (m,) float32."""
    for i in range(len(delta)):
        out[i] = delta[i] if abs(delta[i]) >= value else _ZERO


@_compiled()
def _above(delta, value, out):
    """`delta` into `out` where its magnitude is above `value`, 0 elsewhere."""
    for i in range(len(delta)):
        out[i] = delta[i] if abs(delta[i]) > value else _ZERO


@_compiled()
def _below(delta, value, out):
    """`out` becomes 0 where the magnitude of `delta` is not below `value`."""
    for i in range(len(delta)):
        out[i] = _ZERO if abs(delta[i]) >= value else out[i]


@_compiled()
def _up_to(delta, value, out):
    """`out` becomes 0 where the magnitude of `delta` is above `value`."""
    for i in range(len(delta)):
        out[i] = _ZERO if abs(delta[i]) > value else out[i]


@_compiled()
def _trimmed(delta, start, k, values, places, weights, out):
    """What the two cuts of model k keep of a run of differences, times the model's weight, into `out`."""
    size = len(delta)
    first = min(max(places[k, 1] - start, 0), size)  # up to here what equals the cut is above it
    _from(delta[:first], values[k, 1], out[:first])
    _above(delta[first:], values[k, 1], out[first:])
    if values[k, 0] < np.inf:
        first = min(max(places[k, 0] - start, 0), size)
        _below(delta[:first], values[k, 0], out[:first])
        _up_to(delta[first:], values[k, 0], out[first:])
    if weights[k] != _ONE:
        _times(out, weights[k])


@_compiled()
def _times(values, factor):
    for i in range(len(values)):
        values[i] *= factor


@_compiled()
def _add_up(kept, sums):
    """kept.double() added to `sums`: (m,) float32 and float64."""
    for i in range(len(sums)):
        sums[i] += np.float64(kept[i])


@_compiled()
def _counts(values, low, high):
    """How many of (m,) float32 are above and not below `low`, above and not below `high`: four int32."""
    a, b, c, d = _NO, _NO, _NO, _NO
    for i in range(len(values)):
        value = values[i]
        a = np.int32(a + (_YES if value > low else _NO))
        b = np.int32(b + (_YES if value >= low else _NO))
        c = np.int32(c + (_YES if value > high else _NO))
        d = np.int32(d + (_YES if value >= high else _NO))
    return a, b, c, d


@_compiled()
def _magnitudes(values):
    for i in range(len(values)):
        values[i] = abs(values[i])


@_compiled()
def compare(sides, lows, highs):
    """Of each model and bracket: how many magnitudes of its difference are above and not below `low`, above and not
    below `high`.

    Args:
        sides: (K + 1, n), the base first.
        lows, highs: (K, R) float32.

    Returns (K, R, 4) int64.
    """
    models, brackets = lows.shape
    found = np.zeros((models, brackets, 4), np.int64)
    base, values = np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    n = sides.shape[1]
    for start in range(0, n, RUN):
        stop = min(start + RUN, n)
        ours, theirs = base[: stop - start], values[: stop - start]
        _widen(sides[0, start:stop], ours)
        for k in range(models):
            _subtract(sides[k + 1, start:stop], ours, theirs)
            _magnitudes(theirs)
            for r in range(brackets):
                counts = _counts(theirs, lows[k, r], highs[k, r])
                for c in range(4):
                    found[k, r, c] += counts[c]
    return found


@_compiled()
def within(sides, k, low, high, count):
    """The `count` magnitudes of model k's difference between `low` and `high`, ends excluded, in order: float32."""
    found = np.empty(count, np.float32)
    base, values = np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    n, at = sides.shape[1], 0
    for start in range(0, n, RUN):
        stop = min(start + RUN, n)
        ours, theirs = base[: stop - start], values[: stop - start]
        _widen(sides[0, start:stop], ours)
        _subtract(sides[k + 1, start:stop], ours, theirs)
        _magnitudes(theirs)
        for i in range(stop - start):
            if low < theirs[i] < high and at < count:
                found[at] = theirs[i]
                at += 1
    return found


@_compiled()
def balance(sides, values, places, weights):
    """algebra.balance(elect(trimmed)): places that elect plus less those that elect minus.

    Args:
        sides: (K + 1, n), the base first.
        values, places, weights: as in `combine`.
    """
    models, n, more = len(weights), sides.shape[1], 0
    base, delta, kept = np.empty(RUN, np.float32), np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    sums = np.empty(RUN, np.float64)
    for start in range(0, n, RUN):
        stop = min(start + RUN, n)
        m = stop - start
        _widen(sides[0, start:stop], base[:m])
        sums[:m] = 0
        for k in range(models):
            _subtract(sides[k + 1, start:stop], base[:m], delta[:m])
            _trimmed(delta[:m], start, k, values, places, weights, kept[:m])
            _add_up(kept[:m], sums[:m])
        more += _lead(sums[:m])
    return more


@_compiled()
def _lead(sums):
    """How many more of (m,) float64 are above 0 than below."""
    more = 0
    for i in range(len(sums)):
        more += (1 if sums[i] > 0 else 0) - (1 if sums[i] < 0 else 0)
    return more


@_compiled()
def combine(sides, values, places, weights, factors, how, tie, scale):
    """moved(base, scale * change), where `change` is of the kept differences.

    Args:
        sides: (K + 1, n) uint16 (bfloat16) or float32, the base first.
        values, places: (K, 2) float32 and int64: what `_Cut.keep` needs of two cuts of each model, places counted from
            the tile's first element: what is above the second is kept, but for what is above the first.
        weights: (K,) float32: what is kept is multiplied by them.
        factors: (K,) float32: for PLAIN those of `lincomb`, for MEAN what models that agree add to the divisor.
        how: PLAIN is lincomb(kept, factors); MEAN, SUM and MAX are those of `agree`, with the sign of the sum.
        tie: the sign where the sum is exactly 0.

    Returns (n,) of the type of `sides`; (K + 3,) int64: of each model how many differences were kept, then the places
    that one model or more, and that two or more have kept, and those where kept ones have both signs; (K + 1,) float64:
    squared norms of the base and of each difference; whether all numbers are finite.
    """
    models, n = len(weights), sides.shape[1]
    merged, counts, squares = np.empty(n, sides.dtype), np.zeros(models + 3, np.int64), np.zeros(models + 1)
    base, delta, sign = np.empty(RUN, np.float32), np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    total, divisor = np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    most, least, spoken = np.empty(RUN, np.float32), np.empty(RUN, np.float32), np.empty(RUN, np.int32)
    kept, sums = np.empty((models, RUN), np.float32), np.empty(RUN, np.float64)
    fine = True
    for start in range(0, n, RUN):
        stop = min(start + RUN, n)
        m = stop - start
        _widen(sides[0, start:stop], base[:m])
        squares[0] += _squares(base[:m])
        sums[:m], spoken[:m], most[:m], least[:m] = 0, 0, 0, 0
        for k in range(models):
            _subtract(sides[k + 1, start:stop], base[:m], delta[:m])
            squares[k + 1] += _squares(delta[:m])
            _trimmed(delta[:m], start, k, values, places, weights, kept[k, :m])
            counts[k] += _speak(kept[k, :m], spoken[:m])
            _reach(kept[k, :m], most[:m], least[:m])
        if models > 1:
            _share(spoken[:m], most[:m], least[:m], counts[models:])
        if how == PLAIN:
            _lincomb(kept, factors, total[:m])
        else:
            for k in range(models):
                _add_up(kept[k, :m], sums[:m])
            _elect(sums[:m], tie, sign[:m])
            _agree(kept, sign[:m], factors, how, total[:m], divisor[:m])
        _move(base[:m], total[:m], scale, total[:m])
        fine = fine and np.isfinite(_total(total[:m]))
        _narrow(total[:m], merged[start:stop])
    return merged, counts, squares, fine and np.isfinite(squares.sum())


@_compiled()
def _speak(kept, spoken):
    """How many of (m,) float32 are not 0; adds 1 to `spoken` (int32) at each of them."""
    count = _NO
    for i in range(len(kept)):
        here = _YES if kept[i] != _ZERO else _NO
        spoken[i] = np.int32(spoken[i] + here)
        count = np.int32(count + here)
    return count


@_compiled()
def _reach(kept, most, least):
    """The largest and the least so far, in place."""
    for i in range(len(kept)):
        most[i] = kept[i] if kept[i] > most[i] else most[i]
        least[i] = kept[i] if kept[i] < least[i] else least[i]


@_compiled()
def _share(spoken, most, least, counts):
    """Add to `counts` the places with one and more, with two and more, and with both signs."""
    some, several, conflicts = _NO, _NO, _NO
    for i in range(len(spoken)):
        some = np.int32(some + (_YES if spoken[i] > 0 else _NO))
        several = np.int32(several + (_YES if spoken[i] > 1 else _NO))
        conflicts = np.int32(conflicts + (_YES if (most[i] > _ZERO) & (least[i] < _ZERO) else _NO))
    counts[0] += some
    counts[1] += several
    counts[2] += conflicts


@_compiled()
def _lincomb(kept, factors, total):
    """algebra.lincomb of the first m of (K, RUN), (K,) -> (m,), all float32."""
    m = len(total)
    _multiply(kept[0, :m], factors[0], total)
    for k in range(1, len(factors)):
        _add(kept[k, :m], factors[k], total)


@_compiled()
def _multiply(values, factor, total):
    for i in range(len(total)):
        total[i] = values[i] * factor


@_compiled()
def _add(values, factor, total):
    """total.add_(values, alpha=factor)."""
    for i in range(len(total)):
        total[i] = fma(values[i], factor, total[i])


@_compiled()
def _elect(sums, tie, sign):
    """The signs of (m,) float64 into (m,) float32; `tie` where a sum is 0."""
    for i in range(len(sums)):
        sign[i] = _ONE if sums[i] > 0 else (-_ONE if sums[i] < 0 else tie)


@_compiled()
def _agree(kept, sign, factors, how, total, divisor):
    """algebra.agree of the first m of (K, RUN), and (m,), into `total`; (m,) `divisor` is room to work in."""
    m = len(total)
    total[:], divisor[:] = _ZERO, _ZERO
    for k in range(len(factors)):
        if how == MAX:
            _largest(kept[k, :m], sign, total)
        else:
            _agreeing(kept[k, :m], sign, total)
        if how == MEAN:
            _voices(kept[k, :m], sign, factors[k], divisor)
    _signed(sign, total)
    if how == MEAN:
        _divide(total, divisor)


@_compiled()
def _signed(sign, total):
    for i in range(len(total)):
        total[i] *= sign[i]


@_compiled()
def _divide(total, divisor):
    for i in range(len(total)):
        total[i] /= divisor[i] if divisor[i] != _ZERO else _ONE


@_compiled()
def _agreeing(kept, sign, total):
    for i in range(len(total)):
        agreeing = kept[i] * sign[i]
        total[i] += agreeing if agreeing > _ZERO else _ZERO


@_compiled()
def _largest(kept, sign, total):
    for i in range(len(total)):
        agreeing = kept[i] * sign[i]
        total[i] = agreeing if agreeing > total[i] else total[i]


@_compiled()
def _voices(kept, sign, factor, divisor):
    for i in range(len(divisor)):
        divisor[i] += factor if kept[i] * sign[i] > _ZERO else _ZERO


@_compiled()
def _move(base, change, scale, out):
    """algebra.moved(base, change * scale)."""
    for i in range(len(base)):
        moved = change[i] * scale
        out[i] = base[i] if moved == _ZERO else base[i] + moved


@_compiled()
def blend(sides, factors):
    """algebra.lincomb of whole models: (K, n) and (K,) float32 -> (n,) of the type of `sides`; whether it is finite."""
    n, fine = sides.shape[1], True
    merged = np.empty(n, sides.dtype)
    total, values = np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    for start in range(0, n, RUN):
        stop = min(start + RUN, n)
        m = stop - start
        _widen(sides[0, start:stop], total[:m])
        for i in range(m):
            total[i] *= factors[0]
        for k in range(1, len(factors)):
            _widen(sides[k, start:stop], values[:m])
            _add(values[:m], factors[k], total[:m])
        fine = fine and np.isfinite(_total(total[:m]))
        _narrow(total[:m], merged[start:stop])
    return merged, fine
