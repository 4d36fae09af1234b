"""How probable a model finds given continuations: sums of log-probabilities, in batches.

    log p(continuation | prompt) = sum over its tokens of log p(token | prompt, tokens before it)      in nats

Rows are padded on the right, where a causal model does not look, so no mask is needed and a row's value does not
depend on its batch. The head, often the dearest matrix of all, is computed only from the first position of the batch
that predicts a continuation token on: rows of like prompt and like length go together, so that is nearly none too many.
An encoder-decoder model reads the prompt in its encoder and is scored on the continuation in its decoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from luthier.decode.inputs import check_ids, context_length
from luthier.errors import InputError
from luthier.models.modes import evaluating

LOGIT_BYTES = 256 * 2**20  # float32 logits of one batch


class Likelihood(NamedTuple):
    """Of one continuation: its log-probability in nats, summed over tokens, and how many tokens those were."""

    logprob: float
    tokens: int


def likelihoods(
    model: nn.Module,
    prompts_ids: Sequence[Sequence[int]],
    continuation_ids: Sequence[Sequence[int]],
    *,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> list[Likelihood]:
    """The likelihood of `continuation_ids[i]` after `prompts_ids[i]`, for each i, in their order.

    Args:
        model: a causal or encoder-decoder language model of transformers, plain or wrapped by PEFT.
        prompts_ids: token ids of the prompts, each at least one (a text without a prompt gives its first token).
        continuation_ids: token ids of the continuations; an empty one has log-probability 0 and 0 tokens.
        batch_tokens: tokens, padding included, that one batch may hold.
        progress: called with (rows done, rows in all) after every batch.

    Raises `InputError` for an empty prompt, unknown ids, lists of different length, or a row longer than the context.
    """
    if len(prompts_ids) != len(continuation_ids):
        raise InputError(f"{len(prompts_ids)} prompts, but {len(continuation_ids)} continuations")
    check_ids(model, prompts_ids, "prompt")
    check_ids(model, continuation_ids, "continuation", empty=True)
    plain: Any = model
    seq2seq = bool(getattr(plain.config, "is_encoder_decoder", False))
    rows = list(zip([list(p) for p in prompts_ids], [list(c) for c in continuation_ids], strict=True))
    _check_context(model, rows, seq2seq)
    done: list[Likelihood | None] = [None] * len(rows)
    finished = 0
    score = _score_seq2seq if seq2seq else _score_causal
    vocabulary = int(plain.get_input_embeddings().weight.shape[0])
    with evaluating(model), torch.no_grad():
        for batch in _batches(rows, batch_tokens, vocabulary):
            sums = score(plain, [rows[i] for i in batch])
            for index, value in zip(batch, sums.tolist(), strict=True):
                done[index] = Likelihood(value, len(rows[index][1]))
            finished += len(batch)
            if progress is not None:
                progress(finished, len(rows))
    return [likelihood for likelihood in done if likelihood is not None]


Pair = tuple[list[int], list[int]]


def _score_causal(model: Any, rows: list[Pair]) -> Tensor:
    """(rows,) float64 sums for one batch of (prompt, continuation)."""
    if not any(continuation for _, continuation in rows):
        return torch.zeros(len(rows), dtype=torch.float64)
    ids = _padded([(prompt + continuation)[:-1] for prompt, continuation in rows], 0)
    # The earliest position that predicts a token of some continuation.
    first = min(len(prompt) for prompt, continuation in rows if continuation) - 1
    targets = torch.full_like(ids, -100)
    for row, (prompt, continuation) in enumerate(rows):
        start = len(prompt) - 1
        targets[row, start : start + len(continuation)] = torch.tensor(continuation, dtype=torch.int64)
    device = model.get_input_embeddings().weight.device
    ids, targets = ids.to(device), targets[:, first:].to(device)
    narrow = "logits_to_keep" in inspect.signature(_innermost(model).forward).parameters
    extra = {"logits_to_keep": targets.shape[1]} if narrow else {}
    logits = model(input_ids=ids, use_cache=False, **extra).logits
    return _sums(logits[:, -targets.shape[1] :], targets)


def _score_seq2seq(model: Any, rows: list[Pair]) -> Tensor:
    """(rows,) float64 sums for one batch of (encoder ids, decoder ids)."""
    device = model.get_input_embeddings().weight.device
    ids = _padded([prompt for prompt, _ in rows], 0).to(device)
    mask = _padded([[1] * len(prompt) for prompt, _ in rows], 0).to(device)
    targets = _padded([continuation or [-100] for _, continuation in rows], -100).to(device)
    logits = model(input_ids=ids, attention_mask=mask, labels=targets, use_cache=False).logits
    return _sums(logits, targets)


def _sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of log-probabilities of `targets` (rows, length) under `logits` (rows, length, vocabulary), without -100."""
    sums = []
    for row, labels in zip(logits, targets, strict=True):
        chosen = labels != -100
        sums.append(-F.cross_entropy(row[chosen].float(), labels[chosen], reduction="none").double().sum())
    return torch.stack(sums)


def _batches(rows: list[Pair], batch_tokens: int, vocabulary: int) -> list[list[int]]:
    """Row numbers that run together: the longest first, within `batch_tokens` and the memory for logits."""
    batches: list[list[int]] = []
    longest = shortest_prompt = 0
    for number in sorted(range(len(rows)), key=lambda i: (-len(rows[i][0]) - len(rows[i][1]), -len(rows[i][0]), i)):
        prompt, continuation = rows[number]
        if batches:
            count, shortest = len(batches[-1]) + 1, min(shortest_prompt, len(prompt))
            scored = count * (longest - shortest) * vocabulary * 4
            if count * longest <= batch_tokens and scored <= LOGIT_BYTES:
                batches[-1].append(number)
                shortest_prompt = shortest
                continue
        batches.append([number])
        longest, shortest_prompt = len(prompt) + len(continuation), len(prompt)
    return batches


def _padded(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64)


def _innermost(model: Any) -> Any:
    """The model of transformers inside PEFT's wrapper, whose `forward` names its arguments."""
    find = getattr(model, "get_base_model", None)
    return find() if find is not None else model


def _check_context(model: nn.Module, rows: list[Pair], seq2seq: bool) -> None:
    context = context_length(model)
    if context is None:
        return
    for number, (prompt, continuation) in enumerate(rows):
        length = max(len(prompt), len(continuation)) if seq2seq else len(prompt) + len(continuation)
        if length > context:
            raise InputError(
                f"prompt and continuation have {length} tokens, but the model's context ends at {context}",
                where=f"prompt {number}",
                fix="shorten it",
            )
