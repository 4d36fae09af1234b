"""What the tests of CoACT share: a world of small pictures in sessions, a model and its tuning."""

import math

import torch
from transformers import ViTConfig, ViTModel

from luthier.data.augment import chain, noisy, shifted
from luthier.train.sessions import SessionRun
from luthier.tune.coact import Coact
from luthier.tune.sessions import SessionStream

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
SMALL = {"base_classes": 3, "way": 2, "shots": 4, "epochs_base": 3, "lr": 0.05, "lora": {"r": 2, "alpha": 2}}
UPPER = {"epoch": 1, "layer": 1, "lr_factor": 0.5}


def vit(seed=0, **more):
    torch.manual_seed(seed)
    return ViTModel(ViTConfig(image_size=6, patch_size=3, num_channels=1, **SHAPE), **more).eval()


def world(seed=0, each=8, classes=7):
    """Pictures that are a pattern per class with noise."""
    draw = torch.Generator().manual_seed(seed)
    patterns = torch.randn(classes, 1, 6, 6, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(classes).repeat_interleave(each)
    return patterns[labels] + 0.3 * torch.randn(len(labels), 1, 6, 6, generator=draw), labels


def make(changes=None, model=None, stream=None, seed=0, **more):
    settings = Coact.model_validate({**SMALL, "unfreeze": None, **(changes or {})})
    stream = stream or SessionStream(world(0), 3, 2, 4)
    look = chain(shifted(1), noisy(0.1))
    return SessionRun(settings, model or vit(), stream, world(1), augment=look, seed=seed, **more)


def bits(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def pair_by_pair(embeddings, labels, tau):
    """The contrastive loss over a list of (n, d) embeddings, one for each view."""
    z = [(e / e.norm(), int(y)) for view in embeddings for e, y in zip(view.double(), labels, strict=True)]
    total = 0.0
    for i, (anchor, label) in enumerate(z):
        others = [(float(anchor @ e) / tau, y) for j, (e, y) in enumerate(z) if j != i]
        below = math.log(sum(math.exp(s) for s, _ in others))
        total -= sum(s - below for s, y in others if y == label) / sum(y == label for _, y in others)
    return total / len(z)
