"""A stream to a server: H.264 over RTMP, SRT or RTSP."""

from typing import Protocol

import numpy as np

from ...trust.addresses import Address
from .. import wires
from ..faults import Refused
from . import Target
from .coding import Encoder, Unit
from .rtmp import Rtmp
from .rtsp import Rtsp
from .ts import Ts


class Carrier(Protocol):
    """How a stream gets there."""

    def __init__(self, address: Address, coder: Encoder): ...

    @staticmethod
    def check(address: Address) -> None: ...

    def open(self) -> None: ...

    def room(self) -> None:
        """Wait until there is room for a picture. Raises Lost."""

    def send(self, unit: Unit) -> None: ...

    def close(self) -> None: ...


_CARRIERS: dict[str, type[Carrier]] = {
    "rtmp": Rtmp, "rtmps": Rtmp, "srt": Ts, "rtsp": Rtsp, "rtsps": Rtsp
}  # fmt: skip


class Kind:
    """See Sink. Every picture at its own time; the last one again while nothing new comes."""

    REPEATS = True

    def __init__(self, target: Target):
        self._target = target
        self._carrier: Carrier | None = None
        self._coder: Encoder | None = None

    @staticmethod
    def check(target: Target) -> None:
        if not target.address:
            raise Refused(
                "address: a stream needs one, such as rtmp://server/application/key, "
                "srt://server:port or rtsp://server/path."
            )
        address = wires.checked(target.address, tuple(_CARRIERS), sink=True)
        _CARRIERS[address.scheme].check(address)

    def open(self, width: int, height: int) -> None:
        # looked at again: it may be allowed no more
        address = wires.checked(self._target.address, tuple(_CARRIERS), sink=True)
        try:
            self._coder = Encoder(width, height, self._target.fps, 1e6 * self._target.bit_rate)
        except RuntimeError as reason:
            raise Refused(f"to: {reason}") from None
        self._carrier = _CARRIERS[address.scheme](address, self._coder)
        self._carrier.open()

    def send(self, picture: np.ndarray, at: float) -> None:
        self._carrier.room()
        for unit in self._coder.code(picture, at):
            self._carrier.send(unit)

    def close(self) -> None:
        if self._carrier is not None:
            self._carrier.close()
        self._carrier = self._coder = None
