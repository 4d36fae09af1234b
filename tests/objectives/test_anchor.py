"""The anchor to the base, its place beside an objective, and cosine logits."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier.errors import InputError
from luthier.objectives import Sft, objective_of, token_logprobs
from luthier.objectives.anchor import BaseAnchor, anchor_loss
from luthier.objectives.cosine import class_vectors, cosine_logits


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_it_is_the_divergence_and_the_entropy_of_the_base(temperature):
    logits, base = drawn(6, 5), drawn(6, 5, seed=1)
    p, q = (torch.distributions.Categorical(logits=t / temperature) for t in (base, logits))
    wanted = temperature**2 * (torch.distributions.kl_divergence(p, q) + p.entropy())
    torch.testing.assert_close(anchor_loss(logits, base, temperature), wanted)


def test_gradient_by_hand():
    """softmax(logits) - target, where the target is a constant also if it holds some of the model's own answer."""
    base = drawn(6, 5, seed=1)
    for alpha in (1.0, 0.4):
        logits = drawn(6, 5).requires_grad_()
        anchor_loss(logits, base, 1.0, alpha).sum().backward()
        target = (alpha * base + (1 - alpha) * logits.detach()).softmax(-1)
        torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - target)
    logits = base.clone().requires_grad_()
    anchor_loss(logits, base).sum().backward()
    assert logits.grad.abs().max() < 1e-12


def test_16_bit_logits_are_judged_in_32():
    assert anchor_loss(drawn(3, 4).bfloat16(), drawn(3, 4).bfloat16()).dtype == torch.float32


class Frozen:
    """A context that puts other weights into a model for a while."""

    def __init__(self, model, other):
        self.model, self.other = model, {k: v.clone() for k, v in other.state_dict().items()}

    def __call__(self):
        return self

    def __enter__(self):
        self.now = {k: v.clone() for k, v in self.model.state_dict().items()}
        for name, tensor in self.model.named_parameters():
            tensor.data.copy_(self.other[name])

    def __exit__(self, *_):
        for name, tensor in self.model.named_parameters():
            tensor.data.copy_(self.now[name])


def llama(seed, kind="llama"):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32, **shape))
    model.lm_head.requires_grad_(False)
    return model


def batch():
    ids = torch.randint(0, 32, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = labels[1, 7:] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("known", [True, False])
def test_at_each_labelled_token_against_whole_logits(chunk, known, monkeypatch):
    model, other = llama(0), llama(1)
    other.lm_head.load_state_dict(model.lm_head.state_dict())
    if not known:
        monkeypatch.setattr("luthier.objectives.logprobs._after_head", lambda *_: None)
    anchor = BaseAnchor(Frozen(model, other), temperature=2.0, alpha=0.7)
    scored = token_logprobs(model, batch(), chunk_tokens=chunk, anchor=anchor)
    scored.anchored.sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    ids, chosen = batch()["input_ids"], batch()["labels"][:, 1:] != -100
    base = other(input_ids=ids).logits[:, :-1][chosen].detach()
    wanted = anchor_loss(model(input_ids=ids).logits[:, :-1][chosen], base, 2.0, 0.7)
    torch.testing.assert_close(scored.anchored, wanted, rtol=1e-5, atol=1e-5)
    wanted.sum().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("objective", [Sft(), objective_of([{"method": "sft"}, {"method": "sft", "weight": 0.5}])])
def test_beside_an_objective_and_in_none_of_its_sums(objective):
    model, other = llama(0), llama(1)
    other.lm_head.load_state_dict(model.lm_head.state_dict())
    plain = objective.loss(model, batch())
    with_anchor = objective.loss(model, batch(), anchor=BaseAnchor(Frozen(model, other)))
    assert plain.anchor is None and torch.equal(plain.value(), with_anchor.value())
    tokens = float((batch()["labels"][:, 1:] != -100).sum())
    assert with_anchor.metrics["anchor_loss"] == (pytest.approx(float(with_anchor.anchor.detach())), tokens)


def test_a_head_that_moves_is_refused():
    model = llama(0)
    model.lm_head.requires_grad_(True)
    with pytest.raises(InputError, match="the head moves"):
        token_logprobs(model, batch(), anchor=BaseAnchor(Frozen(model, llama(1))))


def test_class_vectors_are_unit_means_of_unit_features():
    features = drawn(4, 3, 6)
    found = class_vectors(features)
    by_hand = sum(f / f.norm(dim=-1, keepdim=True) for f in features.unbind(1))
    torch.testing.assert_close(found, by_hand / by_hand.norm(dim=-1, keepdim=True))
    scaled = features * torch.tensor([2.0, 0.1, 7.0])[None, :, None]
    torch.testing.assert_close(class_vectors(scaled), found)
    with pytest.raises(InputError, match="cancel out"):
        class_vectors(torch.stack([features[:, 0], -features[:, 0]], dim=1))
    with pytest.raises(InputError, match="classes, templates, width"):
        class_vectors(features[:, :0])


def test_cosine_logits_by_hand():
    features, classes = drawn(5, 6), class_vectors(drawn(4, 1, 6, seed=2))
    found = cosine_logits(features, classes, 10.0)
    wanted = [[10 * F.cosine_similarity(f, c, dim=0) for c in classes] for f in features]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    torch.testing.assert_close(cosine_logits(3 * features, classes, 10.0), found)
