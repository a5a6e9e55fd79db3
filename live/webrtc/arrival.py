"""When a picture is whole, and which are left out. Imported when aiortc is there."""

import re
from collections.abc import Callable

from aiortc.jitterbuffer import JitterBuffer, JitterFrame
from aiortc.rtp import RtpPacket

_MOST = 8  # pictures that may wait to be decoded
_START = b"\x00\x00\x00\x01"  # of H.264, as aiortc joins its packets (ITU-T H.264, annex B)
_WHOLE = re.compile(rb"\x00\x00\x01[\x05\x25\x45\x65]")  # an IDR slice


class Prompt(JitterBuffer):
    """In place of aiortc's own, which takes a picture for whole when the next one begins, a whole
    interval later. Both codecs mark the last packet of each (RFC 6184, section 5.1; RFC 7741,
    section 4.1).

    Where decoding does not keep up, aiortc lets the pictures wait, without end. Here they are left
    out, up to the next one that needs none before it, which is asked for.

    Args:
        waiting: how many pictures wait to be decoded.

    Attributes:
        left_out: pictures that were.
    """

    def __init__(self, capacity: int, waiting: Callable[[], int]):
        super().__init__(capacity, is_video=True)
        self._waiting = waiting
        self._skips = False
        self.left_out = 0

    def add(self, packet: RtpPacket) -> tuple[bool, JitterFrame | None]:
        asks, frame = super().add(packet)
        if frame is None:
            return asks, None
        many = self._waiting() > _MOST
        asks |= many and not self._skips
        self._skips = many or (self._skips and not whole(frame.data))
        if self._skips:
            self.left_out += 1
            return asks, None
        return asks, frame

    def _remove_frame(self, sequence_number: int) -> JitterFrame | None:
        packets = []
        for count in range(self.capacity):
            packet = self._packets[(self._origin + count) % self.capacity]
            if packet is None or (packets and packet.timestamp != packets[0].timestamp):
                break
            packets.append(packet)
            if packet.marker:
                self.remove(len(packets))
                data = b"".join(packet._data for packet in packets)
                return JitterFrame(data=data, timestamp=packets[0].timestamp)
        # of a sender that marks none
        return super()._remove_frame(sequence_number)


def whole(data: bytes) -> bool:
    """Whether a coded picture needs none before it. See RFC 6386, section 9.1, for VP8."""
    if data.startswith(_START):
        return _WHOLE.search(data) is not None
    return len(data) > 0 and not data[0] & 1
