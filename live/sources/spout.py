"""What another program on the same Windows machine gives through Spout."""

import time
from typing import Any

import numpy as np

from .. import spout
from . import Lost, Shot, Wanted, needs

_POLL = 0.002  # seconds between two looks for a new frame


class Kind:
    """See Source. OpenGL's context is made, used and closed in the thread that reads, as it must.

    The library reads pictures back one behind: what it gives first after it met a sender is empty,
    and left out.
    """

    def __init__(self, wanted: Wanted):
        self._name = wanted.name.strip()
        self._receiver: Any = None
        self._pixels: np.ndarray | None = None
        self._last: np.ndarray | None = None
        self._empty = True

    @staticmethod
    def check(name: str) -> None:
        needs(isinstance(name, str) and bool(name.strip()), "sender", "choose a Spout sender.")
        spout.there("sender")

    @staticmethod
    def listed() -> list[str]:
        # names are kept in memory that is shared: no OpenGL is needed
        return sorted(spout.library("sender").SpoutReceiver().getSenderList())

    def open(self) -> None:
        self._receiver = spout.opened(spout.library("sender").SpoutReceiver)
        self._there()
        self._receiver.setReceiverName(self._name)

    def _there(self) -> None:
        if self._name not in self._receiver.getSenderList():
            raise Lost(f"no Spout sender is called {self._name!r} now")

    def newest(self, timeout: float) -> Shot | None:
        deadline = time.monotonic() + timeout
        while True:
            if self._came():
                return Shot(np.array(self._pixels[..., :3]), time.time())
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(_POLL, left))

    def _came(self) -> bool:
        """Whether there is a picture that was not given yet."""
        receiver = self._receiver
        if not receiver.receiveImage(self._pixels, spout.RGBA, False, 0):
            self._there()
            raise Lost(f"pictures of {self._name!r} cannot be read: it may be on another GPU")
        if receiver.isUpdated():
            size = receiver.getSenderHeight(), receiver.getSenderWidth()
            self._pixels, self._empty = np.zeros((*size, 4), np.uint8), True
            return False
        if not receiver.isFrameNew():
            return False
        was, self._empty = self._empty, False
        return not was and self._differs()

    def _differs(self) -> bool:
        """Whether a picture is another than the last; counted by the sender, by most."""
        if self._receiver.getSenderFrame():
            return True
        if self._last is not None and np.array_equal(self._last, self._pixels):
            return False
        self._last = self._pixels.copy()
        return True

    def close(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.releaseReceiver()
            receiver.closeOpenGL()
