"""Tunings that learn tokens inside TRL's SFTTrainer, by the one callback: what moves is what each says, no more."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.train import TuningCallback
from luthier.tune import CofiTune, Full, GreenTrainer, Hft, Lift, Lisa, Lora, LtSft, MaskTuning, Probe, Sara
from luthier.weights import Selection
from luthier.worlds import tiny
from trainers import STEPS, Watch, arguments, check, trained_and_pruned

trl = pytest.importorskip("trl")


@pytest.fixture
def base():
    return AutoModelForCausalLM.from_pretrained(tiny.folder())


@pytest.fixture
def fit(tmp_path):
    """Eight steps of a tuning in TRL's trainer, with weight decay."""

    def run(tuned, *watchers, rate=1e-3):
        more = {"bf16": False, "max_length": 64, "weight_decay": 0.1, "learning_rate": rate}
        trl.SFTTrainer(
            model=tuned.model,
            args=trl.SFTConfig(**arguments(tmp_path, **more)),
            train_dataset=Dataset.from_dict({"prompt": ["What is 2 + 2?"] * 40, "completion": [" 4"] * 40}),
            processing_class=AutoTokenizer.from_pretrained(tiny.folder()),
            callbacks=[TuningCallback(tuned), *watchers],
        ).train()
        return tuned

    return run


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def on_rows(m, batch):
    return Sft().loss(m, {name: tensor.to(m.device) for name, tensor in batch.items()}).value()


@pytest.mark.parametrize("settings", [Full(), Lora(rank=4)], ids=["full", "lora"])
def test_what_may_move_moves(settings, base, fit):
    tuned = settings.attach(base, Probe(Topology.of(base)))
    before, moving = weights(tuned.model), set(tuned.moving())
    fit(tuned)
    assert moving and {n for n, p in weights(tuned.model).items() if not torch.equal(p, before[n])} == moving


def test_lisa_draws_its_blocks(base, fit):
    tuned = Lisa(active_layers=1, interval=2).attach(base, Probe(Topology.of(base), seed=3))
    fit(tuned, watch := Watch())
    check(tuned, watch)


def test_half_of_the_matrices_stay(base, fit):
    before = weights(base)
    tuned = Hft().attach(base, Probe(Topology.of(base)))
    fit(tuned)
    frozen = tuned.selection.frozen
    assert frozen and {n for n, p in weights(base).items() if torch.equal(p, before[n])} == set(frozen)


@pytest.mark.parametrize(
    ("settings", "shares"),
    [(Lift(density=0.05, filter_rank=8, interval=3), (0.05, 0.15)), (Sara(density=0.1), (0.02, 0.1))],
    ids=["lift", "sara"],
)
def test_entries_outside_the_choices_rest(settings, shares, base, fit):
    """LIFT chooses three times, of which the last may be other places; SaRA lets go of what it chose before."""
    before = weights(base)
    tuned = settings.attach(base, Probe(Topology.of(base)))
    first = tuned.selection()
    fit(tuned)
    tuned.merged()
    changed = Selection.changed(before, weights(base))
    ever = tuned.ever()
    inside = {name: changed.mask(name) for name in ever}
    assert tuned.selection() != first and shares[0] < ever.density <= shares[1] + 0.01
    assert sum(int(mask.sum()) for mask in inside.values()) == changed.count
    moved = Selection.from_masks(inside)
    assert (moved - ever).count == 0 and ever.overlap(first) == 1 and moved.overlap(ever) > 0.9


def test_entries_outside_the_support_are_wound_back(base, fit):
    before = weights(base)
    tuned = LtSft(density=0.1).attach(base, Probe(Topology.of(base)))
    fit(tuned)
    tuned.merged()
    changed = Selection.changed(before, weights(base))
    moved = Selection.from_masks({name: changed.mask(name) for name in tuned.selection()})
    assert not tuned.full and moved.count == changed.count and (moved - tuned.selection()).count == 0
    assert 0.8 * tuned.entries < moved.count <= tuned.entries


def test_only_the_layers_of_the_search_move(base, fit):
    ids = torch.arange(1, 41).view(2, 20)
    probe = Probe(Topology.of(base), batches=lambda: [{"input_ids": ids, "labels": ids}])
    tuned = CofiTune(layers="0%:50%", modules=["feed_forward"], apply="update").attach(base, probe)
    before = weights(tuned.model)
    fit(tuned)
    for name, p in tuned.model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in tuned.moving())


def test_masks_are_learned_over_weights_that_rest(base, fit):
    before = weights(base)
    tuned = MaskTuning(grad_dropout={"enabled": False}).attach(base, Probe(Topology.of(base)))
    fit(tuned, rate=2e-3)
    kept = tuned.selection()
    tuned.merged()
    assert 0 < tuned.dropped() < 1
    for name, p in base.named_parameters():
        assert torch.equal(p, before[name] * kept.mask(name) if name in kept else before[name]), name


def test_only_tensors_under_the_budget_move(base, fit):
    ids = AutoTokenizer.from_pretrained(tiny.folder())(["What is 2 + 2? 4"] * 2, return_tensors="pt")["input_ids"]
    batches = [{"input_ids": ids, "labels": ids}]
    probe = Probe(Topology.of(base), 3, batches=lambda: batches, loss=on_rows)
    tuned = GreenTrainer(rho=0.6, interval=4, interval_unit="step").attach(base, probe)
    before = weights(base)
    fit(tuned)
    choices = tuned.history["choices"]
    ever = {name for choice in choices for name in choice["active"]}
    moved = {name for name, p in base.named_parameters() if not torch.equal(p, before[name])}
    assert [choice["step"] for choice in choices] == [0, STEPS // 2] and moved == ever
    assert all(choice["share"] <= 0.62 and choice["passes"] > 0 for choice in choices)


def test_an_update_is_trained_pruned_and_trained_on(base, fit):
    trained_and_pruned(base, lambda tuned: fit(tuned, rate=1e-2))
