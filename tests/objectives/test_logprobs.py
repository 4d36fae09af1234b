"""Laws of `token_logprobs` and `sft`: equal to the plain computation, however a step is cut."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
)

from luthier.errors import InputError
from luthier.objectives import Sft, token_logprobs

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**WIDE),
    "gpt2": GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "gemma2": Gemma2Config(**WIDE, head_dim=8, final_logit_softcapping=7.0),
    "cohere": CohereConfig(**WIDE, logit_scale=0.25),
    "granite": GraniteConfig(**WIDE, logits_scaling=3.0),
    "bloom": BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0, attention_dropout=0),
}


def make(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():  # logits large enough for a cap or a factor to matter
            parameter.mul_(4)
    return model.train()


def batch(rows=3, length=11):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 60, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 7:] = -100
    return {"input_ids": ids, "labels": labels}


def plain(model, made):
    logits = model(input_ids=made["input_ids"], use_cache=False).logits[:, :-1].float()
    return -F.cross_entropy(logits.flatten(0, 1), made["labels"][:, 1:].flatten(), reduction="none")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [None, 5])
def test_equals_the_plain_computation_in_value_and_gradient(name, chunk):
    model, made = make(name), batch()
    truth = plain(model, made)[(made["labels"][:, 1:] != -100).flatten()]
    wanted = torch.autograd.grad(truth.sum(), list(model.parameters()), allow_unused=True)
    scored = token_logprobs(model, made, chunk_tokens=chunk)
    torch.testing.assert_close(scored.logprobs, truth, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(scored.logprobs.sum(), list(model.parameters()), allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max() + 1))


def test_entropy_equals_the_plain_computation():
    model, made = make("llama"), batch()
    scored = token_logprobs(model, made, entropy=True, chunk_tokens=4)
    logits = model(input_ids=made["input_ids"]).logits[scored.rows, scored.positions - 1]
    p = logits.double().softmax(-1)
    torch.testing.assert_close(scored.entropy.double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(made["labels"][scored.rows, scored.positions] == logits.argmax(-1), scored.correct)


def test_all_masked_is_empty_with_a_gradient():
    made = batch()
    made["labels"][:] = -100
    model = make("llama")
    loss = Sft().loss(model, made)
    assert loss.units == {"token": 0.0} and float(loss.value()) == 0
    loss.value().backward()


@pytest.mark.parametrize("normaliser", ["token", "sequence"])
def test_a_step_may_be_cut_anywhere(normaliser):
    model, made, objective = make("llama"), batch(), Sft(normaliser=normaliser)
    whole = objective.loss(model, made)
    parts = [objective.loss(model, {k: v[i : i + 1] for k, v in made.items()}) for i in range(3)]
    summed = sum(p.units[normaliser] for p in parts)
    assert whole.units == {normaliser: summed} == objective.units(made)
    assert float(whole.value()) == pytest.approx(float(sum(p.value(whole.units) for p in parts)), rel=1e-5)


def test_sequence_normaliser_is_the_sum_of_means():
    model, made = make("llama"), batch()
    scored = token_logprobs(model, made)
    by_hand = sum(-float(scored.logprobs[scored.rows == r].mean()) for r in range(3))
    assert float(Sft(normaliser="sequence").loss(model, made).sums["sequence"]) == pytest.approx(by_hand, rel=1e-5)


def test_a_model_without_head_is_refused():
    with pytest.raises(InputError, match="no output embedding"):
        token_logprobs(torch.nn.Linear(2, 2), batch())
