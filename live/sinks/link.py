"""A connection by TCP that a stream goes out by: nothing waits in it, and a dead one is told."""

import selectors
import socket
import ssl
import time

from ...trust.addresses import Address
from .. import wires
from ..sources import Lost

STUCK = 2.0  # seconds in which the other end takes nothing, or does not answer
_ASKED = 1.0  # seconds between two questions whether it is there
_UNSENT = 1 << 15  # bytes beyond what is on the way, after which no picture is coded
_SMALL = 1 << 18  # bytes of the system's buffer where the above cannot be told to it


class Link:
    """Connects at once.

    Args:
        address: see wires.checked.

    Attributes:
        place: host:port, for messages.

    Raises:
        Lost, Refused.
    """

    def __init__(self, address: Address):
        self.place = address.place
        self._wire = wires.connect(address)
        self._wire.settimeout(STUCK)
        # when it was asked for an answer last, and when it gave one
        self._asked = self._answered = 0.0
        option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
        if option is not None:
            self._wire.setsockopt(socket.IPPROTO_TCP, option, _UNSENT)
        else:
            self._wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SMALL)

    def room(self) -> None:
        """Wait until the other end takes data. Raises Lost: it does not."""
        try:
            free = self._may(selectors.EVENT_WRITE, STUCK)
        except (OSError, ValueError):
            raise Lost(f"{self.place} has cut the connection") from None
        if not free:
            raise Lost(f"{self.place} takes no more data")

    def _may(self, event: int, timeout: float) -> bool:
        # select.select knows no descriptor from 1024 on
        with selectors.DefaultSelector() as look:
            look.register(self._wire, event)
            return bool(look.select(timeout))

    def send(self, data: bytes) -> None:
        """All of it. Raises Lost."""
        try:
            self._wire.sendall(data)
        except TimeoutError:
            raise Lost(f"{self.place} takes no more data") from None
        except OSError as error:
            raise Lost(f"{self.place} {wires.worded(error)}") from None

    def heard(self, timeout: float = 0.0) -> bytes:
        """What has come, b"" for nothing yet. Raises Lost, also at the end."""
        try:
            pending = isinstance(self._wire, ssl.SSLSocket) and self._wire.pending()
            if not pending and not self._may(selectors.EVENT_READ, timeout):
                return b""
            data = self._wire.recv(1 << 16)
        except ssl.SSLWantReadError:
            return b""
        except (OSError, ValueError) as error:
            said = wires.worded(error) if isinstance(error, OSError) else "has cut the connection"
            raise Lost(f"{self.place} {said}") from None
        if not data:
            raise Lost(f"{self.place} has ended the stream")
        return data

    def ask(self, now: float) -> bool:
        """Whether it is time to ask the other end for an answer.

        Who has answered once is lost when it does not any more; who never did is let be.

        Raises:
            Lost: it does not answer.
        """
        if 0 < self._answered < self._asked and now - self._asked > STUCK:
            raise Lost(f"{self.place} does not answer any more")
        waits = 0 < self._answered < self._asked
        if waits or now - self._asked < _ASKED:
            return False
        self._asked = now
        return True

    def answer(self) -> None:
        """It has answered."""
        self._answered = time.monotonic()

    def close(self) -> None:
        wires.cut(self._wire)
