"""Rewards of texts: one function, wherever it comes from.

    reward = reward_function("mine:polite")               a Python function list[str] -> one number each
    reward = reward_function("models/reward")             a sequence classifier of one label, with its tokenizer
    reward = reward_function((module, tokenizer))         the same, loaded already
    rewards_of(reward, texts)                             (texts,) float64, checked

A reward model reads texts with a tokenizer of its own, special tokens as that tokenizer sets them. Texts that are too
long for it are refused: cut at either end they would be graded as something that nobody wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import PlainSerializer, WithJsonSchema
from torch import Tensor, nn

from luthier.data.read import import_callable
from luthier.decode.inputs import context_length
from luthier.errors import InputError
from luthier.models.loading import load
from luthier.models.modes import evaluating
from luthier.models.settings import ModelSettings

Reward = Callable[[list[str]], Any]
_FUNCTION = re.compile(r"(?!package:)[\w.]+:[\w.]+")


def _written(given: Any) -> Any:
    return given if given is None or isinstance(given, str) else getattr(given, "__qualname__", type(given).__name__)


Given = Annotated[
    Any,
    PlainSerializer(_written, when_used="json"),
    WithJsonSchema({"type": "string", "description": "module:function, or a model; in Python also a function"}),
]


class RewardModel:
    """A sequence classifier of one label as a function of texts.

    Args:
        model: a module of transformers; it runs where it is, in evaluation mode.
        tokenizer: its own.
        batch_size: texts that run together, those of like length.

    Raises `InputError` for a model of several labels, and for one that cannot tell padding from text.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int = 32):
        config: Any = model.config
        if config.num_labels != 1:
            raise InputError(f"a reward model has one label, this one has {config.num_labels}", where="reward")
        if batch_size > 1 and (tokenizer.pad_token_id is None or config.pad_token_id != tokenizer.pad_token_id):
            raise InputError(
                f"its pad token is {config.pad_token_id}, its tokenizer's is {tokenizer.pad_token_id}",
                where="reward",
                fix="set both to the same token",
            )
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def __call__(self, texts: list[str]) -> Tensor:
        """(texts,) float32 rewards, on the CPU."""
        ids = [self._ids(text) for text in texts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found = torch.empty(len(ids))
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            found[part] = self._run([ids[i] for i in part])
        return found

    def _ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text)["input_ids"])
        if ids[:2] == [self.tokenizer.bos_token_id] * 2:  # the text had its mark already
            ids = ids[1:]
        context = context_length(self.model)
        if not ids or (context is not None and len(ids) > context):
            raise InputError(f"a text has {len(ids)} tokens, and the reward model reads 1 to {context}", where="reward")
        return ids

    def _run(self, ids: list[list[int]]) -> Tensor:
        width, device = max(map(len, ids)), next(self.model.parameters()).device
        fill = 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        padded = torch.tensor([[*row, *[fill] * (width - len(row))] for row in ids], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
        with evaluating(self.model), torch.no_grad():
            return self.model(input_ids=padded, attention_mask=mask).logits[:, 0].float().cpu()


def reward_function(given: Any) -> Reward:
    """The function that `given` means.

    Args:
        given: a function; `module:function`; what `luthier.models` loads as a sequence classifier; or a module with its
            tokenizer.

    Raises `InputError` if there is no such function or model, or the model's head was never trained.
    """
    if isinstance(given, str):
        if _FUNCTION.fullmatch(given):
            return import_callable(given)
        loaded = load(ModelSettings(base=given, kind="sequence-classifier"))
        if any(finding.code == "model.new_head" for finding in loaded.findings):
            raise InputError("it has no trained head to give rewards with", where=given, fix="name a reward model")
        if torch.cuda.is_available():
            loaded.model.to("cuda")
        return RewardModel(loaded.model, loaded.tokenizer)
    if isinstance(given, tuple | list) and len(given) == 2:
        return RewardModel(*given)
    if isinstance(given, nn.Module) or not callable(given):
        what = f"a reward is a function of texts, or a model with its tokenizer, got {type(given).__name__}"
        raise InputError(what, where="reward", fix="give (model, tokenizer)")
    return given


def rewards_of(reward: Reward, texts: list[str], name: str = "reward") -> Tensor:
    """(texts,) float64 on the CPU.

    Raises `InputError` if `reward` gives another count of numbers than there are texts, or one that is not finite.
    """
    found = torch.as_tensor(reward(texts), dtype=torch.float64).detach().cpu()
    if found.shape != (len(texts),):
        raise InputError(f"it gave numbers of shape {list(found.shape)} for {len(texts)} texts", where=name)
    odd = [i for i, fine in enumerate(found.isfinite().tolist()) if not fine]
    if odd:
        raise InputError(f"it gave {float(found[odd[0]])} for the text {texts[odd[0]][-80:]!r}", where=name)
    return found


def texts_of(tokenizer: Any, ids: Sequence[Sequence[int]], *, special_tokens: bool = False) -> list[str]:
    """The texts of token ids; special tokens are left out unless wanted."""
    return [tokenizer.decode(list(row), skip_special_tokens=not special_tokens) for row in ids]
