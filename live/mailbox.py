"""One slot between two sides that never wait for each other: the latest wins."""

import asyncio
import contextlib
import threading
from collections.abc import Sequence
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

    @property
    def full(self) -> bool:
        """Whether an item waits."""
        return self._item is not None

    @property
    def over(self) -> bool:
        """Whether nothing is left and nothing will come."""
        with self._lock:
            return self._closed and self._item is None

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
            if (item := self.take()) is not None:
                return item
            if self.over:
                raise Closed
            if not await first([self], timeout):
                return self.take()

    def close(self) -> None:
        """Nothing more will be put; who waits is told once the slot is empty."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, []
        _wake(waiting)

    def end(self) -> None:
        """Nothing more is wanted: close, and let go of the item."""
        with self._lock:
            self._item = None
        self.close()

    def _listen(self, waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future]) -> bool:
        """Have a waiter woken by the next change; False if there is something to see now."""
        with self._lock:
            if self._item is not None or self._closed:
                return False
            self._waiting.append(waiter)
            return True

    def _leave(self, future: asyncio.Future) -> None:
        with self._lock:
            self._waiting = [w for w in self._waiting if w[1] is not future]


async def first(slots: Sequence[Slot], timeout: float | None = None) -> bool:
    """Wait until one of the slots holds an item or is closed; False if none does in time."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    try:
        if not all(slot._listen((loop, future)) for slot in slots):
            return True
        await asyncio.wait_for(future, timeout)
        return True
    except asyncio.TimeoutError:
        return False
    finally:
        for slot in slots:
            slot._leave(future)


def _wake(waiting) -> None:
    for loop, future in waiting:
        # a loop that is gone has nobody left to wake
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_resolve, future)


def _resolve(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)
