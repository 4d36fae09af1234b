"""LEVI: how members are averaged and judged, what the backbone keeps, task models, and what is refused."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.tune.levi_models import attach, images, inputs, make, net, text, train, vit
from torch import nn

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.tune import Levi
from luthier.tune.block_outputs import pool, to_front
from luthier.tune.layer_ensemble import Target, combined, ensemble_loss
from luthier.tune.side_models import SmallTransformer


class Shapeless(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()


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
