"""Depth and region of tensors by the topology of the model, where there is a config to build it from; else by names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import LuthierError
from luthier.weights.depth import Depth, DepthOf, depth_of_names

_CALLED = {
    "embedding": re.compile(r"emb|\bwte\b|\bwpe\b|\bshared\b", re.IGNORECASE),
    "head": re.compile(r"head|classifier|\bscore\b|qa_outputs", re.IGNORECASE),
    "norm": re.compile(r"norm|\bln_f\b", re.IGNORECASE),
}

if TYPE_CHECKING:
    from luthier.models.topology import Topology


def depth_of_topology(topology: Topology) -> DepthOf:
    """Block and number of blocks of each tensor's stack; stacks (encoder and decoder) are numbered each for itself."""
    blocks = {
        block.path + ".": Depth(n, len(stack.blocks))
        for stack in topology.stacks
        for n, block in enumerate(stack.blocks)
    }

    def depth(name: str) -> Depth | None:
        return next((at for path, at in blocks.items() if name.startswith(path)), None)

    return depth


def depth_of(folder: Path | None, names: list[str]) -> DepthOf:
    """For the tensors of a checkpoint's folder, or of a set of names without one."""
    topology = topology_of(folder)
    return depth_of_names(names) if topology is None else depth_of_topology(topology)


def region_of(folder: Path | None, names: Sequence[str]) -> Callable[[str], str]:
    """Region of each tensor of a checkpoint's folder by its topology; without one by names, see `region_of_names`."""
    topology = topology_of(folder)
    return region_of_names(names) if topology is None else lambda name: topology.region(name)[0]


def region_of_names(names: Sequence[str]) -> Callable[[str], str]:
    """`embedding`, `head` or `norm` for tensors outside all numbered blocks that are called so, else `other`."""
    depth = depth_of_names(names)

    def region(name: str) -> str:
        if depth(name) is not None:
            return "other"
        return next((region for region, called in _CALLED.items() if called.search(name)), "other")

    return region


def topology_of(folder: Path | None) -> Topology | None:
    """Of the model whose config is in `folder`; None without one, or where code or blocks are not to be found."""
    if folder is None or not (folder / "config.json").is_file():
        return None
    from luthier.models import ModelSettings
    from luthier.models.loading import skeleton
    from luthier.models.topology import Topology

    try:
        return Topology.of(skeleton(ModelSettings(base=str(folder))))
    except LuthierError:
        return None
