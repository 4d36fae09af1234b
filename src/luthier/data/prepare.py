"""Stage 1 of a run: from the sources of a recipe to three files of canonical rows and a data card.

    read every source once          rows to a scratch file, a few numbers of each to memory (`ledger`)
    split                           by hash, within groups and classes (`split`); files given for one are taken whole
    compare                         exact and near copies, rows shared between splits, contamination
    take out of the training rows   copies (`deduplicate`) and leaked rows (`decontaminate`); held-out rows stay
    select                          of the training rows that are left those that `select` keeps
    draw                            so many training rows by the seed (`sample`), in nested subsets
    weigh                           repeat or leave out training rows (`balance`)
    write                           train.jsonl, validation.jsonl, test.jsonl, datacard.json: aside first, then renamed

What is noticed, as findings:

    data.split_overlap    error  a file given for validation or test has rows that are training rows too
    data.contamination    error  more than 0.1% of the training rows contain evaluation text, and are kept;
                          warn   they were taken out (`decontaminate`), or are fewer
    data.empty_answer     error  rows with an empty text or answer
    data.empty_judged_answer  warn  the same in rows of pairs or of judged answers, which are left out
    data.duplicates       info   copies among the training rows (warn: more than a tenth, or they are kept)
    data.near_duplicates  info   nearly equal rows (warn: a hundredth of the training rows is near a held-out row, kept)
    data.group_overlap    warn   groups of a given validation or test file are in the training rows too
    data.few_rows         warn   fewer than 500 rows
    data.imbalance        warn   one class has more than ten times the rows of another, and `balance` is none
    data.select           info   how many rows a selection kept; what else it notices begins with `data.select_`
    data.pii              info   rows that seem to hold e-mail addresses, card numbers, keys and the like

An overlap with a file that was given is an error even where the rows were taken out: whoever made that file took it
to be held out. Within one source nothing can overlap by itself, because copies of a text are split together.
Held-out rows that are exact copies get their own ids ("...-2"), so that results can be matched by id.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.balance import copies
from luthier.data.clean import key_of, mixed, row_text
from luthier.data.contamination import Evaluation
from luthier.data.formats import MAX_ROW_BYTES, saved_parts
from luthier.data.ledger import Ledger, LedgerRows
from luthier.data.near_duplicates import clusters
from luthier.data.notices import Comparison, notices
from luthier.data.read import read_rows
from luthier.data.selection import Row, Selected, SelectionContext, needs_scorer
from luthier.data.settings import DataSettings, Source
from luthier.data.split import SPLITS, TEST, TRAIN, VALIDATION, assign
from luthier.errors import CrashError, InputError
from luthier.findings import Finding

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` leaves: the data card (as in datacard.json), what was noticed, and one file for each split."""

    card: dict[str, Any]
    findings: list[Finding]
    files: dict[str, Path]


def prepare(
    settings: DataSettings,
    directory: Path,
    *,
    seed: int,
    evaluation_texts: Iterable[str] = (),
    select: Callable[[Sequence[Row]], Selected] | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> Prepared:
    """Write train.jsonl, validation.jsonl, test.jsonl and datacard.json into `directory` (made if missing).

    Args:
        settings: the `data` section of a recipe.
        directory: earlier files of these names are replaced when all new ones are whole, and not before.
        seed: of split, balance and choice among copies. Equal rows and seed give equal files, in the order of the
            sources; which split a row is in does not depend on that order.
        evaluation_texts: what else the model is going to be evaluated on; training rows are held against it as well
            as against the validation and test rows. Read once.
        select: training rows -> those to use; only called if the settings have a `select`. Default: its own `apply`,
            with no model to score by.
        max_row_bytes: a longer line is refused.

    Raises `InputError` if rows cannot be read, or none is left for training; `CrashError` if the disk is full.
    """
    if isinstance(evaluation_texts, str):
        raise InputError("evaluation_texts must be texts, not one text")
    directory = Path(directory)
    scratch = directory / ".preparing"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        ledger = Ledger(scratch, sketches=settings.deduplicate != "none")
        try:
            return _prepare(settings, directory, scratch, ledger, seed, evaluation_texts, select, max_row_bytes)
        finally:
            ledger.release()
    except OSError as error:
        what = f"the prepared rows cannot be written: {error.strerror or error}"
        raise CrashError(f"{directory}: {what}; earlier files are whole.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _prepare(
    settings: DataSettings,
    directory: Path,
    scratch: Path,
    ledger: Ledger,
    seed: int,
    evaluation_texts: Iterable[str],
    select: Callable[[Sequence[Row]], Selected] | None,
    max_row_bytes: int,
) -> Prepared:
    sources = _sources(settings)
    counts = [ledger.add(read_rows(s, settings, max_row_bytes=max_row_bytes), i) for i, (_, s) in enumerate(sources)]
    ledger.close()
    roles = np.array([-1 if role is None else role for role, _ in sources], dtype=np.int8)[ledger.sources]
    split = _split(ledger, roles, settings, seed)
    compared = _compare(ledger, split, roles, settings, seed, evaluation_texts)
    kept = (split == TRAIN) & ~compared.removed
    if not kept.any():
        what = f"no training row is left of {int((split == TRAIN).sum())}: all are copies or contain evaluation text"
        raise InputError(what, where="data", fix="give other rows, or set data.deduplicate and data.decontaminate")
    selected = None
    if settings.select is not None:
        apply = select or partial(settings.select.apply, context=SelectionContext(needs_scorer, seed))  # type: ignore[attr-defined]
        rows = LedgerRows(ledger, kept)
        selected = apply(rows)
        kept = np.zeros_like(kept)
        kept[rows.indices[selected.kept]] = True
    if settings.sample is not None:
        kept = _drawn(ledger, kept, settings.sample, seed)
    weights = np.array([source.weight for _, source in sources])[ledger.sources[kept]]
    times = (split != TRAIN).astype(np.int64)
    times[kept] = copies(
        ledger.ids[kept],
        ledger.classes[kept].astype(np.int64),
        weights,
        balance=settings.balance,
        temperature=settings.balance_temperature,
        seed=seed,
    )
    _write(ledger, split, times, scratch, selected)
    findings = notices(ledger, split, kept, times, compared, settings, selected)
    described = [
        {
            "name": Path(source.path).name if source.path is not None else source.name,
            "split": "shared out" if role is None else SPLITS[role],
            "rows": count,
            "weight": source.weight,
        }
        for (role, source), count in zip(sources, counts, strict=True)
    ]
    card = _card(ledger, split, kept, times, compared, settings, seed)
    if selected is not None:
        card["selection"] = {"settings": settings.select.model_dump(mode="json"), **selected.stats}  # type: ignore[union-attr]
    card = {"sources": described, **card, "findings": [finding.model_dump() for finding in findings]}
    (scratch / "datacard.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in [f"{name}.jsonl" for name in SPLITS] + ["datacard.json"]:
        with (scratch / name).open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(scratch / name, directory / name)
    return Prepared(card, findings, {name: directory / f"{name}.jsonl" for name in SPLITS})


def _sources(settings: DataSettings) -> list[tuple[int | None, Source]]:
    """Every source with the split that it is for; None for those whose rows are shared out."""
    given = {VALIDATION: settings.validation_source, TEST: settings.test_source}
    if len(settings.source) == 1 and settings.source[0].path is not None:
        parts = saved_parts(Path(settings.source[0].path))
        names = {VALIDATION: ("validation", "valid", "val", "dev"), TEST: ("test",)}
        for split, known in names.items():  # a saved DatasetDict brings its own splits, unless the recipe names others
            found = next((parts[name] for name in known if name in parts), None) if "train" in parts else None
            if given[split] is None and found is not None:
                given[split] = (Source(path=str(found)),)
    shared: list[tuple[int | None, Source]] = [(None, source) for source in settings.source]
    return shared + [(split, source) for split, sources in given.items() for source in sources or ()]


def _split(ledger: Ledger, roles: NDArray[np.int8], settings: DataSettings, seed: int) -> NDArray[np.int8]:
    """(rows,) the split of each row: as given, or its share of the rows that are shared out."""
    split = roles.copy()
    pool = roles < 0
    shares = [0.0 if part != TRAIN and (roles == part).any() else share for part, share in enumerate(settings.split)]
    train, validation, test = (share / sum(shares) for share in shares)
    labels = None
    if settings.label_key is not None:
        names = np.array([key_of(name) for name in ledger.labels], dtype=np.uint64)
        labels = names[ledger.classes[pool]]
    units = ledger.groups if settings.group_key is not None else ledger.keys
    split[pool] = assign(units[pool], (train, validation, test), seed=seed, labels=labels)
    return split


def _compare(
    ledger: Ledger,
    split: NDArray[np.int8],
    roles: NDArray[np.int8],
    settings: DataSettings,
    seed: int,
    evaluation_texts: Iterable[str],
) -> Comparison:
    """Hold the rows against each other; `removed` are the training rows that the settings take out for it."""
    train = split == TRAIN
    removed = np.zeros(len(split), dtype=bool)
    duplicates = _later_copies(ledger, train)
    if settings.deduplicate != "none":
        removed |= duplicates
    leaked = train & np.isin(ledger.keys, ledger.keys[~train])
    if settings.decontaminate or settings.deduplicate != "none":
        removed |= leaked
    near = near_held_out = np.zeros(len(split), dtype=bool)
    if settings.deduplicate != "none":
        near, near_held_out = _near(ledger, train & ~removed, ~train, seed)
        if settings.deduplicate == "near":
            removed |= near | near_held_out
    contaminated, texts = _contaminated(ledger, train & ~removed, ~train, evaluation_texts)
    checked = int((train & ~removed).sum())
    if settings.decontaminate:
        removed |= contaminated
    given = {part: bool((roles == part).any()) for part in (VALIDATION, TEST)}
    return Comparison(removed, duplicates, leaked, near, near_held_out, contaminated, checked, texts, given)


def _later_copies(ledger: Ledger, train: Mask) -> Mask:
    """Training rows that say what another training row says; of each set the row with the smallest id is the first."""
    rows = np.flatnonzero(train)
    order = rows[np.lexsort((ledger.ids[rows], ledger.keys[rows]))]
    found = np.zeros(len(train), dtype=bool)
    found[order[1:]] = ledger.keys[order][1:] == ledger.keys[order][:-1]
    return found


def _near(ledger: Ledger, train: Mask, held_out: Mask, seed: int) -> tuple[Mask, Mask]:
    """Training rows near another training row that is kept, and training rows near a held-out row."""
    cluster = clusters(ledger.sketches())
    rows = np.flatnonzero(train)
    order = rows[np.lexsort((mixed(ledger.ids[rows], seed), cluster[rows]))]
    near = np.zeros(len(train), dtype=bool)
    near[order[1:]] = cluster[order][1:] == cluster[order][:-1]
    return near, train & np.isin(cluster, cluster[held_out])


def _contaminated(ledger: Ledger, train: Mask, held_out: Mask, texts: Iterable[str]) -> tuple[Mask, int]:
    """Training rows that contain text of a held-out row or of `texts`, and how many such texts there are."""

    def evaluated() -> Iterator[str]:
        yield from texts
        for _, row in ledger.rows(held_out):
            yield row_text(row, system=False)

    evaluation = Evaluation(evaluated())
    found = np.zeros(len(train), dtype=bool)
    if evaluation.texts:
        for index, row in ledger.rows(train):
            found[index] = evaluation.count(row)
        for index, row in ledger.rows(found.copy()):
            found[index] = evaluation.contaminates(row)
    return found, evaluation.texts


def _drawn(ledger: Ledger, kept: Mask, sample: int, seed: int) -> Mask:
    """`sample` of the rows that are `kept`: the first in an order that depends on their content and the seed alone.

    A smaller sample is therefore part of a larger one, and held-out rows are the same for both.
    """
    rows = np.flatnonzero(kept)
    if sample > len(rows):
        what = f"{sample:,} training rows are asked for, and there are {len(rows):,}"
        raise InputError(what, where="data.sample", fix="ask for fewer, or leave it out to train on all")
    drawn = np.zeros_like(kept)
    drawn[rows[np.argsort(mixed(ledger.ids[rows], seed), kind="stable")[:sample]]] = True
    return drawn


def _write(
    ledger: Ledger, split: NDArray[np.int8], times: NDArray[np.int64], scratch: Path, selected: Selected | None
) -> None:
    """Each row as often as `times` says into the file of its split; selected ones with their figures."""
    doubles = _repeated_ids(ledger, split)
    seen: Counter[tuple[int, int]] = Counter()
    files = [(scratch / f"{name}.jsonl").open("wb") for name in SPLITS]
    places = iter(range(len(selected or ())))
    chosen = np.zeros(len(split), dtype=bool)
    if selected is not None and selected.columns:
        assert isinstance(selected.rows, LedgerRows)
        chosen[selected.rows.indices[selected.kept]] = True
    try:
        for index, line in enumerate(ledger.lines()):
            if selected is not None and chosen[index]:
                line = _line(json.loads(line) | selected.figures(next(places)))
            if doubles[index]:
                row, key = json.loads(line), (int(split[index]), int(ledger.ids[index]))
                seen[key] += 1
                if seen[key] > 1:
                    row["id"] += f"-{seen[key]}"
                    line = _line(row)
            for _ in range(times[index]):
                files[split[index]].write(line)
    finally:
        for file in files:
            file.close()


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")


def _repeated_ids(ledger: Ledger, split: NDArray[np.int8]) -> Mask:
    """Held-out rows whose id another row of the same split has too."""
    repeated = np.zeros(len(split), dtype=bool)
    for part in (VALIDATION, TEST):
        rows = np.flatnonzero(split == part)
        _, inverse, counts = np.unique(ledger.ids[rows], return_inverse=True, return_counts=True)
        repeated[rows] = counts[inverse] > 1
    return repeated


def _card(
    ledger: Ledger,
    split: NDArray[np.int8],
    kept: Mask,
    times: NDArray[np.int64],
    compared: Comparison,
    settings: DataSettings,
    seed: int,
) -> dict[str, Any]:
    """The data card: counts only, never texts, paths or times, so that equal rows give an equal card."""
    masks = {name: kept if part == TRAIN else split == part for part, name in enumerate(SPLITS)}
    card: dict[str, Any] = {
        "rows": {name: int(times[mask].sum()) for name, mask in masks.items()},
        "different_training_rows": int((times[kept] > 0).sum()),
        "forms": dict(sorted(ledger.forms.items())),
        "schema": settings.form,
        "columns": dict(settings.columns),
        "split": {"shares": list(settings.split), "seed": seed, "group_key": settings.group_key},
        "characters": {name: _percentiles(ledger.characters[mask]) for name, mask in masks.items() if mask.any()},
        "removed": compared.counts(split == TRAIN),
        "private": dict(sorted(ledger.private.items())),
        "empty": int((ledger.empty > 0).sum()),
    }
    if settings.sample is not None:
        card["sample"] = settings.sample
    if settings.label_key is not None:
        card["label_key"] = settings.label_key
        card["labels"] = {name: ledger_counts(ledger, mask, times) for name, mask in masks.items()}
        card["labels"]["train_before_balance"] = ledger_counts(ledger, kept, np.ones_like(times))
        card["balance"] = settings.balance
    return card


def _percentiles(lengths: NDArray[np.int64]) -> dict[str, int]:
    names = {"smallest": 0, "p50": 50, "p90": 90, "p99": 99, "largest": 100}
    return {name: int(np.percentile(lengths, at, method="inverted_cdf")) for name, at in names.items()}


def ledger_counts(ledger: Ledger, mask: Mask, times: NDArray[np.int64]) -> dict[str, int]:
    """Rows of each class among `mask`, each counted as often as it is used; by name of the class."""
    counts = np.bincount(ledger.classes[mask], weights=times[mask], minlength=len(ledger.labels)).astype(np.int64)
    return {name: int(count) for name, count in sorted(zip(ledger.labels, counts.tolist(), strict=True))}
