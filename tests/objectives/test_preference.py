"""Laws of the preference losses: their numbers, one table of laws on a model, settings that are refused."""

import math

import pytest
import torch
from tests.objectives.preference_pairs import ALL, REFERENCED, batch_of, example, gradient, model, objective, pairs

from luthier.data.collate import pack_batch, pad_batch
from luthier.errors import InputError
from luthier.methods import build
from luthier.objectives.cpo import cpo
from luthier.objectives.dpo import dpo
from luthier.objectives.hinge import hinge
from luthier.objectives.ipo import ipo
from luthier.objectives.kto import Kto, kto, mismatched
from luthier.objectives.orpo import log1mexp
from luthier.objectives.robust import robust
from luthier.objectives.simpo import simpo

# Numbers


def vectors(seed=0, n=64):
    draw = torch.Generator().manual_seed(seed)
    lp_w, lp_l, rp_w, rp_l = (-10 * torch.rand(n, generator=draw, dtype=torch.float64) for _ in range(4))
    n_w, n_l = (torch.randint(1, 9, (n,), generator=draw).double() for _ in range(2))
    return lp_w, lp_l, rp_w, rp_l, n_w, n_l


def test_the_numbers_of_the_specification():
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    given = (one, zero, zero, zero)
    assert dpo(*given, beta=0.5, label_smoothing=0).item() == pytest.approx(0.474077, abs=1e-6)
    assert dpo(*given, beta=0.5, label_smoothing=0.1).item() == pytest.approx(0.524077, abs=1e-6)
    assert robust(*given, beta=0.5, label_smoothing=0.1).item() == pytest.approx(0.411577, abs=1e-6)
    assert hinge(*given, beta=0.5).item() == pytest.approx(0.5)
    assert ipo(*given, 2 * one, one, beta=0.5, length_normalised=True).item() == pytest.approx(0.25)


def test_a_model_that_is_its_reference():
    lp_w, lp_l, _, _, n_w, n_l = vectors()
    given = (lp_w, lp_l, lp_w, lp_l)
    assert torch.allclose(dpo(*given, beta=0.1, label_smoothing=0), torch.full_like(lp_w, math.log(2)))
    assert torch.allclose(hinge(*given, beta=0.1), torch.ones_like(lp_w))
    assert torch.allclose(ipo(*given, n_w, n_l, beta=0.1, length_normalised=True), torch.full_like(lp_w, 25.0))
    desirable = torch.arange(len(lp_w)) % 2 == 0
    each = kto(lp_w, lp_w, desirable, torch.tensor(0.0), beta=0.1, desirable_weight=1, undesirable_weight=1)
    assert torch.allclose(each, torch.full_like(lp_w, 0.5))


def test_the_gradient_of_dpo():
    lp_w, lp_l, rp_w, rp_l, _, _ = vectors()
    lp_w.requires_grad_()
    dpo(lp_w, lp_l, rp_w, rp_l, beta=0.3, label_smoothing=0).sum().backward()
    d = 0.3 * ((lp_w - rp_w) - (lp_l - rp_l)).detach()
    assert torch.allclose(lp_w.grad, -0.3 * torch.sigmoid(-d))


def test_a_common_shift_of_model_and_reference_changes_nothing():
    lp_w, lp_l, rp_w, rp_l, n_w, n_l = vectors()
    shift = torch.linspace(-3, 3, len(lp_w), dtype=torch.float64)
    moved = (lp_w + shift, lp_l - 2 * shift, rp_w + shift, rp_l - 2 * shift)
    plain = (lp_w, lp_l, rp_w, rp_l)
    assert torch.allclose(dpo(*plain, beta=0.2, label_smoothing=0.1), dpo(*moved, beta=0.2, label_smoothing=0.1))
    assert torch.allclose(robust(*plain, beta=0.2, label_smoothing=0.1), robust(*moved, beta=0.2, label_smoothing=0.1))
    assert torch.allclose(hinge(*plain, beta=0.2), hinge(*moved, beta=0.2))
    for normalised in (True, False):
        a, b = (ipo(*v, n_w, n_l, beta=0.2, length_normalised=normalised) for v in (plain, moved))
        assert torch.allclose(a, b)
    settings = {"beta": 0.2, "desirable_weight": 1.0, "undesirable_weight": 2.0}
    liked, z0 = torch.arange(len(lp_w)) % 3 == 0, torch.tensor(0.3)
    assert torch.allclose(kto(lp_w, rp_w, liked, z0, **settings), kto(moved[0], moved[2], liked, z0, **settings))


def test_how_the_methods_are_each_others_limits():
    lp_w, lp_l, rp_w, rp_l, _, _ = vectors()
    flat = torch.full_like(lp_w, -4.0)
    assert torch.allclose(
        cpo(lp_w, lp_l, beta=0.1, label_smoothing=0.1), dpo(lp_w, lp_l, flat, flat, beta=0.1, label_smoothing=0.1)
    )
    n = torch.full_like(lp_w, 5.0)
    assert torch.allclose(
        simpo(lp_w, lp_l, n, n, beta=2.0, gamma=0.0), cpo(lp_w, lp_l, beta=2.0 / 5, label_smoothing=0)
    )
    a, b = (dpo(*v, beta=0.1, label_smoothing=0.5) for v in ((lp_w, lp_l, rp_w, rp_l), (lp_l, lp_w, rp_l, rp_w)))
    assert torch.allclose(a, b)
    eps = 0.2  # in expectation over exchanged labels, robust is the loss of the true ones
    right = robust(lp_w, lp_l, rp_w, rp_l, beta=0.1, label_smoothing=eps)
    wrong = robust(lp_l, lp_w, rp_l, rp_w, beta=0.1, label_smoothing=eps)
    clean = dpo(lp_w, lp_l, rp_w, rp_l, beta=0.1, label_smoothing=0)
    assert torch.allclose((1 - eps) * right + eps * wrong, clean)


def test_log1mexp_is_exact_at_both_ends():
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    for a in (-1e-6, -1e-3, -0.5, -0.6931, -0.6932, -1.0, -20.0, -40.0):
        truth = float((1 - Decimal(a).exp()).ln())
        assert log1mexp(torch.tensor(a, dtype=torch.float64)).item() == pytest.approx(truth, rel=1e-9)
    ends = torch.tensor([0.0, -1e-9, -500.0], requires_grad=True)
    log1mexp(ends).sum().backward()
    assert torch.isfinite(ends.grad).all()


# One table of laws over all preference objectives, on a model


@pytest.mark.parametrize("name", ALL)
def test_micro_batches_give_the_same_gradient(name):
    """Not kto's: its z0 is a mean over the micro-batch, so it is held at 0 here by a reference above the model."""
    net, reference, kind = model(), model(1), objective(name)
    data = pairs()
    whole = batch_of(data, kind, reference)
    if name == "kto":
        whole["mismatched_reference_logprobs"] += 100
    units = kind.units(whole)
    expected = gradient(kind.loss(net, whole).value(), net)
    for size in (2,) if name == "kto" else (1, 2):
        pieces = [batch_of(data[i : i + size], kind, reference) for i in range(0, 4, size)]
        for piece in pieces if name == "kto" else []:
            piece["mismatched_reference_logprobs"] += 100
        total = sum(kind.loss(net, piece).value(units) for piece in pieces)
        assert torch.allclose(gradient(total, net), expected, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_packing_and_padding_agree(name):
    net, reference, kind = model(), model(1), objective(name)
    padded, packed = (batch_of(pairs(), kind, reference, c) for c in (lambda rows: pad_batch(rows, 0), pack_batch))
    a, b = kind.loss(net, padded), kind.loss(net, packed)
    assert a.units == b.units == kind.units(packed)
    assert float(a.value()) == pytest.approx(float(b.value()), rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_exchanging_the_answers_negates_the_margin(name):
    net, reference, kind = model(), model(1), objective(name)
    data = pairs()
    there, back = (
        kind.loss(net, batch_of(d, kind, reference)).metrics for d in (data, [(lose, win) for win, lose in data])
    )
    assert there["rewards/margin"][0] == pytest.approx(-back["rewards/margin"][0])
    assert there["rewards/accuracy"][0] == 4 - back["rewards/accuracy"][0]


@pytest.mark.parametrize("name", ALL)
def test_a_micro_batch_without_labels_weighs_nothing(name):
    net, kind = model(), objective(name)
    empty = {"input_ids": [3, 4], "labels": [-100, -100]}
    made = batch_of([(empty, empty)], kind, model(1))
    loss = kind.loss(net, made)
    assert not any(loss.units.values()) and loss.units == kind.units(made)
    grads = gradient(loss.value(), net)
    assert float(loss.value()) == 0 and not grads.any()


@pytest.mark.parametrize("name", ALL)
def test_descent_prefers_the_chosen_answers(name):
    net, reference, kind = model(), model(), objective(name)
    made = batch_of(pairs(), kind, reference)
    before = kind.loss(net, made).metrics["rewards/margin"][0]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        kind.loss(net, made).value().backward()
        optimizer.step()
    assert kind.loss(net, made).metrics["rewards/margin"][0] > before


@pytest.mark.parametrize("name", ALL)
def test_credit_is_refused(name):
    with pytest.raises(InputError, match="no use for credit"):
        objective(name).loss(model(), batch_of(pairs(), objective(name), model(1)), credit=torch.ones(3))


@pytest.mark.parametrize("name", REFERENCED)
def test_a_missing_reference_is_named(name):
    kind = objective(name)
    made = batch_of(pairs(), kind, model(1))
    del made["reference_logprobs"]
    with pytest.raises(InputError, match="reference_logprobs"):
        kind.loss(model(), made)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "robust"},
        {"method": "robust", "label_smoothing": 0.0},
        {"method": "robust", "label_smoothing": 0.5},
        {"method": "dpo", "beta": 0},
        {"method": "dpo", "gamma": 1},
        {"method": "cpo", "reference": "model"},
        {"method": "kto", "reference": "cached"},
        {"method": "dpo", "reference": "adapter_off", "reference_model": "x"},
    ],
)
def test_settings_that_are_refused(settings):
    with pytest.raises(ValueError):
        build("objectives", settings)


def test_kto_takes_answers_to_other_prompts():
    a, b = example([1, 2], [7, 8]), example([3], [9])
    rows = [a, b, example([1, 2], [5]), example([3], [6, 6])]
    crossed = mismatched(rows)
    assert [row["input_ids"] for row in crossed] == [[1, 2, 6, 6], [3, 7, 8], [1, 2, 9], [3, 5]]
    assert crossed[0]["labels"] == [-100, -100, 6, 6]
    repeated = mismatched([a, example([1, 2], [4]), b])
    assert [row["input_ids"] for row in repeated] == [[1, 2, 9], [1, 2, 9], [3, 4]]
    with pytest.raises(InputError, match="one prompt only"):
        Kto().arrange([a, example([1, 2], [5])])


def test_a_pair_is_two_judged_answers_to_kto():
    net, reference, kind = model(), model(1), objective("kto", undesirable_weight=0.6)
    made = batch_of(pairs(), kind, reference)
    judged = made | {"desirable": torch.tensor([True] * 4 + [False] * 4)}
    one, other = kind.loss(net, made), kind.loss(net, judged)
    assert one.units == other.units == kind.units(judged)
    assert torch.equal(gradient(one.value(), net), gradient(other.value(), net))
    for name, value in other.metrics.items():
        assert value == pytest.approx(one.metrics[name])
    assert set(one.metrics) - set(other.metrics) == {"rewards/margin", "rewards/accuracy"}


def test_a_verdict_turned_round_turns_the_gradient():
    """At beta h = z0 the sigmoid is symmetric, so there a bad answer pulls exactly against a good one."""
    net, kind = model(), objective("kto")
    made = batch_of(pairs(count=2), kind, net)
    grads = [
        gradient(kind.loss(net, made | {"desirable": torch.tensor(flags)}).value(), net)
        for flags in ([True] * 4, [False] * 4)
    ]
    assert grads[0].any() and torch.allclose(grads[0], -grads[1], atol=1e-12)


def test_sft_passes_bad_answers_over():
    """Beside others in a batch the good ones give what they give alone; so does each mean over an answer's tokens."""
    net = model()
    good = [chosen for chosen, _ in pairs()]
    both = pad_batch(good + [rejected for _, rejected in pairs()], 0)
    for mark in ("chosen", "desirable"):
        marked = both | {mark: torch.tensor([True] * 4 + [False] * 4)}
        for normaliser in ("token", "sequence"):
            kind = build("objectives", {"method": "sft", "normaliser": normaliser})
            one, alone = kind.loss(net, marked), kind.loss(net, pad_batch(good, 0))
            assert one.units == alone.units == kind.units(marked)
            for name, value in alone.metrics.items():
                assert one.metrics[name] == pytest.approx(value)
            assert torch.allclose(gradient(one.value(), net), gradient(alone.value(), net), atol=1e-12)


def test_mismatched_rows_are_no_longer_than_the_data():
    rows = [example([1, 2, 3], [7]), example([4], [9, 9, 9])]
    assert [row["input_ids"] for row in mismatched(rows, 4)] == [[1, 2, 3, 9], [4, 7]]
    assert mismatched(rows, 4)[0]["labels"] == [-100, -100, -100, 9]
    assert len(mismatched(rows)[0]["input_ids"]) == 6
