"""One model as a decoder: its own next-token distribution. For the command line, and to compare mixtures with."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from luthier.decode.base import Decoder, Model, Step, Term


class Single(Decoder):
    """One model.

    Attributes:
        base: the model.
    """

    method: Literal["single"] = "single"
    paper: ClassVar[int | None] = None
    base: Model

    def terms(self) -> dict[str, Term]:
        return {"base": Term(self.base)}

    def scores(self, step: Step) -> Tensor:
        return step.logprobs("base")
