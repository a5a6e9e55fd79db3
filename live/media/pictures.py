"""Still and animated pictures except GIF, by Pillow, as ComfyUI's Load Image shows them."""

import contextlib
import pathlib
import threading
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFile

from .still import MOST_PIXELS, Damage, Still, Unreadable, animated, bounded
from .upright import AS_IT_IS, EXIF

KINDS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")
# the others' further frames are pages, or a photo's depth and brightness
ANIMATED = ("AVIF", "PNG", "WEBP")
_ORIENTATION = 0x0112
_lenient = threading.Lock()


def stills(path: pathlib.Path, damage: Damage) -> Iterator[Still] | None:
    """The frames of a picture; None for a GIF, or a file that is none of KINDS.

    Raises:
        Unreadable: it is too large. Nothing is decoded then.
        Exception: whatever Pillow finds wrong, from the iterator as well.
    """
    Image.init()
    known = [kind for kind in KINDS if kind in Image.OPEN]
    try:
        with warnings.catch_warnings():
            # of many pixels: the size is looked at below, before anything is decoded
            warnings.simplefilter("ignore")
            film = Image.open(path, formats=known)
    except Image.UnidentifiedImageError:
        return None
    except Image.DecompressionBombError:
        raise Unreadable(
            f"{path.name} has more than the {MOST_PIXELS / 1e6:.0f} million pixels that a picture "
            "may have. Make it smaller."
        ) from None
    try:
        gif = film.format == "GIF"
        moving = gif or (film.format in ANIMATED and film.is_animated)
        bounded(path.name, *film.size, moving)
    except BaseException:
        film.close()
        raise
    if gif:
        # FFmpeg's, whose sizes it does not tell before it decodes: ComfyUI shows its colours
        film.close()
        return None
    return _frames(film, moving, damage)


def _frames(film: Image.Image, moving: bool, damage: Damage) -> Iterator[Still]:
    with film:
        time, i = 0.0, 0
        # the picture for those who cannot show the animation is none of its frames
        if moving and film.info.get("default_image"):
            i = 1
        while True:
            try:
                film.seek(i)
            except EOFError:
                return
            # made at once, because the next seek changes the picture
            picture = _rgb(film) if moving else _cut_off_too(film, damage)
            # known once it is decoded
            lasts = animated((film.info.get("duration") or 0) / 1000)
            yield Still(time, lasts, lambda picture=picture: picture)
            time, i = time + lasts, i + 1
            if not moving:
                return


def _cut_off_too(film: Image.Image, damage: Damage) -> np.ndarray:
    """`_rgb` of what there is, as browsers and ComfyUI show a picture that is cut off."""
    try:
        return _rgb(film)
    except (OSError, ValueError):
        damage.parts += 1
    # a switch for all of Pillow, which ComfyUI's loaders turn as well
    with _lenient:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try:
            return _rgb(film)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _rgb(film: Image.Image) -> np.ndarray:
    """The frame upright, [H, W, 3] uint8; what is transparent keeps its colour, as in ComfyUI."""
    if film.mode.startswith("I"):
        # 16 bits of grey
        grey = np.rint((np.asarray(film, np.float32) / 257).clip(0, 255))
        picture = grey.astype(np.uint8)[..., None].repeat(3, -1)
    else:
        picture = np.asarray(film.convert("RGB"))
    turn = AS_IT_IS
    # EXIF comes from cameras, and is often broken
    with contextlib.suppress(Exception):
        # asked for last: what turns itself while it is decoded takes the number away
        turn = EXIF.get(film.getexif().get(_ORIENTATION), AS_IT_IS)
    return turn.upright(picture)
