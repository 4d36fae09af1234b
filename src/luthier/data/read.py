"""Rows of a recipe's sources, one after another, in canonical columns.

    for row in read_rows("chats.jsonl", settings): ...
    for row in read_rows({"callable": "luthier.worlds.arithmetic:rows", "arguments": {"skill": "add"}}, settings): ...

Reading is lazy: a file larger than memory costs no more than its largest row. A source is a path, a mapping with
`callable` (a Python function that gives mappings: a list, a generator, a data set), or a list of these. The function
is imported as Python would import it from the folder the program runs in; it is the one way in which a recipe runs
code, and only that of the module it names.

Errors say the path as the recipe has it; a row keeps only the file's name and its line in `where`, so that the same
rows give the same files wherever they lie.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.data.formats import MAX_ROW_BYTES, RawRows, read_file
from luthier.data.forms import Row, canonical, forms_of, recognise, unknown_form
from luthier.data.settings import DataSettings, Source, as_sources
from luthier.errors import InputError, LuthierError, did_you_mean


def read_rows(
    source: Any, settings: DataSettings, *, answers: bool = True, max_row_bytes: int = MAX_ROW_BYTES
) -> Iterator[Row]:
    """Canonical rows of `source`, in order; at most `settings.limit` of each single source.

    Args:
        source: a path, a `Source`, a mapping that describes one, or a list of these.
        settings: `form`, `columns`, `label_key`, `group_key` and `limit` are used.
        answers: False lets rows pass that have a prompt and no answer; see `forms.canonical`.
        max_row_bytes: a longer line, or record of a table, is refused.

    Raises `InputError` with file, line and key for whatever cannot be read, and for a source without rows.
    """
    for single in as_sources(source):
        yield from _read_one(Source.model_validate(single), settings, answers, max_row_bytes)


def _read_one(source: Source, settings: DataSettings, answers: bool, max_row_bytes: int) -> Iterator[Row]:
    if source.path is not None:
        raw, kept = read_file(Path(source.path), max_row_bytes=max_row_bytes), Path(source.path).name
    else:
        raw, kept = _called(source), source.name
    form: str | None = None if settings.form == "auto" else settings.form
    first = None
    for number, row in islice(raw, settings.limit):
        where = f"{source.name}:{number}"
        if not isinstance(row, Mapping):
            raise InputError(f"the row is of type {type(row).__name__}, not a mapping of columns", where=where)
        if form is None:
            form, first = recognise(row, settings, answers=answers), number
            if form is None:
                raise unknown_form(row, where)
        elif first is not None:
            _refuse_other_form(row, settings, form, where)
        made = canonical(row, settings, form=form, where=where, answers=answers)
        made["where"] = f"{kept}:{number}"
        first = first or number
        yield made
    if first is None:
        raise InputError("there are no rows", where=source.name)


def _refuse_other_form(row: Mapping[str, Any], settings: DataSettings, form: str, where: str) -> None:
    """Raise if `row` lacks the columns of `form` but has those of another one."""
    found = forms_of(row, settings)
    if found and form not in found:
        fix = "put each form into a file of its own and list both in data.source"
        raise InputError(f"mixed forms: the row is {found[0]}, those before it are {form}", where=where, fix=fix)


def _called(source: Source) -> RawRows:
    function = import_callable(source.name)
    try:
        rows = function(**source.arguments)
    except LuthierError:
        raise
    except Exception as error:
        raise InputError(f"the callable failed: {type(error).__name__}: {error}", where=source.name) from error
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        what = f"the callable gave {type(rows).__name__}, not rows (a list or generator of mappings)"
        raise InputError(what, where=source.name)
    return _numbered(rows, source.name)


def _numbered(rows: Iterable[Any], name: str) -> RawRows:
    iterator, number = iter(rows), 0
    while True:
        number += 1
        try:
            row = next(iterator)
        except StopIteration:
            return
        except LuthierError:
            raise
        except Exception as error:
            what = f"the callable failed at this row: {type(error).__name__}: {error}"
            raise InputError(what, where=f"{name}:{number}") from error
        yield number, row


def import_callable(name: str) -> Callable[..., Any]:
    """The function that `module:function` names; the folder the program runs in is looked through last.

    Raises `InputError` if the module or the function is not there, or importing the module fails.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise InputError(f"expected module:function, got {name!r}")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        fix = f"is {missing.split('.')[0]}.py in the folder the program runs in, or its package installed?"
        raise InputError(f"there is no module {missing!r}", where=name, fix=fix) from None
    except Exception as error:
        raise InputError(f"importing failed: {type(error).__name__}: {error}", where=name) from error
    finally:
        if added:
            sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [known for known in dir(found) if not known.startswith("_")]
            raise InputError(f"{module_name} has no {part!r}", where=name, fix=did_you_mean(part, public))
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{attribute} is of type {type(found).__name__}, not a function", where=name)
    return found
