"""Generation in batches whose results do not depend on the batch.

transformers' own `generate` does the work, cache included; this file settles what around it would make results depend
on circumstances:

    padding     on the left, with a mask; positions follow from the mask. An encoder counts positions from the left
                edge, so its padding is on the right. Models that carry a state along the row and would drag it
                through the padding get batches of equal lengths only.
    ends        every token that ends an answer: those of the model's generation config, the tokenizer's, and what the
                chat template ends a turn with. A model tuned on `<|im_end|>` never writes the `</s>` others watch for.
    penalties   the repetition penalties and n-gram bans of a model's generation config are off: the answers shown are
                the model's own.
    sampling    noise comes from a generator per prompt, seeded by (seed, number of the prompt), never from the global
                state: adding Gumbel noise to log-probabilities and taking the largest is sampling from them
                (Gumbel 1954; Maddison, Tarlow and Minka 2014, arXiv 1411.0030). The same prompt in another batch
                draws the same words.
    context     no row writes past the model's context; rows near it get batches of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from luthier.data.templates import end_token_ids
from luthier.decode.inputs import check_ids, context_length
from luthier.errors import InputError
from luthier.models.modes import evaluating

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        ids: the new tokens, without the prompt and without the token that ended it; with those of a stop string.
        text: `ids` as text without special tokens, cut before the first stop string.
        finished: whether the model ended by itself (end token or stop string), not by running out of tokens.
    """

    ids: list[int]
    text: str
    finished: bool


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[Generation]:
    """Continue each of `prompts` (token ids, as `luthier.data.encode.prompt_ids` gives them), in their order.

    Args:
        model: a causal or encoder-decoder language model of transformers, plain or wrapped by PEFT.
        tokenizer: its tokenizer, for the end tokens and the text.
        prompts: token ids; for an encoder-decoder model the encoder's.
        max_new_tokens: at most this many per prompt; fewer where the context ends before.
        stop: strings that end an answer.
        temperature: 0 takes the most probable token, 1 samples from the model's distribution.
        top_p: sample from the smallest set of tokens whose probabilities add up to this, in (0, 1].
        seed: of the sampling.
        batch_tokens: prompt and new tokens, padding included, that one batch may hold.
        progress: called with (prompts done, prompts in all) after every batch.

    Raises `InputError` for an empty prompt, one that fills the whole context, unknown ids, or a setting out of range.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or any(not text for text in stop):
        raise InputError(
            "generation needs max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1 and stop strings that are not "
            f"empty, got {max_new_tokens}, {temperature}, {top_p}, {list(stop)}"
        )
    check_ids(model, prompts, "prompt")
    ends = _ends(model, tokenizer, stop)
    done: list[Generation | None] = [None] * len(prompts)
    finished = 0
    for batch, room in _batches(model, prompts, max_new_tokens, batch_tokens):
        watch = _Watch(tokenizer, tuple(stop), len(batch))
        noise = LogitsProcessorList([_Noise(temperature, top_p, seed, batch)] if temperature > 0 else [])
        new = _run(model, tokenizer, [prompts[i] for i in batch], room, ends, watch, noise)
        for row, index in enumerate(batch):
            done[index] = _answer(tokenizer, new[row], watch.stopped[row], ends, stop)
        finished += len(batch)
        if progress is not None:
            progress(finished, len(prompts))
    return [generation for generation in done if generation is not None]


def _run(
    model: Any,
    tokenizer: Any,
    prompts: list[Sequence[int]],
    room: int,
    ends: list[int],
    watch: _Watch,
    noise: LogitsProcessorList,
) -> list[list[int]]:
    """The new ids of each prompt of one batch, all `room` of them or until every row has ended."""
    pad = tokenizer.pad_token_id
    pad = pad if pad is not None else (ends[0] if ends else 0)
    width = max(map(len, prompts))
    device = model.get_input_embeddings().weight.device
    seq2seq = bool(model.config.is_encoder_decoder)
    ids = torch.tensor([_filled(prompt, width, pad, seq2seq) for prompt in prompts], device=device)
    mask = torch.tensor([_filled([1] * len(prompt), width, 0, seq2seq) for prompt in prompts], device=device)
    config = GenerationConfig(  # what is not named here comes from the model's own
        max_new_tokens=room,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=ends or None,
    )
    watch.prompt_length = 1 if seq2seq else width
    with evaluating(model), torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([watch] if watch.stop else []),
            logits_processor=noise,
        )
    return out[:, watch.prompt_length :].tolist()


def _filled(prompt: Sequence[int], width: int, value: int, right: bool) -> list[int]:
    """`prompt` filled up to `width`."""
    fill = [value] * (width - len(prompt))
    return [*prompt, *fill] if right else [*fill, *prompt]


def _answer(tokenizer: Any, new: list[int], stopped: int | None, ends: list[int], stop: Sequence[str]) -> Generation:
    """Cut what a finished row was filled up with, and the text at the first stop string."""
    end = next((i for i, token in enumerate(new) if token in ends), None)
    if stopped is not None and (end is None or stopped <= end):
        ids = new[:stopped]
        finished = True
    else:
        ids, finished = (new, False) if end is None else (new[:end], True)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    found = [at for at in (text.find(word) for word in stop) if at >= 0]
    return Generation(ids, text[: min(found)] if found else text, finished)


def _ends(model: nn.Module, tokenizer: Any, stop: Sequence[str]) -> list[int]:
    """All end tokens of model and tokenizer, and stop strings that are tokens of their own, sorted."""
    added = tokenizer.get_added_vocab()
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = of_model if isinstance(of_model, list) else [] if of_model is None else [of_model]
    return sorted({*map(int, listed), *end_token_ids(tokenizer), *(added[word] for word in stop if word in added)})


def _batches(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_tokens: int
) -> list[tuple[list[int], int]]:
    """Prompt numbers that run together, and how many tokens they may write; the longest prompts first."""
    context = context_length(model)
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    alike = bool(getattr(model, "_is_stateful", False))  # a recurrent state would run through the padding
    room = []
    for number, prompt in enumerate(prompts):
        left = None if context is None else context - (0 if seq2seq else len(prompt))
        if context is not None and (len(prompt) > context or (left is not None and left < 1)):
            raise InputError(
                f"it has {len(prompt)} tokens, but the model's context ends at {context}",
                where=f"prompt {number}",
                fix="shorten it",
            )
        room.append(max_new_tokens if left is None else min(max_new_tokens, left))
    batches: list[tuple[list[int], int]] = []
    for number in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)):
        if batches:
            batch, allowed = batches[-1]
            longest = len(prompts[batch[0]])
            fits = (len(batch) + 1) * (longest + allowed) <= batch_tokens
            if fits and allowed == room[number] and not (alike and longest != len(prompts[number])):
                batch.append(number)
                continue
        batches.append(([number], room[number]))
    return batches


class _Watch(StoppingCriteria):
    """Looks for stop strings in the new text of every row and remembers where each was found."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], rows: int):
        self.tokenizer, self.stop = tokenizer, stop
        self.prompt_length = 0
        self.stopped: list[int | None] = [None] * rows  # new tokens up to and with the stop string
        self.tail = max((len(text.encode()) for text in stop), default=0) + 4  # a token is at least one byte

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        new = input_ids[:, self.prompt_length :]
        texts = self.tokenizer.batch_decode(new[:, -self.tail :].tolist(), skip_special_tokens=True)
        for row, text in enumerate(texts):
            if self.stopped[row] is None and any(word in text for word in self.stop):
                self.stopped[row] = new.shape[1]
        return torch.tensor([at is not None for at in self.stopped], device=input_ids.device)


class _Noise(LogitsProcessor):
    """Turns the most probable token into a sample: temperature, the `top_p` set, then Gumbel noise per prompt."""

    def __init__(self, temperature: float, top_p: float, seed: int, prompts: Sequence[int]):
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self.prompts = prompts
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.generators:
            for number in self.prompts:
                generator = torch.Generator(device=scores.device)
                self.generators.append(generator.manual_seed((self.seed * 1_000_003 + number) % 2**63))
        logprobs = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        if self.top_p < 1:
            ordered, order = logprobs.sort(dim=-1, descending=True)
            probabilities = ordered.exp()
            outside = probabilities.cumsum(-1) - probabilities >= self.top_p  # the first token is always inside
            logprobs = logprobs.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
        rows = zip(logprobs, self.generators, strict=True)
        noise = torch.stack([torch.empty_like(row).exponential_(generator=generator) for row, generator in rows])
        return logprobs - noise.log()
