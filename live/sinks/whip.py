"""Pictures to a server that takes them by WHIP (RFC 9725): a service, or another program."""

import contextlib
import time

import numpy as np

from ...trust import offers
from ...trust.schema import BadData
from .. import webrtc, wires
from ..faults import Refused
from ..sources import Lost
from ..webrtc.loop import Loop
from . import Target

_SCHEMES = ("https", "http")
_MADE = 8.0  # seconds that the offer may take: the first imports aiortc
_CALL = 2.0  # seconds that other calls into the loop may take
_JOINED = 6.0  # seconds after the answer in which the media connection must be there


class Kind:
    """aiortc's connections live in an event loop: this one has its own, in its own thread, so that
    it ends with the sink, and nothing that it does waits for ComfyUI's answers or they for it."""

    REPEATS = False  # the track sends its last picture again by itself

    def __init__(self, target: Target):
        self._target = target
        self._loop: Loop | None = None
        self._peer = None
        self._left: str | None = None
        self._address = self._resource = None
        self._since = 0.0

    @staticmethod
    def check(target: Target) -> None:
        webrtc.check("to")
        if not target.address:
            raise Refused("address: give the WHIP address of the server that takes the pictures.")
        wires.checked(target.address, _SCHEMES, sink=True)

    def open(self, width: int, height: int) -> None:
        address = self._address = wires.checked(self._target.address, _SCHEMES, sink=True)
        self._loop = Loop()
        self._peer, offer = self._call(_offered(self._gone, 1e6 * self._target.bit_rate), _MADE)
        # a login without a user is a token (RFC 6750), which most services want: see Login
        headers = {"Content-Type": "application/sdp"}
        answer = wires.ask(address, "POST", headers, offer.encode())
        try:
            if answer.status != 201:
                raise Lost(_words(address.place, answer.status))
            data, peer = answer.whole(offers.LARGEST), answer.peer
            where = answer.headers.get("Location")
            self._resource = wires.elsewhere(answer.address, where) if where else None
        finally:
            answer.close()
        try:
            self._call(self._peer.accept(offers.answer(data, peer)), _CALL)
        except BadData as reason:
            raise Lost(f"{address.place} cannot be sent to: {reason}") from None
        self._since = time.monotonic()

    def _call(self, work, timeout: float):
        try:
            return self._loop.call(work, timeout)
        except TimeoutError:
            raise Lost("WebRTC does not come to an end here; the computer is too busy") from None

    def _gone(self, why: str | None) -> None:
        # in the loop
        self._left = why or "the connection is over"

    def send(self, picture: np.ndarray, at: float) -> bool:
        if self._left is not None:
            raise Lost(f"{self._address.place} has left: {self._left}")
        joined = self._peer.state == "connected"
        if not joined and time.monotonic() - self._since > _JOINED:
            raise Lost(
                f"{self._address.place} takes the offer, but no pictures: UDP does not reach it"
            )
        self._peer.track.put(picture, at=at)
        return joined

    def close(self) -> None:
        if self._loop is None:
            return
        loop, self._loop = self._loop, None
        try:
            with contextlib.suppress(Exception):  # it may be what is broken
                if self._peer is not None:
                    loop.call(self._peer.close(), _CALL)
            with contextlib.suppress(Lost, Refused):
                if self._resource is not None:
                    wires.ask(self._resource, "DELETE").close()
        finally:
            loop.close(_CALL)


async def _offered(gone, bit_rate: float):
    peer = webrtc.loaded().Publisher(gone, bit_rate)
    try:
        return peer, await peer.offer()
    except BaseException:
        await peer.close()
        raise


def _words(place: str, status: int) -> str:
    if status in (401, 403):
        return f"{place} refuses the key; give it as https://:KEY@..."
    if status in (404, 405):
        return f"{place} takes no WHIP at this address"
    if status in (409, 503):
        return f"{place} takes no pictures now"
    return f"{place} does not take the offer (HTTP {status})"
