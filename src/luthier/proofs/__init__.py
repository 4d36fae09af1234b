"""One small experiment per paper that shows its main claim, or honestly shows that it does not hold at this size.

A proof is a module `pNN_slug` of this room with one `PROOF`. `luthier prove lisa` runs it for its seeds, prints each
claim with its figure, its bound and a verdict, and writes everything down. Claims that fail are recorded as failing.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import TYPE_CHECKING

from luthier.errors import InputError, did_you_mean
from luthier.methods import catalogue

if TYPE_CHECKING:
    from luthier.proofs.base import Proof

_MODULE = re.compile(r"p(\d\d)_\w+")


def numbers() -> dict[int, str]:
    """Paper numbers that have a proof, and its module; nothing is imported for this."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return {int(match[1]): f"{__name__}.{match[0]}" for name in sorted(names) if (match := _MODULE.fullmatch(name))}


def find(name: str) -> Proof:
    """The proof of a paper, by number or by its name in the catalogue."""
    here = numbers()
    papers = {paper.name: paper.number for paper in catalogue() if paper.number in here}
    number = int(name) if name.isdigit() else papers.get(name)
    if number not in here:
        raise InputError(f"there is no proof of {name!r}", fix=did_you_mean(name, papers))
    return importlib.import_module(here[number]).PROOF
