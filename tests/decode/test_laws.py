"""Laws that every decoder keeps, from one table: a new one gets them by one row."""

from __future__ import annotations

import pytest
import torch
from tests.decode.mixtures import opened

from luthier.decode import AlphaScaling, Cge, CopilotDecoder, DynamicFusion, Eft, Single, TransferQ, generate
from luthier.models.copilot import Copilot

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13], [5, 6, 7, 8]]
NEW = 7


def letters(texts):
    """A reward of texts."""
    return [sum("aeiou".find(letter) for letter in text) / 5 for text in texts]


def len_of(texts):
    """Another reward."""
    return [len(text) / 10 for text in texts]


def copilot(pilot, **settings):
    """An untrained Copilot that says something; while the names are collected, nothing."""
    if isinstance(pilot, torch.nn.Identity):
        return "none"
    found = Copilot.of(pilot, layers=2, **settings).eval()
    torch.nn.init.normal_(found.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return found


def table(make):
    """name -> a decoder of tiny random models."""
    a, b, c, d = (make("llama", seed) for seed in range(4))
    return {
        "single": Single(base=a),
        "alpha-scaling": AlphaScaling(base=a, tuned=b, alpha=1.3),
        "cge": Cge(base=a, tuned=b),
        "cge, boosted": Cge(base=a, tuned=b, form="boost", weight=0.5, alpha=0.02),
        "cge, no filter": Cge(base=a, tuned=b, alpha=0.0, gamma=0.5),
        "eft": Eft(base=a, tuned=b, tuned_base=c),
        "eft, its own base": Eft(base=a, tuned=b, weight=1.5),
        "eft, filtered": Eft(base=a, tuned=b, tuned_base=c, top_p_filter=0.9),
        "eft, two behaviours": Eft(base=a, tuned=(b, d), tuned_base=c, weight=(0.3, 0.7)),
        "eft, speculative": Eft(base=a, tuned=b, tuned_base=c, speculative=3),
        "transfer-q": TransferQ(base=a, tuned=b, reward=letters, rollout_tokens=3),
        "transfer-q, unfinished texts": TransferQ(base=a, reward=letters, completion="none", top_k=5),
        "transfer-q, sampled and weighted": TransferQ(
            base=a,
            tuned=b,
            reward=letters,
            reward_tuned=len_of,
            rollouts=2,
            rollout_tokens=3,
            rollout_sample=True,
            top_k=4,
        ),
        "dynamic fusion": DynamicFusion(base=a, tuned=b, tuned_base=c),
        "dynamic fusion, two experts": DynamicFusion(base=a, tuned=(b, d), tuned_base=c, grid_step=0.25),
        "dynamic fusion, joint": DynamicFusion(base=a, tuned=(b, d), tuned_base=c, joint=True),
        "copilot": CopilotDecoder(base=a, copilot=copilot(a), scale=0.5),
        "copilot, sees the current state": CopilotDecoder(base=b, copilot=copilot(b, include_current=True), scale=0.5),
    }


NAMES = list(table(lambda *_: torch.nn.Identity()))


@pytest.fixture(scope="module")
def decoders(make_model):
    return table(make_model)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_a_distribution(decoders, tokenizer, name):
    model = opened(decoders[name], tokenizer)
    if model.decoder.stepwise:
        pytest.skip("cannot score whole texts")
    said = model(torch.tensor([PROMPTS[1]])).logits
    torch.testing.assert_close(said.exp().sum(-1), torch.ones(said.shape[:-1]))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_writes_what_each_prompt_writes_alone(decoders, tokenizer, name, sampled):
    model, how = opened(decoders[name], tokenizer), {"max_new_tokens": NEW, "temperature": float(sampled), "seed": 4}
    together = [g.ids for g in generate(model, tokenizer, PROMPTS, **how)]
    apart = [g.ids for g in generate(model, tokenizer, PROMPTS, batch_tokens=1, **how)]
    assert together == apart


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_changes_nothing(decoders, tokenizer, name):
    model = opened(decoders[name], tokenizer)
    ids = torch.tensor([PROMPTS[1]])
    how = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (model.generate(ids, use_cache=cached, **how) for cached in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_words_and_other_seeds_others(decoders, tokenizer, name):
    model = opened(decoders[name], tokenizer)
    first, again, other = (
        [g.ids for g in generate(model, tokenizer, PROMPTS, max_new_tokens=NEW, temperature=2.0, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("name", NAMES)
def test_models_and_settings_are_as_they_were(decoders, tokenizer, name):
    decoder = decoders[name]
    model = opened(decoder, tokenizer)
    before = [{k: v.clone() for k, v in o.model.state_dict().items()} for o in model.opened.values()]
    generate(model, tokenizer, PROMPTS, max_new_tokens=3)
    for old, one in zip(before, model.opened.values(), strict=True):
        assert all(torch.equal(old[key], value) for key, value in one.model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_kept_logprobs_are_those_of_the_drawn_tokens(decoders, tokenizer, name):
    model = opened(decoders[name], tokenizer)
    if model.decoder.draft:
        pytest.skip("written ahead, terms are asked in blocks")
    found = generate(model, tokenizer, PROMPTS, max_new_tokens=NEW, keep_logprobs=True)
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=NEW)
    assert [g.ids for g in found] == [g.ids for g in plain]
    for generation in found:
        assert all(len(values) == len(generation.ids) for values in generation.logprobs.values())
        assert all(value <= 1e-6 for value in generation.logprobs["mixture"])
