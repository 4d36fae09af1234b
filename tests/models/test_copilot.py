"""The Copilot's module: exact causality, one pass and many steps agree, and what is copied from the Pilot."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from luthier.errors import InputError
from luthier.models.copilot import CONFIG, WEIGHTS, Copilot

VOCABULARY, WIDTH = 19, 32
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def pilot(kind="llama", **changes):
    torch.manual_seed(0)
    sizes = {"gpt2": {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 3, "n_head": 4}}
    config = CONFIG_MAPPING[kind](**{**sizes.get(kind, LLAMA), **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def made(seed=3, **settings):
    """A Copilot whose head is not zero any more."""
    copilot = Copilot.of(pilot(), seed=seed, **settings)
    torch.nn.init.normal_(copilot.head.weight, generator=torch.Generator().manual_seed(seed))
    return copilot


def inputs(rows=3, count=6, columns=4):
    draw = torch.Generator().manual_seed(1)
    errors = torch.randn(rows, count, VOCABULARY, generator=draw)
    visible = torch.tensor([[True] * columns, [False] * 2 + [True] * (columns - 2), [True] * (columns - 1) + [False]])
    prompt = torch.randn(rows, columns, WIDTH, generator=draw)
    return errors, prompt, visible[:rows], torch.randn(rows, count, WIDTH, generator=draw)


@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("layers", [2, 3, 4])
def test_errors_and_states_from_a_token_on_never_change_its_guess(layers, current):
    copilot, (errors, prompt, visible, states) = made(layers=layers, include_current=current), inputs()
    said = copilot(errors, prompt, visible, states)
    for at in range(errors.shape[1]):
        other, moved = errors.clone(), states.clone()
        other[:, at:] += 5.0
        moved[:, at + current :] += 5.0  # the state that gave prediction `at` depends on labels before it only
        again = copilot(other, prompt, visible, moved)
        assert torch.equal(again[:, : at + 1], said[:, : at + 1])
        if at + 1 < errors.shape[1]:
            assert not torch.allclose(again[:, at + 1], said[:, at + 1])


@pytest.mark.parametrize("current", [False, True])
def test_the_state_of_a_prediction_is_seen_only_if_asked(current):
    copilot, (errors, prompt, visible, states) = made(layers=2, include_current=current), inputs()
    said, moved = copilot(errors, prompt, visible, states), states.clone()
    moved[:, 2] += 5.0
    same = torch.equal(copilot(errors, prompt, visible, moved)[:, 2], said[:, 2])
    assert same is not current


@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("width", [None, 48])
def test_steps_with_a_memory_are_the_whole_pass(width, current):
    copilot, (errors, prompt, visible, states) = made(layers=4, width=width, include_current=current), inputs()
    past = copilot.begin(prompt, visible)
    before = [None, *errors.unbind(1)]
    found = torch.stack([copilot.step(before[i], states[:, i], past) for i in range(errors.shape[1])], dim=1)
    torch.testing.assert_close(found, copilot(errors, prompt, visible, states))


def test_padding_of_prompts_is_not_seen():
    copilot, (errors, prompt, visible, states) = made(layers=2), inputs()
    said = copilot(errors, prompt, visible, states)
    filled = torch.where(visible[..., None], prompt, 1e3)
    assert torch.equal(copilot(errors, filled, visible, states), said)
    alone = copilot(errors[1:2], prompt[1:2, 2:], visible[1:2, 2:], states[1:2])
    torch.testing.assert_close(alone[0], said[1])


def test_layers_are_the_pilots_where_they_fit():
    model = pilot()
    copilot = Copilot.of(model)
    assert copilot.copied == len(copilot.layers) == 3
    for mine, theirs in zip(copilot.layers, model.model.layers, strict=True):
        assert torch.equal(mine.q_proj.weight, theirs.self_attn.q_proj.weight)
        assert torch.equal(mine.down_proj.weight, theirs.mlp.down_proj.weight)
        assert mine.q_proj.weight.data_ptr() != theirs.self_attn.q_proj.weight.data_ptr()
    ends = Copilot.of(model, layers=2).layers
    assert torch.equal(ends[1].up_proj.weight, model.model.layers[2].mlp.up_proj.weight)
    assert Copilot.of(model, width=48).copied == 0
    assert Copilot.of(pilot("gpt2")).copied == 0
    assert Copilot.of(pilot(num_hidden_layers=1)).config.layers == 2


def test_a_wrapped_pilot_gives_the_weights_below_its_adapter():
    from peft import LoraConfig, get_peft_model

    plain = Copilot.of(pilot()).state_dict()
    wrapped = Copilot.of(get_peft_model(pilot(), LoraConfig(target_modules=["q_proj", "up_proj"]))).state_dict()
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)


def test_biases_are_taken_and_other_kinds_of_norms_are_not():
    qwen = Copilot.of(pilot("qwen2"))
    assert qwen.copied == 3 and qwen.config.bias
    model = pilot("gemma", head_dim=8)
    torch.nn.init.constant_(model.model.layers[0].input_layernorm.weight, 0.5)  # Gemma's norm multiplies by 1 + w
    assert torch.equal(Copilot.of(model).layers[0].input_norm.weight, torch.ones(WIDTH))


def test_nothing_is_drawn_from_the_global_state_and_an_untrained_one_says_nothing():
    model = pilot()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (Copilot.of(model, width=48, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.error_in.weight, again.error_in.weight)
    assert not torch.equal(first.error_in.weight, other.error_in.weight)
    assert not first(*inputs()).any()


@pytest.mark.parametrize("width", [None, 48])
def test_saved_and_loaded_it_says_the_same(tmp_path, width):
    copilot = made(layers=2, width=width)
    copilot.save(tmp_path / "copilot")
    again = Copilot.load(tmp_path / "copilot")
    assert again.config == copilot.config and not again.training
    assert torch.equal(again(*inputs()), copilot(*inputs()))


def test_what_cannot_be_read_or_replaced_is_told(tmp_path):
    with pytest.raises(InputError, match="no Copilot"):
        Copilot.load(tmp_path)
    folder = tmp_path / "copilot"
    made(layers=2).save(folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(InputError, match="damaged"):
        Copilot.load(folder)
    made(layers=2).save(folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"layers": 3}))
    with pytest.raises(InputError, match="damaged"):
        Copilot.load(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        made(layers=2).save(tmp_path / "other")


def test_pilots_that_cannot_have_one_are_refused():
    t5 = CONFIG_MAPPING["t5"](vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2)
    with pytest.raises(InputError, match="has an encoder"):
        Copilot.of(AutoModelForSeq2SeqLM.from_config(t5))
    with pytest.raises(InputError, match="heads"):
        Copilot.of(pilot(), width=50)
