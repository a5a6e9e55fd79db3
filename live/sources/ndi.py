"""What another program sends over NDI."""

import time
from typing import Any

import numpy as np

from .. import ndi
from . import Lost, Shot, Wanted, needs

_FIND = 1.5  # seconds for a sender to be heard of
_LIST = 1.0  # seconds to hear of all of them
_MOST = 16  # frames that are left out at once for the newest
_TRUST = 1.0  # seconds that another machine's clock may be off and is still believed


class Kind:
    """See Source. The library hears of senders and takes frames in threads of its own, which are
    gone once what they are for is destroyed."""

    def __init__(self, wanted: Wanted):
        self._name = wanted.name.strip()
        self._ndi: Any = None
        self._receiver: Any = None
        self._met = False

    @staticmethod
    def check(name: str) -> None:
        needs(isinstance(name, str) and bool(name.strip()), "sender", "choose an NDI sender.")
        ndi.there("sender")

    @staticmethod
    def listed() -> list[str]:
        library = ndi.library("sender")
        with ndi.looking(library) as finder:
            *_, known = ndi.senders(library, finder, _LIST)
            return sorted(sender.ndi_name for sender in known)

    def open(self) -> None:
        self._ndi = library = ndi.library("sender")
        with ndi.looking(library) as finder:
            sender = ndi.found(library, finder, self._name, _FIND)
            if sender is None:
                raise Lost(f"no NDI sender is called {self._name!r} now")
            self._receiver = library.recv_create_v3(
                library.RecvCreateV3(
                    sender,
                    library.RECV_COLOR_FORMAT_RGBX_RGBA,
                    library.RECV_BANDWIDTH_HIGHEST,
                    False,
                    "ComfyUI",
                )
            )
        if self._receiver is None:
            raise Lost("NDI could not make a receiver")

    def newest(self, timeout: float) -> Shot | None:
        deadline = time.monotonic() + timeout
        while (taken := self._taken(deadline - time.monotonic())) is None:
            if time.monotonic() >= deadline:
                self._look()
                return None
        try:
            for _ in range(_MOST):
                if (newer := self._taken(0)) is None:
                    break
                taken, older = newer, taken
                self._ndi.recv_free_video_v2(self._receiver, older)
            self._met = True
            return Shot(np.array(taken.data[..., :3]), _moment(taken.timestamp))
        finally:
            self._ndi.recv_free_video_v2(self._receiver, taken)

    def _taken(self, timeout: float) -> Any:
        """A frame, still the library's; None where something else came, or nothing."""
        wait = max(0, int(1000 * timeout))
        came, video, _, _ = self._ndi.recv_capture_v2(self._receiver, wait, True, False, False)
        if came == self._ndi.FRAME_TYPE_ERROR:
            raise Lost(f"the connection to the NDI sender {self._name!r} broke")
        return video if came == self._ndi.FRAME_TYPE_VIDEO else None

    def _look(self) -> None:
        if self._met and not self._ndi.recv_get_no_connections(self._receiver):
            raise Lost(f"the NDI sender {self._name!r} is gone")

    def close(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            self._ndi.recv_destroy(receiver)


def _moment(timestamp: int) -> float:
    """When a frame was sent, from NDI's count of 100 ns since the epoch; now where that cannot be.

    The sender's clock gives it, which another machine may have set otherwise.
    """
    now, sent = time.time(), timestamp / 1e7
    return sent if now - _TRUST < sent <= now else now
