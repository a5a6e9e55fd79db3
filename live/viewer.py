"""What one listener still has to be told: its messages, and of each view the latest picture."""

import asyncio
import json
from collections import deque
from typing import Any

from .bounds import most
from .wire import Packet

# pictures on their way that the listener has not shown yet
CREDIT = 2


class Viewer:
    """The outgoing side of a listener. Lives in the server's event loop.

    Args:
        patient: it says of each picture when it was shown, and gets no third before that.

    Attributes:
        unsent: pictures that a newer one replaced before they were sent.
        inputs: indices of the views whose pictures it wants with what they were made from.
        elsewhere: indices of the views whose pictures reach it by WebRTC.
        over, reason: nothing more comes; the code and words to close with, once all is sent.
    """

    def __init__(self, patient: bool = True, view: int | None = None):
        self.patient = patient
        self.view = view
        self.unsent = 0
        self.inputs: set[int] = set()
        self.elsewhere: set[int] = set()
        self.over: int | None = None
        self.reason = ""
        self._messages: deque[str] = deque(maxlen=most("viewer.Viewer._messages"))
        self._packets: dict[int, Packet] = {}
        self._away: dict[int, int] = {}
        self._wake = asyncio.Event()

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message. The oldest is lost when the listener does not listen."""
        self._messages.append(json.dumps(message))
        self._wake.set()

    def offer(self, packet: Packet) -> None:
        """Send a picture, unless a newer one comes first."""
        if self.view is not None and packet.view != self.view:
            return
        if packet.view in self.elsewhere:
            return
        if packet.view not in self.inputs:
            packet = packet._replace(input=b"")
        self.unsent += packet.view in self._packets
        self._packets[packet.view] = packet
        self._wake.set()

    def shown(self, view: int) -> None:
        """The listener has shown a picture of this view; of any other it cannot."""
        if self._away.get(view):
            self._away[view] -= 1
            self._wake.set()

    def leave_out(self, view: int, on: bool) -> None:
        """Whether a view's pictures reach this listener by another way."""
        if not on:
            self.elsewhere.discard(view)
        elif len(self.elsewhere) < most("viewer.Viewer.elsewhere"):
            self.elsewhere.add(view)
            self._packets.pop(view, None)

    def forget(self, view: int) -> None:
        """A view is gone."""
        self.inputs.discard(view)
        self.elsewhere.discard(view)
        self._packets.pop(view, None)
        self._away.pop(view, None)

    def close(self, code: int, reason: str = "") -> None:
        """Send what is waiting, then no more."""
        self.over, self.reason = code, reason
        self._packets.clear()
        self._wake.set()

    async def next(self) -> str | Packet | None:
        """What is to be sent now, waited for; None at the end."""
        while True:
            if self._messages:
                return self._messages.popleft()
            if self.over is not None:
                return None
            for view in self._packets:
                if not self.patient or self._away.get(view, 0) < CREDIT:
                    self._away[view] = self._away.get(view, 0) + 1
                    return self._packets.pop(view)
            self._wake.clear()
            await self._wake.wait()
