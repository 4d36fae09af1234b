"""Padded, packed and one row at a time are the same sum of losses; packing is trusted only where it is shown exact."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from luthier.data.collate import pack_batch, packing_is_exact, pad_batch
from luthier.errors import InputError

PACKABLE = ["llama", "qwen2", "gemma2", "mistral", "mixtral", "gpt2"]
NOT_PACKABLE = ["bloom", "mamba"]


def examples(seed=0, lengths=(9, 1, 14, 5, 2)):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(1, 97, (length,), generator=generator).tolist()
        start = int(torch.randint(0, length, (), generator=generator))
        made.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return made


def summed_loss(model, batch):
    """Independent of Luthier's objectives: cross-entropy of every label from the position before it."""
    inputs = {name: column for name, column in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum").item()


@pytest.mark.parametrize("name", PACKABLE + NOT_PACKABLE)
def test_batches_of_any_kind_have_the_loss_of_single_rows(name, tiny_model):
    model = tiny_model(name)
    rows = examples()
    alone = sum(summed_loss(model, pad_batch([row], 0)) for row in rows if len(row["input_ids"]) > 1)
    assert summed_loss(model, pad_batch(rows, 0)) == pytest.approx(alone, rel=1e-6)
    assert summed_loss(model, pad_batch(rows, 0, mask=True)) == pytest.approx(alone, rel=1e-6)
    if name in PACKABLE:
        assert summed_loss(model, pack_batch(rows)) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_doubles_agree_to_many_digits(name, tiny_model):
    model = tiny_model(name, torch.float64)
    rows = examples(seed=1)
    alone = sum(summed_loss(model, pad_batch([row], 0)) for row in rows if len(row["input_ids"]) > 1)
    assert summed_loss(model, pad_batch(rows, 0)) == pytest.approx(alone, abs=1e-5)
    assert summed_loss(model, pack_batch(rows)) == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("name", PACKABLE)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_is_found_exact(name, attention, tiny_model):
    model = tiny_model(name)
    if attention == "eager" or name != "gemma2":  # transformers has no sdpa for Gemma 2
        model.set_attn_implementation(attention)
    state = torch.get_rng_state()
    assert packing_is_exact(model)
    assert packing_is_exact(model.train()) and model.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", NOT_PACKABLE)
def test_packing_is_found_not_exact(name, tiny_model):
    assert not packing_is_exact(tiny_model(name))


def test_packing_is_not_trusted_by_name(tiny_model):
    """A Llama whose code no longer hands its positions on is found out."""
    model = tiny_model("llama")
    inner = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **more: inner(*args, **more)
    assert not packing_is_exact(model)
    assert summed_loss(model, pack_batch(examples())) != pytest.approx(
        sum(summed_loss(model, pad_batch([row], 0)) for row in examples() if len(row["input_ids"]) > 1), abs=1e-2
    )


def test_half_precision_is_judged_by_its_rounding(tiny_model):
    assert packing_is_exact(tiny_model("llama", torch.bfloat16))
    assert not packing_is_exact(tiny_model("bloom", torch.bfloat16))


def test_what_batches_hold():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    padded = {name: column.tolist() for name, column in pad_batch(rows, 3, mask=True).items()}
    assert padded == {
        "input_ids": [[5, 6, 7], [8, 3, 3]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert sorted(pad_batch(rows, None)) == ["input_ids", "labels"]
    packed = {name: column.tolist() for name, column in pack_batch(rows).items()}
    assert packed == {"input_ids": [[5, 6, 7, 8]], "labels": [[-100, 6, 7, -100]], "position_ids": [[0, 1, 2, 0]]}
    for empty in ([], [{"input_ids": [], "labels": []}]):
        for collate in (lambda rows: pad_batch(rows, 0), pack_batch):
            with pytest.raises(InputError, match="at least one example"):
                collate(empty)
    assert rows[0]["labels"] == [-100, 6, 7]  # left as they were
