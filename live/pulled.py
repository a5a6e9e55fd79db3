"""A source that is opened and read by a thread of the run's, and again when it is lost."""

import time

from .feeds import Feed, Frame
from .retried import LOOK, Retried
from .sources import Lost, Source, Wanted

STALLED = 2.0  # seconds without a picture after which a connection is taken to be lost
GIVING = "giving"  # the state of a source that gives pictures


class PulledFeed(Retried[Source], Feed):
    """Newest frames of a source, for as long as the run goes on.

    Args:
        make: gives a connection that was not opened yet, and looks at a name.
        wanted: what the Live Camera asks for.

    Attributes:
        state: as of any Retried; GIVING once pictures come.
    """

    def __init__(self, make: type[Source], wanted: Wanted):
        super().__init__("livediffusion-source")
        self._make, self._wanted_of = make, wanted
        self._sequence = 0

    def begin(self) -> None:
        super().begin()
        # each edit begins all feeds anew; a thread that is over is begun no more
        if self._thread.ident is None and not self._stop.is_set():
            self._thread.start()

    def end(self) -> None:
        self._stop.set()
        super().end()

    def _quiet(self, since: float, now: float) -> bool:
        return now - since > STALLED

    def _made(self) -> Source:
        return self._make(self._wanted_of)

    def _check(self) -> None:
        self._make.check(self._wanted_of.name)

    def _gone(self, reason: Exception | None) -> None:
        self.error = reason
        self.slot.close()
        super()._gone(reason)

    def _use(self, source: Source) -> None:
        source.open()
        last = time.monotonic()
        while not self._stop.is_set():
            shot = source.newest(LOOK)
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
            self.well(GIVING)
