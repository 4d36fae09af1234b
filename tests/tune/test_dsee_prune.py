"""The second phase of DSEE: what is removed, what stays, and that only the update moves afterwards."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, GPT2Config, LlamaConfig

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.tune import Dsee, DseePrune, Probe
from luthier.tune.low_rank_sparse import load_update
from luthier.tune.selector.heads import heads
from luthier.weights.selection import Selection
from stepping import stepped

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SCORES = ["update", "update+weight", "weight", "random"]


def llama(**more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **{**SHAPE, **more})).eval()


def grouped():
    return llama(num_key_value_heads=2)


def bert():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=64, num_labels=3, **SHAPE)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.1)
    return model


def gpt2():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()


def outputs(model, step=0):
    ids = torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(step))
    return model(input_ids=ids).logits


def train(tuned, steps=3, rate=0.02):
    return stepped(tuned, outputs, steps, rate)


def first_phase(make=llama, **settings):
    model = make()
    given = {"r": 4, "num_sparse": 16, **settings}
    return train(Dsee(**given).attach(model, Probe(Topology.of(model))))


def pruned(make=llama, first=None, seed=0, **settings):
    one = first_phase(make, **(first or {}))
    return DseePrune(**settings).attach(one.model, Probe(Topology.of(one.model), seed))


def frozen_weights(tuned):
    """Of each tensor of the plain model, W (o S1) without the update."""
    base = tuned.base_model
    return {n.replace(".base_layer", ""): p.detach() for n, p in base.named_parameters() if "lora_" not in n}


def linears(make):
    return [f"{path}.weight" for path in Topology.of(make()).linears()]


# Unstructured


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("score", SCORES)
def test_exact_counts_over_each_group(make, score):
    mask = pruned(make, score=score, density=0.7, adapted_density=0.37).mask
    assert set(mask) == set(linears(make))
    adapted = {f"{path}.weight" for path in first_phase(make).layers}
    for group, density in ((adapted, 0.37), (set(mask) - adapted, 0.7)):
        entries = sum(mask.elements_of(name) for name in group)
        assert entries - sum(mask.counts()[name] for name in group) == round((1 - density) * entries)
    if score != "random":  # over the group, not per tensor
        rest = [n for n in mask if n not in adapted]
        assert len({round(mask.counts()[n] / mask.elements_of(n), 6) for n in rest}) > 1


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("score", ["update", "update+weight", "weight"])
def test_equals_torchs_global_pruning_on_the_same_scores(make, score):
    one = first_phase(make)
    scores = {}
    base = make()
    for name in linears(make):
        w = base.get_parameter(name).detach().clone()
        layer = one.layers.get(name.removesuffix(".weight"))
        if layer is not None and score != "weight":
            low = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            s2 = torch.zeros(w.numel()).index_put((layer.places,), layer.lora_sparse["default"].detach())
            update = 32 / 4 * (low.detach() + s2.view(w.shape))
            w = update if score == "update" else w + update
        scores[name] = w
    adapted = {f"{path}.weight" for path in one.layers}
    mask = DseePrune(score=score, density=0.6, adapted_density=0.5).attach(one.model, Probe(Topology.of(base))).mask
    for group, amount in ((adapted, 0.5), (scores.keys() - adapted, 0.4)):
        parts = {}
        for name in sorted(group):
            parts[name] = nn.Linear(*scores[name].shape[::-1], bias=False)
            parts[name].weight = nn.Parameter(scores[name])
        count = round(amount * sum(scores[name].numel() for name in group))
        pairs = [(part, "weight") for part in parts.values()]
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=count)
        for name, part in parts.items():
            assert torch.equal(mask.mask(name), part.weight_mask.bool()), name


@pytest.mark.parametrize("masked", [False, True])
def test_the_effective_weight_is_the_formula(masked):
    tuned = train(pruned(score="update+weight", density=0.6, adapted_density=0.5, mask_update=masked))
    base, wanted = llama(), {}
    for name in tuned.mask:
        s1, w = tuned.mask.mask(name), base.get_parameter(name).detach()
        layer = tuned.layers.get(name.removesuffix(".weight"))
        wanted[name] = w * s1
        if layer is not None:
            low = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            s2 = torch.zeros(w.numel()).index_put((layer.places,), layer.lora_sparse["default"].detach())
            update = 32 / 4 * (low.detach() + s2.view(w.shape))
            wanted[name] = w * s1 + (update * s1 if masked else update)
    with torch.no_grad():
        before = outputs(tuned.model)
        plain = tuned.merged()
        torch.testing.assert_close(outputs(plain), before, rtol=0, atol=1e-5)
    adapted = {f"{path}.weight" for path in tuned.layers}
    for name, value in wanted.items():
        merged = plain.get_parameter(name)
        torch.testing.assert_close(merged, value, rtol=0, atol=1e-6)
        zeros_where_pruned = not merged[~tuned.mask.mask(name)].any()
        assert zeros_where_pruned == (masked or name not in adapted)


@pytest.mark.parametrize("mode", ["unstructured", "heads", "neurons"])
def test_only_the_update_and_the_head_move_and_the_mask_stays(mode):
    more = {"heads": 1} if mode == "heads" else {"density": 0.5}
    one = first_phase(bert)
    moving = set(one.moving())
    tuned = DseePrune(mode=mode, score="weight", **more).attach(one.model, Probe(Topology.of(one.model)))
    assert set(tuned.moving()) == moving and set(tuned.head) == {"classifier.weight", "classifier.bias"}
    before = {name: value.clone() for name, value in frozen_weights(tuned).items()}
    update = {name: value.detach().clone() for name, value in tuned.moving().items()}
    train(tuned)
    for name, value in frozen_weights(tuned).items():
        assert torch.equal(value, before[name]) == (name not in tuned.head), name
    for name in tuned.mask:
        assert not frozen_weights(tuned)[name][~tuned.mask.mask(name)].any()
    assert all(not torch.equal(value, update[name]) for name, value in tuned.moving().items())


def test_the_update_is_taken_over_bit_for_bit():
    one = first_phase()
    update = {name: value.detach().clone() for name, value in one.moving().items()}
    tuned = DseePrune(score="weight").attach(one.model, Probe(Topology.of(one.model)))
    assert all(torch.equal(value, update[name]) for name, value in tuned.moving().items())
    assert tuned.selection() == one.selection()


def test_a_density_of_one_removes_nothing():
    one = first_phase()
    with torch.no_grad():
        before = outputs(one.model)
        tuned = DseePrune(density=1.0, adapted_density=1.0).attach(one.model, Probe(Topology.of(one.model)))
        assert tuned.mask.density == 1 and torch.equal(outputs(tuned.model), before)


def test_all_linears_adapted_leaves_no_other_group():
    mask = pruned(first={"targets": "all-linear"}, adapted_density=0.5, density=0.1).mask
    assert mask.elements - mask.count == round(0.5 * mask.elements)


def test_random_scores_follow_the_seed_and_only_the_adapted_group():
    a, b, c = (pruned(score="random", seed=seed).mask for seed in (0, 0, 1))
    weight = pruned(score="weight").mask
    assert a == b and a != c
    for name in a:
        same = torch.equal(a.mask(name), weight.mask(name))
        assert same == (not name.endswith(("q_proj.weight", "v_proj.weight")))


# Heads and neurons


def cut(model, path, start, stop):
    """What the linear at `path` reads at these places is zero: the part that makes it is not there."""

    def hook(module, args):
        x = args[0].clone()
        x[..., start:stop] = 0
        return (x, *args[1:])

    model.get_submodule(path).register_forward_pre_hook(hook)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("make", [llama, bert, grouped])
def test_the_model_computes_as_if_the_heads_were_not_there(make, score):
    one = first_phase(make, targets=("query", "value", "output"))  # the update has columns for them too
    plain = copy.deepcopy(one).merged().eval()
    tuned = DseePrune(mode="heads", heads=2, score=score).attach(one.model, Probe(Topology.of(plain)))
    for block in Topology.of(plain).blocks:
        output = block.attention[-1]
        gone = [h for h in range(4) if not tuned.mask.mask(f"{output}.weight")[:, 8 * h : 8 * h + 8].any()]
        assert len(gone) == 2
        for head in gone:
            cut(plain, output, 8 * head, 8 * head + 8)
    with torch.no_grad():
        torch.testing.assert_close(outputs(tuned.model), outputs(plain), rtol=0, atol=1e-5)
        merged = copy.deepcopy(tuned).merged()
        torch.testing.assert_close(outputs(merged), outputs(plain), rtol=0, atol=1e-5)
    for name in tuned.mask:  # rows and columns are gone from the sum of weight and update as well
        assert not merged.get_parameter(name)[~tuned.mask.mask(name)].any()


@pytest.mark.parametrize("score", ["update", "update+weight", "weight"])
def test_the_lowest_heads_go_by_the_rows_of_query_and_value(score):
    one = first_phase(bert)
    base, totals = bert(), []
    for block in Topology.of(base).blocks:
        sums = torch.zeros(4)
        for path in (block.attention[0], block.attention[2]):
            layer = one.layers[path]
            update = layer.get_delta_weight("default").detach().abs()
            weight = base.get_parameter(f"{path}.weight").detach().abs()
            table = {"update": update, "update+weight": update + weight, "weight": weight}[score]
            sums += table.view(4, -1).sum(1)
        totals.append(set(sums.argsort()[:3].tolist()))
    mask = DseePrune(mode="heads", score=score).attach(one.model, Probe(Topology.of(base))).mask
    for block, gone in zip(Topology.of(base).blocks, totals, strict=True):
        for path in block.attention[:3]:
            rows = mask.mask(f"{path}.weight").view(4, -1).any(1)
            assert {h for h in range(4) if not rows[h]} == gone
            assert torch.equal(mask.mask(f"{path}.bias").view(4, -1).any(1), rows)


def test_a_shared_value_goes_with_the_last_of_its_heads():
    tuned = pruned(grouped, mode="heads", heads=2, score="weight")
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn"
        query = tuned.mask.mask(f"{at}.q_proj.weight").view(4, -1).any(1)
        name = f"{at}.v_proj.weight"
        value = tuned.mask.mask(name).view(2, -1).any(1) if name in tuned.mask else torch.ones(2, dtype=torch.bool)
        assert torch.equal(value, query.view(2, 2).any(1))


def test_a_shared_value_counts_for_each_of_its_heads_in_equal_parts():
    units = heads(grouped(), Topology.of(grouped()).blocks[0])[0]
    assert [[(one.path.rpartition(".")[2], one.start, f) for one, f in unit.scored] for unit in units] == [
        [("q_proj", 8 * h, 1.0), ("v_proj", 8 * (h // 2), 0.5)] for h in range(4)
    ]


@pytest.mark.parametrize(("make", "targets"), [(llama, "all-linear"), (bert, "all-linear"), (gpt2, ("c_fc",))])
def test_the_model_computes_as_if_the_neurons_were_not_there(make, targets):
    one = first_phase(make, targets=targets)
    plain = copy.deepcopy(one).merged().eval()
    tuned = DseePrune(mode="neurons", density=0.7).attach(one.model, Probe(Topology.of(plain)))
    for block in Topology.of(plain).blocks:
        path = block.feed_forward[-1]
        mask = tuned.mask.mask(f"{path}.weight")
        columns = mask.any(1) if make is gpt2 else mask.any(0)
        gone = [n for n in range(len(columns)) if not columns[n]]
        assert len(gone) == round(0.3 * len(columns))
        for n in gone:
            cut(plain, path, n, n + 1)
    with torch.no_grad():
        torch.testing.assert_close(outputs(tuned.model), outputs(plain), rtol=0, atol=1e-5)


# Keeping it


@pytest.mark.parametrize("settings", [{}, {"mask_update": True}, {"mode": "heads", "heads": 1}], ids=str)
@pytest.mark.parametrize("make", [llama, bert])
def test_saved_and_loaded(make, settings, tmp_path):
    tuned = train(pruned(make, score="update+weight", **settings))
    with torch.no_grad():
        wanted = outputs(tuned.model)
        assert tuned.save(tmp_path) == "model" and torch.equal(outputs(tuned.model), wanted)
        alone = load_update(make(), tmp_path)
        assert torch.equal(outputs(alone), wanted)
        whole = type(make()).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(outputs(whole), wanted, rtol=0, atol=1e-5)
    assert Selection.load(tmp_path / "mask.safetensors") == tuned.mask
    with pytest.raises(InputError, match="pruned before"):
        DseePrune().attach(alone, Probe(Topology.of(alone)))


def test_an_update_from_disk_can_be_pruned(tmp_path):
    one = first_phase()
    one.save_update(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"dsee.safetensors", "dsee.json"}
    again = load_update(llama(), tmp_path)
    masks = [DseePrune().attach(m, Probe(Topology.of(m))).mask for m in (one.model, again)]
    assert masks[0] == masks[1]
    size = sum(v.numel() * v.element_size() for v in load_file(tmp_path / "dsee.safetensors").values())
    assert size == 4 * (4 * (4 * 64 + 16) + 4 * 16)


def test_a_resumed_phase_goes_on_as_if_never_stopped():
    whole, broken, again = (pruned(score="update+weight") for _ in range(3))
    optimizers = [torch.optim.AdamW(t.parameter_groups(0.1), lr=0.02) for t in (whole, broken, again)]

    def steps(tuned, optimizer, first, last):
        for step in range(first, last):
            outputs(tuned.model, step).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(whole, optimizers[0], 0, 4)
    steps(broken, optimizers[1], 0, 2)
    again.load_state_dict({k: v.clone() for k, v in broken.state_dict().items()})
    again.load_extra_state(json.loads(json.dumps(broken.extra_state())))
    optimizers[2].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    steps(again, optimizers[2], 2, 4)
    for a, b in zip(whole.moving().values(), again.moving().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="another mask"):
        again.load_extra_state(pruned(score="weight").extra_state())


# Errors


def test_what_is_refused():
    model = llama()
    with pytest.raises(InputError, match="goes on with the update of dsee"):
        DseePrune().attach(model, Probe(Topology.of(model)))
    fresh = Dsee(r=4, num_sparse=4).attach(llama(), Probe(Topology.of(llama())))
    with pytest.raises(InputError, match="the update is zero"):
        DseePrune().attach(fresh.model, Probe(Topology.of(fresh.model)))
    assert DseePrune(score="weight").attach(fresh.model, Probe(Topology.of(fresh.model))).mask.density < 1
    with pytest.raises(InputError, match="says nothing of these neurons"):
        pruned(mode="neurons")
    with pytest.raises(InputError, match="at least one must stay"):
        pruned(mode="heads", heads=4)
    with pytest.raises(InputError, match="at least one must stay"):
        pruned(mode="neurons", density=0.001, score="weight")
    with pytest.raises(InputError, match="cannot be told apart"):
        pruned(gpt2, first={"targets": ("c_attn",)}, mode="heads")


def test_heads_that_do_not_divide_are_refused():
    one = first_phase()
    one.base_model.model.layers[1].self_attn.head_dim = 7
    with pytest.raises(InputError, match="do not divide into heads of 7"):
        DseePrune(mode="heads", score="weight").attach(one.model, Probe(Topology.of(one.model)))
    one = first_phase(bert)
    inner = one.base_model.bert.encoder.layer[0].attention.self
    inner.attention_head_size, inner.num_attention_heads = None, 5
    with pytest.raises(InputError, match="do not divide into 5 heads"):
        DseePrune(mode="heads", score="weight").attach(one.model, Probe(Topology.of(one.model)))


def test_a_refused_pruning_leaves_the_model_as_it_was():
    one = first_phase()
    with torch.no_grad():
        before = outputs(one.model)
        with pytest.raises(InputError):
            DseePrune(mode="heads", heads=9).attach(one.model, Probe(Topology.of(one.model)))
        assert torch.equal(outputs(one.model), before)


@pytest.mark.parametrize(
    "idle", [{"heads": 2}, {"mode": "heads", "density": 0.5}, {"mode": "neurons", "mask_update": True}], ids=str
)
def test_settings_that_a_mode_does_not_read_are_refused(idle):
    with pytest.raises(ValueError, match="says nothing with mode"):
        DseePrune(**idle)


def test_ranges_are_checked():
    for wrong in ({"density": 0}, {"adapted_density": 1.1}, {"heads": 0}, {"score": "size"}, {"mode": "rows"}):
        with pytest.raises(ValueError, match=r"(?i)input should"):
            DseePrune(**wrong)
