"""EFT: emulate a tuning of one model by what tuning did to another (up-scaling, where the other is smaller).

    log p(y | x, y before)  =  log base  +  weight (log tuned - log tuned_base)  -  log Z

A tuning can be read as a reward, log tuned - log tuned_base; adding it to another base is that base with this tuning,
token by token. With a large base and a small pair it joins the knowledge of the one to the manners of the other,
without training anything large. weight 1 is the paper's; more amplifies, less than 0 reverses; `tuned_base` left out is
`base` itself, so that weight 1 is the tuned model and 2 exaggerates what tuning did.

`tuned` may be several models with a weight each, which share `tuned_base`: two behaviours, traded at decoding.

`top_p_filter` (conservative decoding): base / tuned_base is not to be relied on for tokens that the tuned model finds
unlikely. Outside the smallest set of tokens that reaches this mass under `tuned`, the score is log tuned alone; no
token is removed. `speculative` = g: the small tuned model writes g tokens ahead and the large one checks them at once;
what is drawn follows the very same distribution (`luthier.decode.speculative`).

What tuning made the small model forget is carried over too: take weight < 1 there. The sum is normalised per token, not
per text, so it is not the exact optimum of the reward.

When not to use it: for models of different vocabularies; where the large model can be tuned itself.

Mitchell et al., ICLR 2024 (arXiv 2310.12962). Several weights, weights below 0 and the filter's form with weights
other than 1 are ours or public code's. Proof: luthier prove 15.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from luthier.decode.base import Decoder, Model, Step, Term, finite_weights, mixed, normalised, total


class Eft(Decoder):
    """Emulated fine-tuning.

    Attributes:
        base: the model that shall behave as if it were tuned.
        tuned: a tuned model of any size, or several.
        tuned_base: what the tuned ones were before; `base` itself if not given.
        weight: of the difference that tuning made; one for each of `tuned` if they are several.
        top_p_filter: mass under `tuned` within which `base` has a say; all tokens if not given.
        speculative: tokens that `tuned` writes ahead; 0 is off.
    """

    method: Literal["eft"] = "eft"
    paper: ClassVar[int | None] = 15
    base: Model
    tuned: Model | tuple[Model, ...]
    tuned_base: Model = None
    weight: float | tuple[float, ...] = 1.0
    top_p_filter: float | None = Field(default=None, gt=0, le=1)
    speculative: int = Field(default=0, ge=0, le=64)

    @field_validator("tuned", mode="before")
    @classmethod
    def _list_is_several(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fits(self) -> Eft:
        several = len(self._all)
        weights = self.weight if isinstance(self.weight, tuple) else (self.weight,) * several
        if len(weights) != several:
            raise ValueError(f"weight has {len(weights)} numbers for {several} tuned models")
        finite_weights([*self._all], weights)
        if several > 1 and (self.top_p_filter is not None or self.speculative):
            raise ValueError("top_p_filter and speculative are for one tuned model")
        return self

    @property
    def _all(self) -> dict[str, Model]:
        if not isinstance(self.tuned, tuple):
            return {"tuned": self.tuned}
        return {f"tuned_{number}": model for number, model in enumerate(self.tuned, start=1)}

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term."""
        each = self.weight if isinstance(self.weight, tuple) else (self.weight,) * len(self._all)
        reference = "base" if self.tuned_base is None else "tuned_base"
        found = dict(zip(self._all, each, strict=True)) | {"base": 1.0}
        found[reference] = found.get(reference, 0.0) - sum(each)
        return found

    def terms(self) -> dict[str, Term]:
        reference = "base" if self.tuned_base is None else "tuned_base"
        tuned = {name: Term(model, on=reference) for name, model in self._all.items()}
        apart = {} if self.tuned_base is None else {"tuned_base": Term(self.tuned_base)}
        return {"base": Term(self.base), **apart, **tuned}

    def scores(self, step: Step) -> Tensor:
        if self.top_p_filter is None or self.top_p_filter == 1:
            return mixed(step, self.weights)
        tuned = step.logprobs("tuned")
        return normalised(torch.where(nucleus(tuned, self.top_p_filter), total(step, self.weights), tuned))

    @property
    def draft(self) -> tuple[str, int] | None:
        return ("tuned", self.speculative) if self.speculative else None


def nucleus(logprobs: Tensor, mass: float) -> Tensor:
    """(N, vocabulary) bool: the most probable tokens, up to and with the one at which their sum reaches `mass`."""
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    return torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, order, before < mass)
