"""What a model learns from: losses on (model, batch).

An objective says how good a batch was, as a sum over explicit units (tokens, sequences), and leaves dividing and
stepping to the loop; so the mean is the same however a step is cut into micro-batches or spread over devices. All
but `classification` stand on one primitive, `token_logprobs`: the log-probability of each labelled token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.lazy import fetched

METHODS = {
    "classification": "luthier.objectives.classification:Classification",
    "sft": "luthier.objectives.sft:Sft",
    "dpo": "luthier.objectives.dpo:Dpo",
    "robust": "luthier.objectives.robust:Robust",
    "hinge": "luthier.objectives.hinge:Hinge",
    "ipo": "luthier.objectives.ipo:Ipo",
    "kto": "luthier.objectives.kto:Kto",
    "cpo": "luthier.objectives.cpo:Cpo",
    "simpo": "luthier.objectives.simpo:Simpo",
    "orpo": "luthier.objectives.orpo:Orpo",
}

_WHERE = {
    "Classification": "luthier.objectives.classification",
    "Objective": "luthier.objectives.base",
    "Loss": "luthier.objectives.base",
    "Sft": "luthier.objectives.sft",
    "Weighted": "luthier.objectives.weighted",
    "objective_of": "luthier.objectives.weighted",
    "TokenLogprobs": "luthier.objectives.logprobs",
    "token_logprobs": "luthier.objectives.logprobs",
}
__all__ = [
    "METHODS",
    "Classification",
    "Loss",
    "Objective",
    "Sft",
    "TokenLogprobs",
    "Weighted",
    "objective_of",
    "token_logprobs",
]

if TYPE_CHECKING:
    from luthier.objectives.base import Loss, Objective
    from luthier.objectives.classification import Classification
    from luthier.objectives.logprobs import TokenLogprobs, token_logprobs
    from luthier.objectives.sft import Sft
    from luthier.objectives.weighted import Weighted, objective_of

__getattr__ = fetched(__name__, _WHERE)
