"""Low-rank deltas: a PEFT LoRA adapter tied to the hash of its base, exact like any other delta.

    tuned = round(float32(base) + scale B A)           as the dtype of the base

Matrix products differ in their last bits between machines, so B A is summed here as `rank` outer products, one after
the other, in plain float32 steps that every machine rounds alike. That makes `apply` exact anywhere. Subtracting does
not bring the base back to the last bit, so the little that is missing is stored too, compressed (the residue). It can
be larger than the factors; `residue=False` leaves it out, and the delta can then be applied but not removed.

Only plain LoRA on linears is taken: DoRA, changed biases, embeddings or other saved modules are not a product B A. Nor
are initialisations that move the base itself (PiSSA, OLoRA, CorDA, LoftQ): their factors belong to another base than
the one on disk. For those, merge the adapter with PEFT and take `diff` of the two models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from luthier.errors import InputError
from luthier.models.checkpoint import read_json
from luthier.models.files import write_aside
from luthier.weights import exact
from luthier.weights.compare import about_of, write_about
from luthier.weights.delta import Delta, Say
from luthier.weights.hashing import TensorHash, tensor_hash
from luthier.weights.info import Info, flat, kind_of, raw, some
from luthier.weights.reader import ADAPTER, Weights
from luthier.weights.writer import PartsFile, refuse_filled

_PREFIX = "base_model.model."
_BASE_STAYS = (True, False, "gaussian", "eva", "orthogonal")  # of PEFT's init_lora_weights: these leave the base alone
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_IN_CACHE = 2**16  # elements of a product computed at a time


class LowRankDelta(Delta):
    """Stored parts: `NAME#A` (rank, inputs) and `NAME#B` (outputs, rank), bytes of float32; `NAME#residue`, packed."""

    kind: ClassVar[str] = "low-rank"

    @property
    def removable(self) -> bool:
        return all(about["residue"] for about in self.tensors.values())

    def parts(self, name: str) -> tuple[str, ...]:
        return (f"{name}#A", f"{name}#B") + ((f"{name}#residue",) if self.tensors[name]["residue"] else ())

    def pieces(self, name: str, given: Tensor, sign: int) -> Iterator[Tensor]:
        about = self.tensors.get(name)
        if about is None:
            yield flat(given)
            return
        self._check(name, given, about["dtype"])
        left, right = self.factors(name)
        rows = _rows(given)
        if sign > 0:
            for start in range(0, given.shape[0], rows):
                yield moved(given[start : start + rows], product(left[start : start + rows], right))
            return
        data = self.stored[f"{name}#residue"].numpy().data
        missing = exact.decode(data, given.numel(), given.element_size(), rows * given.shape[1])
        for start, lost in zip(range(0, given.shape[0], rows), missing, strict=True):
            change = product(left[start : start + rows], right)
            yield exact.add(moved(given[start : start + rows], -change), lost)

    def change(self, name: str) -> Tensor:
        """scale B A as float32, in the shape of the base's tensor; the same bits on every machine, not rounded to
        the base's type."""
        return product(*self.factors(name))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(rows, rank) and (rank, columns) float32, the scale in the first; their product is `change`."""
        about = self.tensors[name]
        a, b = (self.stored[f"{name}#{side}"].view(torch.float32) for side in "AB")
        return oriented(a.view(about["rank"], -1), b.view(-1, about["rank"]), about["scale"], about["transposed"])


def oriented(a: Tensor, b: Tensor, scale: float, transposed: bool) -> tuple[Tensor, Tensor]:
    """Factors (rows, rank) and (rank, columns) whose product is the change as the base stores it.

    Layers that store inputs first (GPT-2's) have the product transposed; elementwise it is the same.
    """
    scaled = b * scale
    return (a.T, scaled.T) if transposed else (scaled, a)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, (rows, columns) float32, as a sum of outer products in the order of the rank."""
    total = torch.zeros(left.shape[0], right.shape[1])
    step = max(1, _IN_CACHE // max(1, right.shape[1]))
    for start in range(0, len(total), step):
        part, block = left[start : start + step], total[start : start + step]
        for index in range(right.shape[0]):
            block += part[:, index, None] * right[index]
    return total


def moved(tensor: Tensor, change: Tensor) -> Tensor:
    """float32(tensor) + change, rounded to the dtype of `tensor`."""
    return (tensor.float() + change).to(tensor.dtype)


def from_adapter(
    adapter: Path | str, base: Path | str, out: Path | str, say: Say = lambda *_: None, *, residue: bool = True
) -> Delta:
    """Write a LoRA adapter folder as a delta of `base` into the new folder `out`.

    Args:
        residue: keep it, so that `remove` gives the base bit for bit.

    Raises `InputError` if it is no plain LoRA adapter, or its targets are not in `base`.
    """
    adapter, out = Path(adapter), Path(out)
    refuse_filled(out)
    config = _plain(adapter)
    factors, weights = Weights.open(adapter / ADAPTER), Weights.open(base)
    targets = _targets(factors, weights.infos, adapter)
    hashes: dict[str, list[str]] = {}
    tensors: dict[str, Any] = {}
    with write_aside(out) as aside:
        names = [f"{name}#{part}" for name in targets for part in ("A", "B", "residue")]
        with PartsFile(aside / "delta.safetensors", names) as parts:
            for number, name in enumerate(weights, start=1):
                old = weights[name]
                hashes[name] = [tensor_hash(old)]
                if name in targets:
                    tensors[name], made = _converted(name, old, factors, targets[name], config, parts, residue)
                    hashes[name].append(made)
                say(name, number, len(weights))
        write_about(aside, about_of("low-rank", hashes, tensors))
    return Delta.open(out)


def factors_of(adapter: Path, infos: Mapping[str, Info]) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of a plain LoRA adapter by the name of the weight that they change, oriented as it is stored.

    Returns (rows, rank) and (rank, columns) float32, the scale in the first: the weight's change is their product.
    Raises `InputError` if it is no plain LoRA adapter, or its targets are not in `infos` or of another shape.
    """
    config, factors = _plain(adapter), Weights.open(adapter / ADAPTER)
    found = {}
    for name, keys in _targets(factors, infos, adapter).items():
        found[name] = _pair(name, infos[name], factors, keys, config)[0]
    return found


def _converted(
    name: str,
    old: Tensor,
    factors: Mapping[str, Tensor],
    keys: tuple[str, str],
    config: Mapping[str, Any],
    parts: PartsFile,
    with_residue: bool,
) -> tuple[dict[str, Any], str]:
    """Store one target's factors and residue; returns what `delta.json` says of it and the hash of the tuned tensor."""
    (left, right), (a, b), scale, transposed = _pair(name, Info.of(old), factors, keys, config)
    tuned = TensorHash(Info.of(old))
    changed = 0

    def residues() -> Iterator[bytes]:
        nonlocal changed
        rows = _rows(old)
        for start in range(0, old.shape[0], rows):
            before, change = old[start : start + rows], product(left[start : start + rows], right)
            after = moved(before, change)
            tuned.update(after)
            changed += int(np.count_nonzero(exact.difference(before, after)))
            if with_residue:
                yield exact.pack(exact.difference(moved(after, -change), before)).data

    size = sum(parts.add(f"{name}#{side}", [raw(tensor).numpy().tobytes()]) for side, tensor in (("A", a), ("B", b)))
    if with_residue:
        size += parts.add(f"{name}#residue", residues())
    else:
        list(residues())
    about = {
        "kind": "low-rank",
        "dtype": kind_of(old.dtype),
        "shape": list(old.shape),
        "changed": changed,
        "bytes": size,
    }
    about |= {"rank": a.shape[0], "scale": scale, "transposed": transposed, "residue": with_residue}
    return about, tuned.hex()


def _pair(
    name: str, old: Info, factors: Mapping[str, Tensor], keys: tuple[str, str], config: Mapping[str, Any]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], float, bool]:
    """One target's factors: oriented and scaled, as stored (A, B), the scale, whether transposed."""
    a, b = (factors[key].float() for key in keys)
    if a.ndim != 2 or b.ndim != 2 or len(old.shape) != 2 or a.shape[0] != b.shape[1]:
        shapes = ", ".join(str(list(shape)) for shape in (a.shape, b.shape, old.shape))
        raise InputError(f"{name} is no linear with factors A and B (A, B and weight are {shapes})")
    square = a.shape[1] == b.shape[0]
    transposed = bool(config.get("fan_in_fan_out")) if square else tuple(old.shape) == (a.shape[1], b.shape[0])
    scale = _scale(config, name, a.shape[0])
    left, right = oriented(a, b, scale, transposed)
    if (left.shape[0], right.shape[1]) != tuple(old.shape):
        raise InputError(f"{name} is {list(old.shape)}, its factors give {[left.shape[0], right.shape[1]]}")
    return (left, right), (a, b), scale, transposed


def _rows(tensor: Tensor) -> int:
    """Rows of a matrix that make about one piece."""
    return max(1, exact.PIECE // max(1, tensor.shape[1]))


def _plain(adapter: Path) -> dict[str, Any]:
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise InputError("this is no PEFT adapter (no adapter_config.json)", where=str(adapter))
    config = read_json(path)
    odd = [key for key in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices") if config.get(key)]
    if config.get("bias", "none") != "none":
        odd.append("bias")
    if config.get("init_lora_weights", True) not in _BASE_STAYS:
        odd.append(f"init_lora_weights: {config['init_lora_weights']}")
    if config.get("peft_type") != "LORA" or odd:
        what = ", ".join(odd) or str(config.get("peft_type"))
        fix = "merge it with PEFT and take `luthier delta diff` of the two models"
        raise InputError(f"only plain LoRA is a low-rank delta, this has {what}", where=str(path), fix=fix)
    return config


def _targets(factors: Mapping[str, Tensor], infos: Mapping[str, Info], adapter: Path) -> dict[str, tuple[str, str]]:
    """Weight name -> names of its factors A and B; refuses factors that belong to nothing."""
    found = {}
    for key in factors:
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight").removeprefix(_PREFIX)
            found[f"{module}.weight"] = (key, key.replace(".lora_A.", ".lora_B."))
    known = {name for pair in found.values() for name in pair}
    odd = sorted(set(factors) ^ known) + sorted(set(found) - set(infos))
    if odd or not found:
        raise InputError(
            f"these do not belong to a linear of the base: {some(odd) or 'no factors'}", where=str(adapter)
        )
    wrong = [name for name in found if infos[name].kind not in _FLOATS]
    if wrong:
        raise InputError(f"{wrong[0]} is {infos[wrong[0]]}; expected one of {', '.join(_FLOATS)}")
    return found


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA; PEFT's patterns by module name."""
    module = name.removesuffix(".weight")
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
