"""Writing ahead behind every candidate for the next token: what a text might become.

    written = rollouts(fork, candidates, rows=[0, 1], each=2, tokens=20, ends=ends, vocabulary=V)

The prompt and the answer so far are read once: a fork of their stream goes on behind each candidate, all of a batch at
once. Rows leave as they end or reach the context's end. Taking the most probable token draws nothing; samples draw
from a generator per row of the batch, so they do not depend on which rows stand beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor


def rollouts(
    fork: Callable[[int], Any],
    candidates: Tensor,
    *,
    rows: Sequence[int],
    each: int,
    tokens: int,
    ends: Collection[int],
    vocabulary: int,
    generators: Sequence[torch.Generator] | None = None,
) -> list[list[int]]:
    """Completions of candidates, without the candidate and without end tokens.

    Args:
        fork: times -> a stream with every row of the batch so many times (`Step.fork`); called once, or not at all.
        candidates: (rows, k) token ids.
        rows: the rows of the stream that these are.
        each: completions of each candidate.
        tokens: at most so many new tokens each; fewer at an end token or at the end of the context.
        ends: tokens that end a text. A candidate that is one is not completed.
        vocabulary: how many tokens may be drawn.
        generators: of each of `rows`, to sample at temperature 1; the most probable token if there are none.

    Returns rows x k x each lists of ids in this order.
    """
    width = candidates.shape[1] * each
    first = candidates.repeat_interleave(each, dim=1).flatten().tolist()
    written: list[list[int]] = [[] for _ in first]
    alive = [number for number, token in enumerate(first) if token not in ends]
    if not alive or tokens == 0:
        return written
    stream = fork(width)
    place = torch.tensor([rows[number // width] * width + number % width for number in alive])
    room = stream.room
    left = [tokens] * len(alive) if room is None else (room.cpu()[place] - 1).clamp(max=tokens).tolist()
    fits = [i for i, count in enumerate(left) if count > 0]
    alive, limit = [alive[i] for i in fits], {alive[i]: left[i] for i in fits}
    stream.reorder(place[fits])
    new = [first[number] for number in alive]
    while alive:
        stream.feed(torch.tensor(new))
        new = _next(stream.logits()[:, :vocabulary], alive, width, generators)
        going = []
        for i, (number, token) in enumerate(zip(alive, new, strict=True)):
            if token not in ends:
                written[number].append(token)
                if len(written[number]) < limit[number]:
                    going.append(i)
        if going and len(going) < len(alive):
            stream.reorder(torch.tensor(going))
        alive, new = [alive[i] for i in going], [new[i] for i in going]
    return written


def _next(logits: Tensor, alive: Sequence[int], width: int, generators: Sequence[torch.Generator] | None) -> list[int]:
    """The next token of each text that goes on: (texts, vocabulary) -> texts."""
    if generators is None:
        return logits.argmax(dim=-1).tolist()
    noise = torch.empty_like(logits)
    for row in sorted({number // width for number in alive}):
        draw = logits.new_empty(width, logits.shape[1]).exponential_(generator=generators[row])
        here = [i for i, number in enumerate(alive) if number // width == row]
        noise[here] = draw[[alive[i] % width for i in here]]
    return (logits.log_softmax(dim=-1) - noise.log()).argmax(dim=-1).tolist()
