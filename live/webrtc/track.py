"""A track whose next picture is always the newest. Imported when aiortc is there."""

import contextlib
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack

from ..mailbox import Closed, Slot
from .coder import CLOCK

AGAIN = 0.5  # seconds after which a picture is sent again: whoever lost it may ask for a whole one


class Given(NamedTuple):
    """A picture for a track.

    Attributes:
        picture: [H, W, 3 or 4] uint8.
        about: what is told of it, for `sent`.
        at: when it is to be shown, by time.monotonic.
    """

    picture: np.ndarray
    about: Any
    at: float


class Newest(MediaStreamTrack):
    """aiortc asks for a picture once it has sent the one before: meanwhile the newest wins.

    Args:
        sent: called with what is told of each picture, its time in ticks of CLOCK and that of the
            frame before it (-1: there was none), just before it is encoded; not for one that is
            sent again, which is such a frame before.

    Attributes:
        taken: pictures that went to be encoded.
    """

    kind = "video"

    def __init__(self, sent: Callable[[Any, int, int], None] | None = None):
        super().__init__()
        self._slot: Slot[Given] = Slot()
        self._held: av.VideoFrame | None = None
        self._begun = time.monotonic()
        self._last = -1
        self._sent = sent
        self.taken = 0

    @property
    def dropped(self) -> int:
        """Pictures that a newer one replaced before they were encoded."""
        return self._slot.replaced

    def put(self, picture: np.ndarray, about: Any = None, at: float | None = None) -> None:
        """Never waits. In any thread."""
        self._slot.put(Given(picture, about, time.monotonic() if at is None else at))

    async def recv(self) -> av.VideoFrame:
        """Raises MediaStreamError at the end."""
        given = None
        with contextlib.suppress(Closed):
            given = await self._slot.get(None if self._held is None else AGAIN)
        if given is None and (self._held is None or self._slot.over):
            raise MediaStreamError
        at = time.monotonic() if given is None else given.at
        # times that two pictures share would be one picture at the other end
        before = self._last
        self._last = max(before + 1, round((at - self._begun) * CLOCK))
        if given is not None:
            self._held = self._frame(given.picture)
            self.taken += 1
            if self._sent is not None:
                self._sent(given.about, self._last, before)
        self._held.pts = self._last
        return self._held

    def _frame(self, picture: np.ndarray) -> av.VideoFrame:
        # codecs halve the colours' sides
        height, width = (side // 2 * 2 for side in picture.shape[:2])
        pixels = np.ascontiguousarray(picture[:height, :width, :3])
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.time_base = Fraction(1, CLOCK)
        return frame

    def stop(self) -> None:
        super().stop()
        self._slot.end()
        self._held = None
