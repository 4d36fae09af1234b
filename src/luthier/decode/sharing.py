"""Which terms have blocks in common, so that these run once for all of them (`luthier.decode.trunk`).

    shared_blocks(opened)        term -> `Lower`, one and the same for terms that share

Terms of one module, an adapter or a delta beside its base, are the same up to the first block that one of them changes
(`Opened.changed`). Structure says which block that is (`luthier.models.topology`). A changed embedding, tied head or
anything else before the blocks leaves nothing to share; a changed head or last norm leaves all blocks but the last.

Structure cannot say that the model's code lets itself be run in two parts. So that is tried: a few tokens, whole and in
parts, under every term; only if all numbers are equal to the last bit the terms share. Where they are not, every term
runs by itself, which gives the same answers for more time. So it is, untried, with models that carry a state along the
row, that share keys and values between layers, or that have more than one stack of blocks (an encoder); and with a
transformers that has no stand-in for a layer without a cache (before 5.21).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from luthier.decode.streams import Stream, inner, is_stateful, takes
from luthier.decode.trunk import CACHE, DummyLayer, Lower, Trunk
from luthier.errors import InputError
from luthier.models.structure import within
from luthier.models.topology import Stack, Topology

if TYPE_CHECKING:
    from luthier.decode.mixture import Opened

TRIAL = [[1, 2, 3], [2]]  # prompts of different lengths, and a token behind them


def shared_blocks(opened: Mapping[str, Opened]) -> dict[str, Lower]:
    """The blocks that each term runs together with others; a term that runs alone is left out."""
    families: dict[int, dict[Any, list[str]]] = {}
    for name, one in opened.items():
        if one.changed is not None:
            families.setdefault(id(inner(one.model)), {}).setdefault(one.key, []).append(name)
    found: dict[str, Lower] = {}
    for family in families.values():
        lower, members = _common([opened[names[0]] for names in family.values()])
        if lower is not None:
            found |= {name: lower for one in members for name in family[one.key]}
    return found


def _common(terms: Sequence[Opened]) -> tuple[Lower | None, list[Opened]]:
    """The blocks that all the terms share that share any, and these terms."""
    if len(terms) < 2:
        return None, []
    model = inner(terms[0].model)
    topology = _topology(model)
    if topology is None:
        return None, []
    counts = [untouched(topology, one.changed or ()) for one in terms]
    members = [one for one, count in zip(terms, counts, strict=True) if count]
    if len(members) < 2:
        return None, []
    blocks = [model.get_submodule(block.path) for block in topology.blocks]
    lower = Lower(model, blocks, min(filter(None, counts)))
    return (lower, members) if _agree(members, lower) else (None, [])


def _topology(model: Any) -> Topology | None:
    """Of a model with one stack of blocks that each keep keys and values of their own; None of any other."""
    if DummyLayer is None or is_stateful(model) or model.config.is_encoder_decoder or CACHE not in takes(model):
        return None
    try:
        topology = Topology.of(model)
    except InputError:
        return None
    layers = DynamicCache(config=model.config).layers
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    alone = len(topology.stacks) == 1 and topology.stacks[0].depth == len(topology.blocks) == len(layers)
    return topology if plain and alone else None


def untouched(topology: Topology, changed: Collection[str]) -> int:
    """How many of the first blocks, and all before them, give the same states whether these parameters or modules have
    changed or not; at most one less than there are blocks."""
    stack: Stack = topology.stacks[0]
    count = len(stack.blocks) - 1
    for name in changed:
        region, block = topology.region(name)
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        if block is not None:
            count = min(count, block)
        elif region != "head" and not (stack.final_norm and within(plain, [stack.final_norm])):
            return 0
    return count


def _agree(terms: Sequence[Opened], lower: Lower) -> bool:
    """Whether every term says the same to the last bit with these blocks run by the first one, as by itself."""
    trunk = Trunk(lower)
    parts = [Stream(one.model, TRIAL, active=one.active, trunk=trunk) for one in terms]
    whole = [Stream(one.model, TRIAL, active=one.active) for one in terms]
    try:
        for _ in range(2):
            if not all(torch.equal(a.logits(), b.logits()) for a, b in zip(parts, whole, strict=True)):
                return False
            for stream in (*parts, *whole):
                stream.feed(torch.ones(len(TRIAL), dtype=torch.int64))
    except Exception:  # whatever the code of a model says to being run in parts: it is run whole
        return False
    return True
