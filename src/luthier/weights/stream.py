"""Named tensors on disk, read and written one at a time.

`Weights.open` takes a folder of transformers (one safetensors file or shards with an index) or a safetensors file, and
checks every header before it hands anything out: pickles, files cut short and missing shards are refused there.
`write_weights` writes shards while the tensors come: the header needs shapes and dtypes only, which are known before.
So memory holds one tensor at a time, whatever the model's size. `content_hash` does not depend on shards or order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from luthier.errors import InputError
from luthier.models.checkpoint import INDEX, SINGLE, read_header, read_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 10**9


class Info(NamedTuple):
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * torch.empty((), dtype=self.dtype).element_size()


class Weights(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read when it is asked for; `infos` tells dtypes and shapes."""

    def __init__(self, path: Path, files: dict[str, Path], infos: dict[str, Info]):
        self.path, self.files, self.infos = path, files, infos

    @classmethod
    def open(cls, path: Path | str) -> Weights:
        """Of a folder or a safetensors file; `InputError` if there are none, or a file is not whole."""
        path = Path(path)
        if path.is_dir():
            shards = _shards(path)
        elif path.is_file():
            shards = [path]
        else:
            raise InputError("there is no such folder or file", where=str(path))
        files: dict[str, Path] = {}
        infos: dict[str, Info] = {}
        for shard in shards:
            for name, about in read_header(shard).items():
                if name in files:
                    raise InputError(f"tensor {name!r} is also in {files[name].name}", where=str(shard))
                if about["dtype"] not in DTYPES:
                    raise InputError(f"tensor {name!r} has the type {about['dtype']}", where=str(shard))
                files[name], infos[name] = shard, Info(DTYPES[about["dtype"]], tuple(about["shape"]))
        return cls(path, files, dict(sorted(infos.items())))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.files:
            raise KeyError(name)
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError("has no weight_map", where=str(index))
        shards = [folder / name for name in sorted(set(names.values()))]
        for shard in shards:
            if shard.parent != folder or not shard.is_file():
                raise InputError(f"names the shard {shard.name}, which is not there", where=str(index))
        return shards
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    fix = "name its base and use `from_adapter`" if (folder / "adapter_config.json").is_file() else None
    raise InputError(f"holds no {SINGLE} and no {INDEX}", where=str(folder), fix=fix)


def infos_of(tensors: Mapping[str, Tensor]) -> dict[str, Info]:
    """Dtype and shape of each tensor; of `Weights` without reading any."""
    if isinstance(tensors, Weights):
        return tensors.infos
    return {name: Info(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, (bytes,) uint8, in C order; shared where it is contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def tensor_hash(tensor: Tensor) -> str:
    """xxh3 of a tensor's dtype, shape and bytes, hex."""
    whole = xxhash.xxh3_128(f"{NAMES[tensor.dtype]}{list(tensor.shape)}".encode())
    whole.update(raw(tensor).numpy().data)
    return whole.hexdigest()


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and bytes that does not depend on shards, files or their order; hex."""
    return combined({name: tensor_hash(tensors[name]) for name in tensors})


def combined(hashes: Mapping[str, str]) -> str:
    """The hash of a set of weights from those of its tensors."""
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()


def write_weights(
    folder: Path, infos: Mapping[str, Info], read: Callable[[str], Tensor], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors into `folder` as transformers does: `model.safetensors`, or shards of `shard_bytes` and an index.

    Args:
        infos: names in the order of writing; a tensor that `read` gives must have the dtype and shape told here.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        if shards[-1] and filled + info.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.bytes
    names = [SINGLE] if len(shards) == 1 else []
    names = names or [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for file, members in zip(names, shards, strict=True):
        write_file(folder / file, {name: infos[name] for name in members}, read, {"format": "pt"})
    if len(shards) > 1:
        places = {name: file for file, members in zip(names, shards, strict=True) for name in members}
        index = {"metadata": {"total_size": sum(i.bytes for i in infos.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(
    path: Path, infos: Mapping[str, Info], read: Callable[[str], Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """One safetensors file, tensor by tensor, flushed to the disk."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, info in infos.items():
        span = [place, place + info.bytes]
        header[name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": span}
        place += info.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, info in infos.items():
            tensor = read(name)
            if (tensor.dtype, tuple(tensor.shape)) != info:
                raise ValueError(f"{name}: announced as {info}, got {tensor.dtype} {tuple(tensor.shape)}")
            file.write(raw(tensor).numpy().data)
        file.flush()
        os.fsync(file.fileno())
