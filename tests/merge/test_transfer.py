"""Fine-tuning transfer: its own laws, mergekit's linear merge as the judge, padding, configs and tokens."""

import json

import pytest
import torch
from safetensors.torch import save_file

import luthier as lt
from luthier.errors import InputError
from luthier.merge import sources
from luthier.merge.transfer import Transfer
from luthier.merge.valley import barrier, change_cosine
from luthier.weights import Weights


@pytest.fixture
def three(models):
    """A new base, an old one, and the old one tuned."""

    def make(dtype=torch.float32):
        old, (new, tuned) = models(2, dtype)
        return new, old, tuned

    return make


def wider(state, rows, seed=9):
    """The state with more rows of vocabulary: embedding and head, and a bias of the head."""
    draw = torch.Generator().manual_seed(seed)
    embed = torch.cat([state["embed.weight"], torch.randn(rows, 16, generator=draw)]) if rows else state["embed.weight"]
    return state | {"embed.weight": embed, "head.weight": embed * 0.5, "head.bias": embed[:, 0].clone()}


def floats(state):
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def moved(new, old, tuned, **settings):
    return lt.merge(Transfer(source_base=old, **settings), base=new, models=[tuned])


def test_equal_to_mergekits_linear(three):
    """Weights 1, 1, -1 of target, tuned and source base."""
    kit, base = (
        pytest.importorskip("mergekit.merge_methods.registry"),
        pytest.importorskip("mergekit.merge_methods.base"),
    )
    new, old, tuned = three()
    merged = moved(new, old, tuned).tensors
    for name in floats(new):
        batch = base.TensorBatch([state[name][None] for state in (new, tuned, old)])
        weights = torch.tensor([[1.0, 1.0, -1.0]])
        (expected,) = kit.get("linear").implementation(batch, weight=weights, normalize=False)
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_a_base_to_itself_is_the_tuned_model_bit_for_bit(three, dtype):
    _, old, tuned = three(dtype)
    merged = moved(old, old, tuned).tensors
    assert all(torch.equal(merged[name], tuned[name]) for name in tuned)


def test_linear_in_scale_and_back_again(three):
    new, old, tuned = three()
    half, whole = moved(new, old, tuned, scale=0.5).tensors, moved(new, old, tuned).tensors
    back = moved(whole, old, tuned, scale=-1.0).tensors
    for name in floats(new):
        torch.testing.assert_close(2 * (half[name] - new[name]), whole[name] - new[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(back[name], new[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("elements", [2**18, 40])
def test_new_tokens_get_scale_times_the_tuned_rows(three, scale, elements, monkeypatch):
    monkeypatch.setattr(sources.blocks_of, "__defaults__", (elements,))
    new, old, tuned = three()
    new, old, tuned = wider(new, 0), wider(old, 0), wider(tuned, 3)
    result = moved(new, old, tuned, scale=scale)
    for name in ("embed.weight", "head.weight", "head.bias"):
        merged = result.tensors[name]
        assert merged.shape == tuned[name].shape
        torch.testing.assert_close(merged[50:], scale * tuned[name][50:])
        expected = new[name] + scale * (tuned[name][:50] - old[name])
        torch.testing.assert_close(merged[:50], expected, rtol=1e-6, atol=1e-6)
    (padded,) = [finding for finding in result.findings if finding.code == "merge.padded"]
    assert padded.value == {"embed.weight": 3, "head.weight": 3, "head.bias": 3}


def test_only_the_named_tensors_move(three):
    new, old, tuned = three()
    merged = moved(new, old, tuned, include=("attn", "mlp"), exclude=("layers.0.*",)).tensors
    for name in floats(new):
        chosen = ("attn" in name or "mlp" in name) and not name.startswith("layers.0.")
        assert torch.equal(merged[name], new[name]) != chosen, name


def test_norms_of_the_change_are_in_the_report_by_block(three):
    new, old, tuned = three()
    report = moved(new, old, tuned).report
    for block in range(4):
        names = [name for name in floats(new) if name.startswith(f"layers.{block}.")]
        expected = sum(float((tuned[name] - old[name]).square().sum()) for name in names) ** 0.5
        assert report["blocks"]["norm"][block] == [pytest.approx(expected, rel=1e-5)]


def test_what_it_refuses(three):
    new, old, tuned = three()
    with pytest.raises(InputError, match="50 rows of vocabulary, the tuned model 53"):
        moved(wider(new, 0), wider(old, 0), wider(tuned, 3), vocab="strict")
    for mode in ("pad", "strict"):
        with pytest.raises(InputError, match="55 rows of vocabulary, the tuned model 53"):
            moved(wider(new, 5), wider(old, 3), wider(tuned, 3), vocab=mode)
    with pytest.raises(InputError, match="other tensors"):
        moved(new, {n: t for n, t in old.items() if n != "norm.weight"}, tuned)
    with pytest.raises(InputError, match=r"takes 1 models"):
        lt.merge(Transfer(source_base=old), base=new, models=[tuned, tuned])
    with pytest.raises(InputError, match="none is given"):
        lt.merge(Transfer(source_base=old), models=[tuned])
    with pytest.raises(InputError, match=r"'attention'"):
        moved(new, old, tuned, exclude=("attention",))
    with pytest.raises(ValueError, match="made from"):
        Transfer(source_base=None)
    broken = old | {"norm.weight": torch.full((16,), float("nan"))}
    with pytest.raises(InputError, match=r"source_base: norm\.weight holds values"):
        moved(new, broken, tuned)


def folder_of(path, state, config, tokens, length=None):
    path.mkdir()
    save_file(state, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    vocabulary = {"model": {"vocab": tokens, "type": "BPE"}, "added_tokens": []}
    (path / "tokenizer.json").write_text(json.dumps(vocabulary))
    (path / "generation_config.json").write_text(json.dumps({"of": path.name}))
    return path


def test_config_and_tokenizer_are_the_tuned_models_but_for_positions(three, tmp_path):
    new, old, tuned = three(torch.bfloat16)
    tokens = {f"t{n}": n for n in range(50)}
    config = {"vocab_size": 50, "rope_theta": 10000.0, "max_position_embeddings": 128, "rope_scaling": {"factor": 2}}
    longer = config | {"rope_theta": 500000.0, "max_position_embeddings": 512}
    del longer["rope_scaling"]
    paths = [
        folder_of(tmp_path / "new", new, longer, tokens),
        folder_of(tmp_path / "old", old, config, tokens),
        folder_of(
            tmp_path / "tuned",
            tuned | {"embed.weight": torch.randn(52, 16).bfloat16()},
            config | {"vocab_size": 52, "eos_token_id": 51},
            tokens | {"<ask>": 50, "<end>": 51},
        ),
    ]
    out = tmp_path / "out"
    result = lt.merge(Transfer(source_base=paths[1]), base=paths[0], models=[paths[2]], out=out)
    assert json.loads((out / "config.json").read_text()) == longer | {"vocab_size": 52, "eos_token_id": 51}
    assert (out / "tokenizer.json").read_bytes() == (paths[2] / "tokenizer.json").read_bytes()
    assert json.loads((out / "generation_config.json").read_text()) == {"of": "tuned"}
    assert Weights.open(out)["embed.weight"].shape == (52, 16)
    told = {finding.code: finding.message for finding in result.findings}
    assert (
        "rope_theta 500000.0, not 10000.0" in told["merge.positions"] and "rope_scaling None" in told["merge.positions"]
    )
    assert "merge.tokens" not in told


@pytest.mark.parametrize(("swapped", "refused"), [(0, False), (1, False), (3, True)])
def test_a_renamed_token_is_told_and_another_tokenizer_refused(three, tmp_path, swapped, refused):
    states = three()
    tokens = {f"t{n}": n for n in range(400)}
    other = dict(tokens)
    for n in range(swapped):
        other[f"t{2 * n}"], other[f"t{2 * n + 1}"] = 2 * n + 1, 2 * n
    names = ("new", "old", "tuned")
    paths = [
        folder_of(tmp_path / n, s, {"vocab_size": 50}, other if n == "new" else tokens)
        for n, s in zip(names, states, strict=True)
    ]
    if refused:
        with pytest.raises(InputError, match="6 tokens have another number"):
            moved(*paths)
    else:
        codes = [finding.code for finding in moved(*paths).findings]
        assert ("merge.tokens" in codes) == bool(swapped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "architecture"),
        ({"tie_word_embeddings": False}, "ties its embeddings"),
        ({"quantization_config": {"bits": 4}}, "is quantised"),
    ],
)
def test_models_of_other_kinds_are_refused(three, tmp_path, change, message):
    config = {"vocab_size": 50, "model_type": "llama", "tie_word_embeddings": True}
    for place, name in enumerate(("new", "old")):
        folder = tmp_path / name
        folder.mkdir()
        paths = [
            folder_of(folder / str(n), s, config | (change if n == place else {}), {"a": 0})
            for n, s in enumerate(three())
        ]
        with pytest.raises(InputError, match=message):
            moved(*paths)


def test_the_barrier_of_known_losses():
    a, b = {"x": torch.tensor([-1.0]), "n": torch.tensor([3])}, {"x": torch.tensor([1.0]), "n": torch.tensor([3])}
    hill = barrier(a, b, lambda state: 5 - float(state["x"]) ** 2)
    assert hill.height == pytest.approx(1.0) and len(hill.losses) == 11
    assert barrier(a, b, lambda state: float(state["x"]) ** 2).height == pytest.approx(-(1 - 0.8**2))
    assert barrier(a, b, lambda state: 3 * float(state["x"])).height == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(InputError, match="other tensors"):
        barrier(a, {"y": b["x"]}, lambda state: 0.0)


def test_the_cosine_of_known_changes(three):
    new, old, _ = three()
    along = {n: t + 0.3 * (new[n] - t) if t.is_floating_point() else t for n, t in old.items()}
    against = {n: t - 0.3 * (new[n] - t) if t.is_floating_point() else t for n, t in old.items()}
    assert change_cosine(along, old, new) == pytest.approx(1.0, abs=1e-5)
    assert change_cosine(against, old, new) == pytest.approx(-1.0, abs=1e-5)
    assert change_cosine(old, old, new) == 0.0
