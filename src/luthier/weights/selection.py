"""`Selection`: which entries of which tensors, one bit each. What a mask, a region or a sparse tuning says of a model.

    region = Selection.from_masks({"w": delta.abs() > 0.1})
    region.density, region.counts()             share and number of entries that are in
    region & other, region | other, ~region, region - other
    region.overlap(other)                       share of the other's entries that are also in this one
    region.save("region.safetensors");  Selection.load("region.safetensors")

An entry takes one bit in memory and on disk: the bits of a tensor in C order, eight to a byte, the first the lowest
(`ceil(elements / 8)` bytes; bits behind the last element are 0). On disk it is a safetensors file with the packed bits
under the tensors' names and their shapes, as JSON, in the one line of metadata there is: the order of several is not
fixed, and equal selections are to be equal files. A list of indices would be smaller below a share of about
one in sixty, but not a mask of half a model, and set operations on bits run at memory speed.

Two selections can be combined if they are about the same tensors; other names or shapes are an error, since an entry
that is not listed is not the same as one that is out. A Selection is never changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from luthier.errors import CrashError, InputError
from luthier.models.checkpoint import read_header
from luthier.models.files import is_full
from luthier.weights.info import raw, some

FORMAT = "luthier-selection-2"
_ONES = np.array([value.bit_count() for value in range(256)], dtype=np.uint8)
Bits = NDArray[np.uint8]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Selection:
    """Entries of named tensors.

    Attributes:
        shapes: of each tensor, in order of names.
        bits: per tensor (ceil(elements / 8),) uint8. Not to be written to.
    """

    shapes: dict[str, tuple[int, ...]]
    bits: dict[str, Bits]

    # Making one

    @classmethod
    def from_masks(cls, masks: Mapping[str, Tensor]) -> Selection:
        """Of bool tensors by name: True is in. `InputError` for another type."""
        odd = [name for name, mask in masks.items() if mask.dtype != torch.bool]
        if odd:
            raise InputError(f"{odd[0]} is {masks[odd[0]].dtype}, and a mask is torch.bool", where="masks")
        names = sorted(masks)
        return cls({n: tuple(masks[n].shape) for n in names}, {n: _packed(masks[n]) for n in names})

    @classmethod
    def from_indices(cls, indices: Mapping[str, Tensor], shapes: Shapes) -> Selection:
        """Of flat places (C order, int64) by name; tensors of `shapes` without any have nothing in.

        Raises `InputError` for a name that has no shape, or a place outside its tensor.
        """
        unknown = sorted(set(indices) - set(shapes))
        if unknown:
            raise InputError(f"no shape is given for {some(unknown)}", where="shapes")
        masks = {}
        for name, shape in shapes.items():
            mask = torch.zeros(_elements(shape), dtype=torch.bool)
            if name in indices and indices[name].numel():
                places = indices[name]
                if int(places.min()) < 0 or int(places.max()) >= mask.numel():
                    what = f"{name} has {mask.numel()} entries, and places run to {int(places.max())}"
                    raise InputError(what + f" from {int(places.min())}", where="indices")
                mask[places] = True
            masks[name] = mask.view(shape)
        return cls.from_masks(masks)

    @classmethod
    def empty(cls, shapes: Shapes) -> Selection:
        """Nothing of these tensors."""
        names = sorted(shapes)
        return cls(
            {n: tuple(shapes[n]) for n in names},
            {n: np.zeros((_elements(shapes[n]) + 7) // 8, dtype=np.uint8) for n in names},
        )

    @classmethod
    def full(cls, shapes: Shapes) -> Selection:
        """All of these tensors."""
        return ~cls.empty(shapes)

    @classmethod
    def changed(cls, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> Selection:
        """Where the bits of two sets of weights differ; read tensor by tensor, so of any size.

        Raises `InputError` if names, types or shapes do.
        """
        names = sorted(set(base) | set(tuned))
        lacking = [name for name in names if name not in base or name not in tuned]
        if lacking:
            raise InputError(f"only one of the two holds {some(lacking)}")
        masks: dict[str, Bits] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            a, b = base[name], tuned[name]
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                raise InputError(f"{name} is {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}")
            shapes[name] = tuple(a.shape)
            masks[name] = _packed((raw(a) != raw(b)).view(-1, a.element_size()).any(1))
        return cls(shapes, masks)

    # Looking at one

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def mask(self, name: str) -> Tensor:
        """Bool tensor of the tensor's shape, a new one."""
        shape = self.shapes[name]
        bits = np.unpackbits(self.bits[name], count=_elements(shape), bitorder="little")
        return torch.from_numpy(bits.view(np.bool_)).view(shape)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Entries `start` to `stop` in C order, (stop - start,) bool; unpacks no more than these."""
        first = start // 8
        bits = np.unpackbits(self.bits[name][first : (stop + 7) // 8], bitorder="little")
        return torch.from_numpy(bits[start - 8 * first : stop - 8 * first].view(np.bool_))

    def indices(self, name: str) -> Tensor:
        """Flat places that are in, ascending, (count,) int64."""
        return self.mask(name).view(-1).nonzero()[:, 0]

    def counts(self) -> dict[str, int]:
        """How many entries of each tensor are in."""
        return {name: _ones(bits) for name, bits in self.bits.items()}

    @property
    def count(self) -> int:
        """How many entries are in."""
        return sum(self.counts().values())

    @property
    def elements(self) -> int:
        """How many entries there are, in or out."""
        return sum(_elements(shape) for shape in self.shapes.values())

    def elements_of(self, name: str) -> int:
        """How many entries a tensor has, in or out."""
        return _elements(self.shapes[name])

    @property
    def density(self) -> float:
        """Share of entries that are in; 0 if there are none at all."""
        return self.count / self.elements if self.elements else 0.0

    @property
    def bytes(self) -> int:
        """What the bits take, in memory and on disk (there with a header besides)."""
        return sum(bits.nbytes for bits in self.bits.values())

    def overlap(self, other: Selection) -> float:
        """|self and other| / |other|: the share of the other's entries that are in this one too; 0 if it has none."""
        whole = other.count
        return (self & other).count / whole if whole else 0.0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        return self.shapes == other.shapes and all(np.array_equal(self.bits[n], other.bits[n]) for n in self.bits)

    __hash__ = None  # type: ignore[assignment]

    # Combining

    def __and__(self, other: Selection) -> Selection:
        return self._with(other, np.bitwise_and)

    def __or__(self, other: Selection) -> Selection:
        return self._with(other, np.bitwise_or)

    def __sub__(self, other: Selection) -> Selection:
        return self._with(other, lambda a, b: a & ~b)

    def __invert__(self) -> Selection:
        return Selection(self.shapes, {n: _cleared(~bits, self.shapes[n]) for n, bits in self.bits.items()})

    def _with(self, other: Selection, rule: Callable[[Bits, Bits], Bits]) -> Selection:
        other_names = sorted(set(self.shapes) ^ set(other.shapes))
        if other_names:
            raise InputError(f"the two selections are not about the same tensors ({some(other_names)})")
        odd = [n for n in self.shapes if self.shapes[n] != other.shapes[n]]
        if odd:
            raise InputError(
                f"{odd[0]} is {list(self.shapes[odd[0]])} in one and {list(other.shapes[odd[0]])} in the other"
            )
        return Selection(self.shapes, {n: rule(self.bits[n], other.bits[n]) for n in self.bits})

    # Keeping

    def save(self, path: Path | str) -> None:
        """Write a safetensors file: whole or not there."""
        path = Path(path)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        about = {FORMAT: json.dumps({n: list(s) for n, s in self.shapes.items()})}
        try:
            save_file({n: torch.from_numpy(bits) for n, bits in self.bits.items()}, aside, metadata=about)
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
        except Exception as error:
            aside.unlink(missing_ok=True)
            if is_full(error):
                raise CrashError(f"{path}: the disk is full; free some space and run again") from error
            raise

    @classmethod
    def load(cls, path: Path | str) -> Selection:
        """`InputError` if it is no selection, or not whole."""
        path = Path(path)
        if not path.is_file():
            raise InputError("there is no such file", where=str(path))
        read_header(path)
        with safe_open(path, framework="pt") as file:
            about: Mapping[str, Any] = file.metadata() or {}
            if FORMAT not in about:
                fix = "give the file of a region or mask that this version of Luthier saved"
                raise InputError(f"is a safetensors file but no selection ({FORMAT})", where=str(path), fix=fix)
            try:
                shapes = {name: tuple(map(int, shape)) for name, shape in json.loads(about[FORMAT]).items()}
            except (ValueError, AttributeError, TypeError):
                shapes = {}
            bits = {name: file.get_tensor(name).numpy() for name in sorted(file.keys())}
        fits = shapes.keys() == bits.keys() and all(
            bits[n].dtype == np.uint8
            and bits[n].shape == ((_elements(shapes[n]) + 7) // 8,)
            and np.array_equal(_cleared(bits[n], shapes[n]), bits[n])
            for n in shapes
        )
        if not fits:
            raise InputError("its bits are not those of the shapes it names", where=str(path), fix="make it again")
        return cls(shapes, bits)


def overlaps(selections: Mapping[str, Selection]) -> dict[str, Any]:
    """How disjoint the regions of several tasks are, json-able.

    Returns:
        names: of the tasks, in order; counts: entries of each.
        overlap: row i, column j: |i and j| / |j|, so 1 on the diagonal.
        union: entries that are in any; density: their share.
        disjoint: union / sum of counts: 1 if no entry is in two regions, 1 / K if all K are one.
    """
    if not selections:
        raise InputError("there are no selections to compare", where="selections")
    names = list(selections)
    counts = [selections[n].count for n in names]
    union = _all_of(list(selections.values()))
    return {
        "names": names,
        "counts": counts,
        "overlap": [[selections[i].overlap(selections[j]) for j in names] for i in names],
        "union": union.count,
        "density": union.density,
        "disjoint": union.count / sum(counts) if sum(counts) else 1.0,
    }


def _all_of(selections: Sequence[Selection]) -> Selection:
    union = selections[0]
    for one in selections[1:]:
        union = union | one
    return union


def _elements(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _packed(mask: Tensor) -> Bits:
    return np.packbits(mask.detach().cpu().contiguous().view(-1).numpy(), bitorder="little")


def _cleared(bits: Bits, shape: Sequence[int]) -> Bits:
    """The bits with those behind the last element 0."""
    beyond = -_elements(shape) % 8
    if not beyond or not len(bits):
        return bits
    return np.concatenate([bits[:-1], bits[-1:] & np.uint8(0xFF >> beyond)])


def _ones(bits: Bits) -> int:
    return int(_ONES[bits].sum(dtype=np.int64))
