"""Motion JPEG over HTTP: a picture in each part of a multipart/x-mixed-replace body (RFC 2046)."""

import re
import time
from collections.abc import Iterator

from .codecs import JPEG
from .reading import Reading, Seen
from .sources import Lost
from .wire import NotTaken
from .wires import Answer

_MOST = 16 * 2**20  # bytes of a picture
_HEAD = 2**13  # of what stands before it
_LENGTH = re.compile(rb"content-length:[ \t]*([0-9]{1,9})[ \t]*\r?\n", re.IGNORECASE)


def pictures(reading: Reading, answer: Answer) -> Iterator[Seen]:
    """The pictures of an answer's body. Raises Lost."""
    who = answer.address.place
    for data in _parts(reading, answer):
        at = time.time()

        def picture(data=data):
            try:
                return JPEG.decode(data)
            except NotTaken as reason:
                raise Lost(f"{who} sends what is {reason}") from None

        yield Seen(picture, at)


def _parts(reading: Reading, answer: Answer) -> Iterator[bytes]:
    data = bytearray()
    who = answer.address.place
    while part := answer.read(2**16):
        reading.came()
        data += part
        while (found := _first(data)) is not None:
            begin, end = found
            picture = bytes(data[begin:end])
            del data[:end]
            yield picture
        if len(data) > _MOST + _HEAD:
            raise Lost(f"{who} sends more than {_MOST} bytes for a picture")


def _first(data: bytearray) -> tuple[int, int] | None:
    """Where the first whole picture is; None before it has come."""
    begin = data.find(b"\xff\xd8\xff")
    if begin < 0:
        return None
    head = bytes(data[max(0, begin - _HEAD) : begin])
    length = _LENGTH.findall(head)
    if length and head.rstrip(b"\r\n") != head:
        end = begin + int(length[-1])
        return (begin, end) if 0 < end <= len(data) else None
    # no length: up to the line that divides it from the next; a picture ends with FF D9
    end = data.find(b"\xff\xd9\r\n--", begin)
    end = data.find(b"\xff\xd9\n--", begin) if end < 0 else end
    return None if end < 0 else (begin, end + 2)
