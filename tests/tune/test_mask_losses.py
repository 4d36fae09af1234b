"""Mask tuning between two losses: the norm of the scores, gradient dropout against the anchor, and the loop."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, ViTConfig, ViTForImageClassification

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.proofs.vision_bench import pair_model
from luthier.train import Loop, TrainSettings
from luthier.tune import MaskTuning, Probe
from luthier.tune.grad_dropout import grad_dropout

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def vit():
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=3, **SHAPE)
    return ViTForImageClassification(config).eval()


def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **SHAPE)).eval()


def outputs(model, seed=0):
    return model(pixel_values=torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))).logits


def loss_of(model, seed=0):
    return F.cross_entropy(outputs(model, seed), torch.arange(4) % 3)


def attach(model, seed=0, **settings):
    settings = {"grad_dropout": {"enabled": False}, **settings}
    return MaskTuning.model_validate(settings).attach(model, Probe(Topology.of(model), seed))


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


class Rows:
    """Encoded examples of several lengths."""

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self.lengths = np.array([4 + i % 7 for i in range(24)])
        ids = [torch.randint(0, 64, (int(n),), generator=draw).tolist() for n in self.lengths]
        self.rows = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_the_norm_of_the_scores_is_part_of_the_loss():
    """Once a step, whoever runs the backward pass, and however many micro-batches there are."""
    found = {}
    for parts, own in ((1, False), (1, True), (3, True)):
        tuned = attach(vit(), reg=0.5)
        tuned.on_step_begin(0)
        for _ in range(parts):
            loss = loss_of(tuned.model) / parts
            tuned.backward(loss) if own else loss.backward()
        tuned.on_grad(0)
        found[parts, own] = {name: p.grad for name, p in tuned.moving().items()}
    plain = attach(vit(), reg=0.0)
    loss_of(plain.model).backward()
    for name, p in plain.moving().items():
        wanted = p.grad + 0.5 * p.detach() / p.detach().norm()
        for gradients in found.values():
            torch.testing.assert_close(gradients[name], wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_of_two_losses_meet_as_the_combiner_says(parts):
    settings = {"grad_dropout": {"lambda": 0.7}, "reg": 0.01}
    tuned, first, second = attach(vit(), **settings), attach(vit(), reg=0.01), attach(vit(), reg=0.0)
    tuned.on_step_begin(3)
    for part in range(parts):
        found = outputs(tuned.model, part)
        with tuned.untuned(), torch.no_grad():  # between forward and backward
            outputs(tuned.model, part)
        tuned.backward(found[:, 0].sum(), found[:, 1].square().sum())
        first.backward(outputs(first.model, part)[:, 0].sum())
        second.backward(outputs(second.model, part)[:, 1].square().sum())
    first.on_grad(3)
    second.on_grad(3)
    generator = tuned._generator(3)
    tuned.on_grad(3)
    for name, p in tuned.moving().items():
        a, b = first.moving()[name].grad, second.moving()[name].grad
        torch.testing.assert_close(p.grad, grad_dropout(a, b, 0.7, generator), rtol=1e-4, atol=1e-7)


def test_draws_are_those_of_the_step_and_the_seed():
    def gradients(step, seed):
        tuned = attach(vit(), seed=seed, grad_dropout={}, reg=0.0)
        found = outputs(tuned.model)
        tuned.backward(found[:, 0].sum(), -found[:, 0].sum() + found[:, 1].sum())
        tuned.on_grad(step)
        return torch.cat([p.grad.flatten() for p in tuned.moving().values()])

    assert torch.equal(gradients(2, 1), gradients(2, 1))
    assert not torch.equal(gradients(2, 1), gradients(3, 1)) and not torch.equal(gradients(2, 1), gradients(2, 2))


def test_one_loss_is_refused_where_two_are_compared():
    for own in (True, False):
        tuned = attach(vit(), grad_dropout={})
        with pytest.raises(InputError, match=r"two losses.*grad_dropout.enabled to false"):
            if own:
                tuned.backward(loss_of(tuned.model))
            else:
                loss_of(tuned.model).backward()
                tuned.on_grad(0)


def test_a_weight_that_the_loss_does_not_see_is_told(caplog):
    tuned = attach(pair_model(0))
    tuned.backward(tuned.model.get_text_features(input_ids=torch.tensor([[1, 6, 16]])).pooler_output.sum() * 1.0)
    tuned.on_grad(0)
    assert "does not depend on 8 masked weights" in caplog.text


def test_a_language_model_in_the_loop(tmp_path):
    def loop(until=None, directory=None, tokens=2048):
        model = llama()
        tuned = attach(model, targets="all", grad_dropout={"lambda": 0.5})
        settings = TrainSettings(
            learning_rate=1e-3, max_steps=12, effective_batch_size=8, max_tokens_per_device=tokens, save_steps=5
        )
        made = Loop(tuned, Sft(), settings, Rows(), directory=directory, device="cpu")
        return made, made.run(until=until)

    whole, records = loop()
    assert records[-1].loss < records[0].loss and 0 < whole.tuned.dropped() < 0.5
    assert records[0].metrics["anchor_loss"] > 0
    kept, base, after = whole.tuned.selection(), weights(llama()), weights(whole.tuned.model)
    assert same(after, {n: w * kept.mask(n) if n in kept else w for n, w in base.items()})  # by a fused optimiser
    _, small = loop(tokens=18)
    assert [r.loss for r in small[:3]] == pytest.approx([r.loss for r in records[:3]], rel=1e-4)
    loop(until=5, directory=tmp_path)
    again, _ = loop(directory=tmp_path)
    assert same(weights(again.tuned.model), weights(whole.tuned.model))
    for a, b in zip(again.tuned.moving().values(), whole.tuned.moving().values(), strict=True):
        assert torch.equal(a, b)


def test_settings_are_checked():
    for wrong in ({"init": 0.0}, {"reg": -1}, {"grad_dropout": {"lambda": 1.1}}, {"grad_dropout": {"temperature": 0}}):
        with pytest.raises(ValueError, match=r"(?i)input should"):
            MaskTuning.model_validate(wrong)
    with pytest.raises(ValueError, match="all would be dropped"):
        MaskTuning(init=0.005)
    written = MaskTuning.model_validate({"grad_dropout": {"lambda": 0.3}}).model_dump(mode="json")
    assert written["grad_dropout"]["lambda"] == 0.3
    assert MaskTuning.model_validate(written).grad_dropout.lam == 0.3


@pytest.mark.parametrize("settings", [{}, {"targets": "all"}, {"targets": ["q_proj"], "patch_embed": False}])
def test_planned_counts_without_weights(settings):
    with torch.device("meta"):
        model = llama()
    tuned = attach(llama(), **settings)
    assert MaskTuning(**settings).planned(model, Topology.of(model)) == sum(p.numel() for p in tuned.moving().values())
