"""What can stand for a model in a merge: anything from which rows of named tensors can be had.

    StoredSource            a folder or file of weights, or tensors in memory
    (in `derived_sources`)  adapters and deltas on a base, and sources that are others in another shape or order
    (in `lineup`)           the outcome of a merge that has not been written

Tensors are matrices here: the last axis is the columns, a vector is one row, a single number one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from luthier.errors import InputError
from luthier.later import torch
from luthier.merge.base import Rows
from luthier.models.checkpoint import read_json
from luthier.weights.hashing import TensorHash, combined, tensor_hash
from luthier.weights.info import Info, infos_of
from luthier.weights.reader import Weights
from luthier.weights.stored import Stored

if TYPE_CHECKING:
    from torch import Tensor, nn

TILE = 2**18  # elements of a tile, so that the tiles of a few models fit a cache; a longer row is a tile of its own

PIECE = 2**20  # elements that are hashed at a time: many, for each takes a turn at Python's lock


class Source(Protocol):
    """A model, seen as rows of tensors.

    Attributes:
        label: what errors and reports call it.
        infos: type and shape of each tensor.
        folder: where its config and tokenizer are; None if there are none.

    A source whose class sets `concurrent` may have the values of its rows computed on several threads at once.
    """

    label: str
    infos: Mapping[str, Info]
    folder: Path | None

    def rows(self, name: str, start: int, stop: int) -> Rows: ...
    def whole(self, name: str) -> Tensor: ...  # as stored; for tensors that are copied
    def digest(self) -> str: ...


def open_source(given: Any, base: Source | None, label: str | None = None) -> Source:
    """The source that `given` means: a folder or file, a mapping of tensors, a module, or a source already.

    Args:
        base: what an adapter or a delta stands on.

    Raises `InputError` if there is nothing, or an adapter or delta comes without a base.
    """
    if not isinstance(given, str | Path | Weights):
        if isinstance(given, torch.nn.Module):
            given = distinct(given)
        if isinstance(given, Mapping):
            return StoredSource(dict(sorted(given.items())), label or "tensors in memory")
        return given
    path = given.path if isinstance(given, Weights) else Path(given)
    label = label or str(given if not isinstance(given, Weights) else path)
    on_base = (path / "delta.json").is_file() or (path / "adapter_config.json").is_file()
    if on_base and base is None:
        raise InputError("is an adapter or a delta, and no base is given to stand on", where=label, fix="give --base")
    if on_base:
        from luthier.merge.derived_sources import on_its_base

        return on_its_base(base, path, label)  # type: ignore[arg-type]
    weights = given if isinstance(given, Weights) else Weights.open(path)
    return StoredSource(weights, label, path if path.is_dir() else None)


def distinct(model: nn.Module) -> dict[str, Tensor]:
    """The state of a module, a tied tensor once, under its first name."""
    seen: set[tuple[int, int, tuple[int, ...]]] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape)
        if tensor.numel() == 0 or key not in seen:
            found[name] = tensor
            seen.add(key)
    return found


def as_matrix(tensor: Tensor) -> Tensor:
    """(rows, columns) view: the last axis is the columns."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(-1, tensor.shape[-1])


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of `as_matrix`."""
    info = Info("F32", shape)
    columns = (shape[-1] if len(shape) > 1 else info.elements) or 1
    return info.elements // columns, columns


def blocks_of(shape: tuple[int, ...], elements: int = TILE) -> Iterator[tuple[int, int]]:
    """Spans of rows that make tiles of about `elements`; whole rows, at least one."""
    rows, columns = matrix_shape(shape)
    step = max(1, elements // columns)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


class StoredSource:
    """Weights as they are stored."""

    concurrent = True

    def __init__(self, tensors: Mapping[str, Tensor], label: str, folder: Path | None = None):
        self.tensors, self.label, self.folder = tensors, label, folder
        self.infos: Mapping[str, Info] = infos_of(tensors)
        self._digest: str | None = None

    def whole(self, name: str) -> Tensor:
        return self.tensors[name]

    def rows(self, name: str, start: int, stop: int) -> Rows:
        if isinstance(self.tensors, Weights):
            weights, columns = self.tensors, matrix_shape(self.infos[name].shape)[1]
            return Rows(
                lambda: weights.read(name, start * columns, stop * columns).view(-1, columns).float(),
                stored=Stored(weights, name, start * columns, stop * columns),
            )
        part = as_matrix(self.tensors[name].detach())[start:stop]
        return Rows(lambda: part.to("cpu", torch.float32))

    def digest(self) -> str:
        for _ in self.hashing():
            pass
        return self._digest or ""

    def hashing(self) -> Iterator[None]:
        """Find the digest tensor by tensor, for who may want to stop in between; once, since it is a pass over all
        weights and asked for again by each merge on trial."""
        if self._digest is None:
            hashes = {}
            for name in self.tensors:
                hashes[name] = self._hash(name)
                yield
            self._digest = combined(hashes)

    def _hash(self, name: str) -> str:
        if not isinstance(self.tensors, Weights):
            return tensor_hash(self.tensors[name])
        info = self.infos[name]
        found = TensorHash(info)
        for start in range(0, info.elements, PIECE):
            found.update(self.tensors.array(name, start, min(start + PIECE, info.elements)))
        return found.hex()


def config_of(source: Source) -> dict[str, Any]:
    """The `config.json` beside a source; empty if there is none."""
    path = source.folder / "config.json" if source.folder else None
    return read_json(path) if path and path.is_file() else {}
