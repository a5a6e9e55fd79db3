"""What pages and phones send to a run: from coded pictures to the feeds. In the server's loop."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np

from . import pacing
from .feeds import CameraFeed
from .graph import Split, constant, number
from .mailbox import first
from .meters import Rate
from .shared import BROWSER, SIZES, Shared, key_of
from .sources import SCREEN
from .viewer import Viewer
from .wire import NotTaken, Packet, unpacked

_ROUND = 0.25  # seconds between two looks after which feeds there are
# what a run's own page sends: the header of a picture says which one by its place here
PAGE = (BROWSER, SCREEN)


def wanted(split: Split) -> list[dict[str, Any]]:
    """The live sources of a graph, for the page, whose one camera serves all that show it.

    Returns:
        For each node its source and the width, height (pixels) and fps wanted of that: of what the
        page sends, the most that any node of the graph wants.
    """
    cameras = [
        {
            "node": node,
            "source": constant(inputs, "source", BROWSER, node),
            **{name: number(inputs, name, default) for name, default in SIZES.items()},
        }
        for node in split.sources
        for inputs in [split.graph[node]["inputs"]]
    ]
    for source in PAGE:
        shared = [camera for camera in cameras if camera["source"] == source]
        most = {name: max((camera[name] for camera in shared), default=0) for name in SIZES}
        for camera in shared:
            camera |= most
    return cameras


class Cameras:
    """Args:
        shared: the run's.
        pool: decodes.

    Attributes:
        senders: who sends each of the feeds now, by the feed's key.
        rate: frames that came, of all of them.
    """

    def __init__(self, shared: Shared, loop: asyncio.AbstractEventLoop, pool: Executor):
        self._shared, self._loop, self._pool = shared, loop, pool
        self.senders: dict[Any, Viewer] = {}
        self.rate = Rate()
        self._told: dict[Any, tuple[Viewer, dict[str, Any]]] = {}

    def admit(self, viewer: Viewer, keys: Sequence[Any]) -> None:
        """A listener sends these from now on; it is told its pace anew."""
        for key in keys:
            self.senders[key] = viewer
            self._told.pop(key, None)

    def leave(self, viewer: Viewer) -> None:
        """A listener is gone."""
        self.senders = {key: one for key, one in self.senders.items() if one is not viewer}

    def receive(self, viewer: Viewer, message: bytes, keys: Sequence[Any]) -> None:
        """A frame from a listener; a bad one is counted and answered with the reason.

        Args:
            keys: what it may send, in the order of the header's `view`.
        """
        answer = {"type": "received", "seq": None, "camera": None}
        try:
            packet = unpacked(message)
            answer |= {"seq": packet.sequence, "camera": packet.view}
            key = keys[packet.view] if packet.view < len(keys) else None
            feed = self._shared.feeds.get(key)
            if self.senders.get(key) is not viewer or not isinstance(feed, CameraFeed):
                raise NotTaken("no Live Camera of this graph shows it")
            now = time.monotonic()
            self.rate.add(now)
            feed.coded.put((packet, now))
            viewer.tell({**answer, "refused": None})
        except NotTaken as reason:
            self._shared.faults.count("frame")
            viewer.tell({**answer, "refused": str(reason)})

    def given(self, key: Any, picture: np.ndarray, captured: float) -> None:
        """A picture that comes decoded, by WebRTC. In any thread, of each feed in one at a time.

        Args:
            picture: [H, W, 3] uint8.
            captured: seconds since the epoch, by the sender's clock.
        """
        feed = self._shared.feeds.get(key)
        if isinstance(feed, CameraFeed):
            now = time.monotonic()
            feed.given(picture, captured, now)
            with contextlib.suppress(RuntimeError):  # the server is going down
                self._loop.call_soon_threadsafe(self.rate.add, now)

    async def decode(self, over: Callable[[], bool]) -> None:
        """Frames from bytes to images, in worker threads, the latest first, until `over`."""
        while not over():
            feeds = {
                key: feed
                for key, feed in list(self._shared.feeds.items())
                if isinstance(feed, CameraFeed) and not feed.coded.over
            }
            if not feeds:
                await asyncio.sleep(_ROUND)
            elif await first([feed.coded for feed in feeds.values()], _ROUND):
                work = [
                    self._decoded(key, feed, *item)
                    for key, feed in feeds.items()
                    if (item := feed.coded.take()) is not None
                ]
                await asyncio.gather(*work)

    async def _decoded(self, key: Any, feed: CameraFeed, packet: Packet, arrived: float) -> None:
        try:
            work = feed.decoded, packet, arrived
            feed.slot.put(await self._loop.run_in_executor(self._pool, *work))
        except Exception as reason:
            # whatever is wrong with a picture, the next may be well
            self._shared.faults.count("frame")
            words = str(reason) or type(reason).__name__
            if (sender := self.senders.get(key)) is not None:
                sender.tell({"type": "unreadable", "seq": packet.sequence, "reason": words})

    def tell_pace(self) -> None:
        """Tell who sends how fast and how large, where that is not what it was."""
        frame = self._shared.compute.percentile(50) or 0.0
        split = self._shared.split
        for key, viewer in list(self.senders.items()):
            feed = self._shared.feeds.get(key)
            if not isinstance(feed, CameraFeed):
                continue
            rates = [
                number(split.graph[node]["inputs"], "fps", SIZES["fps"])
                for node in split.sources
                if key_of(split.graph[node]["inputs"], node) == key
            ]
            # as the graph asked for them, settings that come by a wire included
            shapes = list(feed.shapes.values())
            interval = pacing.capture_interval(frame, max(rates, default=SIZES["fps"]))
            pace = {
                "camera": PAGE.index(key) if key in PAGE else 0,
                "interval_ms": pacing.milliseconds(interval),
                "width": max((shape.width for shape in shapes), default=SIZES["width"]),
                "height": max((shape.height for shape in shapes), default=SIZES["height"]),
            }
            if self._told.get(key) != (viewer, pace):
                self._told[key] = viewer, pace
                viewer.tell({"type": "pace", **pace})

    def clear(self) -> None:
        """The run is over."""
        self.senders, self._told = {}, {}
