"""A single picture of a view in ComfyUI's output folder."""

from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .names import Wish, Written, reserve

_COMPRESSION = 4  # as ComfyUI's Save Image


def save(picture: np.ndarray, wish: Wish) -> Written:
    """Write a PNG with the workflow in it, as ComfyUI's Save Image writes it.

    Args:
        picture: [H, W, 3] uint8.
        wish: its name and contents.

    Raises:
        ValueError: the prefix leads out of the output folder.
        OSError: it cannot be written; then no file is left.
    """
    kept: Any = PngInfo()
    for name, text in wish.metadata().items():
        kept.add_text(name, text)
    height, width = picture.shape[:2]
    place, file = reserve(wish.prefix, width, height, ".png")
    try:
        with file:
            image = Image.fromarray(picture)
            image.save(file, "PNG", pnginfo=kept, compress_level=_COMPRESSION)
    except OSError:
        place.path.unlink(missing_ok=True)
        raise
    return place
