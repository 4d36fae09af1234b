"""Merges that run the models: load what was named, hand over modules and callables, write what comes back.

A model may be given as a module, as a folder of transformers, or as a PEFT adapter's folder (with its base). The
outcome is written as the model itself does it (`save_pretrained`), or for a plain module as safetensors, with
`merge.json` beside it and what else the method wants to keep.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.merge.base import Data, Score, WholeMerged, WholeModelMerge
from luthier.merge.run import MergeResult
from luthier.merge.sources import distinct
from luthier.models.files import write_aside
from luthier.weights import content_hash
from luthier.weights.writer import copy_others


def merge_modules(
    method: WholeModelMerge,
    models: Sequence[Any],
    base: Any,
    out: Path | str | None,
    *,
    data: Data | None,
    loss: Callable[..., Tensor] | None,
    evaluate: Callable[[Any], Score] | None,
) -> MergeResult:
    """Run `method`; see `luthier.merge.run.merge` for the arguments."""
    began = time.perf_counter()
    least, most = method.models_allowed
    if len(models) < least or (most is not None and len(models) > most):
        wanted = str(least) if most == least else f"{least} or more" if most is None else f"{least} to {most}"
        raise InputError(f"{method.method} takes {wanted} models, got {len(models)}", where="models")
    if method.needs_base and base is None:
        raise InputError(f"{method.method} needs a base, and none is given", fix="give --base")
    if method.needs_data and data is None:
        raise InputError(f"{method.method} looks at data, and none is given", fix="give --data, or `data=` in Python")
    modules = [as_module(model, base) for model in models]
    frame = as_module(base, None) if base is not None else None
    training = [(module, module.training) for module in [*modules, *([frame] if frame is not None else [])]]
    for module, _ in training:
        module.eval()
    try:
        merged = method.combine(modules, base=frame, data=data, loss=loss, evaluate=evaluate)
    finally:
        for module, was in training:
            module.train(was)
    report = {
        "method": method.model_dump(mode="json"),
        "base": _told(base, frame) if frame is not None else None,
        "models": [_told(model, module) for model, module in zip(models, modules, strict=True)],
        "seconds": time.perf_counter() - began,
    } | merged.report
    if out is not None:
        folder = next((Path(m) for m in (*models, base) if isinstance(m, str | Path) and Path(m).is_dir()), None)
        with write_aside(Path(out)) as aside:
            write_model(merged, aside, folder)
            (aside / "merge.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return MergeResult(Path(out) if out is not None else None, {}, report, [], merged.model)


def write_model(merged: WholeMerged, folder: Path, like: Path | None) -> None:
    """The model and its other tensors into `folder`; config and tokenizer from `like` where the model has none."""
    if like is not None:
        copy_others(like, folder)
    save = getattr(merged.model, "save_pretrained", None)
    if save is not None:
        save(folder, safe_serialization=True)
    else:
        save_file({n: t.contiguous() for n, t in distinct(merged.model).items()}, folder / "model.safetensors")
    for name, kept in merged.files.items():
        if callable(kept):
            kept(folder / name)
        else:
            save_file({n: t.contiguous() for n, t in kept.items()}, folder / name)
    for name, record in merged.records.items():
        (folder / name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def as_module(given: Any, base: Any) -> nn.Module:
    """A module, from itself or from a folder; an adapter's folder on its base, as a PEFT model."""
    if isinstance(given, nn.Module):
        return given
    if not isinstance(given, str | Path):
        raise InputError(f"expected a module or a folder, got {type(given).__name__}", where="models")
    from luthier.models import ModelSettings, load

    if (Path(given) / "adapter_config.json").is_file():
        if base is None:
            raise InputError("is an adapter, and no base is given to stand on", where=str(given), fix="give --base")
        from peft import PeftModel

        on = load(ModelSettings(base=str(base))).model if not isinstance(base, nn.Module) else base
        with torch.no_grad():
            return PeftModel.from_pretrained(on, str(given))  # type: ignore[arg-type]
    return load(ModelSettings(base=str(given))).model


def _told(given: Any, module: nn.Module) -> dict[str, str]:
    name = str(given) if isinstance(given, str | Path) else type(module).__name__
    return {"name": name, "hash": content_hash(distinct(module))}
