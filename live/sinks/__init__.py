"""Where pictures go besides the page: other programs, streams, recordings, single pictures.

Each place that a Live Send sends to has a module here with a class `Kind`; see Sink for what it is.
Modules are imported when they are asked for.
"""

import importlib
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..faults import Refused

# what a Live Send's `to` says, and the module here
KINDS = {
    "virtual camera": "virtual_camera",
    "ndi": "ndi",
    "spout": "spout",
    "syphon": "syphon",
    "stream": "stream",
    "whip": "whip",
}


class Target(NamedTuple):
    """What a Live Send is set to.

    Attributes:
        to: one of KINDS.
        name: of the sender, as others see it, or of the virtual camera; "" for the usual one.
        address: of a stream or a WHIP endpoint.
        fps: the most pictures per second.
        bit_rate: Mbit per second, of what is encoded.
    """

    to: str
    name: str
    address: str
    fps: float
    bit_rate: float


# what a Live Send says where nothing else is said
USUAL = {"to": "virtual camera", "name": "", "address": "", "fps": 30, "bit_rate": 6.0}


def checked_target(to: Any, name: Any, address: Any, fps: Any, bit_rate: Any) -> Target:
    """A Live Send's settings, which may come by a wire and then were looked at by nobody.

    Raises:
        Refused: they cannot be, or what they need is not there; names the input.
    """
    if to not in KINDS:
        raise Refused(f"to: {to!r} is not known. Choose one of {', '.join(KINDS)}.")
    for what, value in (("name", name), ("address", address)):
        if not isinstance(value, str) or len(value) > 1024:
            raise Refused(f"{what}: a text of at most 1024 characters is expected.")
    for what, value, least, most in (("fps", fps, 1, 240), ("bit_rate", bit_rate, 0.1, 100)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Refused(f"{what}: a number is expected.")
        if not least <= value <= most:
            raise Refused(f"{what}: {value} cannot be. Give {least} to {most}.")
    target = Target(to, name.strip(), address.strip(), float(fps), float(bit_rate))
    kind(to).check(target)
    return target


class Sink(Protocol):
    """A connection to one place, used by one thread, once: opened for a size, sent to, closed.

    No call may take longer than about two seconds, whatever the other end does. `close` is called
    after `open` was, also if that raised. What is lost raises live.sources.Lost, in words, and is
    tried again; live.faults.Refused is for what may not or cannot be, see retried.Retried.

    Attributes:
        REPEATS: the last picture is to be sent again every half second while nothing new comes.
    """

    REPEATS: bool

    def __init__(self, target: Target): ...

    @staticmethod
    def check(target: Target) -> None:
        """Look at a target before a run or an edit is taken, without reaching for it.

        Raises:
            Refused: it cannot be; the message begins with the node's input.
        """

    def open(self, width: int, height: int) -> None: ...

    def send(self, picture: np.ndarray, at: float) -> bool | None:
        """Send a picture, [height, width, 3 or 4] uint8; 4 are with alpha, not premultiplied.

        Args:
            at: when it is to be shown, seconds by time.monotonic, never falling.

        Returns:
            False where nobody takes it yet, and nothing has gone out: it is given again until it
            goes or a newer one comes.
        """

    def close(self) -> None:
        """Let go of everything: no thread and no descriptor is left."""


def kind(to: str) -> type[Sink]:
    """The class of what a Live Send sends to. Imports nothing that is optional."""
    return importlib.import_module(f".{KINDS[to]}", __package__).Kind
