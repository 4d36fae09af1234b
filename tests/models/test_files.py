"""Single files: whole or not there, and what is told of a disk that is full."""

from __future__ import annotations

import errno
import os

import pytest

from luthier.errors import CrashError, InputError
from luthier.models.files import is_full, write_text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_a_share_that_is_used_up_and_a_file_at_its_limit_are_full(number):
    assert is_full(OSError(number, os.strerror(number)))
    assert is_full(RuntimeError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"))
    assert not is_full(OSError(errno.EACCES, os.strerror(errno.EACCES)))


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "zwölf\n")
    assert path.read_bytes() == "zwölf\n".encode()

    def full(*_):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CrashError, match=r"a\.txt: the disk is full"):
        write_text(path, "thirteen")
    assert path.read_bytes() == "zwölf\n".encode()
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]


def test_a_place_where_nothing_can_be_is_the_users_mistake(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / "nowhere" / "a.txt", "x")
