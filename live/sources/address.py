"""What comes from an address: RTSP, RTMP, SRT, and by HTTP motion JPEG, HLS, MPEG-TS and FLV.

Names are looked up and connections are made by wires.py, never by FFmpeg. What kind of stream it
is says the scheme or the server's answer; FFmpeg is told, and does not guess.
"""

import itertools
import time
from collections.abc import Iterator
from typing import Any

from .. import srt
from ..decoding import decoded
from ..faults import Refused
from ..hls import TYPES, Hls
from ..multipart import pictures
from ..reading import Reading, Seen
from ..relay import Relay
from ..wires import PATIENCE, Answer, Call, ask, checked, look_up
from . import Lost, Shot, Wanted

SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "http", "https")
BEGINS = 10.0  # seconds that the first picture may take, while something comes at all
SILENCE = 2.0  # seconds in which something has to come
_OPEN = 8.0  # seconds that FFmpeg has to find the pictures in a stream
# what is read to know what is in a stream. It is decoded, too, so that nothing is lost with it.
_BRIEF = {"probesize": "65536", "analyzeduration": "500000"}


class Kind:
    """See Source. A thread reads and decodes; another passes on what FFmpeg asks for itself."""

    def __init__(self, wanted: Wanted):
        self._wanted = wanted
        self._reading: Reading | None = None
        self._begun = False
        self._between = SILENCE

    @property
    def patience(self) -> float:
        """Seconds without a picture after which it is lost."""
        # a stream in parts begins with the next one
        return self._between if self._begun else max(BEGINS, self._between + SILENCE)

    @staticmethod
    def check(name: str) -> None:
        address = checked(name, SCHEMES)
        if address.scheme == "srt":
            srt.settings(address.text())

    @staticmethod
    def listed() -> list[str]:
        return []

    def open(self) -> None:
        address = checked(self._wanted.name, SCHEMES)
        self._reading = Reading(lambda me: self._read(me, address), address.place, SILENCE)

    def newest(self, timeout: float) -> Shot | None:
        shot = self._reading.newest(timeout)
        self._begun = self._begun or shot is not None
        return shot

    def close(self) -> None:
        if self._reading is not None:
            self._reading.close()

    def _read(self, reading: Reading, address) -> Iterator[Seen]:
        if address.scheme == "srt":
            return self._srt(reading, address)
        if address.scheme in ("http", "https"):
            return self._http(reading, address)
        return self._relayed(reading, address)

    def _relayed(self, reading: Reading, address) -> Iterator[Seen]:
        relay = reading.holds(Relay(address, heard=reading.came))
        kind = "rtsp" if address.scheme in ("rtsp", "rtsps") else "flv"

        def opened():
            import av

            options = relay.options | (_BRIEF if kind == "flv" else {})
            return av.open(
                relay.url, format=kind, container_options=options, timeout=(_OPEN, _OPEN)
            )

        yield from decoded(reading, opened, address.place, lambda: relay.trouble)

    def _srt(self, reading: Reading, address) -> Iterator[Seen]:
        ips = look_up(address)
        reading.came()
        try:
            file = srt.called(ips, address.port, srt.settings(address.text()), PATIENCE)
        except Lost as reason:
            raise Lost(f"{address.place}: {reason}") from None
        yield from self._bytes(reading, reading.holds(file), "mpegts", address.place)

    def _http(self, reading: Reading, address) -> Iterator[Seen]:
        call = reading.holds(Call(reading.came))
        answer = reading.holds(ask(address, call=call))
        who = answer.address.place
        _welcome(answer)
        kind = (answer.headers.get_content_type() or "").lower()
        if kind.startswith("multipart/"):
            yield from pictures(reading, answer)
            return
        if any(name in kind for name in TYPES) or answer.address.path.lower().endswith(".m3u8"):
            hls = reading.holds(Hls(answer, self._wanted.height, self._wanted.memory, call))
            # between two parts nothing comes; it says itself what is wrong with them
            self._between = hls.patience
            reading.silence = hls.patience + SILENCE
            form = "mp4" if hls.fragments else "mpegts"
            yield from self._bytes(reading, hls, form, who, paced=True)
            return
        first = answer.read(2**16)
        form = "mpegts" if first[:1] == b"G" else "flv" if first[:3] == b"FLV" else None
        if form is None:
            raise Refused(
                f"address: {who} gives {kind or 'something'}, which is no stream that is read "
                "here: motion JPEG, HLS, MPEG-TS or FLV."
            )
        yield from self._bytes(reading, _Begun(first, answer), form, who)

    def _bytes(
        self, reading: Reading, file: Any, form: str, who: str, paced: bool = False
    ) -> Iterator[Seen]:
        tape = _Tape(file, reading)

        def trouble():
            said = str(tape.failure or "")
            return said if who in said or not said else f"{who}: {said}"

        def opened():
            import av

            return av.open(tape, format=form, container_options=_BRIEF, buffer_size=2**15)

        try:
            yield from decoded(reading, opened, who, lambda: trouble() or None, paced)
        except Lost:
            if isinstance(tape.failure, Refused):
                raise tape.failure from None
            raise


def _welcome(answer: Answer) -> None:
    """Raises Lost unless a server answers with what was asked for."""
    said = {
        401: "does not take this user and password, or wants one: http://user:password@...",
        403: "does not allow this", 404: "has nothing at this address",
    }  # fmt: skip
    if answer.status != 200:
        words = said.get(answer.status, f"answers {answer.status}")
        raise Lost(f"{answer.address.place} {words}")


class _Begun:
    """An answer whose first bytes were looked at."""

    def __init__(self, first: bytes, answer: Answer):
        self._parts = itertools.chain([first], iter(lambda: answer.read(2**15), b""))
        self._rest = b""

    def read(self, size: int) -> bytes:
        data = self._rest or next(self._parts, b"")
        self._rest = data[size:]
        return data[:size]


class _Tape:
    """A file object for PyAV, which hides what reading raised behind an error of its own.

    Attributes:
        failure: what it raised.
    """

    def __init__(self, file: Any, reading: Reading):
        self._file, self._reading = file, reading
        self.failure: BaseException | None = None

    def read(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except (Lost, Refused) as reason:
            self.failure = reason
            return b""
        if data:
            self._reading.heard = time.monotonic()
        return data
