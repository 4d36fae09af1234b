"""The whole pipeline on the shipped tiny model: all seven stages, skipping, resuming, and six sabotages."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from luthier.errors import InputError
from luthier.models import ModelSettings, load
from luthier.pipeline.plan import plan
from luthier.pipeline.recipe import load_recipe
from luthier.pipeline.run import resume, run
from luthier.pipeline.stage import STAGES, read_manifest
from luthier.tune.low_rank_sparse import load_update
from luthier.weights.selection import Selection

HERE = {"progress": False}


def codes(result, level="error"):
    return [f.code for f in result.findings if f.level == level]


def manifests(folder):
    return {s: m for n, s in enumerate(STAGES, 1) if (m := read_manifest(folder / f"{n}-{s}"))}


def request_log(path, texts):
    path.write_text("".join(json.dumps({"prompt": t, "response": "ok"}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from importlib import util

    spec = util.spec_from_file_location("recipes_of_this_folder", Path(__file__).with_name("conftest.py"))
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runs = tmp_path_factory.mktemp("runs")
    return module.RECIPE, run(module.RECIPE, runs=runs, **HERE)


def test_a_run_learns_and_is_released(finished):
    _, result = finished
    assert result.exit_code == 0, result.summary
    assert set(manifests(result.folder)) == set(STAGES) - {"monitor"}
    tasks = {t["name"]: t for t in manifests(result.folder)["evaluate"].facts["tasks"]}
    assert tasks["swap"]["low"] > 0
    assert (result.folder / "report.html").is_file() and (result.folder / "report.md").is_file()
    assert len((result.folder / "metrics.jsonl").read_text().splitlines()) > 10
    facts = manifests(result.folder)["deploy"].facts
    assert facts["prompts_identical"] and facts["logits_max_difference"] < 1e-3


def test_the_same_recipe_gives_the_same_manifests(finished, tmp_path):
    recipe, first = finished
    second = run(recipe, runs=tmp_path, **HERE)
    a, b = manifests(first.folder), manifests(second.folder)
    for stage in set(STAGES) - {"monitor"}:
        assert (a[stage].key, a[stage].outputs) == (b[stage].key, b[stage].outputs), stage


def test_one_changed_key_runs_only_what_depends_on_it(finished):
    recipe, first = finished
    second = run(recipe, ["evaluate.resamples=1500"], runs=first.folder.parent, **HERE)
    reused = {stage for stage, m in manifests(second.folder).items() if m.reused_from}
    assert second.folder != first.folder and second.exit_code == 0
    assert {"model", "environment", "tune"} <= reused and "evaluate" not in reused


def test_resume_after_a_cut_equals_the_uninterrupted_run(finished, tmp_path):
    _, first = finished
    copy = tmp_path / first.folder.name
    shutil.copytree(first.folder, copy)
    tune = copy / "4-tune"
    (tune / "manifest.json").unlink()
    shutil.rmtree(tune / "tuned")
    for later in ("5-evaluate", "6-deploy"):
        shutil.rmtree(copy / later)
    steps = sorted((tune / "phase-1" / "checkpoints").glob("step-*"))
    assert len(steps) >= 2
    shutil.rmtree(steps[-1])
    again = resume(copy, **HERE)
    assert again.exit_code == 0
    assert manifests(copy)["tune"].outputs == manifests(first.folder)["tune"].outputs


def test_until_stops_and_merge_releases_a_model(finished):
    recipe, first = finished
    result = run(recipe, runs=first.folder.parent, until="environment", **HERE)
    assert list(manifests(result.folder)) == ["data", "model", "environment"]
    merged = run(recipe, ["deploy.merge=true"], runs=first.folder.parent, **HERE)
    assert merged.exit_code == 0 and manifests(merged.folder)["deploy"].facts["kind"] == "model"


def test_phases_follow_each_other(recipe, tmp_path):
    phase = recipe["tune"]
    recipe["tune"] = [phase, {"method": "full", "train": {**phase["train"], "learning_rate": 1e-4, "max_steps": 6}}]
    result = run(recipe, runs=tmp_path, until="evaluate", **HERE)
    assert result.exit_code == 0, result.summary
    facts = manifests(result.folder)["tune"].facts
    assert [p["method"] for p in facts["phases"]] == ["lora", "full"] and facts["format"] == "model"


def test_a_phase_goes_on_with_the_update_of_the_one_before(recipe, tmp_path):
    train = {**recipe["tune"]["train"], "learning_rate": 1e-2, "num_train_epochs": 1}
    recipe["tune"] = [
        {"method": "dsee", "r": 4, "num_sparse": 16, "train": train},
        {"method": "dsee_prune", "density": 0.9, "adapted_density": 0.9, "score": "weight", "train": train},
    ]
    result = run(recipe, runs=tmp_path, until="evaluate", **HERE)
    assert result.exit_code == 0, result.summary
    facts = manifests(result.folder)["tune"].facts
    assert [p["method"] for p in facts["phases"]] == ["dsee", "dsee_prune"] and facts["format"] == "model"
    assert facts["phases"][0]["trainable"] == facts["phases"][1]["trainable"]
    assert [p["trainable_parameters"] for p in plan(recipe)["tune"]] == [p["trainable"] for p in facts["phases"]]
    tuned = result.folder / "4-tune" / "tuned"
    base = load(ModelSettings(base=recipe["model"]["base"])).model
    alone, whole = load_update(base, tuned), AutoModelForCausalLM.from_pretrained(tuned)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(alone(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=0, atol=1e-4)
    mask = Selection.load(tuned / "mask.safetensors")
    assert abs(mask.density - 0.9) < 1e-3
    # Cut off in the second phase, it takes up the first one's update again and ends with the same bits.
    again = tmp_path / "again"
    shutil.copytree(result.folder, again)
    shutil.rmtree(again / "5-evaluate")
    (again / "4-tune" / "manifest.json").unlink()
    last = max((again / "4-tune" / "phase-2" / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))
    shutil.rmtree(last)
    assert resume(again, until="evaluate", **HERE).exit_code == 0
    for name in ("model.safetensors", "dsee.safetensors", "mask.safetensors"):
        assert (again / "4-tune" / "tuned" / name).read_bytes() == (tuned / name).read_bytes(), name


def test_a_tuning_that_follows_another_says_so(recipe):
    phase = recipe["tune"]
    for wrong in ([{"method": "dsee_prune"}], [phase, {"method": "dsee_prune"}]):
        recipe["tune"] = wrong
        with pytest.raises(InputError, match="dsee_prune goes on after dsee, and"):
            load_recipe(recipe)


def test_what_a_delta_can_take_is_said_before_training(recipe, tmp_path):
    """LISA with a block at a time: more with each draw."""
    train = recipe["tune"]["train"]
    del train["save_steps"]
    tune = {"method": "lisa", "active_layers": 1, "interval": 1, "train_lm_head": False, "train_embeddings": False}
    sizes = {}
    for steps in (1, 2):
        recipe["tune"] = [
            {**tune, "train": {**train, "max_steps": steps, "learning_rate": 1e-3}},
            {"method": "full", "train": train},
        ]
        said = []
        result = run(recipe, runs=tmp_path, until="environment", say=said.append, **HERE)
        told = next(f for f in result.findings if f.code == "environment.delta")
        assert any(told.message in line for line in said) and "the first phase" in told.message
        sizes[steps] = told.value
    model = load(ModelSettings(base="package:luthier/worlds/tiny-lm")).model
    block = sum(p.nbytes for n, p in model.named_parameters() if ".layers.0." in n)
    assert sizes == {1: block + 512, 2: 2 * block + 512}


def test_no_forgetting_check_is_said_first(recipe, tmp_path):
    recipe["evaluate"]["tasks"].pop()
    result = run(recipe, runs=tmp_path, **HERE)
    assert result.summary.startswith("No forgetting check was made")
    assert "evaluate.no_forgetting_check" in codes(result, "warn")


# The six sabotages


def test_sabotage_a_test_row_in_train(recipe, rows_file, tmp_path):
    train = rows_file()
    first = json.loads(train.read_text().splitlines()[0])
    first["messages"][0]["content"] = "  " + first["messages"][0]["content"].upper()
    held_out = tmp_path / "test.jsonl"
    held_out.write_text(json.dumps(first) + "\n", encoding="utf-8")
    recipe["data"] = {"source": str(train), "test_source": str(held_out)}
    result = run(recipe, runs=tmp_path / "runs", **HERE)
    assert result.exit_code == 3 and "data.split_overlap" in codes(result)
    assert list(manifests(result.folder)) == ["data"]
    allowed = resume(result.folder, allow=["data.split_overlap"], until="data", **HERE)
    assert allowed.exit_code == 0 and manifests(result.folder)["data"].findings[0].waived


def test_sabotage_no_loss_tokens(recipe, rows_file, tmp_path):
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    template += "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    (tmp_path / "template.jinja").write_text(template, encoding="utf-8")
    recipe["model"]["chat_template"] = str(tmp_path / "template.jinja")
    result = run(recipe, runs=tmp_path / "runs", **HERE)
    assert result.exit_code == 3 and "data.no_loss_tokens" in codes(result)
    assert list(manifests(result.folder)) == ["data", "model"]


def test_sabotage_vocabulary(recipe, tmp_path):
    from transformers import AutoTokenizer

    from luthier.worlds.tiny import folder

    tokenizer = AutoTokenizer.from_pretrained(folder())
    tokenizer.add_tokens([f"<new-{i}>" for i in range(8)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe["model"]["tokenizer"] = str(tmp_path / "tokenizer")
    result = run(recipe, runs=tmp_path / "runs", **HERE)
    assert result.exit_code == 3 and codes(result) == ["model.vocabulary"]


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_sabotage_learning_rate(recipe, tmp_path, optim):
    train = recipe["tune"]["train"] | {"learning_rate": 10.0, "optim": optim, "lr_scheduler_type": "constant"}
    recipe["tune"] = {"method": "full", "train": train}
    result = run(recipe, runs=tmp_path, **HERE)
    assert result.exit_code == 3
    assert set(codes(result)) & {"environment.not_finite", "tune.loss_did_not_fall", "tune.not_finite"}
    assert "evaluate" not in manifests(result.folder)


def test_sabotage_shuffled_answers(recipe, rows_file, tmp_path):
    rows = [json.loads(line)["messages"] for line in rows_file(count=300).read_text().splitlines()]
    shuffled = [[rows[i][0], rows[(i + 7) % len(rows)][1]] for i in range(len(rows))]
    path = tmp_path / "shuffled.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in shuffled), encoding="utf-8")
    recipe["data"] = {"source": str(path)}
    result = run(recipe, runs=tmp_path / "runs", allow=["evaluate.forgetting"], **HERE)
    assert result.exit_code == 3 and "evaluate.gain" in codes(result)
    assert list(manifests(result.folder))[-1] == "evaluate"


def test_sabotage_drift(finished, tmp_path):
    recipe, first = finished
    strange = [
        f"Please write a long letter about subject number {i} to my landlord, and be polite." for i in range(150)
    ]
    log = request_log(tmp_path / "log.jsonl", strange)
    result = run(recipe, [f"monitor.log={log}"], runs=first.folder.parent, **HERE)
    assert result.exit_code == 3 and set(codes(result)) == {"monitor.drift"}
    assert (result.folder / "7-monitor" / "retrain.yaml").is_file()


def test_no_drift_on_the_reference_itself(finished, tmp_path):
    recipe, first = finished
    lines = (first.folder / "1-data" / "validation.jsonl").read_text().splitlines()
    texts = [json.loads(line)["messages"][0]["content"] for line in lines] * 3
    result = run(
        recipe, [f"monitor.log={request_log(tmp_path / 'log.jsonl', texts)}"], runs=first.folder.parent, **HERE
    )
    assert result.exit_code == 0 and "monitor.drift" not in codes(result, "warn")


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        resume(tmp_path)


def test_the_stored_recipe_is_whole(finished):
    _, result = finished
    stored = yaml.safe_load((result.folder / "recipe.yaml").read_text())
    assert stored["tune"][0]["train"]["adam_beta1"] == 0.9 and stored["environment"]["seed"] == 0


def test_an_adapter_that_changes_nothing_is_found_out(recipe, tmp_path):
    train = recipe["tune"]["train"] | {"learning_rate": 1e-38, "num_train_epochs": 0.2}
    recipe["tune"] = recipe["tune"] | {"train": train}
    result = run(recipe, runs=tmp_path, allow=["tune.loss_did_not_fall", "evaluate.gain"], **HERE)
    assert result.exit_code == 3 and "evaluate.identical" in codes(result)


@pytest.mark.parametrize("kibibytes", [8, 450])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(recipe, tmp_path, kibibytes):
    path, runs = tmp_path / "recipe.yaml", tmp_path / "runs"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({kibibytes * 1024}, {kibibytes * 1024}))"
    code = f"{limit}; import sys; sys.argv = {['luthier', 'run', str(path), '--quiet', '--runs', str(runs)]!r}"
    command = [sys.executable, "-c", f"{code}; from luthier.cli import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    told = [line for line in done.stderr.splitlines() if line.startswith("luthier:")]
    assert done.returncode == 4 and len(told) == 1 and "Traceback" not in done.stderr, done.stderr
    whole = list(runs.glob("*/[1-7]-*/manifest.json"))
    for manifest in whole:
        read_manifest(manifest.parent)
    again = resume(next(runs.iterdir()), **HERE)
    assert again.exit_code == 0, again.summary


@pytest.mark.parametrize("merge", [False, True])
def test_a_delta_leads_from_the_base_to_the_release(finished, merge, tmp_path):
    from luthier.weights import Delta, Weights, content_hash

    recipe, first = finished
    words = ["deploy.delta=true", f"deploy.merge={str(merge).lower()}"]
    result = run(recipe, words, runs=first.folder.parent, **HERE)
    assert result.exit_code == 0 and "deploy.no_delta" not in codes(result, "warn")
    base = read_manifest(result.folder / "2-model").facts["model"]["folder"]
    delta = Delta.open(result.folder / "6-deploy" / "delta")
    assert delta.about["kind"] == ("exact" if merge else "low-rank")
    delta.apply(base, tmp_path / "tuned")
    delta.remove(tmp_path / "tuned", tmp_path / "back")
    assert content_hash(Weights.open(tmp_path / "back")) == content_hash(Weights.open(base))
    if merge:
        release = Weights.open(result.folder / "6-deploy" / "release")
        assert content_hash(Weights.open(tmp_path / "tuned")) == content_hash(release)


def test_rows_of_plain_text_go_through_all_stages(recipe, tmp_path):
    lines = [f"In the year {i} the river rose by {i % 7} feet and the mill stood still." for i in range(120)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    recipe["data"] = {"source": str(path)}
    recipe["evaluate"] = {"tasks": [{"method": "perplexity", "name": "held-out"}]}
    log = request_log(tmp_path / "log.jsonl", lines[:110])
    result = run(recipe, [f"monitor.log={log}"], runs=tmp_path / "runs", **HERE)
    assert result.exit_code == 0, result.summary
    assert set(manifests(result.folder)) == set(STAGES)
    facts = manifests(result.folder)["deploy"].facts
    assert facts["logits_max_difference"] < 1e-3
