"""Which tensors of a model a merge may touch, by patterns of names and by regions; and how many entries a share is.

A word such as `embeddings`, `head`, `norms`, `attention` means the region of that name in the model's topology; any
other word is a pattern of names as in knobs: plain text that occurs in the name, or with `*`, `?` or `[...]` a pattern
for the whole name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from luthier.errors import InputError
from luthier.merge.depth import region_of_names
from luthier.models.regions import REGIONS
from luthier.models.topology import Topology

_PLURALS = {f"{region}s": region for region in REGIONS}


def meets(name: str, region: str, patterns: Iterable[str]) -> bool:
    """Whether one of `patterns` means this tensor."""
    for pattern in patterns:
        word = _PLURALS.get(pattern, pattern)
        if word in REGIONS:
            if word == region:
                return True
        elif fnmatchcase(name, pattern) or (not set(pattern) & set("*?[") and pattern in name):
            return True
    return False


def entries_of(density: float, elements: int) -> int:
    """int(density * elements); `InputError` if that is none."""
    count = int(density * elements)
    if count < 1:
        raise InputError(
            f"a share of {density:g} of {elements} candidate entries is not one entry", where="density", fix="raise it"
        )
    return count


def regions_of_module(model: nn.Module, names: Sequence[str]) -> Callable[[str], str]:
    """Region of a parameter by the topology of a module; by names where it has no blocks to be found."""
    try:
        topology = Topology.of(model)
    except InputError:
        return region_of_names(names)
    return lambda name: topology.region(name)[0]
