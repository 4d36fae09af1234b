"""CGE: let two models write what one of them learned in tuning, without seeing the data of the tuning.

    d_t(v)   =  log tuned(v | before)  -  gamma log base(v | before)                    the contrast of token v
    V_t      =  {v : tuned(v | before) >= alpha max_u tuned(u | before)}                the plausible set
    form ratio   p(v) ~ exp d_t(v)                                inside V_t, 0 outside
    form boost   p(v) ~ tuned(v | before) exp(weight d_t(v))      inside V_t, 0 outside

Plain samples of a tuned model mostly show what any text looks like. Here the base takes out what it knew before, and
what is left is what the tuning data held beside it: a language, a code base, toxic text. Texts start from the
begin-of-text token or a prompt; sample at temperature 1 without top-p and top-k.

V_t is judged by the tuned model alone, before any temperature; without it the ratio favours junk that both models find
impossible. The sampler's `min_p` looks at the mixed scores and is another rule. A novelty whose FIRST token has less
than alpha times the probability of the likeliest first token is never begun: lower alpha, or give a prompt.

Both models read the same ids. `contrastive_score` is the same contrast for texts that are at hand: summed over tokens
it adds up over a text and its continuation, and as a mean it ranks texts of any length.

Drawn again and again, the easiest novelty comes again and again; `luthier analyze novelty` teaches the base each text
that it shows, so that others come up.

When not to use it: to write good text (what comes is what is unusual); for models of different vocabularies.

Isonuma and Titov, ICLR 2025 (arXiv 2410.14765), and their code. The authors' scripts draw inside a stochastic beam of
4; here is their own fallback, one beam. `boost` is ours. Proof: luthier prove 66.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from luthier.decode.base import FLOOR, Decoder, Model, Step, Term, normalised, total
from luthier.decode.inputs import check_ids
from luthier.decode.likelihood import likelihoods
from luthier.models.modes import evaluating


class Cge(Decoder):
    """Contrastive generative exploration.

    Attributes:
        base: the model before tuning.
        tuned: the model after it.
        alpha: share of the largest probability that a token needs under `tuned`; 0 is no filter, 1 the top token.
        gamma: how much of what the base knows is taken out; 0 is plain sampling inside the plausible set.
        form: `ratio` is the paper's; `boost` raises the tuned model's own probabilities by the contrast.
        weight: of the contrast, with `boost`; 0 is plain sampling inside the plausible set.
        num_beams: 1; the authors' stochastic beam is not built.
    """

    method: Literal["cge"] = "cge"
    paper: ClassVar[int | None] = 66
    base: Model
    tuned: Model
    alpha: float = Field(default=0.1, ge=0, le=1)
    gamma: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    form: Literal["ratio", "boost"] = "ratio"
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    num_beams: int = 1

    @field_validator("num_beams")
    @classmethod
    def _one_beam(cls, value: int) -> int:
        if value != 1:
            raise ValueError(
                f"contrastive texts are sampled with num_beams 1, a stochastic beam is not built; got {value}"
            )
        return value

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term inside the plausible set."""
        if self.form == "ratio":
            return {"tuned": 1.0, "base": -self.gamma}
        return {"tuned": 1.0 + self.weight, "base": -self.weight * self.gamma}

    def terms(self) -> dict[str, Term]:
        return {"base": Term(self.base), "tuned": Term(self.tuned, on="base")}

    def scores(self, step: Step) -> Tensor:
        inside = plausible(step.logprobs("tuned"), self.alpha)
        return normalised(total(step, self.weights).masked_fill_(~inside, -math.inf))


def plausible(logprobs: Tensor, alpha: float) -> Tensor:
    """(..., vocabulary) bool: the tokens with at least `alpha` (0 to 1) times the largest probability."""
    if alpha == 0:
        return torch.ones_like(logprobs, dtype=torch.bool)
    return logprobs >= logprobs.amax(-1, keepdim=True) + math.log(alpha)


def contrastive_score(
    tuned: nn.Module,
    base: nn.Module,
    texts: Sequence[Sequence[int]],
    normalize: bool = True,
    *,
    gamma: float = 1.0,
    batch_tokens: int = 4096,
) -> list[float]:
    """s(x) = sum over tokens of log tuned - gamma log base, for each of `texts`, in nats. High is novel.

    Args:
        texts: token ids, each at least one; the first is where a text begins (its begin-of-text token) and not scored.
        normalize: give the mean over the scored tokens in place of their sum.
        batch_tokens: tokens, padding included, that one batch may hold.

    A text of one token scores 0. A sum of -inf counts as -10,000.

    Raises `InputError` for an empty text, unknown ids, or a text longer than a model's context.
    """
    sums = [logprob_sums(model, texts, batch_tokens) for model in (tuned, base)]
    return contrast(sums[0], sums[1], gamma, normalize)


def logprob_sums(model: nn.Module, texts: Sequence[Sequence[int]], batch_tokens: int = 4096) -> list[tuple[float, int]]:
    """(summed log-probability in nats, number of tokens) of each text behind its first token."""
    check_ids(model, texts, "text")
    starts, rest = [list(text[:1]) for text in texts], [list(text[1:]) for text in texts]
    return [(one.logprob, one.tokens) for one in likelihoods(model, starts, rest, batch_tokens=batch_tokens)]


def contrast(
    tuned: Sequence[tuple[float, int]], base: Sequence[tuple[float, int]], gamma: float = 1.0, normalize: bool = True
) -> list[float]:
    """`contrastive_score` from what `logprob_sums` gives of both models."""
    found = []
    for (one, count), (other, _) in zip(tuned, base, strict=True):
        one, other = (FLOOR if value == -math.inf else value for value in (one, other))
        found.append((one - gamma * other) / (max(1, count) if normalize else 1))
    return found


def token_contrasts(tuned: nn.Module, base: nn.Module, text: Sequence[int], gamma: float = 1.0) -> list[float]:
    """d_t of each token of one text behind its first, in nats: what `contrastive_score` sums up."""

    def said(model: Any) -> Tensor:
        ids = torch.tensor([list(text)], device=model.get_input_embeddings().weight.device)
        with evaluating(model), torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        return normalised(logits).gather(-1, ids[0, 1:, None])[:, 0].clamp(min=FLOOR).cpu()

    return (said(tuned) - gamma * said(base)).tolist() if len(text) > 1 else []
