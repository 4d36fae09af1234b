"""What the tests of GreenTrainer share: a small model, its tuning, and steps of it outside any loop."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.tune import Probe

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
