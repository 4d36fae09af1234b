"""EFT against its equation by hand, and the invariants of its specification."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from tests.decode.mixtures import greedy, logprobs, opened

from luthier.decode import Eft, generate
from luthier.decode.eft import nucleus

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]


@pytest.fixture(scope="module")
def models(make_model):
    return {name: make_model("llama", seed) for seed, name in enumerate(("base", "tuned", "tuned_base", "other"))}


def first(decoder, ids=PROMPTS[0]):
    """(vocabulary,) float32: the decoder's distribution after `ids`."""
    return opened(decoder)(torch.tensor([ids])).logits[0, -1].exp()


@pytest.mark.parametrize("kinds", [("llama", "gpt2", "bloom"), ("mamba", "llama", "llama"), ("t5", "llama", "bart")])
def test_greedy_answers_are_those_of_the_equation(make_model, tokenizer, kinds):
    base, tuned, before = (make_model(kind, seed) for seed, kind in enumerate(kinds))
    model = opened(Eft(base=base, tuned=tuned, tuned_base=before, weight=0.7), tokenizer)

    def by_hand(prompt):
        def said(one, ids):
            if one.config.is_encoder_decoder:
                new = torch.tensor([[one.config.decoder_start_token_id, *ids[len(prompt) :]]])
                with torch.no_grad():
                    out = one(input_ids=torch.tensor([prompt]), decoder_input_ids=new).logits[0, -1]
                return torch.log_softmax(out.double(), -1)
            return logprobs(one, ids)

        return lambda ids: said(base, ids) + 0.7 * (said(tuned, ids) - said(before, ids))

    for prompt, generation in zip(PROMPTS, generate(model, tokenizer, PROMPTS, max_new_tokens=6), strict=True):
        assert generation.ids == greedy(by_hand(prompt), prompt, 6, ends={2})


def test_terms_read_prompts_of_their_own(models, tokenizer):
    theirs = [[20, 21], [22], [23, 24, 25, 26]]
    decoder = Eft(base=models["base"], tuned=models["tuned"], tuned_base=models["tuned_base"])
    found = generate(opened(decoder, tokenizer), tokenizer, PROMPTS, max_new_tokens=5, own_prompts={"tuned": theirs})
    for prompt, other, generation in zip(PROMPTS, theirs, found, strict=True):

        def said(ids, prompt=prompt, other=other):
            new = ids[len(prompt) :]
            plain = logprobs(models["base"], ids) - logprobs(models["tuned_base"], ids)
            return plain + logprobs(models["tuned"], [*other, *new])

        assert generation.ids == greedy(said, prompt, 5, ends={2})


def test_special_cases_are_the_models_themselves(models):
    base, tuned, before = models["base"], models["tuned"], models["tuned_base"]
    plain = {name: logprobs(model, PROMPTS[0]).exp().float() for name, model in models.items()}
    cases = [
        (Eft(base=base, tuned=tuned, tuned_base=before, weight=0.0), "base"),
        (Eft(base=before, tuned=tuned, tuned_base=before), "tuned"),
        (Eft(base=base, tuned=tuned), "tuned"),
        (Eft(base=base, tuned=before, tuned_base=before, weight=3.0), "base"),
        (Eft(base=base, tuned=(tuned, before), weight=(1.0, 0.0)), "tuned"),
    ]
    for decoder, name in cases:
        torch.testing.assert_close(first(decoder), plain[name])


def test_constants_on_logits_change_nothing(models):
    decoder = Eft(base=models["base"], tuned=models["tuned"], tuned_base=models["tuned_base"], weight=1.7)
    before = first(decoder)
    hook = models["tuned"].lm_head.register_forward_hook(lambda *a: a[-1] + 3.0)
    try:
        torch.testing.assert_close(first(decoder), before)
    finally:
        hook.remove()


def test_the_filter_keeps_tokens_and_takes_the_factor_off_outside(models):
    base, tuned, before = models["base"], models["tuned"], models["tuned_base"]
    said = {name: logprobs(model, PROMPTS[0]) for name, model in models.items()}
    order = said["tuned"].argsort(descending=True, stable=True)
    sums = said["tuned"][order].exp().cumsum(0)
    inside = set(order[: int((sums < 0.6).sum()) + 1].tolist())
    full = said["base"] + 0.8 * (said["tuned"] - said["tuned_base"])
    wanted = torch.stack([full[i] if i in inside else said["tuned"][i] for i in range(len(full))]).softmax(0)
    found = first(Eft(base=base, tuned=tuned, tuned_base=before, weight=0.8, top_p_filter=0.6))
    torch.testing.assert_close(found, wanted.float())
    whole = Eft(base=base, tuned=tuned, tuned_base=before, top_p_filter=1.0)
    torch.testing.assert_close(first(whole), first(Eft(base=base, tuned=tuned, tuned_base=before)))
    assert nucleus(said["tuned"][None].float(), 1e-9).sum() == 1


def test_a_weight_of_zero_costs_nothing(models, tokenizer):
    ran = []
    hook = models["tuned"].register_forward_hook(lambda *_: ran.append(1))
    try:
        decoder = Eft(base=models["base"], tuned=models["tuned"], tuned_base=models["tuned_base"], weight=0.0)
        generate(opened(decoder, tokenizer), tokenizer, PROMPTS, max_new_tokens=3)
        assert not ran
    finally:
        hook.remove()


def test_one_model_under_two_names_runs_once(models, tokenizer):
    ran = []
    hook = models["base"].register_forward_hook(lambda *_: ran.append(1))
    try:
        decoder = Eft(base=models["base"], tuned=models["tuned"], tuned_base=models["base"], weight=0.5)
        generate(opened(decoder, tokenizer), tokenizer, PROMPTS[:1], max_new_tokens=3)
        assert len(ran) == 3
    finally:
        hook.remove()


def test_bad_settings_are_refused(models):
    base, tuned = models["base"], models["tuned"]
    for settings, words in (
        ({"weight": float("nan")}, "finite"),
        ({"tuned": [tuned, base], "weight": [1.0]}, "1 numbers for 2"),
        ({"tuned": [tuned, base], "weight": [1.0, 0.0], "top_p_filter": 0.9}, "one tuned model"),
        ({"top_p_filter": 0}, "greater than 0"),
    ):
        with pytest.raises(ValidationError, match=words):
            Eft.model_validate({"base": base, "tuned": tuned, **settings})
