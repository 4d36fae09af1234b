"""`diff`: what leads from one set of weights to another, as a delta; on disk or in memory.

Both sets must hold the same names and shapes. A tensor of another type is refused too, with one exception: a base in
half precision that was tuned in float32 is widened first, which loses nothing and so can be undone. A vocabulary that
has grown is a change of shape and is refused with the names: a delta would have to invent rows when it is removed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from luthier.errors import InputError
from luthier.models.files import write_aside
from luthier.weights import exact
from luthier.weights.delta import FORMAT, Delta, Say
from luthier.weights.hashing import combined, tensor_hash
from luthier.weights.info import Info, cut, infos_of, kind_of, raw, some
from luthier.weights.reader import Weights
from luthier.weights.writer import PartsFile, refuse_filled

_HALVES = (torch.float32, torch.float64)
_WIDER = {torch.float16: _HALVES, torch.bfloat16: _HALVES, torch.float32: _HALVES[1:]}


class Parts(Protocol):
    """Where packed parts go: a file or a dictionary."""

    def add(self, name: str, pieces: Iterable[bytes]) -> int: ...


class Kept:
    """Packed parts in memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, pieces: Iterable[bytes]) -> int:
        self.tensors[name] = torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8)
        return self.tensors[name].numel()


def diff(
    base: Path | str | Mapping[str, Tensor],
    tuned: Path | str | Mapping[str, Tensor],
    out: Path | str,
    say: Say = lambda *_: None,
) -> Delta:
    """Write what leads from `base` to `tuned` into the new folder `out`, tensor by tensor.

    Args:
        base, tuned: folders or files of weights, or mappings of tensors; the same names, dtypes and shapes.

    Raises `InputError` that names what differs, or if `out` is not empty; `CrashError` if the disk is full.
    """
    a = Weights.open(base) if isinstance(base, str | Path) else base
    b = Weights.open(tuned) if isinstance(tuned, str | Path) else tuned
    if isinstance(b, Weights) and b.adapter:
        raise InputError("these are the factors of an adapter", where=str(tuned), fix="make the delta by from_adapter")
    out = Path(out)
    refuse_filled(out)
    widened = comparable(infos_of(a), infos_of(b))
    with write_aside(out) as aside:
        with PartsFile(aside / "delta.safetensors", a) as parts:
            about = _collected(a, b, widened, parts, say)
        write_about(aside, about)
    return Delta.open(out)


def diff_tensors(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> Delta:
    """`diff` in memory: a delta without a folder, for `apply_tensors`, `remove_tensors`, `applied` and `float32`."""
    kept = Kept()
    about = _collected(base, tuned, comparable(infos_of(base), infos_of(tuned)), kept, lambda *_: None)
    return Delta(about, kept.tensors)


def comparable(a: Mapping[str, Info], b: Mapping[str, Info]) -> dict[str, tuple[str, str]]:
    """Types in base and tuned of each tensor that was widened; `InputError` that names what cannot be compared."""
    if a.keys() != b.keys():
        sides = (("only in base", a.keys() - b.keys()), ("only in tuned", b.keys() - a.keys()))
        said = "; ".join(f"{what}: {some(sorted(names))}" for what, names in sides if names)
        raise InputError(f"base and tuned hold different tensors ({said})")
    widened = {n: (a[n].kind, b[n].kind) for n in a if _widens(a[n], b[n])}
    other = [f"{name}: {a[name]} and {b[name]}" for name in a if a[name] != b[name] and name not in widened]
    if other:
        fix = "a delta needs both alike, or the tuned one in a wider floating-point type"
        raise InputError(f"{len(other)} tensors differ in dtype or shape ({some(other)})", fix=fix)
    return widened


def _widens(base: Info, tuned: Info) -> bool:
    """Whether every number of `base` is one of `tuned`'s type, which is another."""
    return base.shape == tuned.shape and tuned.dtype in _WIDER.get(base.dtype, ())


def _collected(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], widened: dict[str, tuple[str, str]], parts: Parts, say: Say
) -> dict[str, Any]:
    """Pack all differences into `parts`; returns what `delta.json` says."""
    hashes: dict[str, list[str]] = {}
    tensors: dict[str, Any] = {}
    for number, name in enumerate(sorted(a), start=1):
        old, new = a[name], b[name]
        hashes[name] = [tensor_hash(old), tensor_hash(new)]
        if name in widened:
            same = _widened_only(name, old, new)
        else:
            same = hashes[name][0] == hashes[name][1]
        if not same:
            changed = 0

            def packed(old: Tensor = old, new: Tensor = new) -> Iterator[bytes]:
                nonlocal changed
                for piece in exact.encode(old, new):
                    changed += piece.changed
                    yield piece.data

            size = parts.add(name, packed())
            kind = "sparse" if changed < exact.SPARSE_BELOW * new.numel() else "dense"
            info = Info.of(new)
            tensors[name] = {"kind": kind, "dtype": info.kind, "shape": list(info.shape)}
            tensors[name] |= {"changed": changed, "bytes": size}
        say(name, number, len(a))
    return about_of("exact", hashes, tensors, widened)


def _widened_only(name: str, old: Tensor, new: Tensor) -> bool:
    """Whether nothing but the type changed; refuses not-a-numbers whose bits would not survive the way back."""
    same = True
    for before, after in zip(cut(old, exact.PIECE), cut(new, exact.PIECE), strict=True):
        wide = before.to(after.dtype)
        if not torch.equal(raw(wide.to(before.dtype)), raw(before)):
            raise InputError(
                f"{name} holds values that are not numbers and would be lost between {kind_of(old.dtype)} and "
                f"{kind_of(new.dtype)}",
                fix="save base and tuned in one type",
            )
        same = same and torch.equal(raw(wide), raw(after))
    return same


def about_of(
    kind: str, hashes: dict[str, list[str]], tensors: dict[str, Any], widened: dict[str, tuple[str, str]] | None = None
) -> dict[str, Any]:
    """The content of `delta.json`.

    Args:
        hashes: name -> hash of the tensor in base and in tuned.
    """
    from importlib.metadata import version

    return {
        "format": FORMAT,
        "kind": kind,
        "created_by": f"luthier {version('luthier')}",
        "base": combined({name: pair[0] for name, pair in hashes.items()}),
        "tuned": combined({name: pair[-1] for name, pair in hashes.items()}),
        "widened": widened or {},
        "tensors": tensors,
        "hashes": {name: list(dict.fromkeys(pair)) for name, pair in hashes.items()},
    }


def write_about(folder: Path, about: dict[str, Any]) -> None:
    (folder / "delta.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
