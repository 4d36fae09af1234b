"""How far a tuning can get in so many steps, told before it begins: no more than that moves, and LISA all of it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier.methods import build
from luthier.models.topology import Topology
from luthier.tune import Probe
from stepping import drive

EXACT = {
    "full": {},
    "hft": {},
    "lisa": {"active_layers": 1, "interval": 2},
}
BOUNDED = {
    "lift": {"density": 0.1, "filter_rank": 4, "interval": 2},
    "sara": {"density": 0.1},
    "lt_sft": {"density": 0.1},
    "greentrainer": {"rho": 0.5, "interval": 2, "interval_unit": "step"},
}
ALL = EXACT | BOUNDED


def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **shape)).eval()


def loss_of(model, step):
    ids = torch.randint(1, 64, (8, 64), generator=torch.Generator().manual_seed(step))
    return model(input_ids=ids, labels=ids).loss


def attached(name, model, seed=0):
    probe = Probe(Topology.of(model), seed, batches=lambda: [{"step": 0}], loss=lambda m, b: loss_of(m, b["step"]))
    return build("tune", {"method": name, **ALL[name]}).attach(model, probe)


def moved(name, steps, seed=0):
    """(numbers that are not what they were, what was told before)."""
    model, before = llama(), dict(llama().named_parameters())
    tuned = attached(name, model, seed)
    told = tuned.reach(steps, 4)
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.1), lr=1e-2)
    tuned.on_phase_begin(optimizer, 4, steps)
    drive(tuned, optimizer, loss_of, steps)
    tuned.on_phase_end()
    after = dict(tuned.merged().named_parameters())
    return sum(int((after[key] != value).sum()) for key, value in before.items()), told


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("name", BOUNDED)
def test_no_more_moves_than_was_told(name, steps):
    count, (numbers, size) = moved(name, steps)
    assert 0 < count <= numbers and size == 4 * numbers


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("name", EXACT)
def test_what_was_told_moves(name, steps):
    """All but single entries, whose gradient is zero or whose step is too small to be seen."""
    count, (numbers, size) = moved(name, steps)
    assert 0.98 * numbers < count <= numbers and size == 4 * numbers


def test_lisas_delta_grows_with_the_draws():
    tuned = attached("lisa", llama())
    told = [tuned.reach(steps, 4)[0] for steps in (1, 2, 3, 5, 200)]
    block = sum(llama().get_parameter(name).numel() for name in tuned.units[0].names)
    outside = sum(llama().get_parameter(name).numel() for name in tuned.always)
    assert told[0] == told[1] == outside + block and told[-1] == tuned.elements()
    assert told == sorted(told) and all((size - outside) % block == 0 for size in told)


def test_a_second_choice_may_be_of_other_entries():
    model = llama()
    tuned = attached("lift", model)
    once, twice, ever = (tuned.reach(steps, 4)[0] for steps in (1, 2, 1000))
    size = sum(model.get_parameter(name).numel() for name in tuned.names)
    assert twice == 2 * once and ever == size
