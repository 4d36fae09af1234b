"""What comparing the rows of a data set brought up, and the findings that it amounts to (see `prepare`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luthier.data.clean import empty_parts
from luthier.data.ledger import EMPTY, EMPTY_JUDGED, SHOWN, Ledger
from luthier.data.selection import Selected
from luthier.data.settings import DataSettings
from luthier.data.split import SPLITS, TEST, TRAIN, VALIDATION
from luthier.findings import Finding

CONTAMINATION_LIMIT = 0.001
DUPLICATES_LIMIT = 0.1
NEAR_LIMIT = 0.01
FEW_ROWS, LEAST_ROWS = 500, 50
IMBALANCE_LIMIT = 10.0

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Comparison:
    """Masks over all rows; all but the given files' own mark training rows.

    Attributes:
        removed: taken out, for whatever reason.
        duplicates: copies of another training row.            leaked: copies of a held-out row.
        near: nearly equal to another training row.            near_held_out: nearly equal to a held-out row.
        contaminated: contain text of an evaluation row.
        checked: how many training rows were held against the evaluation texts.
        texts: how many evaluation texts there were, held-out rows included.
        given: by split, whether its rows come from a file of their own.
    """

    removed: Mask
    duplicates: Mask
    leaked: Mask
    near: Mask
    near_held_out: Mask
    contaminated: Mask
    checked: int
    texts: int
    given: dict[int, bool]

    def counts(self, train: Mask) -> dict[str, int]:
        """For the data card: what was found among the training rows, and how many went."""
        return {
            "training_rows_before": int(train.sum()),
            "duplicates": int(self.duplicates.sum()),
            "copies_of_held_out_rows": int(self.leaked.sum()),
            "near_duplicates": int(self.near.sum()),
            "near_held_out_rows": int(self.near_held_out.sum()),
            "contaminated": int(self.contaminated.sum()),
            "evaluation_texts": self.texts,
            "removed": int(self.removed.sum()),
        }


def notices(
    ledger: Ledger,
    split: NDArray[np.int8],
    kept: Mask,
    times: NDArray[np.int64],
    compared: Comparison,
    settings: DataSettings,
    selected: Selected | None = None,
) -> list[Finding]:
    """All findings of stage 1, worst first; what a selection noticed is among them."""
    found = [
        *(selected.findings if selected is not None else ()),
        *_overlap(ledger, split, compared, settings),
        *_contamination(ledger, compared, settings),
        *_empty(ledger, (split != TRAIN) | kept if selected is not None else np.ones_like(kept)),
        *_copies(ledger, split, compared, settings),
        *_amounts(ledger, split, kept, times, settings),
        *_private(ledger),
    ]
    return sorted(found, key=lambda finding: ("error", "warn", "info").index(finding.level))


def _overlap(
    ledger: Ledger, split: NDArray[np.int8], compared: Comparison, settings: DataSettings
) -> Iterator[Finding]:
    taken_out = settings.decontaminate or settings.deduplicate != "none"
    for one, other in ((TRAIN, VALIDATION), (TRAIN, TEST), (VALIDATION, TEST)):
        mask = (split == one) & np.isin(ledger.keys, ledger.keys[split == other])
        given = any(compared.given.get(part, False) for part in (one, other))
        removed = one == TRAIN and taken_out
        if mask.any() and (given or not removed):
            count, first = int(mask.sum()), int(np.flatnonzero(mask)[0])
            twin = np.flatnonzero((split == other) & (ledger.keys == ledger.keys[first]))
            message = (
                f"{count} {SPLITS[one]} rows are {SPLITS[other]} rows too, case and white space aside: "
                f"{ledger.places([first])} is {ledger.places(twin[:1])}"
            )
            if removed:
                message += "; they were taken out of the training rows, but the file is not held out as it stands"
            yield Finding(level="error", code="data.split_overlap", message=message, value=count, limit=0)
        shared = np.isin(ledger.groups, ledger.groups[split == other]) & (split == one)
        if settings.group_key is not None and given and shared.any():
            message = (
                f"{int(shared.sum())} {SPLITS[one]} rows are of groups ({settings.group_key}) that {SPLITS[other]} "
                f"rows are of too, such as {ledger.places(np.flatnonzero(shared)[:1])}"
            )
            yield Finding(level="warn", code="data.group_overlap", message=message, value=int(shared.sum()), limit=0)


def _contamination(ledger: Ledger, compared: Comparison, settings: DataSettings) -> Iterator[Finding]:
    count = int(compared.contaminated.sum())
    if not count:
        return
    share = count / compared.checked
    message = (
        f"{count} of {compared.checked} training rows contain text of the {compared.texts} evaluation texts "
        f"(13-grams), such as {ledger.places(np.flatnonzero(compared.contaminated))}"
    )
    if settings.decontaminate:
        message += "; they were taken out (data.decontaminate). With data.group_key, related rows are split together"
    level = "error" if share > CONTAMINATION_LIMIT and not settings.decontaminate else "warn"
    yield Finding(level=level, code="data.contamination", message=message, value=share, limit=CONTAMINATION_LIMIT)


def _empty(ledger: Ledger, looked_at: Mask) -> Iterator[Finding]:
    """Rows with nothing to learn; a selection has seen to the training rows that are not among them."""
    kinds = (
        (EMPTY, "error", "data.empty_answer", "have an empty text or answer"),
        (EMPTY_JUDGED, "warn", "data.empty_judged_answer", "have an empty answer and are left out"),
    )
    for kind, level, code, what in kinds:
        found = np.flatnonzero((ledger.empty == kind) & looked_at)
        if count := len(found):
            rows = (ledger.row(int(index)) for index in found[:SHOWN])
            places = "; ".join(f"{row['where']}, {empty_parts(row)[0]}" for row in rows)
            more = " ..." if count > SHOWN else ""
            message = f"{count} rows {what}: {places}{more}"
            yield Finding(level=level, code=code, message=message, value=count, limit=0)  # type: ignore[arg-type]


def _copies(ledger: Ledger, split: NDArray[np.int8], compared: Comparison, settings: DataSettings) -> Iterator[Finding]:
    rows = int((split == TRAIN).sum())
    if count := int(compared.duplicates.sum()):
        gone = settings.deduplicate != "none"
        message = (
            f"{count} of {rows} training rows are copies of others, case and white space aside, and were "
            f"{'taken out' if gone else 'kept'}, such as {ledger.places(np.flatnonzero(compared.duplicates))}"
        )
        level = "info" if gone and count <= DUPLICATES_LIMIT * rows else "warn"
        yield Finding(level=level, code="data.duplicates", message=message, value=count / rows, limit=DUPLICATES_LIMIT)
    near = compared.near | compared.near_held_out
    if count := int(near.sum()):
        leaks = int(compared.near_held_out.sum())
        gone = settings.deduplicate == "near"
        message = (
            f"{count} training rows are nearly equal to others ({leaks} of them to held-out rows) and were "
            f"{'taken out' if gone else 'kept'} (data.deduplicate), such as {ledger.places(np.flatnonzero(near))}"
        )
        level = "warn" if not gone and leaks > NEAR_LIMIT * rows else "info"
        yield Finding(level=level, code="data.near_duplicates", message=message, value=leaks / rows, limit=NEAR_LIMIT)


def _amounts(
    ledger: Ledger, split: NDArray[np.int8], kept: Mask, times: NDArray[np.int64], settings: DataSettings
) -> Iterator[Finding]:
    rows = int(kept.sum() + (split != TRAIN).sum())
    if rows < FEW_ROWS:
        hint = "too few to learn from or to measure by" if rows < LEAST_ROWS else "intervals will be wide"
        message = f"there are {rows} rows in all; {hint}"
        yield Finding(level="warn", code="data.few_rows", message=message, value=rows, limit=FEW_ROWS)
    if settings.label_key is not None and settings.balance == "none":
        counts = np.bincount(ledger.classes[kept], weights=times[kept], minlength=len(ledger.labels))
        most, least = int(counts.argmax()), int(counts.argmin())
        if counts[most] > IMBALANCE_LIMIT * counts[least]:
            message = (
                f"the class {ledger.labels[most]!r} has {int(counts[most])} training rows, {ledger.labels[least]!r} "
                f"has {int(counts[least])}; data.balance evens them out"
            )
            ratio = float(counts[most] / counts[least]) if counts[least] else None
            yield Finding(level="warn", code="data.imbalance", message=message, value=ratio, limit=IMBALANCE_LIMIT)


def _private(ledger: Ledger) -> Iterator[Finding]:
    if ledger.private:
        kinds = ", ".join(f"{kind} in {rows}" for kind, rows in sorted(ledger.private.items()))
        message = f"rows seem to hold private data: {kinds}"
        yield Finding(level="info", code="data.pii", message=message, value=dict(sorted(ledger.private.items())))
