"""Smaller matrices compute what the zeros did, and load from disk as any model."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.tune import Dsee, DseePrune, Probe
from luthier.tune.shrink import shrink

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **{**SHAPE, **more})).eval()


def biased():
    model = llama(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return model


def bert():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=64, num_labels=3, **SHAPE)).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=48)
    return AutoModelForCausalLM.from_config(config).eval()


def t5():
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **shape)).eval()


def pruned(model, targets=("query", "value"), **settings):
    tuned = Dsee(r=2, num_sparse=4, targets=targets).attach(model, Probe(Topology.of(model)))
    return DseePrune(score="weight", **settings).attach(tuned.model, Probe(Topology.of(model))).merged()


def outputs(model):
    ids = torch.arange(1, 31).view(3, 10)
    more = {"labels": ids} if isinstance(model, T5ForConditionalGeneration) else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (llama, {"mode": "heads", "heads": 2}),
        (biased, {"mode": "heads", "heads": 3}),
        (llama, {"mode": "neurons", "density": 0.6}),
        (biased, {"mode": "neurons", "density": 0.6}),
        (bert, {"mode": "neurons", "density": 0.6}),
        (t5, {"mode": "neurons", "density": 0.6}),
    ],
)
def test_it_is_smaller_and_computes_the_same(make, settings, tmp_path):
    model = pruned(make(), **settings)
    small = shrink(model)
    torch.testing.assert_close(outputs(small), outputs(model), rtol=0, atol=1e-5)
    assert type(small) is type(model)
    lost = sum(p.numel() for p in make().parameters()) - sum(p.numel() for p in small.parameters())
    base = make()
    blocks = Topology.of(base).blocks
    parts, share = ("attention", settings["heads"] / 4) if "heads" in settings else ("feed_forward", 19 / 48)
    paths = [path for block in blocks for path in getattr(block, parts)]
    assert lost >= round(share * sum(base.get_submodule(path).weight.numel() for path in paths))
    small.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path).eval()), outputs(small))


def test_gpt2_keeps_its_weights_the_other_way_round():
    model = pruned(gpt2(), targets=("c_fc",), mode="neurons", density=0.5)
    small = shrink(model)
    assert small.config.n_inner == 24
    torch.testing.assert_close(outputs(small), outputs(model), rtol=0, atol=1e-5)


def test_grouped_heads_go_with_their_key_and_value_or_stay():
    model = llama(num_key_value_heads=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, 16:] = 0  # the second group
            layer.self_attn.o_proj.weight[:, :8] = 0  # one head of the first
    small = shrink(model)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim) == (2, 1, 8)
    torch.testing.assert_close(outputs(small), outputs(model), rtol=0, atol=1e-5)


def test_as_many_go_as_are_unread_in_every_block():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, [3, 5, 7]] = 0
        model.model.layers[1].mlp.down_proj.weight[:, [40]] = 0
    before = {name: p.clone() for name, p in model.state_dict().items()}
    small = shrink(model)
    assert small.config.intermediate_size == 47
    torch.testing.assert_close(outputs(small), outputs(model), rtol=0, atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert model.config.intermediate_size == 48


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(InputError, match="nothing to cut"):
        shrink(llama())
    for make in (bert, t5, llama):  # three heads do not divide the hidden size, which Llama's config wants
        with pytest.raises(InputError, match="cannot say what is left"):
            shrink(pruned(make(), mode="heads", heads=1))
    model = llama()
    tuned = Dsee(r=2, num_sparse=4).attach(model, Probe(Topology.of(model)))
    with pytest.raises(InputError, match="plain model"):
        shrink(tuned.model)
