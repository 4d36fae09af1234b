"""Whether models can be mixed token by token: the same tokens at the same numbers, by their text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.errors import InputError

if TYPE_CHECKING:
    from luthier.decode.mixture import Opened


def shared_vocabulary(opened: Mapping[str, Opened]) -> int:
    """How many tokens the terms share: up to the tokenizer's last one; rows of embeddings behind it are padding.

    Raises `InputError` that names tokens, if two terms give one id different texts, or a text different ids.
    """
    rows = {name: _rows(one.model) for name, one in opened.items()}
    lead, *others = opened
    ours = _texts(opened[lead].tokenizer)
    for name in others:
        theirs = _texts(opened[name].tokenizer)
        if ours is None or theirs is None:
            if ours is theirs and rows[name] != rows[lead]:
                what = (
                    f"{name} has {rows[name]} tokens, {lead} has {rows[lead]}, and there are no tokenizers to compare"
                )
                raise InputError(what, where=name, fix="give the tokenizers")
            continue
        odd = sorted(text for text in ours.keys() | theirs.keys() if ours.get(text) != theirs.get(text))
        if odd:
            some = ", ".join(f"{t!r} ({_number(ours.get(t))} and {_number(theirs.get(t))})" for t in odd[:4])
            raise InputError(
                f"{len(odd)} tokens are not the same in {lead} and {name}: {some}{', ...' if len(odd) > 4 else ''}",
                where=name,
                fix="mix models of one vocabulary",
            )
    known = [max(texts.values()) + 1 for one in opened.values() if (texts := _texts(one.tokenizer))]
    return min([*rows.values(), *known])


def _number(token: int | None) -> str:
    return "none" if token is None else str(token)


def _texts(tokenizer: Any) -> dict[str, int] | None:
    return dict(tokenizer.get_vocab()) if tokenizer is not None else None


def _rows(model: Any) -> int:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    weight = model.get_input_embeddings().weight if weight is None else weight
    return int(weight.shape[0])
