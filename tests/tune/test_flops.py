"""Costs of tensors, held against arithmetic by hand and against torch's own counter of what really runs."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.tune import Probe
from luthier.tune.selector.counting import costs_of_pass, count_forward
from luthier.tune.selector.flops import language_model_costs, tensor_costs
from luthier.tune.selector.uses import watch

ROWS, LENGTH, WIDTH, FORWARD, VOCABULARY = 2, 12, 64, 96, 50
N = ROWS * LENGTH
SHAPE = {"hidden_size": WIDTH, "intermediate_size": FORWARD, "num_hidden_layers": 2, "num_attention_heads": 4}
EAGER = {"attn_implementation": "eager"}


def llama(tied=False, **more):
    torch.manual_seed(0)
    given = {**SHAPE, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "tie_word_embeddings": tied, **EAGER, **more}
    return LlamaForCausalLM(LlamaConfig(**given)).eval()


def ids():
    return torch.arange(N).view(ROWS, LENGTH) % VOCABULARY


def products(model, loss, names):
    """Multiply-adds of a forward and backward pass in which the parameters `names` have gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    with FlopCounterMode(display=False) as counter:
        value = loss()
        if names:
            value.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / 2


def only_products(model, costs):
    """The costs without what is no matrix product: norms, biases, embeddings, sums of gradients."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tensors = {name: model.get_parameter(name) for name in costs.names}
    flat = np.array([p.ndim < 2 or id(p) in tables for p in tensors.values()])
    return np.where(flat, 0.0, costs.dy), np.where(flat, 0.0, costs.dw)


def test_hand_arithmetic_of_a_llama():
    """Two blocks, untied, half as many key heads: n a b, and the rest by the rule."""
    costs, kv, head = language_model_costs(llama(), ROWS, LENGTH), WIDTH // 2, N * WIDTH * VOCABULARY
    attention = N * LENGTH * WIDTH
    block = {
        "input_layernorm": (N * WIDTH, N * WIDTH),
        "self_attn.q_proj": (N * WIDTH * WIDTH, N * WIDTH * WIDTH),
        "self_attn.k_proj": (N * WIDTH * kv, N * WIDTH * kv),
        "self_attn.v_proj": (N * WIDTH * kv + 4 * attention, N * WIDTH * kv),
        "self_attn.o_proj": (N * WIDTH * WIDTH, N * WIDTH * WIDTH),
        "post_attention_layernorm": (N * WIDTH, N * WIDTH),
        "mlp.gate_proj": (N * WIDTH * FORWARD, N * WIDTH * FORWARD),
        "mlp.up_proj": (N * WIDTH * FORWARD, N * WIDTH * FORWARD),
        "mlp.down_proj": (N * WIDTH * FORWARD, N * WIDTH * FORWARD),
    }
    expected = {"model.embed_tokens.weight": (0, N * WIDTH)}
    expected |= {f"model.layers.{i}.{name}.weight": cost for i in range(2) for name, cost in block.items()}
    expected |= {"model.norm.weight": (N * WIDTH, N * WIDTH), "lm_head.weight": (head, head)}
    assert costs.names == tuple(expected)  # the order of use, in which a block's norms are not last
    assert [(y, w) for y, w in zip(costs.dy, costs.dw, strict=True)] == list(expected.values())
    weights = sum(w for _, w in expected.values())  # every forward product is once a weight's gradient too
    assert costs.forward == weights + 2 * 2 * attention
    assert costs.full == costs.forward + costs.dy.sum() + costs.dw.sum()


def test_a_tied_head_is_the_embedding_and_everyone_pays_its_way_down():
    apart, tied = language_model_costs(llama(), ROWS, LENGTH), language_model_costs(llama(True), ROWS, LENGTH)
    head = N * WIDTH * VOCABULARY
    assert tied.names == apart.names[:-1]
    assert tied.dw[0] == head + WIDTH * VOCABULARY and tied.dy[0] == 0
    assert tied.dy[-1] == apart.dy[-2] + head and tied.forward == apart.forward
    assert (tied.dy[1:-1] == apart.dy[1:-2]).all() and (tied.dw[1:] == apart.dw[1:-1]).all()


@pytest.mark.parametrize("tied", [False, True])
def test_products_are_those_that_run_for_every_choice_that_ends_at_a_norm(tied):
    """The oracle. Below a norm or an embedding nothing is overrated; a linear's own dy, and that of linears beside it
    in the same part of the block, is at most what is paid too much."""
    model = llama(tied)
    costs = language_model_costs(model, ROWS, LENGTH)
    dy, dw = only_products(model, costs)
    if tied:
        dw[0], dy[-1] = N * WIDTH * VOCABULARY, N * WIDTH * VOCABULARY
    forward = products(model, lambda: model(input_ids=ids(), labels=ids()).loss, [])
    random = np.random.default_rng(0)
    choices = [np.arange(len(costs.names)) == k for k in range(len(costs.names))]
    choices += [random.random(len(costs.names)) < 0.2 for _ in range(8)] + [np.ones(len(costs.names), dtype=bool)]
    for chosen in (c for c in choices if c.any()):
        predicted = forward + dw[chosen].sum() + dy[np.logical_or.accumulate(chosen)].sum()
        names = [name for name, picked in zip(costs.names, chosen, strict=True) if picked]
        counted = products(model, lambda: model(input_ids=ids(), labels=ids()).loss, names)
        part = names[0].rpartition(".")[0].rpartition(".")[0]
        beside = [name == names[0] or (part != "" and name.startswith(f"{part}.")) for name in costs.names]
        over = dy[np.array(beside)].sum()
        if "norm" in names[0] or "embed" in names[0]:
            assert counted == predicted, names
        else:
            assert counted <= predicted <= counted + over, names


def probe_of(model, labelled=5):
    labels = ids().clone()
    labels[:, : LENGTH - labelled] = -100
    batch = {"input_ids": ids(), "labels": labels}
    return Probe(Topology.of(model), 0, lambda: [batch], lambda m, b: Sft().loss(m, b).value()), batch


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_a_head_that_runs_at_labelled_positions_costs_that_much(tied, counted):
    model = llama(tied)
    probe, batch = probe_of(model)
    costs, size = costs_of_pass(model, probe, counted=counted)
    assert size == N
    norms = sum(N * WIDTH for name in costs.names if "norm" in name) + N * WIDTH
    assert costs.forward - norms == products(model, lambda: probe.loss(model, batch), [])
    whole = language_model_costs(model, ROWS, LENGTH, labelled=ROWS * 5)
    assert whole.names == costs.names and whole.forward == costs.forward
    np.testing.assert_array_equal(whole.dy, costs.dy)
    np.testing.assert_array_equal(whole.dw, costs.dw)


def bert(kind):
    return kind(BertConfig(vocab_size=VOCABULARY, num_labels=3, **SHAPE, **EAGER))


ZOO = {
    "bert classifier": lambda: bert(BertForSequenceClassification),
    "bert masked": lambda: bert(BertForMaskedLM),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, **EAGER)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=8,
            d_ff=FORWARD,
            num_heads=4,
            num_layers=2,
            decoder_start_token_id=0,
            **EAGER,
        )
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=3, **SHAPE, **EAGER)
    ),
    "albert": lambda: AlbertForSequenceClassification(
        AlbertConfig(
            vocab_size=VOCABULARY, embedding_size=16, num_labels=3, **{**SHAPE, "num_hidden_layers": 3}, **EAGER
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            num_local_experts=4,
            num_experts_per_tok=2,
            num_key_value_heads=2,
            experts_implementation="eager",
            **SHAPE,
            **EAGER,
        )
    ),
}


def loss_of(name, model):
    if name == "vit":
        return lambda: model(pixel_values=torch.ones(ROWS, 1, 8, 8), labels=torch.arange(ROWS)).loss
    if name == "t5":
        return lambda: model(input_ids=ids(), labels=ids()[:, :7].contiguous()).loss
    labels = torch.arange(ROWS) if hasattr(model, "classifier") else ids()
    return lambda: model(input_ids=ids(), labels=labels).loss


@pytest.mark.parametrize("name", ZOO)
def test_forward_products_of_any_architecture_are_those_that_run(name):
    torch.manual_seed(0)
    model = ZOO[name]().eval()
    run, topology = loss_of(name, model), Topology.of(model)
    uses = watch(model, run)
    costs = tensor_costs(model, topology, uses)
    # Norms, biases and token embeddings have costs but no products: the numbers that each puts out.
    tables = set(topology.positions)
    vectors = 0
    for path, use in uses.items():
        module = model.get_submodule(path)
        flat = [p for p in module.parameters(recurse=False) if p.ndim == 1]
        embeds = isinstance(module, nn.Embedding) and path not in tables
        vectors += use.numbers * (len(flat) + embeds)
    assert costs.forward - vectors == products(model, run, [])
    again = tensor_costs(model, topology, uses, counted=count_forward(model, topology, run, uses))
    assert again.forward == costs.forward
    np.testing.assert_array_equal(again.dy, costs.dy)


@pytest.mark.parametrize("name", ZOO)
def test_no_single_tensor_costs_more_than_is_said(name):
    torch.manual_seed(0)
    model = ZOO[name]().eval()
    run = loss_of(name, model)
    costs = tensor_costs(model, Topology.of(model), watch(model, run))
    counted = {k: products(model, run, [costs.names[k]]) for k in range(0, len(costs.names), 3)}
    for k, really in counted.items():
        assert really <= costs.step(np.arange(len(costs.names)) == k), costs.names[k]


def test_a_block_that_is_passed_several_times_pays_for_all_passes_whatever_is_chosen():
    model = ZOO["albert"]().eval()
    run = loss_of("albert", model)
    costs = tensor_costs(model, Topology.of(model), watch(model, run))
    inside = [k for k, name in enumerate(costs.names) if ".albert_layers." in name]
    last = np.arange(len(costs.names)) == inside[-1]
    once = costs.dy[inside[:-1]].sum()  # of one pass
    assert costs.step(last) - costs.forward >= 2 * once  # three passes, of which the last tensor need not pay one


def test_an_encoder_comes_before_its_decoder():
    model = ZOO["t5"]().eval()
    names = tensor_costs(model, Topology.of(model), watch(model, loss_of("t5", model))).names
    sides = [name.split(".")[0] for name in names[1:]]
    assert names[0] == "shared.weight" and sides == sorted(sides, key=["encoder", "decoder", "lm_head"].index)


def test_an_unknown_module_counts_as_a_linear_and_is_named():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(WIDTH, 3))
            self.rest = nn.Identity()

        def forward(self, x):
            return self.rest(x) + 0 * (x @ self.table).sum()

    model = llama()
    block = model.model.layers[1].mlp
    block.act_fn = nn.Sequential(block.act_fn)
    model.model.layers[1].mlp.down_proj = nn.Sequential(model.model.layers[1].mlp.down_proj, Gate())
    with pytest.warns(UserWarning, match=r"model\.layers\.1\.mlp\.down_proj\.1 \(Gate\)"):
        costs = tensor_costs(model, Topology.of(model), watch(model, lambda: model(input_ids=ids())))
    place = costs.names.index("model.layers.1.mlp.down_proj.1.table")
    assert costs.dw[place] == costs.dy[place] == N * WIDTH * 3


def test_watching_leaves_no_trace():
    model = llama(attention_dropout=0.5).train()
    random = torch.get_rng_state()
    uses = watch(model, lambda: model(input_ids=ids()))
    assert torch.equal(random, torch.get_rng_state()) and all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert uses["model.layers.0.mlp.up_proj"].rows == N and uses["model.layers.0.mlp.up_proj"].length == LENGTH
