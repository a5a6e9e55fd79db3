"""Pictures to bytes and back. JPEG; another codec is one more class in CODECS."""

import io
import warnings
from typing import Protocol

import numpy as np
from PIL import Image

from .wire import NotTaken

MOST_PIXELS = 16_000_000


class Codec(Protocol):
    """Called in worker threads, several at a time; keeps no state.

    Attributes:
        number: names the codec on the wire.
        mime: its media type.
    """

    number: int
    mime: str

    def decode(self, data: bytes) -> np.ndarray:
        """[H, W, 3] uint8. Raises NotTaken for what is no picture, or too large a one."""

    def encode(self, picture: np.ndarray, quality: int) -> bytes:
        """From [H, W, 3] uint8; quality 1..100."""


class Jpeg:
    number = 1
    mime = "image/jpeg"

    def decode(self, data: bytes) -> np.ndarray:
        try:
            with warnings.catch_warnings():
                # pillow warns of large pictures; the size is looked at before anything is decoded
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
                    width, height = picture.size
                    if width * height > MOST_PIXELS:
                        raise NotTaken(f"{width} x {height} is more than {MOST_PIXELS} pixels")
                    return np.asarray(picture.convert("RGB"))
        except NotTaken:
            raise
        except Exception as reason:
            # whatever a decoder says of hostile bytes, the stream goes on
            raise NotTaken(f"not a JPEG picture: {reason}") from None

    def encode(self, picture: np.ndarray, quality: int) -> bytes:
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "JPEG", quality=quality)
        return out.getvalue()


JPEG = Jpeg()
CODECS: dict[int, Codec] = {JPEG.number: JPEG}
