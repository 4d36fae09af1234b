"""A pair from what its names stand for: folders, an adapter on the base, a delta of the base.

    open_pair("base", "adapter")        the pair of the base and the model that the adapter makes of it

Opened as a decoder's terms are (`luthier.decode.opening`), but apart: decoding shares weights between base and tuned
model and switches the difference on and off, while an analysis hashes, copies and trains whole models. So a delta is
applied and an adapter merged in memory, and the base is as its folder has it. A delta gives the applied model bit for
bit; an adapter the merged model in the numbers that the base was loaded in.
"""

from __future__ import annotations

import copy
from typing import Any

from luthier.analyze.base import Pair
from luthier.decode.base import Term
from luthier.decode.opening import open_terms
from luthier.errors import InputError


def open_pair(base: str, tuned: str, *, dtype: str = "auto", device: str = "cpu") -> Pair:
    """Load both models.

    Args:
        base: a model (`ModelSettings.base`).
        tuned: another, or the folder of an adapter or of a delta on `base`; its tokenizer is the base's then.
        dtype: of the weights (`ModelSettings.dtype`).
        device: where the models shall run.

    Raises `InputError` for what cannot be loaded, for a part of another base, and for an adapter that cannot be merged.
    """
    from peft import PeftModel

    opened = open_terms({"base": Term(base), "tuned": Term(tuned, on="base")}, {}, dtype=dtype, device=device)
    first, second = opened["base"], opened["tuned"]
    model: Any = second.model
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise InputError("the adapter is a prompt and cannot be merged into the base", where=tuned)
        with second.active():
            whole = copy.deepcopy(model).merge_and_unload()
        return Pair(model.unload(), whole, second.tokenizer, first.tokenizer)
    if model is first.model and second.variant != first.variant:
        with second.active():
            model = copy.deepcopy(model)
    return Pair(first.model, model, second.tokenizer, first.tokenizer)
