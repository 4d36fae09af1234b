"""What is known of a tensor before it is read: its type and shape; and its bytes once it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from luthier.errors import InputError
from luthier.later import torch

if TYPE_CHECKING:
    from torch import Tensor

# Types by the names of the safetensors format: what torch calls them, and bytes.
_KINDS = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}
KINDS = frozenset(_KINDS)
_BY_TORCH = {called: kind for kind, (called, _) in _KINDS.items()}


def dtype_of(kind: str) -> torch.dtype:
    """torch's type of a name of the format."""
    return getattr(torch, _KINDS[kind][0])  # type: ignore[no-any-return]


def kind_of(dtype: torch.dtype) -> str:
    """The format's name of a type; `InputError` for one that it does not have."""
    called = str(dtype).removeprefix("torch.")
    if called not in _BY_TORCH:
        raise InputError(f"safetensors files hold no numbers of type {called}")
    return _BY_TORCH[called]


class Info(NamedTuple):
    """Type and shape of a tensor.

    Attributes:
        kind: the type's name in the safetensors format: F32, BF16, ...
    """

    kind: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Info:
        return cls(kind_of(tensor.dtype), tuple(tensor.shape))

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.kind)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return _KINDS[self.kind][1]

    @property
    def array(self) -> np.dtype[Any]:
        """How numpy holds elements: BF16 as the bits of uint16, other types that it lacks as uint8."""
        called = _KINDS[self.kind][0]
        return np.dtype(called if hasattr(np, called) else f"u{self.itemsize}")

    @property
    def floating(self) -> bool:
        """Whether elements are real numbers."""
        return "F" in self.kind

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.itemsize

    def __str__(self) -> str:
        return f"{self.kind} {list(self.shape)}"


def infos_of(tensors: Mapping[str, Tensor]) -> dict[str, Info]:
    """Type and shape of each tensor; of `Weights` without reading any."""
    known = getattr(tensors, "infos", None)
    return dict(known) if known is not None else {name: Info.of(tensor) for name, tensor in tensors.items()}


def flat(tensor: Tensor) -> Tensor:
    """The elements in C order, (elements,), on the CPU; shares memory where it can."""
    return tensor.detach().cpu().contiguous().reshape(-1)


def raw(tensor: Tensor) -> Tensor:
    """The bytes in C order, (bytes,) uint8; shares memory where it can."""
    return flat(tensor).view(torch.uint8)


def cut(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """The elements in C order, in pieces of `size`; views where the tensor is contiguous."""
    whole = flat(tensor)
    return (whole[start : start + size] for start in range(0, whole.numel(), size))


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first few names, for an error."""
    known = list(names)
    return ", ".join(known[:limit]) + (f" and {len(known) - limit} more" if len(known) > limit else "")
