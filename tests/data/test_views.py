"""Laws of views: the items of each kind are all of a split's answers that are of that kind, and nothing else."""

import numpy as np
import pytest

from luthier.data.roles import CHOSEN, DESIRABLE, PLAIN, REJECTED, UNDESIRABLE
from luthier.data.views import view
from luthier.errors import InputError


class Fake:
    """Examples whose first token is their own number."""

    def __init__(self, role):
        self.role = np.array(role)
        self.row = np.cumsum(np.where(self.role == REJECTED, 0, 1)) - 1
        self.lengths = 3 + np.arange(len(role)) % 4

    def __len__(self):
        return len(self.role)

    def __getitem__(self, index):
        return {"input_ids": [index + 1] * int(self.lengths[index]), "labels": [index + 1] * int(self.lengths[index])}


def first_tokens(rows):
    return [row["input_ids"][0] - 1 for row in rows]


PAIRS = [CHOSEN, REJECTED, CHOSEN, REJECTED]
MIXED = [DESIRABLE, UNDESIRABLE, *PAIRS, UNDESIRABLE, DESIRABLE]


@pytest.mark.parametrize(
    ("roles", "kinds", "indices", "expected", "flags"),
    [
        ([PLAIN, PLAIN], ("examples",), [1, 0], [1, 0], [True, True]),
        (PAIRS, ("examples", "pairs"), [0, 1], [0, 2], [True, True]),
        (PAIRS, ("pairs",), [1, 0], [2, 0, 3, 1], [True, True, False, False]),
        (PAIRS, ("pairs", "judged"), [0], [0, 1], [True, False]),
        (MIXED, ("pairs", "judged"), range(8), [0, 2, 4, 7, 1, 3, 5, 6], [True] * 4 + [False] * 4),
        ([PLAIN, *MIXED], ("examples", "judged"), [0, 1, 2], [0, 1, 3], [True] * 3),
    ],
)
def test_what_is_laid_out(roles, kinds, indices, expected, flags):
    found, good = view(Fake(roles), kinds, "it").rows(list(indices))
    assert (first_tokens(found), good) == (expected, flags)


@pytest.mark.parametrize("kinds", [("examples",), ("pairs",), ("judged",)])
def test_every_view_counts_its_tokens_and_gives_silent_rows(kinds):
    examples = Fake(PAIRS)
    made = view(examples, kinds, "it")
    for index in range(len(made)):
        rows, _ = made.rows([index])
        assert made.tokens[index] == sum(len(row["input_ids"]) for row in rows)
        assert made.lengths[index] == len(rows) * max(len(row["input_ids"]) for row in rows)
    assert made.longest == max(len(row["input_ids"]) for row in made.rows(range(len(made)))[0])
    silent, flags = made.rows([])
    assert len(silent) == len(flags) == len(made.rows([0])[0])
    assert all(set(row["labels"]) == {-100} for row in silent)


def test_what_no_kind_can_give_is_refused():
    for roles, kinds, sentence in [
        (
            [*PAIRS, PLAIN],
            ("pairs", "judged"),
            "it learns from pairs .* or judged answers .*; row 3 .* a single answer",
        ),
        ([DESIRABLE, *PAIRS], ("pairs",), "row 1 of the data is a judged answer"),
    ]:
        with pytest.raises(InputError, match=sentence):
            view(Fake(roles), kinds, "it")
