"""From ids to words: generation, by one model or by several that a decoder mixes, and the likelihood of given texts.

    model = open_decoder(Eft(base="big", tuned="small-chat", tuned_base="small"))
    generate(model, model.lead.tokenizer, prompts, max_new_tokens=64)

All take a model and lists of token ids, so that prompts are built in exactly one place (`luthier.data.encode`);
`answer_scorer` puts likelihoods together for rows. They work in batches that change nothing: a result does not depend
on what it was batched with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.lazy import fetched, not_hidden_by_modules

METHODS = {
    "alpha-scaling": "luthier.decode.alpha_scaling:AlphaScaling",
    "cge": "luthier.decode.cge:Cge",
    "copilot": "luthier.decode.copilot:CopilotDecoder",
    "dynamic-fusion": "luthier.decode.fusion:DynamicFusion",
    "eft": "luthier.decode.eft:Eft",
    "single": "luthier.decode.single:Single",
    "transfer-q": "luthier.decode.transfer_q:TransferQ",
}
_WHERE = {
    "AlphaScaling": "luthier.decode.alpha_scaling",
    "Cge": "luthier.decode.cge",
    "CopilotDecoder": "luthier.decode.copilot",
    "Decoder": "luthier.decode.base",
    "DynamicFusion": "luthier.decode.fusion",
    "Eft": "luthier.decode.eft",
    "Generation": "luthier.decode.generate",
    "Likelihood": "luthier.decode.likelihood",
    "Mixture": "luthier.decode.mixture",
    "Opened": "luthier.decode.mixture",
    "RewardModel": "luthier.decode.rewards",
    "Sampler": "luthier.decode.sampling",
    "Single": "luthier.decode.single",
    "TransferQ": "luthier.decode.transfer_q",
    "answer_scorer": "luthier.decode.scoring",
    "best_of_n": "luthier.decode.best_of_n",
    "context_length": "luthier.decode.inputs",
    "contrastive_score": "luthier.decode.cge",
    "generate": "luthier.decode.generate",
    "likelihoods": "luthier.decode.likelihood",
    "open_decoder": "luthier.decode.opening",
}
__all__ = [
    "AlphaScaling",
    "Cge",
    "CopilotDecoder",
    "Decoder",
    "DynamicFusion",
    "Eft",
    "Generation",
    "Likelihood",
    "Mixture",
    "Opened",
    "RewardModel",
    "Sampler",
    "Single",
    "TransferQ",
    "answer_scorer",
    "best_of_n",
    "context_length",
    "contrastive_score",
    "generate",
    "likelihoods",
    "open_decoder",
]

if TYPE_CHECKING:
    from luthier.decode.alpha_scaling import AlphaScaling
    from luthier.decode.base import Decoder
    from luthier.decode.best_of_n import best_of_n
    from luthier.decode.cge import Cge, contrastive_score
    from luthier.decode.copilot import CopilotDecoder
    from luthier.decode.eft import Eft
    from luthier.decode.fusion import DynamicFusion
    from luthier.decode.generate import Generation, generate
    from luthier.decode.inputs import context_length
    from luthier.decode.likelihood import Likelihood, likelihoods
    from luthier.decode.mixture import Mixture, Opened
    from luthier.decode.opening import open_decoder
    from luthier.decode.rewards import RewardModel
    from luthier.decode.sampling import Sampler
    from luthier.decode.scoring import answer_scorer
    from luthier.decode.single import Single
    from luthier.decode.transfer_q import TransferQ

__getattr__ = fetched(__name__, _WHERE)
not_hidden_by_modules(__name__, _WHERE)
