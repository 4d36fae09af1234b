"""Small exact worlds with graders, and the packaged model and texts that demos, tests and proofs stand on.

    facts         120 subjects, 8 relations: a tiny decoder knows 840 facts by heart and is taught 120 more
    entities      a large model knows rare facts, a small one does not; tuning teaches formats of answering
    digits        the handwritten digits of scikit-learn, and small networks that read them
    diffusion     a small U-Net of diffusers that draws those digits, and is then tuned to draw others
    arithmetic    eight chat skills with one right answer each; four that the tiny model knows, four to teach it
    bandit        a contextual bandit with linear features and noisy pairs: preference losses in seconds
    arrangements  a language whose expected rewards are exact sums: preference losses on a real language model
    reasoning     puzzles of the package reasoning-gym with its own scorers
    everyday      what anybody knows: does a tuned chat model still answer it?
    text          ordinary prose, for perplexity and forgetting
    safety        a decoder that refuses some prompts, and a user's tuning that breaks the refusal
    tiny          the language model of 1 million parameters that the package ships
    parts         training and test questions kept apart by construction

A recipe names a generator as a data source and a grader by import string:

    source: {callable: "luthier.worlds.arithmetic:rows", arguments: {skill: sort, count: 1200, part: train}}
    grader: "luthier.worlds.arithmetic:grade"
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "arithmetic",
    "arrangements",
    "bandit",
    "diffusion",
    "digits",
    "entities",
    "everyday",
    "facts",
    "parts",
    "reasoning",
    "safety",
    "text",
    "tiny",
]

if TYPE_CHECKING:
    from luthier.worlds import (
        arithmetic,
        arrangements,
        bandit,
        diffusion,
        digits,
        entities,
        everyday,
        facts,
        parts,
        reasoning,
        safety,
        text,
        tiny,
    )


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"luthier.worlds.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
