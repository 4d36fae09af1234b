"""Generation in batches whose results do not depend on the batch.

transformers' own `generate` does the work, cache included; this file settles what around it would make results depend
on circumstances:

    padding     on the left, with a mask; positions follow from the mask. An encoder counts positions from the left
                edge, so its padding is on the right. Models that carry a state along the row and would drag it
                through the padding get batches of equal lengths only.
    ends        every token that ends an answer: those of the model's generation config, the tokenizer's, and what the
                chat template ends a turn with. A model tuned on `<|im_end|>` never writes the `</s>` others watch for.
    penalties   the repetition penalties and n-gram bans of a model's generation config are off: the answers shown are
                the model's own. What is wanted is named in the `Sampler`.
    sampling    a prompt's draws depend on seed and prompt alone (`luthier.decode.sampling`).
    context     no row writes past the model's context; rows near it get batches of their own.
    mixtures    several models that a decoder mixes are one model here (`luthier.decode.mixture`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from luthier.decode.inputs import check_ids, context_length, end_ids
from luthier.decode.mixture import Mixture
from luthier.decode.sampling import Numbers, Sampler
from luthier.errors import InputError
from luthier.models.modes import evaluating

Progress = Callable[[int, int], None]
Tell = Callable[[Sequence[int], Sequence[int]], None]
Prompts = Sequence[Sequence[int]]
NO_TOKEN = 2**40  # no model has a token of this number; None would leave the model's own end tokens on


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        ids: the new tokens, without the prompt and without the token that ended it; with those of a stop string.
        text: `ids` as text without special tokens, cut before the first stop string.
        finished: whether the model ended by itself (end token or stop string), not by running out of tokens.
        logprobs: of a mixture, if asked for: by term and for `mixture` the log-probability (nats) that each token of
            `ids` had before the sampler; and what the decoder traced, under `trace.` and its name.
    """

    ids: list[int]
    text: str
    finished: bool
    logprobs: dict[str, list[Any]] = field(default_factory=dict)


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    batch_tokens: int = 4096,
    stop_at_eos: bool = True,
    own_prompts: Mapping[str, Prompts] | None = None,
    keep_logprobs: bool = False,
    first_number: int = 0,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> list[Generation]:
    """Continue each of `prompts` (token ids, as `luthier.data.encode.prompt_ids` gives them), in their order.

    Args:
        model: a causal or encoder-decoder language model of transformers, plain or wrapped by PEFT, or a `Mixture`.
        tokenizer: its tokenizer, for the end tokens and the text.
        prompts: token ids; for an encoder-decoder model the encoder's.
        max_new_tokens: at most this many per prompt; fewer where the context ends before.
        stop: strings that end an answer.
        temperature, top_p, top_k, min_p, repetition_penalty, seed: see `luthier.decode.sampling.Sampler`.
        batch_tokens: prompt and new tokens, padding included, that one batch may hold.
        stop_at_eos: whether an end token ends an answer; without, only `stop` and `max_new_tokens` do.
        own_prompts: of a mixture, the prompts of terms that read others than `prompts`, in the same order.
        first_number: of the first prompt, where these are a part of many: draws depend on a prompt's number.
        keep_logprobs: of a mixture, keep each term's log-probability of every token.
        progress: called with (prompts done, prompts in all) after every batch.
        tell: called with the numbers of the prompts of a batch and their new tokens, as they are drawn; behind the end
            of an answer come fillers.

    Raises `InputError` for an empty prompt, one that fills the whole context, unknown ids, or a setting out of range.
    """
    if max_new_tokens < 1 or any(not text for text in stop):
        raise InputError(
            "generation needs max_new_tokens >= 1 and stop strings that are not empty, "
            f"got {max_new_tokens} and {list(stop)}"
        )
    sampler = _sampler(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    check_ids(model, prompts, "prompt")
    own = _own(model, prompts, own_prompts, keep_logprobs)
    ends = _ends(model, tokenizer, stop) if stop_at_eos else []
    done: list[Generation | None] = [None] * len(prompts)
    finished = 0
    for batch, room in _batches(model, prompts, own, max_new_tokens, batch_tokens):
        watch = _Watch(tokenizer, tuple(stop), len(batch))
        here = [prompts[i] for i in batch]
        streamer = _Tell(tell, batch) if tell else None
        theirs = {name: [given[i] for i in batch] for name, given in own.items()}
        if isinstance(model, Mixture) and model.decoder.draft:
            for index in batch:
                mine = {name: given[index] for name, given in own.items()}
                number = first_number + index
                done[index] = _ahead(model, tokenizer, mine, number, room, ends, tuple(stop), sampler, tell)
            finished += len(batch)
            if progress is not None:
                progress(finished, len(prompts))
            continue
        numbers = [first_number + i for i in batch]
        starting = model.prompted(theirs, numbers) if isinstance(model, Mixture) else nullcontext()
        with starting:
            new = _run(
                model,
                tokenizer,
                here,
                room,
                ends,
                watch,
                LogitsProcessorList([Numbers(), *sampler.processors(here, numbers)]),
                streamer,
            )
        logs = _logs(model, new) if keep_logprobs else [{}] * len(batch)
        for row, index in enumerate(batch):
            done[index] = _answer(tokenizer, new[row], watch.stopped[row], ends, stop, logs[row])
        finished += len(batch)
        if progress is not None:
            progress(finished, len(prompts))
    return [generation for generation in done if generation is not None]


def _ahead(
    model: Mixture,
    tokenizer: Any,
    own: Mapping[str, Sequence[int]],
    number: int,
    room: int,
    ends: list[int],
    stop: tuple[str, ...],
    sampler: Sampler,
    tell: Tell | None,
) -> Generation:
    """One answer, written ahead by one term and checked by the others."""
    from luthier.decode.speculative import speculate

    watch = _Watch(tokenizer, stop, 1)

    def ended(ids: list[int]) -> bool:
        if not ids:
            return False
        return ids[-1] in ends or (bool(stop) and watch.finds(ids))

    new = speculate(
        model,
        own,
        number=number,
        room=room,
        sampler=sampler,
        ended=ended,
        tell=(lambda token: tell([number], [token])) if tell else lambda token: None,
    ).ids
    stopped = len(new) if stop and watch.finds(new) else None
    return _answer(tokenizer, new, stopped, ends, stop, {})


def _sampler(
    temperature: float, top_p: float, top_k: int, min_p: float, repetition_penalty: float, seed: int
) -> Sampler:
    try:
        return Sampler(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"{first['loc'][0]}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']}"
        raise InputError(what, where="sampling") from None


def _own(model: nn.Module, prompts: Prompts, given: Mapping[str, Prompts] | None, logs: bool) -> dict[str, Prompts]:
    """The prompts of every term of a mixture; of a plain model nothing."""
    if not isinstance(model, Mixture):
        if given or logs:
            raise InputError("prompts and log-probabilities of terms are a mixture's, and this is one model")
        return {}
    odd = (given or {}).keys() - model.terms.keys()
    if odd:
        raise InputError(f"there is no term {', '.join(sorted(odd))}", fix=f"terms are {', '.join(model.terms)}")
    for name, theirs in (given or {}).items():
        if len(theirs) != len(prompts):
            raise InputError(f"{len(theirs)} prompts for {len(prompts)}", where=name)
        check_ids(model.opened[name].model, theirs, f"{name} prompt")
    if logs and model.decoder.draft:
        raise InputError("log-probabilities of terms are kept token by token, not written ahead", fix="speculative: 0")
    model.keeps_logs = logs
    return {name: (given or {}).get(name, prompts) for name in model.terms}


def _logs(model: Any, new: list[list[int]]) -> list[dict[str, list[Any]]]:
    """By row: name -> what was kept of each of its new tokens; a term that was not asked at a step has None there."""
    session = model.session
    session.note(torch.tensor([row[-1] for row in new]))
    names = {name for step in session.logs for name in step}
    return [
        {name: [step[name][row].tolist() if name in step else None for step in session.logs] for name in sorted(names)}
        for row in range(len(new))
    ]


def _run(
    model: Any,
    tokenizer: Any,
    prompts: list[Sequence[int]],
    room: int,
    ends: list[int],
    watch: _Watch,
    processors: LogitsProcessorList,
    streamer: BaseStreamer | None,
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
        eos_token_id=ends or NO_TOKEN,
    )
    watch.prompt_length = 1 if seq2seq else width
    with evaluating(model), torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([watch] if watch.stop else []),
            logits_processor=processors,
            streamer=streamer,
        )
    return out[:, watch.prompt_length :].tolist()


def _filled(prompt: Sequence[int], width: int, value: int, right: bool) -> list[int]:
    """`prompt` filled up to `width`."""
    fill = [value] * (width - len(prompt))
    return [*prompt, *fill] if right else [*fill, *prompt]


def _answer(
    tokenizer: Any,
    new: list[int],
    stopped: int | None,
    ends: list[int],
    stop: Sequence[str],
    logs: Mapping[str, list[Any]],
) -> Generation:
    """Cut what a finished row was filled up with, and the text at the first stop string."""
    end = next((i for i, token in enumerate(new) if token in ends), None)
    if stopped is not None and (end is None or stopped <= end):
        ids = new[:stopped]
        finished = True
    else:
        ids, finished = (new, False) if end is None else (new[:end], True)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    found = [at for at in (text.find(word) for word in stop) if at >= 0]
    kept = {name: values[: len(ids)] for name, values in logs.items()}
    return Generation(ids, text[: min(found)] if found else text, finished, kept)


def _ends(model: nn.Module, tokenizer: Any, stop: Sequence[str]) -> list[int]:
    """All end tokens of model and tokenizer, and stop strings that are tokens of their own, sorted."""
    added = tokenizer.get_added_vocab()
    return sorted({*end_ids(model, tokenizer), *(added[word] for word in stop if word in added)})


def _batches(
    model: nn.Module, prompts: Prompts, own: Mapping[str, Prompts], max_new_tokens: int, batch_tokens: int
) -> list[tuple[list[int], int]]:
    """Prompt numbers that run together, and how many tokens they may write; the longest prompts first."""
    context = context_length(model)
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    alike = bool(getattr(model, "_is_stateful", False))  # a recurrent state would run through the padding
    room = []
    for number, prompt in enumerate(prompts):
        left = None if context is None else context - (0 if seq2seq else len(prompt))
        if isinstance(model, Mixture):
            left = model.room(own, number)
        if (context is not None and len(prompt) > context) or (left is not None and left < 1):
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
        for row, ids in enumerate(new[:, -self.tail :].tolist()):
            if self.stopped[row] is None and self.finds(ids):
                self.stopped[row] = new.shape[1]
        return torch.tensor([at is not None for at in self.stopped], device=input_ids.device)

    def finds(self, ids: list[int]) -> bool:
        """Whether the last tokens of a text hold a stop string."""
        text = self.tokenizer.decode(ids[-self.tail :], skip_special_tokens=True)
        return any(word in text for word in self.stop)


class _Tell(BaseStreamer):
    """Hands new tokens on as transformers' loop draws them; the first thing that it puts are the prompts."""

    def __init__(self, tell: Tell, numbers: Sequence[int]):
        self.tell, self.numbers, self.begun = tell, numbers, False

    def put(self, value: Tensor) -> None:
        if self.begun:
            self.tell(self.numbers, value.reshape(-1).tolist())
        self.begun = True

    def end(self) -> None:
        """Nothing is held back."""
