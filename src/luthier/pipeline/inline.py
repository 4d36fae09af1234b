"""`lt.fit`: the loop on a model that is already in memory, without a recipe or a run folder.

    import luthier as lt
    tuned, records = lt.fit(model, tokenizer, rows, tuning={"method": "lora", "rank": 8})

For notebooks and for tools of your own. It trains and nothing else: no split, no comparison with the base, no report.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from luthier.data.encode import Row
from luthier.data.labelled import Reader, classes_of, encode_labelled
from luthier.data.pictures import picture_text
from luthier.data.settings import DataSettings
from luthier.data.store import encode_split
from luthier.data.views import Examples
from luthier.errors import InputError
from luthier.methods import build
from luthier.models.labels import label_numbers, name_labels
from luthier.models.tokens import align_tokenizer
from luthier.models.topology import Topology
from luthier.objectives import Objective, objective_of
from luthier.train import Loop, StepRecord, TrainSettings
from luthier.train.probing import probe_of
from luthier.tune import Tuned, Tuning
from luthier.tune.base import refuse_labels

_DATA = DataSettings.model_validate({"source": "rows.jsonl"})


def fit(
    model: nn.Module,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    tuning: Any = "lora",
    objective: Any = "sft",
    train: Mapping[str, Any] | TrainSettings | None = None,
    *,
    directory: Path | None = None,
    seed: int = 0,
) -> tuple[Tuned, list[StepRecord]]:
    """Train `model` (changed in place) on `rows`.

    Args:
        tokenizer: the model's; its image processor where rows hold pictures (None: pixels are only scaled to 0 to 1,
            and every picture must have the model's size).
        rows: canonical rows (`luthier.data.read_rows` reads them from files): messages, prompt and completion, or text;
            pairs with prompt, chosen and rejected; judged answers with prompt, completion and `desirable` (a boolean);
            for `classification` text or image (a path, an array of 0 to 255, a picture of Pillow) with its class as
            `label`.
        tuning, objective: methods as in a recipe: a name, a mapping, or an object; the objective also a weighted list.
        train: settings as in a recipe's `tune.train`.
        directory: for metrics and checkpoints; with it, calling again after an interruption goes on where it stopped.

    Returns the `Tuned` (`tuned.model`, `tuned.save(folder)`, `tuned.merged()`) and a record per step. Raises
    `InputError` if no row carries a label, and for a tuning that does not learn from rows. The head of a classifier
    must have as many labels as the rows have classes; labels that had no name get the classes' (`config.id2label`).
    """
    settings = train if isinstance(train, TrainSettings) else TrainSettings.model_validate(dict(train or {}))
    method: Tuning = build("tune", tuning)  # type: ignore[assignment]
    if method.in_sessions:
        raise InputError(f"{method.method} adds classes in sessions, not from rows", fix="use luthier.train.SessionRun")
    named = [{"where": f"row {n}", "id": str(n), **row} for n, row in enumerate(rows, start=1)]
    aim: Objective = objective_of(objective)
    refuse_labels(method, aim)
    encode = encode_classes if aim.learns_labels else encode_tokens
    with tempfile.TemporaryDirectory() as scratch:
        encoded, names, pad = encode(model, method, tokenizer, named, Path(scratch))
        torch.manual_seed(seed)
        probe = probe_of(Topology.of(model), aim, settings, encoded, seed=seed, pad_id=pad)
        tuned = method.attach(model, probe)
        if names and method.predicts == "labels":
            name_labels(tuned.model, names)
        loop = Loop(tuned, aim, settings, encoded, directory=directory, seed=seed, pad_id=pad)
        records = loop.run()
    return tuned, records


def encode_tokens(
    model: nn.Module, method: Tuning, tokenizer: Any, rows: Sequence[Row], scratch: Path
) -> tuple[Examples, list[str], int]:
    """Rows as tokens with loss marks; no classes; the id that fills rows up."""
    encoded = encode_split(rows, tokenizer, _DATA, scratch)
    bad = [f for f in encoded.findings if f.level == "error"]
    if bad:
        raise InputError(bad[0].message, where="rows")
    return encoded, [], 0


def encode_classes(
    model: Any, method: Tuning, processor: Any, rows: Sequence[Row], scratch: Path
) -> tuple[Examples, list[str], int]:
    """Rows as inputs with the numbers of their classes; the classes in their order; the id that fills rows up."""
    plain = [_plain(row) for row in rows]
    classes = classes_of(plain)
    if method.predicts == "labels":
        numbers: dict[str, int] | None = {name: number for number, name in enumerate(classes)}
    else:
        numbers = label_numbers(model, classes)
    if numbers is None:
        raise InputError(
            f"the rows have {len(classes)} classes ({', '.join(classes[:6])}), and the model's head is one for "
            f"{', '.join(list(model.config.label2id)[:6])}",
            where="rows",
            fix=f"load it with num_labels={len(classes)} and ignore_mismatched_sizes=True, which makes a new head",
        )
    reader = Reader.of(plain, processor, model.config)
    pad = 0 if reader.pictures else align_tokenizer(processor, model)["pad"]["id"]
    if pad is None:
        raise InputError("the tokenizer has no token that could fill rows up", fix="set tokenizer.pad_token")
    context = getattr(model.config, "max_position_embeddings", None)
    return encode_labelled(plain, reader, numbers, _DATA, scratch, context=context), classes, pad


def _plain(row: Row) -> Row:
    """A row whose picture and label are as `luthier.data.read_rows` gives them."""
    made, label = dict(row), row.get("label")
    if isinstance(label, np.integer):
        made["label"] = int(label)
    if "image" in row:
        made["image"] = picture_text(row["image"], str(row["where"]))
    return made
