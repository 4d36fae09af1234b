"""What is known of a tensor before it is read: its type and shape; and its bytes once it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Types by the names of the safetensors format.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Info(NamedTuple):
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Info:
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{NAMES.get(self.dtype, self.dtype)} {list(self.shape)}"


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
