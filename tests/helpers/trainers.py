"""What the tests of tunings in transformers' Trainer and in TRL's SFTTrainer share."""

import torch
from transformers import TrainerCallback

from luthier.models.topology import Topology
from luthier.tune import Dsee, DseePrune, Probe
from luthier.tune.lisa import draw

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


def arguments(folder, **more):
    given = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True}
    return {"output_dir": str(folder), "save_strategy": "no", "report_to": [], "disable_tqdm": True, **given, **more}


def check(tuned, watch):
    assert watch.active == [draw(len(tuned.units), 1, (3, 0, step // 2)) for step in range(STEPS)]
    sizes = {name: p.numel() for name, p in tuned.model.named_parameters()}
    outside = sum(sizes[name] for name in tuned.always)
    assert watch.held == outside + max(sum(sizes[n] for n in unit.names) for unit in tuned.units)


def trained_and_pruned(base, fit):
    """Both phases, one after the other: only the update moves, and what was pruned stays zero."""
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
