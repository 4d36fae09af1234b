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
    nth         where the n-th of the magnitudes stands that equal a value

The definitions are the torch functions of `algebra`, `ranks` and the methods; these give the same to the last bit:
float32 in the same order, products that torch adds in one rounding added so (`fma`), the sign of a sum from float64.
Only the squared norms of the report are summed in another order. Where `combine` says that its outcome or norms are not
finite, the caller takes the general path, which names the culprit.

Numba's cache does not notice changes of another file, so all passes stand in this one (see `compiled`). Loops are short
and use few arrays of one width: so LLVM vectorises them.
"""

from __future__ import annotations

import numpy as np

from luthier.weights.compiled import compiled, float32_of_bits, fma

RUN = 1024
_BLOCK = 64  # shorter loops are unrolled before they could be vectorised
ADD, MEAN, SUM, MAX = 0, 1, 2, 3  # how `combine` brings together what is kept
_ZERO, _ONE, _YES, _NO, _TWO = np.float32(0), np.float32(1), np.int32(1), np.int32(0), np.int32(2)


@compiled()
def _widen(stored, out):
    """stored.float() into `out`: (m,) uint16 bits of bfloat16, or float32."""
    if stored.itemsize == 2:
        for i in range(len(stored)):
            out[i] = float32_of_bits(np.uint32(stored[i]) << np.uint32(16))  # type: ignore[call-arg]
    else:
        for i in range(len(stored)):
            out[i] = stored[i]


@compiled()
def _narrow(values, out):
    """values.to(out's type): (m,) finite float32; bfloat16 rounded to nearest, ties to even."""
    if out.itemsize == 2:
        bits = values.view(np.uint32)
        for i in range(len(out)):
            odd = np.uint32((bits[i] >> np.uint32(16)) & np.uint32(1))
            out[i] = np.uint16(np.uint32(bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    else:
        for i in range(len(out)):
            out[i] = values[i]


@compiled()
def _subtract(stored, base, out):
    """stored.float() - base into `out`."""
    if stored.itemsize == 2:
        for i in range(len(stored)):
            out[i] = float32_of_bits(np.uint32(stored[i]) << np.uint32(16)) - base[i]  # type: ignore[call-arg]
    else:
        for i in range(len(stored)):
            out[i] = np.float32(stored[i]) - base[i]


@compiled(fastmath={"reassoc"})
def _squares(values, m):
    """Sum of squares of m float32, in any order."""
    total = _ZERO
    for i in range(m):
        total += values[i] * values[i]
    return total


@compiled(fastmath={"reassoc"})
def _total(values, m):
    """Sum of m float32, in any order; finite only if all are."""
    total = _ZERO
    for i in range(m):
        total += values[i]
    return total


@compiled()
def _keep(delta, value, first, m, kept, k):
    """Cut.keep: the differences whose magnitude is above `value`, or equals it among the `first` ones, and else 0."""
    if first == 0:
        for i in range(m):
            kept[k, i] = delta[i] if abs(delta[i]) > value else _ZERO
    else:
        for i in range(m):
            kept[k, i] = delta[i] if abs(delta[i]) >= value else _ZERO
        for i in range(first, m):
            if abs(delta[i]) == value:
                kept[k, i] = _ZERO


@compiled()
def _drop(delta, value, first, m, kept, k):
    """The reverse: 0 where the magnitude is above `value`, or equals it among the `first` ones."""
    for i in range(m):
        kept[k, i] = _ZERO if abs(delta[i]) > value else kept[k, i]
    for i in range(first):
        if abs(delta[i]) == value:
            kept[k, i] = _ZERO


@compiled()
def _trim(delta, start, m, k, values, places, weights, kept):
    """What the two cuts of model k keep of m differences, times the model's weight, into row k of `kept`."""
    _keep(delta, values[k, 1], min(max(places[k, 1] - start, 0), m), m, kept, k)
    if values[k, 0] < np.inf:
        _drop(delta, values[k, 0], min(max(places[k, 0] - start, 0), m), m, kept, k)
    if weights[k] != _ONE:
        for i in range(m):
            kept[k, i] *= weights[k]


@compiled()
def _add_up(kept, m, sums):
    """kept.double() added up over the models into `sums`, float64."""
    for i in range(m):
        sums[i] = np.float64(kept[0, i])
    for k in range(1, len(kept)):
        for i in range(m):
            sums[i] += np.float64(kept[k, i])


@compiled()
def _counts(values, low, high, m):
    """How many of m float32 are above and not below `low`, above and not below `high`: four int32."""
    a, b, c, d = _NO, _NO, _NO, _NO
    for i in range(m):
        value = values[i]
        a = np.int32(a + (_YES if value > low else _NO))
        b = np.int32(b + (_YES if value >= low else _NO))
        c = np.int32(c + (_YES if value > high else _NO))
        d = np.int32(d + (_YES if value >= high else _NO))
    return a, b, c, d


@compiled()
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
        _widen(sides[0, start:stop], base)
        for k in range(models):
            _subtract(sides[k + 1, start:stop], base, values)
            for i in range(stop - start):
                values[i] = abs(values[i])
            for r in range(brackets):
                counts = _counts(values, lows[k, r], highs[k, r], stop - start)
                for c in range(4):
                    found[k, r, c] += counts[c]
    return found


@compiled()
def within(sides, k, low, high, count):
    """The `count` magnitudes of model k's difference between `low` and `high`, ends excluded, in order: float32."""
    found = np.empty(count + 1, np.float32)  # the last one takes what is not between
    base, values = np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    blocks = values.reshape(-1, _BLOCK)  # most have none
    n, at = sides.shape[1], np.uint64(0)  # an index that cannot be negative costs less
    for start in range(0, n, RUN):
        stop = min(start + RUN, n)
        _widen(sides[0, start:stop], base)
        _subtract(sides[k + 1, start:stop], base, values)
        for i in range(stop - start):
            values[i] = abs(values[i])
        values[stop - start :] = np.inf
        for b in range(len(blocks)):
            hits = _NO
            for i in range(_BLOCK):
                hits = np.int32(hits + (_YES if (blocks[b, i] > low) & (blocks[b, i] < high) else _NO))
            for i in range(_BLOCK if hits else 0):
                found[at] = blocks[b, i]
                at += np.uint64((blocks[b, i] > low) & (blocks[b, i] < high))
    return found[:count]


@compiled()
def nth(sides, k, value, count):
    """Where the `count`-th (from 1) of model k's magnitudes stands that equal `value`; n if there are fewer."""
    base, values = np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    n = sides.shape[1]
    for start in range(0, n, RUN):
        stop = min(start + RUN, n)
        _widen(sides[0, start:stop], base)
        _subtract(sides[k + 1, start:stop], base, values)
        for i in range(stop - start):
            count -= abs(values[i]) == value
            if count == 0:
                return start + i
    return n


@compiled()
def balance(sides, values, places, weights):
    """algebra.balance(elect(trimmed)): places that elect plus less those that elect minus.

    Args:
        sides: (K + 1, n), the base first.
        values, places, weights: as in `combine`.
    """
    models, n, more = len(weights), sides.shape[1], 0
    base, delta, sums = np.empty(RUN, np.float32), np.empty(RUN, np.float32), np.empty(RUN, np.float64)
    kept = np.empty((models, RUN), np.float32)
    for start in range(0, n, RUN):
        stop = min(start + RUN, n)
        _widen(sides[0, start:stop], base)
        for k in range(models):
            _subtract(sides[k + 1, start:stop], base, delta)
            _trim(delta, start, stop - start, k, values, places, weights, kept)
        _add_up(kept, stop - start, sums)
        for i in range(stop - start):
            more += (1 if sums[i] > 0 else 0) - (1 if sums[i] < 0 else 0)
    return more


@compiled()
def combine(sides, values, places, weights, factors, how, tie, scale):
    """moved(base, scale * change), where `change` is of the kept differences.

    Args:
        sides: (K + 1, n) uint16 (bfloat16) or float32, the base first.
        values, places: (K, 2) float32 and int64: two cuts of each model, places counted from the tile's first element:
            what is above the second is kept, but for what is above the first.
        weights: (K,) float32: what is kept is multiplied by them.
        factors: (K,) float32: for ADD those of `lincomb`, for MEAN what models that agree add to the divisor.
        how: ADD is lincomb(kept, factors); MEAN, SUM and MAX are those of `agree`, with the sign of the sum.
        tie: the sign where the sum is exactly 0.

    Returns (n,) of the type of `sides`; (K + 3,) int64: of each model how many differences were kept, then the places
    that one model or more, and that two or more have kept, and those where kept ones have both signs; (K + 1,) float64:
    squared norms of the base and of each difference; whether all numbers are finite.
    """
    models, n = len(weights), sides.shape[1]
    merged, counts, squares = np.empty(n, sides.dtype), np.zeros(models + 3, np.int64), np.zeros(models + 1)
    base, delta, sign = np.empty(RUN, np.float32), np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    total, divisor = np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    spoken, signs = np.empty(RUN, np.int32), np.empty(RUN, np.int32)
    kept, sums = np.empty((models, RUN), np.float32), np.empty(RUN, np.float64)
    fine = True
    for start in range(0, n, RUN):
        stop = min(start + RUN, n)
        m = stop - start
        _widen(sides[0, start:stop], base)
        squares[0] += _squares(base, m)
        for k in range(models):
            _subtract(sides[k + 1, start:stop], base, delta)
            squares[k + 1] += _squares(delta, m)
            _trim(delta, start, m, k, values, places, weights, kept)
            counts[k] += _speak(kept, k, m, spoken, signs)
        _share(spoken, signs, m, counts[models:])
        if how == ADD:
            _lincomb(kept, factors, m, total)
        else:
            _add_up(kept, m, sums)
            _elect(sums, tie, m, sign)
            _agree(kept, sign, factors, how, m, total, divisor)
        fine = fine and np.isfinite(_move(base, total, scale, m))
        _narrow(total, merged[start:stop])
    return merged, counts, squares, fine and np.isfinite(squares.sum())


@compiled()
def blend(sides, factors):
    """algebra.lincomb of `sides` (K, n) with factors (K,) float32: (n,) of the same type; whether all are finite."""
    n, fine = sides.shape[1], True
    merged, models, total = np.empty(n, sides.dtype), np.empty((len(sides), RUN), np.float32), np.empty(RUN, np.float32)
    for start in range(0, n, RUN):
        stop = min(start + RUN, n)
        for k in range(len(sides)):
            _widen(sides[k, start:stop], models[k])
        _lincomb(models, factors, stop - start, total)
        fine = fine and np.isfinite(_total(total, stop - start))
        _narrow(total, merged[start:stop])
    return merged, fine


@compiled()
def _speak(kept, k, m, spoken, signs):
    """How many of model k's m kept differences are not 0. Adds 1 at each of them to `spoken`; `signs` has bit 1 where
    one is above 0, bit 2 where one is below. The first model begins both anew."""
    count = _NO
    for i in range(m if k == 0 else 0):
        spoken[i] = _NO
        signs[i] = _NO
    for i in range(m):
        here = _YES if kept[k, i] != _ZERO else _NO
        spoken[i] = np.int32(spoken[i] + here)
        count = np.int32(count + here)
    for i in range(m):
        up = _YES if kept[k, i] > _ZERO else _NO
        down = _TWO if kept[k, i] < _ZERO else _NO
        signs[i] = np.int32(signs[i] | up | down)
    return count


@compiled()
def _share(spoken, signs, m, counts):
    """Add to `counts` the places with one and more, two and more, and both signs."""
    some, several, conflicts = _NO, _NO, _NO
    for i in range(m):
        some = np.int32(some + (_YES if spoken[i] > 0 else _NO))
        several = np.int32(several + (_YES if spoken[i] > 1 else _NO))
        conflicts = np.int32(conflicts + (_YES if signs[i] == 3 else _NO))
    counts[:] += np.array((some, several, conflicts))


@compiled()
def _lincomb(kept, factors, m, total):
    """algebra.lincomb of the first m of (K, RUN) and of (K,)."""
    for i in range(m):
        total[i] = kept[0, i] * factors[0]
    for k in range(1, len(factors)):
        for i in range(m):
            total[i] = fma(kept[k, i], factors[k], total[i])  # type: ignore[call-arg]


@compiled()
def _elect(sums, tie, m, sign):
    """The signs of m float64 as float32; `tie` where a sum is 0."""
    for i in range(m):
        sign[i] = _ONE if sums[i] > 0 else (-_ONE if sums[i] < 0 else tie)


@compiled()
def _agree(kept, sign, factors, how, m, total, divisor):
    """algebra.agree of the first m of (K, RUN) into `total`; `divisor` is room to work in."""
    for i in range(m):
        total[i] = _ZERO
        divisor[i] = _ZERO
    for k in range(len(factors)):
        if how == MAX:
            for i in range(m):
                agreeing = kept[k, i] * sign[i]
                total[i] = agreeing if agreeing > total[i] else total[i]
        else:
            factor = factors[k]
            for i in range(m):
                agreeing = kept[k, i] * sign[i]
                total[i] += agreeing if agreeing > _ZERO else _ZERO
                divisor[i] += factor if agreeing > _ZERO else _ZERO
    if how == MEAN:
        for i in range(m):
            total[i] = total[i] * sign[i] / (divisor[i] if divisor[i] != _ZERO else _ONE)
    else:
        for i in range(m):
            total[i] *= sign[i]


@compiled()
def _move(base, change, scale, m):
    """algebra.moved(base, change * scale) in the place of `change`; the sum, which is finite only if all are."""
    for i in range(m):
        moved = change[i] * scale
        change[i] = base[i] if moved == _ZERO else base[i] + moved
    return _total(change, m)
