"""A delta: what leads from a base to a tuned model, in a folder of its own, exact in both directions.

    delta.json          base and tuned content hash, and per changed tensor its kind, dtype, shape and counts
    delta.safetensors   the packed differences (see `exact`); a tensor that did not change is not there

A base in half precision that was tuned in float32 is widened first, which loses nothing.

A tensor is `dense`, or `sparse` where less than a tenth of its elements changed. (Low-rank deltas, made of an adapter,
are in `adapter`.) `apply` and `remove` check the hash of what they are given and of what they make, so the wrong base
is an error and never a broken model. For merging and scaling, `float32` gives the same difference as numbers.

When not to use it: to shrink a fully tuned model. Every weight has changed then, and the noise in the low bits does
not compress; expect a third to three quarters of the model's size. Sparse and half-frozen tunings shrink as hoped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from luthier.errors import InputError
from luthier.models.checkpoint import read_json
from luthier.models.files import write_aside
from luthier.weights import exact
from luthier.weights.stream import (
    DTYPES,
    NAMES,
    Info,
    Weights,
    combined,
    infos_of,
    raw,
    tensor_hash,
    write_file,
    write_weights,
)

FORMAT = 1
Say = Callable[[str, int, int], None]  # name of the tensor, how many are done, of how many


@dataclass(frozen=True)
class Delta:
    """An opened delta folder.

    Attributes:
        about: what `delta.json` says.
        stored: the packed parts by name: `NAME` (values) and `NAME#places` (of a sparse one), (bytes,) uint8.
    """

    path: Path
    about: dict[str, Any]
    stored: Mapping[str, Tensor]
    kind: ClassVar[str] = "exact"

    @classmethod
    def open(cls, path: Path | str) -> Delta:
        """`InputError` if it is no delta, of a newer format, or not whole."""
        path = Path(path)
        if not (path / "delta.json").is_file():
            raise InputError("this is no delta folder (no delta.json)", where=str(path))
        about = read_json(path / "delta.json")
        if about.get("format") != FORMAT:
            found = about.get("format")
            raise InputError(f"format {found!r} is not known here, only {FORMAT}", where=str(path / "delta.json"))
        stored = Weights.open(path / "delta.safetensors")
        if about.get("kind") == "low-rank":
            from luthier.weights.adapter import LowRankDelta

            return LowRankDelta(path, about, stored)
        return cls(path, about, stored)

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """Per changed tensor: kind, dtype, shape, changed elements, packed bytes."""
        return self.about["tensors"]

    def apply(self, base: Path | str, out: Path | str, say: Say = lambda *_: None) -> None:
        """Write the tuned weights into the new folder `out`, with the other files of `base`.

        Raises `InputError` if `base` is not the base of this delta, or `out` is not empty.
        """
        self._write(base, out, 1, say)

    def remove(self, tuned: Path | str, out: Path | str, say: Say = lambda *_: None) -> None:
        """Write the base's weights into the new folder `out`; `tuned` must be what `apply` gives."""
        self._write(tuned, out, -1, say)

    def applied(self, name: str, base: Tensor, *, sign: int = 1) -> Tensor:
        """One tensor of the tuned model from the base's (`sign=-1`: the other way round), bit for bit."""
        narrow, wide = self.about["widened"].get(name, (NAMES[base.dtype],) * 2)
        given = narrow if sign > 0 else wide
        if NAMES[base.dtype] != given or list(base.shape) != self.tensors.get(name, {}).get("shape", list(base.shape)):
            raise InputError(
                f"{name} is {NAMES[base.dtype]} {list(base.shape)}, which is not what the delta was made of"
            )
        moved = base.to(DTYPES[wide])
        if name in self.tensors:
            moved = exact.add(moved, self._values(name), sign=sign)
        return moved if sign > 0 else moved.to(DTYPES[narrow])

    def float32(self, name: str, base: Tensor) -> Tensor:
        """tuned - base as float32 numbers (float64 for float64), zeros where nothing changed; what merging reads."""
        wide = torch.float64 if base.dtype == torch.float64 else torch.float32
        return self.applied(name, base).to(wide) - base.to(wide)

    def info(self) -> dict[str, Any]:
        """Sizes and counts, json-able."""
        rows = self.tensors.values()
        size = sum(path.stat().st_size for path in self.path.iterdir() if path.is_file())
        return {
            "path": str(self.path),
            "kind": self.about["kind"],
            "base": self.about["base"],
            "tuned": self.about["tuned"],
            "tensors": len(self.about["all"]),
            "changed_tensors": len(self.tensors),
            "elements": sum(int(np.prod(row["shape"], dtype=np.int64)) for row in rows),
            "changed_elements": sum(row["changed"] for row in rows),
            "bytes": size,
        }

    def _values(self, name: str) -> Any:
        about = self.tensors[name]
        width = DTYPES[about["dtype"]].itemsize
        count = int(np.prod(about["shape"], dtype=np.int64))
        data = self.stored[name].numpy().tobytes()
        if about["kind"] == "dense":
            return exact.unpack(data, count, width)
        values = np.zeros(count, dtype=f"u{width}")
        gaps = exact.unpack(self.stored[f"{name}#places"].numpy().tobytes(), about["changed"], 8)
        values[np.cumsum(gaps.astype(np.int64))] = exact.unpack(data, about["changed"], width)
        return values

    def _write(self, source: Path | str, out: Path | str, sign: int, say: Say) -> None:
        weights, out = Weights.open(source), Path(out)
        given, made = ("base", "tuned") if sign > 0 else ("tuned", "base")
        same_names(weights, self.about["all"], str(source))
        hashes = {name: tensor_hash(weights[name]) for name in weights}
        if combined(hashes) != self.about[given]:
            raise InputError(
                f"these are not the {given} weights of this delta (hash {combined(hashes)[:12]}, "
                f"expected {self.about[given][:12]})",
                where=str(source),
            )
        refuse_filled(out)
        done: dict[str, str] = {}

        def read(name: str) -> Tensor:
            tensor = self.applied(name, weights[name], sign=sign)
            done[name] = tensor_hash(tensor)
            say(name, len(done), len(weights))
            return tensor

        infos = dict(infos_of(weights))
        for name, dtypes in self.about["widened"].items():
            infos[name] = infos[name]._replace(dtype=DTYPES[dtypes[1 if sign > 0 else 0]])
        with write_aside(out) as aside:
            write_weights(aside, infos, read)
            if combined(done) != self.about[made]:
                raise InputError("what came out is not what the delta was made of; it is damaged", where=str(self.path))
            copy_others(Path(source), aside)


def diff(
    base: Path | str | Mapping[str, Tensor],
    tuned: Path | str | Mapping[str, Tensor],
    out: Path | str,
    say: Say = lambda *_: None,
) -> Delta:
    """Write what leads from `base` to `tuned` into the new folder `out`, tensor by tensor.

    Args:
        base, tuned: folders or files of weights, or mappings of tensors; the same names, dtypes and shapes.

    Raises `InputError` that names what differs, or if `out` is not empty.
    """
    a = Weights.open(base) if isinstance(base, str | Path) else base
    b = Weights.open(tuned) if isinstance(tuned, str | Path) else tuned
    out = Path(out)
    refuse_filled(out)
    widened = comparable(infos_of(a), infos_of(b))
    hashes: list[dict[str, str]] = [{}, {}]
    about: dict[str, Any] = {}
    with write_aside(out) as aside:
        parts: dict[str, Info] = {}
        packed = aside / "packed"
        packed.mkdir()
        for number, name in enumerate(a, start=1):
            old, new = a[name], b[name]
            for known, tensor in zip(hashes, (old, new), strict=True):
                known[name] = tensor_hash(tensor)
            old = old.to(new.dtype)  # lossless where they differ, and back
            if not torch.equal(raw(old), raw(new)):
                found = _packed(old, new)
                about[name] = found.pop("about")
                for part, data in found.items():
                    key = name if part == "values" else f"{name}#places"
                    (packed / str(len(parts))).write_bytes(data)
                    parts[key] = Info(torch.uint8, (len(data),))
            say(name, number, len(a))
        order = {key: str(place) for place, key in enumerate(parts)}
        read = _reader(packed, order)
        write_file(aside / "delta.safetensors", parts, read, {"format": "pt"})
        shutil.rmtree(packed)
        whole = {
            "format": FORMAT,
            "kind": "exact",
            "base": combined(hashes[0]),
            "tuned": combined(hashes[1]),
            "all": sorted(a),
            "widened": widened,
            "tensors": about,
        }
        (aside / "delta.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return Delta.open(out)


def _reader(folder: Path, order: Mapping[str, str]) -> Callable[[str], Tensor]:
    return lambda key: torch.from_numpy(np.fromfile(folder / order[key], dtype=np.uint8))


def _packed(old: Tensor, new: Tensor) -> dict[str, Any]:
    values = exact.difference(old, new)
    places = np.flatnonzero(values)
    kind = "sparse" if len(places) < exact.SPARSE_BELOW * len(values) else "dense"
    about = {"kind": kind, "dtype": NAMES[old.dtype], "shape": list(old.shape), "changed": len(places)}
    if kind == "dense":
        return {"about": about, "values": exact.pack(values)}
    gaps = np.diff(places, prepend=0).astype("u8")
    return {"about": about, "values": exact.pack(values[places]), "places": exact.pack(gaps)}


def comparable(a: Mapping[str, Info], b: Mapping[str, Info]) -> dict[str, tuple[str, str]]:
    """Refuse weights whose names, dtypes or shapes differ, naming them.

    A base in half precision that was tuned in a wider type is fine, since widening loses nothing and so can be undone:
    returns both types of each such tensor.
    """
    if a.keys() != b.keys():
        missing, new = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
        said = [
            f"{what}: {_some(names)}" for what, names in (("only in base", missing), ("only in tuned", new)) if names
        ]
        raise InputError(f"base and tuned hold different tensors ({'; '.join(said)})")
    widened = {name: (NAMES[a[name].dtype], NAMES[b[name].dtype]) for name in a if _widens(a[name], b[name])}
    other = [name for name in a if a[name] != b[name] and name not in widened]
    if other:
        name = other[0]
        raise InputError(
            f"{len(other)} tensors differ in dtype or shape, such as {name}: {NAMES[a[name].dtype]} "
            f"{list(a[name].shape)} and {NAMES[b[name].dtype]} {list(b[name].shape)}",
            fix="a delta needs both alike, or the tuned one in a wider floating-point type",
        )
    return widened


def _widens(base: Info, tuned: Info) -> bool:
    """Whether every number of `base` is one of `tuned`'s type, which is another."""
    halves = (torch.float32, torch.float64)
    wider = {torch.float16: halves, torch.bfloat16: halves, torch.float32: halves[1:]}
    return base.shape == tuned.shape and tuned.dtype in wider.get(base.dtype, ())


def same_names(given: Mapping[str, Any], wanted: list[str], where: str) -> None:
    """Refuse weights that hold other tensors than the delta was made of."""
    if set(given) != set(wanted):
        raise InputError(
            f"holds other tensors than the delta's base ({_some(sorted(set(given) ^ set(wanted)))})", where=where
        )


def refuse_filled(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("this place is taken", where=str(out), fix="name a new folder")


def copy_others(source: Path, out: Path) -> None:
    """Config, tokenizer and the like: every file of the folder that holds no weights."""
    if not source.is_dir():
        return
    for path in sorted(source.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".gguf") or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name != "SHA256SUMS":
            shutil.copy2(path, out / path.name)


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
