"""What the tests of PLeaS share: networks of every kind, their data, permuted copies, the merge."""

import copy

import pytest
import torch
from torch import nn

import luthier as lt
from luthier.merge.permute.find import permuted
from luthier.merge.permute.units import split_of


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.one = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm_one = nn.BatchNorm2d(outputs)
        self.two = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm_two = nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x):
        y = torch.relu(self.norm_one(self.one(x)))
        y = self.norm_two(self.two(y))
        y += self.short(x)
        return torch.relu(y)


class Residual(nn.Module):
    """A small residual network; the last pictures are flattened, so that a channel is several inputs of the head."""

    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.Sequential(Block(6, 6, 1), Block(6, 8, 2))
        self.head = nn.Linear(8 * 4, classes)

    def forward(self, x):
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(self.blocks(self.stem(x)), 2), 1))


def dense(classes=4):
    return nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 11), nn.Tanh(), nn.Linear(11, classes))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))


def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=4, max_position_embeddings=32, **tokens))


class Mixed(nn.Module):
    """A gate from pooled channels, a convolution of each channel by itself, a concatenation, layer norm."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(2, 4, 1)
        self.each, self.gate = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 1)
        self.join, self.last = nn.Conv2d(10, 8, 3, stride=2), nn.Linear(8, 7)
        self.norm, self.head = nn.LayerNorm(7), nn.Linear(7, 3)

    def forward(self, x):
        y = nn.functional.silu(self.each(self.one(x)))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        y = self.join(torch.cat([y, torch.tanh(self.two(x))], 1))
        return self.head(self.norm(torch.relu(self.last(y.mean((2, 3))))))


KINDS = {"mixed": Mixed, "dense": dense, "residual": Residual, "llama": llama, "gpt2": gpt2, "neox": neox}
EVERY = pytest.mark.parametrize("kind", KINDS)
PLAIN = pytest.mark.parametrize("kind", ["dense", "residual"])


def model(kind, seed, **given):
    """A network whose every number counts: norms and biases are not at their defaults."""
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = KINDS[kind](**given)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
        for name, buffer in made.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand(buffer.shape, generator=draw))
    return made.eval()


def data(kind, batches=6, size=20, seed=0):
    draw = torch.Generator().manual_seed(seed)
    if kind == "dense":
        return [torch.randn(size, 7, generator=draw) for _ in range(batches)]
    if kind in ("residual", "mixed"):
        return [torch.randn(size, 2, 8, 8, generator=draw) for _ in range(batches)]
    return [{"input_ids": torch.randint(3, 40, (size // 4, 16), generator=draw)} for _ in range(batches)]


@torch.no_grad()
def outputs(network, batch):
    return network(**batch).logits if isinstance(batch, dict) else network(batch)


def shuffled(network, groups, seed):
    """The same function with all units in another order, and that order."""
    draw = torch.Generator().manual_seed(seed)
    orders = {name: torch.randperm(group.units, generator=draw) for name, group in groups.groups.items()}
    splits = {name: split_of(order, torch.ones(len(order), dtype=torch.bool)) for name, order in orders.items()}
    other = copy.deepcopy(network)
    other.load_state_dict(network.state_dict() | permuted(network.state_dict(), groups.axes, splits))
    return other, orders


def merged(a, b, batches, **settings):
    return lt.merge({"method": "pleas"} | settings, models=[a, b], data=batches)


def parts_of(kind):
    return (
        ("feed_forward", "attention")
        if kind in ("dense", "residual", "mixed")
        else ("feed_forward", "attention", "residual")
    )
