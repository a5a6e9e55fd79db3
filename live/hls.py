"""HTTP Live Streaming (RFC 8216): the segments that a playlist names, as one stream of bytes.

Playlists and segments are asked for here, never by FFmpeg, which would open whatever a playlist
names. What is encrypted, or a part of a file, is not read.
"""

import re
import threading
import time
from typing import NamedTuple

from .faults import Refused
from .sources import Lost, Memory
from .wires import SILENCE, Answer, Call, ask, elsewhere

_PLAYLIST = 2**20  # bytes
_SEGMENT = 2**26
_WAITING = 2**23  # bytes that FFmpeg has not read yet
_MOST = 10_000  # lines
TYPES = ("mpegurl",)  # in a Content-Type
_RESOLUTION = re.compile(r"RESOLUTION=[0-9]{1,5}x([0-9]{1,5})")
_BANDWIDTH = re.compile(r"(?:^|[:,])BANDWIDTH=([0-9]{1,12})")
_URI = re.compile(r'URI="([^"]*)"')


class Segment(NamedTuple):
    """Attributes:
    number: in the stream.
    place: as the playlist has it.
    begin: what goes before it (EXT-X-MAP), as the playlist has it; "" for nothing.
    """

    number: int
    place: str
    begin: str


class Playlist(NamedTuple):
    """Attributes:
    variants: (height, bandwidth, place) of each, if it is a list of playlists.
    segments: else.
    lasts: seconds that a segment is long, at most.
    ended: none is going to be added.
    """

    variants: list[tuple[int, int, str]]
    segments: list[Segment]
    lasts: float
    ended: bool


def playlist(text: str) -> Playlist:
    """Raises Refused for one that is not read here, Lost for what is none."""
    lines = [line.strip() for line in text.splitlines()]
    if not lines or lines[0] != "#EXTM3U" or len(lines) > _MOST:
        raise Lost("what came is no HLS playlist")
    variants, segments, number, lasts, begin = [], [], 0, 6.0, ""
    variant: tuple[int, int] | None = None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "#EXT-X-STREAM-INF":
            height, width = _RESOLUTION.search(value), _BANDWIDTH.search(value)
            variant = int(height[1]) if height else 0, int(width[1]) if width else 0
        elif name == "#EXT-X-TARGETDURATION" and re.fullmatch(r"[0-9.]{1,8}", value):
            lasts = min(max(float(value), 0.2), 60.0)
        elif name == "#EXT-X-MEDIA-SEQUENCE" and re.fullmatch(r"[0-9]{1,18}", value):
            number = int(value)
        elif name == "#EXT-X-BYTERANGE" or (name == "#EXT-X-MAP" and "BYTERANGE" in value):
            raise Refused("address: this HLS stream is parts of a file, which is not read here.")
        elif name == "#EXT-X-MAP" and (found := _URI.search(value)):
            begin = found[1]
        elif name == "#EXT-X-KEY" and "METHOD=NONE" not in value:
            raise Refused("address: this HLS stream is encrypted, which is not read here.")
        elif line and not line.startswith("#"):
            if variant is not None:
                variants.append((*variant, line))
                variant = None
            else:
                segments.append(Segment(number + len(segments), line, begin))
    return Playlist(variants, segments, lasts, "#EXT-X-ENDLIST" in lines)


def chosen(variants: list[tuple[int, int, str]], height: int) -> str:
    """Of the variants: the lowest that has as many lines as are wanted, else the best."""
    enough = [one for one in variants if one[0] >= height > 0]
    return min(enough)[2] if enough else max(variants)[2]


class _Another(Lost):
    """Its numbers say nothing any more of what was done."""


class Hls:
    """A file object of a stream's bytes, filled by a thread.

    A playlist or a part that does not come is asked for again. A part of a live stream is given
    once, whatever was lost in between: what is begun is in `memory`, and while the numbers go on,
    the next connection goes on behind it.

    Args:
        answer: the playlist, just asked for.
        height: lines that are wanted.
        memory: of the source's connections.
        call: by which it was asked for, and all else is; it cuts it off.

    Attributes:
        lasts: seconds that a segment is long, at most; known once made.
        patience: seconds without a new part after which it is lost.
        fragments: the bytes are fragmented MP4, not MPEG-TS; known once made.

    Raises:
        Lost, Refused.
    """

    def __init__(self, answer: Answer, height: int, memory: Memory, call: Call):
        self._memory, self._call = memory, call
        self._changed = threading.Condition()
        self._waiting = bytearray()
        self._failure: BaseException | None = None
        self._over = False
        self._address = answer.address
        try:
            first = self._listed(answer)
        finally:
            answer.close()
        if first.variants:
            self._address = elsewhere(self._address, chosen(first.variants, height))
            first = self._playlist()
        if not first.segments:
            raise Lost(f"{self._address.place} has no part of the stream yet")
        self.lasts = first.lasts
        self.patience = max(SILENCE, 3 * first.lasts)
        self.fragments = bool(first.segments[0].begin)
        self._done, self._begun = self._before(first), ""
        self._half: tuple[int | str, int] = "", 0  # what is given in part, and how much of it
        self._well = time.monotonic()  # when something was last given
        self._thread = threading.Thread(
            target=self._run, args=(first,), name="livediffusion-source-hls", daemon=True
        )
        self._thread.start()

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end. Raises Lost, Refused."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._failure or self._over)
            if self._failure and not self._waiting:
                raise self._failure
            data = bytes(self._waiting[:size])
            del self._waiting[:size]
            self._changed.notify_all()
            return data

    def close(self) -> None:
        """From any thread."""
        with self._changed:
            self._over = True
            self._waiting.clear()
            self._changed.notify_all()
        self._call.close()
        self._thread.join(2.0)

    def _listed(self, answer: Answer) -> Playlist:
        if answer.status != 200:
            raise Lost(f"{answer.address.place} answers {answer.status}")
        return playlist(answer.whole(_PLAYLIST).decode("utf-8", "replace"))

    def _playlist(self) -> Playlist:
        answer = ask(self._address, call=self._call)
        try:
            self._address = answer.address
            return self._listed(answer)
        finally:
            answer.close()

    def _before(self, first: Playlist) -> int:
        """The number behind which it begins."""
        segments, memory = first.segments, self._memory
        # the last but one: the last is played before the next is there
        late = segments[-2:][0].number - 1
        if memory.part is not None and _goes_on(segments, memory.part):
            same = next((_named(one.place) for one in segments if one.number == memory.part), None)
            short = first.ended and segments[-1].number < memory.part
            # another part under its number, or the end before it: another stream
            if not short and same in (None, memory.place):
                return max(memory.part, late)
        memory.part = None
        if first.ended:
            return segments[0].number - 1  # a film: all of it, each time
        memory.part, memory.place = late, None
        return late

    def _run(self, listed: Playlist) -> None:
        try:
            self._follow(listed)
            failure: BaseException = Lost(f"{self._address.place} has ended the stream")
        except BaseException as reason:
            failure = reason
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def _follow(self, listed: Playlist | None) -> None:
        while not self._over:
            last, trouble = None, None
            try:
                listed = listed or self._playlist()
                self._give(listed)
                if listed.ended:
                    return
                last = listed.segments[-1].number if listed.segments else None
            except _Another:
                self._memory.part = None
                raise
            except Lost as reason:
                trouble = reason
            if time.monotonic() - self._well > self.patience:
                if last is not None and last < self._done:
                    self._memory.part = None  # one that has begun again by now
                raise trouble or Lost(f"{self._address.place} has no new part of the stream")
            listed = None
            with self._changed:
                self._changed.wait_for(lambda: self._over, min(max(self.lasts / 4, 0.2), 2.0))

    def _give(self, listed: Playlist) -> None:
        """Have what is new in a list wait to be read. Raises Lost."""
        if listed.segments and not _goes_on(listed.segments, self._done):
            raise _Another(f"{self._address.place} has begun another stream")
        fresh = [one for one in listed.segments if one.number > self._done]
        if not listed.ended and len(fresh) > 3:
            fresh = fresh[-2:]
        for one in fresh:
            if one.begin != self._begun:
                if self._begun:
                    raise _Another(f"{self._address.place} has begun another stream")
                self._take(one.begin, one.begin)
                self._begun = one.begin
            self._take(one.number, one.place)
            self._done = one.number

    def _take(self, name: int | str, place: str) -> None:
        """Have the bytes of a segment wait to be read, but for those that did already."""
        answer = ask(elsewhere(self._address, place), call=self._call)
        try:
            if answer.status != 200:
                raise Lost(f"{answer.address.place} answers {answer.status} for a part")
            given, size = self._half[1] if self._half[0] == name else 0, 0
            while data := answer.read(2**16):
                self._call.came()
                size += len(data)
                if size > _SEGMENT:
                    raise Lost(f"{answer.address.place} sends more than {_SEGMENT} bytes a part")
                if size <= given:
                    continue
                with self._changed:
                    self._changed.wait_for(lambda: len(self._waiting) < _WAITING or self._over)
                    if self._over:
                        return
                    self._waiting += data[max(0, len(data) - (size - given)) :]
                    self._changed.notify_all()
                given = size
                self._half, self._well = (name, given), time.monotonic()
                if isinstance(name, int) and self._memory.part is not None:
                    self._memory.part, self._memory.place = name, _named(place)
        finally:
            answer.close()


def _named(place: str) -> str:
    return place.partition("?")[0]


def _goes_on(segments: list[Segment], done: int) -> bool:
    """Whether a list is of the stream of which so much is done; one may be a little old."""
    return segments[-1].number >= done - len(segments)
