"""Proofs: claims are judged as written, records are whole, and nothing is called ready without one."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from luthier import proofs
from luthier.cli import app
from luthier.errors import InputError
from luthier.methods import ROOMS, catalogue, find, table
from luthier.proofs.base import Claim, Proof, as_expected, count, mean, recorded, worst, write

ROOT = Path(__file__).parents[2]
READY = [paper for paper in catalogue() if paper.status == "ready"]


def figures(seed):
    return {"loss/a": 1.0 + seed, "loss/b": 2.0, "alone": float("nan") if seed == 9 else 0.5}


def proof(*claims, seeds=(0, 1, 2)):
    return Proof(paper=36, prove=figures, claims=claims, parts=["luthier.tune.hft"], seeds=seeds)


@pytest.mark.parametrize(
    ("bound", "holds"),
    [(">= 2", True), ("<= 2.0", True), ("== 2", True), ("> 2", False), ("< 2", False), (">= 2.1", False)],
)
def test_a_claim_is_held_against_its_bound(bound, holds):
    record = proof(Claim("mean", lambda runs: mean(runs, "loss/a"), bound)).run()
    assert record["claims"][0]["value"] == 2.0 and record["claims"][0]["holds"] is holds
    assert as_expected(record) is holds


def test_what_is_not_expected_to_hold_is_recorded_and_does_not_fail():
    record = proof(Claim("no", lambda runs: 0.0, "> 1", expected=False)).run()
    assert record["claims"][0]["holds"] is False and as_expected(record)


def test_a_figure_that_is_no_number_holds_nothing():
    record = proof(Claim("nan", lambda runs: mean(runs, "alone"), ">= 0"), seeds=(9,)).run()
    assert record["claims"][0]["holds"] is False


def test_a_bound_must_be_readable():
    with pytest.raises(ValueError, match="no bound such as"):
        proof(Claim("odd", lambda runs: 0.0, "about 3")).run()


def test_helpers():
    runs = [figures(seed) for seed in (0, 1, 2)]
    assert worst(runs, "loss/a") == 1.0 and count(runs, lambda r: r["loss/a"] > r["loss/b"]) == 1


def test_a_record_is_written_whole_and_the_same_twice(tmp_path):
    record = proof(Claim("mean", lambda runs: mean(runs, "loss/a"), "== 2")).run()
    path, picture = write(record, tmp_path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(record))
    first = picture.read_bytes()
    assert b"<svg" in first and write(record, tmp_path)[1].read_bytes() == first
    assert recorded(36, tmp_path)["name"] == "hft" and recorded(48, tmp_path) is None


def test_a_proof_is_found_by_number_and_by_name():
    assert proofs.find("48") is proofs.find("lisa")
    with pytest.raises(InputError, match="did you mean 'lisa'"):
        proofs.find("lisaa")
    with pytest.raises(InputError, match="no proof of '1'"):
        proofs.find("1")


def test_every_module_of_the_room_is_a_proof_of_its_number():
    for number, module in proofs.numbers().items():
        found = proofs.find(str(number))
        assert found.paper == number and found.prove.__module__ == module and found.claims
        assert len({claim.name for claim in found.claims}) == len(found.claims)
        assert found.code()


@pytest.mark.parametrize("paper", READY, ids=lambda paper: paper.name)
def test_ready_means_law_tests_a_recorded_proof_and_docs(paper):
    """The bar for `ready` in the catalogue."""
    members = [(r, n) for r in ROOMS for n in table(r) if find(r, n).paper == paper.number]
    assert members or paper.room == "pipeline" or paper.kind in ("recipe", "study"), "no method belongs to it"
    for room, name in members:
        laws = "".join(path.read_text() for path in (ROOT / "tests" / room).glob("*.py"))
        assert re.search(rf'"method": "{name}"|\b{find(room, name).__name__}\(', laws), f"no law test of {name}"
        assert f"`{name}`" in (ROOT / "docs" / "rooms" / f"{room}.md").read_text(), f"{name} is not documented"
    record = recorded(paper.number)
    assert record is not None, f"run `luthier prove {paper.name} --out src/luthier/proofs/results`"
    found = proofs.find(str(paper.number))
    assert list(record["seeds"]) == [str(seed) for seed in found.seeds], "not all seeds are recorded"
    assert [claim["claim"] for claim in record["claims"]] == [claim.name for claim in found.claims]
    for claim in record["claims"]:  # the verdicts in the file are those of the figures in the file
        runs = list(record["seeds"].values())
        again = next(c for c in found.claims if c.name == claim["claim"]).judge(runs)
        assert again["holds"] == claim["holds"] and again["value"] == pytest.approx(claim["value"])


def test_the_command_runs_lists_and_refuses(tmp_path, monkeypatch):
    small = proof(Claim("mean", lambda runs: mean(runs, "loss/a"), "== 2"))
    monkeypatch.setattr(proofs, "find", lambda name: small)
    command = CliRunner()
    done = command.invoke(app, ["prove", "hft", "--out", str(tmp_path)])
    assert done.exit_code == 0 and "holds" in done.stdout and (tmp_path / "36-hft.json").is_file()
    one = command.invoke(app, ["prove", "hft", "--seeds", "0", "--json", "--out", str(tmp_path)])
    assert one.exit_code == 3 and '"holds": false' in one.stdout
    with pytest.raises(InputError, match="whole numbers"):
        command.invoke(app, ["prove", "hft", "--seeds", "one"], catch_exceptions=False)
    listed = json.loads(command.invoke(app, ["prove", "--list", "--json"]).stdout)
    assert {row["paper"] for row in listed} == set(proofs.numbers())
