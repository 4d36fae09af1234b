"""Preference objectives against TRL's trainers: the same losses on the same rows."""

import pytest
import torch
from tests.objectives.preference_pairs import batch_of, gradient, model

from luthier.methods import build
from luthier.objectives.kto import Kto
from luthier.objectives.orpo import Orpo


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
