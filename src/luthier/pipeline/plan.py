"""`luthier plan`: what a run would do and what it would cost, without reading weights or training.

The rows are read and split in a scratch folder and encoded with the model's tokenizer; the model is built without
weights. So counts of rows, tokens, steps and parameters are exact, memory is an estimate, and time is left open: it
depends on the machine and is measured by the dry run of the environment stage. Of a study, the first cell is planned,
and the section study says how many there are. Where rows are selected by a model, their number is exact and their
length that of others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from luthier.data.prepare import prepare
from luthier.data.rows import Rows
from luthier.data.selection import stand_ins
from luthier.data.store import encode_split
from luthier.findings import Finding
from luthier.models import count, estimate, load_tokenizer, skeleton, verify
from luthier.models.topology import Topology
from luthier.pipeline.labels import plan_rows
from luthier.pipeline.recipe import Recipe, cells, load_recipe
from luthier.pipeline.search_grid import Grid, batch_capped
from luthier.train.span import Span


def plan(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Sections data, model, tune, search, evaluate, deploy, findings; json-able. Raises `InputError` as `run` would.

    With a search, `tune` is its first candidate and `search` has all of them.
    """
    recipe = load_recipe(source, overrides)
    chosen = cells(recipe)
    study = (
        {"cells": len(chosen), "vary": {a: list(ls) for a, ls in recipe.study.vary.items()}} if recipe.study else None
    )
    recipe = chosen[0][1] if chosen else recipe
    facts = verify(recipe.model)
    with tempfile.TemporaryDirectory() as scratch:
        select = recipe.data.select
        spread = partial(stand_ins, select) if select is not None else None
        prepared = prepare(recipe.data, Path(scratch) / "rows", seed=recipe.environment.seed, select=spread)
        base, training, aside = recipe.model, Rows(prepared.files["train"]), Path(scratch) / "encoded"
        encoded: Any
        if recipe.learns_labels:
            base, encoded = plan_rows(recipe, prepared.card, training, aside)
        else:
            limit, context = recipe.data.max_length, base.context
            encoded = encode_split(training, load_tokenizer(base), recipe.data, aside, limit, context=context)
        findings = [*prepared.findings, *encoded.findings]
        if select is not None:
            text = "which rows data.select keeps is known when they are scored; as many others stand in for them here"
            findings.append(Finding(level="info", code="plan.stand_ins", message=text))
        rows, tokens = len(encoded), int(sum(encoded.lengths))
        learned, longest = int(sum(encoded.loss_tokens)), int(max(encoded.lengths, default=0))
        splits = {name: len(Rows(path)) for name, path in prepared.files.items()}
    model = skeleton(base)
    topology = Topology.of(model)
    counts = count(model, topology)
    if recipe.learns_labels:  # no logits of a vocabulary
        counts = replace(counts, vocabulary=0)
    phases: list[dict[str, Any]] = []
    search = recipe.environment.search
    grid = Grid.of(search, recipe.tune[0], rows) if search else None
    findings += grid.findings() if grid else []
    for phase in [grid.candidates[0].phase] if grid else recipe.tune:
        train = phase.train
        span = Span.of(train, max(1, rows))
        if span.rows_per_step < train.effective_batch_size:
            findings.append(batch_capped(train.effective_batch_size, span.rows_per_step, rows))
        goes_on = phase.tuning.continues and phases  # moves what the phase before it did
        moving = phases[-1]["trainable_parameters"] if goes_on else _moving(phase.tuning, topology, model)
        length = max(longest, train.max_tokens_per_device)
        memory = estimate(
            counts,
            rows=1,
            length=length,
            trainable=moving,
            mixed=train.mixed_precision != "no",
            checkpointing=train.gradient_checkpointing,
        )
        phases.append(
            {
                "method": phase.tuning.method,
                "objective": phase.objective.method,
                "steps": span.total,
                "steps_per_epoch": span.steps_per_epoch,
                "rows_per_step": span.rows_per_step,
                "tokens": round(tokens * span.total / span.steps_per_epoch),
                "trainable_parameters": moving,
                "memory_bytes": memory.describe(),
            }
        )
    return {
        "name": recipe.name,
        "data": {"rows": splits, "tokens": tokens, "tokens_with_loss": learned, "longest": longest},
        "model": {k: facts.get(k) for k in ("base", "architecture", "licence")} | {"parameters": counts.parameters},
        "tune": phases,
        "search": grid.describe() if grid else None,
        "evaluate": [{"name": t.name, "method": t.method, "role": t.role} for t in recipe.evaluate.tasks],
        "deploy": {"merge": recipe.deploy.merge},
        "findings": [f.model_dump() for f in findings],
    } | ({"study": study} if study else {})


def _moving(tuning: Any, topology: Topology, model: Any) -> int:
    """How many numbers would move: counted on the model without weights."""
    return tuning.planned(model, topology)
