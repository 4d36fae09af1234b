"""Laws of CoACT: teacher, classifier, sessions, the loop over them, and what is refused."""

import copy
import csv
import io
import json
import math

import pytest
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification, ViTModel

import luthier as lt
from luthier.data.augment import chain, noisy, shifted
from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.objectives.contrastive import consistency
from luthier.pipeline.recipe import load_recipe
from luthier.train.sessions import SessionRun
from luthier.tune.base import Probe
from luthier.tune.coact import Coact, encoder_of, load
from luthier.tune.sessions import Accuracies, SessionStream, take, word
from luthier.tune.teacher import EMATeacher, PrototypeClassifier

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
SMALL = {"base_classes": 3, "way": 2, "shots": 4, "epochs_base": 3, "lr": 0.05, "lora": {"r": 2, "alpha": 2}}
UPPER = {"epoch": 1, "layer": 1, "lr_factor": 0.5}


def vit(seed=0, **more):
    torch.manual_seed(seed)
    return ViTModel(ViTConfig(image_size=6, patch_size=3, num_channels=1, **SHAPE), **more).eval()


def world(seed=0, each=8, classes=7):
    """Pictures that are a pattern per class with noise."""
    draw = torch.Generator().manual_seed(seed)
    patterns = torch.randn(classes, 1, 6, 6, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(classes).repeat_interleave(each)
    return patterns[labels] + 0.3 * torch.randn(len(labels), 1, 6, 6, generator=draw), labels


def make(changes=None, model=None, stream=None, seed=0, **more):
    settings = Coact.model_validate({**SMALL, "unfreeze": None, **(changes or {})})
    stream = stream or SessionStream(world(0), 3, 2, 4)
    look = chain(shifted(1), noisy(0.1))
    return SessionRun(settings, model or vit(), stream, world(1), augment=look, seed=seed, **more)


def bits(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def pair_by_pair(embeddings, labels, tau):
    """The contrastive loss over a list of (n, d) embeddings, one for each view."""
    z = [(e / e.norm(), int(y)) for view in embeddings for e, y in zip(view.double(), labels, strict=True)]
    total = 0.0
    for i, (anchor, label) in enumerate(z):
        others = [(float(anchor @ e) / tau, y) for j, (e, y) in enumerate(z) if j != i]
        below = math.log(sum(math.exp(s) for s, _ in others))
        total -= sum(s - below for s, y in others if y == label) / sum(y == label for _, y in others)
    return total / len(z)


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


class TestSessions:
    def test_only_classes_seen_are_answered(self):
        run = make({"epochs_base": 1})
        seen = {session: set(run.predict(world(1)[0]).tolist()) for session in run.sessions()}
        assert seen[0] <= {0, 1, 2} and seen[1] <= set(range(5))

    def test_session_0_with_cross_entropy_alone_is_a_plain_loop(self):
        """The oracle: imprint, SGD with Nesterov's momentum and a cosine per epoch, written by hand."""
        plain = {"weights": {"contrastive": 0}, "teacher": False, "views": 1, "batch_size": 5, "epochs_base": 4}
        settings = Coact.model_validate({**SMALL, **plain, "lora": {"r": 2, "dropout": 0}, "unfreeze": None})
        run = SessionRun(settings, vit(), SessionStream(world(), 3, 2, 4), world(1))
        model = copy.deepcopy(run.tuned.model).train()
        places, labels = run.stream[0].train, run.stream.labels
        with torch.no_grad():
            for row in range(3):
                own = world()[0][places[labels[places] == row]]
                model.classifier.weight[row] = model.encoder(pixel_values=own).pooler_output.mean(0)
        moving = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(moving, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
        for epoch in range(4):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * epoch / 4)) / 2
            order = torch.randperm(12, generator=torch.Generator().manual_seed(word(0, 1, 0, epoch)))
            for first in range(0, 12, 5):
                chosen = places[order[first : first + 5]]
                logits = model.encoder(pixel_values=world()[0][chosen]).pooler_output @ model.classifier.weight[:3].T
                torch.nn.functional.cross_entropy(logits, labels[chosen]).backward()
                optimizer.step()
                optimizer.zero_grad()
        next(run.sessions())
        start = bits(model)
        for name, value in run.tuned.model.named_parameters():
            torch.testing.assert_close(value.detach(), start[name], rtol=1e-4, atol=1e-5, msg=name)

    @pytest.mark.parametrize("session", [0, 1])
    def test_the_loss_of_a_session_is_the_sum_that_the_paper_has(self, session):
        """The oracle: logits and embeddings taken from the models by hand, the contrastive loss pair by pair."""
        changes = {"lora": {"r": 2, "dropout": 0.0}, "unfreeze": {"epoch": 0, "layer": -1}, "ema": 0.5, "views": 3}
        run = make({**changes, "weights": {"ce": 2, "contrastive": 0.5, "consistency": 3}})
        rounds = run.sessions()
        next(rounds), next(rounds)
        tuned, places, seen = run.tuned, run.stream[session].train, (3, 5)[session]
        labels = run.stream.labels[places]
        draw = torch.Generator().manual_seed(4)
        views = [run.augment(world()[0][places], draw) for _ in range(3)]
        with torch.no_grad():
            shown = [tuned.model.encoder(pixel_values=view).pooler_output for view in views[:2]]
            older = [tuned.teacher.model, tuned.pretrained][: session + 1]
            embeddings = [*shown, *(model(pixel_values=views[2]).pooler_output for model in older)]
            logits = shown[0] @ tuned.model.classifier.weight.T
            base = tuned.base.encoder(pixel_values=views[0]).pooler_output @ tuned.base.classifier.weight.T
            want = 2 * torch.nn.functional.cross_entropy(logits[:, :seen], labels)
            want += 0.5 * pair_by_pair(embeddings, labels, 0.07)
            if session:
                want += 3 * (logits[:, :3] - base[:, :3]).square().mean()
            found = run._loss(session, places, torch.Generator().manual_seed(4))
        assert float(found) == pytest.approx(float(want), rel=1e-4)

    def test_base_and_pretrained_models_never_change_in_later_sessions(self):
        run = make({"unfreeze": UPPER, "epochs_incremental": 3, "inc_lr_factor": 1.0, "ema": 0.5})
        rounds = run.sessions()
        next(rounds)
        kept = [run.tuned.base, run.tuned.pretrained, run.tuned.teacher]
        before, student = [bits(model) for model in kept], bits(run.tuned.model)
        for _ in rounds:
            assert all(same(bits(model), now) for model, now in zip(kept, before, strict=True))
            assert not any(part.training for model in kept for part in model.modules())
        after = bits(run.tuned.model)
        changed = {name for name, value in student.items() if not torch.equal(value, after[name])}
        assert changed == {*run.tuned.pet, *run.tuned.head}

    @pytest.mark.parametrize("parts", [("classifier",), ("pet",)])
    def test_only_what_may_move_later_moves(self, parts):
        run = make({"inc_trainable": parts, "epochs_incremental": 2, "inc_lr_factor": 1.0})
        rounds = run.sessions()
        next(rounds)
        student = bits(run.tuned.model)
        next(rounds)
        after = bits(run.tuned.model)
        changed = {name for name, value in student.items() if not torch.equal(value, after[name])}
        assert {"classifier.weight"} == changed if parts == ("classifier",) else set(run.tuned.pet) <= changed
        old = slice(0, 3)
        if parts == ("pet",):  # imprinted rows are the only ones that differ
            assert torch.equal(after["classifier.weight"][old], student["classifier.weight"][old])

    def test_without_epochs_later_sessions_are_prototypes_on_the_tuned_encoder(self):
        """The oracle: class means by hand on the encoder as session 0 left it."""
        run = make({"epochs_incremental": 0})
        rounds = run.sessions()
        next(rounds)
        first = run.tuned.model.classifier.weight.detach().clone()
        encoder = copy.deepcopy(run.tuned.model.encoder).eval()
        for _ in rounds:
            pass
        pictures, labels = run.stream.inputs, run.stream.labels
        with torch.no_grad():
            for session in run.stream.sessions[1:]:
                for row in session.classes:
                    own = session.train[labels[session.train] == row]
                    first[row] = encoder(pixel_values=pictures[own]).pooler_output.mean(0)
            logits = encoder(pixel_values=world(1)[0]).pooler_output @ first.T
        torch.testing.assert_close(run.tuned.model.classifier.weight.detach(), first, rtol=0, atol=1e-6)
        assert torch.equal(run.predict(world(1)[0]), logits.argmax(-1))

    def test_consistency_is_0_where_a_later_session_begins(self):
        run = make({"unfreeze": UPPER})
        next(run.sessions())
        run.tuned.open(1)
        run._imprint(run.stream[1].train, run.stream[1].classes)
        run.tuned.model.eval()
        with torch.no_grad():
            now, before = (model(pixel_values=world(1)[0])[0] for model in (run.tuned.model, run.tuned.base))
        assert float(consistency(now[:, :3], before[:, :3])) == 0.0
        assert float(consistency(now, before)) > 0  # the new rows

    def test_pretrained_layers_wait_for_their_epoch_and_lower_ones_for_ever(self):
        run = make({"unfreeze": UPPER, "epochs_base": 3, "batch_size": 6})  # two steps an epoch
        tuned, moved = run.tuned, []
        plain, hook = bits(vit()), tuned.on_step_end

        def on_step_end(step):
            hook(step)
            moved.append({n for n, m in tuned.late.items() if not torch.equal(tuned.model.get_parameter(m), plain[n])})

        tuned.on_step_end = on_step_end
        next(run.sessions())
        assert [bool(names) for names in moved] == [False, False, True, True, True, True]
        # Everything after the first parameter of block 1 in module order: blocks 1 and 2, the final norm, the pooler.
        upper = {n for n in plain if n.startswith(("layers.1.", "layers.2.", "layernorm.", "pooler."))}
        assert set(tuned.late) == upper and moved[-1] <= upper
        assert same({n: p for n, p in bits(tuned.base.encoder.unload()).items() if n not in upper},
                    {n: p for n, p in plain.items() if n not in upper})  # fmt: skip

    def test_groups_have_their_rates(self):
        run = make({"unfreeze": UPPER})
        groups = run.tuned.parameter_groups(5e-4)
        assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.05, 5e-4), (0.025, 5e-4)]
        assert len(groups[1]["params"]) == len(run.tuned.late)
        next(run.sessions())
        run.tuned.open(1)
        assert [g["lr"] for g in run.tuned.parameter_groups(0.0)] == [pytest.approx(0.0005)]

    def test_adapters_stand_on_query_and_value_of_the_first_blocks(self):
        run = make({"lora": {"r": 2, "alpha": 2, "blocks": 2}})
        layers = {name.split(".lora_")[0].rpartition("model.")[2] for name in run.tuned.pet}
        assert layers == {f"layers.{n}.attention.{p}_proj" for n in (0, 1) for p in "qv"}

    def test_one_seed_one_outcome_and_the_global_generator_is_left_alone(self):
        first = make()
        torch.manual_seed(5)
        state = torch.get_rng_state()
        first.run()
        assert torch.equal(torch.get_rng_state(), state)
        again, other = make(), make(seed=1)
        again.run(), other.run()
        assert same(bits(first.tuned.model), bits(again.tuned.model))
        assert not same(bits(first.tuned.model), bits(other.tuned.model))

    def test_the_best_epoch_is_chosen_on_examples_held_out(self):
        run = make({"select": "heldout", "epochs_base": 6, "shots": 4})
        shown, held = run._split(run.stream[0].train)
        assert len(held) == 3 and len(shown) == 9 and not set(shown.tolist()) & set(held.tolist())
        assert run.stream.labels[held].tolist() == [0, 1, 2]
        scores = []
        predict = run.predict

        def watch(inputs, session=None):
            answers = predict(inputs, session)
            if len(answers) == len(held):
                scores.append((float((answers == run.stream.labels[held]).float().mean()), bits(run.tuned.model)))
            return answers

        run.predict = watch
        next(run.sessions())
        assert len(scores) == 6
        best = max(scores, key=lambda s: s[0])  # the first of equals
        assert same(best[1], bits(run.tuned.model))

    def test_text_encoders_and_models_with_a_head(self):
        torch.manual_seed(0)
        bert = BertModel(BertConfig(vocab_size=30, **SHAPE))
        draw = torch.Generator().manual_seed(0)
        labels = torch.arange(5).repeat_interleave(6)
        ids = (labels[:, None] * 5 + torch.randint(1, 6, (30, 7), generator=draw)).clamp(max=29)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        settings = Coact.model_validate({**SMALL, "base_classes": 3, "way": 2, "unfreeze": UPPER})
        run = SessionRun(settings, bert, SessionStream((inputs, labels), 3, 2, 4), (inputs, labels))
        assert len(run.run().right) == 2
        headed = ViTForImageClassification(ViTConfig(image_size=6, patch_size=3, num_channels=1, **SHAPE))
        assert encoder_of(headed) is headed.vit
        assert len(make(model=headed).run().right) == 3

    def test_several_views_and_no_teacher(self):
        for changes in ({"views": 3}, {"teacher": False, "views": 1}, {"teacher": False}, {"logits_scope": "all"}):
            assert len(make({"epochs_base": 1, **changes}).run().right) == 3


class TestFolders:
    CHANGES = {"unfreeze": UPPER, "ema": 0.5, "epochs_incremental": 2, "inc_lr_factor": 0.5}  # noqa: RUF012

    @pytest.mark.parametrize("stop", [1, 2])
    def test_resumed_at_a_border_it_ends_with_the_same_bits(self, stop, tmp_path):
        whole = make(self.CHANGES)
        whole.run()
        broken = make(self.CHANGES, directory=tmp_path)
        rounds = broken.sessions()
        for _ in range(stop):
            next(rounds)
        again = make(self.CHANGES, directory=tmp_path)
        assert list(again.sessions()) == list(range(stop, 3))
        assert again.accuracies == whole.accuracies
        for part in ("model", "teacher", "base", "pretrained"):
            assert same(bits(getattr(again.tuned, part)), bits(getattr(whole.tuned, part))), part
        assert make(self.CHANGES, directory=tmp_path).run() == whole.accuracies  # nothing is left to do

    def test_what_a_session_leaves_loads_into_the_plain_model(self, tmp_path):
        run = make(self.CHANGES, directory=tmp_path)
        run.run()
        loaded = load(vit(), tmp_path / "session-02")
        pictures = world(1)[0]
        with torch.no_grad():
            expected = run.tuned.model(pixel_values=pictures)[0]
            assert torch.equal(loaded(pixel_values=pictures)[0], expected)
            merged = run.tuned.merged()(pixel_values=pictures)[0]
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
        names = {path.name for path in (tmp_path / "session-02").iterdir()}
        assert {"adapter_model.safetensors", "classifier.safetensors", "teacher.safetensors", "accuracy.csv"} <= names

    def test_another_run_is_refused(self, tmp_path):
        make(self.CHANGES, directory=tmp_path).run()
        others = {
            "settings": lambda: make({**self.CHANGES, "ema": 0.9}, directory=tmp_path),
            "seed": lambda: make(self.CHANGES, seed=3, directory=tmp_path),
            "stream": lambda: make(self.CHANGES, stream=SessionStream(world(), 3, 2, 4, seed=1), directory=tmp_path),
            "model": lambda: make(self.CHANGES, model=vit(1), directory=tmp_path),
        }
        for what, build in others.items():
            with pytest.raises(InputError, match=f"another {what}"):
                build().run()
        (tmp_path / "session-02" / "classifier.safetensors").write_bytes(b"")
        with pytest.raises(InputError, match="damaged"):
            make(self.CHANGES, directory=tmp_path).run()

    def test_state_comes_back_bit_for_bit(self):
        run, again = make(self.CHANGES), make(self.CHANGES)
        next(run.sessions())
        again.tuned.load_state_dict({name: value.clone() for name, value in run.tuned.state_dict().items()})
        assert same(bits(again.tuned.model), bits(run.tuned.model))
        assert same(bits(again.tuned.teacher), bits(run.tuned.teacher))
        with pytest.raises(InputError, match="other parameters"):
            again.tuned.load_state_dict({})


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
