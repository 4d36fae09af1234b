"""CoACT over sessions: what moves, what is kept, and the folder that it leaves."""

import copy
import math

import pytest
import torch
from tests.tune.coact_world import SHAPE, SMALL, UPPER, bits, make, pair_by_pair, same, vit, world
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

from luthier.errors import InputError
from luthier.objectives.contrastive import consistency
from luthier.train.sessions import SessionRun
from luthier.tune.coact import Coact, encoder_of, load
from luthier.tune.sessions import SessionStream, word


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
