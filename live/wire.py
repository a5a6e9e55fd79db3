"""What travels on the frame socket: a header of 24 bytes, then one or two encoded pictures."""

import struct
from typing import NamedTuple

_HEADER = struct.Struct("<BBHIdII")
_LENGTH = struct.Struct("<I")
CAMERA, VIEW, COMPARED = 1, 2, 3
LARGEST = 4 * 2**20  # bytes of one message


class NotTaken(ValueError):
    """A frame that is not taken; the message says why."""


class Packet(NamedTuple):
    """One encoded picture on its way.

    Attributes:
        kind: CAMERA (up) or VIEW (down); on the wire a VIEW with an input is COMPARED.
        codec: number of a codec in live.codecs.
        view: index of the view, 0 for a camera frame.
        sequence: counts the frames of this camera or view.
        captured: when the camera took the picture, seconds since the epoch by the sender's clock.
        version: of the graph that made the picture.
        source: sequence of the camera frame that the picture was made from.
        payload: the encoded picture.
        input: the encoded frame that the picture was made from, for those who asked for it.
    """

    kind: int
    codec: int
    view: int
    sequence: int
    captured: float
    version: int
    source: int
    payload: bytes
    input: bytes = b""

    def packed(self) -> bytes:
        """The message; with an input, the length of the picture stands before the two."""
        header = _HEADER.pack(
            COMPARED if self.input else self.kind, self.codec, self.view,
            self.sequence & 0xFFFFFFFF, self.captured * 1000, self.version,
            self.source & 0xFFFFFFFF,
        )  # fmt: skip
        if not self.input:
            return header + self.payload
        return header + _LENGTH.pack(len(self.payload)) + self.payload + self.input


def unpacked(message: bytes) -> Packet:
    """A camera frame out of its message.

    Raises:
        NotTaken: the message is too short, too long or of another kind.
    """
    if len(message) > LARGEST:
        raise NotTaken(f"larger than {LARGEST} bytes")
    if len(message) <= _HEADER.size:
        raise NotTaken("no picture in the message")
    kind, codec, view, sequence, captured, version, source = _HEADER.unpack_from(message)
    if kind != CAMERA:
        raise NotTaken(f"kind {kind} is not a camera frame")
    # a clock that is no number would spoil the statistics
    captured = captured / 1000 if 0 <= captured < 1e15 else 0.0
    return Packet(kind, codec, view, sequence, captured, version, source, message[_HEADER.size :])
