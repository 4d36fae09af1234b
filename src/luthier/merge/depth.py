"""Depth of tensors by the topology of the model, where there is a config to build it from; else by names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import LuthierError
from luthier.weights.depth import Depth, DepthOf, depth_of_names

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
    by_names = depth_of_names(names)
    if folder is None or not (folder / "config.json").is_file():
        return by_names
    from luthier.models import ModelSettings
    from luthier.models.loading import skeleton
    from luthier.models.topology import Topology

    try:
        return depth_of_topology(Topology.of(skeleton(ModelSettings(base=str(folder)))))
    except LuthierError:  # code that is not here, or no blocks: the names are what there is
        return by_names
