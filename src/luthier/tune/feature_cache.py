"""Vectors of rows on disk, each written once: what a frozen model says about a row need not be computed again.

    cache = FeatureCache(folder, identity="...", width=3072)
    cache.put(keys, vectors)             # (rows, width) float
    cache.get(keys)                      # float32, from a memory map: memory holds the keys alone, 16 bytes a row

A row's key is a hash of its content without padding (`row_keys`), so shuffled, re-split or re-batched data find their
vectors again, and changed data do not find wrong ones. The folder gets a subfolder per `identity` (a hash of what
computed the vectors); vectors of another model are never mixed in. Values are appended before keys, so a process that
dies leaves a shorter cache and no wrong one. One process at a time may hold a subfolder.
"""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from luthier.errors import InputError

_KEY = 16  # bytes


class FeatureCache:
    """A growing table of vectors by key.

    Args:
        folder: where it lives; None is a temporary folder that goes when this object does.
        identity: of what computed the vectors; names the subfolder.
        width: numbers per row.
        dtype: how they are stored; float16 halves the disk and keeps 11 bits.
    """

    def __init__(self, folder: Path | None, *, identity: str, width: int, dtype: str = "float32"):
        self._temporary = tempfile.TemporaryDirectory(prefix="luthier-features-") if folder is None else None
        self.folder = Path(self._temporary.name if self._temporary else folder) / f"{identity}-{dtype}"  # type: ignore[arg-type]
        self.width, self.dtype = width, np.dtype(dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._values = (self.folder / "values.bin").open("ab")
        try:
            fcntl.flock(self._values, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                "another process or tuning holds this cache", where=str(self.folder), fix="name another folder"
            ) from None
        self._names = (self.folder / "keys.bin").open("ab")
        size = width * self.dtype.itemsize
        count = min(self._values.tell() // size, self._names.tell() // _KEY)
        self._values.truncate(count * size)
        self._names.truncate(count * _KEY)
        names = (self.folder / "keys.bin").read_bytes()
        self._at = {names[i * _KEY : (i + 1) * _KEY]: i for i in range(count)}
        self._count = count
        self._mapped = self._map()

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, key: bytes) -> bool:
        return key in self._at

    def put(self, keys: Sequence[bytes], vectors: Tensor) -> None:
        """Append `vectors` (rows, width) under `keys`; a key that is there keeps its vector."""
        new: dict[bytes, int] = {}
        for i, key in enumerate(keys):
            if key not in self._at:
                new.setdefault(key, i)
        if not new:
            return
        with np.errstate(over="ignore"):  # told below
            values = vectors.detach().float().cpu().numpy()[list(new.values())].astype(self.dtype)
        if values.shape[1] != self.width:
            raise InputError(f"vectors of {values.shape[1]} numbers for a cache of {self.width}")
        if not np.isfinite(values).all():
            raise InputError(
                f"a feature is not finite as {self.dtype.name}", where="tune.cache_features", fix="store float32"
            )
        self._values.write(values.tobytes())
        self._values.flush()
        self._names.write(b"".join(new))
        self._names.flush()
        for key in new:
            self._at[key] = self._count
            self._count += 1
        self._mapped = self._map()

    def get(self, keys: Sequence[bytes]) -> Tensor:
        """(rows, width) float32, in the order of `keys`; `KeyError` for one that is not there."""
        return torch.from_numpy(self._mapped[[self._at[key] for key in keys]].astype(np.float32))

    def close(self) -> None:
        """Let go of the files; a temporary folder is removed."""
        self._values.close()
        self._names.close()
        if self._temporary:
            self._temporary.cleanup()

    def _map(self) -> Any:
        if not self._count:
            return np.zeros((0, self.width), self.dtype)
        return np.memmap(self.folder / "values.bin", self.dtype, "r", shape=(self._count, self.width))


def row_keys(inputs: Mapping[str, Any]) -> list[bytes]:
    """A key of 16 bytes for each row of a batch: a hash of its tensors, without its padding, which must stand last."""
    tensors = {n: v.detach().cpu() for n, v in sorted(inputs.items()) if isinstance(v, Tensor) and v.ndim}
    mask = tensors.pop("attention_mask", None)
    lengths = None if mask is None else mask.bool().sum(1).tolist()
    keys = []
    for row in range(len(next(iter(tensors.values())))):
        whole = xxhash.xxh3_128()
        for name, value in tensors.items():
            own = value[row]
            if lengths is not None and mask is not None and value.shape[:2] == mask.shape:
                own = own[: lengths[row]]
            whole.update(f"{name} {own.dtype} {tuple(own.shape)}".encode())
            whole.update(own.contiguous().view(torch.uint8).numpy().tobytes() if own.ndim else str(own.item()).encode())
        keys.append(whole.digest())
    return keys
