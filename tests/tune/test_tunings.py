"""One table of laws for every tuning."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier.errors import InputError
from luthier.methods import build
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.tune import Full, Lora, Probe

TUNINGS = [{"method": "full"}, {"method": "full", "train_embeddings": False}, {"method": "lora", "rank": 4}]
TUNINGS += [{"method": "lora", "rank": 2, "targets": "attention", "peft": {"use_dora": True}}]


def make():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return AutoModelForCausalLM.from_config(config).eval()


def attach(settings, seed=0):
    model = make()
    return build("tune", settings).attach(model, Probe(Topology.of(model), seed))


def batch():
    ids = torch.arange(1, 21).view(2, 10)
    return {"input_ids": ids, "labels": ids.clone()}


def step(tuned, rate=0.05):
    optimizer = torch.optim.SGD(tuned.parameter_groups(0.0), lr=rate)
    for number in range(2):
        loss = Sft().loss(tuned.model, batch())
        loss.value.backward()
        tuned.on_grad(number)
        optimizer.step()
        optimizer.zero_grad()


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
        with torch.no_grad():
            before = tuned.model(**batch()).logits
            after = tuned.merged()(**batch()).logits
        torch.testing.assert_close(before, after, rtol=0, atol=2e-5)

    def test_same_seed_same_start(self, settings):
        a, b = attach(settings, 3), attach(settings, 3)
        assert all(torch.equal(x, y) for x, y in zip(a.moving().values(), b.moving().values(), strict=True))

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
