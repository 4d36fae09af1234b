"""The search for layers and modules: its table is what it tried, its answer the argmax, its path the rule's."""

import csv
import json
import random

import pytest

from luthier.errors import InputError
from luthier.tune import CofiTune
from luthier.tune.selector.coarse_search import Node, coarse_search, paper_tree, write_table
from luthier.tune.selector.layers import layers_of


def key(settings):
    return settings["layers"], tuple(settings["modules"])


def search(scores, tree, **more):
    """With a score for each node; also returns the order in which nodes were trained."""
    trained = []

    def train(settings):
        trained.append(key(settings))
        return key(settings)

    return coarse_search(train, lambda node: dict(zip(PARTS, scores(node), strict=True)), tree, **more), trained


PARTS = ("speciality", "versatility")


def noise(node):
    draw = random.Random(str(node))
    return draw.random(), draw.random()


@pytest.mark.parametrize("beam", [1, 2, 9])
@pytest.mark.parametrize("max_runs", [1, 5, 100])
def test_the_answer_is_the_best_of_all_that_was_tried(beam, max_runs):
    ranking, trained = search(noise, paper_tree(16), beam=beam, max_runs=max_runs)
    assert [key(r["settings"]) for r in sorted(ranking, key=lambda r: r["run"])] == trained
    assert len(trained) <= max_runs and len(set(trained)) == len(trained)
    assert ranking[0]["score"] == max(sum(noise(node)) for node in trained)
    assert all(row["score"] == row["speciality"] + row["versatility"] for row in ranking)
    assert json.loads(json.dumps(ranking)) == ranking


def test_the_path_of_one_beam():
    """By hand: B wins level 1, its second child beats it, and that one's child is tried; A's children never are."""
    tree = [
        Node("0%:50%", ("a",), (Node("0%:50%", ("a1",)),)),
        Node("50%:100%", ("b",), (Node("50%:100%", ("b1",)), Node("50%:100%", ("b2",), (Node("50%:75%", ("b2",)),)))),
    ]
    score = {"a": 1.0, "b": 2.0, "b1": 1.5, "b2": 3.0}
    ranking, trained = search(lambda node: (score[node[1][0]], 0.0), tree)
    assert [modules[0] for _, modules in trained] == ["a", "b", "b1", "b2", "b2"]
    assert [(r["run"], r["parent"], r["level"]) for r in ranking] == [
        (3, 1, 2),
        (4, 3, 3),
        (1, None, 1),
        (2, 1, 2),
        (0, None, 1),
    ]


def test_a_node_that_does_not_beat_its_parent_is_not_refined():
    tree = paper_tree(16)
    _, trained = search(lambda node: (1.0, 1.0), tree)  # all equal: level 2 is tried, level 3 is not
    assert len(trained) == len(tree) + 2
    _, trained = search(lambda node: (-float(len(node[1])), 0.0), tree)  # fewer modules are better: all levels
    assert len(trained) == len(tree) + 2 + 2


def test_a_wide_beam_tries_every_node_of_two_levels():
    tree = paper_tree(16)
    _, trained = search(noise, tree, beam=100, max_runs=1000)
    assert {(n.layers, n.modules) for top in tree for n in (top, *top.children)} <= set(trained)


@pytest.mark.parametrize("count", [2, 4, 6, 8, 32])
def test_the_papers_tree_holds_only_what_can_be_trained(count):
    def check(node, above):
        layers = layers_of(node.layers, count)
        assert layers and (above is None or set(layers) <= set(above))
        CofiTune(**node.settings, soft_mask=[])
        for child in node.children:
            check(child, layers)
        halves = [n for n in node.children if n.layers != node.layers]
        assert sorted(i for n in halves for i in layers_of(n.layers, count)) in ([], layers)

    tree = paper_tree(count)
    assert tree
    for node in tree:
        check(node, None)
    assert len(tree) == (7 if count >= 4 else len(tree))


def test_the_table_as_json_and_csv(tmp_path):
    ranking, _ = search(noise, paper_tree(8))
    write_table(ranking, tmp_path / "search.json")
    assert json.loads((tmp_path / "search.json").read_text()) == ranking
    write_table(ranking, tmp_path / "search.csv")
    with (tmp_path / "search.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [row["score"] for row in ranking]
    assert rows[0]["modules"].split() == ranking[0]["settings"]["modules"]
    with pytest.raises(InputError, match=r"\.json or \.csv"):
        write_table(ranking, tmp_path / "search.txt")


def test_bad_scores_and_bad_numbers_are_refused():
    tree = paper_tree(8)
    for scores in ({"speciality": 1.0}, {"speciality": float("nan"), "versatility": 1.0}):
        with pytest.raises(InputError, match="finite speciality and versatility"):
            coarse_search(lambda settings: None, lambda model, s=scores: s, tree)
    for wrong in ({"beam": 0}, {"max_runs": 0}):
        with pytest.raises(InputError, match="at least one node"):
            search(noise, tree, **wrong)
    with pytest.raises(InputError, match="at least one node"):
        search(noise, [])
