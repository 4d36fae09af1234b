"""One table of laws over all merges that go tensor by tensor. A new merge gets them by one row."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import luthier as lt
from luthier.errors import InputError
from luthier.merge import WholeModelMerge, sources
from luthier.merge.lineup import Step
from luthier.merge.run import lined_up, merged_tensors
from luthier.methods import build, find, table
from luthier.weights import Weights


@dataclass(frozen=True)
class Row:
    """A merge with settings, and which laws hold for it.

    Attributes:
        identity: settings under which a single model comes out as it went in; None if there are none.
        nothing: settings under which the base comes out bit for bit; None if there are none.
        same: settings under which K copies of a model give that model; None if there are none.
        ordered: whether the order of the models matters.
        count: models it is tried on.
        takes_base: name of a setting that takes the base too.
    """

    settings: dict[str, Any]
    identity: dict[str, Any] | None = field(default_factory=dict)
    nothing: dict[str, Any] | None = field(default_factory=lambda: {"scale": 0.0})
    same: dict[str, Any] | None = field(default_factory=dict)
    ordered: bool = False
    count: int = 3
    takes_base: str | None = None

    def __str__(self):
        return "-".join(str(value) for value in self.settings.values())


EVERYTHING = {"density": 1.0, "drop_top": 0.0}  # of breadcrumbs: nothing is left out
ALL = {"density": 1.0, "exclude": ()}
TABLE = [
    Row({"method": "linear"}, nothing=None),
    Row({"method": "linear", "weights": (0.5, 0.3, 0.9)}, identity=None, nothing=None, ordered=True),
    Row({"method": "patch", "density": 0.1}, identity=ALL, nothing=None, same=ALL, count=1),
    Row({"method": "soup"}, nothing=None),
    Row({"method": "soup", "weights": (0.5, 0.3, 0.9)}, identity=None, nothing=None, ordered=True),
    Row({"method": "task-arithmetic"}, identity={"scale": 1.0}, same={"scale": 1 / 3}),
    Row({"method": "ties"}, identity={"density": 1.0}, same={"density": 1.0}),
    Row({"method": "ties", "scope": "tensor"}, identity={"density": 1.0}, same={"density": 1.0}),
    Row({"method": "ties", "agg": "max", "trim": "reference"}, identity={"density": 1.0}, same={"density": 1.0}),
    Row(
        {"method": "lines", "beta": 0.5},
        identity={"alpha": 1.0, "beta": 0.0},
        nothing={"alpha": 0.0, "beta": 0.0},
        same={"alpha": 1 / 3, "beta": 0.0},
    ),
    Row(
        {"method": "lines", "beta": 0.5, "inner": {"method": "ties"}},
        identity={"alpha": 1.0, "beta": 0.0, "inner": {"method": "ties", "density": 1.0}},
        nothing={"alpha": 0.0, "beta": 0.0},
        same={"alpha": 1.0, "beta": 0.0, "inner": {"method": "ties", "density": 1.0}},
    ),
    Row({"method": "slerp"}, identity=None, nothing=None, count=2),
    Row({"method": "slerp", "norm": "geometric", "t": (0.2, 0.6)}, None, None, ordered=True, count=2),
    Row({"method": "transfer", "source_base": "old"}, count=1, takes_base="source_base"),
    Row({"method": "breadcrumbs"}, identity=EVERYTHING | {"scale": 1.0}, same=EVERYTHING | {"scale": 1 / 3}),
    Row(
        {"method": "breadcrumbs", "scope": "row", "order": "keep_first"},
        identity=EVERYTHING | {"scale": 1.0},
        same=EVERYTHING | {"scale": 1 / 3},
    ),
    Row({"method": "breadcrumbs", "sign_consensus": True}, identity=EVERYTHING | {"scale": 1.0}, same=None),
    Row({"method": "pcb"}, identity=None, same=None),
    Row({"method": "pcb", "inter": "sum_normalized", "clip_quantile": 0.0}, identity=None, same=None),
]
ROWS = pytest.mark.parametrize("row", TABLE, ids=str)


def run(row, base, models, out=None, **settings):
    kind = find("merge", row.settings["method"])
    given = {"base": base} if kind.needs_base else {}
    if row.takes_base:
        settings[row.takes_base] = base
    return lt.merge(row.settings | settings, models=models, out=out, **given)


def equal(a, b):
    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_the_table_holds_every_merge_of_tensors():
    of_tensors = {n for n in table("merge") if not issubclass(find("merge", n), WholeModelMerge)}
    assert {row.settings["method"] for row in TABLE} == of_tensors


@ROWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_model_merges_to_itself(row, dtype, models):
    if row.identity is None or row.count == 2:
        pytest.skip("no settings of it give this")
    base, (model,) = models(1, dtype)
    merged = run(row, base, [model], **row.identity).tensors
    for name, tensor in model.items():
        if dtype == torch.bfloat16 or not tensor.is_floating_point():
            assert bits(merged[name]) == bits(tensor), name
        else:  # base + (model - base) is rounded twice
            assert torch.allclose(merged[name], tensor, rtol=0, atol=2**-22 * float(tensor.abs().max())), name


@ROWS
def test_copies_of_a_model_merge_to_it(row, models):
    if row.same is None:
        pytest.skip("no settings of it give this")
    base, (model,) = models(1)
    merged = run(row, base, [model] * row.count, **row.same).tensors
    for name, tensor in model.items():
        assert torch.allclose(merged[name].double(), tensor.double(), rtol=1e-6, atol=1e-6), name


@ROWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale_0_is_the_base_bit_for_bit(row, dtype, models):
    if row.nothing is None:
        pytest.skip("no settings of it give this")
    base, several = models(row.count, dtype)
    assert equal(run(row, base, several, **row.nothing).tensors, base)


@ROWS
def test_the_order_of_models_does_not_matter(row, models):
    if row.ordered:
        pytest.skip("it does, by definition")
    base, several = models(row.count)
    there, back = run(row, base, several).tensors, run(row, base, several[::-1]).tensors
    for name in base:
        assert torch.allclose(there[name].double(), back[name].double(), rtol=1e-6, atol=1e-6), name


@ROWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_and_buffers_are_kept_and_inputs_left_alone(row, dtype, models):
    base, several = models(row.count, dtype)
    before = [{n: bits(t) for n, t in state.items()} for state in (base, *several)]
    merged = run(row, base, several).tensors
    assert [{n: bits(t) for n, t in state.items()} for state in (base, *several)] == before
    assert {n: (t.dtype, t.shape) for n, t in merged.items()} == {n: (t.dtype, t.shape) for n, t in base.items()}
    assert torch.equal(merged["steps"], base["steps"])


@ROWS
def test_tiles_of_any_size_give_the_same(row, models, monkeypatch):
    base, several = models(row.count)
    whole = run(row, base, several).tensors
    monkeypatch.setattr(sources.blocks_of, "__defaults__", (32,))
    assert equal(run(row, base, several).tensors, whole)


@ROWS
def test_files_give_what_memory_gives(row, tmp_path, models):
    base, several = models(row.count, torch.bfloat16)
    paths = []
    for number, state in enumerate([base, *several]):
        folder = tmp_path / f"model-{number}"
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        paths.append(folder)
    result = run(row, paths[0], paths[1:], out=tmp_path / "merged")
    written = {name: tensor.clone() for name, tensor in Weights.open(tmp_path / "merged").items()}
    assert equal(written, run(row, base, several).tensors)
    assert (tmp_path / "merged/merge.json").is_file()
    assert [told["name"] for told in result.report["models"]][: row.count] == [str(path) for path in paths[1:]]


@ROWS
def test_what_does_not_fit_is_named(row, models):
    base, several = models(row.count)
    lacking = {n: t for n, t in several[0].items() if n != "layers.2.mlp.bias"}
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.bias"):
        run(row, base, [lacking, *several[1:]])
    wider = several[0] | {"norm.weight": torch.ones(17)}
    with pytest.raises(InputError, match=r"norm\.weight \[16\] and \[17\]|norm\.weight \[17\] and \[16\]"):
        run(row, base, [wider, *several[1:]])
    counted = several[0] | {"steps": torch.tensor([1, 2])}
    with pytest.raises(InputError, match="steps"):
        run(row, base, [counted, *several[1:]])
    for bad in (float("nan"), float("inf")):
        broken = {n: t.clone() for n, t in several[0].items()}
        broken["layers.1.attn.weight"][3, 4] = bad
        with pytest.raises(InputError, match=r"layers\.1\.attn\.weight holds values"):
            run(row, base, [broken, *several[1:]])


@ROWS
def test_settings_are_read_back(row):
    built = build("merge", row.settings)
    assert build("merge", built.model_dump(mode="json")) == built


@ROWS
def test_a_survey_serves_all_scales_where_the_method_says_so(row, models, monkeypatch):
    if "scale" not in find("merge", row.settings["method"]).after_survey:
        pytest.skip("it does not")
    first, later = (build("merge", row.settings | {"scale": scale}) for scale in (0.7, 1.1))
    base, several = models(row.count)
    step = Step(first, lined_up(first, several, base), keep=True)
    merged_tensors(step)
    wanted = run(row, base, several, scale=1.1).tensors
    monkeypatch.setattr(type(first), "survey", lambda *_: pytest.fail("it was surveyed again"))
    assert equal(merged_tensors(step.again(later)), wanted)
