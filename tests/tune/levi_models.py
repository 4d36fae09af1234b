"""What the tests of LEVI share: small models, batches, their tuning and steps of it."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from luthier.models.topology import Topology
from luthier.tune import Levi, Probe

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SHAPE, num_hidden_layers=6)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=3)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
    "roberta": lambda: RobertaModel(RobertaConfig(**SHAPE, num_hidden_layers=2)),
    "albert": lambda: AlbertModel(AlbertConfig(**SHAPE, embedding_size=16, num_hidden_layers=3)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
}
DEPTHS = {"bert": 6, "llama": 3, "gpt2": 2, "roberta": 2, "albert": 3, "t5": 2}


def make(name="bert", seed=0):
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def vit():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=8)).eval()


def attach(model=None, batches=None, seed=0, **settings):
    model = make() if model is None else model
    if batches is None:
        settings = {"num_classes": 3, **settings}
    return Levi(**settings).attach(model, Probe(Topology.of(model), seed, batches))


def text(rows=6, length=7, seed=1):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, length), generator=random)
    lengths = torch.randint(1, length + 1, (rows,), generator=random)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 3}


def images(rows=6):
    random = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=random), "labels": torch.arange(rows) % 3}


def inputs(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def train(tuned, batch, steps=5, rate=1e-2, decay=0.1):
    tuned.model.train()
    optimizer = torch.optim.AdamW(tuned.parameter_groups(decay), lr=rate)
    tuned.on_phase_begin(optimizer, steps_per_epoch=steps)
    losses = []
    for step in range(steps):
        tuned.on_step_begin(step)
        loss = tuned.model(**batch).loss
        loss.backward()
        tuned.on_grad(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tuned.on_step_end(step)
        losses.append(float(loss.detach()))
    tuned.on_phase_end()
    tuned.model.eval()
    return losses


class Net(nn.Module):
    """A backbone that is no transformer: layers with a norm that learns in forward passes, and dropout."""

    class Layer(nn.Module):
        def __init__(self, inside, outside):
            super().__init__()
            self.mixer, self.batch_norm = nn.Linear(inside, outside), nn.BatchNorm1d(outside)

        def forward(self, x):
            return F.dropout(self.batch_norm(self.mixer(x)).relu(), 0.5, self.training)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Net.Layer(10, 16), Net.Layer(16, 24)])
        self.head = nn.Linear(24, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Side(nn.Module):
    """A task model of the user's own, with buffers that learn."""

    def __init__(self, width, dropout):
        super().__init__()
        self.width, self.layer, self.batch_norm = width, nn.Linear(10, width), nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, **others):
        return self.dropout(self.batch_norm(self.layer(x)).relu())


def net(rows=40, **settings):
    torch.manual_seed(3)
    model, x = Net(), torch.randn(rows, 10)
    batch = {"x": x, "labels": (x[:, 0] + 0.5 * torch.randn(rows) > 0).long()}
    probe = Probe(Topology.of(model, blocks="blocks", attention="mixer"), 0, lambda: [batch])
    return Levi(**{"task_model": f"{__name__}:Side", "task_width": 8, **settings}).attach(model, probe), batch
