"""SaRA: which entries move, the switch, rate and decay, runs that stop and go on, sparse deltas."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from tests.tune.sara_models import RANKED, attach, llama, loss_of, run, weights
from torch import nn
from transformers import Trainer, TrainingArguments

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.train import Loop, TrainSettings, TuningCallback
from luthier.tune import Probe, Sara
from luthier.tune.sara import draw
from luthier.tune.selector.choose import quantiles
from luthier.weights import Selection, Weights, diff
from luthier.worlds.facts import Facts, new_model

# Which entries


def test_all_small_entries_of_all_tensors_with_their_signs():
    base = weights(llama())
    tuned = attach({"threshold": 2e-3})
    for name, weight in base.items():
        small = weight.abs() < 2e-3
        assert torch.equal(tuned.selection().mask(name), small), name
        assert torch.equal(tuned.moving()[name], weight[small])
    assert any((values < 0).any() for values in tuned.moving().values())


def test_the_threshold_itself_stays_out():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -0.5, 0.25, -0.125]]))
    assert attach({"threshold": 0.5}, model).selection().indices("weight").tolist() == [2, 3]


@pytest.mark.parametrize("density", [0.01, 0.1, 0.2, 0.731])
def test_a_density_chooses_exactly_that_many_smallest_over_all_tensors(density):
    base = weights(llama())
    flat = torch.cat([w.reshape(-1) for w in base.values()]).abs().numpy()
    count = math.floor(density * len(flat))
    tuned = attach({"density": density})
    assert tuned.selection().count == count
    assert tuned.threshold == np.sort(flat)[count]
    assert Sara(density=density).planned(llama(), Topology.flat(llama())) == count


def alike():
    model = nn.Linear(4, 4, bias=False)
    nn.init.constant_(model.weight, -0.5)
    return model


def test_with_ties_at_the_cut_fewer_are_chosen():
    model = nn.Linear(10, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2, 3, 3, -3, 3, 4, 5, 6, 7]]))
    assert attach({"density": 0.4}, model).selection().indices("weight").tolist() == [0, 1]
    with pytest.raises(InputError, match="no entry is below"):
        attach({"density": 0.2}, alike())


def test_quantiles_are_those_of_sorting():
    scores = {"a": torch.rand(7, 9), "b": torch.rand(30)}
    flat = torch.cat([s.reshape(-1) for s in scores.values()]).sort().values
    found = quantiles(lambda: iter(scores.items()), (0.0, 0.25, 1.0))
    assert found == (float(flat[0]), float(flat[int(0.25 * 93)]), math.inf)


def test_a_scope_of_names():
    tuned = attach({"density": 0.1, "scope": ["q_proj", "up_proj"], "exclude": ["layers.1"]})
    assert set(tuned.selection()) == {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"}


def test_a_scope_of_nothing_is_refused():
    for budget in ({"density": 0.1}, {"threshold": 0.1}):
        with pytest.raises(InputError, match=r"no (entry|tensor) to choose from"):
            attach({**budget, "exclude": ["weight"]}, alike())


def test_tensors_of_zeros_lie_wholly_inside():
    model = llama()
    nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    tuned = attach({"threshold": 1e-4}, model)
    assert tuned.shares()["model.layers.1.mlp.down_proj"] == 1.0 and tuned.shares()["model.norm"] == 0.0


# The switch


def test_what_has_outgrown_the_threshold_rests_for_ever():
    tuned = attach({"density": 0.2})
    seen = {}

    def look(step):
        seen[step] = (tuned.selection(), weights(tuned.model))

    run(tuned, 20, rate=5e-3, each=look)
    before, after = seen[9], seen[10]
    assert (after[0] - before[0]).count == 0 and 0 < after[0].count < before[0].count
    for name, weight in before[1].items():
        mask = before[0].mask(name) & (weight.abs() < tuned.threshold)
        assert torch.equal(after[0].mask(name), mask), name
        rests = before[0].mask(name) & ~mask
        assert torch.equal(seen[19][1][name][rests], weight[rests])
    assert any(not torch.equal(seen[19][1][name], weight) for name, weight in seen[10][1].items())
    assert all(seen[step][0] == seen[0][0] for step in range(10)) and seen[19][0] == after[0]


def test_without_a_switch_the_choice_stays():
    tuned = attach({"density": 0.2, "progressive_at": None})
    first = tuned.selection()
    run(tuned, 20, rate=5e-3)
    assert tuned.selection() == first


@pytest.mark.parametrize("rank_of", ["masked_weight", "delta"])
def test_equals_dense_training_under_the_mask_through_the_switch(rank_of):
    """The oracle: every weight in AdamW, gradients times M, decay of M by hand, moments anew at the switch, and the
    nuclear norm of P o M by torch's own derivative. In float64, as AdamW's first steps make whole steps of rounding."""
    tuned, model = (
        attach({**RANKED, "rank_of": rank_of, "lambda_rank": 1e-2}, llama(torch.float64)),
        llama(torch.float64),
    )
    theta, parameters = tuned.threshold, dict(model.named_parameters())
    base = weights(model)
    masks = {name: p.detach().abs() < theta for name, p in parameters.items()}
    rate, decay = 5e-4, 0.01

    def fresh():
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)

    optimizer = fresh()

    def dense(step):
        nonlocal optimizer, masks
        if step == 10:
            masks = {name: m & (parameters[name].detach().abs() < theta) for name, m in masks.items()}
            optimizer = fresh()
        loss_of(model, step).backward()
        for name, p in parameters.items():
            p.grad.mul_(masks[name])
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        names = [n for n, p in parameters.items() if p.ndim == 2 and min(p.shape) > 24 and masks[n].sum() > 100]
        name = names[draw(len(names), (0, 0, step))]
        free = parameters[name].detach().clone().requires_grad_()
        matrix = (free - base[name] if rank_of == "delta" else free) * masks[name]
        if matrix.any():
            torch.linalg.matrix_norm(matrix, ord="nuc").backward()
            parameters[name].grad += 1e-2 * free.grad
        with torch.no_grad():
            for name, p in parameters.items():
                if p.ndim >= 2:
                    p -= rate * decay * p * masks[name]
        optimizer.step()
        optimizer.zero_grad()

    def compare(step):
        dense(step)
        for name, weight in weights(tuned.model).items():
            torch.testing.assert_close(weight, parameters[name].detach(), rtol=0, atol=1e-6, msg=f"{name} at {step}")

    run(tuned, 20, rate=rate, each=compare)
    assert tuned.selection() == Selection.from_masks(masks) and tuned.period == 1


# Errors, rate, decay


def test_no_small_entry_names_the_quantiles():
    model = llama()
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).abs().sort().values
    with pytest.raises(InputError, match="a tenth of them is below") as caught:
        attach({"threshold": 1e-12}, model)
    for share in (0.1, 0.2):
        assert f"{float(flat[int(share * len(flat))]):g}" in str(caught.value)
    assert type(model.lm_head) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_more_than_half_is_warned_of(caplog):
    with caplog.at_level(logging.INFO):
        attach({"density": 0.5})
    assert "removing them would change" not in caplog.text and "model.layers.0.mlp.up_proj" in caplog.text
    attach({"density": 0.6})
    assert "60% of the entries are below" in caplog.text
    caplog.clear()
    attach({"density": 0.2})  # no matrix with more than 64 rows
    assert "lambda_rank does nothing" in caplog.text


def test_the_number_of_steps_must_be_told_for_the_switch():
    tuned = attach()
    with pytest.raises(InputError, match="their number was not told"):
        tuned.on_phase_begin(torch.optim.AdamW(tuned.parameter_groups(0.0)), 5)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="not both"):
        Sara(density=0.1, threshold=1e-3)
    for wrong in ({"density": 0}, {"threshold": 0}, {"progressive_at": 0}, {"progressive_at": 1}, {"lambda_rank": -1}):
        with pytest.raises(ValueError, match=r"(?i)input should"):
            Sara(**wrong)


def loop(settings, model=None, directory=None, **train):
    world, model = Facts(0), model or new_model(0, 1)
    tuned = Sara(**settings).attach(model, Probe(Topology.of(model)))
    given = TrainSettings(**{"max_steps": 6, "effective_batch_size": 60, **train})
    return Loop(tuned, Sft(), given, world.examples([7]), directory=directory, device="cpu")


def test_rate_and_decay_that_nobody_named_are_the_papers():
    assert Sara().own_learning_rate() == pytest.approx(4.966e-4, rel=1e-4)
    one = loop({})
    groups = one.optimizer.param_groups
    assert one.learning_rate == pytest.approx(4.966e-4, rel=1e-4) and {g["weight_decay"] for g in groups} == {0.01, 0.0}
    named = loop({}, learning_rate=1e-2, weight_decay=0.0)
    assert named.learning_rate == 1e-2 and {g["weight_decay"] for g in named.optimizer.param_groups} == {0.0}
    by_share = loop({"density": 0.1})
    assert by_share.learning_rate == pytest.approx(1e-3 * math.exp(-350 * by_share.tuned.threshold))


def test_rates_that_cannot_be_told_are_asked_for(caplog):
    with pytest.raises(InputError, match="follows from its threshold"):
        Sara(density=0.1).own_learning_rate()
    with pytest.raises(InputError, match="write a learning rate"):
        loop({"density": 1.0})
    loop({"threshold": 0.02})
    assert "hardly learns" in caplog.text


# Runs


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path):
    """With the nuclear term, across the switch, in the loop itself; and a checkpoint of another base is refused."""
    settings = {"density": 0.2, "rank_min_dim": 32, "lambda_rank": 1e-2}
    whole = loop(settings, directory=tmp_path / "whole", learning_rate=1e-2)
    records = whole.run()
    loop(settings, directory=tmp_path / "parts", learning_rate=1e-2).run(until=2)
    rest = loop(settings, directory=tmp_path / "parts", learning_rate=1e-2)
    rest.run()
    after = weights(rest.tuned.model)
    assert all(torch.equal(value, after[name]) for name, value in weights(whole.tuned.model).items())
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["metrics"]["nuclear_norm"] for line in lines] == [r.metrics["nuclear_norm"] for r in records]
    with pytest.raises(InputError, match="made with the threshold"):
        loop(settings, model=new_model(1, 1), directory=tmp_path / "parts", max_steps=8).run()


def test_the_outcome_is_a_sparse_delta_of_its_base_alone(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    tuned = attach(model=base)
    run(tuned, 12, rate=5e-3)
    (tmp_path / "tuned").mkdir()
    assert tuned.save(tmp_path / "tuned") == "model"
    about = json.loads((tmp_path / "tuned" / "selection.json").read_text())
    assert about["threshold"] == tuned.threshold and about["moving"] == tuned.shares()
    assert Selection.load(tmp_path / "tuned" / "selection.safetensors") == tuned.ever()
    delta = diff(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
    assert {row["kind"] for row in delta.tensors.values()} == {"sparse"}
    assert sum(row["changed"] for row in delta.tensors.values()) <= tuned.ever().count
    delta.apply(tmp_path / "base", tmp_path / "again")
    again = Weights.open(tmp_path / "again")
    assert all(torch.equal(again[name], value) for name, value in tuned.model.state_dict().items())
    with torch.no_grad():
        other = llama()
        other.model.norm.weight.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="not the base weights"):
        delta.apply(tmp_path / "other", tmp_path / "wrong")


def test_in_transformers_trainer(tmp_path):
    base = llama()
    before, tuned = weights(base), attach(model=base)
    small = tuned.selection()
    ids = torch.randint(0, 64, (32, 9), generator=torch.Generator().manual_seed(0)).tolist()
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=5e-3, weight_decay=0.1, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    Trainer(model=tuned.model, args=args, train_dataset=rows, callbacks=[TuningCallback(tuned)]).train()
    assert tuned.period == 1 and tuned.selection().count < small.count and tuned.metrics()
    after = weights(tuned.merged())
    for name, weight in before.items():
        assert torch.equal(after[name][~small.mask(name)], weight[~small.mask(name)])
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())
