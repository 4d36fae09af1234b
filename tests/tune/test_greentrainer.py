"""GreenTrainer: the choice at work against freezing by hand, what it costs, and what cannot be."""

import copy
import json

import numpy as np
import pytest
import torch
from tests.tune.greentrainer_models import EVERY_STEP, attach, batch, bits, chosen_by, loss, make, probe_of, run
from torch.utils.flop_counter import FlopCounterMode

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.train import Loop, TrainSettings, probing
from luthier.tune import GreenTrainer, Lora, Probe
from luthier.worlds.facts import Facts, new_model

# The choice at work


@pytest.mark.parametrize("state", ["reset", "keep"])
def test_equals_freezing_by_hand(state):
    """The oracle: requires_grad by the names in the history, AdamW without what was chosen, moments by hand."""
    tuned = attach(GreenTrainer(rho=0.6, interval=2, interval_unit="step", state=state))
    optimizer = run(tuned, 8)
    chosen = chosen_by(tuned)
    assert len(chosen) == 4 and len({frozenset(c) for c in chosen}) > 1
    model, kept = make(), {}
    for step in range(8):
        if step % 2 == 0:
            if state == "reset":
                kept = {name: s for name, s in kept.items() if name in chosen[step // 2]}
            moving = {n: p for n, p in model.named_parameters() if n in chosen[step // 2]}
            for name, p in model.named_parameters():
                p.requires_grad_(name in moving)
            groups = [
                {"params": [p for p in moving.values() if p.ndim >= 2], "weight_decay": 0.1},
                {"params": [p for p in moving.values() if p.ndim < 2], "weight_decay": 0.0},
            ]
            by_hand = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-3)
            by_hand.state.update({moving[name]: s for name, s in kept.items() if name in moving})
        loss(model, batch(step)).backward()
        by_hand.step()
        model.zero_grad(set_to_none=True)
        kept |= {name: by_hand.state[p] for name, p in moving.items()}
    for (name, a), b in zip(tuned.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7, msg=name)
    held = {name for name, p in tuned.model.named_parameters() if p in optimizer.state}
    assert held == (chosen[-1] if state == "reset" else set().union(*chosen))


def test_only_what_is_chosen_moves():
    tuned = attach(GreenTrainer(rho=0.5, interval=1))
    optimizer = None
    for first in range(0, 6, 2):
        before = {name: p.detach().clone() for name, p in tuned.model.named_parameters()}
        optimizer = run(tuned, 2, optimizer, first)
        moved = {name for name, p in tuned.model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == chosen_by(tuned)[-1] == set(tuned.selection.trained)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rho", [0.5, 0.7, 0.9])
def test_a_step_costs_no_more_than_rho_by_torchs_own_counter(rho, tied):
    """Forward and backward of the micro-batch, against full tuning; floor quantisation may add up to 2 N quanta."""
    tuned = attach(GreenTrainer(rho=rho, quanta=4000), make(tied))

    def count():
        with FlopCounterMode(display=False) as counter:
            loss(tuned.model, batch()).backward()
        tuned.model.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    full = count()
    run(tuned, 1)
    (choice,) = tuned.history["choices"]
    counted, count_of = count() / full, len(tuned.costs.names)
    assert counted <= rho + 0.02 and choice["share"] <= rho + 2 * count_of / 4000
    assert counted <= choice["share"] + 0.02  # norms and embeddings have a price there and no product here


def test_epochs_and_steps_and_where_a_phase_goes_on():
    for settings, at in (
        (GreenTrainer(interval=2), [0, 4]),
        (GreenTrainer(interval=3, interval_unit="step"), [0, 3, 6]),
    ):
        tuned = attach(settings)
        run(tuned, 8)
        assert [choice["step"] for choice in tuned.history["choices"]] == at


def test_resumed_without_a_new_probe():
    settings = GreenTrainer(interval=1)
    whole, broken = attach(settings), attach(settings)
    run(whole, 6)
    optimizer = run(broken, 3)
    asked = []
    model = make()
    probe = Probe(Topology.of(model), 0, lambda: asked.append(1) or [batch(0), batch(1)], loss)
    again = attach(settings, model, probe)
    other = torch.optim.AdamW(again.parameter_groups(0.1), lr=1e-3)
    again.on_phase_begin(other, 2)
    again.load_state_dict(broken.state_dict())
    again.load_extra_state(json.loads(json.dumps(broken.extra_state())))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(again, 1, other, first=3)
    assert not asked
    run(again, 2, other, first=4)
    assert asked
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    one, two = whole.history, again.history
    assert one["training"] == two["training"] and chosen_by(whole) == chosen_by(again)


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    """In the loop itself, from a checkpoint within a period and across the next choice."""
    rows = Facts(0).examples(range(1))
    settings = TrainSettings(learning_rate=1e-3, max_steps=6, effective_batch_size=40, save_steps=1)
    outcomes = []
    for stops in ((None,), (2, None)):
        for until in stops:
            torch.manual_seed(0)
            model = new_model(0, 2)
            probe = probing.probe_of(Topology.of(model), Sft(), settings, rows)
            tuned = GreenTrainer(interval=1).attach(model, probe)
            Loop(tuned, Sft(), settings, rows, directory=tmp_path / str(len(stops)), device="cpu").run(until=until)
        outcomes.append((bits(dict(model.named_parameters())), tuned.history))
    (weights, history), (again, same) = outcomes
    assert weights == again and len(history["choices"]) == 2
    assert history["training"] == same["training"] and history["full"] == same["full"]
    for choice in (*history["choices"], *same["choices"]):
        del choice["probe"]  # a new process measures the costs of a pass once more
    assert history["choices"] == same["choices"]


# The ledger


def test_the_running_total_is_that_of_the_passes_that_were_made(tmp_path):
    tuned = attach(GreenTrainer(rho=0.6, interval=2, interval_unit="step", probe_batches=2))
    optimizer = run(tuned, 4, parts=3)
    tuned.model.eval()
    with torch.no_grad():
        loss(tuned.model, batch())  # an evaluation is no training
    tuned.on_phase_end()
    loss(tuned.model, batch())
    history = tuned.history
    first, second = history["choices"]
    assert first["passes"] == second["passes"] == 6
    full = tuned.costs.full
    assert history["full"] == 12 * full and history["training"] == pytest.approx(
        6 * full * (first["share"] + second["share"])
    )
    for choice in history["choices"]:
        chosen = np.array([name in choice["active"] for name in tuned.costs.names])
        assert choice["share"] == tuned.costs.share(chosen)
    asked = np.array([name in tuned.importance for name in tuned.costs.names])
    assert history["probes"] == 2 * 4 * tuned.costs.step(asked) + tuned.costs.forward
    assert history["share_with_probes"] == (history["training"] + history["probes"]) / history["full"]
    assert tuned.save(tmp_path) == "model"
    assert json.loads((tmp_path / "selection_history.json").read_text()) == history
    assert optimizer.state


def test_a_smaller_micro_batch_counts_for_less():
    tuned = attach(GreenTrainer())
    run(tuned, 1)
    loss(tuned.model, {name: tensor[:1] for name, tensor in batch().items()}).backward()
    assert tuned.history["choices"][0]["passes"] == pytest.approx(1 + 1 / 3)


# What cannot be


def test_a_rho_below_the_forward_pass_leaves_the_least_backward():
    tuned = attach(GreenTrainer(rho=0.1, min_backward=0.2, quanta=4000))
    run(tuned, 1)
    (choice,), costs = tuned.history["choices"], tuned.costs
    allowed = (costs.forward + 0.2 * (costs.full - costs.forward)) / costs.full
    assert choice["rho"] == pytest.approx(allowed) and choice["rho"] > 0.4
    assert choice["share"] <= allowed + 2 * len(costs.names) / 4000


def test_a_budget_too_small_for_any_tensor_names_one_that_is_not():
    tuned = attach(GreenTrainer())
    run(tuned, 1)
    forward = tuned.costs.forward / tuned.costs.full
    with pytest.raises(InputError, match="no tensor costs so little") as caught:
        run(attach(GreenTrainer(rho=forward + 1e-4)), 1)
    least = float(str(caught.value).rstrip(".").rpartition(" ")[2])
    with pytest.raises(InputError, match=f"at least {least:g}"):
        run(attach(GreenTrainer(rho=least - 0.001)), 1)
    asked = attach(GreenTrainer(rho=least))
    try:
        run(asked, 1)
        assert chosen_by(asked)[0]
    except InputError as error:  # it fits, and a step on it does not lower the loss
        assert "of the" in str(error)


def test_nothing_that_helps_is_an_error_at_first_and_keeps_the_last_choice_later():
    flat = [0.0]

    def fading(model, given):
        return loss(model, given) * flat[0]

    model = make()
    with pytest.raises(InputError, match="on none lowers the loss"):
        run(attach(GreenTrainer(), model, probe_of(model, fading)), 1)
    model, flat[0] = make(), 1.0
    tuned = attach(GreenTrainer(**EVERY_STEP, state="keep"), model, probe_of(model, fading))
    optimizer = run(tuned, 1)
    flat[0] = 0.0
    run(tuned, 1, optimizer, first=1)
    first, second = tuned.history["choices"]
    assert second["kept"] and not first["kept"] and second["active"] == first["active"]
    assert second["share"] == first["share"] and second["value"] == 0


def test_a_loss_that_is_not_finite_is_an_error_and_weights_come_back():
    model = make()
    tuned = attach(GreenTrainer(), model, probe_of(model, lambda m, b: loss(m, b) * float("nan")))
    before = bits(dict(model.named_parameters()))
    with pytest.raises(InputError, match="not finite"):
        run(tuned, 1)
    assert bits(dict(model.named_parameters())) == before


def test_without_data_it_is_refused_at_once():
    model = make()
    with pytest.raises(InputError, match="the run's own rows"):
        GreenTrainer().attach(model, Probe(Topology.of(model)))
    with pytest.raises(InputError, match="no batch"):
        run(attach(GreenTrainer(), model, Probe(Topology.of(model), 0, list, loss)), 1)


def test_an_adapter_below_is_refused():
    model = make()
    lora = Lora(rank=2).attach(model, Probe(Topology.of(model)))
    with pytest.raises(InputError, match="plain model"):
        GreenTrainer().attach(lora.model, probe_of(lora.model))


def test_numbers_out_of_range_are_refused():
    wrong = [{"rho": 0}, {"rho": 1.01}, {"rho": -0.5}, {"interval": 0}, {"interval_unit": "day"}, {"quanta": 1}]
    for more in [*wrong, {"probe_batches": 0}, {"cost": "guess"}, {"min_backward": 0}, {"state": "drop"}]:
        with pytest.raises(ValueError, match=r"(?i)input should"):
            GreenTrainer(**more)
