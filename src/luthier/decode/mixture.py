"""A decoder with its models as one model of transformers: `generate`, beams and graders take it as any other.

    model = Mixture(decoder, {"base": opened, "tuned": opened})
    luthier.decode.generate(model, tokenizer, prompts, ...)        or model.generate(...)

Its `forward` runs the terms and gives the mixed log-probabilities as logits, so transformers' own loop, its sampling
processors and its stopping criteria act once, after mixing. In the place of a cache it hands on a `Session`: a stream
for each model (see `streams`), which only the tokens that were drawn go into. Models with prompt formats of their own
are given their prompts by `prompted`; without, all read the same.

Called without a session it scores whole texts: the mixed log-probabilities at every position.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from luthier.decode.base import Decoder, Step, Term, normalised
from luthier.decode.inputs import context_length, end_ids
from luthier.decode.sharing import shared_blocks
from luthier.decode.streams import Apart, Stream, open_stream
from luthier.decode.trunk import Lower, Trunk
from luthier.errors import InputError

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Opened:
    """A term's model, ready to run.

    Attributes:
        model: the module; several terms may share one.
        active: what must be open while it runs, where weights are shared (an adapter on or off, a delta in or out).
        variant: tells apart what one module is under different `active`; terms with the same module and variant are
            the same model.
        tokenizer: None if there is none.
        changed: names of the parameters and modules that differ from the module without any variant, in the names of
            the model below PEFT's wrapper. Blocks before the first of them run once for all terms of the module. None:
            not known, and the term runs by itself.
    """

    model: nn.Module
    active: Callable[[], AbstractContextManager[Any]] = nullcontext
    variant: str = ""
    tokenizer: Any = None
    changed: frozenset[str] | None = None

    @property
    def key(self) -> tuple[int, str]:
        """Equal for terms that are one model."""
        return id(self.model), self.variant


class Session:
    """One batch of a mixture under way; stands where transformers expects a cache."""

    def __init__(self, mixture: Mixture, prompts: Mapping[str, Prompts], rows: Sequence[int], cached: bool):
        self.mixture, self.cached = mixture, cached
        self.rows = torch.tensor(list(rows))
        self.prompts = prompts
        self.count = len(next(iter(prompts.values())))
        self.memory: dict[str, Any] = {}
        self.tokens = torch.empty(self.count, 0, dtype=torch.int64)
        self._streams: dict[Any, Stream | Apart] = {}
        self._trunks: list[Trunk] = []
        self.logs: list[dict[str, Tensor]] = []  # by step: name -> (rows,) of the drawn tokens; what was traced
        self._said: dict[str, Tensor] = {}
        self._scores: Tensor | None = None

    def stream(self, name: str) -> Stream | Apart:
        """The stream of a term; terms that are one model with the same prompts share one."""
        key = self._key(name)
        if key not in self._streams:
            lower = self.mixture.shared.get(name)
            together = {
                self._key(other): other
                for other, theirs in self.mixture.shared.items()
                if lower is theirs and self._key(other)[1] == key[1]
            }
            trunk = Trunk(lower) if lower is not None and len(together) > 1 else None
            for other, term in together.items() if trunk is not None else [(key, name)]:
                self._streams[other] = self._opened(term, trunk)
            self._trunks += [] if trunk is None else [trunk]
        return self._streams[key]

    def _key(self, name: str) -> Any:
        return self.mixture.opened[name].key, tuple(map(tuple, self.prompts[name]))

    def _opened(self, name: str, trunk: Trunk | None) -> Stream | Apart:
        opened = self.mixture.opened[name]
        how: dict[str, Any] = {"active": opened.active, "use_cache": self.cached, "trunk": trunk}
        stream = open_stream(opened.model, self.prompts[name], hidden=self.mixture.hidden(name), **how)
        if self.tokens.shape[1]:
            stream.feed(self.tokens)
        return stream

    def step(self) -> Step:
        """The next token, as a decoder sees it."""
        cut = self.mixture.vocabulary
        self._said = {}

        def logprobs(name: str) -> Tensor:
            if name not in self._said:
                self._said[name] = normalised(self.stream(name).logits()[:, :cut])
            return self._said[name]

        return Step(
            logprobs,
            hidden=lambda name: self.stream(name).states(),
            rows=self.rows,
            generated=self.tokens,
            memory=self.memory,
            fork=lambda name, times: self.stream(name).fork(times),
            prompts=self.prompts,
            tokenizer=self.mixture.lead.tokenizer,
            ends=self.mixture.ends,
            prompt_states=lambda name: self.stream(name).prompt(),
        )

    def scores(self) -> Tensor:
        """(rows, vocabulary): the decoder's scores of the next token."""
        step = self.step()
        self._scores = self.mixture.decoder.scores(step)
        self._trace = step.trace
        return self._scores

    def feed(self, tokens: Tensor) -> None:
        """The tokens (rows,) that were drawn."""
        self.note(tokens)
        column = tokens.reshape(-1, 1).to("cpu")
        self.tokens = torch.cat([self.tokens, column], dim=1)
        for stream in self._streams.values():
            stream.feed(tokens)

    def note(self, tokens: Tensor) -> None:
        """Keep what the terms and the mixture gave the tokens that were drawn."""
        if not self.mixture.keeps_logs or self._scores is None:
            return
        at = tokens.reshape(-1, 1).to(self._scores.device).clamp(max=self._scores.shape[1] - 1)
        found = {"mixture": self._scores.gather(1, at)[:, 0]}
        found |= {name: said.gather(1, at.to(said.device))[:, 0] for name, said in self._said.items()}
        self.logs.append(found | {f"trace.{name}": value for name, value in self._trace.items()})
        self._scores = None

    # What transformers asks of a cache

    def get_seq_length(self, *_: Any) -> int:
        return self.tokens.shape[1]

    def reorder_cache(self, order: Tensor) -> None:
        if self.mixture.keeps_logs:
            raise InputError("log-probabilities of terms are kept for sampling and greedy decoding, not for beams")
        if self.memory:
            raise InputError(f"{self.mixture.decoder.method} has a memory of its rows, and beams would mix them up")
        self.tokens, self.rows = self.tokens[order.cpu()], self.rows[order.cpu()]
        for stream in (*self._streams.values(), *self._trunks):
            stream.reorder(order)


class Mixture(nn.Module, GenerationMixin):
    """A decoder and its opened models.

    Args:
        decoder: the settings.
        opened: a model for each of its terms.
        vocabulary: how many tokens they share: rows of the embedding behind it are padding and cannot be drawn.

    Raises `InputError` if a term has no model, or the settings do not fit them.
    """

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(self, decoder: Decoder, opened: Mapping[str, Opened], vocabulary: int):
        super().__init__()
        self.decoder, terms = decoder, decoder.terms()
        lost = terms.keys() ^ opened.keys()
        if lost:
            raise InputError(f"{decoder.method} wants the models {', '.join(terms)}", where=", ".join(sorted(lost)))
        self.opened: dict[str, Opened] = decoder.joined(opened)
        self.terms = {name: terms.get(name, Term(one.model)) for name, one in self.opened.items()}
        self.vocabulary = vocabulary
        self.keeps_logs = False
        lead: Any = self.lead.model
        self.config = copy.deepcopy(lead.config)
        self.config.is_encoder_decoder = False
        self.generation_config = getattr(lead, "generation_config", None) or GenerationConfig()
        self.ends = frozenset(end_ids(self, self.lead.tokenizer))
        self._given: tuple[dict[str, Prompts], Sequence[int]] | None = None
        self._modules_of = nn.ModuleList({id(one.model): one.model for one in self.opened.values()}.values())
        decoder.check(dict.fromkeys(self.terms, vocabulary))

    @property
    def lead(self) -> Opened:
        """The first term's."""
        return self.opened[next(iter(self.terms))]

    def hidden(self, name: str) -> bool:
        """Whether the hidden states of a term's model are wanted, by it or by another term of the same model."""
        return any(t.hidden and self.opened[n].key == self.opened[name].key for n, t in self.terms.items())

    @cached_property
    def shared(self) -> dict[str, Lower]:
        """The blocks that a term runs together with others (see `sharing`). A term whose hidden states are wanted after
        every block runs alone."""
        return shared_blocks({name: one for name, one in self.opened.items() if not self.hidden(name)})

    @property
    def device(self) -> torch.device:
        return self.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def get_input_embeddings(self) -> Any:
        return self.lead.model.get_input_embeddings()  # type: ignore[operator]

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def room(self, prompts: Mapping[str, Prompts], number: int) -> int | None:
        """How many tokens may follow prompt `number`, by the contexts of all terms; None if none of them ends."""
        left = []
        for name, opened in self.opened.items():
            context = context_length(opened.model)
            if context is not None:
                seq2seq = bool(getattr(opened.model.config, "is_encoder_decoder", False))
                left.append(context - (0 if seq2seq else len(prompts[name][number])))
        return min(left, default=None)

    @contextmanager
    def prompted(self, prompts: Mapping[str, Prompts], rows: Sequence[int]) -> Iterator[None]:
        """While open, `generate` starts from these prompts, by term; `rows` are their numbers, for what depends on a
        prompt (its seed). Terms that are not named read the ids that `generate` is handed."""
        self._given = dict(prompts), rows
        try:
            yield
        finally:
            self._given = None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Session | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits are the decoder's log-probabilities, (rows, length or 1, vocabulary) float32; no gradient."""
        with torch.no_grad():
            if past_key_values is None:
                return CausalLMOutputWithPast(logits=self._texts(input_ids, attention_mask, logits_to_keep))
            scores = past_key_values.scores()
        return CausalLMOutputWithPast(logits=scores[:, None], past_key_values=past_key_values)  # type: ignore[arg-type]

    def _texts(self, ids: Tensor, mask: Tensor | None, keep: int | Tensor) -> Tensor:
        if self.decoder.stepwise:
            raise InputError(f"{self.decoder.method} decodes token by token and cannot score whole texts")
        rows, length = ids.shape
        said: dict[Any, Tensor] = {}
        states: dict[int, Tensor] = {}
        given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        given |= {} if mask is None else {"attention_mask": mask}

        def below(name: str) -> AbstractContextManager[None]:
            lower = self.shared.get(name)
            if lower is None:
                return nullcontext()
            if id(lower) not in states:
                states[id(lower)] = lower.entrance(**given)
            return lower.skipped(states[id(lower)])

        def logprobs(name: str) -> Tensor:
            opened = self.opened[name]
            key = opened.key
            if key not in said:
                with opened.active(), below(name):
                    logits = opened.model(**given).logits
                logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
                said[key] = normalised(logits[..., : self.vocabulary].flatten(0, 1))
            return said[key]

        def hidden(name: str) -> Tensor:
            raise InputError(f"{self.decoder.method} decodes token by token and cannot score whole texts")

        step = Step(logprobs, hidden, torch.arange(rows).repeat_interleave(length), None)
        return self.decoder.scores(step).view(rows, -1, self.vocabulary)

    # What transformers' loop asks

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Session | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if past_key_values is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            plain = [ids[on.bool()].tolist() for ids, on in zip(input_ids, mask, strict=True)]
            given, rows = self._given or ({}, range(len(plain)))
            times = len(plain) // max(1, len(rows))  # beams
            prompts = {
                name: [p for p in given[name] for _ in range(times)] if name in given else plain for name in self.terms
            }
            rows = [row for row in rows for _ in range(times)]
            past_key_values = Session(self, prompts, rows, cached=kwargs.get("use_cache") is not False)
            self.session = past_key_values
        else:
            past_key_values.feed(input_ids[:, -1])
        return {"input_ids": input_ids, "past_key_values": past_key_values}

    def _prepare_cache_for_generation(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Sessions stand for caches, and are made by `prepare_inputs_for_generation`."""

    def _optimize_model_for_decode(self) -> AbstractContextManager[Any]:  # type: ignore[override]
        return nullcontext()  # chooses kernels for experts; the terms' own models are run, not this one

    def _validate_model_kwargs(self, *_: Any, **__: Any) -> None:
        """All that `generate` is handed goes to the terms' streams."""
