"""Weights on disk as a mapping of names to tensors, each read when it is asked for.

`Weights.open` takes

    a folder of transformers     one safetensors file, or shards with their index
    a PEFT adapter's folder      its factors under the names they have there (`adapter` is then true)
    a safetensors file

and checks every header before it hands anything out: pickles, files cut short, missing shards and names that stand
twice are refused there, in one sentence. Tensors are views of the mapped files, so what is read costs no memory of
the process's own; a large one may be looked at in pieces with `info.cut`. They must not be written to: the files are
mapped for reading only. Pages that were read count as resident until the system needs them or `release` lets them go.

`array`, `read_into` and `every` copy elements out of a file as numpy holds them (`Info.array`), without torch.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.errors import InputError
from luthier.later import torch
from luthier.models.checkpoint import INDEX, SINGLE, read_header, read_json
from luthier.weights.info import KINDS, Info, some

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER = "adapter_model.safetensors"


class Weights(Mapping[str, "Tensor"]):
    """The tensors of a checkpoint by name, in order of names; read-only.

    Attributes:
        path: the folder or file that was opened.
        files: the file that holds each tensor.
        infos: type and shape of each tensor.
        adapter: whether these are the factors of a PEFT adapter.
    """

    def __init__(
        self, path: Path, files: dict[str, Path], infos: dict[str, Info], places: dict[str, int], adapter: bool = False
    ):
        self.path, self.files, self.infos, self.adapter = path, files, infos, adapter
        self._places = places  # of the first byte in its file
        self._mapped: dict[Path, mmap.mmap] = {}
        self._opened: dict[Path, FileIO] = {}

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
        places: dict[str, int] = {}
        for shard in shards:
            with shard.open("rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
            for name, about in read_header(shard).items():
                if name in files:
                    raise InputError(f"tensor {name!r} is also in {files[name].name}", where=str(shard))
                if about["dtype"] not in KINDS:
                    raise InputError(f"tensor {name!r} has the type {about['dtype']}", where=str(shard))
                files[name], infos[name] = shard, Info(about["dtype"], tuple(about["shape"]))
                places[name] = start + about["data_offsets"][0]
        return cls(path, files, dict(sorted(infos.items())), places, shards[0].name == ADAPTER)

    def __getitem__(self, name: str) -> Tensor:
        info = self.infos[name]
        if not info.elements:
            return torch.empty(info.shape, dtype=info.dtype)
        with warnings.catch_warnings():  # torch warns, once in a process, that one must not write to them
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            found = torch.frombuffer(self._map(name), dtype=info.dtype, count=info.elements, offset=self._places[name])
        return found.view(info.shape)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a tensor in C order, (stop - start,), copied out of the file.

        For going over everything once: nothing stays mapped, and threads may read at the same time.
        """
        return torch.from_numpy(self.array(name, start, stop)).view(self.infos[name].dtype)

    def array(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """The same as an array."""
        found = np.empty(stop - start, self.infos[name].array)
        self.read_into(name, start, found)
        return found

    def read_into(self, name: str, start: int, out: NDArray[Any]) -> None:
        """The same into `out`, contiguous and of the type of `Info.array`: as many elements from `start` on as it
        has."""
        place = self._places[name] + start * out.itemsize
        if not hasattr(os, "preadv"):  # Windows
            out[:] = np.frombuffer(self._map(name), out.dtype, len(out), place)
            return
        file = self.files[name]
        opened = self._opened.get(file) or self._opened.setdefault(file, file.open("rb", buffering=0))
        left = out.view(np.uint8).data
        while len(left):
            count = os.preadv(opened.fileno(), [left], place)
            if not count:
                raise InputError("has become shorter while it was read", where=str(file))
            left, place = left[count:], place + count

    def every(self, name: str, start: int, stop: int, step: int) -> NDArray[Any]:
        """Each `step`-th of the elements `start` to `stop`, (n,), copied out of the file; the others are not read."""
        info = self.infos[name]
        size, start = info.itemsize, min(start, stop)
        stored = np.frombuffer(self._map(name), info.array, stop - start, self._places[name] + start * size)
        found = stored[::step].copy()
        self.release(name, start * size, stop * size)
        return found

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Let the pages of a tensor's bytes `start` to `stop` go; they are read again when they are looked at again.

        Saves resident memory, and nothing where the system has no such advice.
        """
        if not hasattr(mmap, "MADV_DONTNEED") or not self.infos[name].elements:
            return
        end = self.infos[name].bytes if stop is None else stop
        first = -(-(self._places[name] + start) // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (self._places[name] + end) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._map(name).madvise(mmap.MADV_DONTNEED, first, last - first)

    def _map(self, name: str) -> mmap.mmap:
        file = self.files[name]
        if file not in self._mapped:
            with file.open("rb") as opened:  # two threads may map it, and one of the maps stays
                return self._mapped.setdefault(file, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        return self._mapped[file]

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos


def _shards(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return _indexed(folder)
    for name in (SINGLE, ADAPTER):
        if (folder / name).is_file():
            return [folder / name]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    found = f", only {pickles[0]}, which is no safetensors file" if pickles else ""
    raise InputError(f"holds none of {SINGLE}, {INDEX} and {ADAPTER}{found}", where=str(folder))


def _indexed(folder: Path) -> list[Path]:
    """The files that the index names, once they and the tensors in them are known to be there."""
    where = str(folder / INDEX)
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise InputError("has no weight_map from names of tensors to files", where=where)
    files = sorted(set(names.values()))
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise InputError(f"names a file outside its folder ({outside[0]!r})", where=where)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        what = f"names {len(missing)} of {len(files)} files that are not there: {some(missing)}"
        raise InputError(what, where=where, fix="fetch the rest of the checkpoint")
    held = {file: read_header(folder / file).keys() for file in files}
    lost = [name for name, file in names.items() if name not in held[file]]
    if lost:
        what = f"names {len(lost)} tensors that their files do not hold: {some(lost)}"
        raise InputError(what, where=where, fix="fetch index and shards again from one version")
    return [folder / file for file in files]
