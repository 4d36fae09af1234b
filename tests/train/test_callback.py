"""Tunings inside other people's loops: transformers' Trainer and TRL's SFTTrainer."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.train import TuningCallback
from luthier.tune import CofiTune, Dsee, DseePrune, GreenTrainer, Hft, Lisa, MaskTuning, Probe
from luthier.tune.lisa import draw
from luthier.tune.selector.importance_score import save_importance
from luthier.worlds import tiny

STEPS = 8


class Watch(TrainerCallback):
    """After the tuning's own: which blocks move in each step, and what the optimiser remembers."""

    def __init__(self):
        self.active, self.held = [], 0

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        layers = model.model.layers
        moving = [i for i, block in enumerate(layers) if all(p.grad is not None for p in block.parameters())]
        assert not any(p.grad is not None for i, b in enumerate(layers) if i not in moving for p in b.parameters())
        self.active.append(moving)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.held = max(self.held, sum(p.numel() for p in optimizer.state))


def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **shape))


def arguments(folder, **more):
    given = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True}
    return {"output_dir": str(folder), "save_strategy": "no", "report_to": [], "disable_tqdm": True, **given, **more}


def rows():
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (40, 9), generator=random).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def check(tuned, watch):
    assert watch.active == [draw(len(tuned.units), 1, (3, 0, step // 2)) for step in range(STEPS)]
    sizes = {name: p.numel() for name, p in tuned.model.named_parameters()}
    outside = sum(sizes[name] for name in tuned.always)
    assert watch.held == outside + max(sum(sizes[n] for n in unit.names) for unit in tuned.units)


def test_lisa_in_transformers_trainer(tmp_path):
    tuned = Lisa(active_layers=1, interval=2).attach(base := model(), Probe(Topology.of(base), seed=3))
    watch = Watch()
    args = TrainingArguments(**arguments(tmp_path))
    Trainer(model=tuned.model, args=args, train_dataset=rows(), callbacks=[TuningCallback(tuned), watch]).train()
    check(tuned, watch)


def test_lisa_in_trls_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    from transformers import AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny.folder())
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder())
    tuned = Lisa(active_layers=1, interval=2).attach(base, Probe(Topology.of(base), seed=3))
    watch = Watch()
    args = trl.SFTConfig(**arguments(tmp_path, bf16=False, max_length=64))
    data = Dataset.from_dict({"prompt": ["What is 2 + 2?"] * 40, "completion": [" 4"] * 40})
    trainer = trl.SFTTrainer(
        model=tuned.model,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[TuningCallback(tuned), watch],
    )
    trainer.train()
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


def test_cofitune_in_trls_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    from transformers import AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny.folder())
    ids = torch.arange(1, 41).view(2, 20)
    probe = Probe(Topology.of(base), batches=lambda: [{"input_ids": ids, "labels": ids}])
    tuned = CofiTune(layers="0%:50%", modules=["feed_forward"], apply="update").attach(base, probe)
    before = {name: p.detach().clone() for name, p in tuned.model.named_parameters()}
    args = trl.SFTConfig(**arguments(tmp_path, bf16=False, max_length=64, weight_decay=0.1, learning_rate=1e-3))
    data = Dataset.from_dict({"prompt": ["What is 2 + 2?"] * 40, "completion": [" 4"] * 40})
    trainer = trl.SFTTrainer(
        model=tuned.model,
        args=args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(tiny.folder()),
        callbacks=[TuningCallback(tuned)],
    )
    trainer.train()
    for name, p in tuned.model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in tuned.moving())


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


def test_masks_in_trls_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    from transformers import AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny.folder())
    tuned = MaskTuning(grad_dropout={"enabled": False}).attach(base, Probe(Topology.of(base)))
    args = trl.SFTConfig(**arguments(tmp_path, bf16=False, max_length=64, learning_rate=2e-3))
    data = Dataset.from_dict({"prompt": ["What is 2 + 2?"] * 40, "completion": [" 4"] * 40})
    trainer = trl.SFTTrainer(
        model=tuned.model,
        args=args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(tiny.folder()),
        callbacks=[TuningCallback(tuned)],
    )
    trainer.train()
    assert 0 < tuned.dropped() < 1


def test_only_tensors_under_the_budget_move_in_trls_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    from transformers import AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny.folder())
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder())
    ids = tokenizer(["What is 2 + 2? 4"] * 2, return_tensors="pt")["input_ids"]
    probe = Probe(
        Topology.of(base),
        3,
        batches=lambda: [{"input_ids": ids, "labels": ids}],
        loss=lambda m, b: Sft().loss(m, {name: tensor.to(m.device) for name, tensor in b.items()}).value(),
    )
    tuned = GreenTrainer(rho=0.6, interval=4, interval_unit="step").attach(base, probe)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    trainer = trl.SFTTrainer(
        model=tuned.model,
        args=trl.SFTConfig(**arguments(tmp_path, bf16=False, max_length=64, learning_rate=1e-3)),
        train_dataset=Dataset.from_dict({"prompt": ["What is 2 + 2?"] * 40, "completion": [" 4"] * 40}),
        processing_class=tokenizer,
        callbacks=[TuningCallback(tuned)],
    )
    trainer.train()
    choices = tuned.history["choices"]
    ever = {name for choice in choices for name in choice["active"]}
    moved = {name for name, p in base.named_parameters() if not torch.equal(p, before[name])}
    assert [choice["step"] for choice in choices] == [0, 4] and moved == ever
    assert all(choice["share"] <= 0.62 and choice["passes"] > 0 for choice in choices)


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_an_update_is_trained_pruned_and_trained_on(trainer, tmp_path):
    """Both phases, one after the other: only the update moves, and what was pruned stays zero."""
    more = {"learning_rate": 1e-2, "weight_decay": 0.1}
    if trainer == "transformers":
        base, data = model(), rows()
        args = TrainingArguments(**arguments(tmp_path, **more))

        def fit(tuned):
            calls = [TuningCallback(tuned)]
            Trainer(model=tuned.model, args=args, train_dataset=data, callbacks=calls).train()

    else:
        trl = pytest.importorskip("trl")
        from transformers import AutoTokenizer

        base = AutoModelForCausalLM.from_pretrained(tiny.folder())
        tokenizer = AutoTokenizer.from_pretrained(tiny.folder())
        args = trl.SFTConfig(**arguments(tmp_path, bf16=False, max_length=64, **more))
        data = Dataset.from_dict({"prompt": ["What is 2 + 2?"] * 40, "completion": [" 4"] * 40})

        def fit(tuned):
            calls = [TuningCallback(tuned)]
            trl.SFTTrainer(
                model=tuned.model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=calls
            ).train()

    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    tuned = Dsee(r=4, num_sparse=8).attach(base, Probe(Topology.of(base)))
    for phase in (1, 2):
        if phase == 2:
            tuned = DseePrune(score="update", density=0.5).attach(tuned.model, Probe(Topology.of(tuned.model)))
        start = {name: p.detach().clone() for name, p in tuned.moving().items()}
        fit(tuned)
        assert all(not torch.equal(p, start[name]) for name, p in tuned.moving().items())
    for name, p in tuned.frozen().items():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        kept = tuned.mask.mask(name) if name in tuned.mask else torch.ones_like(p, dtype=torch.bool)
        assert torch.equal(p, before[name] * kept), name
