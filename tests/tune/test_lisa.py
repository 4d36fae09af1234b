"""LISA's own laws, against hand-made freezing and plain AdamW."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, T5Config, T5ForConditionalGeneration

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.tune import Full, Lisa, Lora, Probe
from luthier.tune.lisa import draw

BLOCKS = 4


def make(tied=False):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **shape))


def batch(step):
    ids = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def attach(settings, tied=False, seed=0):
    model = make(tied)
    return settings.attach(model, Probe(Topology.of(model), seed))


def run(tuned, steps, optimizer=None, first=0, watch=lambda step: None):
    if optimizer is None:
        optimizer = torch.optim.AdamW(tuned.parameter_groups(0.1), lr=1e-3)
        tuned.on_phase_begin(optimizer, steps_per_epoch=5)
    for step in range(first, first + steps):
        tuned.on_step_begin(step)
        watch(step)
        Sft().loss(tuned.model, batch(step)).value().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def active_blocks(model):
    return [i for i, block in enumerate(model.model.layers) if all(p.requires_grad for p in block.parameters())]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
def test_exactly_so_many_blocks_move_and_change_only_between_periods(state, tied):
    tuned = attach(Lisa(active_layers=2, interval=3, state=state), tied)
    seen = []

    def watch(step):
        active = active_blocks(tuned.model)
        assert active == tuned.active and len(active) == 2
        assert tuned.model.model.embed_tokens.weight.requires_grad and tuned.model.lm_head.weight.requires_grad
        resting = [block for i, block in enumerate(tuned.model.model.layers) if i not in active]
        assert not any(p.requires_grad or p.grad is not None for block in resting for p in block.parameters())
        seen.append(active)

    run(tuned, 12, watch=watch)
    assert all(seen[step] == seen[step - step % 3] for step in range(12))
    assert len({tuple(active) for active in seen}) > 1


def test_a_resting_block_stays_to_the_last_bit():
    tuned = attach(Lisa(active_layers=1, interval=2))
    optimizer = run(tuned, 2)
    for period in range(1, 5):
        before = weights(tuned.model)
        run(tuned, 2, optimizer, first=2 * period)
        for name, value in weights(tuned.model).items():
            block = Topology.of(tuned.model).region(name)[1]
            if block is not None and block not in tuned.active:
                assert torch.equal(value, before[name])


def test_equals_freezing_by_hand_with_an_optimiser_built_anew():
    """The oracle: draws taken from `draw`, requires_grad set by hand, AdamW rebuilt at each draw, outside carried."""
    settings = Lisa(active_layers=2, interval=3)
    tuned = attach(settings, seed=7)
    run(tuned, 9)
    model = make()
    carried = {}
    for step in range(9):
        if step % 3 == 0:
            active = draw(BLOCKS, 2, (7, 0, step // 3))
            for name, p in model.named_parameters():
                block = int(name.split(".")[2]) if ".layers." in name else None
                p.requires_grad_(block is None or block in active)
            moving = {n: p for n, p in model.named_parameters() if p.requires_grad}
            matrices = [p for p in moving.values() if p.ndim >= 2]
            vectors = [p for p in moving.values() if p.ndim < 2]
            groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, lr=1e-3)
            for name, state in carried.items():
                optimizer.state[moving[name]] = state
        Sft().loss(model, batch(step)).value().backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        carried = {n: optimizer.state[p] for n, p in moving.items() if ".layers." not in n}
    for (name, a), b in zip(tuned.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7, msg=name)


def test_all_blocks_kept_is_full_tuning():
    lisa, full = attach(Lisa(active_layers=BLOCKS, interval=2, state="keep")), attach(Full())
    run(lisa, 8)
    run(full, 8)
    for a, b in zip(lisa.model.parameters(), full.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_no_block_trains_embedding_and_head_only():
    tuned = attach(Lisa(active_layers=0))
    before = weights(tuned.model)
    run(tuned, 3)
    changed = {name for name, value in weights(tuned.model).items() if not torch.equal(value, before[name])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}


def test_moments_exist_only_for_what_moves_with_drop():
    tuned = attach(Lisa(active_layers=1, interval=2))
    optimizer = run(tuned, 7)
    held = sum(p.numel() for p in optimizer.state)
    sizes = {name: p.numel() for name, p in tuned.model.named_parameters()}
    outside = sum(size for name, size in sizes.items() if ".layers." not in name)
    block = sum(size for name, size in sizes.items() if ".layers.0." in name)
    assert held == outside + block
    kept = attach(Lisa(active_layers=1, interval=1, state="keep"))
    assert sum(p.numel() for p in run(kept, 40).state) == sum(sizes.values())


def test_each_block_has_its_share_of_periods():
    drawn = np.concatenate([draw(8, 2, (0, 0, period)) for period in range(2000)])
    assert np.abs(np.bincount(drawn, minlength=8) / 2000 - 2 / 8).max() < 0.03


def test_weights_decide_how_often():
    drawn = [draw(3, 1, (0, 0, period), (0.6, 0.3, 0.1))[0] for period in range(3000)]
    assert np.abs(np.bincount(drawn) / 3000 - [0.6, 0.3, 0.1]).max() < 0.03
    assert all(draw(3, 2, (0, 0, period), (1.0, 1.0, 0.0)) == [0, 1] for period in range(20))


def test_resumed_in_the_middle_of_a_period():
    whole = attach(Lisa(active_layers=1, interval=4))
    run(whole, 11)
    broken = attach(Lisa(active_layers=1, interval=4))
    optimizer = run(broken, 6)
    again = attach(Lisa(active_layers=1, interval=4))
    other = torch.optim.AdamW(again.parameter_groups(0.1), lr=1e-3)
    again.on_phase_begin(other, 5)
    again.load_state_dict(broken.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(again, 5, other, first=6)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_both_stacks_of_an_encoder_decoder_are_drawn_from():
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "vocab_size": 32}
    model = T5ForConditionalGeneration(T5Config(num_layers=2, num_decoder_layers=3, decoder_start_token_id=0, **shape))
    tuned = Lisa(active_layers=5).attach(model, Probe(Topology.of(model)))
    assert len(tuned.units) == 5 and all(unit.names for unit in tuned.units)


@pytest.mark.parametrize(
    ("settings", "tied", "says"),
    [
        (Lisa(active_layers=5), False, "the model has 4 blocks"),
        (Lisa(weights=(0.5, 0.5)), False, "weights must be 4 numbers"),
        (Lisa(weights=(1.0, 0.0, 0.0, 0.0)), False, "2 of them above"),
        (Lisa(train_lm_head=False), True, "one parameter"),
    ],
)
def test_what_cannot_be_is_refused(settings, tied, says):
    with pytest.raises(InputError, match=says):
        attach(settings, tied)


def test_an_adapter_below_is_refused():
    lora = attach(Lora(rank=2))
    with pytest.raises(InputError, match="plain model"):
        Lisa().attach(lora.model, Probe(Topology.of(lora.model)))


def test_numbers_out_of_range_are_refused():
    for wrong in ({"active_layers": -1}, {"interval": 0}, {"state": "gone"}):
        with pytest.raises(ValueError, match=r"(?i)input should"):
            Lisa(**wrong)
