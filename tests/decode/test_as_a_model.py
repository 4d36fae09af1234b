"""A decoder stands wherever a model does: beams, likelihoods, a task that grades answers."""

from __future__ import annotations

import pytest
import torch
from tests.decode.mixtures import logprobs, opened

from luthier.data.settings import DataSettings
from luthier.decode import Eft, likelihoods
from luthier.evaluate.generation import Generation
from luthier.evaluate.task import Context


@pytest.fixture(scope="module")
def mixture(make_model, tokenizer):
    base, tuned, before = (make_model("llama", seed) for seed in range(3))
    return opened(Eft(base=base, tuned=tuned, tuned_base=before, weight=0.8), tokenizer)


def said(mixture, ids):
    """(vocabulary,) float64 of the mixture by hand."""
    base, tuned, before = (logprobs(mixture.opened[name].model, ids) for name in ("base", "tuned", "tuned_base"))
    return torch.log_softmax(base + 0.8 * (tuned - before), -1)


def test_likelihoods_are_those_of_the_mixture(mixture):
    prompts, answers = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]
    for prompt, answer, found in zip(prompts, answers, likelihoods(mixture, prompts, answers), strict=True):
        wanted = sum(float(said(mixture, [*prompt, *answer[:at]])[token]) for at, token in enumerate(answer))
        assert found.tokens == len(answer)
        assert found.logprob == pytest.approx(wanted, abs=1e-4)


def test_beams_find_what_trying_everything_finds(mixture):
    prompt, count = [5, 6, 7], 2
    first = said(mixture, prompt)
    best = max(
        (float(first[a] + said(mixture, [*prompt, a]).max()), a, int(said(mixture, [*prompt, a]).argmax()))
        for a in range(len(first))
    )
    out = mixture.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        num_beams=len(first),
        do_sample=False,
        pad_token_id=0,
        eos_token_id=10_000,
    )
    assert out[0, 3:].tolist() == list(best[1:])


def test_a_task_grades_a_decoder(mixture, tokenizer):
    task = Generation(grader="exact", max_new_tokens=4)
    rows = [{"id": str(i), "prompt": text, "completion": "x", "where": f"r:{i}"} for i, text in enumerate(("abc", "d"))]
    context = Context(data=DataSettings.model_validate({"source": "-", "template": "none"}))
    items = task.run(mixture, tokenizer, rows, context)
    assert [item.id for item in items] == ["0", "1"]
    assert all(item.detail["tokens"] <= 4 for item in items)
