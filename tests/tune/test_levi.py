"""LEVI: what is read where, how members are averaged and judged, what a frozen backbone keeps, and what is saved."""

import copy
import json
import math

import numpy as np
import pytest
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
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.pipeline.recipe import load_recipe
from luthier.train import Loop, TrainSettings, TuningCallback
from luthier.tune import Levi, Probe
from luthier.tune.block_outputs import Reading, pool, read, spread_layers, to_front
from luthier.tune.feature_cache import FeatureCache, row_keys
from luthier.tune.layer_ensemble import Target, combined, ensemble_loss
from luthier.tune.levi import load
from luthier.tune.side_models import SmallTransformer

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


class Shapeless(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()


def net(rows=40, **settings):
    torch.manual_seed(3)
    model, x = Net(), torch.randn(rows, 10)
    batch = {"x": x, "labels": (x[:, 0] + 0.5 * torch.randn(rows) > 0).long()}
    probe = Probe(Topology.of(model, blocks="blocks", attention="mixer"), 0, lambda: [batch])
    return Levi(**{"task_model": f"{__name__}:Side", "task_width": 8, **settings}).attach(model, probe), batch


# -- which layers, and what is read there


def test_the_layers_of_the_rule():
    by_hand = {12: (3, 6, 9, 12), 6: (2, 3, 5, 6), 2: (1, 2), 1: (1,), 4: (1, 2, 3, 4)}
    assert {depth: spread_layers(depth, 4) for depth in by_hand} == by_hand
    for depth in range(1, 40):
        for count in range(1, 50):
            exact = {max(1, math.floor(depth * j / count + 0.5)) for j in range(1, count + 1)}
            assert spread_layers(depth, count) == tuple(sorted(exact))
            assert spread_layers(depth, count)[-1] == depth


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_is_the_stream_after_its_block_and_before_the_final_norm(name):
    model, batch = make(name), text()
    where = Reading.of(model, Topology.of(model), tuple(range(1, DEPTHS[name] + 1)))
    states = read(model, where, inputs(batch))
    base = model.get_encoder() if name == "t5" else model.base_model
    hidden = base(**inputs(batch), output_hidden_states=True).hidden_states
    assert len(hidden) == len(states) + 1
    normed = {"llama": lambda m: m.model.norm, "gpt2": lambda m: m.transformer.ln_f}
    normed["t5"] = lambda m: m.encoder.final_layer_norm
    for own, theirs in zip(states[:-1], hidden[1:-1], strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=0)
    last = normed[name](model)(states[-1]) if name in normed else states[-1]
    torch.testing.assert_close(last, hidden[-1], rtol=0, atol=1e-6)


def test_reading_leaves_no_hook_behind_even_after_an_error():
    model = make()
    where = Reading.of(model, Topology.of(model), 4)
    read(model, where, inputs(text()))
    with pytest.raises(ValueError, match="input_ids"):
        read(model, where, {"nonsense": torch.zeros(1)})
    assert not any(module._forward_hooks for module in model.modules())


def test_blocks_that_are_skipped_are_noticed():
    model = make("llama")
    where = Reading.of(model, Topology.of(model), 2)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    with pytest.raises(InputError, match=r"blocks|layers"):
        read(model, Reading(where.trunk, where.blocks[:2], 3, (1, 3)), inputs(text()))


@pytest.mark.parametrize("name", MODELS)
def test_widths_told_by_structure_are_those_that_are_seen(name):
    seen = attach(make(name), lambda: [text()]).model.widths
    assert attach(make(name)).model.widths == seen == (32,) * len(seen)


# -- pooling and padding


def test_pooling_by_hand_wherever_the_padding_stands():
    real = torch.tensor([[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]])
    junk = torch.full((1, 2), float("nan"))
    rows = {(1, 1, 1, 0): [0, 1, 2, None], (0, 1, 1, 1): [None, 0, 1, 2], (1, 0, 1, 1): [0, None, 1, 2]}
    for mask, order in rows.items():
        states = torch.cat([junk if i is None else real[i : i + 1] for i in order])[None]
        marks = torch.tensor([mask])
        assert pool(states, marks, "mean").tolist() == [[3.0, 30.0]]
        assert pool(states, marks, "cls").tolist() == [[1.0, 10.0]]
        assert pool(states, marks, "last").tolist() == [[6.0, 60.0]]
    assert pool(real[None], None, "last").tolist() == [[6.0, 60.0]]
    assert torch.equal(pool(real, None, "mean"), real)


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "roberta", "t5"])
def test_padding_on_either_side_changes_nothing(name, how):
    tuned = attach(make(name), pool=how, num_layers=2, task_model="bag" if name == "bert" else "transformer")
    tuned.model.eval()
    ids = torch.randint(3, 64, (1, 5), generator=torch.Generator().manual_seed(2))
    junk = torch.tensor([[1, 1, 1, 1]])  # roberta itself tells padding by this id
    right, left = torch.cat([ids, junk], 1), torch.cat([junk, ids], 1)
    between = torch.cat([junk[:, :2], ids[:, :3], junk[:, :2], ids[:, 3:]], 1)
    ones, zeros = torch.ones(1, 5).long(), torch.zeros(1, 4).long()
    cases = [(ids, ones), (right, torch.cat([ones, zeros], 1)), (left, torch.cat([zeros, ones], 1))]
    cases.append((between, torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1]])))
    with torch.no_grad():
        plain = tuned.model(input_ids=ids)
        views = tuned.model.features({"input_ids": ids})
        for padded, mask in cases:
            found = tuned.model(input_ids=padded, attention_mask=mask)
            torch.testing.assert_close(found.logits, plain.logits, rtol=0, atol=1e-5)
            given = to_front({"input_ids": padded, "attention_mask": mask})
            for a, b in zip(tuned.model.features(given), views, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_default_pools():
    found = {name: attach(make(name)).model.how for name in MODELS}
    expected = {"bert": "mean", "llama": "last", "gpt2": "last", "roberta": "mean", "albert": "mean", "t5": "mean"}
    assert found == expected and attach(vit()).model.how == "cls"


def test_to_front_keeps_order_and_moves_what_stands_beside():
    batch = {
        "input_ids": torch.tensor([[9, 4, 9, 5], [6, 7, 8, 9]]),
        "token_type_ids": torch.tensor([[0, 1, 0, 2]] * 2),
    }
    batch |= {"attention_mask": torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]]), "other": torch.tensor([1, 2])}
    kept = {name: value.clone() for name, value in batch.items()}
    found = to_front(batch)
    assert found["input_ids"].tolist() == [[4, 5, 9, 9], [6, 7, 8, 9]]
    assert found["token_type_ids"].tolist() == [[1, 2, 0, 0], [0, 1, 0, 2]]
    assert found["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert all(torch.equal(batch[name], kept[name]) for name in batch)


# -- members and loss


def test_regression_by_hand():
    members, target = torch.tensor([2.0, 5.0]).view(2, 1, 1), torch.tensor([3.0])
    assert combined(members).item() == 3.5
    assert ensemble_loss(members, target, beta=0.5).item() == pytest.approx(0.25 + 0.5 * (1 + 4) / 2)
    weights = torch.tensor([0.0, math.log(3.0)])  # softmax 1/4, 3/4
    assert combined(members, weights).item() == pytest.approx(0.25 * 2 + 0.75 * 5)
    # What the members lose by themselves is not weighted by `combine`.
    assert ensemble_loss(members, target, 1.0, weights).item() == pytest.approx((4.25 - 3) ** 2 + 2.5)


def test_classification_by_hand():
    members, target = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 1, 1, 2])

    def nll(logits):
        return np.mean(
            [math.log(sum(math.exp(v) for v in row)) - row[t] for row, t in zip(logits, target, strict=True)]
        )

    values = members.double().numpy()
    by_hand = nll(values.mean(0)) + 2.0 * np.mean([nll(member) for member in values])
    assert ensemble_loss(members, target, beta=2.0).item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("kind", ["text", "images"])
def test_the_mean_of_members_and_the_average_before_training(kind):
    batch = text() if kind == "text" else images()

    def out(**settings):
        tuned = attach(make() if kind == "text" else vit(), **settings)
        tuned.model.eval()
        return tuned.model(**batch)

    mean, learned = out(), out(combine="learned")
    assert mean.member_logits.shape == (4, 6, 3) and mean.logits.shape == (6, 3)
    torch.testing.assert_close(mean.logits, mean.member_logits.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(learned.logits, mean.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(learned.loss, mean.loss, rtol=0, atol=1e-6)


def test_without_a_member_the_mean_is_that_of_the_others():
    four, three = attach(layers=(1, 2, 4, 6)), attach(layers=(1, 4, 6))
    three.model.side.load_state_dict(four.model.side.state_dict())
    for own, theirs in zip(three.model.adapting, [four.model.adapting[i] for i in (0, 2, 3)], strict=True):
        own.load_state_dict(theirs.state_dict())
    batch = text()
    four.model.eval(), three.model.eval()
    members = four.model(**batch).member_logits
    torch.testing.assert_close(three.model(**batch).logits, members[[0, 2, 3]].mean(0), rtol=0, atol=1e-6)


def test_regression_is_in_the_targets_own_unit():
    batch = {**text(), "labels": torch.tensor([100.0, 104.0, 96.0, 108.0, 92.0, 100.0])}
    tuned = attach(None, lambda: [{n: v[:2] for n, v in batch.items()}, {n: v[2:] for n, v in batch.items()}])
    target = tuned.model.target
    assert (target.classes, target.mean) == (None, 100.0) and target.scale == pytest.approx(math.sqrt(160 / 6))
    tuned.model.eval()
    out = tuned.model(**batch)
    assert out.logits.shape == (6, 1) and out.member_logits.shape == (4, 6, 1)
    torch.testing.assert_close(out.logits, out.member_logits.mean(0), rtol=0, atol=1e-4)
    errors = (out.member_logits[..., 0] - batch["labels"]).square().mean() / target.scale**2
    whole = (out.logits[:, 0] - batch["labels"]).square().mean() / target.scale**2 + errors
    assert out.loss.item() == pytest.approx(whole.item(), rel=1e-4)
    losses = train(tuned, batch, 60)
    assert losses[-1] < 0.2 * losses[0]
    assert (tuned.model(**batch).logits[:, 0] - batch["labels"]).abs().max() < 4


def test_one_layer_alone_is_a_probe_trained_the_same_way():
    batch = text(24)
    tuned = attach(layers=(4,), beta=0.0, task_model="none", hidden=16)
    hidden = tuned.base_model.bert(**inputs(batch), output_hidden_states=True).hidden_states[4].detach()
    mask = batch["attention_mask"][..., None]
    z = (hidden * mask).sum(1) / mask.sum(1)
    probe = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
    own = tuned.model.adapting[0]
    probe[0].load_state_dict(own.norm.state_dict())
    probe[1].load_state_dict(own.map[0].state_dict())
    probe[3].load_state_dict(own.map[2].state_dict())
    train(tuned, batch, 20, decay=0.0)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(probe(z), batch["labels"]).backward()
        optimizer.step()
    torch.testing.assert_close(tuned.model(**batch).logits, probe(z), rtol=0, atol=1e-5)


def test_a_linear_member_converges_to_scikit_learns_logistic_regression():
    linear = pytest.importorskip("sklearn.linear_model")
    tuned, _ = net(task_model="none", layers=(2,), hidden=0, norm=False, beta=0.0)
    random = torch.Generator().manual_seed(5)
    x = torch.randn(600, 10, generator=random)
    labels = (x[:, 0] - x[:, 1] + torch.randn(600, generator=random) > 0).long()
    (z,) = tuned.model.features({"x": x})
    oracle = linear.LogisticRegression(C=np.inf, max_iter=5000, tol=1e-8).fit(z.numpy(), labels.numpy())
    optimizer = torch.optim.LBFGS(
        tuned.moving().values(),
        max_iter=3000,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = tuned.model(x=x, labels=labels).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    ours = tuned.model(x=x).logits.argmax(1).numpy()
    assert 0.6 < oracle.score(z.numpy(), labels.numpy()) < 0.99
    assert (ours == oracle.predict(z.numpy())).mean() >= 0.99


# -- the backbone


@pytest.mark.parametrize("kind", ["text", "images"])
def test_a_frozen_backbone_stays_as_it_is(kind):
    batch = text() if kind == "text" else images()
    tuned = attach(make() if kind == "text" else vit())
    before = {name: value.clone() for name, value in tuned.base_model.state_dict().items()}
    losses = train(tuned, batch, 30)
    tuned.model.train()
    assert losses[-1] < losses[0]
    assert not any(module.training for module in tuned.model.backbone.modules())
    assert tuned.model.side.training and tuned.model.adapting.training
    assert all(torch.equal(value, before[name]) for name, value in tuned.base_model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in tuned.base_model.parameters())
    assert not any(name.startswith("backbone.") for name in tuned.moving()) and tuned.delta() == {}


def test_a_frozen_backbone_neither_drops_out_nor_counts():
    tuned, batch = net()
    before = {name: value.clone() for name, value in tuned.base_model.state_dict().items()}
    tuned.model.train()
    a, b = tuned.model.features(inputs(batch)), tuned.model.features(inputs(batch))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    train(tuned, batch)
    assert all(torch.equal(value, before[name]) for name, value in tuned.base_model.state_dict().items())


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "albert"])
@pytest.mark.parametrize("backbone", ["lora", "full"])
def test_a_backbone_that_moves_does_so_only_where_it_is_read(name, backbone):
    model = make(name)
    base = {n: v.clone() for n, v in model.state_dict().items()}
    tuned = attach(model, backbone=backbone, num_layers=2, backbone_learning_rate=1e-3)
    rates = {group.get("lr") for group in tuned.parameter_groups(0.01)}
    assert rates == {None, 1e-3}
    tuned.model.train()
    tuned.model(**text()).loss.backward()
    assert all(p.grad is not None for p in tuned.moving().values())
    assert any(n.startswith("backbone.") for n in tuned.moving())
    train(tuned, text())
    detached = tuned.detach()
    same = all(torch.equal(v, base[n]) for n, v in detached.state_dict().items())
    assert same == (backbone == "lora") and detached.state_dict().keys() == base.keys()


def test_a_backbone_of_half_precision_has_float32_beside_it():
    tuned = attach(make("llama").to(torch.bfloat16), lambda: [text()], cache_features=True)
    losses = train(tuned, text(), 20)
    out = tuned.model(**text())
    assert losses[-1] < losses[0] and out.logits.dtype == torch.float32
    assert {p.dtype for p in tuned.moving().values()} == {torch.float32}
    plain = attach(make("llama").to(torch.bfloat16)).model.features(to_front(inputs(text())))
    for a, b in zip(tuned.model.features(to_front(inputs(text()))), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)  # bfloat16 has 8 bits


def test_full_leaves_what_lies_beyond_the_last_layer():
    moving = attach(make("llama"), backbone="full", layers=(1, 2)).moving()
    assert any("layers.1." in name for name in moving)
    assert not any("layers.2." in name or name == "backbone.model.norm.weight" for name in moving)


@pytest.mark.parametrize("backbone", ["frozen", "lora", "full"])
def test_detached_it_has_the_flags_of_before(backbone):
    model = make()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[1].train()
    gradients = [p.requires_grad for p in model.parameters()]
    training = [m.training for m in model.modules()]
    tuned = attach(model, backbone=backbone)
    train(tuned, text(), 1)
    assert tuned.detach() is model
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert [m.training for m in model.modules()] == training
    assert all(p.grad is None for p in model.parameters())


def test_same_seed_same_start_and_the_global_generator_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    model = make()
    torch.manual_seed(7)
    a, b, c = attach(model, seed=1), attach(make(), seed=1), attach(make(), seed=2)
    torch.manual_seed(7)
    attach(model, seed=3)
    assert torch.equal(torch.rand(1), expected)
    pairs = list(zip(a.state_dict().values(), b.state_dict().values(), c.state_dict().values(), strict=True))
    assert all(torch.equal(x, y) for x, y, _ in pairs) and not all(torch.equal(x, z) for x, _, z in pairs)


# -- the cache


def test_cached_features_give_the_same_and_the_backbone_never_runs():
    batch = text(12)
    plain = attach(make(), lambda: [batch])
    parts = [{n: v[i : i + 5] for n, v in batch.items()} for i in (0, 5, 10)]
    cached = attach(make(), lambda: parts, cache_features=True)
    assert len(cached.model.cache) == 12
    runs = []
    cached.base_model.bert.register_forward_hook(lambda *_: runs.append(1))
    shuffled = {n: v[torch.tensor([7, 3, 3, 11, 0])] for n, v in batch.items()}
    pairs = zip(shuffled["input_ids"], shuffled["attention_mask"], strict=True)
    ids = torch.stack([torch.cat([row[~mask.bool()], row[mask.bool()]]) for row, mask in pairs])
    left = {**shuffled, "input_ids": ids, "attention_mask": shuffled["attention_mask"].flip(1)}
    for given in (batch, shuffled, left):
        for tuned in (plain, cached):
            tuned.model.eval()
        a, b = plain.model(**given), cached.model(**given)
        torch.testing.assert_close(a.member_logits, b.member_logits, rtol=0, atol=1e-6)
    train(cached, batch, 3)
    assert not runs
    new = text(2, seed=9)
    cached.model(**new)
    cached.model(**new)
    assert len(runs) == 1 and len(cached.model.cache) == 14


def test_half_precision_is_close_and_half_as_large(tmp_path):
    batch = text(4)
    for stored, size in (("float32", 4), ("float16", 2)):
        tuned = attach(make(), lambda: [batch], cache_features=stored, cache_folder=str(tmp_path))
        (plain,) = attach(make(), layers=(6,)).model.features(inputs(batch))[:1]
        found = tuned.model.features(inputs(batch))[-1]
        torch.testing.assert_close(found, plain, rtol=1e-3 if size == 2 else 0, atol=1e-4 if size == 2 else 1e-6)
        assert (tuned.model.cache.folder / "values.bin").stat().st_size == 4 * 4 * 32 * size
        tuned.detach()


def test_a_cache_is_found_again_and_never_by_another_backbone(tmp_path):
    batch, options = text(5), {"cache_features": True, "cache_folder": str(tmp_path)}
    first = attach(make(), lambda: [batch], **options)
    with pytest.raises(InputError, match="another process or tuning holds"):
        attach(make(), lambda: [batch], **options)
    first.detach()
    assert len(attach(make(), **options).model.cache) == 5
    assert len(attach(make(seed=1), **options).model.cache) == 0
    assert len(attach(make(), layers=(1, 2), **options).model.cache) == 0
    assert len(attach(make(), pool="cls", **options).model.cache) == 0


def test_a_torn_cache_keeps_what_is_whole(tmp_path):
    cache = FeatureCache(tmp_path, identity="x", width=3)
    keys, values = [bytes([i]) * 16 for i in range(4)], torch.arange(12.0).view(4, 3)
    cache.put(keys, values)
    cache.close()
    with (cache.folder / "values.bin").open("r+b") as file:
        file.truncate(3 * 12 + 5)
    again = FeatureCache(tmp_path, identity="x", width=3)
    assert len(again) == 3 and keys[3] not in again
    again.put(keys, values + 100)  # only the missing one is written
    assert torch.equal(again.get([keys[3], keys[0]]), torch.stack([values[3] + 100, values[0]]))


def test_a_temporary_cache_goes_and_what_does_not_fit_is_refused():
    cache = FeatureCache(None, identity="x", width=1, dtype="float16")
    with pytest.raises(InputError, match="not finite as float16"):
        cache.put([b"a" * 16], torch.tensor([[1e6]]))
    with pytest.raises(KeyError):
        cache.get([b"a" * 16])
    folder = cache.folder
    cache.close()
    assert not folder.exists()


def test_a_rows_key_is_its_content():
    ids = torch.tensor([[5, 6, 0], [5, 6, 7], [6, 5, 0]])
    a = row_keys({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]])})
    b = row_keys({"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]])})
    assert a[0] == b[0] and len(set(a)) == 3
    assert row_keys({"input_ids": ids[:1, :2], "token_type_ids": ids[:1, :2]}) != b
    assert row_keys({"x": torch.tensor([[1.0]])}) != row_keys({"x": torch.tensor([[-1.0]])})


# -- task models


def test_the_small_transformer_is_as_described():
    model = SmallTransformer(50, 64, 0.1)
    assert model.embedding.weight.shape == (50, 64) and len(model.layers.layers) == 2
    layer = model.layers.layers[0]
    assert layer.norm_first and layer.self_attn.num_heads == 4 and layer.linear1.out_features == 128
    model.eval()
    a, b = model(torch.tensor([[1, 2, 3, 4]])), model(torch.tensor([[4, 3, 2, 1]]))
    assert a.shape == (1, 64) and (a - b).abs().max() > 1e-3  # it sees the order of words


def test_the_small_models_of_images_and_bags():
    convnet = attach(vit()).model.side
    assert [c.out_channels for c in convnet.convolutions] == [32, 64]
    assert all(c.kernel_size == (3, 3) and c.stride == (2, 2) for c in convnet.convolutions)
    bag = attach(make(), task_model="bag").model.side.eval()
    torch.testing.assert_close(bag(torch.tensor([[3, 4, 4, 5]])), bag(torch.tensor([[4, 5, 3, 4]])))


# -- saving, resuming, loading


@pytest.mark.parametrize("backbone", ["frozen", "lora", "full"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_saved_and_loaded_it_computes_the_same(name, backbone, tmp_path):
    batch = text()
    tuned = attach(make(name), backbone=backbone, combine="learned")
    train(tuned, batch)
    assert tuned.save(tmp_path) == "levi"
    assert (tmp_path / "adapter_model.safetensors").exists() == (backbone == "lora")
    assert (tmp_path / "backbone.safetensors").exists() == (backbone == "full")
    told = json.loads((tmp_path / "levi_config.json").read_text())
    assert told["backbone"]["class"] == type(make(name)).__name__ and len(told["backbone"]["hash"]) == 64
    again = load(tmp_path, make(name))
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, tuned.model(**batch).logits, rtol=0, atol=1e-6)
    assert again.moving().keys() == tuned.moving().keys()
    with pytest.raises(InputError, match="made on other weights"):
        load(tmp_path, make(name, seed=1))
    for needed in {"frozen": (), "lora": ("adapter_model.safetensors",), "full": ("backbone.safetensors",)}[backbone]:
        (tmp_path / needed).unlink()
        with pytest.raises(InputError, match=f"{needed} is missing"):
            load(tmp_path, make(name))
    (tmp_path / "levi.safetensors").unlink()
    with pytest.raises(InputError, match="no whole folder of levi"):
        load(tmp_path, make(name))


def test_a_users_own_module_is_handed_over_and_never_imported_from_a_file(tmp_path):
    tuned, batch = net()
    train(tuned, batch)
    tuned.save(tmp_path)
    model = copy.deepcopy(tuned.base_model)
    topology = Topology.of(model, blocks="blocks", attention="mixer")
    with pytest.raises(InputError, match="hand it over"):
        load(tmp_path, model, topology=topology)
    again = load(tmp_path, model, topology=topology, task_model=Side(8, 0.1))
    assert torch.equal(again.model.side.batch_norm.running_mean, tuned.model.side.batch_norm.running_mean)
    torch.testing.assert_close(again.model(**batch).logits, tuned.model(**batch).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backbone", ["frozen", "lora", "full"])
def test_state_comes_back_bit_for_bit(backbone):
    a, b = (attach(make("gpt2"), backbone=backbone, seed=seed) for seed in (0, 5))
    assert a.state_dict().keys() == a.moving().keys()  # nothing twice, though this head is tied to the embedding
    train(a, text())
    b.load_state_dict({name: value.clone() for name, value in a.state_dict().items()})
    assert all(torch.equal(x, y) for x, y in zip(a.moving().values(), b.moving().values(), strict=True))
    with pytest.raises(InputError, match="other parameters"):
        b.load_state_dict({"nothing": torch.zeros(1)})


# -- in loops


def test_in_transformers_trainer(tmp_path):
    data = text(24)
    rows = [{name: value[i] for name, value in data.items()} for i in range(24)]
    tuned = attach(make(), lambda: [data], cache_features=True, task_dropout=0.0)
    own = attach(make(), lambda: [data], task_dropout=0.0)
    before = {name: value.clone() for name, value in tuned.base_model.state_dict().items()}
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.01), lr=1e-3)
    seen = []
    tuned.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given) if module.training else None, with_kwargs=True
    )
    trainer = Trainer(
        model=tuned.model,
        args=args,
        train_dataset=rows,
        callbacks=[TuningCallback(tuned)],
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in tuned.base_model.state_dict().items())
    # The same micro-batches by hand: a mean over each, halved, two to a step.
    assert len(seen) == 12
    optimizer = torch.optim.AdamW(own.parameter_groups(0.01), lr=1e-3)
    own.model.train()
    for i, given in enumerate(seen):
        (own.model(**{name: given[name] for name in data}).loss / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    for name, value in own.state_dict().items():
        torch.testing.assert_close(tuned.state_dict()[name], value, rtol=0, atol=1e-5)
    predicted = trainer.predict(rows)
    tuned.model.eval()
    assert predicted.predictions.shape == (24, 3)
    np.testing.assert_allclose(predicted.predictions, tuned.model(**data).logits.detach().numpy(), atol=1e-5)


def test_the_house_loop_and_a_recipe_refuse_it_for_tokens():
    tuned = attach(make("llama"))
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}]
    with pytest.raises(InputError, match="predicts one label per row"):
        Loop(tuned, Sft(), TrainSettings(), rows)  # type: ignore[arg-type]
    recipe = {"name": "a", "data": {"source": "x.jsonl"}, "model": {"base": "b"}, "tune": {"method": "levi"}}
    with pytest.raises(InputError, match=r"tune: .*'levi' predicts one label per row, .* classification") as caught:
        load_recipe(recipe)
    assert "more)" not in str(caught.value)


# -- what is refused


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"layers": (7,)}, "layer 7 is asked for, but the model's layers are 1 to 6"),
        ({"task_model": f"{__name__}:Shapeless"}, "no fixed output width"),
        ({"task_model": f"{__name__}:Gone"}, "cannot be imported"),
        ({"task_model": "cnn"}, "takes none"),
        ({"task_width": 10}, "multiple of 4"),
        ({"backbone": "lora", "lora": {"targets": ["q_prj"]}}, "matches no module"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(settings, phrase):
    model = make()
    with pytest.raises(InputError, match=phrase):
        attach(model, **settings)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"layers": (0, 1)}, "different numbers from 1"),
        ({"layers": (1, 1)}, "different numbers from 1"),
        ({"cache_features": True, "backbone": "lora"}, "needs backbone: frozen"),
        ({"cache_features": "float16", "backbone": "full"}, "needs backbone: frozen"),
        ({"cache_folder": "here"}, "cache_features is off"),
        ({"lora": {"rank": 4}}, "backbone is frozen"),
        ({"lora": {"rank": 0}, "backbone": "lora"}, "greater than or equal to 1"),
        ({"task_model": "convnet"}, "task_model is one of"),
        ({"beta": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_are_checked(settings, phrase):
    with pytest.raises(ValueError, match=phrase):
        Levi(**settings)


def test_rows_and_labels_are_checked():
    tuned, batch = attach(), text(3)
    empty = {**batch, "attention_mask": torch.tensor([[1] * 7, [0] * 7, [1] * 7])}
    for call in (lambda: tuned.model(**empty), lambda: pool(torch.zeros(3, 7, 2), empty["attention_mask"], "mean")):
        with pytest.raises(InputError, match="row 1 of the batch is all padding"):
            call()
    with pytest.raises(InputError, match=r"generative objective"):
        tuned.model(**{**batch, "labels": batch["input_ids"]})
    with pytest.raises(InputError, match="outside the classes 0 to 2"):
        tuned.model(**{**batch, "labels": torch.tensor([0, 1, 3])})
    with pytest.raises(InputError, match="made for classes"):
        tuned.model(**{**batch, "labels": torch.rand(3)})
    with pytest.raises(InputError, match="nothing tells what"):
        attach(num_classes=None)
    with pytest.raises(InputError, match="cannot be folded"):
        tuned.merged()
    with pytest.raises(InputError, match="no cache to fill"):
        tuned.fill([batch])


@pytest.mark.parametrize(
    ("labels", "classes", "phrase"),
    [
        (torch.tensor([-100, 1]), None, "label -100 is no class"),
        (torch.tensor([0, 0]), None, "two classes at least"),
        (torch.tensor([0, 5]), 3, "expected num_classes 3"),
        (torch.rand(2), 3, "labels are floats"),
        (torch.ones(2), None, "same number"),
        (torch.zeros(2, 3).long(), None, "one label per row"),
    ],
)
def test_the_task_is_told_by_labels_or_refused(labels, classes, phrase):
    with pytest.raises(InputError, match=phrase):
        Target.of([{"labels": labels}], classes)


def test_a_model_without_blocks_and_one_with_an_adapter_are_refused():
    with pytest.raises(InputError, match="no list of blocks"):
        Topology.of(nn.Sequential(nn.Linear(2, 2)))
    adapted = attach(make(), backbone="lora").model.backbone
    with pytest.raises(InputError, match="plain model"):
        attach(adapted, backbone="lora")


def test_the_input_batch_is_left_as_it_was():
    batch = text()
    kept = {name: value.clone() for name, value in batch.items()}
    train(attach(), batch, 2)
    assert all(torch.equal(batch[name], kept[name]) for name in batch)
