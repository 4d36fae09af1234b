"""Merges made on trial: some of the models, merged, handed to `evaluate`, and let go of again.

What `evaluate` is handed has the form in which the first model of the trial was given:

    a folder or file     a folder with weights, config and tokenizer, written beside `out` and removed after its score
    a module             a copy of it with the merged weights, in evaluation mode
    tensors by name      tensors by name

A single model that is a folder of its own is handed over as it stands, unwritten. At most one trial exists at a time.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.merge.base import Choice, Merge, Score
from luthier.merge.lineup import Lineup, Step
from luthier.merge.run import write_step
from luthier.merge.sources import Source, StoredSource
from luthier.weights.writer import SHARD_BYTES


def settle(
    method: Merge,
    given: Sequence[Any],
    opened: Sequence[Source],
    line_up: Callable[[Merge, Sequence[Source]], Lineup],
    evaluate: Callable[[Any], Score] | None,
    *,
    out: Path | str | None,
    shard_bytes: int = SHARD_BYTES,
) -> Choice:
    """Let a merge search.

    Args:
        given: the models as the caller named them, in the order of `opened`.
        line_up: what makes a lineup of some of the sources.
        out: beside which trials are written; None: in the system's folder for temporary files.

    Raises `InputError` without `evaluate`, or if a score is not a number.
    """
    if evaluate is None:
        raise InputError(
            f"{method.method} with these settings chooses by a score, and no `evaluate` is given",
            fix="give `evaluate`, a callable from a model to its score on validation rows",
        )
    label = [source.label for source in opened]

    def score(trial: Merge, models: Sequence[int]) -> float:
        sources = [opened[k] for k in models]
        whole = _folder_of(sources[0]) if len(models) == 1 else None
        if whole is not None:
            return _number(evaluate(whole), label[models[0]])
        step = Step(trial, line_up(trial, sources))
        said = " + ".join(label[k] for k in models)
        first = given[models[0]]
        if isinstance(first, str | Path):
            parent = Path(out).absolute().parent if out is not None else None
            if parent is not None:
                parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".luthier-trial-", dir=parent) as scratch:
                folder = Path(scratch) / "model"
                write_step(step, folder, began=time.perf_counter(), shard_bytes=shard_bytes)
                return _number(evaluate(folder), said)
        tensors = write_step(step, None, began=time.perf_counter()).tensors
        return _number(evaluate(_module(first, tensors) if isinstance(first, nn.Module) else tensors), said)

    choice = method.search(len(opened), score)
    return Choice(choice.method, choice.models, {"models": label, **choice.log})


def _folder_of(source: Source) -> Path | None:
    """The folder that is this very model; None for adapters, deltas, single files and tensors in memory."""
    return source.folder if isinstance(source, StoredSource) else None


def _module(like: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A copy of `like` with these weights; tied ones come along with the name under which they are stored."""
    made = copy.deepcopy(like)
    with torch.no_grad():
        made.load_state_dict(tensors, strict=False)
    return made.eval()


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"evaluate gave {type(value).__name__} and not a number", where=what) from None
    if math.isnan(number):
        raise InputError("evaluate gave not-a-number, which cannot be compared", where=what)
    return number
