"""Writing ahead with one term of a mixture and checking with all: faster, and the same distribution.

    a_1 .. a_g ~ q             the draft term, token by token
    p_1 .. p_g+1               the mixture at all these places, in one pass of every other term
    keep a_i with probability min(1, p_i(a_i) / q_i(a_i)); at the first that is not kept draw from max(0, p_i - q_i),
    normalised, and draft anew; if all are kept, one more comes from p_g+1

p and q are what the sampler's processors make of the mixture and of the draft, so what comes out follows the processed
mixture exactly (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318). At temperature 0 a token
is kept while it is the mixture's own choice, and the text is the one that token-by-token decoding writes.

Rows go one by one: each keeps another number of tokens. It pays where the draft is much cheaper than the other terms
and mostly agrees with the mixture. Models that cannot go back in what they have read (recurrent ones) are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from luthier.decode.base import Step, normalised
from luthier.decode.mixture import Mixture, Session
from luthier.decode.sampling import Numbers, Penalty, Sampler, generator_of
from luthier.decode.streams import Apart, Stream
from luthier.errors import InputError


@dataclass
class Written:
    """One text: its new tokens, the end token included, and how many drafted ones were kept."""

    ids: list[int] = field(default_factory=list)
    drafted: int = 0
    kept: int = 0


def speculate(
    mixture: Mixture,
    prompts: Mapping[str, Sequence[int]],
    *,
    number: int,
    room: int,
    sampler: Sampler,
    ended: Callable[[list[int]], bool],
    tell: Callable[[int], None] = lambda token: None,
) -> Written:
    """Write one text.

    Args:
        prompts: the prompt of each term.
        number: of the prompt, for its draws.
        room: at most this many new tokens.
        ended: whether a text of these new tokens is at its end.
        tell: called with every token that stays.
    """
    assert mixture.decoder.draft is not None
    name, ahead = mixture.decoder.draft
    run = _Run(mixture, prompts, number, sampler, name)
    written = Written()
    while len(written.ids) < room and not ended(written.ids):
        ahead_now = min(ahead, room - len(written.ids) - 1)
        drafted, q = run.draft(written.ids, ahead_now, ended)
        p = run.check(written.ids, drafted)
        kept, token = run.judge(drafted, q, p)
        written.drafted, written.kept = written.drafted + len(drafted), written.kept + kept
        new = [*drafted[:kept], token]
        for count in range(1, len(new) + 1):
            tell(new[count - 1])
            if ended([*written.ids, *new[:count]]):
                new = new[:count]
                break
        run.settle(written.ids, new, len(drafted))
        written.ids += new
    return written


class _Run:
    def __init__(
        self, mixture: Mixture, prompts: Mapping[str, Sequence[int]], number: int, sampler: Sampler, name: str
    ):
        self.mixture, self.sampler, self.name = mixture, sampler, name
        self.session = Session(mixture, {term: [prompt] for term, prompt in prompts.items()}, [number], cached=True)
        self.lead = list(prompts[next(iter(prompts))])
        self.random = generator_of(sampler.seed, number, mixture.device)
        self.streams: dict[str, Stream] = {}
        for term in mixture.terms:
            stream = self.session.stream(term)
            if isinstance(stream, Apart) or getattr(mixture.opened[term].model, "_is_stateful", False):
                raise InputError(
                    f"{term} carries a state and cannot go back in what it has read", fix="set speculative: 0"
                )
            stream.goes_back = True
            self.streams[term] = stream

    def draft(self, ids: list[int], count: int, ended: Callable[[list[int]], bool]) -> tuple[list[int], list[Tensor]]:
        """Up to `count` tokens of the draft term, and the distributions that they were drawn from."""
        stream = self.streams[self.name]
        drafted: list[int] = []
        q: list[Tensor] = []
        for _ in range(count):
            said = normalised(stream.logits()[:, : self.mixture.vocabulary])
            q.append(self._shaped(said, [*ids, *drafted])[0])
            drafted.append(self._draw(q[-1]))
            stream.feed(torch.tensor([drafted[-1]]))
            if ended([*ids, *drafted]):
                break
        return drafted, q

    def check(self, ids: list[int], drafted: list[int]) -> Tensor:
        """(drafted + 1, vocabulary): the mixture's processed distribution at each drafted token and behind the last."""
        columns = len(drafted) + 1
        said: dict[int, Tensor] = {}

        def logprobs(name: str) -> Tensor:
            stream = self.streams[name]
            if id(stream) not in said:
                if stream is not self.streams[self.name]:
                    stream.feed(torch.tensor([drafted], dtype=torch.int64))
                said[id(stream)] = normalised(stream.every(columns)[0, :, : self.mixture.vocabulary])
            return said[id(stream)]

        def hidden(name: str) -> Tensor:
            raise InputError(f"{self.mixture.decoder.method} looks at hidden states and cannot write ahead")

        rows = self.session.rows.expand(columns)
        scores = self.mixture.decoder.scores(Step(logprobs, hidden, rows, None, self.session.memory))
        shaped = [self._shaped(row[None], [*ids, *drafted[:at]]) for at, row in enumerate(scores)]
        self.asked = set(said)
        return torch.cat(shaped)

    def judge(self, drafted: list[int], q: list[Tensor], p: Tensor) -> tuple[int, int]:
        """How many drafted tokens stay, and the token behind them."""
        for at, token in enumerate(drafted):
            if self.sampler.temperature == 0:
                stays = token == int(p[at].argmax())
            else:
                stays = float(torch.rand((), generator=self.random, device=p.device)) * float(q[at][token]) < float(
                    p[at][token]
                )
            if not stays:
                rest = p[at] if self.sampler.temperature == 0 else (p[at] - q[at]).clamp_(min=0)
                return at, self._draw(rest if float(rest.sum()) > 0 else p[at])
        return len(drafted), self._draw(p[-1])

    def settle(self, ids: list[int], new: list[int], drafted: int) -> None:
        """Bring all streams to the tokens that stay."""
        token = torch.tensor([new[-1]])
        for stream in {id(s): s for s in self.streams.values()}.values():
            fed = id(stream) in self.asked or stream is self.streams[self.name]
            if fed:
                stream.cut(stream.begin + len(ids) + len(new) - 1)
                stream.feed(token)
            else:  # nobody asked it; it catches up when somebody does
                stream.feed(torch.tensor([new]))

    def _shaped(self, scores: Tensor, ids: list[int]) -> Tensor:
        """Probabilities (1, vocabulary) after the sampler's processors; at temperature 0 only penalties act. Raises
        `InputError` for scores that are not numbers."""
        given = torch.tensor([ids], dtype=torch.int64, device=scores.device)
        found: Any = LogitsProcessorList([Numbers()])
        if self.sampler.repetition_penalty != 1:
            penalty = Penalty(self.sampler.repetition_penalty, [self.lead])
            penalty.width = 0
            found.append(penalty)
        found.extend(self.sampler.shapers)
        return found(given, scores).softmax(-1)

    def _draw(self, weights: Tensor) -> int:
        if self.sampler.temperature == 0:
            return int(weights.argmax())
        return int(torch.multinomial(weights.float(), 1, generator=self.random))
