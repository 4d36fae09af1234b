"""A picture comes back as the pixels that went in, whatever it was given as."""

import io

import numpy as np
import pytest
from PIL import Image

from luthier.data.forms import canonical, recognise
from luthier.data.pictures import picture_text, pixels
from luthier.data.settings import DataSettings
from luthier.errors import InputError

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("array", [GREY, COLOUR])
def test_every_form_gives_the_same_pixels(array, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(array))
    forms = [array, array.tolist(), array[..., None] if array.ndim == 2 else array.astype("int64"), png(array)]
    forms += [str(path), path, Image.fromarray(array), {"bytes": png(array), "path": None}, {"path": str(path)}]
    for given in forms:
        found = pixels(picture_text(given, "row 1"), 1 if array.ndim == 2 else 3)
        assert found.dtype == np.uint8 and np.array_equal(found.reshape(array.shape), array)


def test_channels_are_those_that_are_asked_for():
    assert pixels(picture_text(GREY, ""), 3).shape == (6, 8, 3)
    assert pixels(picture_text(COLOUR, ""), 1).shape == (6, 8, 1)


def test_a_file_is_kept_byte_for_byte_and_a_picture_has_one_id():
    import base64

    assert base64.b64decode(picture_text(png(GREY), "")) == png(GREY)
    settings = DataSettings(source="a.jsonl", label_key="kind")
    row = {"image": GREY.tolist(), "kind": 3, "note": "x"}
    assert recognise(row, settings) == "image"
    made = canonical(row, settings, form="image", where="a:1")
    again = canonical({**row, "kind": 4}, settings, form="image", where="a:2")
    assert made["id"] == again["id"] and (made["label"], again["label"]) == (3, 4)
    assert made["extra"] == {"note": "x"}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("nowhere.png", "'nowhere.png' cannot be read"),
        (b"no picture", "the bytes are no picture"),
        (np.zeros((4, 4)), "array .* of 0 to 255"),
        (np.full((4, 4), 256), "array .* of 0 to 255"),
        (np.zeros((4, 4, 2), dtype=np.uint8), "array .* of 0 to 255"),
        ([[1, 2], [3]], "expected a path"),
        (7, "expected a path"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_place(value, says):
    with pytest.raises(InputError, match=f"(?s)row 9.*{says}"):
        picture_text(value, "row 9")


def test_a_picture_cut_short_is_refused():
    import base64

    whole = png(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8))
    cut = base64.b64encode(whole[: len(whole) // 2]).decode()
    with pytest.raises(InputError, match="not whole"):
        pixels(cut, 1, "row 1")
