"""`token_logprobs`: the log-probability of every labelled token, and the one place where the head is computed.

The head of a language model (hidden size x vocabulary) is often the dearest matrix of all, and most of its products
are thrown away: prompt tokens carry no label. So the model is run once with its head fed nothing, what the head would
have been fed is caught on the way, and the head is computed only where a label exists, in chunks whose logits are
recomputed in the backward pass. Memory for logits is then (tokens per chunk x vocabulary) and not (rows x length x
vocabulary). Value and gradient equal the plain computation. Of a head that does not move, no logits are recomputed
either: see `frozen_head`.

Works for any causal model of transformers whose logits are an elementwise function of its output embedding: some
scale them (Cohere, Granite), some cap them (Gemma 2). Which function, is found once by holding candidates built from
the numbers in the model's config against the model's own logits; where none fits, the head runs over all labelled
positions at once inside the model itself, which is exact too and only needs more memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luthier.errors import InputError
from luthier.models.modes import evaluating
from luthier.objectives import frozen_head
from luthier.objectives.anchor import BaseAnchor
from luthier.objectives.batch import Batch, labelled
from luthier.objectives.label_logprobs import label_logprobs

CHUNK_BYTES = 128 * 2**20  # float32 logits alive at a time

After = Callable[[Tensor], Tensor]
Scores = tuple[Tensor, Tensor, Tensor, Tensor]  # of tokens: log-probabilities, entropies, whether right, anchor's loss
_AFTER: WeakKeyDictionary[nn.Module, list[After | None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of the labelled tokens, in reading order (row by row).

    Attributes:
        logprobs: (tokens,) float32, natural log, one per labelled token, with gradient.
        rows: (tokens,) int64, the row of each token.
        positions: (tokens,) int64, the position of each token (of the label, not of the state that predicts it).
        entropy: (tokens,) float32 in nats, without gradient, of the full next-token distribution; None unless asked.
        correct: (tokens,) bool, whether no token was more probable than the label.
        anchored: (tokens,) float32 with gradient, the loss against the base; None unless asked.
    """

    logprobs: Tensor
    rows: Tensor
    positions: Tensor
    entropy: Tensor | None
    correct: Tensor
    anchored: Tensor | None = None

    def __getitem__(self, kept: Tensor) -> TokenLogprobs:
        """Those of some tokens; `kept` is (tokens,) bool."""
        entropy = None if self.entropy is None else self.entropy[kept]
        anchored = None if self.anchored is None else self.anchored[kept]
        rows, positions = self.rows[kept], self.positions[kept]
        return TokenLogprobs(self.logprobs[kept], rows, positions, entropy, self.correct[kept], anchored)


def token_logprobs(
    model: nn.Module,
    batch: Batch,
    *,
    entropy: bool = False,
    chunk_tokens: int | None = None,
    anchor: BaseAnchor | None = None,
) -> TokenLogprobs:
    """Log-probability of each labelled token of `batch` under the causal model `model`.

    Args:
        model: a causal language model, plain, wrapped by PEFT, or by a distributed wrapper around either.
        batch: `input_ids` and `labels` (rows, length) int64, labels -100 where there is no loss and NOT shifted;
            optionally `attention_mask`, `position_ids` (rows, length).
        entropy: also return the entropy of each next-token distribution.
        chunk_tokens: labelled tokens per chunk of the head; default: as many as fit 128 MiB of float32 logits.
        anchor: also return each token's loss against the base, for which the base runs once more without gradient.

    A batch without any label gives empty tensors. Raises `InputError` if the model has no output embedding, or one
    that moves while there is an anchor and is computed apart.
    """
    labels = batch["labels"]
    chosen = labelled(labels)
    rows, before = chosen.nonzero(as_tuple=True)
    targets = labels[rows, before + 1]
    plain = unwrapped(model)
    head = _head(plain)
    after = _after_head(plain, head, batch)
    inputs = {k: v for k, v in batch.items() if k != "labels"}

    def run() -> Tensor:
        """(tokens, width): what the head is fed; or (tokens, vocabulary) logits where it runs inside the model."""
        if after is None:
            with _feed(head, lambda hidden: hidden[:, :-1][chosen][None]):
                return _logits(model(**inputs, use_cache=False))[0]
        caught: list[Tensor] = []
        with _feed(head, lambda hidden: hidden[..., :0, :], caught):
            model(**inputs, use_cache=False)
        return caught[0][:, :-1][chosen]

    base: Tensor | None = None
    if anchor is not None:
        with torch.no_grad(), evaluating(model), anchor.base() or nullcontext():
            base = run()
        if after is not None and frozen_head.moves(head, base):
            raise InputError("the head moves, and an anchor takes the base to have the same", fix="leave the head out")
    hidden = run()
    frozen = after is not None and anchor is None and frozen_head.applies(head, hidden)

    def score(part: Tensor, labels: Tensor, of_base: Tensor | None) -> Scores:
        def logits(fed: Tensor) -> Tensor:
            # Without the module's hooks: FSDP2's count each of its calls, and the weights are gathered already.
            return fed.float() if after is None else after(head.forward(fed)).float()

        said = logits(part)
        logprobs, entropies, correct = _score(said, labels, entropy, spend=frozen)
        if anchor is None or of_base is None:
            return logprobs, entropies, correct, logprobs.new_empty(0)
        with torch.no_grad():
            target = logits(of_base)
        return logprobs, entropies, correct, anchor.loss(said, target)

    if frozen:
        size = chunk_tokens or frozen_head.tokens_at_a_time(hidden, _width(head))
        logprobs, entropies, correct, anchored = frozen_head.scored(
            lambda part, labels: score(part, labels, None), hidden, targets, size
        )
    else:
        size = len(targets) if after is None else chunk_tokens or max(1, CHUNK_BYTES // (4 * _width(head)))
        logprobs, entropies, correct, anchored = _chunked(score, hidden, targets, base, size)
    return TokenLogprobs(
        logprobs, rows, before + 1, entropies if entropy else None, correct, anchored if anchor else None
    )


def head_logits(model: nn.Module, batch: Batch, fed: Tensor) -> Tensor | None:
    """(tokens, vocabulary) float32 logits that `model` makes of what its head was fed, (tokens, width); no gradient.

    None where no known function leads from the head's output to the logits. Nothing drops out.
    """
    plain = unwrapped(model)
    head = _head(plain)
    with torch.no_grad():
        after = _after_head(plain, head, batch)
        with evaluating(head):
            return None if after is None else after(head.forward(fed)).float()


def head_of(model: nn.Module) -> nn.Module:
    """The output embedding of a model, plain or wrapped; `InputError` if it has none."""
    return _head(unwrapped(model))


def _chunked(score: Callable[..., Scores], hidden: Tensor, targets: Tensor, base: Tensor | None, size: int) -> Scores:
    """Score `hidden` (tokens, width) chunk by chunk; only one chunk's logits live at a time, in both passes."""
    if len(targets) <= size:
        return score(hidden, targets, base)
    pieces: list[Scores] = []
    parts = base.split(size) if base is not None else [None] * -(-len(targets) // size)
    for part, labels, of_base in zip(hidden.split(size), targets.split(size), parts, strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(score, part, labels, of_base, use_reentrant=False))
        else:
            pieces.append(score(part, labels, of_base))
    logprobs, entropies, correct, anchored = (torch.cat(column) for column in zip(*pieces, strict=True))
    return logprobs, entropies, correct, anchored


def _score(logits: Tensor, targets: Tensor, entropy: bool, spend: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, vocabulary) float32 logits -> log-probability of the target, entropy, whether it is the maximum."""
    logprobs = label_logprobs(logits, targets, spend)
    with torch.no_grad():
        correct = logits.gather(1, targets[:, None])[:, 0] >= logits.amax(-1)
        entropies = _entropy(logits) if entropy else logprobs.new_empty(0)
    return logprobs, entropies, correct


def _entropy(logits: Tensor) -> Tensor:
    # Unchecked: what is not a number is told of by the loop, and the check fails for no rows.
    return torch.distributions.Categorical(logits=logits, validate_args=False).entropy()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model below DistributedDataParallel and torch.compile; PEFT's wrapper stays."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module) or hasattr(model, "get_output_embeddings"):
            return model
        model = inner


def _head(model: nn.Module) -> nn.Module:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    if not isinstance(head, nn.Module):
        raise InputError(
            f"{type(model).__name__} has no output embedding, so it gives no token probabilities",
            fix="use a causal language model (model.kind: causal-lm)",
        )
    return head


def _width(head: nn.Module) -> int:
    weight: Any = getattr(head, "weight", None)
    if weight is None and hasattr(head, "get_base_layer"):
        weight = head.get_base_layer().weight  # type: ignore[operator]
    return int(weight.shape[0]) if weight is not None else 50_000


def _logits(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


@contextmanager
def _feed(head: nn.Module, change: Callable[[Tensor], Tensor], caught: list[Tensor] | None = None) -> Iterator[None]:
    """While open, `head` is fed `change(input)`; its true input is appended to `caught`."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if caught is not None:
            caught.append(args[0])
        return (change(args[0]), *args[1:])

    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _after_head(model: nn.Module, head: nn.Module, batch: Batch) -> After | None:
    """What the model does to its head's output, found once per model; None if it is not a known function."""
    known = _AFTER.get(head)
    if known is None:
        known = _AFTER[head] = [_find_after(model, head, batch)]
    return known[0]


def _find_after(model: nn.Module, head: nn.Module, batch: Batch) -> After | None:
    """Hold the candidates against the model's own logits, at inputs so large that a cap or a factor shows."""
    ids = batch["input_ids"][:1, :8]
    caught: list[Tensor] = []
    devices = [ids.device] if ids.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        with _feed(head, lambda hidden: hidden, caught):
            model(input_ids=ids, use_cache=False)
        stretched = caught[0] * (60 / head.forward(caught[0]).float().abs().max().clamp_min(1e-6)).to(caught[0].dtype)
        raw = head.forward(stretched).float()
        with _feed(head, lambda hidden: stretched):
            truth = _logits(model(input_ids=ids, use_cache=False)).float()
    for after in _candidates(model):
        guess = after(raw)
        if guess.shape == truth.shape and torch.allclose(guess, truth, rtol=1e-5, atol=1e-4):
            return after
    return None


def _candidates(model: nn.Module) -> Iterator[After]:
    """Elementwise functions that a config's numbers can mean: none, a factor, a divisor, a soft cap."""
    yield lambda z: z
    config = getattr(model, "config", None)
    values = config.get_text_config().to_dict().values() if config is not None else ()
    numbers = sorted({float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0})
    for number in numbers:
        yield from _functions(number)


def _functions(number: float) -> tuple[After, After, After]:
    return (lambda z: z * number), (lambda z: z / number), (lambda z: torch.tanh(z / number) * number)
