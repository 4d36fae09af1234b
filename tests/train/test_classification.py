"""`lt.fit` with `classification`: it equals plain torch, and every selective tuning leaves the rest alone."""

import copy

import numpy as np
import pytest
import torch

import luthier as lt
from classifiers import bert, case, picture_rows, text_rows, tokenizer, vit
from luthier.errors import InputError
from luthier.models.topology import Topology

KINDS = ("vit", "bert")
PLAIN = {
    "learning_rate": 1e-2,
    "max_steps": 3,
    "effective_batch_size": 24,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
}


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tokens", [50, 100_000])
@pytest.mark.parametrize("kind", KINDS)
def test_full_tuning_equals_a_loop_of_plain_torch(kind, tokens):
    """However a step is cut: transformers' own mean loss over all rows, clipping, SGD (in which sums in another order
    stay in the last digits; AdamW divides by moments that may be as small as they)."""
    model, reads, rows, batch = case(kind)
    plain, model_before = copy.deepcopy(model).train(), copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = plain(**batch).loss
        losses.append(float(loss.detach()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    own = {"max_tokens_per_device": tokens, "optim": "sgd", "learning_rate": 0.3}
    tuned, records = lt.fit(model, reads, rows, "full", "classification", PLAIN | own)
    assert [record.loss for record in records] == pytest.approx(losses, abs=1e-5)
    before = weights(model_before)
    for name, value in weights(plain).items():
        torch.testing.assert_close(tuned.model.state_dict()[name], value, rtol=0, atol=1e-5)
    assert max(float((value - before[name]).abs().max()) for name, value in weights(plain).items()) > 1e-2


SELECTIVE = {
    "lift": {"density": 0.1, "filter_rank": 4, "interval": 2},
    "sara": {"density": 0.1},
    "lt_sft": {"density": 0.1, "select": "random", "iterations": 1},
    "hft": {},
    "lisa": {"active_layers": 1},
    "greentrainer": {"rho": 0.6},
    "cofitune": {},
    "lora": {"rank": 2},
    "dsee": {"r": 2},
    "mask_tuning": {},
}


def may_move(name, tuned, key):
    """A mask, or one truth for the whole tensor: which of its entries the tuning is entitled to move."""
    if name in ("lift", "sara", "lt_sft"):
        return tuned.ever().mask(key) if key in tuned.ever() else key in tuned.moving()  # lt_sft: a whole head
    if name in ("hft", "cofitune"):
        return key in tuned.moving()
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SELECTIVE)
def test_what_a_selective_tuning_does_not_choose_rests_to_the_last_bit(name, kind):
    model, reads, rows, _ = case(kind)
    base, topology = weights(model), Topology.of(model)
    settings = {"method": name, **SELECTIVE[name]}
    if name == "cofitune":
        settings |= {"modules": ["fc1", "fc2"] if kind == "vit" else ["intermediate"]}
    tuned, records = lt.fit(model, reads, rows, settings, "classification", {**PLAIN, "max_steps": 4})
    assert len(records) == 4 and all(np.isfinite(record.loss) for record in records)
    assert "accuracy" in records[-1].metrics
    if name in ("lora", "dsee"):
        inside = {key.replace(".base_layer", ""): value for key, value in weights(tuned.base_model).items()}
        same = [key for key in base if key in inside and torch.equal(inside[key], base[key])]
        blocks = [key for key in base if topology.region(key)[1] is not None]
        assert set(blocks) <= set(same)
        return
    after = weights(tuned.model)
    if name == "mask_tuning":
        model = tuned.merged()
        for key, value in weights(model).items():
            assert torch.all((value == base[key]) | (value == 0)), key
        return
    changed = {key for key, value in after.items() if not torch.equal(value, base[key])}
    assert changed
    if name == "lisa":  # one block at a time, for 20 steps
        assert len({topology.region(key)[1] for key in changed} - {None}) == 1
        return
    if name == "greentrainer":
        assert changed < {key for key, _ in tuned.model.named_parameters()}
        return
    for key in changed:
        allowed = may_move(name, tuned, key)
        assert allowed is not False, key
        if allowed is not True:
            assert not ((after[key] != base[key]) & ~allowed).any(), key
    assert any(may_move(name, tuned, key) is not True for key in base)


@pytest.mark.parametrize("kind", KINDS)
def test_levi_learns_by_its_own_loss(kind):
    """The first step's loss is what the ensemble itself says of the same rows (no dropout)."""
    model, reads, rows, batch = case(kind)
    settings = {"method": "levi", "num_layers": 2, "task_dropout": 0.0, "beta": 0.5}
    one = {**PLAIN, "max_steps": 1, "learning_rate": 1e-12}
    tuned, records = lt.fit(model, reads, rows, settings, "classification", one)
    with torch.no_grad():
        assert records[0].loss == pytest.approx(float(tuned.model(**batch).loss), abs=1e-5)
    assert tuned.model.config.id2label == {0: "0", 1: "1", 2: "2"}
    _, records = lt.fit(case(kind)[0], reads, rows, settings, "classification", {**PLAIN, "max_steps": 40})
    assert records[-1].loss < records[0].loss / 2


def test_masks_are_held_back_by_the_base():
    """Gradient dropout gets its second loss: at the start the model says what the base does, so it is its entropy."""
    model, reads, rows, batch = case("vit")
    with torch.no_grad():
        p = copy.deepcopy(model)(**batch).logits.softmax(-1)
    _, records = lt.fit(model, reads, rows, "mask_tuning", "classification", {**PLAIN, "max_steps": 1})
    assert records[0].metrics["anchor_loss"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), abs=1e-5)


def test_labels_without_names_get_those_of_the_classes():
    rows = [{**row, "label": "abc"[row["label"]]} for row in text_rows()]
    tuned, _ = lt.fit(bert(), tokenizer(), rows, "full", "classification", PLAIN)
    assert tuned.model.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_head_that_knows_the_classes_keeps_its_numbers():
    model = bert()
    model.config.id2label, model.config.label2id = {0: "c", 1: "a", 2: "b"}, {"c": 0, "a": 1, "b": 2}
    rows = [{**row, "label": "abc"[row["label"]]} for row in text_rows()]
    _, (record,) = lt.fit(model, tokenizer(), rows, "full", "classification", {**PLAIN, "max_steps": 1})
    batch = case("bert")[3]
    batch["labels"] = (batch["labels"] + 1) % 3
    assert record.loss == pytest.approx(float(bert()(**batch).loss.detach()), abs=1e-5)


class TestRefuses:
    def test_other_classes_than_the_head_s(self):
        with pytest.raises(InputError, match=r"3 classes .* head is one for LABEL_0.*num_labels=3"):
            lt.fit(vit(labels=2), None, picture_rows(), "full", "classification")

    def test_pictures_of_another_size(self):
        rows = [{"image": np.zeros((8, 9), dtype=np.uint8), "label": n} for n in range(3)]
        with pytest.raises(InputError, match="row 1: the picture is 9 by 8 pixels, and the model takes 8 by 8"):
            lt.fit(vit(), None, rows, "full", "classification")

    def test_pictures_of_fractions(self):
        with pytest.raises(InputError, match=r"array .* of 0 to 255"):
            lt.fit(vit(), None, [{"image": np.zeros((8, 8)), "label": 0}], "full", "classification")

    def test_rows_of_the_other_kind(self):
        with pytest.raises(InputError, match="the rows hold texts, and the model reads pictures"):
            lt.fit(vit(), None, text_rows(), "full", "classification")
        with pytest.raises(InputError, match="the rows hold pictures, and the model reads texts"):
            lt.fit(bert(), tokenizer(), picture_rows(), "full", "classification")

    def test_rows_without_a_class(self):
        with pytest.raises(InputError, match="row 2: the row has no label"):
            lt.fit(bert(), tokenizer(), [text_rows()[0], {"text": "w1"}], "full", "classification")

    def test_one_class(self):
        with pytest.raises(InputError, match="1 class, and a classifier needs two"):
            lt.fit(bert(), tokenizer(), [{"text": "w1", "label": 1}], "full", "classification")

    def test_levi_for_tokens(self):
        with pytest.raises(InputError, match="'levi' predicts one label per row, and sft learns tokens"):
            lt.fit(bert(), tokenizer(), [{"text": "w1 w2"}], "levi")

    def test_a_copilot(self):
        with pytest.raises(InputError, match="Copilot learns from tokens"):
            lt.fit(bert(), tokenizer(), text_rows(), "full", "classification", {**PLAIN, "copilot": {}})
