"""What FFmpeg's libraries make of a stream, through PyAV: every picture decoded, the newest given.

A picture is made of those before it, so all are decoded; only what is asked for becomes RGB. No
more than a picture is waited for: decoders that work on several at a time would give each later.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from .faults import Refused
from .media.films import pictures_of
from .media.still import MOST_PIXELS_MOVING
from .reading import Reading, Seen
from .sources import Lost

_BROKEN = 200  # packets in a row that cannot be decoded
_AHEAD = 2.0  # seconds that a stream's clock may jump before it is taken to have been set anew


def decoded(
    reading: Reading,
    opened: Callable[[], Any],
    who: str,
    trouble: Callable[[], str | None] = lambda: None,
    paced: bool = False,
) -> Iterator[Seen]:
    """The pictures of a stream.

    Args:
        opened: gives PyAV's container.
        who: the other end, for messages.
        trouble: what is known to be wrong with it, in words, where FFmpeg only finds an end.
        paced: they come in bursts, and are given by the stream's own clock.

    Raises:
        Lost, Refused.
    """
    import av

    pace = _Pace() if paced else None
    try:
        container = opened()
        try:
            stream = pictures_of(container)
            if stream is None:
                raise Lost(trouble() or f"{who} sends no pictures that can be decoded")
            _bounded(stream.width, stream.height, who)
            context = stream.codec_context
            context.options = {"max_pixels": str(MOST_PIXELS_MOVING)}
            context.thread_type = "SLICE"
            for frame, at in _frames(reading, container, stream, who):
                _bounded(frame.width, frame.height, who)
                if pace is not None and not pace.wait(frame.time, reading):
                    return
                yield Seen(lambda frame=frame: frame.to_ndarray(format="rgb24"), at)
        finally:
            container.close()
    except av.FFmpegError as reason:
        raise Lost(trouble() or _worded(reason, who)) from None
    if (known := trouble()) is not None:
        raise Lost(known)


def _frames(
    reading: Reading, container: Any, stream: Any, who: str
) -> Iterator[tuple[Any, float]]:
    """Frames, and when the packet came that each is of."""
    import av

    came: dict[int | None, float] = {}
    broken = 0
    for packet in container.demux(stream):
        came[packet.pts] = time.time()
        reading.came()
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            # what came in the middle of it has no beginning
            broken += 1
            if broken > _BROKEN:
                raise Lost(f"{who} sends what cannot be decoded") from None
            continue
        for frame in frames:
            broken = 0
            yield frame, came.pop(frame.pts, None) or time.time()
        while len(came) > 64:
            del came[next(iter(came))]


def _bounded(width: int, height: int, who: str) -> None:
    if width * height > MOST_PIXELS_MOVING:
        raise Refused(f"{who} sends pictures of {width} x {height}, which are too large.")


def _worded(reason: Exception, who: str) -> str:
    import av

    if isinstance(reason, av.InvalidDataError):
        return f"{who} sends what is no stream that can be read"
    if isinstance(reason, TimeoutError | av.ExitError):
        return f"{who} does not answer"
    return f"{who} has cut the connection"


class _Pace:
    """A stream's clock beside ours."""

    def __init__(self):
        self._origin: float | None = None

    def wait(self, at: float | None, reading: Reading) -> bool:
        """Wait until a picture is due; False once the reading is over."""
        now = time.monotonic()
        if at is None:
            return not reading.over.is_set()
        late = 0.0 if self._origin is None else now - self._origin - at
        if self._origin is None or not -_AHEAD < late < _AHEAD / 4:
            # the first one, another clock, or the source ran dry: from here on
            self._origin, late = now - at, 0.0
        return not reading.over.wait(max(0.0, -late))
