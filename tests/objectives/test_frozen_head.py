"""A head that does not move: value and gradient of the plain computation, with no logits kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from luthier.errors import InputError
from luthier.objectives import frozen_head, token_logprobs
from luthier.objectives.anchor import BaseAnchor
from luthier.tune.selector.compact import Chosen

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "capped": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=7.0),
    "scaled": CohereConfig(**SMALL, logit_scale=0.25, eos_token_id=1),
    "divided": GraniteConfig(**SMALL, logits_scaling=3.0),
    "gpt2": GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():  # logits large enough for a cap or a factor to matter
            parameter.mul_(4)
    model.get_output_embeddings().requires_grad_(False)
    return model.train()


def batch(rows: int = 3, length: int = 11) -> dict[str, Tensor]:
    ids = torch.randint(1, 60, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 7:] = -100
    return {"input_ids": ids, "labels": labels}


def plain(model: nn.Module, made: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=made["input_ids"], use_cache=False).logits[:, :-1].float()
    truth = -F.cross_entropy(logits.flatten(0, 1), made["labels"][:, 1:].flatten(), reduction="none")
    return truth[(made["labels"][:, 1:] != -100).flatten()]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [None, 5, 1])
def test_value_and_gradient_are_the_plain_ones(name: str, chunk: int | None) -> None:
    """Under a loss that weighs tokens differently."""
    model, made = make(name), batch()
    moving = [p for p in model.parameters() if p.requires_grad]
    truth = plain(model, made)
    weights = torch.randn(len(truth), generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad((truth * weights).sum(), moving, allow_unused=True)
    scored = token_logprobs(model, made, chunk_tokens=chunk, entropy=True)
    torch.testing.assert_close(scored.logprobs, truth, rtol=1e-6, atol=1e-6)
    assert not scored.correct.requires_grad and scored.entropy is not None and not scored.entropy.requires_grad
    got = torch.autograd.grad((scored.logprobs * weights).sum(), moving, allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max() + 1))


@pytest.mark.parametrize("frozen", [True, False])
def test_no_logits_are_kept(frozen: bool) -> None:
    model, made = make("llama"), batch()
    model.get_output_embeddings().requires_grad_(not frozen)
    token_logprobs(model, made)  # finds, once, what the model does to its logits
    kept: list[tuple[tuple[int, ...], StorageWeakRef]] = []

    def see(tensor: Tensor) -> Tensor:
        kept.append((tuple(tensor.shape), StorageWeakRef(tensor.untyped_storage())))
        return tensor

    with saved_tensors_hooks(see, lambda tensor: tensor):
        scored = token_logprobs(model, made)
    tokens = len(scored.logprobs)
    held = [shape for shape, storage in kept if not storage.expired()]
    assert ((tokens, 61) in held) != frozen and ((tokens, 32) in held)


def test_in_sixteen_bits_as_near_to_the_truth_as_the_plain_way() -> None:
    made = batch()
    exact = make("llama").double()
    truth = torch.autograd.grad(plain(exact, made).sum(), exact.model.norm.weight)[0]
    model = make("llama").bfloat16()
    near = torch.autograd.grad(plain(model, made).sum(), model.model.norm.weight)[0]
    ours = torch.autograd.grad(token_logprobs(model, made).logprobs.sum(), model.model.norm.weight)[0]
    assert ours.dtype == torch.bfloat16
    assert (ours - truth).norm() < 1.2 * (near - truth).norm() < 0.1 * truth.norm()


def test_what_is_trained_in_the_place_of_a_weight_moves_the_head() -> None:
    """A tied head whose weight has a stand-in at the embedding, and an adapter on the head."""
    model, made = make("tied"), batch()
    model.requires_grad_(False)
    chosen = Chosen("model.embed_tokens.weight", model, torch.arange(0, 61 * 32, 7))
    hidden = torch.zeros(2, 32)
    assert frozen_head.moves(model.get_output_embeddings(), hidden)
    token_logprobs(model, made).logprobs.sum().backward()
    whole = make("tied").requires_grad_(True)
    plain(whole, made).sum().backward()
    wanted = whole.model.embed_tokens.weight.grad.view(-1)[::7]
    torch.testing.assert_close(chosen.values.grad, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))

    adapted = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["lm_head"]))
    assert frozen_head.moves(adapted.get_output_embeddings(), hidden)
    assert not frozen_head.moves(make("llama").get_output_embeddings(), hidden)


def test_an_anchor_refuses_a_head_that_moves_by_a_stand_in() -> None:
    model = make("tied").requires_grad_(False)
    Chosen("model.embed_tokens.weight", model, torch.arange(5))
    with pytest.raises(InputError, match="the head moves"):
        token_logprobs(model, batch(), anchor=BaseAnchor(lambda: None))


def test_without_a_label_there_is_a_gradient_of_nothing() -> None:
    model, made = make("llama"), batch()
    made["labels"][:] = -100
    scored = token_logprobs(model, made, entropy=True)
    assert scored.logprobs.shape == scored.correct.shape == (0,)
    scored.logprobs.sum().backward()
