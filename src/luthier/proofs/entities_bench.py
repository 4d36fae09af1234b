"""The bench of the proofs of decoders: answers of models and of mixtures in the entities world, each model asked in
its own format."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from transformers import PreTrainedModel

from luthier.decode import Generation, generate
from luthier.decode.base import Decoder
from luthier.decode.mixture import Mixture, Opened
from luthier.decode.vocabulary import shared_vocabulary
from luthier.proofs.base import Measurements
from luthier.worlds.entities import Entities, Skill, tokenizer

NEW_TOKENS = 3


class Bench:
    """A world, asked about its unseen topics; answers are greedy and of at most three tokens."""

    def __init__(self, world: Entities):
        self.world, self.tokenizer = world, tokenizer()

    def model(self, model: PreTrainedModel, skill: Skill, *, tuned: bool) -> list[list[int]]:
        """What one model answers, asked in the tuned format or as texts begin."""
        prompts = self.world.prompts(skill, "own" if tuned else "plain")
        return [g.ids for g in generate(model, self.tokenizer, prompts, max_new_tokens=NEW_TOKENS)]

    def mixture(self, decoder: Decoder, skill: Skill, *, trace: bool = False) -> list[Generation]:
        """What a decoder answers: terms named `tuned` and so on read the tuned format, the others the plain one."""
        opened = {name: Opened(term.model, tokenizer=self.tokenizer) for name, term in decoder.terms().items()}
        own = self.world.prompts(skill, "own")
        return generate(
            Mixture(decoder, opened, shared_vocabulary(opened)),
            self.tokenizer,
            self.world.prompts(skill, "plain"),
            max_new_tokens=NEW_TOKENS,
            own_prompts={name: own for name in opened if name.startswith("tuned") and name != "tuned_base"},
            keep_logprobs=trace,
        )

    def scores(self, skill: Skill, answers: list[list[int]], arm: str) -> Measurements:
        """Shares of the unseen topics with the right format, the right fact, and both."""
        found: Mapping[str, list[bool]] = self.world.score(skill, answers)
        return {f"{what}/{arm}": fmean(right) for what, right in found.items()}
