"""Likelihoods equal the plain computation, whatever the batch."""

from __future__ import annotations

import math

import pytest
import torch

from luthier.decode.likelihood import likelihoods
from luthier.errors import InputError


def plain(model, prompt, continuation):
    """Independent: one row, full logits, token by token."""
    if not continuation:
        return 0.0
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            before = torch.tensor([[start, *continuation[:-1]]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=before).logits[0]
        else:
            ids = torch.tensor([prompt + continuation])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits.double(), -1)
    return sum(float(logprobs[i, token]) for i, token in enumerate(continuation))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mamba", "t5", "bart"])
def test_equals_the_plain_computation(name, make_model, prompts):
    model = make_model(name)
    continuations = [prompt[::-1] for prompt in prompts[1:]] + [[]]
    continuations[5] = continuations[5][:12]
    for size in (1, 70, 4096):
        scored = likelihoods(model, prompts, continuations, batch_tokens=size)
        for prompt, continuation, (logprob, tokens) in zip(prompts, continuations, scored, strict=True):
            assert tokens == len(continuation)
            assert logprob == pytest.approx(plain(model, prompt, continuation), abs=1e-4, rel=1e-5)


def test_the_next_token_probabilities_sum_to_one(make_model, prompts):
    model = make_model("llama")
    everything = [[token] for token in range(33)]
    scored = likelihoods(model, [prompts[0]] * 33, everything)
    assert math.fsum(math.exp(one.logprob) for one in scored) == pytest.approx(1, abs=1e-5)


def test_a_continuation_is_the_sum_of_its_parts(make_model, prompts):
    model = make_model("gpt2")
    prompt, first, second = prompts[0], prompts[4], prompts[5]
    whole, one, two = likelihoods(model, [prompt, prompt, prompt + first], [first + second, first, second])
    assert whole.logprob == pytest.approx(one.logprob + two.logprob, abs=1e-4)


def test_the_head_runs_only_where_it_must(make_model, prompts):
    model = make_model("llama")
    rows = []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    likelihoods(model, [prompts[6]] * 3, [[5], [6, 7], [8]])
    assert rows == [2]


def test_a_model_wrapped_by_peft(make_model, prompts):
    from peft import LoraConfig, get_peft_model

    base = make_model("llama")
    alone = likelihoods(base, prompts[:3], prompts[3:6])
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert likelihoods(wrapped, prompts[:3], prompts[3:6]) == alone


def test_refused_inputs_and_edges(make_model, prompts):
    model = make_model("llama").train()
    assert likelihoods(model, [], []) == [] and model.training
    assert likelihoods(model, prompts[:2], [[], []]) == [(0.0, 0), (0.0, 0)]
    seen = []
    likelihoods(model, prompts, prompts[::-1], progress=lambda *at: seen.append(at), batch_tokens=40)
    assert seen[-1] == (9, 9)
    with pytest.raises(InputError, match="prompt 1: it is empty"):
        likelihoods(model, [[5], []], [[5], [5]])
    with pytest.raises(InputError, match=r"prompt 0: prompt and continuation have 49 tokens, .* ends at 48"):
        likelihoods(model, [[5] * 40], [[5] * 9])
    with pytest.raises(InputError, match="continuation 0: holds the ids 33 to 33"):
        likelihoods(model, [[5]], [[33]])
    with pytest.raises(InputError, match="2 prompts, but 1 continuations"):
        likelihoods(model, [[5], [6]], [[5]])
