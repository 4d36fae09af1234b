"""CoACT's parts: teacher, classifier of prototypes, stream of sessions, accuracies, settings."""

import csv
import io
import json

import pytest
import torch
from tests.tune.coact_world import SMALL, UPPER, bits, make, same, vit, world

import luthier as lt
from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.pipeline.recipe import load_recipe
from luthier.train.sessions import SessionRun
from luthier.tune.base import Probe
from luthier.tune.coact import Coact
from luthier.tune.sessions import Accuracies, SessionStream, take, word
from luthier.tune.teacher import EMATeacher, PrototypeClassifier


class TestTeacher:
    def attach(self, **changes):
        settings = Coact.model_validate({**SMALL, "classes": 7, "unfreeze": None, **changes})
        model = vit()
        return settings.attach(model, Probe(Topology.of(model)))

    def test_equals_the_plain_encoder_bit_for_bit(self):
        tuned, plain = self.attach(), vit()
        assert same(bits(tuned.teacher.model), bits(plain)) and same(bits(tuned.pretrained), bits(plain))
        pictures = world()[0][:3]
        with torch.no_grad():
            a, b = tuned.teacher(pixel_values=pictures), plain(pixel_values=pictures)
        assert torch.equal(a.pooler_output, b.pooler_output)

    @pytest.mark.parametrize("ema", [0.0, 0.5, 0.999])
    def test_while_only_the_adapter_moves_it_stays_the_pretrained_one_to_the_last_bit(self, ema):
        run = make({"ema": ema, "epochs_base": 20})
        run.run()
        assert same(bits(run.tuned.teacher.model), bits(vit()))
        assert any(not torch.equal(run.tuned.model.get_parameter(n), p) for n, p in self.attach().moving().items())

    def test_with_ema_1_it_never_changes(self):
        run = make({"ema": 1.0, "unfreeze": UPPER})
        run.run()
        assert same(bits(run.tuned.teacher.model), bits(vit()))
        assert not same({n: run.tuned.model.get_parameter(m) for n, m in run.tuned.late.items()}, bits(vit()))

    def test_follows_the_base_weights_by_their_plain_names(self):
        """The oracle: the moving average by hand, names mapped by hand."""
        tuned = self.attach(unfreeze={"epoch": 0, "layer": -1})
        assert set(tuned.late) == {name for name, _ in vit().named_parameters()}
        before = bits(tuned.teacher.model)
        with torch.no_grad():
            for parameter in tuned.model.encoder.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        tuned.teacher.update(tuned.model.encoder, 0.75)
        q = "layers.1.attention.q_proj.weight"
        wrapped = tuned.model.encoder.base_model.model.layers[1].attention.q_proj.base_layer.weight.detach()
        torch.testing.assert_close(tuned.teacher.model.get_parameter(q), 0.75 * before[q] + 0.25 * wrapped)
        assert not any("lora" in name for name, _ in tuned.teacher.named_parameters())

    def test_has_no_gradient_and_no_dropout(self):
        tuned = self.attach()
        tuned.teacher.train()
        assert not any(part.training for part in tuned.teacher.modules())
        assert not any(p.requires_grad for p in tuned.teacher.parameters())

    def test_refuses_a_momentum_outside_its_range_and_an_adapter_it_does_not_know(self):
        tuned = self.attach()
        with pytest.raises(InputError, match="from 0 to 1"):
            tuned.teacher.update(tuned.model.encoder, 1.5)
        with pytest.raises(InputError, match="differ from its base's at"):
            EMATeacher(tuned.model.encoder, drop="vera")


class TestClassifier:
    def test_only_rows_of_the_new_classes_change_and_they_are_the_means(self):
        classifier = PrototypeClassifier(4, 6)
        before = classifier.weight.detach().clone()
        draw = torch.Generator().manual_seed(0)
        features, labels = torch.randn(12, 4, generator=draw), torch.arange(12) % 4
        classifier.imprint(zip(features.split(5), labels.split(5), strict=True), {1, 3})
        for row in (0, 2, 4, 5):
            assert torch.equal(classifier.weight[row], before[row])
        for row in (1, 3):
            torch.testing.assert_close(classifier.weight[row].detach(), features[row::4].mean(0))

    @pytest.mark.parametrize(("classes", "phrase"), [({2}, "no example"), ({0, 9}, "no row")])
    def test_refuses_what_it_cannot_imprint(self, classes, phrase):
        classifier = PrototypeClassifier(4, 6)
        with pytest.raises(InputError, match=phrase):
            classifier.imprint([(torch.ones(2, 4), torch.tensor([0, 9]))], classes)


class TestStream:
    def test_each_class_comes_once_with_its_shots_and_none_is_shown_twice(self):
        _, labels = data = world()
        stream = SessionStream(data, 3, 2, 4, seed=5)
        assert [list(s.classes) for s in stream.sessions] == [[0, 1, 2], [3, 4], [5, 6]] and stream.findings() == []
        shown = torch.cat([s.train for s in stream.sessions])
        assert len(shown.unique()) == len(shown) == 28
        for session in stream.sessions:
            assert labels[session.train].bincount().tolist()[session.classes.start :] == [4] * len(session.classes)

    def test_the_draw_depends_on_seed_and_class_alone(self):
        data = world()
        first, again, other = (SessionStream(data, 3, 2, 4, seed) for seed in (1, 1, 2))
        assert first.facts() == again.facts() != other.facts()
        moved = SessionStream.of(data, [[4, 0], [2]], 4, 1)
        assert torch.equal(moved[0].train[4:], first[0].train[:4])  # class 0
        assert torch.equal(moved[1].train, first[0].train[8:])  # class 2

    def test_labels_may_be_any_numbers_and_keep_their_names(self):
        pictures, labels = world()
        stream = SessionStream.of((pictures, labels * 10 - 20), [[40, -20], [0]], 2)
        assert stream.names == [40, -20, 0] and stream.classes == 3
        assert set(stream.rows_of(torch.tensor([40, -20, 0, 7])).tolist()) == {0, 1, 2, -1}

    def test_a_smaller_last_session_is_reported(self):
        stream = SessionStream(world(), 4, 2, 4)
        assert [len(s.classes) for s in stream.sessions] == [4, 2, 1]
        assert [(f.code, f.value, f.limit) for f in stream.findings()] == [("tune.last_session_smaller", 1, 2)]

    def test_base_classes_may_have_more_examples(self):
        assert len(SessionStream(world(), 3, 2, 4, base_shots="all")[0].train) == 24
        assert len(SessionStream(world(), 3, 2, 4, base_shots=6)[0].train) == 18

    @pytest.mark.parametrize(
        ("build", "phrase"),
        [
            (lambda: SessionStream(world(), 3, 2, 9), "class 0 has 8 examples, and 9"),
            (lambda: SessionStream(world(), 8, 2, 4), "8 base classes are asked for, and the data hold 7"),
            (lambda: SessionStream(world(), 3, 0, 4), "way: expected a whole number"),
            (lambda: SessionStream.of(world(), [[0, 1], [1]], 4), "class 1 appears in two sessions"),
            (lambda: SessionStream.of(world(), [[0, 0]], 4), "class 0 appears in two sessions"),
            (lambda: SessionStream.of(world(), [[0], []], 4), "without a class"),
            (lambda: SessionStream.of(world(), [[0], [70]], 4), "class 70 has 0 examples"),
            (lambda: SessionStream((world()[0], world()[1][:5]), 3, 2, 4), "as many labels"),
        ],
    )
    def test_what_cannot_be_is_refused(self, build, phrase):
        with pytest.raises(InputError, match=phrase):
            build()


class TestAccuracies:
    FOUND = Accuracies([[0, 1], [2], [3]], [10, 5, 4], [[9], [6, 5], [7, 2, 4]])

    def test_by_hand(self):
        found = self.FOUND
        assert found.matrix() == [[0.9], [0.6, 1.0], [0.7, 0.4, 1.0]]
        assert [found.base(s) for s in range(3)] == [0.9, 0.6, 0.7]
        assert [found.incremental(s) for s in range(3)] == [None, 1.0, 6 / 9]
        assert [found.seen(s) for s in range(3)] == [0.9, 11 / 15, 13 / 19]
        assert found.average() == pytest.approx((0.9 + 11 / 15 + 13 / 19) / 3)
        assert [found.forgetting(g) for g in range(3)] == pytest.approx([0.2, 0.6, 0.0])

    def test_written_and_read(self, tmp_path):
        self.FOUND.write(tmp_path)
        assert Accuracies.read(tmp_path) == self.FOUND
        table = list(csv.DictReader(io.StringIO((tmp_path / "accuracy.csv").read_text())))
        assert [float(row["seen"]) for row in table] == pytest.approx([0.9, 11 / 15, 13 / 19])
        assert table[0]["group_1"] == "" and float(table[2]["group_1"]) == 0.4
        assert json.loads((tmp_path / "accuracy.json").read_text())["matrix"][2] == [0.7, 0.4, 1.0]


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"unfreeze": {"layer": 3}}, "3 blocks, counted from 0, and none is 3"),
        ({"lora": {"blocks": 4}}, "the encoder has 3 blocks, not 4"),
        ({"lora": {"targets": ["querry"]}}, "'querry' matches no linear"),
        ({"way": 3}, "tune.way: the settings say 3, and the stream brings 2"),
        ({"base_classes": 2}, "tune.base_classes: the settings say 2"),
        ({"classes": 9}, "tune.classes: the settings say 9, and the stream brings 7"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, phrase):
    with pytest.raises(InputError, match=phrase):
        make(changes)


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"views": 1}, "teacher: false"),
        ({"unfreeze": {"epoch": 3}}, "not reached in 3 epochs"),
        ({"base_shots": 0}, "base_shots must be"),
        ({"shots": 1, "select": "heldout"}, "two or more"),
        ({"classes": 2}, "fewer than base_classes"),
        ({"ema": 1.1}, "less than or equal to 1"),
        ({"rank": 3}, "(?i)extra"),
    ],
)
def test_ranges_are_checked(changes, phrase):
    with pytest.raises(ValueError, match=phrase):
        Coact.model_validate({**SMALL, "unfreeze": None, **changes})


def test_a_later_session_before_the_first_has_ended_is_refused():
    with pytest.raises(InputError, match="session 0 has not ended"):
        make().tuned.open(1)


def test_a_session_without_test_examples_is_refused():
    pictures, labels = world(1)
    with pytest.raises(InputError, match=r"no test example of the classes \[5, 6\]"):
        SessionRun(
            Coact.model_validate({**SMALL, "unfreeze": None}),
            vit(),
            SessionStream(world(), 3, 2, 4),
            (pictures[labels < 5], labels[labels < 5]),
        )


def test_recipes_and_fit_say_that_they_cannot_drive_sessions():
    recipe = {"name": "a", "data": {"source": "a.jsonl"}, "model": {"base": "b"}, "tune": {"method": "coact", **SMALL}}
    with pytest.raises(
        InputError, match=r"sessions of labelled pictures, which a recipe cannot drive yet; use luthier"
    ):
        load_recipe(recipe)
    with pytest.raises(InputError, match="adds classes in sessions, not from rows"):
        lt.fit(vit(), None, [], tuning={"method": "coact", **SMALL, "unfreeze": None})


def test_helpers():
    inputs = {"a": torch.arange(4), "b": torch.arange(8).view(4, 2)}
    taken = take(inputs, torch.tensor([2, 0]))
    assert taken["a"].tolist() == [2, 0] and taken["b"].tolist() == [[4, 5], [0, 1]]
    assert word(1, 2) == word(1, 2) != word(2, 1) and 0 <= word(0) < 2**63
