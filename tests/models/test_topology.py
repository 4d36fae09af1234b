"""Laws of `Topology` over tiny models of many architectures (the table in `conftest.py`)."""

from __future__ import annotations

import json

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.models import Topology

GLU = "gate_proj up_proj down_proj"


def last_names(paths) -> list[str]:
    return sorted(path.rpartition(".")[2] for path in paths)


def all_linears(model: nn.Module, below: str) -> set[str]:
    return {
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear | Conv1D) and name.startswith(below + ".")
    }


def test_stacks_have_the_blocks_of_the_config(case):
    known, _, topology = case
    assert [(stack.role, len(stack.blocks)) for stack in topology.stacks] == known.stacks
    assert sum(stack.depth for stack in topology.stacks) == known.depth
    assert [block.index for block in topology.blocks] == list(range(len(topology.blocks)))


def test_attention_and_feed_forward_are_those_of_the_table(case):
    known, _, topology = case
    cross = {"encoder": 1, "decoder": 2, "only": 1}
    for stack in topology.stacks:
        for block in stack.blocks:
            assert last_names(block.attention) == sorted(known.attention.split() * cross[stack.role])
            if block.index in known.routed_blocks:
                shared = GLU if "Deepseek" in topology.name else ""
                assert last_names(block.feed_forward) == sorted(shared.split())
            else:
                assert last_names(block.feed_forward) == sorted(known.feed_forward.split())


def test_linears_of_a_block_are_attention_or_feed_forward_or_routing(case):
    _, model, topology = case
    for block in topology.blocks:
        attention, rest = set(block.attention), set(block.feed_forward)
        routing = {p for p in all_linears(model, block.path) if any(p.startswith(r) for r in block.router)}
        assert not attention & rest
        assert attention | rest | routing == all_linears(model, block.path)
        assert not routing & (attention | rest)


def test_every_parameter_has_exactly_one_region(case):
    _, model, topology = case
    named = [topology.parameters(region) for region in ("embedding", "attention", "feed_forward", "norm")]
    named += [topology.parameters(region) for region in ("expert", "router", "head", "other")]
    flat = [name for names in named for name in names]
    assert sorted(flat) == sorted(name for name, _ in model.named_parameters())
    assert len(flat) == len(set(flat))
    by_object: dict[int, set] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        by_object.setdefault(id(value), set()).add(topology.region(name))
    assert all(len(regions) == 1 for regions in by_object.values())
    assert sum(topology.describe()["parameters"].values()) == sum(p.numel() for p in model.parameters())


def test_regions_inside_and_outside_of_blocks(case):
    known, model, topology = case
    for name, _ in model.named_parameters():
        region, index = topology.region(name)
        inside = [block.index for block in topology.blocks if name.startswith(block.path + ".")]
        assert [index] == (inside or [None])
        assert region not in (("head",) if inside else ("attention", "feed_forward", "expert", "router"))
    other = {name for name in topology.parameters("other") if topology.region(name)[1] is None}
    assert {name for name in other if not any(word in name for word in known.other.split())} == set()
    assert all(any(word in name for name in other) for word in known.other.split())
    assert not [name for name in topology.parameters("other") if topology.region(name)[1] is not None]


def test_head_is_found_and_never_among_the_linears(case):
    known, model, topology = case
    assert topology.head == known.head
    assert topology.head not in topology.linears()
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        assert model.get_submodule(topology.head) is output
    assert topology.linears() != [] and len(set(topology.linears())) == len(topology.linears())
    assert sorted(topology.linears("attention") + topology.linears("feed_forward")) == sorted(topology.linears())


def test_tied_weights_are_found_by_storage(case):
    known, model, topology = case
    assert len(topology.tied) == known.tied
    values = dict(model.named_parameters(remove_duplicate=False))
    for group in topology.tied:
        assert len({values[name].data_ptr() for name in group}) == 1
    if known.head and known.tied:
        assert any(f"{known.head}.weight" in group for group in topology.tied)
        assert topology.region(f"{known.head}.weight") == ("embedding", None)


def test_experts_are_where_the_config_has_them(case):
    known, model, topology = case
    values = dict(model.named_parameters())
    routed = tuple(block.index for block in topology.blocks if block.experts.count)
    assert routed == known.routed_blocks
    for index in routed:
        block = topology.blocks[index]
        assert block.experts.count == known.experts
        assert block.experts.parameters and len(block.router) == 1
        assert all(values[name].shape[0] == known.experts for name in block.experts.parameters)
        assert all(topology.region(name) == ("expert", index) for name in block.experts.parameters)
        gate = [name for name in values if name.startswith(block.router[0] + ".") and name.endswith("weight")]
        assert [topology.region(name) for name in gate] == [("router", index)]


def test_norms_and_embeddings_have_their_regions(case):
    known, model, topology = case
    for name, part in model.named_modules():
        head = topology.region(f"{name}.weight")[0] == "head"
        if "norm" in type(part).__name__.lower() and part._parameters and not head:
            assert topology.region(f"{name}.weight")[0] == "norm"
        if isinstance(part, nn.Embedding) and topology.region(f"{name}.weight")[1] is None:
            assert topology.region(f"{name}.weight")[0] == "embedding"
    assert all(bool(stack.final_norm) == known.final_norm for stack in topology.stacks)
    assert topology.embeddings
    assert not set(topology.embeddings) & set(topology.positions)


def test_description_is_json(case):
    assert json.loads(json.dumps(case[2].describe()))["model"] == case[2].name


def test_peft_leaves_the_topology_as_it_was(case):
    from peft import LoraConfig, get_peft_model

    known, _, before = case
    torch.manual_seed(0)
    # PEFT reads mlp.gate_proj of a mixture as its fused experts and then passes over the dense linears of that name
    targets = before.linears("attention" if known.routed_blocks else "all")
    wrapped = get_peft_model(known.build(), LoraConfig(r=2, target_modules=targets))
    after = Topology.of(wrapped)
    assert after.prefix == "base_model.model."
    assert after.describe() == before.describe()
    assert after.blocks == before.blocks
    for path in after.linears():
        assert wrapped.get_submodule(after.prefix + path) is wrapped.get_base_model().get_submodule(path)
        assert hasattr(wrapped.get_submodule(after.prefix + path), "lora_A") == (path in targets)
    for name, _ in wrapped.named_parameters():
        path = name.removeprefix(after.prefix).partition(".lora_")[0].replace(".base_layer", "")
        expected = before.region(path if path in before._regions else path + ".weight")
        assert after.region(name) == before.region(name) == expected
        if "lora_" in name:
            assert expected[0] in ("attention", "feed_forward")


def test_topology_is_the_same_without_weights(case):
    known, _, topology = case
    with torch.device("meta"):
        assert Topology.of(known.build()).describe() == topology.describe()
