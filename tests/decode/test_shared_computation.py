"""What terms have in common is computed once, and comes out as if each had computed it: the same bits."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from peft import LoraConfig, get_peft_model

from luthier.decode import Eft, TransferQ, generate, sharing
from luthier.decode.mixture import Mixture, Opened, Session
from luthier.decode.opening import open_decoder
from luthier.models.topology import Topology
from luthier.weights import diff

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [13]]
LAYERS, FIRST = 6, 4  # blocks, and the first that was tuned
KINDS = ["llama", "gpt2", "bloom", "mistral", "qwen2", "gpt_neox", "phi", "gemma2", "gemma3_text"]
PARTS = ["adapter", "delta"]  # of gpt_neox no delta: its files name the head otherwise than its modules do
SIZE = {kind: {"n_layer" if kind in ("gpt2", "bloom") else "num_hidden_layers": LAYERS} for kind in KINDS}


@pytest.fixture(scope="module")
def write(tmp_path_factory, make_model, tokenizer):
    """kind, what changed (parts of names) -> folder with a base, a delta and an adapter on it; made once."""
    made = {}

    def save(model, folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def changed(kind, path, names, seed, **changes):
        tuned, random = make_model(kind, **SIZE[kind], **changes), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if any(part in name for part in names):
                    moves = torch.rand(parameter.shape, generator=random) < 0.2
                    parameter += 0.3 * moves * torch.randn(parameter.shape, generator=random)
        save(tuned, path.with_name(f"whole-{path.name}"))
        diff(path.with_name("base"), path.with_name(f"whole-{path.name}"), path)

    def adapter(kind, path, linears, seed, **changes):
        torch.manual_seed(seed)
        adapted = get_peft_model(make_model(kind, **SIZE[kind], **changes), LoraConfig(r=2, target_modules=linears))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        adapted.save_pretrained(path)

    def make(kind, names=None, **changes):
        key = kind, names, tuple(changes.items())
        if key not in made:
            root = made[key] = tmp_path_factory.mktemp(kind)
            base = make_model(kind, **SIZE[kind], **changes)
            blocks = Topology.of(base).blocks
            save(base, root / "base")
            parts = names or tuple(f"{block.path}." for block in blocks[FIRST:])
            changed(kind, root / "delta", parts, 1, **changes)
            changed(kind, root / "last", (f"{blocks[-1].path}.",), 2, **changes)
            linears = Topology.of(base).linears()
            upper = [path for block in blocks[FIRST:] for path in linears if path.startswith(f"{block.path}.")]
            chosen = [path for path in linears if any(part in path for part in names)] if names else upper
            if chosen:
                adapter(kind, root / "adapter", chosen, 3, **changes)
        return made[key]

    return make


def mixture(folder, part, *, share=True, decoder=Eft, **settings):
    given = [str(folder / one) for one in part] if isinstance(part, tuple) else str(folder / part)
    found = open_decoder(decoder(base=str(folder / "base"), tuned=given, **settings))
    if not share:
        found.shared = {}
    return found


def steps(model, prompts=PROMPTS, *, count=9, cached=True, asked=lambda step, name: True):
    """The session, and by step: term -> (rows, vocabulary) log-probabilities of the next token."""
    session = Session(model, dict.fromkeys(model.terms, prompts), range(len(prompts)), cached)
    random, found = torch.Generator().manual_seed(0), []
    for number in range(count):
        step = session.step()
        found.append({name: step.logprobs(name) for name in model.terms if asked(number, name)})
        session.feed(torch.randint(4, 33, (len(prompts),), generator=random))
    return session, found


def same(ours, theirs):
    return all(
        one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
        for one, other in zip(ours, theirs, strict=True)
    )


def calls(model, run):
    """How often the attention of each block ran."""
    inner = model.opened["base"].model
    counts = [0] * LAYERS
    hooks = []
    for block in Topology.of(inner).blocks:

        def count(*_, index=block.index):
            counts[index] += 1

        hooks.append(inner.get_submodule(block.attention_modules[0]).register_forward_hook(count))
    run()
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("kind", "part"), [pair for pair in product(KINDS, PARTS) if pair != ("gpt_neox", "delta")])
def test_terms_say_the_same_bits_as_when_each_runs_by_itself(write, kind, part, cached):
    folder = write(kind)
    ours, alone = (mixture(folder, part, share=share, weight=1.6) for share in (True, False))
    assert {name: lower.count for name, lower in ours.shared.items()} == {"base": FIRST, "tuned": FIRST}
    found, wanted = (steps(model, cached=cached)[1] for model in (ours, alone))
    assert same(found, wanted)
    assert not torch.equal(found[0]["base"], found[0]["tuned"])
    ids = torch.tensor([PROMPTS[1]])
    assert torch.equal(ours(ids).logits, alone(ids).logits)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("part", ["adapter", "delta"])
def test_what_was_not_tuned_runs_once_a_step(write, part, cached):
    folder = write("llama")
    ours, alone = (mixture(folder, part, share=share, weight=1.6) for share in (True, False))
    assert ours.shared  # found before the calls are counted
    once = [5] * FIRST + [10] * (LAYERS - FIRST)
    assert calls(ours, lambda: steps(ours, count=5, cached=cached)) == once
    assert calls(alone, lambda: steps(alone, count=5, cached=cached)) == [10] * LAYERS
    ids = torch.tensor([PROMPTS[1]])
    assert calls(ours, lambda: ours(ids)) == [1] * FIRST + [2] * (LAYERS - FIRST)


def test_keys_and_values_of_what_is_shared_are_held_once(write):
    def held(session):
        caches = [one.cache["past_key_values"] for one in (*session._streams.values(), *session._trunks)]
        tensors = [t for cache in caches for layer in cache.layers for t in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    folder = write("llama")
    ours, alone = (steps(mixture(folder, "delta", share=share))[0] for share in (True, False))
    assert held(ours) * 2 * LAYERS == held(alone) * (2 * LAYERS - FIRST)
    (trunk,) = ours._trunks
    assert trunk.states is None  # both terms have read everything


@pytest.mark.parametrize("part", ["adapter", "delta"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_beams_and_samples_are_those_of_terms_that_run_alone(write, tokenizer, kind, part):
    folder = write(kind)
    ours, alone = (mixture(folder, part, share=share, weight=1.6) for share in (True, False))
    ids = torch.tensor([PROMPTS[1], PROMPTS[1][::-1]])
    how = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "output_scores": True, "pad_token_id": 0}
    found, wanted = (model.generate(ids, return_dict_in_generate=True, **how) for model in (ours, alone))
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(found.sequences_scores, wanted.sequences_scores)
    how = {"max_new_tokens": 8, "temperature": 1.0, "keep_logprobs": True}
    assert generate(ours, tokenizer, PROMPTS, **how) == generate(alone, tokenizer, PROMPTS, **how)


@pytest.mark.parametrize("ahead", [1, 3, 8])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_texts_written_ahead_are_those_of_terms_that_run_alone(write, tokenizer, kind, ahead):
    folder = write(kind)
    fast = mixture(folder, "delta", weight=1.6, speculative=ahead)
    plain = mixture(folder, "delta", weight=1.6, share=False)
    assert fast.shared
    for how in ({}, {"repetition_penalty": 1.5}):
        found, wanted = (generate(model, tokenizer, PROMPTS, max_new_tokens=14, **how) for model in (fast, plain))
        assert found == wanted


@pytest.mark.parametrize("completion", ["tuned", "base"])
def test_forks_go_on_from_what_was_shared(write, tokenizer, completion):
    def letters(texts):
        return [text.count("a") - text.count("e") for text in texts]

    how = {"decoder": TransferQ, "reward": letters, "rollout_tokens": 4, "completion": completion}
    ours, alone = (mixture(write("gemma3_text"), "adapter", share=share, **how) for share in (True, False))
    how = {"max_new_tokens": 5, "keep_logprobs": True}
    assert generate(ours, tokenizer, PROMPTS, **how) == generate(alone, tokenizer, PROMPTS, **how)
    assert bool(ours.shared) == (completion == "tuned")  # else the base is the only term


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_term_that_was_left_behind_catches_up(write, kind, cached):
    """It reads in other pieces than by itself, so numbers are equal up to the rounding of float32."""
    folder = write(kind)
    ours, alone = mixture(folder, "adapter"), mixture(folder, "adapter", share=False)
    late = {"asked": lambda step, name: name == "base" or step % 4 == 0, "cached": cached}
    session, found = steps(ours, **late)
    for one, other in zip(found, steps(alone, **late)[1], strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-4)
    if cached:
        assert session._trunks[0].states is None  # both have read everything at the last step
    never = {"asked": lambda step, name: name == "tuned", "cached": cached}
    assert same(steps(ours, **never)[1], steps(alone, **never)[1])


def test_several_terms_share_what_all_of_them_left_alone(write):
    folder = write("llama")
    parts, weight = ("last", "adapter", "delta"), (0.3, 0.4, 0.5)
    ours, alone = (mixture(folder, parts, share=share, weight=weight) for share in (True, False))
    assert {lower.count for lower in ours.shared.values()} == {FIRST}
    assert len(ours.shared) == 4
    assert same(steps(ours)[1], steps(alone)[1])
    assert calls(ours, lambda: steps(ours, count=3)) == [3] * FIRST + [12] * (LAYERS - FIRST)


def test_other_prompts_are_read_by_each_term(write, tokenizer):
    folder = write("llama")
    theirs = {"own_prompts": {"tuned": [[20, 21], [22], [23, 24, 25, 26]]}, "max_new_tokens": 6, "keep_logprobs": True}
    ours, alone = mixture(folder, "adapter"), mixture(folder, "adapter", share=False)
    assert generate(ours, tokenizer, PROMPTS, **theirs) == generate(alone, tokenizer, PROMPTS, **theirs)
    assert not ours.session._trunks


@pytest.mark.parametrize(
    ("kind", "names", "changes", "count"),
    [
        ("llama", ("layers.0.",), {}, 0),
        ("llama", ("layers.1.self_attn", "layers.5."), {}, 1),
        ("llama", ("embed_tokens",), {}, 0),
        ("llama", ("lm_head",), {}, LAYERS - 1),
        ("llama", ("lm_head", "embed_tokens"), {"tie_word_embeddings": True}, 0),
        ("llama", ("model.norm.",), {}, LAYERS - 1),
        ("gpt2", ("wpe",), {}, 0),
        ("gpt2", ("ln_f",), {}, LAYERS - 1),
        ("bloom", ("word_embeddings_layernorm",), {}, 0),
    ],
)
def test_what_changed_says_how_much_is_shared(write, kind, names, changes, count):
    folder = write(kind, names, **changes)
    for part in ("delta", "adapter"):
        if (folder / part).is_dir():
            ours, alone = mixture(folder, part), mixture(folder, part, share=False)
            assert {lower.count for lower in ours.shared.values()} == ({count} if count else set())
            assert same(steps(ours, count=3)[1], steps(alone, count=3)[1])


def test_a_model_that_cannot_be_run_in_parts_runs_whole(write):
    """Its last block sees what its first one gave, past all that stands between them."""
    folder = write("llama")
    ours, alone = mixture(folder, "adapter"), mixture(folder, "adapter", share=False)
    for model in (ours, alone):
        layers, kept = model.opened["base"].model.model.layers, {}
        layers[0].register_forward_hook(lambda block, given, out, kept=kept: kept.update(out=out))
        layers[-1].register_forward_hook(lambda block, given, out, kept=kept: out + kept["out"])
    assert not ours.shared
    assert same(steps(ours)[1], steps(alone)[1])


@pytest.mark.parametrize("kind", ["mamba", "t5"])
def test_models_with_a_state_or_an_encoder_run_whole(make_model, kind):
    model = make_model(kind)
    opened = {"base": Opened(model, changed=frozenset()), "tuned": Opened(model, variant="+", changed=frozenset())}
    assert not Mixture(Eft(base=model, tuned=model), opened, 33).shared


def test_a_term_that_does_not_say_what_it_changed_runs_by_itself(make_model):
    model = make_model("llama")
    opened = {"base": Opened(model, changed=frozenset()), "tuned": Opened(model, variant="+")}
    assert not Mixture(Eft(base=model, tuned=model), opened, 33).shared


def test_an_older_transformers_runs_terms_by_themselves(write, monkeypatch):
    folder = write("llama")
    assert mixture(folder, "delta").shared
    monkeypatch.setattr(sharing, "DummyLayer", None)
    assert not mixture(folder, "delta").shared
