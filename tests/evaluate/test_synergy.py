"""The table of a merged model against its parents."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import InputError
from luthier.evaluate.synergy import synergy

SCORE = st.floats(-100, 100)


@given(SCORE, SCORE)
def test_identical_parents_and_no_change_have_no_synergy(parent, other):
    row, overall = synergy({"task": (parent, parent, parent)})
    assert row.synergy == 0 and not row.emergent and overall.synergy == 0
    assert synergy({"task": (parent, parent, other)})[0].emergent == (other > parent)


@given(st.lists(st.tuples(SCORE, SCORE, SCORE), min_size=1, max_size=5))
def test_parents_swapped_and_the_mean_of_all(scores):
    rows = synergy({str(number): trio for number, trio in enumerate(scores)})
    swapped = synergy({str(number): (b, a, m) for number, (a, b, m) in enumerate(scores)})
    assert [row.synergy for row in rows] == pytest.approx([row.synergy for row in swapped])
    assert [row.emergent for row in rows] == [row.emergent for row in swapped]
    assert rows[-1].synergy == pytest.approx(sum(row.synergy for row in rows[:-1]) / len(scores), abs=1e-9)


def test_by_hand():
    rows = synergy({"domain": (0.6, 0.4, 0.7), "general": (0.2, 0.8, 0.5)})
    domain, general, overall = (row.row() for row in rows)
    assert (domain["expected"], domain["emergent"], general["emergent"]) == (0.5, True, False)
    assert domain["synergy"] == pytest.approx(0.2) and general["synergy"] == pytest.approx(0.0)
    # Each parent is better at one thing: the means are 0.4 and 0.6, the merged model's is 0.6.
    assert overall["name"] == "overall" and overall["synergy"] == pytest.approx(0.1) and not overall["emergent"]


@pytest.mark.parametrize("scores", [{}, {"overall": (1, 1, 1)}, {"a": (1, 2)}, {"a": (1, 2, float("nan"))}])
def test_what_it_refuses(scores):
    with pytest.raises(InputError):
        synergy(scores)
