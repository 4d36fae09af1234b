"""What a merge may touch: words for regions, patterns for names, and regions by names where there is no topology."""

import pytest
import torch

import luthier as lt
from luthier.errors import InputError
from luthier.merge.candidates import entries_of, meets
from luthier.merge.depth import region_of_names


def test_words_are_regions_and_all_else_are_patterns_of_names():
    name = "model.layers.3.mlp.up_proj.weight"
    assert meets(name, "feed_forward", ["feed_forward"]) and not meets(name, "feed_forward", ["attention", "heads"])
    assert meets("x", "embedding", ["embeddings"]) and meets("x", "head", ["head"]) and meets("x", "norm", ["norms"])
    assert meets(name, "other", ["up_proj"]) and meets(name, "other", ["*.3.*.weight"])
    assert not meets(name, "other", ["up_proj*"])  # with a star it is a pattern of the whole name
    assert not meets(name, "feed_forward", [])


def test_regions_by_names():
    inside = [f"layers.{n}.{part}.weight" for n in (0, 1) for part in ("head_norm", "embed")]
    region = region_of_names([*inside, "wte.weight", "model.embed_tokens.weight", "lm_head.weight", "ln_f.weight", "x"])
    assert {region(name) for name in inside} == {"other"}
    assert region("wte.weight") == region("model.embed_tokens.weight") == "embedding"
    assert (region("lm_head.weight"), region("ln_f.weight"), region("x")) == ("head", "norm", "other")


def test_a_share_must_be_an_entry():
    assert entries_of(0.3, 10) == 3 and entries_of(1.0, 7) == 7
    with pytest.raises(InputError, match="not one entry"):
        entries_of(0.09, 11)


def test_always_wins_over_the_budget_and_exclude_over_the_share(models):
    base, (tuned,) = models(1)
    run = {"method": "patch", "density": 1.0, "exclude": ("embeddings", "*.mlp.*"), "always": ("layers.0.mlp",)}
    merged = lt.merge(run, base=base, models=[tuned]).tensors
    for name in base:
        whole = "embed" not in name and (".mlp." not in name or "layers.0.mlp" in name)
        assert torch.equal(merged[name], (tuned if whole else base)[name]), name
