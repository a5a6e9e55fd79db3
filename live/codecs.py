"""Pictures to bytes and back. JPEG; another codec is one more class in CODECS."""

import io
import warnings
from typing import Protocol

import numpy as np
from PIL import Image

from .wire import NotTaken

MOST_PIXELS = 16_000_000
# each scan of a progressive picture is a pass over all of it; encoders make about ten
MOST_SCANS = 16
_MOST_SEGMENTS = 1000  # before the first scan, each one a turn of a loop
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_FRAMES = range(0xC0, 0xD0)  # SOF0 to SOF15, but for the three below
_TABLES = (0xC4, 0xDB, 0xDD)  # Huffman, quantization, restart interval
_BASELINE_TO_PROGRESSIVE = (0xC0, 0xC1, 0xC2)
_JFIF, _ADOBE = 0xE0, 0xEE  # which colours it is in


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
        data = bare(data)
        try:
            with warnings.catch_warnings():
                # pillow warns of large pictures; the size has been looked at
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
                    return np.asarray(picture.convert("RGB"))
        except Exception as reason:
            # whatever a decoder says of hostile bytes, the stream goes on
            raise NotTaken(f"not a JPEG picture: {reason}") from None

    def encode(self, picture: np.ndarray, quality: int) -> bytes:
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "JPEG", quality=quality)
        return out.getvalue()


def bare(data: bytes) -> bytes:
    """A JPEG file without what a decoder does not need for the picture (Exif, profiles, previews,
    comments), once it is sure to be decoded soon.

    Raises:
        NotTaken: it is none, it has more pixels or scans than a camera's picture, or it is coded in
            a way that browsers do not use (lossless, hierarchical, arithmetic, more than 8 bits).
    """
    if not data.startswith(bytes((0xFF, _SOI))):
        raise NotTaken("not a JPEG picture")
    kept, framed, at = [data[:2]], False, 2
    for _ in range(_MOST_SEGMENTS):
        marker, size = _segment(data, at)
        if marker == _SOS:
            break
        body = data[at + 4 : at + 2 + size]
        if marker in _FRAMES and marker not in (*_TABLES, 0xC8, 0xCC):
            _looked_at(marker, body, framed)
            framed = True
        if (
            marker in (*_TABLES, *_BASELINE_TO_PROGRESSIVE)
            or (marker == _JFIF and body.startswith(b"JFIF"))
            or (marker == _ADOBE and body.startswith(b"Adobe"))
        ):
            kept.append(data[at : at + 2 + size])
        at += 2 + size
    else:
        raise NotTaken(f"more than {_MOST_SEGMENTS} segments")
    if not framed:
        raise NotTaken("not a JPEG picture: it has no size")
    # inside coded data 0xFF is always followed by 0, so no scan is missed
    scans = data.count(bytes((0xFF, _SOS)), at)
    if scans > MOST_SCANS:
        raise NotTaken(f"{scans} scans are more than {MOST_SCANS}")
    return b"".join((*kept, data[at:]))


def _segment(data: bytes, at: int) -> tuple[int, int]:
    """Marker and length of the segment at a place; the length counts its own two bytes."""
    if len(data) < at + 4 or data[at] != 0xFF:
        raise NotTaken("not a JPEG picture: it is damaged before its first line")
    marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
    if marker < 0xC0 or marker in (_SOI, _EOI) or size < 2 or len(data) < at + 2 + size:
        raise NotTaken("not a JPEG picture: it is damaged before its first line")
    return marker, size


def _looked_at(marker: int, body: bytes, again: bool) -> None:
    """Raises NotTaken for a frame header (SOF) that promises no picture of a browser."""
    if marker not in _BASELINE_TO_PROGRESSIVE:
        raise NotTaken(f"JPEG process {marker - 0xC0} is not decoded")
    if again or len(body) < 6 or body[0] != 8 or body[5] not in (1, 3, 4):
        raise NotTaken("not a JPEG picture of 8 bits")
    height, width = (int.from_bytes(body[i : i + 2], "big") for i in (1, 3))
    if not 0 < width * height <= MOST_PIXELS:
        raise NotTaken(f"{width} x {height} is not 1 to {MOST_PIXELS} pixels")


JPEG = Jpeg()
CODECS: dict[int, Codec] = {JPEG.number: JPEG}
