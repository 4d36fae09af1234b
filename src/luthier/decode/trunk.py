"""The first blocks of a model, run once for all terms that have them in common.

    lower = Lower(model, blocks, 15)
    states = lower.entrance(input_ids=ids)               what enters block 15; nothing from there on runs
    with lower.skipped(states): model(input_ids=ids)     goes on from there; blocks 0 to 14 do not run

An adapter or a delta that leaves the first blocks alone gives the same hidden states there as its base, bit for bit.
`Trunk` is the part that the streams of such terms share: these blocks, their keys and values, and the states behind
them. A stream's own cache begins at the block where the terms part; in the places before it stand transformers' dummy
layers, which hold nothing.

States are kept for the columns that some stream has yet to read, so at most one hidden state per token beside the
caches. A stream that was left behind reads them later, all at once. Its numbers are then those of a model that reads
its text in other pieces: equal up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import DynamicCache

if TYPE_CHECKING:
    from luthier.decode.streams import Stream

CACHE = "past_key_values"
DummyLayer: Any = getattr(cache_utils, "DummyLayer", None)  # which transformers before 5.21 does not have


class Lower:
    """The blocks before number `count`, apart from the rest of the model.

    Args:
        model: a causal language model of transformers, without PEFT's wrapper.
        blocks: all its blocks, in order of use.
        count: from 1 to one less than there are blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], count: int):
        self.model, self.blocks, self.count = model, list(blocks), count
        self._in_a_tuple = False  # what a block gives: its hidden states, or a tuple that begins with them

    def entrance(self, **given: Any) -> Tensor:
        """(rows, columns, width): what enters block `count` for these arguments of the model's `forward`."""

        def stop(block: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            raise _Reached(positional[0] if positional else named["hidden_states"])

        def look(block: nn.Module, positional: tuple[Any, ...], out: Any) -> None:
            self._in_a_tuple = isinstance(out, tuple)

        hooks = [
            self.blocks[self.count - 1].register_forward_hook(look),
            self.blocks[self.count].register_forward_pre_hook(stop, with_kwargs=True),
        ]
        try:
            self.model(**given)
        except _Reached as reached:
            return reached.states
        finally:
            for hook in hooks:
                hook.remove()
        raise RuntimeError(f"{type(self.model).__name__} does not run its block {self.count}")

    @contextmanager
    def skipped(self, states: Tensor) -> Iterator[None]:
        """While open, the model runs from block `count` on, and `states` enter there."""

        def enter(block: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
            return ((states, *positional[1:]), named) if positional else ((), {**named, "hidden_states": states})

        def passed(*positional: Any, **named: Any) -> Any:
            here = positional[0] if positional else named["hidden_states"]
            return (here, None) if self._in_a_tuple else here

        before = self.blocks[: self.count]
        own = [vars(block).get("forward") for block in before]
        hook = self.blocks[self.count].register_forward_pre_hook(enter, with_kwargs=True)
        for block in before:
            block.forward = passed
        try:
            yield
        finally:
            hook.remove()
            for block, forward in zip(before, own, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward


class Trunk:
    """What the streams of several terms have in common; they read the same tokens, if not all at the same time."""

    def __init__(self, lower: Lower):
        self.lower = lower
        self.streams: list[Stream] = []
        self.cache: dict[str, Any] = {}
        self.read = 0  # columns that have run
        self.first = 0  # the first column whose states are kept
        self.states: Tensor | None = None

    def cache_of(self, stream: Stream) -> dict[str, Any]:
        """An empty cache for the blocks of `stream` alone."""
        cache = empty_cache(self.lower.model, stream.goes_back)
        cache.layers[: self.lower.count] = [DummyLayer() for _ in range(self.lower.count)]
        return {CACHE: cache}

    @contextmanager
    def under(self, stream: Stream) -> Iterator[None]:
        """While open, the stream's model goes on from here with the columns that it has not read."""
        columns = stream.ids.shape[1]
        if self.read < columns:
            self._run(stream, columns)
        assert self.states is not None
        states = self.states[:, stream.start - self.first : columns - self.first]
        with self.lower.skipped(states.contiguous()):
            yield

    def _run(self, stream: Stream, columns: int) -> None:
        if not stream.use_cache:
            self.read, self.states = 0, None
        elif not self.cache:
            self.cache = {CACHE: empty_cache(self.lower.model, stream.goes_back)}
            del self.cache[CACHE].layers[self.lower.count :]
        given = stream.arguments(self.read, 1)
        new = self.lower.entrance(**given, **self.cache, use_cache=stream.use_cache)
        self.states = new if self.states is None else torch.cat([self.states, new], dim=1)
        self.read = columns

    def forget(self) -> None:
        """Drop the states that every stream has read."""
        first = min(stream.start for stream in self.streams)
        if self.states is not None and first > self.first:
            self.states = self.states[:, first - self.first :].clone() if first < self.read else None
            self.first = first

    def cut(self, keep: int) -> None:
        """Back to the first `keep` columns."""
        if self.read > keep:
            for cache in self.cache.values():
                cache.crop(-(self.read - keep))
            self.states = self.states[:, : keep - self.first] if self.states is not None and keep > self.first else None
            self.read, self.first = keep, min(self.first, keep)

    def reorder(self, order: Tensor) -> None:
        """Rows in another order, maybe some twice or left out; the streams' own rows are theirs to order."""
        for cache in self.cache.values():
            cache.reorder_cache(order)
        self.states = None if self.states is None else self.states[order.to(self.states.device)]

    def whole(self, stream: Stream) -> dict[str, Any]:
        """A copy of the stream's cache, with that of these blocks in its place; it has read every column."""
        own, lower = copy.deepcopy(stream.cache), copy.deepcopy(self.cache)
        if own:
            if self.read > stream.read:
                lower[CACHE].crop(-(self.read - stream.read))
            own[CACHE].layers[: self.lower.count] = lower[CACHE].layers
        return own


def empty_cache(model: Any, goes_back: bool) -> DynamicCache:
    """The cache that a causal model of transformers makes; `goes_back` keeps what a window would let go of, until it is
    cropped."""
    cache = DynamicCache(config=model.config)
    if goes_back:
        getattr(cache, "activate_past_recording", bool)()
    return cache


class _Reached(Exception):
    """Ends a pass where its states are known."""

    def __init__(self, states: Tensor):
        self.states = states
