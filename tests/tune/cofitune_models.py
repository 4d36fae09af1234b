"""What the tests of CoFiTune share: a small model, its tuning, steps of it, and sets of importance."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.tune import CofiTune, Probe
from stepping import drive

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
UNITS = {"intermediate": 48, "output": 32, "head": 4}
RATE, DECAY = 1e-2, 0.1
MLP = "model.layers.1.mlp"


def llama(**more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{"vocab_size": 64, **SHAPE, **more})).eval()


def batches(count=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 64, (3, 9), generator=draw) for _ in range(count)]
    return [{"input_ids": rows, "labels": rows} for rows in ids]


def attach(settings, model=None, rows=batches):
    model = llama() if model is None else model
    return CofiTune(**settings).attach(model, Probe(Topology.of(model), batches=rows))


def run(tuned, steps=4, optimizer=torch.optim.AdamW, decay=DECAY, first=0, **more):
    if isinstance(optimizer, type):
        optimizer = optimizer(tuned.parameter_groups(decay), lr=RATE, **more)
        tuned.on_phase_begin(optimizer, 4, steps)

    def loss_of(model, step):
        return Sft().loss(model, batches(1, seed=step)[0]).value()

    def slower(step):  # as a schedule would, before the end of the step
        for group in optimizer.param_groups:
            group["lr"] *= 0.9

    return drive(tuned, optimizer, loss_of, steps, first, stepped=slower)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def importance(value, units=UNITS, blocks=4):
    """A set with `value` (a number, or a function of the number of units) for all units."""
    made = {k: value(n) if callable(value) else torch.full((n,), float(value)) for k, n in units.items()}
    return {block: {k: v.clone() for k, v in made.items()} for block in range(blocks)}


def drawn(count):
    return torch.rand(count, generator=torch.Generator().manual_seed(count))
