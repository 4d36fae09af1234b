"""Pictures of rows: whatever a source gives, as text that stands in a JSON line, and back as pixels.

    a path                      of a file (PNG, JPEG and whatever else Pillow reads)
    bytes, or {"bytes": ...}    the contents of such a file, as Parquet and `datasets` keep them
    an array of whole numbers   (height, width) or (height, width, channels), 0 to 255; nested lists too
    a picture of Pillow

`picture_text` gives the file's own bytes in base64 (arrays as PNG, which loses nothing), so that a run keeps what it
learned from, an equal picture has an equal id, and a picture that changes later changes nothing.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMS = "a path, bytes of a file, an array (height, width[, channels]) of 0 to 255, or a picture of Pillow"


def picture_text(value: Any, where: str) -> str:
    """The picture `value` as base64 text. Raises `InputError`, naming `where`, for what is no picture."""
    from PIL import Image

    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str | Path):
        try:
            value = Path(value).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"the picture {str(value)[:120]!r} cannot be read: {reason}", where=where) from None
    if not isinstance(value, bytes):
        made = value if isinstance(value, Image.Image) else _from_array(value, where)
        file = io.BytesIO()
        made.save(file, format="PNG")
        value = file.getvalue()
    _open(value, where).close()
    return base64.b64encode(value).decode("ascii")


def pixels(text: str, channels: int, where: str | None = None) -> NDArray[np.uint8]:
    """The picture that `picture_text` made, (height, width, channels) uint8; grey for 1 channel, RGB for 3."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError("the picture is not base64 text", where=where) from None
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
    if mode is None:
        raise InputError(f"the model takes pictures of {channels} channels, and rows give 1, 3 or 4", where=where)
    with _open(content, where) as opened:
        try:
            found = np.asarray(opened.convert(mode), dtype=np.uint8)
        except (OSError, ValueError, SyntaxError) as error:  # whatever a broken file leads Pillow to
            raise InputError(f"the picture is not whole: {error}", where=where) from None
    return found.reshape(*found.shape[:2], channels)


def _from_array(value: Any, where: str) -> Image:
    from PIL import Image

    try:
        array = np.asarray(value)
    except (ValueError, TypeError):
        array = np.zeros(0)
    whole = array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255
    if not whole or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        what = f"expected {FORMS}, got {type(value).__name__}"
        if isinstance(value, list | tuple | np.ndarray):
            what += f" of shape {list(array.shape)} and type {array.dtype}"
        raise InputError(what, where=where)
    return Image.fromarray(array.astype(np.uint8)[..., 0] if array.shape[2:] == (1,) else array.astype(np.uint8))


def _open(content: bytes, where: str | None) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(content))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
        what = "the bytes are no picture" if isinstance(error, UnidentifiedImageError) else f"no whole picture: {error}"
        raise InputError(what, where=where) from None
