"""Recycling: each new base starts from the tuning of the last one, and is tuned on from there.

    lt.recycle([base_1, base_2, base_3], tune)           base_i + (tuned_{i-1} - base_{i-1}), tuned -> tuned_i

For bases of one architecture in the order of their release (algorithm 1 of Lin et al. 2025): the first is tuned as it
is; every later one starts with what the tuned one before it had over its own base. So a tuning is paid for once and
only refreshed. `mode: direct` takes the difference from a plain tuning of the base before the last, without history.

Bases are folders (then `out` keeps starts and deltas, and `tune` goes from folder to folder), modules, or mappings of
tensors. They stay unchanged: a module is copied before it is tuned.

When not to use it: see `luthier.merge.transfer`; bases far apart in training do not pass anything on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from luthier.errors import InputError
from luthier.merge.run import merge
from luthier.merge.sources import distinct
from luthier.merge.transfer import Transfer
from luthier.weights import Delta, Weights, diff, diff_tensors
from luthier.weights.info import infos_of


@dataclass(frozen=True)
class Round:
    """One base's turn.

    Attributes:
        base: as it was given.
        start: what tuning began with: the base itself, or with the change recycled from the round before.
        tuned: what `tune` returned.
        delta: tuned less base, with what was recycled; None if tuning added rows, so that their shapes differ.
    """

    base: Any
    start: Any
    tuned: Any
    delta: Delta | None


@dataclass(frozen=True)
class Recycled:
    """All rounds in order; `tuned` is the last one's, the product."""

    rounds: tuple[Round, ...]

    @property
    def tuned(self) -> Any:
        return self.rounds[-1].tuned


def recycle(
    bases: Sequence[Any],
    tune: Callable[[Any], Any],
    mode: Literal["iterative", "direct"] = "iterative",
    *,
    scale: float = 1.0,
    out: Path | str | None = None,
) -> Recycled:
    """Tune the last of `bases`, passing on what tuning changed in those before it.

    Args:
        bases: all folders, all modules or all mappings of tensors; in order of release.
        tune: start -> tuned, of the same kind as the bases. Must not write into a folder that it is given.
        mode: iterative passes every tuning on; direct tunes the base before the last plainly and passes that on.
        scale: factor of what is passed on.
        out: new folder for `start-2`, `delta-1`, ...; needed for folders.

    Raises `InputError` for what does not fit together.
    """
    if not bases:
        raise InputError("there is no base", where="bases")
    if mode not in ("iterative", "direct"):
        raise InputError(f"mode is iterative or direct, got {mode!r}", where="mode")
    on_disk = [isinstance(base, str | Path) for base in bases]
    if any(on_disk) and (not all(on_disk) or out is None):
        raise InputError("bases in folders must all be folders, and need a place", fix="give `out`")
    if any(on_disk) and Path(str(out)).exists():
        raise InputError("exists already", where=str(out), fix="choose another place")
    rounds: list[Round] = []
    chosen = list(bases) if mode == "iterative" else list(bases)[-2:]
    for number, base in enumerate(chosen, start=1):
        before = rounds[-1] if rounds else None
        place = Path(out) if out is not None and any(on_disk) else None
        start = _copied(base) if before is None else _passed_on(before, base, scale, place, number)
        tuned = tune(start)
        rounds.append(Round(base, start, tuned, _delta(base, tuned, place, number)))
    return Recycled(tuple(rounds))


def _passed_on(before: Round, base: Any, scale: float, place: Path | None, number: int) -> Any:
    """The base with what the last round changed."""
    method = Transfer(source_base=before.base, scale=scale)
    if place is not None:
        return merge(method, base=base, models=[before.tuned], out=place / f"start-{number}").folder
    tensors = merge(method, base=base, models=[before.tuned]).tensors
    if not isinstance(base, nn.Module):
        return tensors
    started = copy.deepcopy(base)
    started.load_state_dict(tensors, strict=False)  # a tied tensor is there once, and loads into both
    return started


def _delta(base: Any, tuned: Any, place: Path | None, number: int) -> Delta | None:
    if place is not None:
        opened = Weights.open(tuned)
        if opened.adapter:
            fix = "let tune return the folder of a whole model (its merged form)"
            raise InputError(
                "tune returned an adapter, which does not stand on the bare base", where=str(tuned), fix=fix
            )
        same = _shapes(Weights.open(base)) == _shapes(opened)
        return diff(Path(base), Path(tuned), place / f"delta-{number}") if same else None
    ours, theirs = (distinct(state) if isinstance(state, nn.Module) else dict(state) for state in (base, tuned))
    return diff_tensors(ours, theirs) if _shapes(ours) == _shapes(theirs) else None


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in infos_of(tensors).items()}


def _copied(base: Any) -> Any:
    if isinstance(base, Mapping):
        return {name: tensor.clone() for name, tensor in base.items()}
    return copy.deepcopy(base) if isinstance(base, nn.Module) else base
