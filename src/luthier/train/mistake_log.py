"""The mistake log: what a model saw, thought and got wrong in its last rounds, kept small and without a graph.

    part = record(model, batch, seen)          one micro-batch, from its own forward pass
    log.add([part, ...])                       one round: all micro-batches of an optimiser step
    log.draw()                                 a round of the buffer, uniformly, the newest included

A stretch is a run of labelled tokens with all that stands before it in its sequence, as generation would see it: an
answer with its prompt, and of a conversation each answer with everything before. Of each stretch are kept, on the
processor: the embeddings of the tokens before it (X~), and for each of its tokens the mean over the model's layers of
the state that gave the prediction (Pool(h), all that a Copilot reads of h), the label, and the `KEPT` largest
probabilities. Numbers are float16. Errors are made of these when a round is drawn: what is left of 1 is spread evenly
over the other tokens, so that an error sums to 0. With a vocabulary of up to `KEPT` nothing is left out.

Bytes: 2 x width for each token before a stretch and for each of its tokens, and 6 x KEPT for each of its tokens; at a
width of 2048 and 16 rows of 100 + 100 tokens that is 14 MB a round, 1.8 GB for 128 rounds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from luthier.errors import InputError
from luthier.objectives.batch import Batch, labelled
from luthier.objectives.logprobs import CHUNK_BYTES, head_logits, head_of

KEPT = 128  # probabilities of each token
_LARGEST = 65504.0  # of float16


@dataclass
class Seen:
    """What a watched forward pass left.

    Attributes:
        states: before the first block and after every block, (rows, length, width) each.
        fed: the same of what the head was fed.
        logits: that the model gave: (1, labelled tokens, vocabulary), or of no token at all.
    """

    states: tuple[Tensor, ...] = ()
    fed: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Part:
    """The stretches of one micro-batch, one after the other.

    Attributes:
        prompts: (tokens before stretches, width) float16, X~.
        before: (stretches,) int64, how many of these belong to each.
        states: (labelled tokens, width) float16, Pool(h).
        counts: (stretches,) int64, labelled tokens of each.
        labels: (labelled tokens,) int32.
        tokens, probabilities: (labelled tokens, kept), int32 and float16: the largest probabilities.
    """

    prompts: Tensor
    before: Tensor
    states: Tensor
    counts: Tensor
    labels: Tensor
    tokens: Tensor
    probabilities: Tensor

    def laid_out(self, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `luthier.models.copilot.Copilot` takes, and which tokens are real: errors (stretches, n, vocabulary),
        prompt (stretches, columns, width), visible (stretches, columns), states (stretches, n, width), real
        (stretches, n); float32 and bool, filled up on the right."""
        at = self.counts.tolist()
        labels, tokens, probabilities = (t.to(device) for t in (self.labels, self.tokens, self.probabilities))
        errors = errors_of(labels, tokens, probabilities, vocabulary)
        prompt = _padded(self.prompts.to(device).float().split(self.before.tolist()))
        visible = torch.arange(prompt.shape[1]) < self.before[:, None]
        real = torch.arange(max(at)) < self.counts[:, None]
        states = _padded(self.states.to(device).float().split(at))
        return _padded(errors.split(at)), prompt, visible.to(device), states, real.to(device)


class MistakeLog:
    """The last `size` rounds; what is drawn comes from a generator of its own."""

    def __init__(self, size: int, generator: torch.Generator):
        self.rounds: deque[list[Part]] = deque(maxlen=size)
        self.generator = generator

    def __len__(self) -> int:
        return len(self.rounds)

    def add(self, parts: Sequence[Part]) -> None:
        self.rounds.append(list(parts))

    def draw(self) -> list[Part]:
        return self.rounds[int(torch.randint(len(self.rounds), (1,), generator=self.generator))]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All of it, as `<round>.<part>.<name>`, the oldest round first."""
        return {
            f"{number}.{place}.{name}": tensor
            for number, parts in enumerate(self.rounds)
            for place, part in enumerate(parts)
            for name, tensor in vars(part).items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        rounds: dict[int, dict[int, dict[str, Tensor]]] = {}
        for key, tensor in tensors.items():
            at, place, name = key.split(".")
            rounds.setdefault(int(at), {}).setdefault(int(place), {})[name] = tensor
        self.rounds.clear()
        for _, parts in sorted(rounds.items()):
            self.add([Part(**part) for _, part in sorted(parts.items())])


@contextmanager
def watched(model: nn.Module, batch: Batch) -> Iterator[Seen]:
    """While open, forward passes of `model` over this very batch also give their hidden states; the last one is kept.

    Nothing that the model computes changes. Raises `InputError` if it gives no hidden states.
    """
    seen, ids = Seen(), batch["input_ids"]

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return (args, kwargs | {"output_hidden_states": True}) if kwargs.get("input_ids") is ids else None

    def behind(module: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
        if kwargs.get("input_ids") is not ids:
            return
        states = getattr(out, "hidden_states", None)
        if states is None:
            raise InputError(f"{type(model).__name__} gives no hidden states, which a Copilot reads", where="copilot")
        seen.states = tuple(state.detach() for state in states)
        seen.logits = out.logits.detach()  # type: ignore[attr-defined]

    def fed(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.fed = args[0].detach()

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(behind, with_kwargs=True),
        head_of(model).register_forward_pre_hook(fed),  # comes before hooks that change what the head is fed
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def record(model: nn.Module, batch: Batch, seen: Seen) -> Part | None:
    """The part of a round that one forward pass gives; None if nothing is labelled. The head runs once more, over the
    labelled tokens, as the model stands before its step."""
    labels = batch["labels"]
    chosen = labelled(labels)
    if not bool(chosen.any()):
        return None
    if not seen.states:
        raise InputError("this objective does not run the model on the rows as they are", where="train.copilot")
    rows, places = chosen.nonzero(as_tuple=True)  # where predictions are made
    pooled = torch.stack([state[rows, places].float() for state in seen.states[1:]]).mean(0)
    tokens, probabilities = _largest(model, batch, seen, rows, places)
    rows, places = rows.cpu(), places.cpu()
    new = torch.ones(len(rows), dtype=torch.bool)
    new[1:] = (rows[1:] != rows[:-1]) | (places[1:] != places[:-1] + 1)
    first = new.nonzero()[:, 0]
    counts = torch.diff(first, append=torch.tensor([len(rows)]))
    begins = _begins(batch).cpu()[rows[first], places[first]]
    ends = places[first] + 1
    spans = zip(rows[first].tolist(), begins.tolist(), ends.tolist(), strict=True)
    embedded = seen.states[0]
    return Part(
        prompts=_half(torch.cat([embedded[row, begin:end] for row, begin, end in spans])),
        before=ends - begins,
        states=_half(pooled),
        counts=counts,
        labels=labels[:, 1:][chosen].int().cpu(),
        tokens=tokens.int().cpu(),
        probabilities=_half(probabilities),
    )


def errors_of(labels: Tensor, tokens: Tensor, probabilities: Tensor, vocabulary: int) -> Tensor:
    """(n, vocabulary) float32: onehot(label) - probabilities, of which (n, kept) are known, the rest spread evenly."""
    kept, count = probabilities.float(), probabilities.shape[1]
    rest = (1 - kept.sum(-1, keepdim=True)).clamp(min=0) / max(1, vocabulary - count)
    spread = rest.expand(-1, vocabulary).scatter(1, tokens.long(), kept)
    errors = -spread / spread.sum(-1, keepdim=True)
    at = labels.long()[:, None]
    return errors.scatter_add_(1, at, torch.ones_like(at, dtype=errors.dtype))


def _largest(model: nn.Module, batch: Batch, seen: Seen, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, kept) int64 and float32: the most probable tokens and their probabilities."""
    fed, width = seen.fed[rows, places], int(getattr(head_of(model), "out_features", 0) or 50_000)
    size = max(1, CHUNK_BYTES // (4 * width))
    if head_logits(model, batch, fed[:1]) is None:  # then the model itself has given the labelled tokens' logits
        pieces = seen.logits[0].split(size)
    else:
        pieces = [head_logits(model, batch, part) for part in fed.split(size)]
    found = [torch.softmax(logits.float(), -1).topk(min(KEPT, logits.shape[-1]), dim=-1) for logits in pieces]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def _begins(batch: Batch) -> Tensor:
    """(rows, length) int64: the column at which the sequence of each token begins."""
    columns = torch.arange(batch["labels"].shape[1], device=batch["labels"].device).expand_as(batch["labels"])
    if "position_ids" not in batch:
        return torch.zeros_like(columns)
    return torch.where(batch["position_ids"] == 0, columns, 0).cummax(1).values


def _half(tensor: Tensor) -> Tensor:
    return tensor.detach().float().clamp(-_LARGEST, _LARGEST).half().cpu()


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(rows), batch_first=True)
