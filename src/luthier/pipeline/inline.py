"""`lt.fit`: the loop on a model that is already in memory, without a recipe or a run folder.

    import luthier as lt
    tuned, records = lt.fit(model, tokenizer, rows, tuning={"method": "lora", "rank": 8})

For notebooks and for tools of your own. It trains and nothing else: no split, no comparison with the base, no report.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.data.settings import DataSettings
from luthier.data.store import encode_split
from luthier.errors import InputError
from luthier.methods import build
from luthier.models.topology import Topology
from luthier.objectives import objective_of
from luthier.train import Loop, StepRecord, TrainSettings
from luthier.train.probing import probe_of
from luthier.tune import Tuned, Tuning


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
        rows: canonical rows (`luthier.data.read_rows` reads them from files): messages, prompt and completion, or text;
            pairs with prompt, chosen and rejected; judged answers with prompt, completion and `desirable` (a boolean).
        tuning, objective: methods as in a recipe: a name, a mapping, or an object; the objective also a weighted list.
        train: settings as in a recipe's `tune.train`.
        directory: for metrics and checkpoints; with it, calling again after an interruption goes on where it stopped.

    Returns the `Tuned` (`tuned.model`, `tuned.save(folder)`, `tuned.merged()`) and a record per step. Raises
    `InputError` if no row carries a label, and for a tuning that does not learn from rows.
    """
    settings = train if isinstance(train, TrainSettings) else TrainSettings.model_validate(dict(train or {}))
    method: Tuning = build("tune", tuning)  # type: ignore[assignment]
    if method.in_sessions:
        raise InputError(f"{method.method} adds classes in sessions, not from rows", fix="use luthier.train.SessionRun")
    named = [{"where": f"row {n}", "id": str(n), **row} for n, row in enumerate(rows, start=1)]
    data = DataSettings.model_validate({"source": "rows.jsonl"})
    with tempfile.TemporaryDirectory() as scratch:
        encoded = encode_split(named, tokenizer, data, Path(scratch))
        bad = [f for f in encoded.findings if f.level == "error"]
        if bad:
            raise InputError(bad[0].message, where="rows")
        torch.manual_seed(seed)
        aim = objective_of(objective)
        probe = probe_of(Topology.of(model), aim, settings, encoded, seed=seed)  # type: ignore[arg-type]
        tuned = method.attach(model, probe)
        loop = Loop(tuned, aim, settings, encoded, directory=directory, seed=seed)  # type: ignore[arg-type]
        records = loop.run()
    return tuned, records
