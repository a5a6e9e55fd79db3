"""A source that is opened and read by a thread of the run's, and again when it is lost."""

import threading
import time
from collections.abc import Callable

from .faults import Refused
from .feeds import Feed, Frame
from .sources import Lost, Source, Wanted

_LOOK = 0.25  # seconds between two looks whether the run goes on
STALLED = 2.0  # seconds without a picture after which a connection is taken to be lost
GIVING = "giving"  # the state of a source that gives pictures


class Pauses:
    """Seconds to wait before each next try, growing; short again once it went well."""

    FIRST, MOST = 0.25, 2.0

    def __init__(self):
        self._next = self.FIRST

    def next(self) -> float:
        pause, self._next = self._next, min(2 * self._next, self.MOST)
        return pause

    def well(self) -> None:
        self._next = self.FIRST


def final(reason: BaseException, went: bool) -> bool:
    """Whether a place is given up for what a connection to it raised.

    What the node's own setting makes impossible shows at the first connection. Once one has gone
    well, it is the other end or the name server that has said something else (another kind of
    answer, a way elsewhere, an IP address that may not be reached), and it may take that back: it
    is told, nothing is sent there, and it is tried again.

    Args:
        went: pictures have gone over a connection to this place.
    """
    return isinstance(reason, Refused) and not went


class PulledFeed(Feed):
    """Newest frames of a source, for as long as the run goes on.

    Args:
        make: gives a connection that was not opened yet.
        wanted: what the Live Camera asks for.

    Attributes:
        state: "connecting", GIVING, "waiting" (for the next try), "refused" (no more tries:
            see `final`).
        trouble: what is wrong, in words, while something is.
        losses: how often a connection was lost or could not be made.
    """

    def __init__(self, make: Callable[[Wanted], Source], wanted: Wanted):
        super().__init__()
        self._make, self._wanted_of = make, wanted
        self.state, self.losses = "connecting", 0
        self.trouble: str | None = None
        self._pauses, self._sequence = Pauses(), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="livediffusion-source", daemon=True)

    def begin(self) -> None:
        super().begin()
        if not self._thread.is_alive() and not self._stop.is_set():
            self._thread.start()

    def end(self) -> None:
        self._stop.set()
        super().end()

    def _quiet(self, since: float, now: float) -> bool:
        return now - since > STALLED

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.state = "connecting"
                source = self._make(self._wanted_of)
                try:
                    source.open()
                    self._read(source)
                except Exception as reason:
                    # also what a library raises that is none of its documented errors
                    if final(reason, self._sequence > 0):
                        raise
                    self.losses += 1
                    self.state, self.trouble = "waiting", str(reason) or type(reason).__name__
                finally:
                    source.close()
                self._stop.wait(self._pauses.next())
        except Exception as reason:
            self.state, self.trouble = "refused", str(reason) or type(reason).__name__
            self.error = reason
        finally:
            self.slot.close()

    def _read(self, source: Source) -> None:
        """Read until the run is over."""
        last = time.monotonic()
        while not self._stop.is_set():
            shot = source.newest(_LOOK)
            now = time.monotonic()
            if shot is None:
                if now - last > (patience := getattr(source, "patience", STALLED)):
                    raise Lost(f"no picture has come for {patience:.0f} seconds")
                continue
            last = now
            frame = Frame(self._sequence, shot.captured, now, shot.picture)
            self.slot.put(self._ready(frame))
            del shot, frame  # or they would be kept until the next comes
            self._sequence += 1
            self.state, self.trouble = GIVING, None
            self._pauses.well()
