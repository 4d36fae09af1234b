"""`Topology` at its edges: wrappers, models outside transformers, mixed blocks, and where it cannot tell."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from torch import nn
from transformers import AutoModelForCausalLM as Causal

from luthier.errors import InputError
from luthier.models import Topology


def last_names(paths) -> list[str]:
    return sorted(path.rpartition(".")[2] for path in paths)


def test_attention_is_what_mixes_positions(build):
    """Oracle by experiment: of all linears of the first block, attention's output projection is the first whose input
    at a later position depends on an earlier one; those before it are attention too."""
    for name in ("llama", "gpt2", "falcon", "bert"):
        model = build(name).eval()
        block = Topology.of(model).blocks[0]
        inputs: dict[str, list] = {}
        order: list[str] = []

        def keep(path):
            def hook(module, args):
                inputs.setdefault(path, []).append(args[0].detach())  # noqa: B023
                order.append(path)  # noqa: B023

            return hook

        for path in (*block.attention, *block.feed_forward):
            model.get_submodule(path).register_forward_pre_hook(keep(path))
        ids = torch.arange(3, 9)[None]
        other = ids.clone()
        other[0, 0] = 20
        with torch.no_grad():
            model(ids)
            model(other)
        mixed = [path for path in order[: len(inputs)] if not torch.equal(*(x[0, -1] for x in inputs[path]))]
        assert mixed[0] in block.attention
        before = order[: order.index(mixed[0])]
        assert all(path in block.attention or "falcon" in name for path in before)


def test_prompt_tuning_and_saved_modules_keep_their_regions(build):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    model = build("llama-classifier")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    topology = Topology.of(wrapped)
    assert topology.region("base_model.model.score.modules_to_save.default.weight") == ("head", None)
    prompted = get_peft_model(
        build("llama"),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", prompt_tuning_init="RANDOM"),
    )
    topology = Topology.of(prompted)
    assert topology.prefix == "base_model."
    assert topology.region("prompt_encoder.default.embedding.weight") == ("other", None)
    assert topology.region("base_model.model.layers.1.mlp.up_proj.weight") == ("feed_forward", 1)


def test_adapters_on_fused_experts_are_in_the_expert_region(build):
    from peft import LoraConfig, get_peft_model

    names = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    wrapped = get_peft_model(build("mixtral"), LoraConfig(r=2, **names))
    topology = Topology.of(wrapped)
    added = [name for name, _ in wrapped.named_parameters() if "experts" in name and "lora_" in name]
    assert added and {topology.region(name)[0] for name in added} == {"expert"}


def test_compiled_and_parallel_wrappers_are_seen_through(build):
    class Parallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = build("llama")
    topology = Topology.of(Parallel(model))
    assert topology.prefix == "module."
    assert topology.region("module.model.layers.0.mlp.up_proj.weight") == ("feed_forward", 0)
    assert topology.linears() == Topology.of(model).linears()


def test_model_outside_transformers():
    layer = nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=16)
    model = nn.ModuleDict(
        {"embed": nn.Embedding(10, 8), "body": nn.TransformerEncoder(layer, 3), "out": nn.Linear(8, 10)}
    )
    topology = Topology.of(model, head="out")
    assert [last_names(block.feed_forward) for block in topology.blocks] == [["linear1", "linear2"]] * 3
    assert topology.region("body.layers.1.self_attn.in_proj_weight") == ("attention", 1)
    assert topology.region("out.weight") == ("head", None)
    assert topology.region("embed.weight") == ("embedding", None)


def test_unfused_experts_with_their_router():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 3)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(3))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = nn.MultiheadAttention(8, 2)
            self.moe = Mixture()
            self.ffns = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))  # a chain, not experts

    topology = Topology.of(nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(2))}))
    block = topology.blocks[1]
    assert block.experts.modules == tuple(f"layers.1.moe.experts.{i}" for i in range(3))
    assert block.experts.count == 3 and block.router == ("layers.1.moe.gate",)
    assert last_names(block.feed_forward) == ["0", "1"]
    assert len(topology.linears("experts")) == 12
    assert topology.region("layers.0.moe.experts.2.1.weight") == ("expert", 0)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (
            t.SwitchTransformersConfig,
            {"num_layers": 2, "num_sparse_encoder_layers": 1, "d_kv": 4, "d_ff": 32, "num_heads": 4},
        ),
        (
            t.NllbMoeConfig,
            {"encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
        ),
    ],
)
def test_experts_that_transformers_keeps_apart(config, sizes):
    if config is t.NllbMoeConfig:
        sizes |= {
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
        }
    model = t.AutoModelForSeq2SeqLM.from_config(config(vocab_size=64, d_model=16, num_experts=3, **sizes))
    topology = Topology.of(model)
    routed = [block for block in topology.blocks if block.experts.count]
    assert routed and all(block.experts.count == 3 and len(block.router) == 1 for block in routed)
    assert len(topology.linears("experts")) == 3 * 2 * len(routed)
    assert not set(topology.linears("experts")) & set(topology.linears())
    assert {topology.region(f"{path}.weight")[0] for path in topology.linears("experts")} == {"expert"}
    named = {name for name, _ in model.named_parameters() if "expert" in name}
    assert named == set(topology.parameters("expert"))


def test_a_stack_of_mixed_blocks():
    """A convolution that stands where the other blocks have attention counts as attention."""
    config = t.Lfm2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    topology = Topology.of(Causal.from_config(config))
    assert topology.blocks[0].attention_modules == ("model.layers.0.conv",)
    assert topology.blocks[1].attention_modules == ("model.layers.1.self_attn",)
    assert len(topology.blocks[0].feed_forward) == len(topology.blocks[1].feed_forward) == 3


def test_without_any_attention_the_one_part_of_a_block_takes_its_place():
    model = Causal.from_config(t.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4))
    topology = Topology.of(model)
    assert topology.stacks[0].path == "backbone.layers" and topology.head == "lm_head"
    assert last_names(topology.blocks[0].attention) == ["dt_proj", "in_proj", "out_proj", "x_proj"]
    assert topology.region("backbone.layers.1.mixer.A_log") == ("attention", 1)
    assert topology == Topology.of(model, blocks="backbone.layers", attention="mixer")


def test_where_structure_does_not_tell_the_error_names_what_to_give():
    def layer():
        return nn.ModuleDict({"one": nn.Sequential(nn.Linear(8, 8)), "two": nn.Sequential(nn.Linear(8, 8))})

    model = nn.ModuleDict({"layers": nn.ModuleList([layer(), layer()]), "out": nn.Linear(8, 4)})
    with pytest.raises(InputError, match=r"as `blocks`, and as `attention` what mixes.*its lists are: layers \(2\)"):
        Topology.of(model)
    with pytest.raises(InputError, match=r"name it as `attention` .*a block at layers holds: one, two"):
        Topology.of(model, blocks="layers")
    with pytest.raises(InputError, match=r"blocks='strata' is not a list of modules.*layers"):
        Topology.of(model, blocks="strata")
    with pytest.raises(InputError, match="called 'three'"):
        Topology.of(model, blocks="layers", attention="three")
    with pytest.raises(InputError, match="head='layers' is not a linear"):
        Topology.of(model, blocks="layers", attention="one", head="layers")
    topology = Topology.of(model, blocks="layers", attention="one", head="out")
    assert topology.linears("attention") == ["layers.0.one.0", "layers.1.one.0"]
    assert topology.linears("feed_forward") == ["layers.0.two.0", "layers.1.two.0"]


def test_unknown_scope_and_region_are_refused(build):
    topology = Topology.of(build("llama"))
    with pytest.raises(InputError, match="did you mean 'attention'"):
        topology.linears("atention")
    with pytest.raises(InputError, match="did you mean 'feed_forward'"):
        topology.parameters("feedforward")


def test_a_flat_topology_names_every_parameter_once_and_sees_nothing_else():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), shared, nn.Sequential(shared))
    with pytest.raises(InputError, match="no list of blocks"):
        Topology.of(model)
    flat = Topology.flat(model)
    assert flat.parameters() == [name for name, _ in model.named_parameters()] == flat.parameters("other")
    assert flat.tied == (("2.weight", "3.0.weight"), ("2.bias", "3.0.bias"))
    assert not flat.blocks and not flat.linears() and flat.head is None
    assert flat.region("3.0.weight") == ("other", None)
    assert flat.describe()["parameters"] == {"other": sum(p.numel() for p in model.parameters())}
