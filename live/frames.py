"""The frames' side of a live run: what the frame loop and the nodes of a frame see of it.

All of it runs in the prompt worker's thread. What the server's side is to know is told to it; it
takes that to its own loop.
"""

import functools
import time
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

from ..host.registry import streams
from .feeds import Feed, Frame
from .graph import GraphError, Split
from .mailbox import Closed
from .origins import Origins
from .pictures import Shape
from .shared import BROWSER, Shared
from .sinks.names import Wish
from .view import View

IN_FLIGHT = 2  # frames whose picture is not on the CPU yet

# the run whose frame is being made, for the nodes of that frame
current: ContextVar["Frames | None"] = ContextVar("livediffusion_frames", default=None)


class Server(Protocol):
    """What the frames' side tells the server's, from its own thread."""

    def begun(self) -> None:
        """Frames run, perhaps on another graph than before."""

    def lives(self) -> None:
        """A frame went through the graph."""

    def record(self, node: str) -> None:
        """A view's recording is to begin or to end, as its wish says."""

    def problem(self, reason: str, node: str | None) -> None:
        """An edit could not run; the graph before it goes on."""

    def ended(self, state: str, reason: str | None = None, node: str | None = None) -> None:
        """No more frames."""


class Frames:
    """A run, for its frame loop and nodes.

    Args:
        shared: what both sides see.
        server: the other side.
    """

    def __init__(self, shared: Shared, server: Server):
        self.shared = shared
        self.server = server
        self._frames: dict[Feed, Frame] = {}
        self._origins = Origins()
        self._lent: set[str] = set()
        self._began = time.monotonic()
        self._live = False

    def begin(self) -> None:
        """Frames run from now on."""
        self.shared.running = True
        for feed in self.shared.feeds.values():
            feed.begin()
        self.server.begun()

    def take_over(self) -> tuple[int, Split] | None:
        """The edited graph, if there is one that has not been taken over."""
        pending, self.shared.pending = self.shared.pending, None
        return pending

    def adopt(self, version: int, split: Split) -> None:
        """Frames run on this graph now. Raises GraphError."""
        shared, before = self.shared, list(self.shared.feeds.values())
        shared.prepare(split)
        feeds = list(shared.feeds.values())
        shared.counts["lost"] += sum(
            feed.slot.replaced + feed.dropped for feed in before if feed not in feeds
        )
        self._frames = {feed: frame for feed, frame in self._frames.items() if feed in feeds}
        shared.split, shared.version = split, version
        for node, view in list(shared.views.items()):
            settings = split.graph[node]["inputs"] if node in split.views else {"record": False}
            # at once: no frame may come for a while, and none of a view that is gone
            if settings.get("record") is False and view.wish is not None:
                self._wish(node, view, view.wish._replace(record=False))
        self.begin()

    async def next_frame(self, timeout: float) -> bool:
        """Wait for a new frame of the source that sets the pace, and take the others' latest.

        Raises:
            Closed: the source has ended.
            GraphError: the source cannot go on; names its node.
        """
        shared = self.shared
        feeds = list(shared.feeds.values())
        pace = shared.feeds.get(BROWSER) or feeds[0]
        try:
            frame = await pace.slot.get(timeout)
            if frame is None:
                return False
            for feed in feeds:
                latest = feed.slot.take() if feed is not pace else frame
                while latest is None and feed not in self._frames and not shared.stopping:
                    latest = await feed.slot.get(timeout)
                if latest is not None:
                    self._frames[feed] = latest
        except Closed:
            self._report_errors()
            raise
        self._origins.begin(frame)
        self._began = time.monotonic()
        self._lent.clear()
        return not shared.stopping

    def _report_errors(self) -> None:
        for node, feed in self.shared.feed_of.items():
            if feed.error is not None:
                raise GraphError(str(feed.error), node)

    async def room(self) -> None:
        """Wait until fewer than IN_FLIGHT frames of each view are on their way from the device.

        Raises:
            GraphError: a view gave a picture that cannot be shown.
        """
        for node, view in list(self.shared.views.items()):
            await view.room(IN_FLIGHT)
            if view.error is not None:
                raise GraphError(f"image: {view.error}", node)

    def image(self, node: str, shape: Shape) -> tuple[Tensor, int]:
        """The current frame for a LiveCamera: IMAGE [1, height, width, 3] and its number."""
        feed = self.shared.feed_of[node]
        feed.shapes[node] = shape
        frame = self._frames[feed]
        self._origins.gave(node, frame, shape)
        return frame.image(shape), frame.sequence

    def _wish(self, node: str, view: View, wish: Wish) -> None:
        changed = wish.record != (view.wish is not None and view.wish.record)
        view.wish = wish
        if changed:
            self.server.record(node)

    def show(self, node: str, image: Tensor, quality: int, wish: Wish) -> None:
        """A LiveView's picture of the current frame; the same tensor again means skipped.

        Args:
            wish: what is to become of its pictures, also of one that is skipped.
        """
        shared = self.shared
        view = shared.views[node]
        self._wish(node, view, wish)
        if view.same(image):
            self._lent.add(node)
            return
        lag = max((getattr(state, "lag", 0) for state in streams.owned(shared.id)), default=0)
        moment = self._origins.shown(lag)
        made_from = functools.partial(moment.picture, shared.split.graph, node)
        place = moment.place(shared.split.graph, node) if wish.record else None
        view.show(image, quality, moment.pace, shared.version, made_from, place)

    def frame_done(self) -> None:
        """The frame went through the graph."""
        now, shared = time.monotonic(), self.shared
        shared.compute.add(now - self._began)
        shared.frame_rate.add(now)
        shared.counts["frames"] += 1
        shared.counts["skipped"] += self._lent >= shared.split.live & set(shared.split.views)
        mine = [state for state in streams.owned(shared.id) if hasattr(state, "roads")]
        shared.calls = {
            "calls": sum(stream.calls.calls for stream in mine),
            "rows": sum(stream.calls.rows for stream in mine),
            "roads": [stream.roads() for stream in mine],
        }
        if not self._live:
            self._live = True
            self.server.lives()

    def clear(self) -> None:
        """Let go of all frames."""
        self._frames.clear()
        self._origins.clear()
