"""A Pilot with its Copilot: the rule by hand, the Copilot's own guesses fed back, and what must change nothing."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from tests.decode.conftest import VOCABULARY
from tests.decode.mixtures import opened

from luthier.decode import CopilotDecoder, generate
from luthier.decode.copilot import corrected
from luthier.decode.sampling import Sampler
from luthier.errors import InputError
from luthier.models.copilot import Copilot

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
NEW = 6


def copilot_of(pilot, seed=0, **settings):
    """An untrained Copilot that says something."""
    found = Copilot.of(pilot, seed=seed, **settings).eval()
    torch.nn.init.normal_(found.head.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
    return found


@pytest.fixture(scope="module")
def pilot(make_model):
    return make_model("llama", 0)


def by_hand(pilot, copilot, prompt, scale, count):
    """Greedy, all read again at every step: the whole pass of the Copilot over its own guesses."""
    ids, guesses = list(prompt), []
    for _ in range(count):
        with torch.no_grad():
            out = pilot(input_ids=torch.tensor([ids]), output_hidden_states=True)
            embedded = out.hidden_states[0][:, : len(prompt)]
            pooled = torch.stack(out.hidden_states[1:]).mean(0)[:, len(prompt) - 1 :]
            errors = torch.stack([*guesses, torch.zeros(len(VOCABULARY))])[None]
            visible = torch.ones(1, len(prompt), dtype=torch.bool)
            guess = copilot(errors, embedded, visible, pooled)[0, -1]
        guesses.append(guess)
        ids.append(int((out.logits[0, -1].softmax(-1) + scale * guess).argmax()))
        if ids[-1] == 2:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("current", [False, True])
def test_greedy_answers_are_those_of_the_rule(make_model, tokenizer, kind, current):
    model = make_model(kind, 1)
    copilot = copilot_of(model, layers=3, include_current=current)
    mixed = opened(CopilotDecoder(base=model, copilot=copilot, scale=0.8), tokenizer)
    found = [g.ids for g in generate(mixed, tokenizer, PROMPTS, max_new_tokens=NEW)]
    assert found == [by_hand(model, copilot, prompt, 0.8, NEW) for prompt in PROMPTS]
    plain = [g.ids for g in generate(model, tokenizer, PROMPTS, max_new_tokens=NEW)]
    assert found != plain


def test_a_scale_of_zero_is_the_pilot_and_loads_nothing(pilot, tokenizer):
    decoder = CopilotDecoder(base=pilot, copilot="there is no such folder", scale=0)
    mixed = opened(decoder, tokenizer)
    assert not mixed.terms["base"].hidden
    for how in ({}, {"temperature": 1.0, "seed": 3}):
        ours, theirs = (generate(m, tokenizer, PROMPTS, max_new_tokens=NEW, **how) for m in (mixed, pilot))
        assert [g.ids for g in ours] == [g.ids for g in theirs]
    with pytest.raises(InputError, match="no Copilot"):
        opened(CopilotDecoder(base=pilot, copilot="there is no such folder"), tokenizer)


def test_an_untrained_copilot_changes_nothing(pilot, tokenizer):
    mixed = opened(CopilotDecoder(base=pilot, copilot=Copilot.of(pilot, layers=2)), tokenizer)
    ours, theirs = (generate(m, tokenizer, PROMPTS, max_new_tokens=NEW) for m in (mixed, pilot))
    assert [g.ids for g in ours] == [g.ids for g in theirs]


def test_a_saved_one_is_read_with_its_scale(pilot, tokenizer, tmp_path):
    copilot = copilot_of(pilot)
    copilot.save(tmp_path / "copilot")
    from_folder = CopilotDecoder(base=pilot, copilot=str(tmp_path / "copilot"))
    assert from_folder.share == 0.3
    models = [from_folder, CopilotDecoder(base=pilot, copilot=copilot, scale=0.3)]
    first, second = (generate(opened(m, tokenizer), tokenizer, PROMPTS, max_new_tokens=NEW) for m in models)
    assert [g.ids for g in first] == [g.ids for g in second]


def test_an_oracle_at_scale_one_gives_the_label():
    said = torch.randn(40, 19, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    labels = torch.arange(40) % 19
    error = torch.nn.functional.one_hot(labels, 19) - said.exp()
    found = corrected(said, error, 1.0).exp()
    torch.testing.assert_close(found, torch.nn.functional.one_hot(labels, 19).float(), atol=1e-6, rtol=0)


def test_an_oracle_lowers_every_squared_error_at_every_scale():
    draw = torch.Generator().manual_seed(1)
    said, labels = torch.randn(200, 19, generator=draw).log_softmax(-1), torch.randint(19, (200,), generator=draw)
    label = torch.nn.functional.one_hot(labels, 19)
    before = (label - said.exp()).square()
    for scale in (0.1, 0.3, 0.5, 0.8, 1.0):
        moved = said.exp() + scale * (label - said.exp())
        torch.testing.assert_close(corrected(said, label - said.exp(), scale).exp(), moved)  # stays a distribution
        assert bool(((label - moved).square() < before).all())


def test_what_is_not_above_zero_is_never_drawn_and_nothing_left_is_the_pilot():
    said = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25]]).log()
    guess = torch.tensor([[-1.0, 0.2, 0.0, 1e-12], [-1.0, -1.0, -0.5, -0.25]])
    found = corrected(said, guess, 1.0)
    assert found[0, 0] == -torch.inf and torch.equal(found[1], said[1])
    kept = torch.tensor([0.5, 0.2, 1e-10])
    torch.testing.assert_close(found[0, 1:].exp(), kept / kept.sum())
    noise = Sampler(temperature=5.0, seed=0).processors([[1]] * 2000, range(2000))
    drawn = found[:1].expand(2000, -1)
    for processor in noise:
        drawn = processor(torch.ones(2000, 1, dtype=torch.int64), drawn)
    assert set(drawn.argmax(-1).tolist()) == {1, 2, 3}


@pytest.mark.parametrize("kind", ["llama", "mamba"])  # Mamba's rows run apart
@pytest.mark.parametrize("current", [False, True])
def test_the_traced_correction_does_not_depend_on_the_batch(make_model, tokenizer, kind, current):
    pilot = make_model(kind, 2)
    decoder = CopilotDecoder(base=pilot, copilot=copilot_of(pilot, layers=2, include_current=current), scale=0.5)
    mixed, how = opened(decoder, tokenizer), {"max_new_tokens": NEW, "keep_logprobs": True}
    together = generate(mixed, tokenizer, PROMPTS, **how)
    for prompt, said in zip(PROMPTS, together, strict=True):
        (alone,) = generate(mixed, tokenizer, [prompt], **how)
        assert alone.ids == said.ids
        assert alone.logprobs["trace.moved"] == pytest.approx(said.logprobs["trace.moved"], rel=1e-4)


def test_what_does_not_fit_is_told(pilot, make_model, tokenizer):
    small = make_model("llama", 0, vocab_size=20)
    with pytest.raises(InputError, match="knows 20 tokens"):
        opened(CopilotDecoder(base=pilot, copilot=copilot_of(small)), tokenizer)
    narrow = make_model("gpt2", 0, n_embd=16)
    mixed = opened(CopilotDecoder(base=pilot, copilot=copilot_of(narrow)), tokenizer)
    with pytest.raises(InputError, match="of width 16"):
        generate(mixed, tokenizer, PROMPTS, max_new_tokens=2)
    with pytest.raises(ValidationError, match="greater than or equal"):
        CopilotDecoder(base=pilot, copilot="x", scale=-0.1)
    mixed = opened(CopilotDecoder(base=pilot, copilot=copilot_of(pilot)), tokenizer)
    with pytest.raises(InputError, match="token by token"):
        mixed(torch.tensor([PROMPTS[0]]))
    with pytest.raises(InputError, match="memory of its rows"):
        mixed.generate(torch.tensor([PROMPTS[0]]), num_beams=2, max_new_tokens=4, do_sample=False, pad_token_id=0)
