"""The server's side of a live run: what routes, listeners and the queue see of it.

All of it runs in the server's event loop, but for what the frames' side calls.
"""

import asyncio
import contextlib
import functools
import logging
import secrets
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ..host.registry import streams
from . import figures
from .bounds import most
from .cameras import PAGE, Cameras
from .faults import Restarts
from .frames import Frames
from .graph import Split
from .meters import Spread
from .phones import Phones, with_phones
from .shared import Shared
from .sinks.names import Written
from .view import View
from .viewer import Viewer
from .wire import NotTaken, Packet
from .workers import Workers

OWNER_MISSED = 2.0  # seconds without its page after which a run ends, counted in looks after it
OWNER_EXPECTED = 15.0  # seconds that the page has to come for the first time
TAKEN_OVER, OVER = 4409, 4410  # codes that a listener's socket is closed with
_FINISH = 3.0  # seconds that a run's recordings have to be whole before its listeners leave
_ROUND = 0.25  # seconds between two looks after everything
_log = logging.getLogger(__name__)


class Session:
    """A live run, from the moment it is queued.

    Args:
        split: the graph.
        open_film: gives a film's path by its name in the input folder; raises ValueError.
        loop: the server's event loop.

    Attributes:
        state: queued, starting, live, stopping, ended, failed.
        cancel: takes the run out of the queue, or stops it before its first frame.
        forget: called when the run is over: lets go of the oldest that are.
        reason, node: why it ended, and at which node, if there is more to say.
        ahead: prompts that run before this one.
        kept: what names it where it goes on without a page; see keeper.py.
        broken: it ended because a task of its own did.
        frames: the frames' side.
    """

    def __init__(
        self, split: Split, open_film: Callable[[str], Any], loop: asyncio.AbstractEventLoop
    ):
        self.id = secrets.token_urlsafe(12)
        self.token = secrets.token_urlsafe(24)
        self.client = self.view_secret = ""
        self.kept: str | None = None
        self.broken = False
        self.shared = Shared(self.id, split, open_film, self.problem)
        self.frames = Frames(self.shared, self)
        self.state, self.reason, self.node, self.ahead = "queued", None, None, 0
        self.cancel: Callable[[], None] = lambda: None
        self.forget: Callable[[], None] = lambda: None
        self._loop = loop
        self._leaving: asyncio.Task | None = None
        self._pool = Workers(most("workers.Workers._threads"), "livediffusion-codec")
        self.cameras = Cameras(self.shared, loop, self._pool)
        self.phones = Phones()
        self._tasks: set[asyncio.Task] = set()
        self.viewers: set[Viewer] = set()
        self.owner: Viewer | None = None
        self._patience = OWNER_EXPECTED
        self._started = time.monotonic()
        self._last: dict[str, Any] | None = None
        self._latency = Spread()
        self._troubles: dict[tuple[str, str], str | None] = {}

    # -- what routes and the queue ask ------------------------------------------------------

    @property
    def prompt_id(self) -> str:
        return self.shared.prompt_id

    @property
    def extra(self) -> dict[str, Any]:
        return self.shared.extra

    @property
    def running(self) -> bool:
        """Whether frames run, or have run."""
        return self.shared.running

    @property
    def split(self) -> Split:
        """The graph that runs."""
        return self.shared.split

    @property
    def version(self) -> int:
        """Of the graph that runs; 1 is the one it began with."""
        return self.shared.version

    @property
    def views(self) -> dict[str, View]:
        return self.shared.views

    def view(self, node: str) -> View:
        """The view of a LiveView of `wanted`."""
        return self.shared.views[node]

    @property
    def wanted(self) -> Split:
        """The graph asked for last; it may not have been taken over yet."""
        return self.shared.asked[1]

    @property
    def over(self) -> bool:
        return self.state in ("ended", "failed")

    # -- its course -------------------------------------------------------------------------

    def open(self) -> None:
        """Begin to look after views and owner. In the server's loop."""
        self.keep("statistics", self._look_after)
        self.keep("camera", functools.partial(self.cameras.decode, lambda: self.over))

    def update(self, split: Split) -> int:
        """Take over another graph at the next frame; returns its version.

        Raises:
            GraphError: a source cannot be opened; the old graph goes on.
        """
        self.shared.look_at(split)
        self.shared.asked = (self.shared.asked[0] + 1, split)
        self._keep_views()
        return self.shared.asked[0]

    def stop(self, reason: str | None = None) -> None:
        """End at the next frame boundary."""
        if self.state not in ("ended", "failed"):
            self.shared.stopping = True
            self.reason = self.reason or reason
            if self.running:
                self._become("stopping")
                for feed in list(self.shared.feeds.values()):
                    feed.slot.close()
            else:
                self.cancel()

    def attach(self, viewer: Viewer, owner: bool) -> None:
        """Begin to send to a listener.

        Args:
            owner: it sends the camera's frames, and the run lives as long as it. Another one
                before it is told so and closed: it may be a connection that nobody has at its
                other end any more, of a page that has come back. A run that is kept takes no
                page's camera, so there it is one listener of several.

        Raises:
            NotTaken: there are too many listeners.
        """
        owner = owner and self.kept is None
        if owner and self.owner is not None:
            reason = "Another page, or this one anew, sends its camera to this live run now."
            before, self.owner = self.owner, None
            before.tell({"type": "refused", "reason": reason})
            before.close(TAKEN_OVER, reason)
            self.viewers.discard(before)
        if not owner and len(self.viewers) >= most("session.Session.viewers") - 1:
            raise NotTaken("Too many pages and streams listen to this live run. Close some.")
        if owner:
            self.owner = viewer
            self.cameras.admit(viewer, PAGE)
        self.viewers.add(viewer)
        viewer.tell(self.state_message())
        for view in list(self.views.values()):
            if view.latest is not None:
                viewer.offer(view.latest)

    def detach(self, viewer: Viewer) -> None:
        """A listener is gone."""
        self.viewers.discard(viewer)
        self.cameras.leave(viewer)
        if viewer is self.owner:
            self.owner, self._patience = None, OWNER_MISSED

    def showed(self, latency: Any) -> None:
        """A picture was shown `latency` milliseconds after its capture."""
        if isinstance(latency, int | float) and 0 <= latency < 60_000:
            self._latency.add(float(latency))

    def compare(self, viewer: Viewer, index: Any, on: bool) -> None:
        """A listener wants, or wants no more, what a view's pictures were made from."""
        view = next((view for view in self.views.values() if view.index == index), None)
        if view is None or not on or self.over:
            viewer.inputs.discard(index)
        elif index not in viewer.inputs:
            viewer.inputs.add(index)
            if len(self._tasks) < most("session.Session._tasks"):  # else with the next picture
                work = functools.partial(view.compare, self._loop, self._pool, viewer.offer)
                self.keep("compare", work, again=False)

    def stats(self) -> dict[str, Any]:
        """Counters and figures of the run so far, or of all of it. In any thread."""
        if (last := self._last) is not None:
            return last
        unsent = sum(viewer.unsent for viewer in list(self.viewers))
        known = self.shared, self._started, self.cameras, self._latency, unsent
        told = {"type": "stats", "state": self.state, "version": self.version}
        return told | figures.of(*known)

    async def _look_after(self) -> None:
        """Statistics and pace to the listeners; the end when the owner stays away."""
        even = False
        while not self.over:
            await asyncio.sleep(_ROUND)
            even = not even
            self._patience -= 0 if self.owner or self.kept else _ROUND
            if self._patience < 0:
                self.stop("The page that started it is gone.")
            if even:
                self._tell(self.stats())
            self.cameras.tell_pace()
            self._tell_troubles()

    def _tell_troubles(self) -> None:
        """What is wrong at the other end of a source or a Live Send, once until it is well."""
        before, self._troubles = self._troubles, figures.troubles(self.shared)
        for (kind, node), reason in self._troubles.items():
            if reason != before.get((kind, node)):
                self.shared.faults.well(kind, node)
                if reason is not None:
                    self.shared.faults.refuse(kind, node, RuntimeError(reason))

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
            self.phones.tell(state)

    def conclude(self, state: str, reason: str | None = None, node: str | None = None) -> None:
        """The run is over. In the server's loop."""
        if self.over:
            return
        self.reason, self.node = reason or self.reason, node
        with contextlib.ExitStack() as ends:  # each of them, whatever the others raise
            ends.callback(self._pool.shutdown, wait=False, cancel_futures=True)
            for task in list(self._tasks):
                ends.callback(task.cancel)
            ends.callback(self.frames.clear)
            ends.callback(self.cameras.clear)
            ends.callback(self.phones.only, ())
            ends.callback(streams.end_owner, self.id)
            ends.callback(self.forget)
            ends.callback(self._release)
            self._become(state)
            self._last = self.stats()
            self._tell(self._last)

    def _release(self) -> None:
        if recordings := self.shared.release():
            # its listeners are still to hear how the recordings ended
            self._leaving = self._loop.create_task(self._leave(recordings))
        else:
            self._close()

    async def _leave(self, recordings: list[threading.Event]) -> None:
        deadline = time.monotonic() + _FINISH
        try:
            for event in recordings:
                await asyncio.to_thread(event.wait, max(0.0, deadline - time.monotonic()))
        finally:
            self._close()

    def _close(self) -> None:
        for viewer in self.viewers:
            viewer.close(OVER)

    def keep(self, what: str, work: Callable[[], Awaitable[None]], again: bool = True) -> None:
        """Have a task run in the background until it is done or the run is over.

        Args:
            what: names it.
            again: begin one that raised anew; one that goes on to raise ends the run, in words.
        """
        task = self._loop.create_task(self._watched(what, work, again))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watched(self, what: str, work: Callable[[], Awaitable[None]], again: bool) -> None:
        restarts = Restarts()
        while not self.over:
            try:
                return await work()
            except Exception as reason:
                _log.warning("Live: the %s task raised", what, exc_info=True)
                words = f"{what}: {reason or type(reason).__name__}"
                if again and not restarts.again():
                    self.broken = True
                    return self.stop(f"{words}. The live run cannot go on without it.")
                self.shared.faults.refuse("task", None, RuntimeError(words))
                if not again:
                    return None
            await asyncio.sleep(_ROUND)

    def later(self, function: Callable, *args) -> None:
        """Call something in the server's loop, from any thread."""
        with contextlib.suppress(RuntimeError):  # the server is going down
            self._loop.call_soon_threadsafe(function, *args)

    # -- what the frames' side tells, in its thread -----------------------------------------

    def begun(self) -> None:
        self.later(self._begin_views)

    def settled(self) -> None:
        self.later(self._settled)

    def record(self, node: str) -> None:
        self.later(self._record, node)

    def problem(self, kind: str, reason: str, node: str | None) -> None:
        self.later(self._tell_problem, kind, reason, node, self.version)

    def ended(self, state: str, reason: str | None = None, node: str | None = None) -> None:
        self.later(self.conclude, state, reason, node)

    def _settled(self) -> None:
        if self.state in ("queued", "starting"):
            self.progress("live")
        self._keep_views()

    def _begin_views(self) -> None:
        self._keep_views()
        for node, view in self.views.items():
            if not view.begun:
                view.begun = True
                served = functools.partial(
                    view.serve, self._loop, self._pool, functools.partial(self._offer, view),
                    functools.partial(self._compared, view.index),
                    functools.partial(self.shared.faults.refuse, "picture", node),
                )  # fmt: skip
                self.keep(f"view {node}", served)

    def _keep_views(self) -> None:
        gone = [] if self.over else self.shared.keep_views()
        for view in gone:
            view.end()
            for viewer in self.viewers:
                viewer.forget(view.index)
        self.phones.only(with_phones(() if self.over else (*self.shared.graphs, self.wanted)))
        if gone:
            self.shared.faults.only({n for graph in self.shared.graphs for n in graph.graph})

    async def save(self, node: Any) -> Written:
        """Write the picture that a view shows to a file. Raises ValueError, OSError."""
        view = self.views.get(node) if isinstance(node, str) else None
        if view is None:
            raise ValueError("There is no such Live View in this live run.")
        return await view.save()

    def _record(self, node: str) -> None:
        view = self.views.get(node)
        if view is not None:
            view.record(functools.partial(self.later, self._tell_of_recording, node, self.version))

    def _tell_of_recording(self, node: str, version: int, event: dict[str, Any]) -> None:
        if event.get("type") == "problem":
            event = {"kind": "record", **event}
        self._tell({"version": version, "node": node, **event})

    def _compared(self, view: int) -> bool:
        return any(view in viewer.inputs for viewer in list(self.viewers))

    def _offer(self, view: View, packet: Packet) -> None:
        # one that an edit removed may have had a picture on its way
        if view in self.views.values():
            for viewer in self.viewers:
                viewer.offer(packet)

    def _tell_problem(self, kind: str, reason: str, node: str | None, version: int) -> None:
        said = {"kind": kind, "reason": reason, "node": node, "version": version}
        self._tell({"type": "problem", **said})
