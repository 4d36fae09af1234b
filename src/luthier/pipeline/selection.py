"""Scorers for `data.select`: the model that a selection names is loaded when the first row is to be scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from luthier.data.selection import Row, Scored, Scorer, SelectionContext
from luthier.decode import answer_scorer
from luthier.errors import InputError
from luthier.models import ModelSettings, check, load
from luthier.pipeline.progress import scoring_progress
from luthier.pipeline.stage import Context


def selection_context(context: Context) -> SelectionContext:
    """What a selection of this run may ask for."""
    seed = context.recipe.environment.seed

    def scorer(name: str | None) -> Scorer:
        def score(rows: Iterable[Row]) -> Iterator[Scored]:
            settings = context.recipe.model if name is None else ModelSettings(base=name)
            loaded = load(settings, seed=seed)
            if loaded.kind != "causal-lm":
                raise InputError(
                    f"a model of kind {loaded.kind} gives no probabilities of answers",
                    where="data.select.model",
                    fix="name a causal language model",
                )
            if errors := [finding for finding in check(loaded) if finding.level == "error"]:
                raise InputError(errors[0].message, where="data.select.model")
            wanted = torch.cuda.is_available() and context.recipe.environment.device != "cpu"
            model = loaded.model.to(torch.device("cuda" if wanted else "cpu"))
            with scoring_progress(context.progress, "select") as done:
                yield from answer_scorer(model, loaded.tokenizer, context.recipe.data, progress=done)(rows)

        return score

    return SelectionContext(scorer, seed)
