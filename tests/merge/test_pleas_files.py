"""PLeaS: wide models are written, rebuilt and loaded; widths that no config can say are refused."""

import pytest
import torch
from tests.merge.pleas_models import KINDS, PLAIN, data, merged, model, outputs
from torch import nn

import luthier as lt
from luthier.errors import InputError
from luthier.merge.pleas import Pleas, rebuild


@PLAIN
def test_a_wide_plain_model_is_rebuilt_from_its_folder(kind, tmp_path):
    a, b, batches = model(kind, 1), model(kind, 2), data(kind)
    result = lt.merge(Pleas(ratio=0.5), models=[a, b], data=batches, out=tmp_path / "merged")
    again = rebuild(tmp_path / "merged", like=KINDS[kind]())
    assert torch.equal(outputs(again, batches[0]), outputs(result.model, batches[0]))
    with pytest.raises(InputError, match="give one of its architecture"):
        rebuild(tmp_path / "merged")
    with pytest.raises(InputError, match=r"holds no pleas\.json"):
        rebuild(tmp_path)
    with pytest.raises(InputError, match="another architecture"):
        rebuild(tmp_path / "merged", like=nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("kind", "ratio"),
    [("llama", {"feed_forward": 0.5, "*": 0.0}), ("llama", 1.0), ("gpt2", {"feed_forward": 0.5, "*": 0.0})],
)
def test_a_wide_transformers_model_loads_as_any_other(kind, ratio, tmp_path):
    from transformers import AutoModelForCausalLM

    a, b, batches = model(kind, 1), model(kind, 2), data(kind)
    result = lt.merge(Pleas(ratio=ratio), models=[a, b], data=batches, out=tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(outputs(again, batches[0]), outputs(result.model, batches[0]), atol=1e-6)
    hidden = result.report["groups"]["feed_forward.0"]["width"]
    assert (again.config.intermediate_size if kind == "llama" else again.config.n_inner) == hidden
    if ratio == 1.0:
        assert again.config.num_attention_heads == 8 and again.config.num_key_value_heads == 4
    assert torch.equal(outputs(rebuild(tmp_path / "merged"), batches[0]), outputs(again, batches[0]))


def test_widths_that_no_config_says_are_refused_with_what_is_possible():
    a, b, batches = model("gpt2", 1), model("gpt2", 2), data("gpt2")
    with pytest.raises(
        InputError, match=r"wider may be only feed_forward.*set ratio to \{feed_forward: 0\.5, \"\*\": 0"
    ):
        merged(a, b, batches, ratio=0.5)
    a, b, batches = model("llama", 1), model("llama", 2), data("llama")
    with pytest.raises(InputError, match="feed_forward at any ratio, attention at ratio 1, equally in all blocks"):
        merged(a, b, batches, ratio=0.5)  # 6 heads do not divide the hidden size
    with pytest.raises(InputError, match="equally in all blocks"):
        merged(a, b, batches, ratio={"feed_forward.0": 0.5, "*": 0.0})
    with pytest.raises(InputError, match="a norm looks at all units of residual"):
        merged(a, b, batches, ratio=0.5, parts=["feed_forward", "residual"])


def test_a_budget_for_a_transformers_model_goes_where_a_config_allows():
    a, b, batches = model("gpt2", 1), model("gpt2", 2), data("gpt2")
    result = merged(a, b, batches, budget=1.2)
    given = result.report["ratio"]
    assert given["attention.0"] == 0 and given["feed_forward.0"] == given["feed_forward.1"] > 0
    assert 1.1 < result.report["cost"] <= 1.2
