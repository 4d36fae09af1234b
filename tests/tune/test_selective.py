"""One table of laws for every tuning that steps entries: a method adds a row here and has them all."""

import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    ViTConfig,
    ViTForImageClassification,
)

from luthier.errors import InputError
from luthier.methods import build
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.tune import Probe
from luthier.tune.selector.choose import Number, Top
from luthier.tune.selector.compact import Chosen
from luthier.tune.selector.entries import EntriesTuned
from luthier.tune.selector.scopes import Everything
from luthier.tune.selector.scores import Magnitude
from luthier.tune.selector.slots import Every, Once, Slots
from stepping import drive

# Tunings that step entries: settings, and the same choosing everything in their scope.
ENTRIES = {
    "lift": ({"method": "lift", "density": 0.1, "filter_rank": 4, "interval": 3}, {"density": 1.0}),
    "sara": ({"method": "sara", "density": 0.1}, {"density": 1.0}),
    "lt_sft": (
        {"method": "lt_sft", "density": 0.1, "select": "random", "iterations": 2},
        {"density": 1.0, "iterations": 1},
    ),
}


def llama(tied=False):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **shape)).eval()


def bert():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=64, num_labels=3, **shape)).eval()


def vit():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=3, **shape)
    ).eval()


def loss_of(model, step):
    """A loss on rows of this step, whatever the model takes."""
    draw = torch.Generator().manual_seed(step)
    if isinstance(model, ViTForImageClassification):
        pictures = torch.rand(4, 1, 8, 8, generator=draw)
        return model(pixel_values=pictures, labels=torch.arange(4) % 3).loss
    ids = torch.randint(1, 64, (3, 9), generator=draw)
    if hasattr(model, "classifier"):
        return model(input_ids=ids, labels=torch.arange(3)).loss
    return Sft().loss(model, {"input_ids": ids, "labels": ids}).value()


def probe_of(model, seed=0):
    return Probe(
        Topology.of(model),
        seed,
        batches=lambda: [{"step": i} for i in range(2)],
        loss=lambda m, b: loss_of(m, b["step"]),
    )


def attach(settings, seed=0, model=None):
    model = llama() if model is None else model
    return build("tune", settings).attach(model, probe_of(model, seed))


def run(tuned, steps, first=0, optimizer=None, total=12, decay=0.1, parts=1, watch=lambda step: None):
    if optimizer is None:
        optimizer = torch.optim.AdamW(tuned.parameter_groups(decay), lr=1e-2)
        tuned.on_phase_begin(optimizer, 4, total)
    return drive(tuned, optimizer, loss_of, steps, first, parts, begun=watch)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ENTRIES)
class TestEntries:
    def test_what_is_not_chosen_rests_to_the_last_bit(self, name):
        """Over several choices, with weight decay and with momentum of entries that have left."""
        tuned = attach(ENTRIES[name][0])
        base = last = weights(tuned.model)
        optimizer = None
        for first in range(12):
            optimizer = run(tuned, 1, first, optimizer)
            now, chosen, ever = weights(tuned.model), tuned.selection(), tuned.ever()
            for key, value in now.items():
                moved, since = value != base[key], value != last[key]
                assert not (moved & ~ever.mask(key)).any() if key in ever else not moved.any(), key
                assert not (since & ~chosen.mask(key)).any() if key in chosen else not since.any(), key
            last = now
        assert any(not torch.equal(last[key], base[key]) for key in base)

    def test_the_optimiser_holds_two_numbers_for_each_entry_that_moves(self, name):
        tuned = attach(ENTRIES[name][0])
        optimizer = run(tuned, 8)
        held = sum(v.numel() for state in optimizer.state.values() for v in state.values() if v.ndim)
        assert held == 2 * tuned.selection().count
        assert all(p.grad is None for p in tuned.model.parameters())

    def test_first_pass_equals_the_base_bit_for_bit(self, name):
        model = llama()
        ids = torch.arange(1, 21).view(2, 10)
        before = model(input_ids=ids).logits
        tuned = attach(ENTRIES[name][0], model=model)
        assert torch.equal(tuned.model(input_ids=ids).logits, before)

    def test_equals_masked_dense_training(self, name):
        """The oracle: every weight in the optimiser, gradients times the mask, decay under the mask."""
        settings, model = ENTRIES[name][0], llama()
        tuned = attach(settings)
        masks = {key: tuned.selection().mask(key) for key in tuned.selection()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        own = run(tuned, 1, decay=0.0)
        for step in range(2):  # before the choice changes
            if step:
                run(tuned, 1, first=1, optimizer=own)
            loss_of(model, step).backward()
            for key, parameter in model.named_parameters():
                parameter.grad.mul_(masks[key]) if key in masks else parameter.grad.zero_()
            optimizer.step()
            optimizer.zero_grad()
        after = dict(model.named_parameters())
        for key, value in weights(tuned.model).items():
            torch.testing.assert_close(value, after[key].detach(), rtol=0, atol=1e-6, msg=key)

    def test_choosing_everything_is_full_tuning_of_the_scope(self, name):
        settings = {**ENTRIES[name][0], **ENTRIES[name][1]}
        tuned, model = attach(settings), llama()
        scope = tuned.slots.scope.names(model, Topology.of(model))
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key in scope)
        moving = {key: model.get_parameter(key) for key in scope}
        groups = [[p for p in moving.values() if (p.ndim >= 2) == matrix] for matrix in (True, False)]
        optimizer = torch.optim.AdamW(
            [{"params": g, "weight_decay": d} for g, d in zip(groups, (0.1, 0.0), strict=True) if g], lr=1e-2
        )
        run(tuned, 2)
        for step in range(2):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        for key, value in weights(tuned.model).items():
            torch.testing.assert_close(value, model.state_dict()[key], rtol=0, atol=1e-6, msg=key)

    def test_the_schedule_counts_optimiser_steps(self, name):
        seen = {}
        for parts in (1, 3):
            tuned = attach(ENTRIES[name][0])
            periods = []
            run(tuned, 12, parts=parts, watch=lambda step, t=tuned, p=periods: p.append(t.period))
            seen[parts] = periods
        assert seen[1] == seen[3] and len(set(seen[1])) > 1

    def test_same_seeds_same_choice(self, name):
        first, second = attach(ENTRIES[name][0], seed=4), attach(ENTRIES[name][0], seed=4)
        run(first, 8)
        run(second, 8)
        assert first.selection() == second.selection() and first.ever() == second.ever()

    @pytest.mark.parametrize("stop", [1, 2, 6, 7])
    def test_resumed_across_a_new_choice(self, name, stop):
        settings = ENTRIES[name][0]
        whole, broken, again = attach(settings), attach(settings), attach(settings)
        run(whole, 12)
        optimizer = run(broken, stop)
        other = torch.optim.AdamW(again.parameter_groups(0.1), lr=1e-2)
        again.on_phase_begin(other, 4, 12)
        again.load_state_dict({key: value.clone() for key, value in broken.state_dict().items()})
        again.load_extra_state(json.loads(json.dumps(broken.extra_state())))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(again, 12 - stop, stop, other)
        assert whole.selection() == again.selection() and whole.ever() == again.ever()
        after = weights(again.model)
        assert all(torch.equal(value, after[key]) for key, value in weights(whole.model).items())

    def test_an_earlier_state_takes_back_what_moved_since(self, name):
        tuned = attach(ENTRIES[name][0])
        run(tuned, 2)
        early, kept = weights(tuned.model), {k: v.clone() for k, v in tuned.state_dict().items()}
        other = attach(ENTRIES[name][0])
        run(other, 12)
        other.load_state_dict(kept)
        assert all(torch.equal(value, early[key]) for key, value in weights(other.model).items())

    def test_untuned_computes_what_the_base_does(self, name):
        tuned, ids = attach(ENTRIES[name][0]), torch.arange(1, 21).view(2, 10)
        base = llama()(input_ids=ids).logits
        run(tuned, 8)
        with torch.no_grad():
            after = tuned.model(input_ids=ids).logits
            with tuned.untuned():
                assert torch.equal(tuned.model(input_ids=ids).logits, base)
            assert torch.equal(tuned.model(input_ids=ids).logits, after) and not torch.equal(after, base)

    @pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), bert, vit], ids=["llama", "tied", "bert", "vit"])
    def test_any_model_saved_and_loaded(self, name, make, tmp_path):
        model = make()
        keys = set(model.state_dict())
        tuned = attach(ENTRIES[name][0], model=model)
        run(tuned, 5)
        assert set(tuned.model.state_dict()) == keys
        assert tuned.save(tmp_path) == "model"
        loaded = type(model).from_pretrained(tmp_path)
        assert all(torch.equal(value, tuned.model.state_dict()[key]) for key, value in loaded.state_dict().items())
        plain = tuned.merged()
        assert set(dict(plain.named_parameters())) <= keys and type(plain) is type(model)

    def test_a_fused_optimiser_steps_the_weights_too(self, name):
        """Its steps leave no trace in the versions of tensors."""
        after = []
        for fused in (True, False):
            tuned = attach(ENTRIES[name][0])
            optimizer = torch.optim.AdamW(tuned.parameter_groups(0.0), lr=1e-2, fused=fused)
            tuned.on_phase_begin(optimizer, 4, 12)
            run(tuned, 4, optimizer=optimizer)
            after.append(weights(tuned.model))
        base = weights(llama())
        assert any(not torch.equal(value, base[key]) for key, value in after[0].items())
        for key, value in after[0].items():
            torch.testing.assert_close(value, after[1][key], rtol=0, atol=1e-6, msg=key)

    def test_16_bit_weights_are_stepped_in_32(self, name):
        tuned = attach(ENTRIES[name][0], model=llama().bfloat16())
        optimizer = torch.optim.SGD(tuned.parameter_groups(0.0), lr=1e-5)
        tuned.on_phase_begin(optimizer, 4, 12)
        assert all(p.dtype == torch.float32 for p in tuned.moving().values())
        before = {key: value.detach().clone() for key, value in tuned.moving().items()}
        for step in range(2):
            tuned.on_step_begin(step)
            loss_of(tuned.model, step).backward()
            optimizer.step()
            tuned.on_step_end(step)
        assert all(not torch.equal(value, before[key]) for key, value in tuned.moving().items() if value.numel())


# The machinery below them


def test_choosing_nothing_is_refused_and_leaves_the_base():
    model = llama()
    base = weights(model)
    slots = Slots(Everything(), Magnitude(), Top(Number(0)), "global", "element", Once(), "gradient", "none")
    with pytest.raises(InputError, match="not one entry"):
        EntriesTuned(build("tune", "lift"), model, probe_of(model), slots)
    assert all(torch.equal(value, base[key]) for key, value in weights(model).items())


@pytest.mark.parametrize("count", [1, 100, 5000])
def test_exact_counts_over_all_tensors_ties_to_the_lower_place(count):
    model = llama()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-2, 3, p.shape, generator=torch.Generator().manual_seed(p.numel())) / 4)
    slots = Slots(Everything(), Magnitude(), Top(Number(count)), "global", "element", Once(), "gradient", "none")
    chosen = EntriesTuned(build("tune", "lift"), model, probe_of(model), slots).selection()
    names = [n for n, _ in llama().named_parameters()]
    flat = torch.cat([model.get_parameter(n).detach().reshape(-1).abs() for n in names])
    order = sorted(range(len(flat)), key=lambda i: (-float(flat[i]), i))[:count]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order] = True
    assert torch.equal(torch.cat([chosen.mask(n).reshape(-1) for n in names]), mask)


def test_moments_are_carried_to_where_their_entries_went():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3, bias=False)})
    chosen = Chosen("a.weight", model, torch.tensor([1, 4, 6, 9]))
    optimizer = torch.optim.AdamW([chosen.values], lr=0.1)
    model["a"](torch.ones(2, 4)).sum().backward()
    optimizer.step()
    from luthier.tune.selector.entries import _carry

    before = {k: v.clone() for k, v in optimizer.state[chosen.values].items()}
    stays, came = chosen.choose(torch.tensor([0, 4, 9, 11]))
    _carry(optimizer, chosen.values, stays, came)
    after = optimizer.state[chosen.values]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(
            after[key], torch.stack([torch.tensor(0.0), before[key][1], before[key][3], torch.tensor(0.0)])
        )
    assert after["step"] == before["step"]


def test_a_copy_of_the_model_has_its_own_chosen_entries():
    model = llama()
    tuned = attach({"method": "lift", "density": 0.1, "filter_rank": 4}, model=model)
    twin = copy.deepcopy(model)
    run(tuned, 2)
    ids = torch.arange(1, 21).view(2, 10)
    with torch.no_grad():
        assert torch.equal(twin(input_ids=ids).logits, llama()(input_ids=ids).logits)


def test_works_under_gradient_checkpointing():
    plain, saving = (attach({"method": "lift", "density": 0.1, "filter_rank": 4}) for _ in range(2))
    saving.model.gradient_checkpointing_enable({"use_reentrant": False})
    saving.model.enable_input_require_grads()
    saving.model.train()
    plain.model.train()
    run(plain, 2)
    run(saving, 2)
    for a, b in zip(plain.moving().values(), saving.moving().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_patterns_that_match_nothing_name_near_ones():
    with pytest.raises(InputError, match="did you mean 'q_proj'"):
        attach({"method": "lift", "density": 0.1, "targets": ["q_prj"]})


def test_quantised_weights_are_refused():
    model = llama()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(48, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(InputError, match="quantised"):
        attach({"method": "lift", "density": 0.1}, model=model)


def test_every_counts_from_the_steps_that_the_paper_says():
    schedule = Every(200, early=1)
    assert [s for s in range(1, 800) if schedule.period(s, 1, None) != schedule.period(s - 1, 1, None)] == [
        199,
        399,
        599,
        799,
    ]
