"""A whole run on preference rows: the six stages, with gates, on the tiny model."""

import json
import math

import pytest

from luthier.errors import InputError
from luthier.pipeline.run import run
from luthier.worlds.arithmetic import rows


@pytest.fixture
def pairs_file(tmp_path):
    """`swap` rows: the right answer is chosen over the operands left as they were; the last row's sides are equal."""
    path = tmp_path / "pairs.jsonl"
    lines = []
    for row in rows(skill="swap", count=120, seed=0, part="train"):
        *before, answer = row["messages"]
        wrong = answer["content"][::-1] + "0"
        lines.append({"prompt": before, "chosen": [answer], "rejected": [{"role": "assistant", "content": wrong}]})
    lines.append({**lines[0], "prompt": [{"role": "user", "content": "swap 1 2 ?"}], "rejected": lines[0]["chosen"]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_run_learns_what_is_preferred(tmp_path, recipe, pairs_file):
    """By a list of objectives, with a cached reference."""
    recipe["data"] = {"source": str(pairs_file), "split": [0.8, 0.2, 0.0]}
    objective = [{"method": "dpo", "reference": "cached"}, {"method": "sft", "weight": 0.1}]
    recipe["tune"] |= {"objective": objective}
    recipe["tune"]["train"] |= {"num_train_epochs": 3, "effective_batch_size": 8, "learning_rate": 1e-3}
    result = run(recipe, runs=tmp_path / "runs", until="tune", progress=False)
    assert result.exit_code == 0, result.summary
    assert [f.value for f in result.findings if f.code == "tune.identical_pairs"] == [1]
    tune = json.loads((result.folder / "4-tune/manifest.json").read_text(encoding="utf-8"))
    assert tune["facts"]["phases"][0]["objective"] == "dpo + 0.1 sft"
    lines = (result.folder / "4-tune/phase-1/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first, last = (json.loads(line)["metrics"] for line in (lines[0], lines[-1]))
    assert last["dpo/rewards/accuracy"] > 0.9
    assert last["dpo/rewards/margin"] > first["dpo/rewards/margin"]
    assert last["sft/token_loss"] < first["sft/token_loss"]


@pytest.fixture
def judged_file(tmp_path):
    """Single answers to `swap` questions, one in three of them wrong and labelled so; one is empty."""
    path = tmp_path / "judged.jsonl"
    lines = []
    for number, row in enumerate(rows(skill="swap", count=120, seed=0, part="train")):
        *before, answer = row["messages"]
        good = number % 3 > 0
        said = answer["content"] if good else answer["content"][::-1] + "0"
        lines.append(
            {"prompt": before, "completion": [{"role": "assistant", "content": said if number else ""}], "label": good}
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_run_learns_from_judged_answers(tmp_path, recipe, judged_file):
    recipe["data"] = {"source": str(judged_file), "split": [0.7, 0.2, 0.1], "label_key": "label", "schema": "unpaired"}
    recipe["tune"] |= {"objective": {"method": "kto", "desirable_weight": 0.5}}
    recipe["tune"]["train"] |= {"num_train_epochs": 3, "effective_batch_size": 8, "learning_rate": 1e-3}
    result = run(recipe, runs=tmp_path / "runs", until="tune", progress=False)
    assert result.exit_code == 0, result.summary
    codes = {finding.code: finding for finding in result.findings}
    assert (codes["data.empty_judged_answer"].value, codes["data.no_answer_left"].value) == (1, 1)
    card = json.loads((result.folder / "1-data/datacard.json").read_text(encoding="utf-8"))
    assert card["forms"] == {"desirable": 120} and set(card["labels"]["train"]) == {"true", "false"}
    lines = (result.folder / "4-tune/phase-1/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])["metrics"]
    assert last["rewards/chosen"] > last["rewards/rejected"] + 0.1


def test_fit_takes_a_list_and_judged_rows():
    """`lt.fit` on rows in memory; rows with neither pairs nor verdicts are refused in one sentence."""
    import luthier as lt
    from luthier.models import ModelSettings, load

    def fit(given, objective):
        base = load(ModelSettings(base="package:luthier/worlds/tiny-lm"))
        return lt.fit(base.model, base.tokenizer, given, {"method": "lora", "rank": 2}, objective, {"max_steps": 2})[1]

    talks = [row["messages"] for row in rows(skill="swap", count=24, seed=0, part="train")]
    pairs = [{"prompt": t[:-1], "chosen": t[-1:], "rejected": "no"} for t in talks]
    judged = [{"prompt": t[:-1], "completion": t[-1:], "desirable": n % 2 == 0} for n, t in enumerate(talks)]
    first = fit(pairs, ["dpo", {"method": "sft", "weight": 0.5}])[0]
    assert first.loss == pytest.approx(math.log(2) + 0.5 * first.metrics["sft/token_loss"], abs=1e-5)
    assert fit(judged, "kto")[0].loss == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(InputError, match=r"kto learns from pairs .* row 1 of the data is a single answer"):
        fit([{"messages": talk} for talk in talks], "kto")
