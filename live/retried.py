"""What a run opens in a thread of its own and opens again, after a pause, when it is lost."""

import contextlib
import threading
from typing import Generic, Protocol, TypeVar

from .faults import Refused, Unread

LOOK = 0.25  # seconds between two looks whether the run goes on


class Closed(Protocol):
    """A connection, as far as it is looked at here."""

    def close(self) -> None: ...


Connection = TypeVar("Connection", bound=Closed)


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


class Retried(Generic[Connection]):
    """One place, and the connection to it that there is just now.

    What is refused (faults.Refused) ends the tries where the node's own setting is what cannot be:
    where the look at it (`_check`) refuses it, too, and nothing has gone well before. Else it is
    the other end, the name server or the way there that has said so (another kind of answer, a way
    elsewhere, an IP address that may not be reached; after a power cut a router gives one for every
    name), and it may take that back: it is told, nothing is sent there, and it is tried again.

    Args:
        name: of the thread.
        state: until the first try.

    Attributes:
        state: "connecting", what `well` was told, "waiting" (for the next try), "refused" (no more
            tries).
        trouble: what is wrong, in words, while something is.
        losses: how often a connection was lost or could not be made.
        over: set once the thread is gone.
    """

    def __init__(self, name: str, state: str = "connecting"):
        super().__init__()
        self.state, self.losses = state, 0
        self.trouble: str | None = None
        self.over = threading.Event()
        self._stop = threading.Event()
        self._went, self._pauses = False, Pauses()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def well(self, state: str) -> None:
        """A picture has gone over the connection."""
        self.state, self.trouble, self._went = state, None, True
        self._pauses.well()

    def _made(self) -> Connection | None:
        """A connection that was not opened yet; None, after a moment, where none is needed yet."""
        raise NotImplementedError

    def _check(self) -> None:
        """Raises Refused where the node's setting is what cannot be, whatever the other end is."""
        raise NotImplementedError

    def _use(self, connection: Connection) -> None:
        """Open it, and use it until it is lost, of no more use, or _stop is set."""
        raise NotImplementedError

    def _gone(self, reason: Exception | None) -> None:
        """The thread ends: at _stop, or for a reason."""
        self.over.set()

    def _run(self) -> None:
        refusal = None
        try:
            while not self._stop.is_set():
                connection = self._made()
                if connection is None:
                    continue
                self.state = "connecting"
                try:
                    self._use(connection)
                    continue
                except Exception as reason:
                    # also what a library raises that is none of its documented errors
                    if isinstance(reason, Refused) and not self._went:
                        with contextlib.suppress(Unread):
                            self._check()
                    self.losses += 1
                    self.state, self.trouble = "waiting", str(reason) or type(reason).__name__
                finally:
                    # libraries raise whatever they like, and most of all where it is lost anyway
                    with contextlib.suppress(Exception):
                        connection.close()
                self._stop.wait(self._pauses.next())
        except Exception as reason:
            self.state, self.trouble = "refused", str(reason) or type(reason).__name__
            refusal = reason
        finally:
            self._gone(refusal)
