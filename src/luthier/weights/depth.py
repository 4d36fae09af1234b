"""Where along the depth of a model a tensor stands, and values that change along it.

    depth_of_names(names)("model.layers.3.mlp.up_proj.weight")      Depth(3, 24): the fourth of 24 blocks
    anchored([0, 0.5, 1], Depth(6, 24))                             0.26...: linear between anchors spread evenly

`depth_of_names` goes by names alone, for files without a config: the stacks are the prefixes that are followed by the
numbers 0, 1, 2, ... and hold the most tensors. Where a config is there, a topology is better (`luthier.merge.depth`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Depth:
    """The `index`-th (from 0) of `count` blocks."""

    index: int
    count: int

    @property
    def share(self) -> float:
        """0 in the first block, 1 in the last; 0 if there is only one."""
        return self.index / (self.count - 1) if self.count > 1 else 0.0


DepthOf = Callable[[str], Depth | None]  # None for what stands in no block
_NUMBER = re.compile(r"\.?(\d+)(?=\.|$)")


def depth_of_names(names: Iterable[str]) -> DepthOf:
    """Depth by names such as `layers.3.mlp.weight`; None for every name where no two numbered siblings are found.

    Of nested numbers (experts inside blocks) the outermost counts; stacks beside each other (encoder and decoder) are
    numbered each for itself.
    """
    siblings: dict[str, set[int]] = defaultdict(set)
    firsts: dict[str, tuple[str, int]] = {}
    for name in names:
        match = _NUMBER.search(name)
        if match:
            prefix = name[: match.start()]
            siblings[prefix].add(int(match[1]))
            firsts[name] = prefix, int(match[1])
    # Numbers may leave holes: a plain sequence of layers has none in which an activation stands.
    ranks = {p: {n: i for i, n in enumerate(sorted(found))} for p, found in siblings.items() if len(found) > 1}
    depths = {
        name: Depth(ranks[prefix][number], len(ranks[prefix]))
        for name, (prefix, number) in firsts.items()
        if prefix in ranks
    }
    return depths.get


def anchored(anchors: Sequence[float], depth: Depth | None) -> float:
    """The value at `depth` of anchors that are spread evenly from the first block to the last, linear between them.

    Outside of all blocks it is the first anchor, as in mergekit. One anchor is a constant.
    """
    place = (depth.share if depth else 0.0) * (len(anchors) - 1)
    below = min(int(place), len(anchors) - 1)
    above = min(below + 1, len(anchors) - 1)
    part = place - below
    return (1 - part) * anchors[below] + part * anchors[above]
