"""T-Copilot: a model whose probabilities are corrected, at each token, by the Copilot that was trained beside it.

    p'  =  p  +  scale f          p: the Pilot's probabilities;  f: the Copilot's guess at onehot(right token) - p

The Copilot (`luthier.models.copilot`, trained by `train: {copilot: ...}`) has learnt what the Pilot gets wrong. It
reads the prompt's embeddings, the Pilot's states at what was written so far, and the errors before. In training these
were the true ones; here they are its own guesses, since the right tokens are not known. That gap is real: what the
Copilot gained there can be lost here. Choose `scale` on rows held out (the paper tries 0.1 to 1); 0 is the
Pilot itself, and the Copilot is then not even loaded.

p' need not be a distribution. What is not above 0 cannot come; the rest is taken as log max(p', 1e-10) and normalised;
where nothing is above 0, p stands as it is. It is added to probabilities, before temperature, top-k and the like.

The Copilot keeps keys and values of its own: it costs one token of its layers and two products with the vocabulary per
step, whether or not the Pilot has a cache. What it remembers is of this batch's rows in their order, so beams are
refused, and a text cannot be scored in one pass. It may be used with another Pilot of the same vocabulary and width.

When not to use it: with a Pilot that was trained further since; where greedy answers are right already.

Zou et al., NeurIPS 2025 (arXiv 2505.16270). The paper keeps 1e-10 for greedy decoding where p' is not above 0; here it
is out of the question for both. Proof: luthier prove 25.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.decode.base import Decoder, Model, Step, Term, normalised
from luthier.errors import InputError
from luthier.models.copilot import Copilot

LEAST = 1e-10  # probability; what is above 0 has at least so much


class CopilotDecoder(Decoder):
    """A Pilot and its Copilot.

    Attributes:
        base: the Pilot.
        copilot: folder of its Copilot, or the module.
        scale: lambda, how much of the correction is added; the one saved with the Copilot (0.3) if not given.
    """

    method: Literal["copilot"] = "copilot"
    paper: ClassVar[int | None] = 25
    stepwise: ClassVar[bool] = True
    base: Model
    copilot: Model
    scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @cached_property
    def network(self) -> Copilot:
        """The Copilot, loaded once."""
        return self.copilot if isinstance(self.copilot, Copilot) else Copilot.load(self.copilot)

    @property
    def share(self) -> float:
        """The scale that applies."""
        return self.network.config.scale if self.scale is None else self.scale

    def terms(self) -> dict[str, Term]:
        return {"base": Term(self.base, hidden=self.share != 0)}

    def check(self, sizes: Mapping[str, int]) -> None:
        if self.share and self.network.config.vocabulary < sizes["base"]:
            raise InputError(
                f"the Copilot knows {self.network.config.vocabulary} tokens, the Pilot {sizes['base']}",
                where="decoder.copilot",
                fix="take a Copilot that was trained beside a model with this tokenizer",
            )

    def scores(self, step: Step) -> Tensor:
        said = step.logprobs("base")
        if self.share == 0:
            return said
        guess = self.guess(step).to(said.device)[:, : said.shape[1]]
        step.trace["moved"] = guess.abs().sum(-1) * self.share
        return corrected(said, guess, self.share)

    @torch.no_grad()
    def guess(self, step: Step) -> Tensor:
        """(N, vocabulary): f of this token, from the prompt, the Pilot's states and the guesses before."""
        state, network = step.hidden("base").float().mean(1), self.network
        if "copilot" not in step.memory:
            assert step.prompt_states is not None
            prompt, visible = step.prompt_states("base")
            if prompt.shape[-1] != network.config.pilot_width:
                what = f"the Copilot reads states of width {network.config.pilot_width}"
                raise InputError(f"{what}, the Pilot's are {prompt.shape[-1]} wide", where="decoder.copilot")
            network.to(prompt.device)
            step.memory["copilot"] = [network.begin(prompt, visible), None]
        past, before = step.memory["copilot"]
        guess = network.step(before, state, past)
        step.memory["copilot"][1] = guess
        return guess


def corrected(said: Tensor, guess: Tensor, scale: float) -> Tensor:
    """(N, vocabulary) normalised log-probabilities: log of p + scale x guess, -inf where that is not above 0.

    `said` is log p, and stands where nothing is above 0.
    """
    moved = said.exp() + scale * guess
    none = (moved <= 0).all(-1, keepdim=True)
    found = normalised(moved.clamp(min=LEAST).log().masked_fill((moved <= 0) & ~none, -math.inf))
    return torch.where(none, said, found)
