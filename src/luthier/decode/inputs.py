"""What generation and likelihoods ask of their inputs, refused with one sentence before a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from luthier.data.templates import end_token_ids
from luthier.errors import InputError


def context_length(model: nn.Module) -> int | None:
    """The most tokens `model` can look at, as its config says; None if it sets no limit (relative positions)."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def end_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """All tokens that end an answer, sorted: those of the model's generation config and of the tokenizer, if any."""
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = of_model if isinstance(of_model, list) else [] if of_model is None else [of_model]
    return sorted({*map(int, listed), *(() if tokenizer is None else end_token_ids(tokenizer))})


def check_ids(model: nn.Module, ids: Sequence[Sequence[int]], what: str, *, empty: bool = False) -> None:
    """Refuse an empty list (unless `empty`) and ids that the model has no embedding for; `what` names one of `ids`."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    known = int(embedding.weight.shape[0])
    for number, part in enumerate(ids):
        if not part and not empty:
            raise InputError("it is empty: there is no token to go on from", where=f"{what} {number}")
        if part and not 0 <= min(part) <= max(part) < known:
            raise InputError(
                f"holds the ids {min(part)} to {max(part)}, but the model knows 0 to {known - 1}",
                where=f"{what} {number}",
                fix="use the model's own tokenizer",
            )
