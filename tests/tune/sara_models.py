"""What the tests of SaRA share: small models, their tuning, and steps of it outside any loop."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.tune import Probe, Sara
from stepping import drive

RANKED = {"density": 0.2, "rank_min_dim": 24}


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **shape)).eval().to(dtype)


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 12, 3), nn.GroupNorm(2, 12), nn.SiLU(), nn.Conv2d(12, 16, 3), nn.Flatten())


def attach(settings=None, model=None, seed=0):
    model = llama() if model is None else model
    return Sara(**(RANKED if settings is None else settings)).attach(model, Probe(Topology.flat(model), seed))


def loss_of(model, step):
    ids = torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(step))
    return Sft().loss(model, {"input_ids": ids, "labels": ids}).value()


def run(tuned, steps, total=20, rate=5e-4, first=0, optimizer=None, each=lambda step: None):
    if optimizer is None:
        optimizer = torch.optim.AdamW(tuned.parameter_groups(0.01), lr=rate)
        tuned.on_phase_begin(optimizer, 5, total)

    def clip(step):
        nn.utils.clip_grad_norm_(list(tuned.moving().values()), 1.0)

    return drive(tuned, optimizer, loss_of, steps, first, reached=clip, ended=each)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
