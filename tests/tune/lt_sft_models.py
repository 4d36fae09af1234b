"""What the tests of LT-SFT share: small models, their tuning, and steps of it outside any loop."""

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    ViTConfig,
    ViTForImageClassification,
)

from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.tune import LtSft, Probe
from stepping import drive

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# Ten steps: full 0 1, sparse 2 3 4, full 5 6, sparse 7 8 9.
TWICE = {"density": 0.1, "iterations": 2, "full": {"share": 0.4}}
STEPS = 10


def llama(tied=False):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **SHAPE)).eval()


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **SHAPE)).eval()


def vit():
    torch.manual_seed(0)
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 3, **SHAPE}
    return ViTForImageClassification(ViTConfig(**shape)).eval()


MODELS = {"llama": llama, "tied": lambda: llama(tied=True), "bert": bert, "vit": vit}


def loss_of(model, step):
    draw = torch.Generator().manual_seed(step)
    if isinstance(model, ViTForImageClassification):
        dtype = model.dtype
        return model(pixel_values=torch.rand(3, 1, 8, 8, generator=draw).to(dtype), labels=torch.arange(3)).loss
    ids = torch.randint(1, 64, (3, 9), generator=draw)
    if isinstance(model, BertForSequenceClassification):
        return model(input_ids=ids, labels=torch.arange(3)).loss
    return Sft().loss(model, {"input_ids": ids, "labels": ids}).value()


def attach(model, seed=0, **settings):
    return LtSft(**settings).attach(model, Probe(Topology.of(model), seed))


def run(tuned, steps=STEPS, first=0, optimizer=None, total=STEPS, decay=0.0, watch=lambda step: None):
    if optimizer is None:
        optimizer = torch.optim.AdamW(tuned.parameter_groups(decay), lr=1e-2, fused=True)
        tuned.on_phase_begin(optimizer, 5, total)
    return drive(tuned, optimizer, loss_of, steps, first, begun=watch)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
