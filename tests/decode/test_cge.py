"""CGE against its definition by hand, and the invariants of its specification."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from pydantic import ValidationError
from tests.decode.mixtures import greedy, logprobs, opened

from luthier.decode import Cge, contrastive_score, generate
from luthier.decode.cge import plausible, token_contrasts
from luthier.errors import InputError

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
TEXTS = [[1, 5, 6, 7, 8], [1, 9], [1, 10, 11, 12, 13, 14, 15, 16], [1]]


@pytest.fixture(scope="module")
def models(make_model):
    return {name: make_model("llama", seed) for seed, name in enumerate(("base", "tuned"))}


def said(decoder, ids=PROMPTS[0]):
    """(vocabulary,) float32: the decoder's log-probabilities after `ids`."""
    return opened(decoder)(torch.tensor([ids])).logits[0, -1]


def inside(row, alpha):
    """By hand: the plausible tokens of one row of log-probabilities."""
    return [v for v, p in enumerate(row.exp().tolist()) if p >= alpha * float(row.exp().max())]


def by_hand(models, ids, alpha, gamma, weight=None):
    """(vocabulary,) float64 probabilities, token by token as the header of the file says."""
    tuned, base = logprobs(models["tuned"], ids), logprobs(models["base"], ids)
    scores = {}
    for v in inside(tuned, alpha):
        d = float(tuned[v]) - gamma * float(base[v])
        scores[v] = math.exp(d if weight is None else float(tuned[v]) + weight * d)
    whole = sum(scores.values())
    return torch.tensor([scores.get(v, 0.0) / whole for v in range(len(tuned))], dtype=torch.float64)


@pytest.mark.parametrize(
    ("alpha", "gamma", "weight"), [(0.1, 1.0, None), (0.3, 0.5, None), (0.02, 1.0, 2.0), (0, 1, 1)]
)
def test_the_distribution_is_that_of_the_definition(models, alpha, gamma, weight):
    form = {} if weight is None else {"form": "boost", "weight": weight}
    decoder = Cge(**models, alpha=alpha, gamma=gamma, **form)
    for ids in PROMPTS:
        torch.testing.assert_close(
            said(decoder, ids).exp().double(), by_hand(models, ids, alpha, gamma, weight), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("kinds", [("llama", "gpt2"), ("mamba", "llama")])
def test_greedy_texts_are_those_of_the_definition(make_model, tokenizer, kinds):
    pair = {
        name: make_model(kind, seed) for seed, (name, kind) in enumerate(zip(("base", "tuned"), kinds, strict=True))
    }
    found = generate(opened(Cge(**pair), tokenizer), tokenizer, PROMPTS, max_new_tokens=6)
    for prompt, generation in zip(PROMPTS, found, strict=True):
        assert generation.ids == greedy(lambda ids: by_hand(pair, ids, 0.1, 1.0), prompt, 6, ends={2})


def test_equal_models_leave_nothing_to_choose_by(models):
    tuned = models["tuned"]
    plain = logprobs(tuned, PROMPTS[0])
    kept = inside(plain, 0.1)
    ratio = said(Cge(base=tuned, tuned=tuned)).exp()
    assert set(ratio[kept].tolist()) == {float(ratio.max())} and int((ratio > 0).sum()) == len(kept)  # uniform
    restricted = torch.full_like(plain, -math.inf)
    restricted[kept] = plain[kept]
    for decoder in (Cge(base=tuned, tuned=tuned, form="boost"), Cge(**models, gamma=0.0)):
        torch.testing.assert_close(said(decoder).double(), restricted.log_softmax(-1), rtol=1e-4, atol=1e-5)
    assert contrastive_score(tuned, tuned, TEXTS) == [0.0] * len(TEXTS)


def test_alpha_1_is_the_top_token_and_alpha_0_every_token(models):
    top = said(Cge(**models, alpha=1.0)).exp()
    assert int(top.argmax()) == int(logprobs(models["tuned"], PROMPTS[0]).argmax()) and float(top.max()) == 1.0
    assert bool((said(Cge(**models, alpha=0.0)) > -math.inf).all())
    tied = torch.log_softmax(torch.tensor([[3.0, 1.0, 3.0, -math.inf]]), -1)
    assert plausible(tied, 1.0).tolist() == [[True, False, True, False]]
    assert plausible(tied, 0.0).all()


def test_the_plausible_set_is_judged_before_the_temperature(models, tokenizer):
    """However hot, nothing implausible is drawn."""
    model = opened(Cge(**models), tokenizer)
    prompts = PROMPTS * 4
    found = generate(model, tokenizer, prompts, max_new_tokens=6, temperature=50.0, stop_at_eos=False)
    for prompt, generation in zip(prompts, found, strict=True):
        for at, token in enumerate(generation.ids):
            row = logprobs(models["tuned"], [*prompt, *generation.ids[:at]])
            assert float(row[token]) >= float(row.max()) + math.log(0.1) - 1e-4


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_constants_on_logits_change_nothing(models, name):
    before = said(Cge(**models)), contrastive_score(models["tuned"], models["base"], TEXTS)
    hook = models[name].lm_head.register_forward_hook(lambda *a: a[-1] + 3.0)
    try:
        torch.testing.assert_close(said(Cge(**models)), before[0])
        assert contrastive_score(models["tuned"], models["base"], TEXTS) == pytest.approx(before[1], abs=1e-5)
    finally:
        hook.remove()


@pytest.mark.parametrize("form", ["ratio", "boost"])
def test_what_the_base_rules_out_is_novel_and_no_nan(models, form):
    """A token that the base gives no probability wins if it is plausible, and what nobody can write is out."""
    base, tuned = (copy.deepcopy(models[name]) for name in ("base", "tuned"))
    wanted = inside(logprobs(tuned, PROMPTS[0]), 0.1)[0]
    impossible = next(v for v in range(34) if v != wanted)

    def never(*tokens):
        def hook(module, given, out):
            out = out.clone()
            out[..., list(tokens)] = -math.inf
            return out

        return hook

    base.lm_head.register_forward_hook(never(wanted, impossible))
    tuned.lm_head.register_forward_hook(never(impossible))
    for alpha in (0.1, 0.0):
        found = said(Cge(base=base, tuned=tuned, alpha=alpha, form=form))
        assert not found.isnan().any() and int(found.argmax()) == wanted and found[impossible] == -math.inf


def test_scores_of_texts_are_sums_that_add_up(models):
    tuned, base = models["tuned"], models["base"]
    sums = contrastive_score(tuned, base, TEXTS, normalize=False)
    for text, found in zip(TEXTS, sums, strict=True):
        parts = [
            float(logprobs(tuned, text[:at])[text[at]] - logprobs(base, text[:at])[text[at]])
            for at in range(1, len(text))
        ]
        assert found == pytest.approx(sum(parts), abs=1e-4)
        assert token_contrasts(tuned, base, text) == pytest.approx(parts, abs=1e-4)
    means = contrastive_score(tuned, base, TEXTS)
    assert means == pytest.approx([s / max(1, len(t) - 1) for s, t in zip(sums, TEXTS, strict=True)])
    text, cut = TEXTS[2], 4
    after = token_contrasts(tuned, base, text)[cut - 1 :]
    assert sums[2] == pytest.approx(
        contrastive_score(tuned, base, [text[:cut]], normalize=False)[0] + sum(after), abs=1e-4
    )
    assert contrastive_score(tuned, base, TEXTS, batch_tokens=1) == pytest.approx(means, abs=1e-5)
    halved = contrastive_score(tuned, base, TEXTS, gamma=0.5, normalize=False)
    plain = contrastive_score(tuned, base, TEXTS, gamma=0.0, normalize=False)
    assert halved == pytest.approx([(a + b) / 2 for a, b in zip(sums, plain, strict=True)], abs=1e-4)


def test_a_gamma_of_zero_never_asks_the_base(models, tokenizer):
    ran = []
    hook = models["base"].register_forward_hook(lambda *_: ran.append(1))
    try:
        generate(opened(Cge(**models, gamma=0.0), tokenizer), tokenizer, PROMPTS, max_new_tokens=3)
        generate(opened(Cge(**models, form="boost", weight=0.0), tokenizer), tokenizer, PROMPTS, max_new_tokens=3)
        assert not ran
    finally:
        hook.remove()


def test_bad_settings_and_texts_are_refused(models):
    for settings, words in (
        ({"alpha": 1.1}, "less than or equal to 1"),
        ({"alpha": -0.1}, "greater than or equal to 0"),
        ({"gamma": float("inf")}, "finite"),
        ({"form": "difference"}, "ratio"),
        ({"num_beams": 4}, "stochastic beam is not built; got 4"),
    ):
        with pytest.raises(ValidationError, match=words):
            Cge.model_validate({**models, **settings})
    with pytest.raises(InputError, match="text 1"):
        contrastive_score(models["tuned"], models["base"], [[1, 5], []])
