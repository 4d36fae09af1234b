"""Encoded pairs as the loop takes them, for tests of preferences."""

import numpy as np

from luthier.data.roles import CHOSEN, REJECTED


class EncodedPairs:
    """(prompt, chosen answer, rejected answer) in token ids, each answer a row behind its prompt."""

    def __init__(self, pairs):
        self.rows = []
        for prompt, *answers in pairs:
            self.rows += [{"input_ids": prompt + a, "labels": [-100] * len(prompt) + a} for a in answers]
        self.lengths = np.array([len(row["input_ids"]) for row in self.rows])
        self.row = np.arange(len(self.rows)) // 2
        self.role = np.array([CHOSEN, REJECTED] * (len(self.rows) // 2))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]
