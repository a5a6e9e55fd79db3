"""One live run as the browser and the frame loop see it.

Two threads meet here. The server's event loop owns viewers, views' encoding and the watch over
the owner; the prompt worker's loop runs frames. They share slots and a few plain values.
"""

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from ..host.models import engines
from ..host.registry import streams
from . import pacing
from .feeds import CameraFeed, Feed, FilmFeed, Frame
from .graph import GraphError, Split, constant, number
from .mailbox import Closed
from .meters import Rate, Spread
from .origins import Origins
from .pictures import Shape
from .view import View
from .viewer import Viewer
from .wire import NotTaken, unpacked

IN_FLIGHT = 2  # frames whose picture is not on the CPU yet
OWNER_MISSED = 2.0  # seconds without its page after which a run ends
OWNER_EXPECTED = 15.0  # seconds that the page has to come for the first time
_ROUND = 0.25  # seconds between two looks after everything
BROWSER = "browser"
_SIZES = {"width": 512, "height": 512, "fps": 30}  # LiveCamera's defaults


class Session:
    """A live run, from the moment it is queued.

    Args:
        split: the graph.
        open_film: gives a film's path by its name in the input folder; raises ValueError.
        loop: the server's event loop.

    Attributes:
        state: queued, starting, live, stopping, ended, failed.
        running: frames run, or have run.
        cancel: takes the run out of the queue, or stops it before its first frame.
        reason, node: why it ended, and at which node, if there is more to say.
        ahead: prompts that run before this one.
        version: of the graph that runs; 1 is the one it began with.
    """

    def __init__(
        self, split: Split, open_film: Callable[[str], Any], loop: asyncio.AbstractEventLoop
    ):
        self.id = secrets.token_urlsafe(12)
        self.token = secrets.token_urlsafe(24)
        self.prompt_id = self.client = ""
        self.extra: dict[str, Any] = {}
        self.split = split
        self.state, self.reason, self.node, self.ahead = "queued", None, None, 0
        self.version = self.asked = 1
        self.stopping = self.running = False
        self.cancel: Callable[[], None] = lambda: None
        self._open_film = open_film
        self._loop = loop
        self._pool = ThreadPoolExecutor(3, thread_name_prefix="livediffusion-codec")
        self._tasks: set[asyncio.Task] = set()
        self._pending: tuple[int, Split] | None = None
        self.views: dict[str, View] = {}
        self._feeds: dict[Any, Feed] = {}
        self._feed_of: dict[str, Feed] = {}
        self._frames: dict[Feed, Frame] = {}
        self._origins = Origins()
        self.viewers: set[Viewer] = set()
        self.owner: Viewer | None = None
        self._owner_gone = time.monotonic() + OWNER_EXPECTED - OWNER_MISSED
        self._began = self._started = time.monotonic()
        self._lent: set[str] = set()
        self._frame_rate, self._camera_rate = Rate(), Rate()
        self._latency, self._compute = Spread(), Spread()
        self._counts = dict.fromkeys(("frames", "skipped", "refused", "lost"), 0)
        self._calls: dict[str, Any] = {"calls": 0, "rows": 0, "roads": []}
        self._told_pace = 0
        self._prepare(split)

    # -- what the graph asks for ------------------------------------------------------------

    def _prepare(self, split: Split) -> None:
        """Feeds and views of a graph; those that stay the same go on."""
        feeds: dict[Any, Feed] = {}
        feed_of: dict[str, Feed] = {}
        for node in split.sources:
            inputs = split.graph[node]["inputs"]
            source = constant(inputs, "source", BROWSER, node)
            fps = number(inputs, "fps", _SIZES["fps"])
            if source == BROWSER:
                key: Any = BROWSER
            else:
                key = (node, constant(inputs, "file", "", node))
            feed = feeds.get(key) or self._feeds.get(key)
            if feed is None:
                feed = CameraFeed() if key == BROWSER else FilmFeed(self._opened(*key), fps, True)
            if isinstance(feed, FilmFeed):
                # a film that plays goes on
                feed.fps, feed.loop = fps, inputs.get("loop", True) is True
            feeds[key] = feed_of[node] = feed
            feed.shapes[node] = Shape(
                *(number(inputs, name, _SIZES[name]) for name in ("width", "height")),
                str(inputs.get("fit", "crop")), inputs.get("mirror") is True,
            )  # fmt: skip
        gone = [feed for key, feed in self._feeds.items() if key not in feeds]
        self._feeds, self._feed_of = feeds, feed_of
        for feed in feeds.values():
            feed.shapes = {n: s for n, s in feed.shapes.items() if feed_of.get(n) is feed}
        self._frames = {feed: f for feed, f in self._frames.items() if feed in feeds.values()}
        for feed in gone:
            feed.end()
        for node in split.views:
            self.view(node)

    def _opened(self, node: str, file: str) -> Any:
        try:
            return self._open_film(file)
        except ValueError as reason:
            raise GraphError(str(reason), node) from None

    @property
    def wanted(self) -> Split:
        """The graph asked for last; it may not have been taken over yet."""
        return self._pending[1] if self._pending else self.split

    @staticmethod
    def cameras(split: Split) -> list[dict[str, Any]]:
        """The live sources of a graph, for the browser."""
        inputs = {node: split.graph[node]["inputs"] for node in split.sources}
        return [
            {
                "node": node,
                "source": constant(settings, "source", BROWSER, node),
                **{name: number(settings, name, default) for name, default in _SIZES.items()},
            }
            for node, settings in inputs.items()
        ]

    def view(self, node: str) -> View:
        """The view of a LiveView, made when it is first asked for."""
        if node not in self.views:
            self.views[node] = View(len(self.views))
        return self.views[node]

    # -- the server's side ------------------------------------------------------------------

    def open(self) -> None:
        """Begin to look after views and owner. In the server's loop."""
        self._keep(self._look_after())
        self._keep(self._decode())

    def update(self, split: Split) -> int:
        """Take over another graph at the next frame; returns its version.

        Raises:
            GraphError: a source cannot be opened; the old graph goes on.
        """
        for node in split.sources:
            inputs = split.graph[node]["inputs"]
            if constant(inputs, "source", BROWSER, node) != BROWSER:
                self._opened(node, constant(inputs, "file", "", node))
        self.asked += 1
        self._pending = (self.asked, split)
        return self.asked

    def stop(self, reason: str | None = None) -> None:
        """End at the next frame boundary."""
        if self.state not in ("ended", "failed"):
            self.stopping = True
            self.reason = self.reason or reason
            if self.running:
                self._become("stopping")
                for feed in list(self._feeds.values()):
                    feed.slot.close()
            else:
                self.cancel()

    @property
    def over(self) -> bool:
        return self.state in ("ended", "failed")

    def attach(self, viewer: Viewer, owner: bool) -> None:
        """Begin to send to a listener.

        Raises:
            NotTaken: the session has an owner already.
        """
        if owner:
            if self.owner is not None:
                raise NotTaken("This live run already has a camera: another page sends to it.")
            self.owner = viewer
        self.viewers.add(viewer)
        viewer.tell(self.state_message())
        for view in list(self.views.values()):
            if view.latest is not None:
                viewer.offer(view.latest)

    def detach(self, viewer: Viewer) -> None:
        """A listener is gone."""
        self.viewers.discard(viewer)
        if viewer is self.owner:
            self.owner, self._owner_gone = None, time.monotonic()

    def receive(self, message: bytes) -> None:
        """A camera frame from the owner; a bad one is counted and answered with the reason."""
        sequence = None
        try:
            packet = unpacked(message)
            sequence = packet.sequence
            feed = self._feeds.get(BROWSER)
            if feed is None:
                raise NotTaken("no Live Camera of this graph shows the browser's camera")
            now = time.monotonic()
            self._camera_rate.add(now)
            feed.coded.put((packet, now))
            self._answer(sequence, None)
        except NotTaken as reason:
            self._counts["refused"] += 1
            self._answer(sequence, str(reason))

    def showed(self, latency: Any) -> None:
        """The owner has shown a picture `latency` milliseconds after its capture."""
        if isinstance(latency, int | float) and 0 <= latency < 60_000:
            self._latency.add(float(latency))

    def compare(self, viewer: Viewer, index: Any, on: bool) -> None:
        """A listener wants, or wants no more, what a view's pictures were made from."""
        view = next((view for view in self.views.values() if view.index == index), None)
        if view is None or not on or self.over:
            viewer.inputs.discard(index)
        elif index not in viewer.inputs:
            viewer.inputs.add(index)
            self._keep(view.compare(self._loop, self._pool, viewer.offer))

    def stats(self) -> dict[str, Any]:
        """Counters and figures of the run so far."""
        now = time.monotonic()
        feeds = list(self._feeds.values())
        coded = sum(f.coded.replaced for f in feeds if isinstance(f, CameraFeed))
        unsent = sum(v.unsent for v in list(self.viewers))
        return {
            "type": "stats",
            "state": self.state,
            "fps": round(self._frame_rate.value(now), 2),
            "camera_fps": round(self._camera_rate.value(now), 2),
            "latency_ms": _spread(self._latency, 1),
            "compute_ms": _spread(self._compute, 1000),
            "frames": self._counts["frames"],
            "skipped": self._counts["skipped"],
            "dropped": self._counts["lost"] + coded
            + sum(f.slot.replaced + f.dropped for f in feeds),
            "refused": self._counts["refused"] + sum(f.damaged for f in feeds),
            "unsent": unsent + sum(v.slot.replaced for v in list(self.views.values())),
            **self._calls,
            "engines": engines.in_use(self._started),
            "version": self.version,
        }

    def _answer(self, sequence: int | None, refused: str | None) -> None:
        if self.owner is not None:
            self.owner.tell({"type": "received", "seq": sequence, "refused": refused})

    async def _decode(self) -> None:
        """Camera frames from bytes to images, in worker threads, the latest first."""
        while not self.over:
            feed = self._feeds.get(BROWSER)
            if feed is None:
                await asyncio.sleep(_ROUND)
                continue
            with contextlib.suppress(Closed):
                waiting = await feed.coded.get(_ROUND)
                if waiting is None:
                    continue
                try:
                    frame = await self._loop.run_in_executor(self._pool, feed.decoded, *waiting)
                    feed.slot.put(frame)
                except NotTaken as reason:
                    self._counts["refused"] += 1
                    sequence = waiting[0].sequence
                    message = {"type": "unreadable", "seq": sequence, "reason": str(reason)}
                    if self.owner is not None:
                        self.owner.tell(message)
                continue
            await asyncio.sleep(_ROUND)

    async def _look_after(self) -> None:
        """Statistics and pace to the listeners; the end when the owner stays away."""
        even = False
        while not self.over:
            await asyncio.sleep(_ROUND)
            even = not even
            if self.owner is None and time.monotonic() - self._owner_gone > OWNER_MISSED:
                self.stop("The page that started it is gone.")
            if even:
                self._tell(self.stats())
            self._tell_pace()

    def _tell_pace(self) -> None:
        frame = self._compute.percentile(50) or 0.0
        cameras = self.cameras(self.split)
        fps = max([c["fps"] for c in cameras if c["source"] == BROWSER], default=30)
        interval = round(pacing.capture_interval(frame, fps) * 1000)
        if self.owner is not None and interval != self._told_pace:
            self._told_pace = interval
            self.owner.tell({"type": "pace", "interval_ms": interval})

    def _tell(self, message: dict[str, Any]) -> None:
        for viewer in self.viewers:
            viewer.tell(message)

    def state_message(self) -> dict[str, Any]:
        """What its listeners are told of it."""
        return {
            "type": "state", "state": self.state, "ahead": self.ahead, "reason": self.reason,
            "node": self.node,
        }  # fmt: skip

    def progress(self, state: str, ahead: int = 0) -> None:
        """Where the run stands before its first frame. In the server's loop."""
        if (state, ahead) != (self.state, self.ahead):
            self.ahead = ahead
            self._become(state)

    def _become(self, state: str) -> None:
        if not self.over:
            self.state = state
            self._tell(self.state_message())

    def conclude(self, state: str, reason: str | None = None, node: str | None = None) -> None:
        """The run is over. In the server's loop."""
        if self.over:
            return
        self.reason, self.node = reason or self.reason, node
        self._become(state)
        for feed in self._feeds.values():
            feed.end()
        for view in self.views.values():
            view.end()
        self._tell(self.stats())
        for viewer in self.viewers:
            viewer.close(4410)
        streams.end_owner(self.id)
        self._frames.clear()
        self._origins.clear()
        for task in self._tasks:
            task.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _keep(self, work) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def later(self, function: Callable, *args) -> None:
        """Call something in the server's loop, from any thread."""
        with contextlib.suppress(RuntimeError):  # the server is going down
            self._loop.call_soon_threadsafe(function, *args)

    # -- the frame loop's side --------------------------------------------------------------

    def begin(self) -> None:
        """Frames run from now on. In the prompt worker."""
        self.running = True
        for feed in self._feeds.values():
            feed.begin()
        self.later(self._begin_views)

    def _begin_views(self) -> None:
        for node, view in list(self.views.items()):
            if not view.begun:
                view.begun = True
                complain = functools.partial(self._tell_problem, node, self.version)
                compared = functools.partial(self._compared, view.index)
                self._keep(view.serve(self._loop, self._pool, self._offer, complain, compared))

    def _compared(self, view: int) -> bool:
        return any(view in viewer.inputs for viewer in self.viewers)

    def _offer(self, packet) -> None:
        for viewer in self.viewers:
            viewer.offer(packet)

    def take_over(self) -> tuple[int, Split] | None:
        """The edited graph, if there is one that has not been taken over."""
        pending, self._pending = self._pending, None
        return pending

    def adopt(self, version: int, split: Split) -> None:
        """Frames run on this graph now."""
        lost = list(self._feeds.values())
        self._prepare(split)
        for feed in lost:
            if feed not in self._feeds.values():
                self._counts["lost"] += feed.slot.replaced + feed.dropped
        self.split, self.version = split, version
        self.begin()

    def problem(self, reason: str, node: str) -> None:
        """An edit that could not run; the graph before it goes on."""
        self.later(self._tell_problem, node, self.version, reason)

    def _tell_problem(self, node: str, version: int, reason: str) -> None:
        self._tell({"type": "problem", "version": version, "reason": reason, "node": node})

    async def next_frame(self, timeout: float) -> bool:
        """Wait for a new frame of the source that sets the pace, and take the others' latest.

        Raises:
            Closed: the source has ended.
            GraphError: the source cannot go on; names its node.
        """
        feeds = list(self._feeds.values())
        pace = self._feeds.get(BROWSER) or feeds[0]
        try:
            frame = await pace.slot.get(timeout)
            if frame is None:
                return False
            for feed in feeds:
                latest = feed.slot.take() if feed is not pace else frame
                while latest is None and feed not in self._frames and not self.stopping:
                    latest = await feed.slot.get(timeout)
                if latest is not None:
                    self._frames[feed] = latest
        except Closed:
            self._report_errors()
            raise
        self._origins.begin(frame)
        self._began = time.monotonic()
        self._lent.clear()
        return not self.stopping

    def _report_errors(self) -> None:
        for node, feed in self._feed_of.items():
            if feed.error is not None:
                raise GraphError(str(feed.error), node)

    async def room(self) -> None:
        """Wait until fewer than IN_FLIGHT frames of each view are on their way from the device.

        Raises:
            GraphError: a view gave a picture that cannot be shown.
        """
        for node, view in list(self.views.items()):
            await view.room(IN_FLIGHT)
            if view.error is not None:
                raise GraphError(f"image: {view.error}", node)

    def image(self, node: str, shape: Shape) -> tuple[Tensor, int]:
        """The current frame for a LiveCamera: IMAGE [1, height, width, 3] and its number."""
        feed = self._feed_of[node]
        feed.shapes[node] = shape
        frame = self._frames[feed]
        self._origins.gave(node, frame, shape)
        return frame.image(shape), frame.sequence

    def show(self, node: str, image: Tensor, quality: int, record: Callable | None) -> None:
        """A LiveView's picture of the current frame; the same tensor again means skipped."""
        view = self.views[node]
        if view.same(image):
            self._lent.add(node)
            return
        lag = max((getattr(state, "lag", 0) for state in streams.owned(self.id)), default=0)
        moment = self._origins.shown(lag)
        made_from = functools.partial(moment.picture, self.split.graph, node)
        view.show(image, quality, record, moment.pace, self.version, made_from)

    def frame_done(self) -> None:
        """The frame went through the graph."""
        now = time.monotonic()
        self._compute.add(now - self._began)
        self._frame_rate.add(now)
        self._counts["frames"] += 1
        self._counts["skipped"] += self._lent >= self.split.live & set(self.split.views)
        mine = [state for state in streams.owned(self.id) if hasattr(state, "roads")]
        self._calls = {
            "calls": sum(stream.calls.calls for stream in mine),
            "rows": sum(stream.calls.rows for stream in mine),
            "roads": [stream.roads() for stream in mine],
        }
        if self.state in ("queued", "starting"):
            self.later(self.progress, "live")


def _spread(spread: Spread, scale: float) -> dict[str, float] | None:
    p50, p95 = spread.percentile(50), spread.percentile(95)
    if p50 is None:
        return None
    return {"p50": round(p50 * scale, 2), "p95": round(p95 * scale, 2)}
