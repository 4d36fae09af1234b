"""Which examples go together: the plan of an epoch, before any tensor exists.

A plan is pure arithmetic on lengths and a seed. It settles three things that must not depend on each other:

    step          the examples of one optimiser step, the same for any number of devices
    rank          which of them each device works on
    micro-batch   how a device cuts its share so that every forward pass fits the token budget

Because the loss of a step is a sum over tokens divided once, cutting a step differently changes nothing but speed.

A batch costs rows x its longest row, so rows of like length belong together. But sorting the whole epoch would show
the model all short rows first. Length bucketing does both: shuffle, take runs of 50 steps' worth of rows, sort inside
each run, cut it into steps, shuffle the steps. Inside a step rows are always sorted, dealt to the ranks in turn (so
that each gets the same mix of lengths) and cut where that costs the fewest tokens.

Packing puts whole examples end to end in one row of at most `tokens_per_batch` tokens instead of padding them, by
first-fit decreasing: the longest first, each into the first bin with room. It wastes next to nothing on any mix of
lengths, so bucketing is left out, and steps stay plain random samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.errors import InputError

MEGA_STEPS = 50  # steps whose rows are sorted by length together

MicroBatch = list[int]  # indices of examples
Step = list[list[MicroBatch]]  # per rank, the micro-batches of one optimiser step


def plan_epoch(
    lengths: ArrayLike,
    *,
    seed: int,
    epoch: int,
    rows_per_step: int,
    tokens_per_batch: int,
    ranks: int = 1,
    bucketing: bool = True,
    packing: bool = False,
) -> list[Step]:
    """The steps of one epoch: `plan[step][rank][micro_batch]` is a list of example indices.

    Args:
        lengths: (examples,) tokens of each example, each at least 1.
        seed, epoch: whole numbers >= 0; the same two give the same plan, another epoch another order.
        rows_per_step: examples in one optimiser step over all ranks; only the last step may have fewer.
        tokens_per_batch: a micro-batch holds at most this many tokens, padding included; a single longer example
            gets a micro-batch of its own.
        ranks: devices that share each step. All have equally many micro-batches in a step; one that is short of
            work has empty lists at the end.
        bucketing: put rows of like length into the same step.
        packing: a micro-batch is packed end to end (padding counts nothing); turns bucketing off.

    Every example is in exactly one micro-batch. No examples give no steps. Raises `InputError` for a number below 1.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    for name, number in (("rows_per_step", rows_per_step), ("tokens_per_batch", tokens_per_batch), ("ranks", ranks)):
        if number < 1:
            raise InputError(f"{name} must be at least 1, got {number}")
    if seed < 0 or epoch < 0:
        raise InputError(f"seed and epoch must be 0 or more, got {seed} and {epoch}")
    cut = _pack if packing else _pad
    plan: list[Step] = []
    for rows in _steps(sizes, seed, epoch, rows_per_step, bucketing and not packing):
        rows = rows[np.argsort(-sizes[rows], kind="stable")]
        shares = [rows[rank::ranks] for rank in range(ranks)]
        step = [cut(share.tolist(), sizes[share].tolist(), tokens_per_batch) for share in shares]
        plan.append(_filled(step))
    return plan


def at_least(plan: Sequence[Step], groups: NDArray[np.int64], count: int) -> list[Step]:
    """`plan` with micro-batches of fewer than `count` groups joined to the one before them (or after, for the first).

    Args:
        groups: (examples,) the group of each, such as a number for its prompt.

    Such a micro-batch may exceed the token budget. Raises `InputError` where a rank has fewer groups in a step.
    """

    def held(batch: MicroBatch) -> int:
        return len({int(groups[index]) for index in batch})

    return [_filled([_joined(batches, held, count) for batches in step]) for step in plan]


def _joined(batches: list[MicroBatch], held: Callable[[MicroBatch], int], count: int) -> list[MicroBatch]:
    done: list[MicroBatch] = []
    for batch in (b for b in batches if b):
        if done and (held(batch) < count or held(done[-1]) < count):
            done[-1] = done[-1] + batch
        else:
            done.append(batch)
    if done and held(done[0]) < count:
        rows, prompts = len(done[0]), held(done[0])
        raise InputError(
            f"a step leaves {rows} row{'s' * (rows != 1)} with {prompts} prompt{'s' * (prompts != 1)} to a device, and "
            f"this objective needs {count} different prompts at a time",
            where="tune.train.effective_batch_size",
            fix="raise it, or choose one that leaves no such rest of the number of rows",
        )
    return done


def _filled(step: Step) -> Step:
    most = max(len(batches) for batches in step)
    return [batches + [[] for _ in range(most - len(batches))] for batches in step]


def padding_share(plan: Sequence[Step], lengths: ArrayLike) -> float:
    """The share of computed tokens that would be padding if the micro-batches of `plan` are padded (0 to 1)."""
    sizes = np.asarray(lengths, dtype=np.int64)
    batches = [sizes[batch] for step in plan for rank in step for batch in rank if batch]
    computed = sum(int(batch.max()) * len(batch) for batch in batches)
    return 1.0 - sum(int(batch.sum()) for batch in batches) / computed if computed else 0.0


def _steps(
    sizes: NDArray[np.int64], seed: int, epoch: int, rows_per_step: int, bucketing: bool
) -> list[NDArray[np.int64]]:
    """The examples of each step, in the order of the epoch; those of the short last step are a random sample too."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(sizes))
    full = len(order) // rows_per_step
    body, rest = order[: full * rows_per_step], order[full * rows_per_step :]
    if bucketing:
        mega = MEGA_STEPS * rows_per_step
        for start in range(0, len(body), mega):
            part = body[start : start + mega]
            body[start : start + mega] = part[np.argsort(sizes[part], kind="stable")]
    steps = list(body.reshape(full, rows_per_step)[random.permutation(full)])
    return [*steps, rest] if len(rest) else steps


def _pad(rows: list[int], sizes: list[int], budget: int) -> list[MicroBatch]:
    """Cut `rows`, longest first, into micro-batches of at most `budget` tokens, padding included, at the least cost.

    A micro-batch costs its rows times its longest row, and besides as much as `budget` / 16 tokens, since each forward
    pass has work of its own. The best cuts before each row follow from those before the rows above it.
    """
    count = len(rows)
    if not count:
        return []
    whole, each = sizes[0] * count, budget / 16
    if whole <= budget and whole <= sum(sizes) + each:  # one batch costs no more than two without any padding would
        return [rows]
    costs, starts = np.zeros(count + 1), np.zeros(count + 1, dtype=np.int64)
    longest, places = np.asarray(sizes, dtype=np.int64), np.arange(count)
    first = 0
    for end in range(1, count + 1):
        while first < end - 1 and sizes[first] * (end - first) > budget:  # never fits again with more rows
            first += 1
        total = costs[first:end] + longest[first:end] * (end - places[first:end])
        best = int(total.argmin())
        costs[end], starts[end] = total[best] + each, first + best
    batches: list[MicroBatch] = []
    end = count
    while end:
        batches.append(rows[starts[end] : end])
        end = int(starts[end])
    return batches[::-1]


def _pack(rows: list[int], sizes: list[int], budget: int) -> list[MicroBatch]:
    """First-fit decreasing: `rows`, longest first, into bins of `budget` tokens."""
    bins: list[MicroBatch] = []
    room: list[int] = []
    for row, size in zip(rows, sizes, strict=True):
        for index, free in enumerate(room):
            if size <= free:
                bins[index].append(row)
                room[index] -= size
                break
        else:
            bins.append([row])
            room.append(budget - size)
    return bins
