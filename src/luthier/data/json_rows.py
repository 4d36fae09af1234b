"""JSON as a stream of rows: one object a line, or the elements of one array without ever holding the array.

NaN and Infinity are not JSON (RFC 8259, section 6) and are refused with their key: a number that is not one is a sign
of a broken writer. Every error names the line, for an array the line inside the element that is broken.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from luthier.data.text_lines import not_utf8, text_lines
from luthier.errors import InputError

CHUNK_BYTES = 2**18

RawRows = Iterator[tuple[int, Any]]  # line (text files) or row number, both from 1, and the row


def json_lines(path: Path, limit: int) -> RawRows:
    """One object on each line; empty lines are passed over."""
    with path.open("rb") as handle:
        first = True
        for number, text in text_lines(path, handle, limit):
            if text.strip():
                if first and text.lstrip().startswith("["):
                    fix = "if the file is one JSON array, let its name end in .json"
                    raise InputError("the first row is a list, not an object", where=f"{path}:{number}", fix=fix)
                first = False
                yield number, parse_json(text, f"{path}:{number}")


def json_rows(path: Path, limit: int) -> RawRows:
    """A `.json` file: an array if its first character is a bracket, lines otherwise."""
    with path.open("rb") as handle:
        first = handle.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first == b"[":
        yield from _Array(path, limit)
    else:
        yield from json_lines(path, limit)


class _NotANumber(Exception):
    pass


def _refuse_constant(name: str) -> NoReturn:
    raise _NotANumber(name)


def parse_json(text: str, where: str) -> Any:
    """The JSON value that `text` holds; `InputError` (with the key, for NaN) where it is none."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except _NotANumber as error:
        raise _constant(json.loads(text), str(error), where) from None
    except json.JSONDecodeError as error:
        raise _broken(error, len(text.rstrip()), where) from None
    except RecursionError:
        raise InputError("the JSON is nested too deeply", where=where) from None
    except ValueError as error:  # a whole number of thousands of digits
        raise InputError(f"not readable as JSON: {error}", where=where) from None


def _constant(value: Any, name: str, where: str) -> InputError:
    key = _key_of_constant(value) or ""
    place = f"{where}, {key.lstrip('.')}" if key else where
    return InputError(f"{name} is not a JSON number", where=place, fix="write null or leave the key out")


def _key_of_constant(value: Any) -> str | None:
    """Path such as `.scores[2]` of the first number that is not finite."""
    if isinstance(value, float) and value - value != 0:
        return ""
    entries: Any = ()
    if isinstance(value, dict):
        entries = ((f".{key}", entry) for key, entry in value.items())
    elif isinstance(value, list):
        entries = ((f"[{index}]", entry) for index, entry in enumerate(value))
    for step, entry in entries:
        if (rest := _key_of_constant(entry)) is not None:
            return step + rest
    return None


def _broken(error: json.JSONDecodeError, length: int, where: str, *, column: bool = True) -> InputError:
    if error.pos >= length or error.msg.startswith("Unterminated"):
        what, fix = "the JSON breaks off in the middle of a value", "is the file cut short, or a line broken in two?"
        return InputError(what, where=where, fix=fix)
    at = f" at column {error.colno}" if column else ""
    return InputError(f"not valid JSON{at}: {error.msg}", where=where)


class _Array:
    """The elements of one JSON array, read through a window that grows only as long as an element needs it."""

    def __init__(self, path: Path, limit: int):
        self.path, self.limit = path, limit
        self.window, self.at, self.line, self.ended = "", 0, 1, False
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.parser = json.JSONDecoder(parse_constant=_refuse_constant)

    def __iter__(self) -> RawRows:
        with self.path.open("rb") as handle:
            self._next(handle)
            self.at += 1
            if self._next(handle) == "]":
                self.at += 1
            else:
                while True:
                    number = self.line
                    yield number, self._element(handle)
                    follows = self._next(handle)
                    self.at += 1
                    if follows == "]":
                        break
                    if follows != ",":
                        self._refuse_separator(follows)
                    if self._next(handle) == "]":
                        raise InputError("a comma before the end of the array", where=f"{self.path}:{self.line}")
            if rest := self._next(handle):
                raise InputError(f"{rest!r} follows the end of the array", where=f"{self.path}:{self.line}")

    def _refuse_separator(self, follows: str) -> NoReturn:
        if follows:
            raise InputError(f"expected ',' or ']', found {follows!r}", where=f"{self.path}:{self.line}")
        fix = "is the file cut short?"
        raise InputError("the array breaks off: it has no ']' at the end", where=f"{self.path}:{self.line}", fix=fix)

    def _more(self, handle: BinaryIO) -> None:
        chunk = handle.read(max(CHUNK_BYTES, len(self.window) - self.at))
        try:
            text = self.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            lines = self.line + self.window.count("\n", self.at) + error.object.count(b"\n", 0, error.start)
            raise not_utf8(error, self.path, lines) from None
        self.window, self.at, self.ended = self.window[self.at :] + text, 0, not chunk

    def _next(self, handle: BinaryIO) -> str:
        """The next character that is not white space, without taking it; empty at the end of the file."""
        while True:
            while self.at < len(self.window):
                character = self.window[self.at]
                if character not in " \t\r\n":
                    return character
                self.line += character == "\n"
                self.at += 1
            if self.ended:
                return ""
            self._more(handle)

    def _whole_element(self) -> Any:
        """The element with whatever numbers it has, or None if its end is not in the window yet."""
        try:
            return json.JSONDecoder().raw_decode(self.window, self.at)[0]
        except json.JSONDecodeError as error:
            if self.ended:
                raise _broken(error, len(self.window.rstrip()), f"{self.path}:{self.line}", column=False) from None
            return None

    def _element(self, handle: BinaryIO) -> Any:
        while True:
            where = f"{self.path}:{self.line}"
            try:
                value, end = self.parser.raw_decode(self.window, self.at)
            except _NotANumber as error:
                if (value := self._whole_element()) is not None:
                    raise _constant(value, str(error), where) from None
            except json.JSONDecodeError as error:
                sure = error.pos < len(self.window) - 16 and not error.msg.startswith("Unterminated")
                if self.ended or sure:
                    self.line += self.window.count("\n", self.at, error.pos)
                    raise _broken(error, len(self.window.rstrip()), f"{self.path}:{self.line}", column=False) from None
            except RecursionError:
                raise InputError("the JSON is nested too deeply", where=where) from None
            except ValueError as error:
                raise InputError(f"not readable as JSON: {error}", where=where) from None
            else:
                if end < len(self.window) or self.ended:  # a number may go on behind the window
                    self.line += self.window.count("\n", self.at, end)
                    self.at = end
                    return value
            if len(self.window) - self.at > self.limit:
                raise InputError(f"the element that begins here is longer than {self.limit} bytes", where=where)
            self._more(handle)
