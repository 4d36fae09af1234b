"""Lines of a text file, decoded: UTF-8 with or without a byte order mark, none longer than a limit."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from luthier.errors import InputError


def text_lines(path: Path, handle: BinaryIO, limit: int) -> Iterator[tuple[int, str]]:
    number = 0
    while line := handle.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise InputError(f"the line is longer than {limit} bytes", where=f"{path}:{number}")
        yield number, _decoded(line, path, number)


def _decoded(line: bytes, path: Path, number: int) -> str:
    if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
        if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError("the text is UTF-16, not UTF-8", where=f"{path}:1", fix="save it as UTF-8")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, path, number) from None


def not_utf8(error: UnicodeDecodeError, path: Path, number: int) -> InputError:
    byte, column = error.object[error.start], error.start - error.object.rfind(b"\n", 0, error.start)
    what = f"byte 0x{byte:02x} at column {column} is not UTF-8"
    return InputError(what, where=f"{path}:{number}", fix="save the file as UTF-8")
