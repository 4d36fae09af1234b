"""One table of laws for every tuning."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier.errors import InputError
from luthier.methods import build
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.tune import Full, Lora, Probe

TUNINGS = [{"method": "full"}, {"method": "full", "train_embeddings": False}, {"method": "lora", "rank": 4}]
TUNINGS += [{"method": "lora", "rank": 2, "targets": "attention", "peft": {"use_dora": True}}]
TUNINGS += [{"method": "hft"}, {"method": "hft", "granularity": "model", "redraw": "epoch", "train_norms": "none"}]
TUNINGS += [{"method": "lisa", "active_layers": 1, "interval": 1}, {"method": "lisa", "train_embeddings": False}]
TUNINGS += [{"method": "sara", "density": 0.3, "progressive_at": None}]
TUNINGS += [{"method": "greentrainer", "interval": 1}]
TUNINGS += [{"method": "greentrainer", "rho": 0.8, "interval": 1, "interval_unit": "step", "state": "keep"}]

TUNINGS += [{"method": "cofitune", "layers": "0%:50%"}, {"method": "cofitune", "layers": [1], "soft_mask": []}]
TUNINGS += [{"method": "cofitune", "layers": [0, 1], "modules": ["attention", "feed_forward"], "apply": "update"}]
TUNINGS += [{"method": "lt_sft", "density": 0.1, "full": {"min_steps": 1, "max_steps": 1}}]
TUNINGS += [
    {"method": "mask_tuning", "targets": kind, "grad_dropout": {"enabled": False}} for kind in ("attention", "all")
]
TUNINGS += [{"method": "dsee", "r": 4, "num_sparse": 16}]


def make():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return AutoModelForCausalLM.from_config(config).eval()


def attach(settings, seed=0):
    model = make()
    probe = Probe(Topology.of(model), seed, lambda: [batch()], lambda m, b: Sft().loss(m, b).value())
    return build("tune", settings).attach(model, probe)


def batch():
    ids = torch.arange(1, 21).view(2, 10)
    return {"input_ids": ids, "labels": ids.clone()}


def step(tuned, steps=2, rate=0.05, first=0, optimizer=None):
    """A few steps as the loop makes them; weight decay on, so that what should rest is tempted."""
    if optimizer is None:
        optimizer = torch.optim.AdamW(tuned.parameter_groups(0.1), lr=rate)
        tuned.on_phase_begin(optimizer, steps_per_epoch=2)
    for number in range(first, first + steps):
        tuned.on_step_begin(number)
        Sft().loss(tuned.model, batch()).value().backward()
        tuned.on_grad(number)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tuned.on_step_end(number)
    return optimizer


@pytest.mark.parametrize("settings", TUNINGS, ids=str)
class TestLaws:
    def test_equals_the_base_before_the_first_step(self, settings):
        base, tuned = make(), attach(settings)
        with torch.no_grad():
            a, b = base(**batch()).logits, tuned.model(**batch()).logits
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

    def test_only_what_may_move_moves(self, settings):
        tuned = attach(settings)
        frozen = {k: v.clone() for k, v in tuned.frozen().items()}
        moving = {k: v.detach().clone() for k, v in tuned.moving().items()}
        step(tuned)
        assert all(torch.equal(v, frozen[k]) for k, v in tuned.frozen().items())
        assert any(not torch.equal(v, moving[k]) for k, v in tuned.moving().items())

    def test_state_comes_back_bit_for_bit(self, settings):
        tuned, again = attach(settings), attach(settings)
        step(tuned)
        again.load_state_dict({k: v.clone() for k, v in tuned.state_dict().items()})
        assert all(torch.equal(a, b) for a, b in zip(tuned.moving().values(), again.moving().values(), strict=True))
        with pytest.raises(InputError, match="other parameters"):
            again.load_state_dict({"nothing": torch.zeros(1)})

    def test_merged_computes_the_same(self, settings):
        tuned = attach(settings)
        step(tuned)
        tuned.on_phase_end()
        with torch.no_grad():
            before = tuned.model(**batch()).logits
            after = tuned.merged()(**batch()).logits
        torch.testing.assert_close(before, after, rtol=0, atol=2e-5)

    def test_same_seed_same_start(self, settings):
        a, b = attach(settings, 3), attach(settings, 3)
        assert all(torch.equal(x, y) for x, y in zip(a.moving().values(), b.moving().values(), strict=True))

    def test_a_step_without_gradient_memory_leaves_none(self, settings):
        tuned = attach(settings)
        optimizer = step(tuned)
        with_state = {id(p) for p in optimizer.state}
        assert with_state <= {id(p) for p in tuned.moving().values()}
        assert all(p.grad is None for p in tuned.model.parameters())

    def test_a_resumed_phase_goes_on_as_if_never_stopped(self, settings):
        whole, broken, again = attach(settings), attach(settings), attach(settings)
        step(whole, 5)
        optimizer = step(broken, 3)
        other = torch.optim.AdamW(again.parameter_groups(0.1), lr=0.05)
        again.on_phase_begin(other, steps_per_epoch=2)
        again.load_state_dict({k: v.clone() for k, v in broken.state_dict().items()})
        again.load_extra_state(json.loads(json.dumps(broken.extra_state())))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step(again, 2, first=3, optimizer=other)
        for a, b in zip(whole.moving().values(), again.moving().values(), strict=True):
            assert torch.equal(a, b)

    def test_saved_and_loaded_computes_the_same(self, settings, tmp_path):
        tuned = attach(settings)
        step(tuned)
        kind = tuned.save(tmp_path)
        if kind == "adapter":
            loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
        else:
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            a, b = tuned.model(**batch()).logits, loaded(**batch()).logits
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

    def test_groups_hold_each_moving_parameter_once(self, settings):
        tuned = attach(settings)
        held = [id(p) for group in tuned.parameter_groups(0.1) for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in tuned.moving().values())


def test_full_can_leave_the_embeddings():
    names = attach({"method": "full", "train_embeddings": False}).moving()
    assert names and not any("embed_tokens" in name for name in names)


@pytest.mark.parametrize("targets", [("q_prj",), "nothing.*here", ("q_proj", "gone")])
def test_a_target_that_matches_nothing_is_an_error(targets):
    with pytest.raises(InputError, match="matches no module"):
        attach({"method": "lora", "targets": targets})


def test_near_names_are_suggested():
    with pytest.raises(InputError, match="did you mean 'q_proj'"):
        attach({"method": "lora", "targets": ["q_prj"]})


@pytest.mark.parametrize(
    ("options", "phrase"),
    [({"rank_patern": {}}, "rank_pattern"), ({"r": 3}, "tune.rank"), ({"inference_mode": True}, "the run decides")],
)
def test_options_of_peft_are_checked(options, phrase):
    with pytest.raises(ValueError, match=phrase):
        Lora(peft=options)


def test_ranges_are_checked():
    for wrong in ({"rank": 0}, {"dropout": 1.0}, {"alpha": 0}):
        with pytest.raises(ValueError, match=r"(?i)input should"):
            Lora(**wrong)
    with pytest.raises(ValueError, match=r"(?i)extra"):
        Full(rank=3)
