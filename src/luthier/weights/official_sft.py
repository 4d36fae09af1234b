"""Read the sparse fine-tunings that the authors of LT-SFT published (`pytorch_diff.bin`), and add them to weights.

    found = read("ner-sft/pytorch_diff.bin")
    tuned = add(base, found)                     a mapping of tensors, as `merge` and `diff_tensors` take it
    tuned = add(base, found, with_abs=False)     without what is stored as a whole: a language under a task's model

The file is a dictionary. `diffs` holds for each tensor of the body its size, the differences' values, and
`index_steps`: their places as distances, the first one from 0. A place counts the FIRST axis fastest,
(i, j) -> i + j rows, which is not the C order in which tensors lie here. `abs` holds the head's parameters as they are.

It is a pickle, so it is read by torch's weights-only loader, which makes tensors and plain containers and runs nothing.
The authors' writer leaves one numpy integer in each list of distances; the two names that takes are bound to functions
of this file, which make a Python integer of it and know nothing else.

Places are 64-bit here; the published decoder's are 32-bit and overflow in tensors of more than 2^31 entries.

Source: github.com/cambridgeltl/composable-sft, src/sft/sft.py. Files of its earliest days (`body` and `head`) are
refused by name.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.errors import InputError
from luthier.weights.info import some


@dataclass(frozen=True)
class Difference:
    """The difference of one tensor.

    Attributes:
        shape: of the tensor.
        places: (n,) int64, flat in C order, ascending.
        values: (n,) floating, to be added there.
    """

    shape: tuple[int, ...]
    places: Tensor
    values: Tensor

    @property
    def density(self) -> float:
        """Share of the tensor's entries that differ; 0 of an empty tensor."""
        entries = torch.Size(self.shape).numel()
        return len(self.places) / entries if entries else 0.0


@dataclass(frozen=True)
class OfficialSft:
    """What a file holds: differences of the body, and whole parameters, by name."""

    diffs: dict[str, Difference]
    abs: dict[str, Tensor]


def read(path: Path | str) -> OfficialSft:
    """The sparse fine-tuning in a `pytorch_diff.bin`; `InputError` if it is none, or holds anything but tensors."""
    path = Path(path)
    if not path.is_file():
        raise InputError("there is no such file", where=str(path))
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            whole = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(
            "cannot be read as tensors alone: it is cut, or holds other objects", where=str(path)
        ) from error
    if not isinstance(whole, Mapping) or not whole.keys() & {"diffs", "abs"}:
        keys = ", ".join(map(str, whole)) if isinstance(whole, Mapping) else type(whole).__name__
        raise InputError(f"is no sparse fine-tuning with `diffs` and `abs`; it holds {keys}", where=str(path))
    try:
        diffs = {
            str(n): decode(one["size"], one["index_steps"], one["values"]) for n, one in whole.get("diffs", {}).items()
        }
        absolute = {str(name): tensor.detach() for name, tensor in whole.get("abs", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"is damaged: {type(error).__name__} {error}", where=str(path)) from error
    except InputError as error:
        raise InputError(error.what, where=str(path)) from None
    return OfficialSft(diffs, absolute)


def decode(size: Sequence[int], index_steps: Sequence[int] | Tensor, values: Tensor) -> Difference:
    """One tensor's entry of the file, its places turned to C order.

    Raises `InputError` for places outside the tensor, or another number of values than of places.
    """
    shape = tuple(int(length) for length in size)
    steps = torch.as_tensor(index_steps)
    if steps.is_floating_point() and steps.numel():
        raise InputError(f"its places are {steps.dtype}, and only whole numbers are places")
    steps = steps.long()
    if steps.ndim != 1 or values.shape != steps.shape:
        raise InputError(f"{len(steps)} places, and values of shape {list(values.shape)}")
    places, entries = steps.cumsum(0), torch.Size(shape).numel()
    if not len(places):
        return Difference(shape, places, values.detach())
    if int(places.min()) < 0 or int(places.max()) >= entries or bool((steps[1:] <= 0).any()):
        raise InputError(f"its places do not ascend within the {entries} entries of {list(shape)}")
    flat, stride, rest = torch.zeros_like(places), entries, places
    for length in shape:  # the coordinate of each axis, the first one being the fastest
        stride //= length
        flat += rest % length * stride
        rest = rest // length
    flat, order = flat.sort()
    return Difference(shape, flat, values.detach()[order])


def add(
    base: Mapping[str, Tensor], found: OfficialSft, *, with_abs: bool = True, scale: float = 1.0
) -> dict[str, Tensor]:
    """base + scale x differences, and the whole parameters in place of the base's; other tensors are the base's own.

    Raises `InputError` naming what the base lacks (the head of another kind of model) or has in another shape.
    """
    absolute = found.abs if with_abs else {}
    for kind, names, fix in (
        ("a difference", found.diffs, "is this the model it was made from?"),
        ("whole", absolute, "add it with with_abs=False, or to a model with that head"),
    ):
        lost = sorted(set(names) - set(base))
        if lost:
            raise InputError(f"holds {kind} {some(lost)}, which the model does not have", where="weights", fix=fix)
    shapes = {name: one.shape for name, one in found.diffs.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in absolute.items()}
    for name, shape in shapes.items():
        if tuple(base[name].shape) != shape:
            raise InputError(f"{name} is {list(base[name].shape)} in the model and {list(shape)} in the file")
    tuned = dict(base)
    for name, one in found.diffs.items():
        made = base[name].detach().clone().contiguous()
        flat = made.view(-1)
        places = one.places.to(flat.device)
        now = flat[places].to(torch.promote_types(flat.dtype, torch.float32))
        flat[places] = now.add_(one.values.to(now), alpha=scale).to(flat)
        tuned[name] = made
    return tuned | {name: tensor.to(base[name]) for name, tensor in absolute.items()}


# One numpy integer, without numpy.


class _Kind:
    """Stands for `numpy.dtype` in the file: which integer, and the order of its bytes."""

    def __init__(self, name: str, *_: Any):
        if str(name).lstrip("<>=|")[:1] not in ("i", "u"):
            raise pickle.UnpicklingError(f"a number of type {name!r}, where only integers are expected")
        self.signed, self.order = "i" in str(name), "little"

    def __setstate__(self, state: Any) -> None:
        self.order = "big" if state[1] == ">" else "little"


def _integer(kind: _Kind, data: bytes) -> int:
    """Stands for numpy's maker of single numbers."""
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("a number that is not made of bytes")
    return int.from_bytes(data, "big" if kind.order == "big" else "little", signed=kind.signed)


_NUMBERS: list[Any] = [
    (_Kind, "numpy.dtype"),
    (_integer, "numpy.core.multiarray.scalar"),
    (_integer, "numpy._core.multiarray.scalar"),
]
