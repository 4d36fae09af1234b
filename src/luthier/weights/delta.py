"""A delta: what leads from a base to a tuned model, in a folder of its own, exact in both directions.

    delta.json          content hashes of base and tuned; per changed tensor its kind, dtype, shape and counts
    delta.safetensors   the packed differences of bits (see `exact`); a tensor that did not change is not there

`dense` is a tensor of which a quarter or more changed, `sparse` any other; `low-rank` (see `adapter`) one whose
change is a product of factors. `diff` makes a delta of two models, `from_adapter` of a LoRA adapter; `apply` and
`remove` stream tensor by tensor, and a large tensor in pieces. Both hold what they are given and what they make
against the hashes, so the wrong base is an error and never a broken model.

Merging and scaling want numbers, not bits: `float32(name, base_tensor)` is tuned - base, rounded once. It needs the
base at hand. Storing it instead would cost a second copy of all changes, since neither can be had from the other.

When not to use it: to shrink a model whose weights are float32 and all moved. The low bits are then noise, and half
the model's size is what remains. In bfloat16 most small steps round to nothing, and a twentieth is common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.errors import InputError
from luthier.models.checkpoint import read_json
from luthier.models.files import write_aside
from luthier.weights import exact
from luthier.weights.hashing import TensorHash, combined, tensor_hash
from luthier.weights.info import Info, cut, dtype_of, flat, infos_of, kind_of, some
from luthier.weights.reader import Weights
from luthier.weights.writer import copy_others, refuse_filled, write_weights

FORMAT = 2
Say = Callable[[str, int, int], None]  # name of the tensor, how many are done, of how many


@dataclass(frozen=True)
class Delta:
    """A delta, opened from a folder or made in memory.

    Attributes:
        about: what `delta.json` says.
        stored: the packed parts by name, (bytes,) uint8.
        path: its folder; None in memory.
    """

    about: dict[str, Any]
    stored: Mapping[str, Tensor]
    path: Path | None = None
    kind: ClassVar[str] = "exact"

    @classmethod
    def open(cls, path: Path | str) -> Delta:
        """`InputError` if it is no delta, of another format, or not whole."""
        path = Path(path)
        where = str(path / "delta.json")
        if not (path / "delta.json").is_file():
            raise InputError("this is no delta folder (no delta.json)", where=str(path))
        about = read_json(path / "delta.json")
        if about.get("format") != FORMAT:
            fix = "make it again from base and tuned"
            raise InputError(f"format {about.get('format')!r} is not known here, only {FORMAT}", where=where, fix=fix)
        stored = Weights.open(path / "delta.safetensors")
        kind: type[Delta] = cls
        if about.get("kind") == "low-rank":
            from luthier.weights.adapter import LowRankDelta

            kind = LowRankDelta
        try:
            found = kind(about, stored, path)
            told = [combined({name: pair[side] for name, pair in about["hashes"].items()}) for side in (0, -1)]
            whole = (
                told == [about["base"], about["tuned"]]
                and found.tensors.keys() | about["widened"] <= about["hashes"].keys()
            )
            lost = [part for name in found.tensors for part in found.parts(name) if part not in stored.infos]
        except (KeyError, TypeError, AttributeError, IndexError):
            whole, lost = False, []
        if not whole:
            raise InputError("is not what a delta says of itself; it was cut or changed", where=where)
        if lost:
            raise InputError(f"lacks {some(lost)}, which delta.json names", where=str(path / "delta.safetensors"))
        return found

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """Per changed tensor: kind, dtype, shape, changed elements and more of its kind."""
        return self.about["tensors"]

    @property
    def removable(self) -> bool:
        """Whether `remove` is possible: always, but for an adapter's delta made with `residue=False`."""
        return True

    def parts(self, name: str) -> tuple[str, ...]:
        """Names in `stored` of what belongs to a changed tensor."""
        return (name,)

    # Whole models

    def apply(self, base: Path | str, out: Path | str, say: Say = lambda *_: None) -> None:
        """Write the tuned weights into the new folder `out`, with the other files of `base`.

        Raises `InputError` if `base` is not the base of this delta, or `out` is not empty; `CrashError` if the disk
        is full. Nothing stands at `out` then.
        """
        self._write(base, out, 1, say)

    def remove(self, tuned: Path | str, out: Path | str, say: Say = lambda *_: None) -> None:
        """Write the base's weights into the new folder `out`; `tuned` must be what `apply` gives."""
        self._write(tuned, out, -1, say)

    def apply_tensors(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`apply` in memory; tensors that did not change are those of `base`, not copies."""
        return self._made(base, 1)

    def remove_tensors(self, tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`remove` in memory."""
        return self._made(tuned, -1)

    # One tensor

    def applied(self, name: str, base: Tensor, *, sign: int = 1) -> Tensor:
        """One tensor of the tuned model from the base's (`sign=-1`: the other way round), bit for bit.

        Its type and shape are checked, its content is not.
        """
        if self._same(name):
            return base
        made = torch.empty(base.shape, dtype=dtype_of(self._dtypes(name, base)[1 if sign > 0 else 0]))
        place, elements = 0, made.view(-1)
        for piece in self.pieces(name, base, sign):
            elements[place : place + piece.numel()] = piece.view(-1)
            place += piece.numel()
        return made

    def pieces(self, name: str, given: Tensor, sign: int) -> Iterator[Tensor]:
        """What `applied` gives, as flat pieces in C order."""
        kinds = self._dtypes(name, given)
        narrow, wide = map(dtype_of, kinds)
        self._check(name, given, kinds[0 if sign > 0 else 1])
        about = self.tensors.get(name)
        if about is None:
            yield from (piece.to(wide if sign > 0 else narrow) for piece in cut(given, exact.PIECE))
            return
        data = self.stored[name].numpy().data
        changes = exact.decode(data, given.numel(), wide.itemsize, exact.PIECE)
        for piece, change in zip(cut(given, exact.PIECE), changes, strict=True):
            made = exact.add(piece.to(wide), change, sign=sign)
            yield made if sign > 0 else made.to(narrow)

    def float32(self, name: str, base: Tensor) -> Tensor:
        """tuned - base as float32 numbers (float64 for float64); 0 wherever the two are equal, infinities included."""
        wide = torch.float64 if base.dtype == torch.float64 else torch.float32
        old = base.to(wide)
        if name not in self.tensors:
            return torch.zeros_like(old)
        new = self.applied(name, base).to(wide)
        return (new - old).masked_fill_(new == old, 0)

    def info(self) -> dict[str, Any]:
        """Sizes and counts, json-able."""
        rows = list(self.tensors.values())
        elements = sum(Info("U8", tuple(row["shape"])).elements for row in rows)
        changed = sum(row["changed"] for row in rows)
        size = sum(info.bytes for info in infos_of(self.stored).values())
        if self.path is not None:
            size = sum(path.stat().st_size for path in self.path.iterdir() if path.is_file())
        return {
            "path": str(self.path) if self.path else None,
            "kind": self.kind,
            "created_by": self.about["created_by"],
            "removable": self.removable,
            "base": self.about["base"],
            "tuned": self.about["tuned"],
            "tensors": len(self.about["hashes"]),
            "changed_tensors": len(rows),
            "kinds": {kind: sum(row["kind"] == kind for row in rows) for kind in sorted({r["kind"] for r in rows})},
            "elements": elements,
            "changed_elements": changed,
            "density": changed / elements if elements else 0.0,
            "bytes": size,
        }

    # Inside

    def _same(self, name: str) -> bool:
        return name not in self.tensors and name not in self.about["widened"]

    def _dtypes(self, name: str, given: Tensor) -> tuple[str, str]:
        """Types of the tensor in base and tuned."""
        known = self.tensors.get(name, {}).get("dtype") or kind_of(given.dtype)
        narrow, wide = self.about["widened"].get(name, (known, known))
        return narrow, wide

    def _check(self, name: str, given: Tensor, kind: str) -> None:
        shape = tuple(self.tensors.get(name, {}).get("shape", given.shape))
        if Info.of(given) != (kind, shape):
            raise InputError(f"{name} is {Info.of(given)}, but the delta was made of {Info(kind, shape)}")

    def _checked(self, name: str, given: Tensor, sign: int) -> Iterator[Tensor]:
        """`pieces`, held against the hashes of what is given and of what is made."""
        before, after = (0, -1) if sign > 0 else (-1, 0)
        word = "base" if sign > 0 else "tuned"
        hashes = self.about["hashes"][name]
        came = tensor_hash(given)
        if came != hashes[before]:
            fix = f"it is the {'tuned' if sign > 0 else 'base'} one already" if came == hashes[after] else None
            raise InputError(
                f"these are not the {word} weights of this delta: {name} has the hash {came[:12]}, "
                f"expected {hashes[before][:12]}",
                fix=fix,
            )
        if self._same(name):
            yield flat(given)
            return
        kind = self._dtypes(name, given)[1 if sign > 0 else 0]
        made = TensorHash(Info(kind, tuple(given.shape)))
        for piece in self.pieces(name, given, sign):
            made.update(piece)
            yield piece
        if made.hex() != hashes[after]:
            raise InputError(f"{name} did not come out as it went in; the delta is damaged", where=self._where)

    def _made(self, given: Mapping[str, Tensor], sign: int) -> dict[str, Tensor]:
        self._allowed(given, sign, None)
        found: dict[str, Tensor] = {}
        for name, tensor in given.items():
            pieces = list(self._checked(name, tensor, sign))
            found[name] = tensor if self._same(name) else torch.cat(pieces).reshape(tensor.shape)
        return found

    def _write(self, source: Path | str, out: Path | str, sign: int, say: Say) -> None:
        weights, out = Weights.open(source), Path(out)
        self._allowed(weights, sign, str(source))
        refuse_filled(out)
        done = 0

        def read(name: str) -> Iterator[Tensor]:
            nonlocal done
            try:
                yield from self._checked(name, weights[name], sign)
            except InputError as error:
                raise InputError(error.what, where=error.where or str(source), fix=error.fix) from None
            done += 1
            say(name, done, len(weights))

        infos = infos_of(weights)
        for name, dtypes in self.about["widened"].items():
            infos[name] = infos[name]._replace(kind=dtypes[1 if sign > 0 else 0])
        with write_aside(out) as aside:
            write_weights(aside, infos, read)
            copy_others(Path(source), aside)

    def _allowed(self, given: Mapping[str, Tensor], sign: int, where: str | None) -> None:
        """Refuse what cannot be removed, and weights that hold other tensors than the delta was made of."""
        if sign < 0 and not self.removable:
            fix = "make it again with its residue, or use the base itself"
            raise InputError("this delta can be applied but not removed to the last bit", where=self._where, fix=fix)
        other = sorted(set(given) ^ self.about["hashes"].keys())
        if other:
            raise InputError(f"holds other tensors than the delta was made of ({some(other)})", where=where)

    @property
    def _where(self) -> str | None:
        return str(self.path) if self.path else None
