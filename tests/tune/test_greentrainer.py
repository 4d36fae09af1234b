"""GreenTrainer's own laws: a probe without a trace, importance by hand, freezing by hand, the ledger, the errors."""

import copy
import json

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.train import Loop, TrainSettings, probing
from luthier.tune import GreenTrainer, Lora, Probe
from luthier.tune.selector.loss_drop import tensor_importance
from luthier.tune.selector.slots import View
from luthier.worlds.facts import Facts, new_model

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
EVERY_STEP = {"interval": 1, "interval_unit": "step"}


def make(tied=False, **more):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **SHAPE, **more)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def batch(step=0):
    ids = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def loss(model, given):
    return Sft().loss(model, given).value()


def probe_of(model, loss=loss):
    return Probe(Topology.of(model), 0, lambda: [batch(0), batch(1)], loss)


def attach(settings, model=None, probe=None):
    model = make() if model is None else model
    return settings.attach(model, probe or probe_of(model))


def run(tuned, steps, optimizer=None, first=0, parts=1, rate=1e-3, watch=lambda step: None):
    if optimizer is None:
        optimizer = torch.optim.AdamW(tuned.parameter_groups(0.1), lr=rate)
        tuned.on_phase_begin(optimizer, steps_per_epoch=2)
    for step in range(first, first + steps):
        tuned.on_step_begin(step)
        watch(step)
        for part in range(parts):
            (tuned.probe.loss(tuned.model, batch(step * parts + part)) / parts).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tuned.on_step_end(step)
    return optimizer


def chosen_by(tuned):
    return [set(choice["active"]) for choice in tuned.history["choices"]]


def bits(value):
    """A copy of tensors and numbers, for comparing bit by bit."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().view(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    return [bits(part) for part in value] if isinstance(value, list | tuple) else value


# The probe


@pytest.mark.parametrize("kind", ["adamw", "fused", "sgd", "adafactor"])
@pytest.mark.parametrize("cost", ["analytic", "measured"])
def test_the_probe_leaves_everything_as_it_was(kind, cost):
    """Weights, gradients, moments, rate, schedule, random state and modes, bit by bit; with dropout, in the middle."""
    from transformers.optimization import Adafactor

    makers = {
        "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        "fused": lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9),
        "adafactor": lambda groups: Adafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False),
    }
    model = make(attention_dropout=0.3).train()
    tuned = attach(GreenTrainer(cost=cost, probe_batches=2), model)
    optimizer = makers[kind](tuned.parameter_groups(0.1))
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    tuned.on_phase_begin(optimizer, 100)
    for step in range(2):
        tuned.on_step_begin(step)
        loss(model, batch(step)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    loss(model, batch(7)).backward()
    model.model.layers[1].eval()

    def everything():
        return bits(
            {
                "weights": dict(model.named_parameters()) | dict(model.named_buffers()),
                "gradients": {n: p.grad for n, p in model.named_parameters()},
                "flags": {n: p.requires_grad for n, p in model.named_parameters()},
                "modes": {n: m.training for n, m in model.named_modules()},
                "optimizer": optimizer.state_dict(),
                "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"},
                "random": torch.get_rng_state(),
                "hooks": {n: [len(m._forward_hooks), len(m._forward_pre_hooks)] for n, m in model.named_modules()},
            }
        )

    before = everything()
    found = tuned.choose(1)
    assert found and everything() == before and len(tuned.importance) > 5


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("steps", [0, 3])
def test_importance_by_hand(batches, steps):
    """- sum of the gradient at the new weights times the change that the run's AdamW makes, moments included."""
    model = make()
    names = [name for name, _ in model.named_parameters()][5:20]
    moving = [model.get_parameter(name) for name in names]
    optimizer = torch.optim.AdamW(moving, lr=3e-3, weight_decay=0.1)
    for step in range(steps):
        loss(model, batch(step)).backward()
        optimizer.step()
        model.zero_grad()
    found = tensor_importance(View(model, probe_of(model)), names, optimizer, batches)
    before = [p.detach().clone() for p in moving]

    def mean_loss():
        model.zero_grad()
        (sum(loss(model, batch(i)) for i in range(batches)) / batches).backward()

    mean_loss()
    optimizer.step()
    mean_loss()
    by_hand = np.array([-float((p.grad * (p - w)).sum().detach()) for p, w in zip(moving, before, strict=True)])
    np.testing.assert_allclose(found, by_hand / np.abs(by_hand).max(), rtol=0, atol=1e-5)
    assert np.abs(found).max() == 1


def test_importance_foretells_the_loss():
    """For a small step the sum of unscaled I over all tensors is the drop of the loss, to first order."""
    model = make()
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = tensor_importance(View(model, probe_of(model)), names, optimizer)
    before = loss(model, batch())
    before.backward()
    norms = {name: float(model.get_parameter(name).grad.square().sum()) for name in names}
    optimizer.step()
    drop = float((before - loss(model, batch())).detach())
    # I is in proportion to |g|^2 for SGD, and its sum to the drop; the second order is below a hundredth here.
    assert drop == pytest.approx(1e-3 * sum(norms.values()), rel=0.02)
    assert found == pytest.approx(np.array(list(norms.values())) / max(norms.values()), abs=0.02)


def test_a_warm_up_that_begins_at_zero_does_not_blind_the_probe():
    results = []
    for scale in (lambda step: step / 10, lambda step: 1.0):
        tuned = attach(GreenTrainer())
        optimizer = torch.optim.AdamW(tuned.parameter_groups(0.1), lr=1e-3)
        tuned.on_phase_begin(optimizer, 2)
        LambdaLR(optimizer, scale)
        tuned.on_step_begin(0)
        results.append(tuned.importance)
    assert results[0] == results[1]


def test_what_lies_too_deep_is_not_even_measured():
    tuned = attach(GreenTrainer(rho=0.5))
    run(tuned, 1)
    fits = tuned.slots.choose.fits(tuned.costs)
    assert set(tuned.importance) == {n for n, f in zip(tuned.costs.names, fits, strict=True) if f}
    assert "model.embed_tokens.weight" not in tuned.importance and "lm_head.weight" in tuned.importance
    assert chosen_by(tuned)[0] <= set(tuned.importance)


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


# Other models


def bert():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=64, num_labels=3, **SHAPE))


def vit():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=3, **SHAPE))


def t5():
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "vocab_size": 64}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **shape))


def any_loss(model, given):
    ids = given["input_ids"]
    if isinstance(model, ViTForImageClassification):
        return model(
            pixel_values=ids[:, :, None, None].float().expand(3, 9, 8, 8)[:, :1] / 64, labels=ids[:, 0] % 3
        ).loss
    return model(input_ids=ids, labels=ids[:, 0] % 3 if hasattr(model, "classifier") else ids).loss


@pytest.mark.parametrize("make", [bert, vit, t5, lambda: make(True)], ids=["bert", "vit", "t5", "tied"])
@pytest.mark.parametrize("cost", ["analytic", "measured"])
def test_any_model_saved_and_loaded(make, cost, tmp_path):
    model = make()
    tuned = attach(GreenTrainer(cost=cost, quanta=4000), model, probe_of(model, any_loss))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(tuned, 3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= chosen_by(tuned)[0] and tuned.history["choices"][0]["share"] <= 0.55
    assert tuned.save(tmp_path) == "model"
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


def test_16_bit_weights_come_back_bit_for_bit():
    model = make().bfloat16()
    before = bits(dict(model.named_parameters()))
    tuned = attach(GreenTrainer(), model)
    tuned.on_phase_begin(torch.optim.AdamW(tuned.parameter_groups(0.0), lr=1e-2), 2)
    tuned.on_step_begin(0)
    assert bits(dict(model.named_parameters())) == before and chosen_by(tuned)[0]


def test_gradient_checkpointing_pays_a_second_forward_pass_and_still_ends_early():
    plain, saving = attach(GreenTrainer(rho=0.8)), attach(GreenTrainer(rho=0.8), make().train())
    saving.model.gradient_checkpointing_enable({"use_reentrant": False})
    saving.model.enable_input_require_grads()
    run(plain, 1)
    run(saving, 1)
    assert saving.costs.forward == 2 * plain.costs.forward
    assert saving.history["choices"][0]["share"] <= 0.8 + 2 * len(saving.costs.names) / 1000
    embedded = saving.model.get_input_embeddings()(batch()["input_ids"])
    assert embedded.requires_grad == ("model.embed_tokens.weight" in chosen_by(saving)[0]) is False


def test_reentrant_checkpointing_is_refused():
    tuned = attach(GreenTrainer())
    tuned.model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(InputError, match="reentrant"):
        run(tuned, 1)


def test_planned_without_weights_or_data():
    with torch.device("meta"):
        model = make()
    assert GreenTrainer().planned(model, Topology.of(model)) == sum(p.numel() for p in model.parameters())


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
