"""The eight slots of every selective tuning: a method adds a row here."""

import pytest

from luthier.methods import build

# Every selective tuning's slots in words, as its specification has them; a list of both where it chooses twice.
SLOTS = {
    "cofitune": (
        {},
        [
            {
                "scope": "layers 25%:50% x up_proj, down_proj",
                "score": "given",
                "choose": "best node",
                "competition": "global",
                "granularity": "tensor",
                "schedule": "start",
                "apply": "requires_grad",
                "on_reselect": "none",
            },
            {
                "scope": "the tensors chosen first",
                "score": "unit importance",
                "choose": "soft (weight 1 - I)",
                "competition": "layer",
                "granularity": "row",
                "schedule": "start",
                "apply": "gradient",
                "on_reselect": "none",
            },
        ],
    ),
    "lift": (
        {"density": 0.05},
        {
            "scope": "weights of all linear layers but the head",
            "score": "|rank-128 part of w|",
            "choose": "top (share 0.05)",
            "competition": "tensor",
            "granularity": "element",
            "schedule": "start + every 200 optimiser steps",
            "apply": "gradient",
            "on_reselect": "carry",
        },
    ),
    "sara": (
        {"threshold": 2e-3},
        {
            "scope": "all parameters",
            "score": "|w|",
            "choose": "below threshold 0.002",
            "competition": "global",
            "granularity": "element",
            "schedule": "start + once when 0.5 of the optimiser steps are done",
            "apply": "gradient",
            "on_reselect": "reset",
        },
    ),
    "greentrainer": (
        {},
        {
            "scope": "all tensors",
            "score": "loss drop of one optimiser step",
            "choose": "budgeted dynamic programme",
            "competition": "global",
            "granularity": "tensor",
            "schedule": "start + every 2 epochs",
            "apply": "requires_grad",
            "on_reselect": "reset",
        },
    ),
    "hft": (
        {},
        {
            "scope": "tensors of the layers (what lies outside always moves)",
            "score": "uniform random",
            "choose": "exact count (share 0.5)",
            "competition": "group",
            "granularity": "tensor",
            "schedule": "start",
            "apply": "requires_grad",
            "on_reselect": "reset",
        },
    ),
    "lisa": (
        {},
        {
            "scope": "layer blocks (everything outside always moves)",
            "score": "uniform random",
            "choose": "exactly 2",
            "competition": "global",
            "granularity": "block",
            "schedule": "start + every 20 optimiser steps",
            "apply": "requires_grad",
            "on_reselect": "drop",
        },
    ),
    "lt_sft": (
        {},
        {
            "scope": "body parameters that are not frozen",
            "score": "|change in a full run|",
            "choose": "top (share 0.08)",
            "competition": "global",
            "granularity": "element",
            "schedule": "after the full phase of each iteration",
            "apply": "gradient",
            "on_reselect": "rewind",
        },
    ),
    "mask_tuning": (
        {},
        {
            "scope": "attention weights of the image encoder",
            "score": "learned R",
            "choose": "above threshold 0.005",
            "competition": "none",
            "granularity": "element",
            "schedule": "every forward",
            "apply": "weight",
            "on_reselect": "keep",
        },
    ),
    "dsee": (
        {},
        {
            "scope": "adapted matrices",
            "score": "|sparse part of a decomposition|",
            "choose": "top (64)",
            "competition": "tensor",
            "granularity": "element",
            "schedule": "start",
            "apply": "added",
            "on_reselect": "none",
        },
    ),
    "dsee_prune": (
        {},
        {
            "scope": "linears of the blocks",
            "score": "|update| (adapted group), |w| (rest)",
            "choose": "top 0.8 is kept",
            "competition": "group",
            "granularity": "element",
            "schedule": "start",
            "apply": "weight",
            "on_reselect": "none",
        },
    ),
}


@pytest.mark.parametrize("name", SLOTS)
def test_slots_are_those_of_the_specification(name):
    more, words = SLOTS[name]
    slots = build("tune", {"method": name, **more}).slots()
    assert [slot.words() for slot in stack(slots)] == stack(words)


def stack(of):
    """One or several on top of each other, as a list."""
    return list(of) if isinstance(of, tuple | list) else [of]
