"""Sources that stand on others: tuned models kept as adapters or deltas, and models seen another way.

AdapterSource    a LoRA adapter of PEFT on a base: base + scale B A, merged as the product, never factor by factor
DeltaSource      a delta on its base
AgainstSource    a model whose difference is taken to a base of its own, not to that of the merge
PaddedSource     another one with rows of zeros at the end of some tensors
MappedSource     another one whose vocabulary was brought into the order of the base's (see `vocabulary`)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from luthier.errors import InputError
from luthier.merge.base import Rows
from luthier.merge.sources import Source, matrix_shape
from luthier.weights import Delta, Weights, content_hash
from luthier.weights.adapter import LowRankDelta, factors_of
from luthier.weights.algebra import finite
from luthier.weights.info import Info


def on_its_base(base: Source, folder: Path, label: str) -> Source:
    """The tuned model of a folder that holds a delta or an adapter on `base`."""
    if (folder / "delta.json").is_file():
        return DeltaSource(base, Delta.open(folder), label)
    return AdapterSource(base, folder, label)


class AdapterSource:
    """A plain LoRA adapter: in the tensors it targets, the base's rows plus those of scale B A."""

    def __init__(self, base: Source, folder: Path, label: str):
        self.base, self.label, self.path = base, label, folder
        self.folder = base.folder
        self.infos = base.infos
        self._factors = factors_of(folder, base.infos)

    def whole(self, name: str) -> Tensor:
        return self.base.whole(name)

    def rows(self, name: str, start: int, stop: int) -> Rows:
        base = self.base.rows(name, start, stop)
        if name not in self._factors:
            return Rows(lambda: base.values, lambda: torch.zeros(()))
        return _product(base, *self._factors[name], start, stop)

    def digest(self) -> str:
        return content_hash(Weights.open(self.path))


class DeltaSource:
    """A delta applied to its base while it is read. Tensors are best read from front to back, as a merge does."""

    def __init__(self, base: Source, delta: Delta, label: str):
        self.base, self.delta, self.label, self.folder = base, delta, label, base.folder
        other = sorted(set(base.infos) ^ set(delta.about["hashes"]))
        if other or base.digest() != delta.about["base"]:
            what = f"was made of another base than {base.label}"
            raise InputError(what, where=label, fix="give the base that it was made of, or use the tuned model itself")
        self.infos = base.infos
        self._reading: tuple[str, int, Iterator[Tensor], Tensor] | None = None

    def whole(self, name: str) -> Tensor:
        return self.delta.applied(name, self.base.whole(name))

    def rows(self, name: str, start: int, stop: int) -> Rows:
        base = self.base.rows(name, start, stop)
        if name not in self.delta.tensors:
            return Rows(lambda: base.values, lambda: torch.zeros(()))
        if isinstance(self.delta, LowRankDelta):
            return _product(base, *self.delta.factors(name), start, stop)
        columns = matrix_shape(self.infos[name].shape)[1]
        return Rows(lambda: self._elements(name, start * columns, stop * columns).view(-1, columns).float())

    def _elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of the tuned tensor; goes on where the last call ended, or begins again."""
        if self._reading is None or self._reading[0] != name or self._reading[1] > start:
            self._reading = name, 0, self.delta.pieces(name, self.base.whole(name), 1), torch.empty(0)
        _, place, pieces, buffer = self._reading
        while place + buffer.numel() < stop:
            if place + buffer.numel() <= start:
                place, buffer = place + buffer.numel(), next(pieces).reshape(-1)
            else:
                place, buffer = start, torch.cat([buffer[start - place :], next(pieces).reshape(-1)])
        self._reading = name, place, pieces, buffer
        return buffer[start - place : stop - place]

    def digest(self) -> str:
        return self.delta.about["tuned"]


def _product(base: Rows, left: Tensor, right: Tensor, start: int, stop: int) -> Rows:
    """Rows of base + left @ right, whose difference is the product itself; nothing is computed until asked for."""

    @cache
    def change() -> Tensor:
        return left[start:stop] @ right

    return Rows(lambda: base.values + change(), change)


class AgainstSource:
    """A model whose difference is that to `own_base`, whatever base the merge has: values - own_base, float32.

    Both must hold the same tensors of the same shapes (line them up first).
    """

    def __init__(self, inner: Source, own_base: Source):
        self.inner, self.own_base = inner, own_base
        self.label, self.folder, self.infos = inner.label, inner.folder, inner.infos

    def whole(self, name: str) -> Tensor:
        return self.inner.whole(name)

    def rows(self, name: str, start: int, stop: int) -> Rows:
        ours = self.inner.rows(name, start, stop)
        theirs = self.own_base.rows(name, start, stop)

        def change() -> Tensor:
            if not finite(theirs.values):
                what = f"{name} holds values that are infinite or not numbers"
                raise InputError(what, where=self.own_base.label, fix="mend that model first")
            return ours.values - theirs.values

        return Rows(lambda: ours.values, change)

    def digest(self) -> str:
        return f"{self.inner.digest()}-{self.own_base.digest()}"


class PaddedSource:
    """A source with zeros after the last row of some tensors (after the last element of vectors).

    Args:
        rows: name -> how many rows it shall have.
        folder: where the config and tokenizer are that fit the padded shapes.
    """

    def __init__(self, inner: Source, rows: Mapping[str, int], folder: Path | None):
        self.inner, self.label, self.folder = inner, inner.label, folder
        self.padded = dict(rows)
        self.infos: Mapping[str, Info] = {
            name: Info(info.kind, (rows[name], *info.shape[1:])) if name in rows else info
            for name, info in inner.infos.items()
        }

    def whole(self, name: str) -> Tensor:
        tensor = self.inner.whole(name)
        if name not in self.padded:
            return tensor
        return torch.cat([tensor, tensor.new_zeros(self.padded[name] - len(tensor), *tensor.shape[1:])])

    def rows(self, name: str, start: int, stop: int) -> Rows:
        if name not in self.padded:
            return self.inner.rows(name, start, stop)

        def values() -> Tensor:
            shape = self.inner.infos[name].shape
            if len(shape) == 1:  # a vector is one row
                there = self.inner.rows(name, start, stop).values
                return torch.nn.functional.pad(there, (0, self.padded[name] - shape[0]))
            there = self.inner.rows(name, min(start, shape[0]), min(stop, shape[0])).values
            return torch.nn.functional.pad(there, (0, 0, 0, stop - start - len(there)))

        return Rows(values)

    def digest(self) -> str:
        return self.inner.digest()


class MappedSource:
    """A source whose vocabulary tensors were brought into the base's order of rows.

    Args:
        places: name -> (rows,) int64: which row of `inner` stands for each row of the base; -1: none, the base's own
            row is taken, so that the difference there is 0.
    """

    def __init__(self, inner: Source, base: Source, places: Mapping[str, Tensor]):
        self.inner, self.base, self.places = inner, base, places
        self.label, self.folder = inner.label, inner.folder
        self.infos: Mapping[str, Info] = {
            name: Info(info.kind, base.infos[name].shape) if name in places else info
            for name, info in inner.infos.items()
        }

    def whole(self, name: str) -> Tensor:
        return self.inner.whole(name)

    def rows(self, name: str, start: int, stop: int) -> Rows:
        if name not in self.places:
            return self.inner.rows(name, start, stop)

        def values() -> Tensor:
            where = self.places[name][start:stop]
            known = (where >= 0).nonzero()[:, 0]
            out = self.base.rows(name, start, stop).values.clone()
            for i in known.tolist():
                at = int(where[i])
                out[i] = self.inner.rows(name, at, at + 1).values[0]
            return out

        return Rows(values)

    def digest(self) -> str:
        return self.inner.digest()
