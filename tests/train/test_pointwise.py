"""Made again or kept: the same gradients to the last bit, and what is made again is not held in between."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from luthier.methods import build
from luthier.models import allocator
from luthier.models.allocator import Ceiling
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.train import Loop, TrainSettings
from luthier.train.pointwise import pointwise_made_again
from luthier.train.probing import probe_of

SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL)),
    "t5-gated": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=50,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    ),
}


def gradients(model: nn.Module, loss: Callable[[], Tensor], again: bool) -> list[Tensor | None]:
    torch.manual_seed(1)  # of dropout
    model.zero_grad()
    if again:
        with pointwise_made_again():
            value = loss()
    else:
        value = loss()
    value.backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(one, other, strict=True))  # type: ignore[arg-type]


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    return lambda: model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("frozen", [False, True], ids=["all-move", "norms-frozen"])
def test_gradients_are_the_same_bits(name: str, frozen: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    if frozen:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("norm" not in key and "ln_" not in key)
    assert same(gradients(model, loss_of(model), False), gradients(model, loss_of(model), True))


def test_under_autocast_and_under_checkpointing() -> None:
    torch.manual_seed(0)
    model = MODELS["llama"]().train()
    plain = loss_of(model)

    def short() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain()

    assert same(gradients(model, short, False), gradients(model, short, True))
    without = gradients(model, plain, False)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    assert same(without, gradients(model, plain, True))


class Gated(nn.Module):
    """A gated layer that can tell which of the tensors made on the way are still in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.made: list[StorageWeakRef] = []

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        active = F.silu(gate)
        product = active * up
        self.made = [StorageWeakRef(tensor.untyped_storage()) for tensor in (gate, up, active, product)]
        return self.down(product)

    def held(self) -> list[bool]:
        """gate, up, silu(gate), their product"""
        return [not one.expired() for one in self.made]


def test_what_is_made_again_is_not_held() -> None:
    layer, x = Gated(), torch.randn(3, 4)
    output = layer(x)
    assert layer.held() == [True, True, True, True]
    with pointwise_made_again():
        output = layer(x)
    assert layer.held() == [True, True, False, False]
    output.sum().backward()
    assert layer.held() == [False] * 4


def test_a_graph_may_be_run_twice() -> None:
    layer = Gated()
    with pointwise_made_again():
        value = layer(torch.randn(3, 4)).square().sum()
    once = torch.autograd.grad(value, list(layer.parameters()), retain_graph=True)
    twice = torch.autograd.grad(value, list(layer.parameters()))
    assert same(list(once), list(twice))


def test_other_layouts_scalars_and_work_in_place_are_as_ever() -> None:
    weight = nn.Parameter(torch.randn(5, 3))
    model = nn.ParameterList([weight])

    def loss() -> Tensor:
        turned = (weight.T * 2.0) * weight.detach().T  # not in C order
        first = F.silu(weight * 0.5) * weight
        first.mul_(3.0)
        first.view(-1)[2:4] += 1.0
        return (first @ turned).tanh().sum() + (F.gelu(weight, approximate="tanh") @ turned).square().sum()

    assert same(gradients(model, loss, False), gradients(model, loss, True))


def test_what_passes_is_told() -> None:
    """The bytes of each tensor that is saved, again when it is asked for; with and without making anything again."""
    layer, x = Gated(), torch.randn(3, 4)
    told: list[int] = []
    for again in (False, True):
        told.clear()
        with pointwise_made_again(again, told.append):
            output = layer(x)
        assert layer.held()[2:] == [not again] * 2
        saved = len(told)
        assert saved and set(told) <= {x.nbytes, layer.down.weight.nbytes}
        output.sum().backward()
        assert len(told) == 2 * saved


def test_checkpoint_within() -> None:
    layer = Gated()
    x = torch.randn(3, 4)
    plain = gradients(layer, lambda: layer(x).sum(), False)
    assert same(plain, gradients(layer, lambda: checkpoint(layer, x, use_reentrant=False).sum(), True))


class Rows:
    lengths = np.full(8, 9)
    tokens = lengths

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = np.random.default_rng(index).integers(0, 50, 9).tolist()
        return {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}


@pytest.mark.parametrize(
    "tuning", [{"method": "full"}, {"method": "lift", "density": 0.2}, {"method": "lora", "rank": 2}]
)
def test_the_setting_of_the_loop(tuning: dict[str, Any]) -> None:
    """Asked for, the activation is gone when the backward pass begins; the weights are the same bits."""
    weights, gone = [], {}
    for again in (False, True):
        torch.manual_seed(0)
        model: Any = MODELS["llama"]()
        settings = TrainSettings(effective_batch_size=4, learning_rate=1e-2, recompute_pointwise=again)
        rows: Any = Rows()
        probe = probe_of(Topology.of(model), Sft(), settings, rows)
        tuned: Any = build("tune", tuning)
        tuned = tuned.attach(model, probe)
        made: list[StorageWeakRef] = []
        found: list[bool] = []

        def see(module: nn.Module, args: Any, output: Tensor, made: list[StorageWeakRef] = made) -> None:
            made.append(StorageWeakRef(output.untyped_storage()))

        def look(gradient: Tensor, made: list[StorageWeakRef] = made, found: list[bool] = found) -> None:
            found.append(made[-1].expired())

        def watch(module: nn.Module, args: Any, output: Tensor, look: Callable[[Tensor], None] = look) -> None:
            if output.requires_grad:
                output.register_hook(look)

        layers = tuned.base_model.get_decoder().layers
        layers[0].mlp.act_fn.register_forward_hook(see)
        layers[1].register_forward_hook(watch)
        Loop(tuned, Sft(), settings, rows, device="cpu").run()
        assert found
        gone[again] = set(found)
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    assert gone == {False: {False}, True: {True}}
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="refused elsewhere")
def test_memory_given_back_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop tells of what passes through its steps, and the weights are the same bits."""
    monkeypatch.setattr(Ceiling, "_LOOK", 1)
    growing = itertools.count(2**30, 2**30)
    monkeypatch.setattr(allocator, "resident", lambda: next(growing))  # above the ceiling at every look
    told: list[int] = []
    once = Ceiling.passes

    def passes(self: Ceiling, size: int) -> None:
        once(self, size)
        told.append(self.given_back)

    monkeypatch.setattr(Ceiling, "passes", passes)
    weights = []
    for back in (False, True):
        torch.manual_seed(0)
        model: Any = MODELS["llama"]()
        settings = TrainSettings(effective_batch_size=4, learning_rate=1e-2, give_back_freed_memory=back)
        rows: Any = Rows()
        tuning: Any = build("tune", {"method": "lift", "density": 0.2})
        tuned = tuning.attach(model, probe_of(Topology.of(model), Sft(), settings, rows))
        assert not told
        Loop(tuned, Sft(), settings, rows, device="cpu").run()
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    assert told and told[-1] > 10
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
