"""What merges that run models share: going over data again and again, the loss of a batch, the score of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.merge.base import Score


def again(data: Any, method: str, where: str = "data") -> Iterable[Any]:
    """Batches that can be gone through more than once; `InputError` for none, an iterator, or a mapping of sets."""
    if data is None:
        raise InputError(f"{method} looks at data, and none is given", where=where, fix="give --data, or `data=`")
    if isinstance(data, Iterator):
        what = f"{method} goes over the data more than once, and an iterator is used up after the first time"
        raise InputError(what, where=where, fix="give a list or a loader")
    if isinstance(data, Mapping):
        raise InputError(f"{method} takes one set of batches here, got a mapping", where=where)
    return data


def loss_of(loss: Callable[[nn.Module, Any], Tensor] | None, model: nn.Module, batch: Any) -> Tensor:
    """The mean loss of a batch, a number with gradient: by `loss`, else the model's own from the batch's labels.

    Raises `InputError` if there is neither, or it is not finite. Never tells what is in the batch.
    """
    if loss is not None:
        value = loss(model, batch)
    else:
        found = model(**batch).loss if isinstance(batch, Mapping) and "labels" in batch else None
        if found is None:
            raise InputError("no loss is given, and the batches have no labels for the model's own", where="loss")
        value = found
    if not bool(torch.isfinite(value.detach())):
        raise InputError("the loss of a batch is infinite or not a number", where="loss")
    return value


@torch.no_grad()
def mean_loss(loss: Callable[[nn.Module, Any], Tensor] | None, model: nn.Module, batches: Iterable[Any]) -> float:
    """The mean over batches of their losses; `InputError` if there are none."""
    values = [float(loss_of(loss, model, batch)) for batch in batches]
    if not values:
        raise InputError("there are no batches", where="data")
    return sum(values) / len(values)


def scored(answer: Score) -> tuple[float, dict[str, float]]:
    """The score that decides, and all figures by name, of what an evaluation said."""
    if isinstance(answer, Mapping):
        if "score" not in answer:
            raise InputError(f"has the figures {', '.join(answer)} and no `score`", where="evaluate")
        return float(answer["score"]), {name: float(value) for name, value in answer.items()}
    return float(answer), {"score": float(answer)}
