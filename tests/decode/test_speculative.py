"""Writing ahead changes how fast a text comes, and nothing about which."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from scipy.stats import chisquare
from tests.decode.mixtures import logprobs, opened

from luthier.decode import Eft, generate
from luthier.decode.sampling import Sampler
from luthier.decode.speculative import speculate
from luthier.errors import InputError

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
SMALL = {"vocab_size": 5, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.15}


@pytest.mark.parametrize("ahead", [1, 2, 5, 20])
@pytest.mark.parametrize("weight", [0.0, 1.0, 1.6])
def test_greedy_texts_are_those_of_token_by_token(make_model, tokenizer, ahead, weight):
    models = dict(zip(("base", "tuned", "tuned_base"), (make_model("llama", s) for s in range(3)), strict=True))
    plain = opened(Eft(**models, weight=weight), tokenizer)
    fast = opened(Eft(**models, weight=weight, speculative=ahead), tokenizer)
    for settings in ({}, {"stop": ("g", "qq")}, {"repetition_penalty": 1.5}):
        how = {"max_new_tokens": 12, **settings}
        assert generate(fast, tokenizer, PROMPTS, **how) == generate(plain, tokenizer, PROMPTS, **how)


def test_a_draft_that_agrees_is_kept_whole(make_model):
    base, tuned = make_model("llama", 0, **SMALL), make_model("llama", 1, **SMALL)
    model = opened(Eft(base=base, tuned=tuned, tuned_base=base, speculative=4))  # the tuned model itself
    prompts = {name: [1, 2] for name in model.terms}
    for temperature in (0.0, 1.0):
        found = speculate(
            model, prompts, number=0, room=20, sampler=Sampler(temperature=temperature), ended=lambda ids: False
        )
        assert len(found.ids) == 20
        assert found.kept == found.drafted


@pytest.mark.parametrize("shape", [{}, {"temperature": 1.5, "top_k": 3}, {"top_p": 0.8}])
def test_samples_follow_the_processed_mixture(make_model, shape):
    models = dict(
        zip(("base", "tuned", "tuned_base"), (make_model("llama", s, **SMALL) for s in range(3)), strict=True)
    )
    model = opened(Eft(**models, speculative=2))
    sampler, draws, prompt = Sampler(**{"temperature": 1.0, **shape}), 800, [1, 2]
    counts = dict.fromkeys(product(range(5), repeat=2), 0)
    for number in range(draws):
        prompts = dict.fromkeys(model.terms, prompt)
        found = speculate(model, prompts, number=number, room=2, sampler=sampler, ended=lambda ids: False)
        counts[tuple(found.ids)] += 1

    def processed(ids):
        said = logprobs(models["base"], ids) + logprobs(models["tuned"], ids) - logprobs(models["tuned_base"], ids)
        return sampler.shapers(torch.tensor([ids]), said.float()[None]).softmax(-1)[0].double()

    chances = {(a, b): float(processed(prompt)[a] * processed([*prompt, a])[b]) for a, b in counts}
    assert all(counts[pair] == 0 for pair, chance in chances.items() if chance == 0)
    likely = [pair for pair, chance in chances.items() if chance * draws >= 5]
    rest = draws - sum(counts[pair] for pair in likely)
    expected = [chances[pair] * draws for pair in likely] + [max(1e-9, draws - sum(chances[p] * draws for p in likely))]
    seen = [counts[pair] for pair in likely] + [rest]
    keep = [i for i, value in enumerate(expected) if value >= 5]
    scale = sum(seen[i] for i in keep) / sum(expected[i] for i in keep)
    assert chisquare([seen[i] for i in keep], [expected[i] * scale for i in keep]).pvalue > 1e-3


def test_models_that_cannot_go_back_are_refused(make_model, tokenizer):
    model = opened(Eft(base=make_model("mamba", 0), tuned=make_model("llama", 1), speculative=2), tokenizer)
    with pytest.raises(InputError, match="carries a state"):
        generate(model, tokenizer, PROMPTS, max_new_tokens=4)


def test_logprobs_of_what_is_written_ahead_are_refused(make_model, tokenizer):
    models = dict(zip(("base", "tuned", "tuned_base"), (make_model("llama", s) for s in range(3)), strict=True))
    model = opened(Eft(**models, speculative=2), tokenizer)
    with pytest.raises(InputError, match="kept token by token"):
        generate(model, tokenizer, PROMPTS, max_new_tokens=4, keep_logprobs=True)


def test_prompts_longer_than_a_window_are_written_on(make_model, tokenizer):
    models = dict(zip(("base", "tuned", "tuned_base"), (make_model("mistral", s) for s in range(3)), strict=True))
    prompts = [list(range(5, 25)), *PROMPTS]  # the window has 6 tokens
    plain, fast = (opened(Eft(**models, speculative=ahead), tokenizer) for ahead in (0, 3))
    how = {"max_new_tokens": 12}
    assert generate(fast, tokenizer, prompts, **how) == generate(plain, tokenizer, prompts, **how)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", ["base", "tuned"])
def test_a_term_of_broken_weights_is_refused(make_model, tokenizer, broken, temperature):
    models = dict(zip(("base", "tuned", "tuned_base"), (make_model("llama", s) for s in range(3)), strict=True))
    with torch.no_grad():
        models[broken].lm_head.weight[5] = float("nan")
    model = opened(Eft(**models, speculative=2), tokenizer)
    with pytest.raises(InputError, match="the next token's scores are not numbers"):
        generate(model, tokenizer, PROMPTS, max_new_tokens=4, temperature=temperature)
