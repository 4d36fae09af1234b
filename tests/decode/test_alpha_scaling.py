"""Alpha scaling against its equation by hand, block by block, and against the two models that it lies between."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.decode.mixtures import opened

from luthier.decode import AlphaScaling, generate, open_decoder
from luthier.decode.alpha_scaling import scale
from luthier.errors import InputError

IDS = torch.tensor([[5, 6, 7, 8, 9]])
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]


def tuned_in_blocks(model, seed=1):
    """A copy whose blocks alone are other ones."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".layers." in name or ".h." in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return other


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_ends_of_the_way_are_the_two_models(make_model, kind):
    base = make_model(kind, 0)
    tuned = tuned_in_blocks(base)
    assert torch.equal(logits(scale(base, tuned, 1.0)), logits(tuned))
    torch.testing.assert_close(logits(scale(base, tuned, 0.0)), logits(base))
    assert not torch.allclose(logits(scale(base, tuned, 0.5)), logits(tuned), atol=1e-2)
    torch.testing.assert_close(logits(scale(base, base, 3.0)), logits(base), atol=1e-4, rtol=1e-4)


def test_every_block_adds_alpha_times_what_tuning_adds(make_model):
    base = make_model("llama", 0)
    tuned = tuned_in_blocks(base)
    with torch.no_grad():
        states = tuned.model.embed_tokens(IDS)
        positions = torch.arange(IDS.shape[1])[None]
        mask = torch.full((5, 5), float("-inf")).triu(1)[None, None]
        around = {
            "position_embeddings": tuned.model.rotary_emb(states, positions),
            "attention_mask": mask,
            "position_ids": positions,
        }
        for before, after in zip(base.model.layers, tuned.model.layers, strict=True):
            plain, whole = before(states, **around), after(states, **around)
            states = plain + 1.7 * (whole - plain)
        wanted = tuned.lm_head(tuned.model.norm(states))
    torch.testing.assert_close(logits(scale(base, tuned, 1.7)), wanted, atol=1e-4, rtol=1e-4)


def test_an_adapter_on_its_base_needs_no_second_copy(make_model, tokenizer):
    base = make_model("llama", 0)
    plain = copy.deepcopy(base)
    torch.manual_seed(3)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    merged = copy.deepcopy(adapted).merge_and_unload()
    model = scale(adapted, adapted, 1.6)
    held = {id(p) for p in adapted.parameters()}
    assert all(id(parameter) in held for parameter in model.parameters())
    torch.testing.assert_close(logits(model), logits(scale(plain, merged, 1.6)), atol=1e-4, rtol=1e-4)


def test_caches_of_both_sets_of_blocks(make_model, tokenizer):
    base = make_model("llama", 0)
    mixture = opened(AlphaScaling(base=base, tuned=tuned_in_blocks(base), alpha=1.5), tokenizer)
    found = mixture.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    plain = mixture.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(found, plain)
    answers = generate(mixture, tokenizer, PROMPTS, max_new_tokens=5)
    assert [a.ids for a in answers] == [generate(mixture, tokenizer, [p], max_new_tokens=5)[0].ids for p in PROMPTS]


def test_what_does_not_correspond_is_refused(make_model, tokenizer):
    for base, tuned in (
        (make_model("llama", 0), make_model("llama", 1, num_hidden_layers=3)),
        (make_model("llama", 0), make_model("gpt2", 1)),
    ):
        with pytest.raises(InputError, match="blocks do not correspond"):
            open_decoder(AlphaScaling(base=base, tuned=tuned), {"base": tokenizer, "tuned": tokenizer})
    with pytest.raises(InputError, match="one stack of blocks"):
        scale(make_model("bart", 0), make_model("bart", 1), 1.0)
