"""Laws of the preference losses, and their equality with TRL on one batch, in value and gradient."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.data.collate import pack_batch, pad_batch
from luthier.errors import InputError
from luthier.methods import build
from luthier.objectives.cpo import cpo
from luthier.objectives.dpo import dpo
from luthier.objectives.hinge import hinge
from luthier.objectives.ipo import ipo
from luthier.objectives.kto import Kto, kto, mismatched
from luthier.objectives.orpo import Orpo, log1mexp
from luthier.objectives.preference import answer_logprobs
from luthier.objectives.robust import robust
from luthier.objectives.simpo import simpo

ALL = ["dpo", "robust", "hinge", "ipo", "kto", "cpo", "simpo", "orpo"]
REFERENCED = ["dpo", "robust", "hinge", "ipo", "kto"]


def objective(name, **settings):
    if name == "robust":
        settings.setdefault("label_smoothing", 0.1)
    return build("objectives", {"method": name, **settings})


def model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).double().eval()


def example(prompt, answer):
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def pairs(seed=0, count=4):
    """Pairs whose prompts and answers all differ in length."""
    draw = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(3, 32, (length,), generator=draw).tolist()

    found = []
    for n in range(count):
        prompt = ids(2 + n)
        found.append((example(prompt, ids(3 + n % 3)), example(prompt, ids(6 - n % 4))))
    return found


def batch_of(chosen_pairs, kind, reference=None, collate=lambda rows: pad_batch(rows, 0)):
    made = {}
    laid_out = [chosen for chosen, _ in chosen_pairs] + [rejected for _, rejected in chosen_pairs]
    for prefix, rows in kind.arrange(laid_out).items():
        made |= {prefix + name: tensor for name, tensor in collate(rows).items()}
    if reference is not None:
        with torch.no_grad():
            for prefix in kind.needs().referenced:
                own = {n: made[prefix + n] for n in ("input_ids", "labels", "position_ids") if prefix + n in made}
                made[f"{prefix}reference_logprobs"] = answer_logprobs(reference, own)
    return made


def gradient(value, net):
    net.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


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


# TRL


def preference_dataset():
    from datasets import Dataset

    words = [f"w{i}" for i in range(28)]
    draw = torch.Generator().manual_seed(0)

    def text(length):
        return [words[i] for i in torch.randint(0, 28, (length,), generator=draw).tolist()]

    rows = []
    for n in range(4):
        prompt = " ".join(text(2 + n))
        rows.append(
            {"prompt": prompt, "chosen": " " + " ".join(text(3 + n % 3)), "rejected": " " + " ".join(text(6 - n))}
        )
    return Dataset.from_list(rows)


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(28)} | {"<unk>": 31}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def moved(net, seed=5):
    """The policy, away from the reference."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def config_of(kind, tmp_path, **settings):
    return kind(
        output_dir=str(tmp_path),
        per_device_train_batch_size=settings.pop("rows", 4),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=settings.pop("remove_unused_columns", True),
        **settings,
    )


def examples_of(ids, answer, there):
    return [
        {
            "input_ids": i[t.bool()].tolist(),
            "labels": [int(x) if m else -100 for x, m in zip(i[t.bool()], a[t.bool()], strict=True)],
        }
        for i, a, t in zip(ids, answer, there, strict=True)
    ]


def agree(kind, data, theirs, trainer_model, reference):
    """`theirs`: TRL's loss with gradient on the same pairs."""
    expected_gradient = gradient(theirs, trainer_model)
    ours = kind.loss(trainer_model, batch_of(data, kind, reference)).value()
    assert float(ours) == pytest.approx(float(theirs), abs=1e-6, rel=1e-6)
    assert torch.allclose(gradient(ours, trainer_model), expected_gradient, atol=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [
        ("sigmoid", {"method": "dpo", "beta": 0.3}),
        ("hinge", {"method": "hinge", "beta": 0.3}),
        ("ipo", {"method": "ipo", "beta": 0.3}),
        ("robust", {"method": "robust", "beta": 0.3, "label_smoothing": 0.2}),
    ],
)
def test_the_losses_of_trls_dpo_trainer(loss_type, settings, tmp_path):
    from trl import DPOConfig, DPOTrainer

    net, reference = moved(model()), model()
    smoothing = settings.get("label_smoothing", 0.0)
    args = config_of(DPOConfig, tmp_path, loss_type=[loss_type], beta=0.3, label_smoothing=smoothing)
    trainer = DPOTrainer(
        model=net,
        ref_model=reference,
        args=args,
        train_dataset=preference_dataset(),
        processing_class=word_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    rows = examples_of(batch["input_ids"], batch["completion_mask"], batch["attention_mask"])
    theirs = trainer.compute_loss(trainer.model, batch)
    agree(build("objectives", settings), list(zip(rows[:4], rows[4:], strict=True)), theirs, trainer.model, reference)


def test_trls_kto_trainer(tmp_path):
    from trl import KTOConfig, KTOTrainer

    net, reference = moved(model()), model()
    args = config_of(KTOConfig, tmp_path, rows=8, beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    trainer = KTOTrainer(
        model=net,
        ref_model=reference,
        args=args,
        train_dataset=preference_dataset(),
        processing_class=word_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["label"].tolist() == [True] * 4 + [False] * 4
    rows = examples_of(batch["input_ids"], batch["completion_mask"], batch["attention_mask"])
    theirs = trainer.compute_loss(trainer.model, batch)
    kind = Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    agree(kind, list(zip(rows[:4], rows[4:], strict=True)), theirs, trainer.model, reference)


@pytest.mark.parametrize("good", [1, 3, 5])
def test_trls_kto_trainer_on_judged_answers(good, tmp_path):
    """Of an uneven number of good and bad answers, in the order in which our micro-batches stand: good ones first."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    net, reference = moved(model()), model()
    answers = [
        {"prompt": row["prompt"] + more, "completion": row[side]}
        for row in preference_dataset()
        for side, more in (("chosen", ""), ("rejected", " w1"))
    ]
    flags = [index < good for index in range(8)]
    data = Dataset.from_list([row | {"label": flag} for row, flag in zip(answers, flags, strict=True)])
    args = config_of(KTOConfig, tmp_path, rows=8, beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    trainer = KTOTrainer(
        model=net, ref_model=reference, args=args, train_dataset=data, processing_class=word_tokenizer()
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["label"].tolist() == flags
    rows = examples_of(batch["input_ids"], batch["completion_mask"], batch["attention_mask"])
    theirs = trainer.compute_loss(trainer.model, batch)
    expected = gradient(theirs, trainer.model)
    kind = Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    made = batch_of([(row, rows[i + 4]) for i, row in enumerate(rows[:4])], kind, reference)
    ours = kind.loss(trainer.model, made | {"desirable": torch.tensor(flags)}).value()
    assert float(ours) == pytest.approx(float(theirs), abs=1e-6, rel=1e-6)
    assert torch.allclose(gradient(ours, trainer.model), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "more", "settings"),
    [
        ("sigmoid", {"label_smoothing": 0.1}, {"method": "cpo", "beta": 0.3, "label_smoothing": 0.1}),
        ("sigmoid", {"cpo_alpha": 0.0}, {"method": "cpo", "beta": 0.3, "cpo_alpha": 0.0}),
        (
            "simpo",
            {"simpo_gamma": 0.4, "cpo_alpha": 0.5},
            {"method": "simpo", "beta": 0.3, "gamma": 0.4, "cpo_alpha": 0.5},
        ),
    ],
)
def test_the_losses_of_trls_cpo_trainer(loss_type, more, settings, tmp_path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    args = config_of(CPOConfig, tmp_path, loss_type=loss_type, beta=0.3, remove_unused_columns=False, **more)
    compare_with(CPOTrainer, args, build("objectives", settings))


def test_trls_orpo_trainer(tmp_path):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    args = config_of(ORPOConfig, tmp_path, beta=0.3, remove_unused_columns=False)
    compare_with(ORPOTrainer, args, Orpo(lam=0.3, nll_over="all"))


def compare_with(kind, args, ours):
    trainer = kind(
        model=moved(model()), args=args, train_dataset=preference_dataset(), processing_class=word_tokenizer()
    )
    batch = next(iter(trainer.get_train_dataloader()))
    sides = []
    for side in ("chosen", "rejected"):
        answer = (batch[f"{side}_labels"] != -100).long()
        sides.append(examples_of(batch[f"{side}_input_ids"], answer, batch[f"{side}_attention_mask"]))
    theirs = trainer.compute_loss(trainer.model, batch)
    agree(ours, list(zip(*sides, strict=True)), theirs, trainer.model, None)
