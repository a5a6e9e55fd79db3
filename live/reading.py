"""A thread that reads a source until it is closed, and the newest picture that it has read."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .sources import Lost, Shot

_JOIN = 2.0  # seconds that a thread has to be gone, once all that it waits for is closed


class Seen(NamedTuple):
    """A picture that came.

    Attributes:
        picture: makes it, [H, W, 3] uint8; only for one that is asked for.
        captured: seconds since the epoch.
    """

    picture: Callable[[], np.ndarray]
    captured: float


class Reading:
    """Args:
    read: gives what it sees, until it is over, in the thread; takes this.
    who: the other end, for messages.

    Attributes:
        heard: seconds by time.monotonic at which something last came, whatever it was; written by
            whoever reads.
        silence: seconds without anything after which the other end is taken to be gone.
    """

    def __init__(self, read: Callable[["Reading"], Iterator[Seen]], who: str, silence: float):
        self.heard, self.silence = time.monotonic(), silence
        self._read, self._who = read, who
        self._changed = threading.Condition()
        self._newest: Seen | None = None
        self._failure: BaseException | None = None
        self._held: list[Any] = []
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="livediffusion-source-reading", daemon=True
        )
        self._thread.start()

    @property
    def over(self) -> threading.Event:
        """Set once it is to end."""
        return self._over

    def holds(self, thing: Any) -> Any:
        """Have something closed when this is, whoever waits for it; returns it. Raises Lost."""
        self.came()
        with self._changed:
            if not self._over.is_set():
                self._held.append(thing)
                return thing
        thing.close()
        raise Lost("it is closed")

    def came(self) -> None:
        """Something has come."""
        self.heard = time.monotonic()

    def newest(self, timeout: float) -> Shot | None:
        """See Source.newest. Raises what the reading raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest or self._failure, timeout)
            seen, self._newest = self._newest, None
            failure = self._failure
        if seen is not None:
            return Shot(seen.picture(), seen.captured)
        if failure is not None:
            raise failure
        if time.monotonic() - self.heard > self.silence:
            raise Lost(f"{self._who} has sent nothing for {self.silence:.0f} seconds")
        return None

    def close(self) -> None:
        """Let go of everything."""
        with self._changed:
            self._over.set()
            held, self._held = self._held, []
        for thing in reversed(held):
            thing.close()
        self._thread.join(_JOIN)

    def _run(self) -> None:
        failure: BaseException
        try:
            for seen in self._read(self):
                if self._over.is_set():
                    return
                with self._changed:
                    self._newest = seen
                    self._changed.notify_all()
                del seen
            failure = Lost(f"{self._who} has ended the stream")
        except BaseException as reason:
            failure = reason
        with self._changed:
            self._failure = failure
            self._changed.notify_all()
