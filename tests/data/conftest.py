"""Small helpers for the tests of the data room."""

from __future__ import annotations

import json

import pytest

from luthier.data.settings import DataSettings


@pytest.fixture
def write(tmp_path):
    """`write(name, content)` puts bytes, text or rows (one JSON object a line) into the test's folder."""

    def writer(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return writer


@pytest.fixture
def data():
    """`data(source, **keys)` builds `DataSettings`."""
    return lambda source, **keys: DataSettings(source=source, **keys)


@pytest.fixture
def talk():
    """`talk(question, answer)` is a row in OpenAI's form."""
    return lambda question, answer: {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    }
