"""LEVI's features: what is read where, pooling whatever the padding, the cache."""

import math

import pytest
import torch
from tests.tune.levi_models import DEPTHS, MODELS, attach, inputs, make, text, train, vit

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.tune.block_outputs import Reading, pool, read, spread_layers, to_front
from luthier.tune.feature_cache import FeatureCache, row_keys

# -- which layers, and what is read there


def test_the_layers_of_the_rule():
    by_hand = {12: (3, 6, 9, 12), 6: (2, 3, 5, 6), 2: (1, 2), 1: (1,), 4: (1, 2, 3, 4)}
    assert {depth: spread_layers(depth, 4) for depth in by_hand} == by_hand
    for depth in range(1, 40):
        for count in range(1, 50):
            exact = {max(1, math.floor(depth * j / count + 0.5)) for j in range(1, count + 1)}
            assert spread_layers(depth, count) == tuple(sorted(exact))
            assert spread_layers(depth, count)[-1] == depth


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_is_the_stream_after_its_block_and_before_the_final_norm(name):
    model, batch = make(name), text()
    where = Reading.of(model, Topology.of(model), tuple(range(1, DEPTHS[name] + 1)))
    states = read(model, where, inputs(batch))
    base = model.get_encoder() if name == "t5" else model.base_model
    hidden = base(**inputs(batch), output_hidden_states=True).hidden_states
    assert len(hidden) == len(states) + 1
    normed = {"llama": lambda m: m.model.norm, "gpt2": lambda m: m.transformer.ln_f}
    normed["t5"] = lambda m: m.encoder.final_layer_norm
    for own, theirs in zip(states[:-1], hidden[1:-1], strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=0)
    last = normed[name](model)(states[-1]) if name in normed else states[-1]
    torch.testing.assert_close(last, hidden[-1], rtol=0, atol=1e-6)


def test_reading_leaves_no_hook_behind_even_after_an_error():
    model = make()
    where = Reading.of(model, Topology.of(model), 4)
    read(model, where, inputs(text()))
    with pytest.raises(ValueError, match="input_ids"):
        read(model, where, {"nonsense": torch.zeros(1)})
    assert not any(module._forward_hooks for module in model.modules())


def test_blocks_that_are_skipped_are_noticed():
    model = make("llama")
    where = Reading.of(model, Topology.of(model), 2)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    with pytest.raises(InputError, match=r"blocks|layers"):
        read(model, Reading(where.trunk, where.blocks[:2], 3, (1, 3)), inputs(text()))


@pytest.mark.parametrize("name", MODELS)
def test_widths_told_by_structure_are_those_that_are_seen(name):
    seen = attach(make(name), lambda: [text()]).model.widths
    assert attach(make(name)).model.widths == seen == (32,) * len(seen)


# -- pooling and padding


def test_pooling_by_hand_wherever_the_padding_stands():
    real = torch.tensor([[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]])
    junk = torch.full((1, 2), float("nan"))
    rows = {(1, 1, 1, 0): [0, 1, 2, None], (0, 1, 1, 1): [None, 0, 1, 2], (1, 0, 1, 1): [0, None, 1, 2]}
    for mask, order in rows.items():
        states = torch.cat([junk if i is None else real[i : i + 1] for i in order])[None]
        marks = torch.tensor([mask])
        assert pool(states, marks, "mean").tolist() == [[3.0, 30.0]]
        assert pool(states, marks, "cls").tolist() == [[1.0, 10.0]]
        assert pool(states, marks, "last").tolist() == [[6.0, 60.0]]
    assert pool(real[None], None, "last").tolist() == [[6.0, 60.0]]
    assert torch.equal(pool(real, None, "mean"), real)


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "roberta", "t5"])
def test_padding_on_either_side_changes_nothing(name, how):
    tuned = attach(make(name), pool=how, num_layers=2, task_model="bag" if name == "bert" else "transformer")
    tuned.model.eval()
    ids = torch.randint(3, 64, (1, 5), generator=torch.Generator().manual_seed(2))
    junk = torch.tensor([[1, 1, 1, 1]])  # roberta itself tells padding by this id
    right, left = torch.cat([ids, junk], 1), torch.cat([junk, ids], 1)
    between = torch.cat([junk[:, :2], ids[:, :3], junk[:, :2], ids[:, 3:]], 1)
    ones, zeros = torch.ones(1, 5).long(), torch.zeros(1, 4).long()
    cases = [(ids, ones), (right, torch.cat([ones, zeros], 1)), (left, torch.cat([zeros, ones], 1))]
    cases.append((between, torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1]])))
    with torch.no_grad():
        plain = tuned.model(input_ids=ids)
        views = tuned.model.features({"input_ids": ids})
        for padded, mask in cases:
            found = tuned.model(input_ids=padded, attention_mask=mask)
            torch.testing.assert_close(found.logits, plain.logits, rtol=0, atol=1e-5)
            given = to_front({"input_ids": padded, "attention_mask": mask})
            for a, b in zip(tuned.model.features(given), views, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_default_pools():
    found = {name: attach(make(name)).model.how for name in MODELS}
    expected = {"bert": "mean", "llama": "last", "gpt2": "last", "roberta": "mean", "albert": "mean", "t5": "mean"}
    assert found == expected and attach(vit()).model.how == "cls"


def test_to_front_keeps_order_and_moves_what_stands_beside():
    batch = {
        "input_ids": torch.tensor([[9, 4, 9, 5], [6, 7, 8, 9]]),
        "token_type_ids": torch.tensor([[0, 1, 0, 2]] * 2),
    }
    batch |= {"attention_mask": torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]]), "other": torch.tensor([1, 2])}
    kept = {name: value.clone() for name, value in batch.items()}
    found = to_front(batch)
    assert found["input_ids"].tolist() == [[4, 5, 9, 9], [6, 7, 8, 9]]
    assert found["token_type_ids"].tolist() == [[1, 2, 0, 0], [0, 1, 0, 2]]
    assert found["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert all(torch.equal(batch[name], kept[name]) for name in batch)


# -- the cache


def test_cached_features_give_the_same_and_the_backbone_never_runs():
    batch = text(12)
    plain = attach(make(), lambda: [batch])
    parts = [{n: v[i : i + 5] for n, v in batch.items()} for i in (0, 5, 10)]
    cached = attach(make(), lambda: parts, cache_features=True)
    assert len(cached.model.cache) == 12
    runs = []
    cached.base_model.bert.register_forward_hook(lambda *_: runs.append(1))
    shuffled = {n: v[torch.tensor([7, 3, 3, 11, 0])] for n, v in batch.items()}
    pairs = zip(shuffled["input_ids"], shuffled["attention_mask"], strict=True)
    ids = torch.stack([torch.cat([row[~mask.bool()], row[mask.bool()]]) for row, mask in pairs])
    left = {**shuffled, "input_ids": ids, "attention_mask": shuffled["attention_mask"].flip(1)}
    for given in (batch, shuffled, left):
        for tuned in (plain, cached):
            tuned.model.eval()
        a, b = plain.model(**given), cached.model(**given)
        torch.testing.assert_close(a.member_logits, b.member_logits, rtol=0, atol=1e-6)
    train(cached, batch, 3)
    assert not runs
    new = text(2, seed=9)
    cached.model(**new)
    cached.model(**new)
    assert len(runs) == 1 and len(cached.model.cache) == 14


def test_half_precision_is_close_and_half_as_large(tmp_path):
    batch = text(4)
    for stored, size in (("float32", 4), ("float16", 2)):
        tuned = attach(make(), lambda: [batch], cache_features=stored, cache_folder=str(tmp_path))
        (plain,) = attach(make(), layers=(6,)).model.features(inputs(batch))[:1]
        found = tuned.model.features(inputs(batch))[-1]
        torch.testing.assert_close(found, plain, rtol=1e-3 if size == 2 else 0, atol=1e-4 if size == 2 else 1e-6)
        assert (tuned.model.cache.folder / "values.bin").stat().st_size == 4 * 4 * 32 * size
        tuned.detach()


def test_a_cache_is_found_again_and_never_by_another_backbone(tmp_path):
    batch, options = text(5), {"cache_features": True, "cache_folder": str(tmp_path)}
    first = attach(make(), lambda: [batch], **options)
    with pytest.raises(InputError, match="another process or tuning holds"):
        attach(make(), lambda: [batch], **options)
    first.detach()
    assert len(attach(make(), **options).model.cache) == 5
    assert len(attach(make(seed=1), **options).model.cache) == 0
    assert len(attach(make(), layers=(1, 2), **options).model.cache) == 0
    assert len(attach(make(), pool="cls", **options).model.cache) == 0


def test_a_torn_cache_keeps_what_is_whole(tmp_path):
    cache = FeatureCache(tmp_path, identity="x", width=3)
    keys, values = [bytes([i]) * 16 for i in range(4)], torch.arange(12.0).view(4, 3)
    cache.put(keys, values)
    cache.close()
    with (cache.folder / "values.bin").open("r+b") as file:
        file.truncate(3 * 12 + 5)
    again = FeatureCache(tmp_path, identity="x", width=3)
    assert len(again) == 3 and keys[3] not in again
    again.put(keys, values + 100)  # only the missing one is written
    assert torch.equal(again.get([keys[3], keys[0]]), torch.stack([values[3] + 100, values[0]]))


def test_a_temporary_cache_goes_and_what_does_not_fit_is_refused():
    cache = FeatureCache(None, identity="x", width=1, dtype="float16")
    with pytest.raises(InputError, match="not finite as float16"):
        cache.put([b"a" * 16], torch.tensor([[1e6]]))
    with pytest.raises(KeyError):
        cache.get([b"a" * 16])
    folder = cache.folder
    cache.close()
    assert not folder.exists()


def test_a_rows_key_is_its_content():
    ids = torch.tensor([[5, 6, 0], [5, 6, 7], [6, 5, 0]])
    a = row_keys({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]])})
    b = row_keys({"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]])})
    assert a[0] == b[0] and len(set(a)) == 3
    assert row_keys({"input_ids": ids[:1, :2], "token_type_ids": ids[:1, :2]}) != b
    assert row_keys({"x": torch.tensor([[1.0]])}) != row_keys({"x": torch.tensor([[-1.0]])})
