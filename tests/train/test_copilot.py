"""Joint training of a Copilot: the Pilot is only watched, the log is small and right, and a resumed run is the same."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.train.test_loop import Examples, loop, weights

from luthier.data.roles import CHOSEN, REJECTED
from luthier.errors import GateError, InputError
from luthier.models.copilot import Copilot
from luthier.objectives.batch import labelled
from luthier.objectives.dpo import Dpo
from luthier.objectives.logprobs import token_logprobs
from luthier.train import Loop, TrainSettings
from luthier.train.copilot import token_losses
from luthier.train.mistake_log import MistakeLog, errors_of, record, watched
from luthier.worlds import tiny

COPILOT = {"copilot": {"layers": 2}}
VOCABULARY = 64


def copilot_of(made):
    return {name: value.clone() for name, value in made.companion.model.state_dict().items()}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])  # lora drops out, so a random number drawn beside it would show
def test_the_pilot_is_trained_as_without_to_the_last_bit(method, packing):
    plain = loop(method=method, packing=packing)
    before = plain.run()
    beside = loop(method=method, train=COPILOT, packing=packing)
    after = beside.run()
    assert [(r.loss, r.grad_norm) for r in before] == [(r.loss, r.grad_norm) for r in after]
    theirs = weights(beside)
    assert all(torch.equal(theirs[name], value) for name, value in weights(plain).items())
    assert not any(isinstance(part, Copilot) for part in beside.tuned.model.modules())
    assert not beside.tuned.model._forward_hooks and not beside.tuned.model._forward_pre_hooks


def test_the_copilot_learns_what_can_be_learnt():
    """A Pilot that cannot move learns nothing, so its errors on rows seen often are the same every time."""
    train = {"learning_rate": 1e-9, "num_train_epochs": 60, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    train |= {"copilot": {"layers": 2, "include_current": True, "learning_rate": 5e-3}}
    records = loop(train=train, examples=Examples(8)).run()
    assert records[0].metrics["copilot_loss"] == pytest.approx(records[0].metrics["copilot_zero_loss"], rel=1e-3)
    assert records[-1].metrics["copilot_loss"] < 0.9 * records[-1].metrics["copilot_zero_loss"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_resume_is_exact_for_the_copilot_too(tmp_path, method):
    whole = loop(tmp_path / "a", method, COPILOT)
    whole.run()
    cut = loop(tmp_path / "b", method, COPILOT)
    for _, _ in zip(range(5), cut.steps(), strict=False):
        pass
    again = loop(tmp_path / "b", method, COPILOT)
    again.run()
    ours, theirs = copilot_of(again), copilot_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(again.companion.log.generator.get_state(), whole.companion.log.generator.get_state())
    ours, theirs = again.companion.log.tensors(), whole.companion.log.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    saved = Copilot.load(tmp_path / "b" / "copilot").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in copilot_of(again).items())


def test_a_checkpoint_without_a_copilot_is_told(tmp_path):
    for _, _ in zip(range(4), loop(tmp_path).steps(), strict=False):
        pass
    with pytest.raises(InputError, match="without a Copilot"):
        loop(tmp_path, train=COPILOT).run()


def test_the_log_is_bounded_and_holds_no_graph():
    made = loop(train={"copilot": {"layers": 2, "buffer": 3}})
    made.run()
    log = made.companion.log
    assert len(log) == 3 < made.total
    tensors = log.tensors().values()
    assert not any(t.requires_grad or t.grad_fn is not None or t.device.type != "cpu" for t in tensors)
    kinds = {t.dtype for t in tensors}
    assert kinds == {torch.float16, torch.int32, torch.int64} and log.nbytes == sum(t.nbytes for t in tensors)


def test_rounds_are_drawn_uniformly_by_a_generator_of_their_own():
    log = MistakeLog(4, torch.Generator().manual_seed(0))
    for number in range(6):
        log.add([number])
    before = torch.get_rng_state()
    counts = np.bincount([log.draw()[0] for _ in range(4000)], minlength=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert not counts[:2].any() and np.abs(counts[2:] - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


def batch_of(rows, starts=None):
    """Rows of (ids, labels), padded."""
    width = max(len(ids) for ids, _ in rows)
    made = {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    }
    return made | ({"position_ids": torch.tensor([starts])} if starts else {})


def recorded(model, batch):
    with watched(model, batch) as seen:
        token_logprobs(model, batch)
    return record(model, batch, seen)


def test_what_is_recorded_is_what_a_plain_pass_gives():
    model = loop().tuned.model.eval()
    answer = [7, 8, 9]
    batch = batch_of([([1, 2, 3, *answer], [-100] * 3 + answer), ([4, 5], [-100, 5])])
    errors, prompt, visible, states, real = recorded(model, batch).laid_out(VOCABULARY, torch.device("cpu"))
    with torch.no_grad():
        out = model(batch["input_ids"], output_hidden_states=True)
    assert real.tolist() == [[True] * 3, [True, False, False]] and visible.tolist() == [
        [True] * 3,
        [True, False, False],
    ]
    embedded = model.get_input_embeddings()(batch["input_ids"])
    near = {"atol": 2e-3, "rtol": 2e-3}  # float16
    torch.testing.assert_close(prompt[0], embedded[0, :3], **near)
    torch.testing.assert_close(prompt[1, 0], embedded[1, 0], **near)
    pooled = torch.stack(out.hidden_states[1:]).mean(0)
    torch.testing.assert_close(states[0], pooled[0, 2:5], **near)
    truth = torch.nn.functional.one_hot(torch.tensor(answer), VOCABULARY) - out.logits[0, 2:5].softmax(-1)
    torch.testing.assert_close(errors[0], truth, **near)


def test_each_answer_is_a_stretch_with_all_before_it_and_packing_keeps_examples_apart():
    model = loop().tuned.model.eval()
    talk = [1, 2, 3, 4, 5, 6, 7]
    part = recorded(model, batch_of([(talk, [-100, -100, 3, -100, -100, 6, 7])]))
    assert part.before.tolist() == [2, 5] and part.counts.tolist() == [1, 2] and part.labels.tolist() == [3, 6, 7]
    packed = batch_of([([1, 2, 3, 4, 5], [-100, 2, 3, -100, 5])], starts=[0, 1, 2, 0, 1])
    part, apart = recorded(model, packed), recorded(model, batch_of([([4, 5], [-100, 5])]))
    assert part.before.tolist() == [1, 1] and part.counts.tolist() == [2, 1]
    torch.testing.assert_close(part.states[2:], apart.states, atol=2e-3, rtol=2e-3)
    assert torch.equal(part.prompts[1:], apart.prompts)
    assert recorded(model, batch_of([([1, 2], [-100, -100])])) is None


@pytest.mark.parametrize("kept", [4, 19])
def test_an_error_sums_to_zero_and_is_right_where_it_was_kept(kept):
    draw = torch.Generator().manual_seed(0)
    labels, probabilities = torch.randint(19, (50,), generator=draw), torch.rand(50, 19, generator=draw).softmax(-1)
    top = probabilities.topk(kept)
    errors = errors_of(labels.int(), top.indices.int(), top.values.half(), 19)
    torch.testing.assert_close(errors.sum(-1), torch.zeros(50), atol=1e-6, rtol=0)
    own = errors.gather(1, labels[:, None])
    assert bool(((own >= 0) & (own <= 1)).all())
    truth = torch.nn.functional.one_hot(labels, 19) - probabilities
    torch.testing.assert_close(errors.gather(1, top.indices), truth.gather(1, top.indices), atol=1e-3, rtol=0)


def test_a_perfect_guess_costs_nothing_and_has_a_gradient():
    errors = torch.randn(5, 19)
    guesses = errors.clone().requires_grad_(True)
    losses = token_losses(guesses, errors)
    losses.sum().backward()
    assert float(losses.detach().max()) < 1e-5 and bool(guesses.grad.isfinite().all())
    other = errors + torch.tensor([3.0, 4.0]).repeat(10)[:19]
    wanted = [float(((other - errors)[0] ** 2).mean() ** p) for p in (0.5, 1)]
    for kind, value in zip(("rmse", "mse"), wanted, strict=True):
        torch.testing.assert_close(token_losses(other, errors, kind), torch.full((5,), value))


def test_its_rate_follows_the_pilots():
    made = loop(train={"copilot": {"layers": 2, "learning_rate": 0.01}, "learning_rate": 1e-3})
    for told in made.steps():
        group = made.companion.optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(10 * told.learning_rate)


class Compared(Examples):
    """The same rows, every second one worse than the one before."""

    def __init__(self, count):
        super().__init__(count)
        self.role = np.array([CHOSEN, REJECTED] * (count // 2))
        self.row = np.arange(count) // 2


def test_what_it_cannot_learn_from_is_told(monkeypatch):
    made = loop(train=COPILOT)
    made.companion.model.head.weight.data.fill_(float("nan"))
    with pytest.raises(GateError, match="Copilot's loss"):
        made.run()
    plain = loop()
    settings = plain.settings.model_validate(plain.settings.model_dump() | COPILOT)
    with pytest.raises(InputError, match="compared or judged"):
        Loop(copy.deepcopy(plain.tuned), Dpo(reference="model"), settings, Compared(8), device="cpu")
    monkeypatch.setattr(type(plain.accelerator), "num_processes", 2)
    with pytest.raises(InputError, match="one device"):
        loop(train=COPILOT)


def test_labelled_positions_are_those_of_the_loss():
    batch = batch_of([([1, 2, 3], [1, 2, -100])])
    assert (
        recorded(loop().tuned.model, batch).labels.tolist()
        == batch["labels"][:, 1:][labelled(batch["labels"])].tolist()
    )


def test_layers_of_another_base_with_the_same_tokens():
    with pytest.raises(InputError, match="1536 entries, the trained model's 64"):
        loop(train={"copilot": {"init_from": "package:luthier/worlds/tiny-lm"}})


def test_a_folder_gives_its_layers(tmp_path):
    source = loop(method="full").tuned.model
    torch.nn.init.normal_(source.model.layers[1].mlp.up_proj.weight)
    source.save_pretrained(tmp_path)
    for file in tiny.folder().glob("tokenizer*"):  # every base has one; which, is of no matter here
        shutil.copy(file, tmp_path)
    made = loop(train={"copilot": {"init_from": str(tmp_path)}}).companion.model
    assert torch.equal(made.layers[1].up_proj.weight, source.model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize("odd", [{"layers": 1}, {"buffer": 0}, {"loss": "kl"}, {"learning_rate": 0}, {"rank": 1}])
def test_settings_out_of_range_are_refused(odd):
    with pytest.raises(ValidationError):
        TrainSettings.model_validate({"copilot": odd})


def test_a_pass_over_other_rows_is_not_taken_for_the_batch():
    model, batch = loop().tuned.model, batch_of([([1, 2, 3], [-100, 2, 3])])
    with watched(model, batch) as seen:
        model(input_ids=batch["input_ids"].clone())
    with pytest.raises(InputError, match="rows as they are"):
        record(model, batch, seen)
