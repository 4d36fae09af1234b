"""Low-rank deltas: a PEFT LoRA adapter tied to the hash of its base, exact like any other delta.

    tuned = round(float32(base) + scale B A)           as the dtype of the base

Matrix products differ in their last bits between machines, so B A is summed here as `rank` outer products, one after
the other, in plain float32 steps that every machine rounds alike. That makes `apply` exact anywhere. Subtracting does
not bring the base back to the last bit, so the little that is missing is stored too, compressed (`residue`).

Only plain LoRA is taken: DoRA, changed biases, embeddings or other saved modules are not a product B A. For those,
merge the adapter with PEFT and take `diff` of the two models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from luthier.errors import InputError
from luthier.models.checkpoint import read_json
from luthier.models.files import write_aside
from luthier.weights import exact
from luthier.weights.delta import FORMAT, Delta, Say, refuse_filled
from luthier.weights.stream import NAMES, Info, Weights, combined, tensor_hash, write_file

_PREFIX = "base_model.model."


class LowRankDelta(Delta):
    """Stored parts: `NAME#A` (rank, inputs), `NAME#B` (outputs, rank) float32 and `NAME#residue` packed bytes."""

    kind: ClassVar[str] = "low-rank"

    def applied(self, name: str, base: Tensor, *, sign: int = 1) -> Tensor:
        if name not in self.tensors:
            return base
        change = self.change(name)
        if sign > 0:
            return moved(base, change)
        count, width = base.numel(), base.element_size()
        missing = exact.unpack(self.stored[f"{name}#residue"].numpy().tobytes(), count, width)
        return exact.add(moved(base, -change), missing)

    def change(self, name: str) -> Tensor:
        """scale B A as float32, the same bits on every machine; transposed where the base stores inputs first."""
        about = self.tensors[name]
        found = product(self.stored[f"{name}#B"], self.stored[f"{name}#A"], about["scale"])
        return found.T.contiguous() if about["transposed"] else found


def product(b: Tensor, a: Tensor, scale: float) -> Tensor:
    """scale B A, (outputs, inputs) float32, as a sum of outer products in the order of the rank."""
    scaled = b.float() * scale
    total = torch.zeros(b.shape[0], a.shape[1])
    for index in range(a.shape[0]):
        total += scaled[:, index, None] * a[index].float()[None]
    return total


def moved(tensor: Tensor, change: Tensor) -> Tensor:
    """float32(tensor) + change, rounded to the dtype of `tensor`."""
    return (tensor.float() + change).to(tensor.dtype)


def from_adapter(adapter: Path | str, base: Path | str, out: Path | str, say: Say = lambda *_: None) -> Delta:
    """Write a LoRA adapter folder as a delta of `base` into the new folder `out`.

    Raises `InputError` if it is no plain LoRA adapter, or its targets are not in `base`.
    """
    adapter, out = Path(adapter), Path(out)
    refuse_filled(out)
    config = _plain(adapter)
    factors, weights = Weights.open(adapter / "adapter_model.safetensors"), Weights.open(base)
    targets = _targets(factors, weights, adapter)
    hashes = {name: tensor_hash(weights[name]) for name in weights}
    tuned = dict(hashes)
    about: dict[str, Any] = {}
    with write_aside(out) as aside:
        kept: dict[str, Tensor] = {}
        for number, (name, (key_a, key_b)) in enumerate(targets.items(), start=1):
            a, b, old = factors[key_a].float(), factors[key_b].float(), weights[name]
            scale = _scale(config, name, a.shape[0])
            transposed = (b.shape[0], a.shape[1]) != tuple(old.shape)
            change = product(b, a, scale)
            change = change.T.contiguous() if transposed else change
            if change.shape != old.shape:
                raise InputError(
                    f"{name} is {list(old.shape)}, its factors give {list(change.shape)}", where=str(adapter)
                )
            new = moved(old, change)
            residue = exact.pack(exact.difference(moved(new, -change), old))
            tuned[name] = tensor_hash(new)
            kept |= {f"{name}#A": a, f"{name}#B": b}
            kept[f"{name}#residue"] = torch.frombuffer(bytearray(residue), dtype=torch.uint8)
            about[name] = {
                "kind": "low-rank",
                "dtype": NAMES[old.dtype],
                "shape": list(old.shape),
                "rank": a.shape[0],
                "scale": scale,
                "transposed": transposed,
                "changed": int(np.count_nonzero(exact.difference(old, new))),
            }
            say(name, number, len(targets))
        infos = {name: Info(t.dtype, tuple(t.shape)) for name, t in kept.items()}
        write_file(aside / "delta.safetensors", infos, kept.__getitem__, {"format": "pt"})
        whole = {"format": FORMAT, "kind": "low-rank", "base": combined(hashes), "tuned": combined(tuned)}
        whole |= {"all": sorted(weights), "widened": {}, "tensors": about}
        (aside / "delta.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return Delta.open(out)


def _plain(adapter: Path) -> dict[str, Any]:
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise InputError("this is no PEFT adapter (no adapter_config.json)", where=str(adapter))
    config = read_json(path)
    odd = [key for key in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices") if config.get(key)]
    if config.get("bias", "none") != "none":
        odd.append("bias")
    if config.get("peft_type") != "LORA" or odd:
        what = ", ".join(odd) or str(config.get("peft_type"))
        fix = "merge it with PEFT and take `luthier delta diff` of the two models"
        raise InputError(f"only plain LoRA is a low-rank delta, this has {what}", where=str(path), fix=fix)
    return config


def _targets(factors: Mapping[str, Tensor], weights: Weights, adapter: Path) -> dict[str, tuple[str, str]]:
    """Weight name -> names of its factors A and B; refuses factors that belong to nothing."""
    found = {}
    for key in factors:
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight").removeprefix(_PREFIX)
            found[f"{module}.weight"] = (key, key.replace(".lora_A.", ".lora_B."))
    known = {name for pair in found.values() for name in pair}
    odd = sorted(set(factors) ^ known) + sorted(set(found) - set(weights))
    if odd or not found:
        raise InputError(
            f"these do not belong to a linear of the base: {', '.join(odd[:4]) or 'no factors'}", where=str(adapter)
        )
    wrong = [name for name in found if weights.infos[name].dtype not in (torch.float32, torch.float16, torch.bfloat16)]
    if wrong:
        raise InputError(f"{wrong[0]} is {NAMES[weights.infos[wrong[0]].dtype]}; expected one of F32, F16, BF16")
    return found


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA; PEFT's patterns by module name."""
    import re

    module = name.removesuffix(".weight")
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
