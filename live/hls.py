"""HTTP Live Streaming (RFC 8216): the segments that a playlist names, as one stream of bytes.

Playlists and segments are asked for here, never by FFmpeg, which would open whatever a playlist
names. What is encrypted, or a part of a file, is not read.
"""

import re
import threading
from typing import NamedTuple

from ..trust.addresses import Address
from .faults import Refused
from .sources import Lost
from .wires import Answer, ask, elsewhere

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
        elif name == "#EXT-X-MAP" and (found := _URI.search(value)):
            begin = found[1]
        elif name == "#EXT-X-KEY" and "METHOD=NONE" not in value:
            raise Refused("address: this HLS stream is encrypted, which is not read here.")
        elif name == "#EXT-X-BYTERANGE" or (name == "#EXT-X-MAP" and "BYTERANGE" in value):
            raise Refused("address: this HLS stream is parts of a file, which is not read here.")
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


class Hls:
    """A file object of a stream's bytes, filled by a thread.

    Args:
        answer: the playlist, just asked for.
        height: lines that are wanted.
        came: called when something has come.

    Attributes:
        lasts: seconds that a segment is long, at most; known once made.
        fragments: the bytes are fragmented MP4, not MPEG-TS; known once made.

    Raises:
        Lost, Refused.
    """

    def __init__(self, answer: Answer, height: int, came=lambda: None):
        self._came, self._height = came, height
        self._changed = threading.Condition()
        self._waiting = bytearray()
        self._failure: BaseException | None = None
        self._over = False
        self._asked: Answer | None = answer
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
        self.fragments = bool(first.segments[0].begin)
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
            asked = self._asked
            self._waiting.clear()
            self._changed.notify_all()
        if asked is not None:
            asked.close()
        self._thread.join(2.0)

    def _listed(self, answer: Answer) -> Playlist:
        if answer.status != 200:
            raise Lost(f"{answer.address.place} answers {answer.status}")
        data = answer.whole(_PLAYLIST)
        self._came()
        return playlist(data.decode("utf-8", "replace"))

    def _ask(self, address: Address) -> Answer:
        answer = ask(address)
        with self._changed:
            self._asked = answer
            if not self._over:
                return answer
        answer.close()
        raise Lost("it is closed")

    def _playlist(self) -> Playlist:
        answer = self._ask(self._address)
        try:
            self._address = answer.address
            return self._listed(answer)
        finally:
            answer.close()

    def _run(self, listed: Playlist) -> None:
        try:
            self._follow(listed)
            failure: BaseException = Lost(f"{self._address.place} has ended the stream")
        except BaseException as reason:
            failure = reason
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def _follow(self, listed: Playlist) -> None:
        # the last but one: the last is played before the next is there
        segments = listed.segments
        done = segments[0].number - 1 if listed.ended else segments[-2:][0].number - 1
        begun = ""
        while not self._over:
            fresh = [one for one in listed.segments if one.number > done]
            if not listed.ended and len(fresh) > 3:
                fresh = fresh[-2:]
            for one in fresh:
                if one.begin != begun:
                    if begun:
                        raise Lost(f"{self._address.place} has begun another stream")
                    self._take(one.begin)
                    begun = one.begin
                self._take(one.place)
                done = one.number
            if listed.ended:
                return
            if listed.segments and listed.segments[-1].number < done:
                raise Lost(f"{self._address.place} has begun another stream")
            with self._changed:
                self._changed.wait_for(lambda: self._over, min(max(self.lasts / 4, 0.2), 2.0))
            if not self._over:
                listed = self._playlist()

    def _take(self, place: str) -> None:
        """Have the bytes of a segment wait to be read."""
        answer = self._ask(elsewhere(self._address, place))
        try:
            if answer.status != 200:
                raise Lost(f"{answer.address.place} answers {answer.status} for a part")
            size = 0
            while data := answer.read(2**16):
                self._came()
                size += len(data)
                if size > _SEGMENT:
                    raise Lost(f"{answer.address.place} sends more than {_SEGMENT} bytes a part")
                with self._changed:
                    self._changed.wait_for(lambda: len(self._waiting) < _WAITING or self._over)
                    if self._over:
                        return
                    self._waiting += data
                    self._changed.notify_all()
        finally:
            answer.close()
