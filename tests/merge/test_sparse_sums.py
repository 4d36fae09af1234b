"""Sparse differences of several jobs on one base, added up and taken off: against dense state dicts and mergekit."""

import copy

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import luthier as lt
from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.tune import LtSft, Probe
from luthier.weights import diff

SUM = {"method": "task-arithmetic", "scale": 1.0}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(seed=0, **more):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **(SHAPE | more)))


def job(model, number, density=0.05):
    """The model after a small job of its own, and the entries it may have moved."""
    tuned = LtSft(density=density).attach(model, Probe(Topology.of(model)))
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.0), lr=1e-2)
    tuned.on_phase_begin(optimizer, 3, 6)
    for step in range(6):
        tuned.on_step_begin(step)
        ids = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(100 * number + step))
        if isinstance(model, BertForSequenceClassification):
            tuned.model(input_ids=ids, labels=torch.arange(2)).loss.backward()
        else:
            Sft().loss(tuned.model, {"input_ids": ids, "labels": ids}).value().backward()
        tuned.on_grad(step)
        optimizer.step()
        optimizer.zero_grad()
        tuned.on_step_end(step)
    tuned.on_phase_end()
    return tuned.merged(), tuned.selection()


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def jobs():
    (one, first), (two, second) = job(llama(), 1), job(llama(), 2)
    return state(llama()), state(one), state(two), first, second


def merged(base, *models, **more):
    return lt.merge({**SUM, **more}, base=base, models=list(models)).tensors


def test_the_sum_is_that_of_the_dense_state_dicts_and_of_mergekit(jobs, mergekit):
    base, one, two, _, _ = jobs
    ours = merged(base, one, two)
    assert any(not torch.equal(ours[name], base[name]) for name in base)
    for name, start in base.items():
        by_hand = start.double() + (one[name].double() - start.double()) + (two[name].double() - start.double())
        torch.testing.assert_close(ours[name].double(), by_hand, rtol=0, atol=1e-7)
        theirs = mergekit("task_arithmetic", start, [one[name], two[name]], normalize=False)
        torch.testing.assert_close(ours[name], theirs, rtol=0, atol=1e-7)


def test_order_does_not_matter(jobs):
    base, one, two, _, _ = jobs
    forth, back = merged(base, one, two), merged(base, two, one)
    assert all(torch.equal(forth[name], back[name]) for name in base)


def test_where_only_one_moved_the_sum_is_a_copy_of_it(jobs):
    """base + (one - base) may miss `one` by the last bit; where neither moved, the bits are the base's."""
    base, one, two, first, second = jobs
    ours = merged(base, one, two)
    both = 0
    for name in first:
        a, b = first.mask(name), second.mask(name)
        both += int((a & b).sum())
        assert torch.equal(ours[name][~(a | b)], base[name][~(a | b)])
        torch.testing.assert_close(ours[name][a & ~b], one[name][a & ~b], rtol=0, atol=1e-7)
        torch.testing.assert_close(ours[name][b & ~a], two[name][b & ~a], rtol=0, atol=1e-7)
    assert both == (first & second).count > 0


def test_one_is_taken_off_again(jobs):
    """Minus one of two leaves the other; the delta of a job alone goes off to the last bit."""
    base, one, two, _, _ = jobs
    both = merged(base, one, two)
    left = merged(base, both, one, weights=[1.0, -1.0])
    for name in base:
        torch.testing.assert_close(left[name], two[name], rtol=0, atol=2e-7)
    delta = lt.weights.diff_tensors(base, one)
    off = delta.remove_tensors(delta.apply_tensors(base))
    assert all(torch.equal(off[name], base[name]) for name in base)


def test_a_task_moves_from_one_language_to_another(jobs):
    """With `task` tuned from `source`: base + (task - base) - (source - base) + (target - base)."""
    base, source, target, _, _ = jobs
    model = llama()
    model.load_state_dict(source)
    task = state(job(model, 3)[0])
    ours = merged(base, task, source, target, weights=[1.0, -1.0, 1.0])
    for name in base:
        by_hand = target[name].double() + (task[name].double() - source[name].double())
        torch.testing.assert_close(ours[name].double(), by_hand, rtol=0, atol=3e-7)


def test_files_of_differences_add_up_as_their_models_do(tmp_path, jobs):
    base, one, two, _, _ = jobs
    for name, weights in (("base", base), ("one", one), ("two", two)):
        model = llama()
        model.load_state_dict(weights)
        model.save_pretrained(tmp_path / name)
    for name in ("one", "two"):
        diff(tmp_path / "base", tmp_path / name, tmp_path / f"{name}-delta")
    sizes = [(tmp_path / name).stat().st_size for name in ("one-delta/delta.safetensors", "one/model.safetensors")]
    assert sizes[0] < 0.2 * sizes[1]
    through = lt.merge(SUM, base=tmp_path / "base", models=[tmp_path / "one-delta", tmp_path / "two-delta"]).tensors
    plain = merged(base, one, two)
    assert all(torch.equal(through[name], plain[name]) for name in plain)


def test_a_language_goes_under_a_task_with_another_head():
    """A difference of the body learnt under one head is added to a model with another; the head's own is named."""
    torch.manual_seed(0)
    language = BertForMaskedLM(BertConfig(vocab_size=64, **SHAPE))
    torch.manual_seed(1)
    task = BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=2, **SHAPE))
    task.bert.load_state_dict(language.bert.state_dict(), strict=False)
    base = state(task)
    tuned, _ = job(copy.deepcopy(task), 3)
    other = copy.deepcopy(language)
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight[0, :5] += 0.25
    with pytest.raises(InputError, match=r"cls\.predictions"):
        merged(base, state(tuned), state(other))
    body = {name: tensor for name, tensor in state(other).items() if name in base}
    added = merged(base, state(tuned), {**base, **body})
    change = added["bert.encoder.layer.0.output.dense.weight"] - tuned.bert.encoder.layer[0].output.dense.weight
    assert torch.allclose(change[0, :5], torch.full((5,), 0.25), atol=1e-6) and float(change.abs().sum()) < 1.2501
    assert torch.equal(added["classifier.weight"], merged(base, state(tuned))["classifier.weight"])


def test_other_shapes_are_refused_by_name(jobs):
    base, one, _, _, _ = jobs
    with pytest.raises(InputError, match=r"mlp\.\w+_proj\.weight"):
        merged(base, one, state(llama(intermediate_size=40)))
