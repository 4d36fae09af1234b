"""What an encoded example is to its row: something to imitate, a side of a pair, an answer with a
verdict, or something with a class.

A row alone knows this, and tokens do not tell it any more; so it is kept beside them, a small number for each example
(`luthier.data.store.Encodings.role`). `luthier.data.views` reads it to give each objective the examples that it learns
from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLAIN, CHOSEN, REJECTED, DESIRABLE, UNDESIRABLE, LABELLED = range(6)

GOOD = (PLAIN, CHOSEN, DESIRABLE)  # roles of examples that are fit to be imitated


def roles_of(row: Mapping[str, Any], examples: int) -> list[int]:
    """The role of each of a canonical row's `examples`, in the order in which they were encoded."""
    if "chosen" in row:
        return [CHOSEN, REJECTED][:examples]
    if "desirable" in row:
        return [DESIRABLE if row["desirable"] else UNDESIRABLE] * examples
    return [PLAIN] * examples


def is_judged(row: Mapping[str, Any]) -> bool:
    """Whether the answers of a canonical row are compared or judged, and not simply to be imitated."""
    return "chosen" in row or "desirable" in row
