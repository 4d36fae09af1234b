"""The search: it finds what is best by construction, surveys no more than it must, and tells all it tried."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file

import luthier as lt
from luthier.errors import InputError
from luthier.merge.search import evolve
from luthier.merge.ties import Ties
from luthier.weights import Weights


def toward(base, several, scale):
    """A score that is best, 0, for task arithmetic at `scale`."""
    names = [n for n in base if base[n].is_floating_point()]
    wanted = {n: base[n] + scale * sum(m[n] - base[n] for m in several) for n in names}
    return lambda merged: -sum(float((merged[n] - wanted[n]).abs().sum()) for n in names)


def test_a_grid_is_tried_whole_and_the_best_of_it_kept(models):
    base, several = models(2)
    found = lt.merge_search(
        {"method": "task-arithmetic", "weights": [1.0, 1.0]},
        base=base,
        models=several,
        evaluate=toward(base, several, 0.62),
        grid=[0.2, 0.4, 0.6, 0.8],
    )
    assert [trial.values for trial in found.trials] == [{"scale": s} for s in (0.2, 0.4, 0.6, 0.8)]
    assert found.settings.scale == 0.6 and found.score == max(trial.score for trial in found.trials)
    again = lt.merge(found.settings, base=base, models=several)
    assert all(torch.equal(again.tensors[n], found.merged.tensors[n]) for n in base)
    assert found.merged.report["search"]["trials"][1] == {
        "values": {"scale": 0.4},
        "score": found.trials[1].score,
    }


def test_all_combinations_are_tried_with_a_survey_for_each_density_and_none_for_a_scale(models, monkeypatch):
    base, several = models(2)
    surveys, survey = [], Ties.survey
    monkeypatch.setattr(Ties, "survey", lambda self, tiles: surveys.append(self.density) or survey(self, tiles))
    seen = []
    found = lt.merge_search(
        "ties",
        base=base,
        models=several,
        evaluate=lambda merged: seen.append(merged) or -len(seen),
        grid={"scale": [0.5, 1.0, 1.5], "density": [0.2, 0.5]},
    )
    assert surveys == [0.2, 0.5, 0.2]  # the last for the merge that is handed back
    assert sorted((t.values["scale"], t.values["density"]) for t in found.trials) == [
        (s, d) for s in (0.5, 1.0, 1.5) for d in (0.2, 0.5)
    ]
    for trial, merged in zip(found.trials, seen, strict=True):
        alone = lt.merge(Ties(**trial.values), base=base, models=several).tensors
        assert all(torch.equal(alone[n], merged[n]) for n in base)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_search_over_scale_surveys_once(scope, models, monkeypatch):
    base, several = models(2)
    surveys, survey = [], Ties.survey
    monkeypatch.setattr(Ties, "survey", lambda self, tiles: surveys.append(1) or survey(self, tiles))
    lt.merge_search(Ties(scope=scope), base=base, models=several, evaluate=lambda _: 0.0, bounds=(0.5, 2.0), budget=7)
    once = sum(tensor.is_floating_point() for tensor in base.values()) if scope == "tensor" else 1
    assert len(surveys) == once


@pytest.mark.parametrize("optimizer", ["grid", "random"])
def test_of_equal_scores_the_earlier_is_kept(optimizer, models):
    base, several = models(2)
    found = lt.merge_search(
        "ties", base=base, models=several, evaluate=lambda _: 1.0, grid=[1.3, 0.9, 1.1], optimizer=optimizer
    )
    assert len(found.trials) == 3 and {"scale": found.settings.scale} == found.trials[0].values


@pytest.mark.parametrize("optimizer", ["random", "es"])
def test_bounds_give_each_model_a_number_and_the_same_seed_the_same_trials(optimizer, models):
    base, several = models(3)
    given = {"base": base, "models": several, "evaluate": toward(base, several, 0.4), "bounds": (0.8, 1.3)}
    first, again, other = (
        lt.merge_search("pcb", **given, budget=9, seed=seed, optimizer=optimizer).trials for seed in (1, 1, 2)
    )
    assert first == again != other and len(first) == 9
    for trial in first:
        assert len(trial.values["scale"]) == 3 and all(0.8 <= number <= 1.3 for number in trial.values["scale"])
    if optimizer == "es":
        assert first[0].values["scale"] == pytest.approx((1.2, 1.2, 1.2))  # as the settings are given


def test_evolution_finds_a_corner_and_an_inner_point():
    for target in ([0.3, 0.7, 0.5], [0.0, 1.0, 0.1]):
        points = evolve([0.5] * 3, random.Random(0))
        point, best = next(points), []
        for _ in range(200):
            error = sum((x - t) ** 2 for x, t in zip(point, target, strict=True))
            best.append(error)
            assert all(0 <= x <= 1 for x in point)
            point = points.send(-error)
        assert min(best) < 1e-4


def test_evolution_beats_its_start_on_scales_of_each_model(models):
    base, several = models(2)
    names = [n for n in base if base[n].is_floating_point()]
    wanted = {n: base[n] + 0.9 * (several[0][n] - base[n]) + 0.2 * (several[1][n] - base[n]) for n in names}
    found = lt.merge_search(
        {"method": "task-arithmetic", "scale": 1.0, "weights": [0.5, 0.5]},
        base=base,
        models=several,
        evaluate=lambda merged: -sum(float((merged[n] - wanted[n]).square().sum()) for n in names),
        bounds={"weights": (0.0, 1.0)},
        budget=100,
    )
    assert found.settings.weights == pytest.approx((0.9, 0.2), abs=0.02)


def test_folders_are_judged_as_folders_and_only_the_best_stays(tmp_path, models):
    base, several = models(2, torch.bfloat16)
    paths = []
    for number, state in enumerate([base, *several]):
        (tmp_path / f"model-{number}").mkdir()
        save_file(state, tmp_path / f"model-{number}" / "model.safetensors")
        (tmp_path / f"model-{number}" / "notes.txt").write_text(f"{number}")
        paths.append(tmp_path / f"model-{number}")
    judged = []

    def evaluate(folder):
        judged.append(folder)
        assert (folder / "notes.txt").read_text() == "0"
        score = toward(base, several, 0.6)({n: t.clone() for n, t in Weights.open(folder).items()})
        return float("nan") if len(judged) == 2 else score

    out = tmp_path / "deep" / "best"
    found = lt.merge_search(
        "task-arithmetic", base=paths[0], models=paths[1:], evaluate=evaluate, grid=[0.1, 0.6, 0.5, 1.0], out=out
    )
    assert found.settings.scale == 0.5 and found.trials[1].score is None
    assert found.merged.folder == out and not any(folder.exists() for folder in judged)
    assert sorted(path.name for path in out.parent.iterdir()) == ["best"]
    told = json.loads((out / "merge.json").read_text())
    assert told["method"]["scale"] == 0.5 and len(told["search"]["trials"]) == 4
    alone = lt.merge(found.settings, base=base, models=several).tensors
    assert all(torch.equal(tensor, alone[n]) for n, tensor in Weights.open(out).items())


def test_a_fault_of_the_judge_leaves_nothing(tmp_path, models):
    base, several = models(2)
    with pytest.raises(ZeroDivisionError):
        lt.merge_search("ties", base=base, models=several, evaluate=lambda _: 1 / 0, grid=[1.0], out=tmp_path / "best")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong,said",
    [
        ({"grid": {"scael": [1.0]}}, "no setting 'scael'.*scale"),
        ({"grid": {"density": [0.2, 1.5]}}, "does not take"),
        ({"grid": {"density": []}}, "no values"),
        ({"grid": {}}, "nothing is named"),
        ({"grid": [1.0], "bounds": (0.0, 1.0)}, "either grid or bounds"),
        ({}, "either grid or bounds"),
        ({"grid": [1.0, 2.0], "budget": 1}, "2 points, the budget is 1"),
        ({"grid": [1.0], "optimizer": "es"}, "needs bounds"),
        ({"bounds": (0.0, 1.0), "optimizer": "grid"}, "needs a grid"),
        ({"bounds": (1.0, 0.0)}, "from low to high"),
        ({"bounds": {"weights": [(0.0, 1.0)]}}, "1 bounds for 2 models"),
        ({"bounds": (0.0, 1.0), "budget": 0}, "at least one trial"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_tried(wrong, said, models):
    base, several = models(2)
    with pytest.raises(InputError, match=said):
        lt.merge_search("ties", base=base, models=several, evaluate=lambda _: pytest.fail("it was tried"), **wrong)


def test_no_score_at_all_is_an_error(models):
    base, several = models(2)
    with pytest.raises(InputError, match="none of 2 trials"):
        lt.merge_search("ties", base=base, models=several, evaluate=lambda _: float("nan"), grid=[1.0, 2.0])
