"""The importance of units as a score: told from the run's own rows, or read from files; and those files.

A file is safetensors with one tensor (blocks, units) per kind, normalised; NaN where a block has none, or fewer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from luthier.errors import InputError
from luthier.tune.selector.importance import Importance, combined, normalised, unit_importance
from luthier.tune.selector.slots import View
from luthier.tune.selector.units import KINDS, BlockUnits, units_of

FORMAT = "luthier unit importance"


@dataclass(frozen=True)
class ByImportance:
    """Of the untuned model's units, from files or from the run's own rows."""

    source: str | tuple[str, ...] = "auto"
    batches: int | None = None
    dropout: float = 0.003
    kl_scale: float = 0.1
    absolute: bool = True

    def of(self, view: View, kinds: Sequence[str]) -> Importance:
        """Normalised; from several files the largest of each unit."""
        if self.source != "auto":
            blocks = units_of(view.model, view.topology)
            paths = (self.source,) if isinstance(self.source, str) else self.source
            return combined([load_importance(path, blocks) for path in paths])
        if view.probe.batches is None:
            raise InputError(
                "the importance of units is told from the run's own rows, and there are none to look at here",
                where="tune.importance",
                fix="name a file of importance, set soft_mask: [], or hand `batches` to Probe",
            )
        found = unit_importance(
            view.model,
            islice(view.probe.batches(), self.batches),
            kinds,
            topology=view.topology,
            dropout=self.dropout,
            kl_scale=self.kl_scale,
            absolute=self.absolute,
            seed=view.probe.seed,
        )
        return normalised(found)

    def __str__(self) -> str:
        return "unit importance"


def stacked(importance: Importance, blocks: int) -> dict[str, Tensor]:
    """By kind (blocks, units) float32; NaN where a block has none or fewer."""
    kinds = sorted({kind for of in importance.values() for kind in of})
    found = {}
    for kind in kinds:
        most = max(of[kind].numel() for of in importance.values() if kind in of)
        found[kind] = torch.full((blocks, most), float("nan"))
        for block, of in importance.items():
            if kind in of:
                found[kind][block, : of[kind].numel()] = of[kind]
    return found


def unstacked(tensors: Mapping[str, Tensor]) -> Importance:
    """What `stacked` was given."""
    found: Importance = {}
    for kind, rows in tensors.items():
        for block, row in enumerate(rows.float().cpu()):
            values = row[~row.isnan()]
            if values.numel():
                found.setdefault(block, {})[kind] = values
    return found


def save_importance(importance: Importance, blocks: int, path: Path | str) -> None:
    """Write a normalised set as a safetensors file, one tensor (blocks, units) per kind: whole or not there."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(stacked(importance, blocks), aside, metadata={"format": FORMAT})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load_importance(path: Path | str, blocks: Sequence[BlockUnits]) -> Importance:
    """The normalised set that `save_importance` wrote, if it is of a model with these blocks; else `InputError` names
    the difference."""
    path = Path(path)
    if not path.is_file():
        raise InputError("there is no such file of unit importance", where=str(path))
    try:
        with safe_open(path, framework="pt") as file:
            about: Mapping[str, Any] = file.metadata() or {}
            tensors = {kind: file.get_tensor(kind) for kind in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise InputError(f"is no whole safetensors file ({error})", where=str(path)) from None
    if about.get("format") != FORMAT or not tensors.keys() <= set(KINDS) or any(t.ndim != 2 for t in tensors.values()):
        raise InputError("is a safetensors file but holds no importance of units", where=str(path))
    for tensor in tensors.values():
        if len(tensor) != len(blocks):
            raise InputError(
                f"is of another model: it has {len(tensor)} layers, this model has {len(blocks)}", where=str(path)
            )
    found = unstacked(tensors)
    for units in blocks:
        for kind, values in found.get(units.block.index, {}).items():
            if values.numel() != units.counts.get(kind, 0):
                raise InputError(
                    f"is of another model: layer {units.block.index} has {values.numel()} units of the kind {kind!r} "
                    f"there and {units.counts.get(kind, 0)} here",
                    where=str(path),
                )
            if not bool(((values >= 0) & (values <= 1)).all()):
                raise InputError("holds numbers that are not between 0 and 1", where=str(path), fix="normalise them")
    return found
