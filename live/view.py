"""A LiveView of a run: from the device to bytes, off the sampler's thread, the latest wins."""

import asyncio
import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..host.frames.transfer import Fetched
from .bounds import most
from .codecs import JPEG
from .feeds import Origin, Place
from .mailbox import Closed, Slot
from .pictures import landed, on_its_way
from .sinks.names import Wish, Written
from .sinks.picture import save
from .sinks.record import Recorder
from .wire import VIEW, Packet

# gives the frame that a picture was made from, [H, W, 3] uint8, if it is known
MadeFrom = Callable[[], np.ndarray | None]


class Shown(NamedTuple):
    """A picture that a LiveView gave."""

    picture: Fetched | Tensor
    number: int
    quality: int
    origin: Origin
    version: int
    made_from: MadeFrom
    place: Place | None


class About(NamedTuple):
    """What is told of a picture that goes another way than as a Packet; see there."""

    seq: int
    captured: float
    version: int
    source: int


Tap = Callable[[np.ndarray, About], None]


class View:
    """Args:
        index: names the view on the wire.

    Attributes:
        latest: the last picture, encoded.
        wish: what its files are to be, and whether there is to be a recording; written in the
            prompt worker.
        begun: whether somebody fetches its pictures.
        ALPHA: whether its pictures keep a fourth channel.
    """

    ALPHA = False

    def __init__(self, index: int):
        self.index = index
        self.begun = self._ended = False
        self.slot: Slot[Shown] = Slot()
        self.latest: Packet | None = None
        self._made_from: tuple[MadeFrom, int] | None = None
        self._numbered = 0
        self._landed = 0
        self._arrival: Slot[int] = Slot()
        # weak: a filter that gives it again has it, and nobody else is to keep it from going
        self._image: Callable[[], Tensor | None] = lambda: None
        self.wish: Wish | None = None
        self._picture: np.ndarray | None = None  # the last, for the files
        self._place: Place | None = None
        self._since = 0.0  # when it was shown
        self._recorder: Recorder | None = None
        self._recorders: list[Recorder] = []
        self._taps: list[Tap] = []
        self._about: About | None = None

    def same(self, image: Tensor) -> bool:
        """Whether this is the very tensor shown last. In the prompt worker, as `show`."""
        return image is self._image()

    def forget(self) -> None:
        """The next picture is a new one, also if it is the very tensor shown last."""
        self._image = lambda: None

    def show(
        self,
        image: Tensor,
        quality: int,
        origin: Origin,
        version: int,
        made_from: MadeFrom,
        place: Place | None = None,
    ) -> None:
        """Leave a picture, IMAGE [B, H, W, C]; the newest of the batch is shown."""
        self._image = weakref.ref(image)
        self._numbered += 1
        coming = on_its_way(image, self.ALPHA)
        shown = coming, self._numbered, quality, origin, version, made_from, place
        self.slot.put(Shown(*shown))

    async def room(self, limit: int) -> None:
        """Wait until fewer than `limit` pictures are on their way from the device."""
        while self.begun and self._numbered - self._landed >= limit:
            with contextlib.suppress(Closed):
                await self._arrival.get(1.0)
                continue
            return

    async def serve(
        self,
        loop: asyncio.AbstractEventLoop,
        pool: Executor,
        offer: Callable[[Packet], None],
        compared: Callable[[], bool],
        refuse: Callable[[Exception], None],
    ) -> None:
        """Fetch, record, encode and offer pictures until the end. In the server's loop.

        Args:
            offer: called with each picture.
            compared: whether somebody wants to see what the pictures were made from.
            refuse: called with what went wrong with a picture; the next may be well.
        """
        with contextlib.suppress(Closed):
            while True:
                shown = await self.slot.get()
                try:
                    packet = await self._served(shown, loop, pool, compared())
                    if packet is not None:
                        offer(packet)
                except Exception as reason:
                    refuse(reason)
                finally:
                    self._arrived(shown)
                del shown  # or it would be kept until the next comes

    def _arrived(self, shown: Shown) -> None:
        self._landed = shown.number
        self._arrival.put(shown.number)

    async def _served(
        self, shown: Shown, loop: asyncio.AbstractEventLoop, pool: Executor, compared: bool
    ) -> Packet | None:
        picture = await loop.run_in_executor(pool, landed, shown.picture)
        self._arrived(shown)
        self._picture, self._place, self._since = picture, shown.place, time.monotonic()
        origin = shown.origin
        about = About(shown.number, origin.captured, shown.version, origin.sequence)
        self._about = about
        for tap in list(self._taps):
            tap(picture, about)
        if self._recorder is not None:
            self._recorder.wish = self.wish
            self._recorder.put(picture, shown.place)
        coding = [loop.run_in_executor(pool, JPEG.encode, picture, shown.quality)]
        if compared:
            work = _coded, shown.made_from, shown.quality
            coding.append(loop.run_in_executor(pool, *work))
        # both at once, each in a thread
        self.latest = Packet(
            VIEW, JPEG.number, self.index, shown.number, shown.origin.captured,
            shown.version, shown.origin.sequence, *await asyncio.gather(*coding),
        )  # fmt: skip
        self._made_from = shown.made_from, shown.quality
        return self.latest

    async def compare(
        self, loop: asyncio.AbstractEventLoop, pool: Executor, offer: Callable[[Packet], None]
    ) -> None:
        """Offer the latest picture again, with its input, which it went without.

        While nothing moves, a Live Similarity Filter lets no new picture come.
        """
        latest = self.latest
        if latest is None or self._made_from is None:
            return
        if not latest.input:
            data = await loop.run_in_executor(pool, _coded, *self._made_from)
            latest = latest._replace(input=data)
        if self.latest is not None and self.latest.sequence == latest.sequence:
            offer(latest)

    def watch(self, tap: Tap) -> None:
        """Call `tap` with each picture, [H, W, 3] uint8, and with the last one at once.

        It may not wait, nor write to the picture. In the server's loop.
        """
        if self._picture is not None and self._about is not None:
            tap(self._picture, self._about)
        self._taps.append(tap)

    def unwatch(self, tap: Tap) -> None:
        """The opposite; any number of times."""
        if tap in self._taps:
            self._taps.remove(tap)

    def record(self, tell: Callable[[dict[str, Any]], None]) -> None:
        """Begin or end a recording, as `wish` says. In the server's loop.

        Args:
            tell: see Recorder. A recording that failed stays until it is switched off: the next
                try is when it is switched on again.
        """
        wanted = self.wish is not None and self.wish.record and not self._ended
        if not wanted:
            self._end_recording()
        elif self._recorder is None:
            self._recorders = [one for one in self._recorders if not one.over.is_set()]
            if len(self._recorders) >= most("view.View._recorders"):
                words = "record: the ones before are still being written. Try again in a moment."
                return tell({"type": "problem", "reason": words})
            self._recorder = Recorder(self.wish, tell)
            self._recorders.append(self._recorder)
            # while nothing moves no picture comes, and this is what is shown
            if self._picture is not None:
                self._recorder.put(self._picture, self._now())

    def _now(self) -> Place | None:
        """Where in its film the picture that is shown would be by now."""
        place = self._place
        if place is None:
            return None
        return place._replace(seconds=place.seconds + time.monotonic() - self._since)

    def _end_recording(self) -> None:
        if self._recorder is not None:
            self._recorder.end()
            self._recorder = None

    async def save(self) -> Written:
        """Write the picture that is shown to a file of its own.

        Raises:
            ValueError: there is none yet, or filename_prefix is no name for it.
            OSError: it cannot be written.
        """
        if self._picture is None or self.wish is None:
            raise ValueError("No picture has come yet.")
        return await asyncio.to_thread(save, self._picture, self.wish)

    def end(self) -> list[threading.Event]:
        """No more pictures. Returns what is set when the recordings are whole."""
        self._ended = True
        self.slot.end()
        self._arrival.end()
        # also one that is whole a moment from now: what it tells is on its way then
        writing = [one.over for one in self._recorders if not one.over.is_set()]
        self._end_recording()
        self.latest = self._made_from = self._picture = None
        return writing


def _coded(made_from: MadeFrom, quality: int) -> bytes:
    picture = made_from()
    return b"" if picture is None else JPEG.encode(picture, quality)
