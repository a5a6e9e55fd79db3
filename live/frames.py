"""The frames' side of a live run: what the frame loop and the nodes of a frame see of it.

All of it runs in the prompt worker's thread. What the server's side is to know is told to it; it
takes that to its own loop.
"""

import functools
import time
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor

from ..host.registry import streams
from . import pacing
from .faults import Fate, Refused, fate
from .feeds import Feed, Frame
from .graph import GraphError, Split
from .mailbox import Closed, first
from .origins import Origins
from .pictures import checked_shape, showable
from .shared import BROWSER, Shared
from .sinks import checked_target
from .sinks.names import Wish
from .view import View

IN_FLIGHT = 2  # frames whose picture is not on the CPU yet

# the run whose frame is being made, for the nodes of that frame
current: ContextVar["Frames | None"] = ContextVar("livediffusion_frames", default=None)


class Server(Protocol):
    """What the frames' side tells the server's, from its own thread."""

    def begun(self) -> None:
        """Frames run, perhaps on another graph than before."""

    def settled(self) -> None:
        """A frame went through the graph, for the first time since the start or an edit."""

    def record(self, node: str) -> None:
        """A view's recording is to begin or to end, as its wish says."""

    def problem(self, kind: str, reason: str, node: str | None) -> None:
        """Something went wrong and the run goes on, on the graph before if kind is "edit"."""

    def ended(self, state: str, reason: str | None = None, node: str | None = None) -> None:
        """No more frames."""


class Turn:
    """A frame's way through the graph, for what is kept until the next; see host.frames.keep."""

    well = False


class Frames:
    """A run, for its frame loop and nodes.

    Args:
        shared: what both sides see.
        server: the other side.

    Attributes:
        turn: of the frame that runs.
        before: the graph that an edit replaced and its version, until a frame has run on the edit.
    """

    def __init__(self, shared: Shared, server: Server):
        self.shared = shared
        self.server = server
        self.turn = Turn()
        self.before: tuple[int, Split] | None = None
        self._latest: dict[Feed, Frame] = {}
        self._origins = Origins()
        self._lent: set[str] = set()
        self._leader: int | None = None
        self._without: set[str] = set()  # nodes that have refused frames since the last whole one
        self._asked = self._began = time.monotonic()
        self._settled = self._live = False

    def begin(self) -> None:
        """Frames run from now on."""
        self.shared.running = True
        for feed in self.shared.feeds.values():
            feed.begin()
        self._asked = time.monotonic()
        self.server.begun()

    def take_over(self) -> Split | None:
        """Run on the edited graph from now on, if there is one; returns it.

        Raises:
            GraphError: it cannot be, and `before` is to be gone back to.
        """
        shared = self.shared
        while (edit := shared.asked)[0] > shared.taken:
            before = self.before or (shared.version, shared.split)
            shared.graphs = (shared.split, edit[1], before[1])
            # an edit after this one that did not see it there let go of its views: take that one
            if shared.asked is edit:
                shared.taken, self.before = edit[0], before
                self._adopt(*edit)
                return edit[1]
        return None

    def go_back(self) -> Split:
        """Run on the graph before the edit again; returns it."""
        version, split = self.before
        self.before = None
        self._adopt(version, split)
        # a whole frame has gone through it before
        self._settled = self._live
        return split

    def _adopt(self, version: int, split: Split) -> None:
        shared, before = self.shared, list(self.shared.feeds.values())
        self._settled = False
        shared.prepare(split)
        feeds = list(shared.feeds.values())
        shared.counts["lost"] += sum(
            feed.slot.replaced + feed.dropped for feed in before if feed not in feeds
        )
        self._latest = {feed: frame for feed, frame in self._latest.items() if feed in feeds}
        self._leader = None
        for feed, frame in self._latest.items():
            frame.only(feed.shapes.values())
        shared.split, shared.version = split, version
        shared.graphs = (split,) if self.before is None else (split, self.before[1])
        self._without &= {node for one in shared.graphs for node in one.graph}
        for node, view in list(shared.views.items()):
            gone = node not in split.views
            settings = {"record": False} if gone else split.graph[node]["inputs"]
            # at once: no frame may come for a while, and none of a view that is gone
            if settings.get("record") is False and view.wish is not None:
                self._wish(node, view, view.wish._replace(record=False))
        self.begin()

    async def next_frame(self, timeout: float) -> bool:
        """Wait for a new frame of the source that sets the pace, and take the others' latest.

        Raises:
            Closed: every source has ended.
            GraphError: a source cannot go on, and the run not without it; names its node.
        """
        shared = self.shared
        feeds = list(shared.feeds.values())
        until = time.monotonic() + timeout
        while True:
            self._report_errors()
            now = time.monotonic()
            sources = [
                pacing.Source(
                    feed.slot.full, feed in self._latest, feed.slot.over, feed.rate.value(now)
                )
                for feed in feeds
            ]
            due = pacing.due(sources, self._leader, now - self._asked)
            self._leader = due.leader
            if due.run:
                break
            if not due.awaited:
                self._report_errors()  # the last may have ended just now, for a reason
                raise Closed
            left = until - now if due.look is None else min(until - now, due.look)
            if left <= 0 or shared.stopping:
                return False
            await first([feeds[i].slot for i in due.awaited], left)
        self._take(feeds)
        self.turn = Turn()
        self._began = time.monotonic()
        self._lent.clear()
        return not shared.stopping

    def _take(self, feeds: list[Feed]) -> None:
        """The latest of each source; the run is for the camera's, whose way to the screen is timed,
        else for that of the source that sets the pace."""
        fresh: dict[Feed, Frame] = {}
        for feed in feeds:
            if (frame := feed.slot.take()) is not None:
                fresh[feed] = self._latest[feed] = frame
        leader = feeds[self._leader] if self._leader is not None else None
        wanted = (self.shared.feeds.get(BROWSER), leader, *fresh)
        self._origins.begin(next(fresh[feed] for feed in wanted if feed in fresh).origin)

    def _report_errors(self) -> None:
        broken = [feed for feed in self.shared.feeds.values() if feed.error is not None]
        for feed in broken:
            node = next(n for n, f in self.shared.feed_of.items() if f is feed)
            left = not all(f.slot.over for f in self.shared.feeds.values())
            reason = Refused(str(feed.error))
            if not left or self.fate(reason) is not Fate.ON:
                raise GraphError(str(reason), node)
            feed.error = None
            self.shared.faults.refuse("source", node, reason)

    def fate(self, reason: BaseException) -> Fate:
        """What becomes of the run now that this was raised."""
        return fate(reason, self._settled, self.before is not None)

    async def room(self) -> None:
        """Wait until fewer than IN_FLIGHT frames of each view are on their way from the device."""
        for view in list(self.shared.views.values()):
            await view.room(IN_FLIGHT)

    def image(
        self, node: str, width: int, height: int, fit: str, mirror: bool
    ) -> tuple[Tensor, int]:
        """The current frame for a LiveCamera: IMAGE [1, height, width, 3] and its number.

        Raises:
            Refused: the settings cannot be, and were never others in this graph.
        """
        feed, faults = self.shared.feed_of[node], self.shared.faults
        try:
            shape = checked_shape(width, height, fit, mirror)
            faults.well("setting", node)
        except Refused as reason:
            if self.fate(reason) is not Fate.ON:
                raise
            shape = feed.shapes[node]
            faults.refuse("setting", node, reason)
        feed.shapes[node] = shape
        frame = self._latest.get(feed, feed.dark)
        self._origins.gave(node, frame, shape)
        image = frame.image(shape)
        frame.only(feed.shapes.values())
        return image, frame.sequence

    def _wish(self, node: str, view: View, wish: Wish) -> None:
        changed = wish.record != (view.wish is not None and view.wish.record)
        view.wish = wish
        if changed:
            self.server.record(node)

    def show(self, node: str, image: Tensor, quality: int, wish: Wish) -> None:
        """A LiveView's picture of the current frame; the same tensor again means skipped.

        Args:
            wish: what is to become of its pictures, also of one that is skipped.

        Raises:
            Refused: it cannot be shown, and no other was shown in this graph.
        """
        view = self.shared.views[node]
        self._wish(node, view, wish)
        self._leaves(node, view, image, quality)

    def send(self, node: str, image: Tensor, settings: dict[str, Any]) -> None:
        """A LiveSend's picture of the current frame; the same tensor again means skipped.

        Args:
            settings: what checked_target takes, by name.

        Raises:
            Refused: it is none or the settings cannot be, and no other was sent in this graph.
        """
        view, faults = self.shared.views[node], self.shared.faults
        if view.settings != settings:
            try:
                view.settings, view.target = settings, checked_target(**settings)
                faults.well("setting", node)
                view.forget()  # who is new there gets the picture also if it is not new
            except Refused as reason:
                if self.fate(reason) is not Fate.ON:
                    raise
                faults.refuse("setting", node, reason)
        self._leaves(node, view, image, 0)

    def _leaves(self, node: str, view: View, image: Tensor, quality: int) -> None:
        shared = self.shared
        if view.same(image):
            self._lent.add(node)
            return
        try:
            showable(image)
            shared.faults.well("picture", node)
        except Refused as reason:
            if self.fate(reason) is not Fate.ON:
                raise
            shared.faults.refuse("picture", node, reason)
            return
        lag = max((getattr(state, "lag", 0) for state in streams.owned(shared.id)), default=0)
        moment = self._origins.shown(lag)
        made_from = functools.partial(moment.picture, shared.split.graph, node)
        # also where nothing is recorded: a recording begins with the picture that is there
        place = moment.place(shared.split.graph, node)
        view.show(image, quality, moment.origin, shared.version, made_from, place)

    def left_out(self, node: str, reason: BaseException) -> None:
        """The frame is none, a node refused it."""
        self._without.add(node)
        self.shared.faults.refuse("picture", node, reason)

    def frame_done(self) -> None:
        """The frame went through the graph."""
        now, shared = time.monotonic(), self.shared
        self.turn.well = True
        for node in self._without:
            shared.faults.well("picture", node)
        self._without.clear()
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
        if not self._settled:
            self._settled = True
            self.before = None
            shared.graphs = (shared.split,)
            self.server.settled()
        self._live = True

    def clear(self) -> None:
        """Let go of all frames."""
        self._latest.clear()
        self._origins.clear()
        self.before = None
