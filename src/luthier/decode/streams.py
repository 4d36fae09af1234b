"""One model writing along: what was written so far, its own cache, padding and positions.

    stream = Stream(model, prompts)
    stream.logits()               (rows, vocabulary) of the next token; the prompts are run now
    stream.feed(tokens)           one more token each; nothing runs until somebody asks
    stream.fork(k)                every row k times, to write ahead on; the stream itself stays where it is

Prompts of different lengths stand on the right with a mask before them, and positions are counted from each row's
first token, so a row's logits do not depend on its neighbours. A model that carries a state along the row would drag
it through the padding: its rows run apart. An encoder-decoder model reads the prompt with its encoder, once, and
writes with its decoder. A model that keeps no cache reads everything again at every step.

Streams of terms whose first blocks are the same stand on a `Trunk`, which runs these blocks for all of them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from luthier.decode.inputs import context_length
from luthier.decode.trunk import CACHE, Trunk, empty_cache
from luthier.errors import InputError
from luthier.models.modes import evaluating

_CACHES = (CACHE, "cache_params", "state")


class Stream:
    """Rows that one model continues.

    Args:
        model: a causal or encoder-decoder language model, plain or wrapped by PEFT.
        prompts: token ids of each row, none of them empty.
        active: what must be open while the model runs, for a model that shares its weights with another.
        hidden: also keep the hidden states after every block, of the last tokens that ran, and the prompts' embeddings.
        use_cache: false reads everything again at every step.
        trunk: of a causal model: what runs its first blocks, for other streams too; these read the same prompts, and
            are made before any of them runs. Does not go with `hidden`.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        *,
        active: Callable[[], AbstractContextManager[Any]] = nullcontext,
        hidden: bool = False,
        use_cache: bool = True,
        trunk: Trunk | None = None,
    ):
        self.model, self.active, self.hidden, self.use_cache = model, active, hidden, use_cache
        self.trunk = trunk
        if trunk is not None:
            trunk.streams.append(self)
        self.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        self.seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
        self.takes = takes(model)
        self.stateful = is_stateful(model)  # then its rows are of one length, without padding
        self.goes_back = False  # whether `cut` will be asked for; a sliding window keeps more then
        self.cache: dict[str, Any] = {}
        self.read = 0  # columns that the cache holds
        width = max(map(len, prompts))
        if self.seq2seq:
            fill = [[0] * (width - len(prompt)) for prompt in prompts]
            ids = torch.tensor([[*p, *f] for p, f in zip(prompts, fill, strict=True)], device=self.device)
            on = [[1] * len(p) + f for p, f in zip(prompts, fill, strict=True)]
            self.source_mask = torch.tensor(on, device=self.device)
            with self.active(), evaluating(model), torch.no_grad():
                self.encoded = inner(model).get_encoder()(input_ids=ids, attention_mask=self.source_mask)
            start = _start(model)
            self.ids = torch.full((len(prompts), 1), start, device=self.device)
            self.mask = torch.ones_like(self.ids)
        else:
            self.ids = torch.tensor([[*[0] * (width - len(prompt)), *prompt] for prompt in prompts], device=self.device)
            self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        self.begin = self.ids.shape[1]
        self._last: Tensor | None = None
        self._states: Tensor | None = None
        self._prompt: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def start(self) -> int:
        """The first column that the next run reads."""
        return self.read if self.cache else 0

    @property
    def written(self) -> Tensor:
        """(rows, t) int64: the tokens that were fed."""
        return self.ids[:, self.begin :]

    @property
    def room(self) -> Tensor | None:
        """(rows,) int64: how many more tokens fit into the model's context; None if it has no limit."""
        context = context_length(self.model)
        return None if context is None else context - self.mask.sum(1)

    def feed(self, tokens: Tensor) -> None:
        """One token (rows,) or several (rows, n) behind what is there."""
        new = tokens.to(self.device).reshape(self.rows, -1)
        self.ids = torch.cat([self.ids, new], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(new)], dim=1)

    def logits(self) -> Tensor:
        """(rows, vocabulary) float32, of the token after all that was fed."""
        if self.read < self.ids.shape[1]:
            self._last = self._run(1)[:, -1]
        assert self._last is not None
        return self._last

    def states(self) -> Tensor:
        """(rows, layers, width): hidden states after every block at the last token, where `hidden` was asked for."""
        self.logits()
        assert self._states is not None
        return self._states[:, :, -1]

    def prompt(self) -> tuple[Tensor, Tensor]:
        """(rows, columns, width) and (rows, columns) bool, false for padding: what went into the first block for the
        tokens of the prompt, or what the encoder made of it, where `hidden` was asked for."""
        if self.seq2seq:
            return self.encoded.last_hidden_state, self.source_mask.bool()
        self.logits()
        assert self._prompt is not None
        return self._prompt, self.mask[:, : self.begin].bool()

    def every(self, count: int) -> Tensor:
        """(rows, count, vocabulary) float32: of the tokens after each of the last `count` columns, run at once.

        At most one of these columns may have run before; it runs again then.
        """
        want = self.ids.shape[1] - count
        if self.read > want:
            self.cut(self.ids.shape[1], want)
        logits = self._run(count)
        self._last = logits[:, -1]
        return logits

    def cut(self, columns: int, read: int | None = None) -> None:
        """Back to the first `columns` columns; the cache keeps `read` of them (default: as many as it can)."""
        self.ids, self.mask = self.ids[:, :columns], self.mask[:, :columns]
        limit = columns - 1 if read is None else read
        if self.trunk is not None:
            self.trunk.cut(limit)
        keep = min(self.read, limit)
        if self.read > keep:
            for cache in self.cache.values():
                if not hasattr(cache, "crop"):
                    raise InputError(f"{type(self.model).__name__} cannot go back in what it has read", where="decoder")
                cache.crop(-(self.read - keep))
            self.read = keep

    def reorder(self, order: Tensor) -> None:
        """Rows in another order, maybe some twice or left out: int64 numbers of rows, as a beam search asks for. A
        trunk is reordered by itself, once for all its streams."""
        order = order.to(self.device)
        self.ids, self.mask = self.ids[order], self.mask[order]
        self._last = None if self._last is None else self._last[order]
        self._states = None if self._states is None else self._states[order]
        self._prompt = None if self._prompt is None else self._prompt[order]
        if self.seq2seq:
            self.source_mask = self.source_mask[order]
            self.encoded.last_hidden_state = self.encoded.last_hidden_state[order]
        for cache in self.cache.values():
            cache.reorder_cache(order)

    def fork(self, times: int) -> Stream:
        """A stream of its own with every row `times` times, one after the other; it has read what this one has."""
        self.logits()
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache) if self.trunk is None else self.trunk.whole(self)
        other.trunk = None
        if self.seq2seq:
            other.encoded = copy.copy(self.encoded)
        other.reorder(torch.arange(self.rows).repeat_interleave(times))
        return other

    # Inside

    def arguments(self, start: int, keep: int) -> dict[str, Any]:
        """What the model is given, its cache aside, to read the columns from `start` on and give `keep` logits."""
        ids, mask = self.ids[:, start:], self.mask
        given: dict[str, Any] = {}
        if self.seq2seq:
            given |= {"encoder_outputs": self.encoded, "attention_mask": self.source_mask, "decoder_input_ids": ids}
        else:
            given |= {"input_ids": ids}
            # A carried state has read its past; a mask as long as that would stretch the new token over it.
            if not bool(mask.all()) or ("position_ids" not in self.takes and not self.stateful):
                given["attention_mask"] = mask
            if "position_ids" in self.takes:
                given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        if "logits_to_keep" in self.takes:
            given["logits_to_keep"] = keep
        return given

    def _run(self, keep: int) -> Tensor:
        """Run what the model has not read; logits of the last `keep` columns."""
        if self.use_cache and not self.cache:
            self.cache = self._first_cache()
        given = {**self.cache, **self.arguments(self.start, keep)}
        below = nullcontext() if self.trunk is None else self.trunk.under(self)
        with self.active(), evaluating(self.model), torch.no_grad(), below:
            out = self.model(**given, use_cache=self.use_cache, output_hidden_states=self.hidden or None)
        if self.use_cache:
            self.cache = {name: out[name] for name in _CACHES if getattr(out, name, None) is not None}
            for cache in self.cache.values() if self.goes_back and not self.read else ():
                getattr(cache, "activate_past_recording", bool)()
        self.read = self.ids.shape[1]
        if self.trunk is not None:
            self.trunk.forget()
        if self.hidden:
            states = out.decoder_hidden_states if self.seq2seq else out.hidden_states
            if self._prompt is None and not self.seq2seq:
                self._prompt = states[0][:, : self.begin]
            self._states = torch.stack([state[:, -keep:] for state in states[1:]], dim=1)
        return out.logits[:, -keep:].float()

    def _first_cache(self) -> dict[str, Any]:
        """The cache of the first run; none where the model makes it. What goes back is told so before it reads a prompt
        that is longer than a window."""
        if self.trunk is not None:
            return self.trunk.cache_of(self)
        if self.goes_back and not self.seq2seq and CACHE in self.takes:
            return {CACHE: empty_cache(inner(self.model), True)}
        return {}


class Apart:
    """Streams of a model whose rows must not be padded: one for each row, seen as one stream."""

    def __init__(self, streams: Sequence[Stream]):
        self.streams = list(streams)

    @property
    def rows(self) -> int:
        return len(self.streams)

    @property
    def written(self) -> Tensor:
        return torch.cat([stream.written for stream in self.streams])

    @property
    def room(self) -> Tensor | None:
        found = [room for stream in self.streams if (room := stream.room) is not None]
        return torch.cat(found) if found else None

    def feed(self, tokens: Tensor) -> None:
        for stream, row in zip(self.streams, tokens, strict=True):
            stream.feed(row.reshape(1, -1))

    def logits(self) -> Tensor:
        return torch.cat([stream.logits() for stream in self.streams])

    def states(self) -> Tensor:
        return torch.cat([stream.states() for stream in self.streams])

    def prompt(self) -> tuple[Tensor, Tensor]:
        parts = [stream.prompt() for stream in self.streams]
        width = max(mask.shape[1] for _, mask in parts)
        states = [pad(state, (0, 0, width - state.shape[1], 0)) for state, _ in parts]
        return torch.cat(states), torch.cat([pad(mask, (width - mask.shape[1], 0)) for _, mask in parts])

    def reorder(self, order: Tensor) -> None:
        wanted = order.tolist()
        first = {number: place for place, number in reversed(list(enumerate(wanted)))}
        self.streams = [
            self.streams[i] if first[i] == place else self.streams[i].fork(1) for place, i in enumerate(wanted)
        ]

    def fork(self, times: int) -> Apart:
        return Apart([stream.fork(1) for stream in self.streams for _ in range(times)])


def open_stream(model: nn.Module, prompts: Sequence[Sequence[int]], **options: Any) -> Stream | Apart:
    """The stream of a model; rows of different lengths run apart where a state would run through the padding."""
    if is_stateful(model) and len({len(prompt) for prompt in prompts}) > 1:
        return Apart([Stream(model, [prompt], **options) for prompt in prompts])
    return Stream(model, prompts, **options)


def inner(model: Any) -> Any:
    """The model of transformers inside PEFT's wrapper, whose `forward` names its arguments."""
    find = getattr(model, "get_base_model", None)
    return find() if find is not None else model


def is_stateful(model: Any) -> bool:
    """Whether it carries a state along the row, which padding would change."""
    return bool(getattr(inner(model), "_is_stateful", False))


def takes(model: nn.Module) -> frozenset[str]:
    """Names of what its `forward` takes."""
    return frozenset(inspect.signature(inner(model).forward).parameters)


def _start(model: Any) -> int:
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "decoder_start_token_id", None)
        if isinstance(found, int):
            return found
    raise InputError("says of no token that answers start with it (decoder_start_token_id)", where="model")
