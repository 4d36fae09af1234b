"""Tunings inside transformers' Trainer, by the one callback."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.train import TuningCallback
from luthier.tune import CofiTune, Hft, Lisa, MaskTuning, Probe
from luthier.tune.selector.importance_score import save_importance
from trainers import Watch, arguments, check, trained_and_pruned


def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **shape))


def rows():
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (40, 9), generator=random).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def test_lisa_in_transformers_trainer(tmp_path):
    tuned = Lisa(active_layers=1, interval=2).attach(base := model(), Probe(Topology.of(base), seed=3))
    watch = Watch()
    args = TrainingArguments(**arguments(tmp_path))
    Trainer(model=tuned.model, args=args, train_dataset=rows(), callbacks=[TuningCallback(tuned), watch]).train()
    check(tuned, watch)


def test_half_of_the_matrices_stay_in_transformers_trainer(tmp_path):
    tuned = Hft().attach(base := model(), Probe(Topology.of(base)))
    before = {name: p.detach().clone() for name, p in tuned.model.named_parameters()}
    args = TrainingArguments(**arguments(tmp_path, weight_decay=0.1, learning_rate=1e-3))
    Trainer(model=tuned.model, args=args, train_dataset=rows(), callbacks=[TuningCallback(tuned)]).train()
    for name, p in tuned.model.named_parameters():
        assert torch.equal(p, before[name]) == (name in tuned.selection.frozen)


def test_rows_are_held_back_in_transformers_trainer(tmp_path):
    """A row of importance 1 rests and one of 0 moves, under the Trainer's own weight decay and clipping."""
    importance = {i: {"output": (torch.arange(32) == 5).float()} for i in range(4)}
    save_importance(importance, 4, tmp_path / "importance.safetensors")
    settings = CofiTune(modules=["down_proj"], importance=str(tmp_path / "importance.safetensors"))
    tuned = settings.attach(base := model(), Probe(Topology.of(base)))
    before = {name: p.detach().clone() for name, p in tuned.model.named_parameters()}
    args = TrainingArguments(**arguments(tmp_path, weight_decay=0.1, learning_rate=1e-3))
    Trainer(model=tuned.model, args=args, train_dataset=rows(), callbacks=[TuningCallback(tuned)]).train()
    for name, p in tuned.model.named_parameters():
        if name == "model.layers.1.mlp.down_proj.weight":
            assert (p != before[name]).any(1).tolist() == [row != 5 for row in range(32)]
        else:
            assert torch.equal(p, before[name])


def test_masks_in_transformers_trainer_and_its_checkpoint(tmp_path):
    """Folded: what the Trainer itself saves is the masked model, and a tuning that wants two losses says so."""
    tuned = MaskTuning(targets="all", grad_dropout={"enabled": False}).attach(base := model(), Probe(Topology.of(base)))
    before = {name: p.detach().clone() for name, p in model().state_dict().items()}
    args = TrainingArguments(**arguments(tmp_path, weight_decay=0.1, learning_rate=2e-3))
    trainer = Trainer(model=tuned.model, args=args, train_dataset=rows(), callbacks=[TuningCallback(tuned)])
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    kept = tuned.selection()
    assert 0 < tuned.dropped() < 1 and saved.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(saved[name], value * kept.mask(name) if name in kept else value), name
    other = MaskTuning().attach(base := model(), Probe(Topology.of(base)))
    trainer = Trainer(model=other.model, args=args, train_dataset=rows(), callbacks=[TuningCallback(other)])
    with pytest.raises(InputError, match="two losses"):
        trainer.train()


def test_an_update_is_trained_pruned_and_trained_on(tmp_path):
    args, data = TrainingArguments(**arguments(tmp_path, learning_rate=1e-2, weight_decay=0.1)), rows()

    def fit(tuned):
        Trainer(model=tuned.model, args=args, train_dataset=data, callbacks=[TuningCallback(tuned)]).train()

    trained_and_pruned(model(), fit)
