"""The release of a classifier: a folder that loads with one call, and the proof that it predicts what was evaluated.

    release/    model, adapter or ensemble, tokenizer or image processor, serve.yaml, README.md (the card), SHA256SUMS

What `luthier.pipeline.release` does for language models. There is nothing to generate here: probes are rows, and what
must come back from disk are the logits of their classes and the classes' names.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor

from luthier.data.collate import label_batch
from luthier.data.labelled import Reader
from luthier.errors import InputError
from luthier.findings import Finding
from luthier.models import Loaded
from luthier.models.files import sums_hold, write_sums
from luthier.models.loading import loader
from luthier.models.modes import evaluating
from luthier.models.quiet import first_line, quiet
from luthier.pipeline.card import empty_sections
from luthier.pipeline.labels import load_ensemble
from luthier.pipeline.release import LIMIT, save_adapter

Rows = Sequence[Mapping[str, Any]]


def write_label_release(
    model: Any,
    processor: Any,
    directory: Path,
    *,
    kind: Literal["model", "adapter", "levi"],
    model_kind: str,
    tuned: Path,
    card: str,
    serve: Mapping[str, Any],
) -> dict[str, Any]:
    """Write a release of a classifier into `directory`, which is empty or does not exist yet; returns serve.yaml.

    Args:
        model: of transformers (kind model), a `PeftModel` (kind adapter) or an ensemble; its config names the labels.
        processor: tokenizer or image processor; None for a model that has neither.
        model_kind: `sequence-classifier` or `image-classifier`.
        tuned: the folder of the tune stage's outcome, from which an ensemble is copied.
        serve: `base` (required for an adapter) and whatever else serve.yaml is to say.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with quiet():
        if kind == "adapter":
            save_adapter(model, directory, str(serve["base"]))
        elif kind == "levi":
            shutil.copytree(tuned, directory, dirs_exist_ok=True)
        else:
            model.save_pretrained(directory, safe_serialization=True)
        if processor is not None:
            processor.save_pretrained(directory)
    labels = {int(number): str(name) for number, name in model.config.id2label.items()}
    record = {
        "kind": kind,
        "model_kind": model_kind,
        "adapter": "." if kind == "adapter" else None,
        "labels": labels,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    } | dict(serve)
    (directory / "README.md").write_text(card, encoding="utf-8")
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
    (directory / "serve.yaml").write_text(text, encoding="utf-8")
    write_sums(directory)
    return record


def prove_label_release(
    directory: Path,
    *,
    serve: Mapping[str, Any],
    load_base: Callable[[], Loaded] | None,
    reference: Sequence[Tensor],
    rows: Rows,
    limit: float = LIMIT,
) -> tuple[dict[str, Any], list[Finding]]:
    """Load `directory` from disk and compare it with what was in memory.

    Args:
        serve: as `write_label_release` returned it.
        load_base: gives a fresh base with a head for the same labels, around which an adapter or ensemble is read; not
            needed for a whole model.
        reference: `row_logits` of the model that was evaluated, for each of `rows`.

    Returns facts (`logits_max_difference`, `probes`, `labels`, `bytes`, `latency_ms` {p50, p95} of one row, None
    without rows) and the findings. Raises `InputError` if it cannot be loaded.
    """
    found: list[Finding] = []
    if not sums_hold(directory):
        found.append(_error("deploy.files", "the files of the release are not those that SHA256SUMS lists"))
    try:
        model, processor = _reload(directory, serve, load_base)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the release cannot be loaded ({first_line(error)})", where=str(directory)) from error
    logits, seconds = row_logits(model, processor, rows)
    same = all(a.shape == b.shape for a, b in zip(reference, logits, strict=True))
    pairs = zip(reference, logits, strict=True)
    difference = max((float((a - b).abs().max()) for a, b in pairs), default=None) if same else float("inf")
    if difference is not None and not difference <= limit:
        text = f"the release computes other logits than the model that was evaluated (difference {difference:.3g})"
        found.append(_error("deploy.logits", text, difference, limit))
    names = {int(number): str(name) for number, name in model.config.id2label.items()}
    if names != dict(serve["labels"]):
        found.append(_error("deploy.labels", "the release calls its labels other names than the run", names))
    if empty := empty_sections((directory / "README.md").read_text(encoding="utf-8")):
        found.append(_error("deploy.card", f"the card says nothing under {', '.join(empty)}", empty))
    times = (1000 * float(x) for x in np.quantile(seconds, [0.5, 0.95])) if seconds else None
    return {
        "logits_max_difference": difference,
        "probes": len(rows),
        "labels": len(names),
        "bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        "latency_ms": dict(zip(("p50", "p95"), times, strict=True)) if times else None,
    }, found


def row_logits(model: Any, processor: Any, rows: Rows) -> tuple[list[Tensor], list[float]]:
    """(classes,) float32 logits on the CPU of each row alone, and the seconds each took, reading it included."""
    if not rows:
        return [], []
    reader = Reader.of(rows, processor, model.config)
    name = "pixel_values" if reader.pictures else "input_ids"
    limits = (getattr(model.config, "max_position_embeddings", None), reader.longest)
    longest = min((n for n in limits if n is not None), default=None)
    device = next(model.parameters()).device
    done, seconds = [], []
    with evaluating(model), torch.no_grad():
        for row in rows:
            began = time.perf_counter()
            example: Any = {name: reader.inputs([row], longest)[0], "label": 0}
            batch = label_batch([example], getattr(model.config, "pad_token_id", None))
            inputs = {key: tensor.to(device) for key, tensor in batch.items() if key != "labels"}
            done.append(model(**inputs).logits[0].float().cpu())
            seconds.append(time.perf_counter() - began)
    return done, seconds


def _reload(directory: Path, serve: Mapping[str, Any], load_base: Callable[[], Loaded] | None) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoTokenizer

    with quiet():
        processor: Any = None
        if (directory / "preprocessor_config.json").is_file():
            processor = AutoImageProcessor.from_pretrained(directory, local_files_only=True)
        elif (directory / "tokenizer_config.json").is_file():
            processor = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        if serve["kind"] == "model":
            kind = loader(str(serve["model_kind"]))
            model = kind.from_pretrained(directory, dtype="auto", local_files_only=True, use_safetensors=True)
            return model.eval(), processor
        if load_base is None:
            raise InputError("what stands beside a base needs the base to be loaded", where=str(directory))
        base = load_base()
        if serve["kind"] == "levi":
            return load_ensemble(directory, base), processor
        from peft import PeftModel

        return PeftModel.from_pretrained(base.model, str(directory)).eval(), processor


def _error(code: str, text: str, value: Any = None, limit: Any = None) -> Finding:
    return Finding(level="error", code=code, message=text, value=value, limit=limit)
