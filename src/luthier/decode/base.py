"""The contract of a decoder: several models score the next token, one distribution comes out.

    class Eft(Decoder):
        base: Model
        tuned: Model
        def terms(self):                        # which models run, by name
            return {"base": Term(self.base), "tuned": Term(self.tuned)}
        def scores(self, step):                 # what becomes of them, at every step
            return mixed(step, {"base": 1.0, "tuned": self.weight})

A term is a model with a prompt format and a cache of its own. `step.logprobs(name)` gives its log-probabilities, and
runs it if it has not run yet: a term that nobody asks for costs nothing. What `scores` gives are normalised
log-probabilities; the one sampler of the house (`luthier.decode.sampling`) acts once, on them. Scores are float32, of
the tokens that all terms share, and -inf where a token cannot come.

A decoder keeps nothing itself. What it remembers from step to step goes into `step.memory`, which lives as long as the
batch; what it wants shown goes into `step.trace`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import PlainSerializer, WithJsonSchema
from torch import Tensor

from luthier.methods import Method

Model = Annotated[
    Any,
    PlainSerializer(lambda model: model if isinstance(model, str) else type(model).__name__, when_used="json"),
    WithJsonSchema({"type": "string", "description": "folder, hub id, adapter or delta; in Python also a module"}),
]


@dataclass(frozen=True)
class Term:
    """A model of a mixture.

    Attributes:
        model: a folder or whatever `luthier.models` loads, a PEFT adapter, a delta, or a module. Two terms that name
            the same share its weights, and with the same prompts its computation too.
        on: name of the term whose weights an adapter or a delta stands on.
        hidden: whether `step.hidden` and `step.prompt_states` are wanted of it.
    """

    model: Any
    on: str | None = None
    hidden: bool = False


@dataclass
class Step:
    """What a decoder sees of one next token: N contexts at once (rows of a batch, or positions of texts).

    Attributes:
        logprobs: name of a term -> (N, vocabulary) float32 log-probabilities of the next token, in nats. The model runs
            when this is first asked. Must not be written to.
        hidden: name -> (N, layers, width): the hidden state after every block, for terms with `hidden`.
        rows: (N,) number of the prompt in its batch.
        generated: (N, t) int64 tokens so far, without prompts; None where whole texts are scored.
        memory: of this decoder over this batch, empty at first; one entry per decoder's own key.
        trace: what the decoder tells of this step: (N,) or (N, ...) tensors by name.
        fork: name, k -> a stream of that term with every row k times, to write ahead on (`luthier.decode.streams`);
            None where whole texts are scored.
        prompts: name -> the prompt of every row as that term reads it, token ids; empty where whole texts are scored.
        tokenizer: of the first term, for decoders that look at text; None if it has none.
        ends: tokens that end an answer. A row that holds one in `generated` is done; fillers follow it.
        prompt_states: name -> (N, columns, width), what its embedding gave the prompt's tokens (of an encoder-decoder
            model: what its encoder gave), and (N, columns) bool, false for padding; for terms with `hidden`. None
            where whole texts are scored.
    """

    logprobs: Callable[[str], Tensor]
    hidden: Callable[[str], Tensor]
    rows: Tensor
    generated: Tensor | None
    memory: dict[str, Any] = field(default_factory=dict)
    trace: dict[str, Tensor] = field(default_factory=dict)
    fork: Callable[[str, int], Any] | None = None
    prompts: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    tokenizer: Any = None
    ends: frozenset[int] = frozenset()
    prompt_states: Callable[[str], tuple[Tensor, Tensor]] | None = None


class Decoder(Method):
    """Base of all decoders. Verb: `scores`.

    Attributes:
        stepwise: whether a next token depends on more than its own context (on what was drawn before, on rollouts), so
            that a text cannot be scored in one pass.
    """

    room: ClassVar[str] = "decode"
    stepwise: ClassVar[bool] = False

    def terms(self) -> dict[str, Term]:
        """The models by name, none of them None. The first one's tokenizer, end tokens and context lead."""
        raise NotImplementedError

    def joined(self, opened: Mapping[str, Any]) -> dict[str, Any]:
        """The models (`luthier.decode.mixture.Opened`) that run, by term, from those that `terms` names: the same,
        unless a decoder makes one model of several."""
        return dict(opened)

    def scores(self, step: Step) -> Tensor:
        """(N, vocabulary) float32 normalised log-probabilities of the next token."""
        raise NotImplementedError

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise `InputError` if the settings do not fit the models; `sizes` are their vocabularies by term."""

    @property
    def draft(self) -> tuple[str, int] | None:
        """A term that may write ahead, and how many tokens at a time; the others check them. None: token by token."""
        return None


def mixed(step: Step, weights: Mapping[str, float]) -> Tensor:
    """sum of weight x log-probabilities, normalised: (N, vocabulary) float32. A weight of 0 leaves its term alone.

    Where a term with a positive weight rules a token out (-inf), it is out, whatever the others say.
    """
    return normalised(total(step, weights))


def total(step: Step, weights: Mapping[str, float]) -> Tensor:
    """The sum of `mixed` before it is normalised; -inf where a term with a positive weight rules a token out."""
    moving = {name: weight for name, weight in weights.items() if weight != 0}
    if not moving:
        raise ValueError("a mixture needs a weight that is not 0")
    found: Tensor | None = None
    for name, weight in moving.items():
        part = step.logprobs(name)
        part = part.clamp(min=FLOOR) * weight
        found = part if found is None else found.add_(part)
    assert found is not None
    for name, weight in moving.items():
        if weight > 0:
            found.masked_fill_(step.logprobs(name) == -math.inf, -math.inf)
    return found


FLOOR = -1e4  # nats; stands for -inf inside of sums, since inf - inf is not a number


def normalised(scores: Tensor) -> Tensor:
    """Log-probabilities in proportion to exp(scores), over the last axis."""
    return torch.log_softmax(scores.float(), dim=-1)


def finite_weights(names: Sequence[str], weights: Sequence[float]) -> None:
    """`ValueError` if a weight is infinite or not a number."""
    odd = [f"{name} {weight}" for name, weight in zip(names, weights, strict=True) if not math.isfinite(weight)]
    if odd:
        raise ValueError(f"weights must be finite, got {', '.join(odd)}")
