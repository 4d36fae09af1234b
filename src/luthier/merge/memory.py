"""How much memory a merge takes beside the program itself, told from shapes before anything is read.

    memory = KEPT * (threads * work  +  made  +  hashing  +  ranks)

    work      on one tile: of the base and each of K models as the files hold it, where one compiled pass merges it;
              else in float32, stacked, with differences and products, some of them in float64
    made      outcomes: those under way and those that no one has taken yet; tiles, or whole small tensors where a
              method surveys tensor by tensor
    hashing   two pieces of a file
    ranks     of a survey that ranks a whole model: samples, and the numbers between two values that bracket the rank

It is a bound, at most three times what merges of a hundred million parameters take on two cores (the tests hold it to
that). `KEPT` allows for what the allocator keeps: a block that one thread freed is seldom another's next one. The code
that numba loads (30 MiB) counts as the program.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from luthier.merge.base import Merge
from luthier.merge.lineup import Step
from luthier.merge.run import SMALL
from luthier.merge.sources import PIECE, TILE, Source, StoredSource
from luthier.weights.ahead import WAITING
from luthier.weights.brackets import KEPT as MOST_BETWEEN
from luthier.weights.brackets import SAMPLE, WIDE
from luthier.weights.reader import Weights

KEPT = 2.0
FLOAT = 4  # bytes


def memory_of(step: Step) -> int:
    """Bytes that the merge of a step takes at most, the program's own aside; rough for adapters and deltas."""
    lineup, method, threads = step.lineup, step.method, os.cpu_count() or 1
    infos = [lineup.infos[name] for name in lineup.names]
    sources = [source for source in (lineup.base, *lineup.models) if source is not None]
    size = max(info.itemsize for info in infos)
    tile = max(TILE, *(info.shape[-1] if len(info.shape) > 1 else info.elements for info in infos))
    fused = type(method).fused is not Merge.fused and _of_files(sources)
    work = tile * (size * len(sources) if fused else FLOAT * (1 + 8 * len(lineup.models)))
    piece = tile * size
    if method.reach == "tensor":
        piece = max([piece, *(info.bytes for info in infos if info.elements <= SMALL)])
    made = ((WAITING + 1) * threads + 1) * piece
    ranks = 0
    if method.reach == "model" and method.passes > 1:
        between = min(MOST_BETWEEN, int(lineup.elements * WIDE / (SAMPLE / 2) ** 0.5))
        between = between if size >= FLOAT else between // 16  # most 16-bit ones are equal, and those are only counted
        ranks = FLOAT * (len(lineup.models) * (SAMPLE + between) + 3 * between)  # one model's are joined and sorted
    return int(KEPT * (threads * work + made + 2 * PIECE * size + ranks))


def _of_files(sources: Sequence[Source]) -> bool:
    return all(isinstance(source, StoredSource) and isinstance(source.tensors, Weights) for source in sources)
