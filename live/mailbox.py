"""One slot between two sides that never wait for each other: the latest wins."""

import asyncio
import contextlib
import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """Nothing will come any more."""


class Slot(Generic[T]):
    """Holds one item; a newer one replaces it. Any thread may put, any event loop may wait.

    Attributes:
        replaced: items that a newer one replaced before they were taken.
    """

    def __init__(self):
        self.replaced = 0
        self._lock = threading.Lock()
        self._item: T | None = None
        self._closed = False
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future]] = []

    def put(self, item: T) -> bool:
        """Leave an item; returns whether it replaced one that nobody took."""
        with self._lock:
            if self._closed:
                return False
            over = self._item is not None
            self.replaced += over
            self._item = item
            waiting, self._waiting = self._waiting, []
        _wake(waiting)
        return over

    def take(self) -> T | None:
        """The item, or None."""
        with self._lock:
            item, self._item = self._item, None
            return item

    async def get(self, timeout: float | None = None) -> T | None:
        """The item, waited for at most `timeout` seconds; None if none came.

        Raises:
            Closed: nothing is left and nothing will come.
        """
        while True:
            with self._lock:
                if self._item is not None:
                    item, self._item = self._item, None
                    return item
                if self._closed:
                    raise Closed
                loop = asyncio.get_running_loop()
                future = loop.create_future()
                self._waiting.append((loop, future))
            try:
                await asyncio.wait_for(future, timeout)
            except asyncio.TimeoutError:
                return self.take()
            finally:
                with self._lock:
                    self._waiting = [w for w in self._waiting if w[1] is not future]

    def close(self) -> None:
        """Nothing more will be put; who waits is told once the slot is empty."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, []
        _wake(waiting)


def _wake(waiting) -> None:
    for loop, future in waiting:
        # a loop that is gone has nobody left to wake
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_resolve, future)


def _resolve(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)
