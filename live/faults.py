"""What a bad frame, a bad edit, a bad picture or a task that broke does: decided here, once.

Whatever it is, it is said in words at the node that it is about, and counted. What then becomes of
the run is `fate`; docs/live.md has the same as a table.
"""

import enum
import threading
import time
from collections import deque
from collections.abc import Callable

from .bounds import most


class Refused(ValueError):
    """Something that a node was given cannot be used; the message names the input and what to do.

    The frame is none, but the graph is sound: a run that has gone well before goes on.
    """


class Unread(Refused):
    """A file of the server's cannot be read, which may be over in a moment."""


class Fate(enum.Enum):
    """What becomes of a run."""

    ON = "it goes on without the bad frame, picture or source"
    BACK = "the edit is taken back, the graph before it goes on"
    END = "it ends, failed"


def fate(reason: BaseException, settled: bool, edited: bool) -> Fate:
    """What becomes of a run in which something went wrong.

    Args:
        reason: Refused, or what a node raised.
        settled: a whole frame has gone through the graph as it is now.
        edited: the graph is an edit that has not settled, and there is one before it.
    """
    if not settled:
        return Fate.BACK if edited else Fate.END
    return Fate.ON if isinstance(reason, Refused) else Fate.END


class Faults:
    """Faults that do not end a run: counted, and told once until it goes well again. Any thread.

    Args:
        tell: takes kind, reason and node.

    Attributes:
        counts: frame (from the camera), picture (of a view), setting (of a camera's input),
            source (that broke or was lost), send (where a Live Send's pictures go), task (of the
            server's side).
    """

    def __init__(self, tell: Callable[[str, str, str | None], None]):
        self.counts = dict.fromkeys(("frame", "picture", "setting", "source", "send", "task"), 0)
        self._tell = tell
        self._lock = threading.Lock()
        self._told: set[tuple[str, str | None]] = set()

    def count(self, kind: str) -> None:
        """One more, told by whoever counts it."""
        with self._lock:
            self.counts[kind] += 1

    def refuse(self, kind: str, node: str | None, reason: BaseException) -> None:
        """One more; told unless the one before it was."""
        with self._lock:
            self.counts[kind] += 1
            new = (kind, node) not in self._told
            self._told.add((kind, node))
        if new:
            self._tell(kind, str(reason) or type(reason).__name__, node)

    def well(self, kind: str, node: str) -> None:
        """It goes well again."""
        if self._told:
            with self._lock:
                self._told.discard((kind, node))

    def only(self, nodes: set[str]) -> None:
        """Forget what was told of other nodes than these."""
        with self._lock:
            self._told = {told for told in self._told if told[1] in nodes}


class Restarts:
    """Whether a task that raised is begun once more: no more than three times in ten seconds."""

    _WITHIN = 10.0

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._times: deque[float] = deque(maxlen=most("faults.Restarts._times"))

    def again(self) -> bool:
        self._times.append(self._clock())
        full = len(self._times) == self._times.maxlen
        return not full or self._times[-1] - self._times[0] > self._WITHIN
