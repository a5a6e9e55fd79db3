"""A LiveSend of a run: its pictures go to another program, in a thread of their own."""

import asyncio
import threading
import time
from concurrent.futures import Executor
from typing import Any

import numpy as np

from .pictures import landed
from .retried import LOOK, Retried
from .sinks import Sink, Target, kind
from .view import Shown, View
from .wire import Packet

STILL = 0.5  # seconds after which the picture is sent again while nothing new comes
SENDING = "sending"  # the state of one whose other end takes pictures


class Sender(Retried[Sink]):
    """Sends the newest picture to one place; opened again, after a pause, when that is lost.

    Args:
        target: where to.
        make: gives a connection that was not opened yet, and looks at a target.

    Attributes:
        state: as of any Retried; "idle" before the first picture, SENDING once they go out.
        sent, dropped: pictures that went out, and that a newer one replaced before they could.
    """

    def __init__(self, target: Target, make: type[Sink]):
        super().__init__("livediffusion-send", "idle")
        self.target, self._make = target, make
        self.sent = self.dropped = 0
        self._changed = threading.Condition()
        self._next: tuple[np.ndarray, float] | None = None
        self._held: tuple[np.ndarray, float] | None = None
        self._thread.start()

    def put(self, picture: np.ndarray, at: float) -> None:
        """Never waits.

        Args:
            picture: [H, W, 3 or 4] uint8.
            at: when it is to be shown, by time.monotonic.
        """
        with self._changed:
            self.dropped += self._next is not None
            self._next = picture, at
            self._changed.notify()

    def end(self) -> None:
        """Nothing more is sent; the thread is gone soon after."""
        self._stop.set()
        with self._changed:
            self._changed.notify()

    def _made(self) -> Sink | None:
        self._held = self._new(LOOK) or self._held
        return self._held and self._make(self.target)

    def _check(self) -> None:
        self._make.check(self.target)

    def _use(self, sink: Sink) -> None:
        """Send until the end or another size."""
        size, new = self._held[0].shape[:2], True
        sink.open(*reversed(size))
        # it is shown from now on: it may have waited for the other end for hours
        due = last = time.monotonic()
        while not self._stop.is_set() and self._held[0].shape[:2] == size:
            if new or sink.REPEATS:
                # one that came while another was opened or sent is no older than that
                last = max(last, self._held[1])
                if sink.send(self._held[0], last) is not False:
                    self.sent += new
                    new = False
                    self.well(SENDING)
            due = max(due + 1 / self.target.fps, time.monotonic())
            if (item := self._new(STILL, due)) is not None:
                with self._changed:
                    self.dropped += new
                self._held, new = item, True
            else:
                self._held = self._held[0], time.monotonic()

    def _new(self, timeout: float, due: float = 0.0) -> tuple[np.ndarray, float] | None:
        """The newest picture that was not sent, waited for at most so long; not before `due`."""
        if self._stop.wait(max(0.0, due - time.monotonic())):
            return None
        with self._changed:
            if self._next is None:
                self._changed.wait(timeout)
            item, self._next = self._next, None
            return item


class SendView(View):
    """Attributes:
    settings: of the node, as they were looked at last; written in the prompt worker.
    target: where to, as they say; written there, too.
    """

    ALPHA = True

    def __init__(self, index: int):
        super().__init__(index)
        self.settings: dict[str, Any] | None = None
        self.target: Target | None = None
        self._sender: Sender | None = None

    @property
    def sender(self) -> Sender | None:
        """What sends now, for the figures."""
        return self._sender

    async def _served(
        self, shown: Shown, loop: asyncio.AbstractEventLoop, pool: Executor, compared: bool
    ) -> Packet | None:
        picture = await loop.run_in_executor(pool, landed, shown.picture, True)
        self._arrived(shown)
        if self._ended:
            return None
        if self._sender is None or self._sender.target != self.target:
            self._leave()
            self._sender = Sender(self.target, kind(self.target.to))
        self._sender.put(picture, time.monotonic())
        return None

    def _leave(self) -> None:
        if self._sender is not None:
            self._sender.end()

    def end(self) -> list[threading.Event]:
        self._leave()
        return super().end()
