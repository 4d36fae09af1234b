"""The reference of a preference objective: the frozen model that answers are measured against.

Three places it can come from (`reference` of the objective, see `luthier.objectives.preference`):

    adapter_off  the tuned model itself, its adapter switched off for the pass
    model        a second model, which stands beside the tuned one for the whole phase
    cached       either of these before the first step, or the start itself; then only numbers are kept

Cached numbers lie beside the checkpoints as `reference-<split>.parquet` (`ref_logp_chosen`, `ref_logp_rejected`, one
line per pair) with a hash of the reference's weights and of the encoded pairs. A file that belongs to other weights or
other pairs is an error and is not overwritten.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from luthier.data.views import PairedExamples
from luthier.errors import InputError
from luthier.models.modes import evaluating
from luthier.objectives.base import ReferenceFrom
from luthier.objectives.batch import Batch, narrow, part
from luthier.objectives.preference import answer_logprobs
from luthier.tune.base import Tuned

_COLUMNS = ("ref_logp_chosen", "ref_logp_rejected")


class Reference:
    """Scores answers under the reference.

    Args:
        tuned: what is being tuned, before its first step.
        settings: where the objective says that it comes from.

    Attributes:
        cached: whether it is asked only before the first step.
        weights: a hash of its weights, for the cache; empty where nothing is cached.

    Raises `InputError` if the tuning has no adapter to switch off, or the model at `reference_model` does not load.
    """

    def __init__(self, tuned: Tuned, settings: ReferenceFrom):
        self.cached = settings.source == "cached"
        self._untuned, self._second = tuned.untuned, None
        wanted = settings.source
        if settings.model is not None:
            self._second = _load(settings.model, tuned)
        elif wanted == "adapter_off" and tuned.untuned() is None:
            raise InputError(
                f"tune.method {tuned.settings.method!r} has no adapter to switch off",
                where="objective.reference",
                fix="use reference: model or cached",
            )
        elif wanted == "model" or (wanted == "auto" and tuned.untuned() is None):
            self._second = copy.deepcopy(tuned.base_model)
        if self._second is not None:
            self._second.requires_grad_(False).eval()
        # Now, before a launcher cuts the tuned model into shards.
        self.weights = _hash(tuned.model if self._second is None else self._second) if self.cached else ""

    def logprobs(self, model: nn.Module, batch: Batch) -> Tensor:
        """(sequences,) summed log-probabilities of a batch's answers under the reference, in evaluation mode.

        Args:
            model: the tuned model; for `cached` it must not have taken a step.
        """
        if self._second is not None:
            self._second.to(batch["input_ids"].device)
            with torch.no_grad():
                return answer_logprobs(self._second, batch)
        with torch.no_grad(), evaluating(model), self._untuned() or contextlib.nullcontext():
            return answer_logprobs(model, batch)

    def complete(self, model: nn.Module, batch: dict[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
        """`batch` with `<prefix>reference_logprobs` (sequences,) for each prefix that it lacks."""
        missing = [prefix for prefix in prefixes if f"{prefix}reference_logprobs" not in batch]
        answers = narrow(batch)
        return batch | {f"{p}reference_logprobs": self.logprobs(model, part(answers, p)) for p in missing}


def cache(pairs: PairedExamples, weights: str, path: Path | None, score: Callable[[], np.ndarray], main: bool) -> None:
    """Set `pairs.reference` from the file at `path` if it is there, else from `score()`, which is then kept there.

    Args:
        weights: hash of the reference's weights.
        score: -> (pairs, 2) float64; called by all processes of a launch or by none.
        main: whether this process writes.

    Raises `InputError` if the file belongs to other weights or other pairs.
    """
    import pyarrow as pa
    from pyarrow import parquet

    if path is None:
        pairs.reference = score()
        return
    hashes = {b"weights": weights.encode(), b"pairs": pairs.fingerprint().encode()}
    if path.is_file():
        table = parquet.read_table(path)
        kept = table.schema.metadata or {}
        for name, value in hashes.items():
            if kept.get(name) != value:
                raise InputError(
                    f"the cached log-probabilities belong to other {name.decode()}",
                    where=str(path),
                    fix="delete the file to score the pairs again",
                )
        known = [table.column(name).to_numpy() for name in _COLUMNS]
        pairs.reference = np.stack(known, axis=1)
        return
    pairs.reference = score()
    if main:
        columns = dict(zip(_COLUMNS, pairs.reference.T, strict=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            parquet.write_table(pa.table(columns).replace_schema_metadata(hashes), aside)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def without_dropout(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """While open, nothing in `model` drops out: dropout modules, and rates that attention code reads as a number.

    Args:
        wanted: false leaves all as it is.
    """
    names = {"p": nn.modules.dropout._DropoutNd, "attention_dropout": nn.Module}
    kept: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules() if wanted else ():
        for name, kind in names.items():
            if isinstance(module, kind) and isinstance(getattr(module, name, None), float):
                kept.append((module, name, getattr(module, name)))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in kept:
            setattr(module, name, rate)


def _hash(model: nn.Module) -> str:
    whole = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _load(base: str, tuned: Tuned) -> nn.Module:
    """The model `base`, in the type and on the device of the tuned one."""
    from luthier.models import ModelSettings, load

    model: Any = load(ModelSettings(base=base)).model
    like = next(tuned.base_model.parameters())
    mine, other = tuned.base_model.get_input_embeddings().weight, model.get_input_embeddings().weight  # type: ignore[operator]
    if mine.shape[0] != other.shape[0]:
        raise InputError(
            f"the reference's vocabulary has {other.shape[0]} entries, the tuned model's {mine.shape[0]}",
            where="objective.reference_model",
            fix="take a reference with the same tokenizer",
        )
    return model.to(dtype=like.dtype, device=like.device)
