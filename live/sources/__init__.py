"""Where frames come from besides a page and a file: one small class each, imported when asked for.

A module of this room has a class `Kind`; see Source for what it is.
"""

import importlib
import time
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from ..faults import Refused

# what a Live Camera's `source` says: the module here, and the node's input that names which one
PULLED = {
    "device": ("device", "device"),
    "address": ("address", "address"),
    "ndi": ("ndi", "sender"),
    "spout": ("spout", "sender"),
    "syphon": ("syphon", "sender"),
}
# what is sent to a run: by its page, by a phone, by a program that publishes over WebRTC
SCREEN, PHONE, WHIP = "screen", "phone", "whip"
SENT = (SCREEN, PHONE, WHIP)


class Lost(Exception):
    """The other end is not there, or not any more; the message says what is wrong, in words.

    It is tried again.
    """


class Shot(NamedTuple):
    """A picture of a source.

    Attributes:
        picture: [H, W, 3] uint8, nobody else's any more.
        captured: seconds since the epoch, as near to the moment it was taken as the source knows.
    """

    picture: np.ndarray
    captured: float


class Memory:
    """What a source knows from its connection before.

    Attributes:
        part: number of the last part that was begun, of a live stream in parts (hls.py).
        place: of that part, as its list has it, without a query: that may be new in each list.
    """

    part: int | None = None
    place: str | None = None


@dataclass(frozen=True)
class Wanted:
    """What a Live Camera asks its source for; a wish.

    Attributes:
        name: the value of the node's input that names the source.
        width, height: pixels.
        fps: frames per second.
        memory: for all connections that are made for this wish.
    """

    name: str
    width: int
    height: int
    fps: float
    memory: Memory = field(default_factory=Memory, compare=False, repr=False)


class Source(Protocol):
    """A connection to one source, used by one thread, once: opened, read, closed.

    No call may take longer than about two seconds, whatever the other end does: a run that is
    stopped waits for it. `close` is called after `open` was, also if that raised.

    One may have an attribute `patience`: seconds without a picture after which the connection is
    taken to be lost, where that is another than pulled.STALLED.
    """

    def __init__(self, wanted: Wanted): ...

    @staticmethod
    def check(name: str) -> None:
        """Look at a name before a run or an edit is taken, without reaching for the source.

        Raises:
            Refused: it cannot be: no name, a package that is missing (and how to install it), or
                not allowed. The message begins with the node's input.
        """

    @staticmethod
    def listed() -> list[str]:
        """Names that there are to choose from now; empty where none can be told."""

    def open(self) -> None:
        """Raises Lost, or Refused for what may not or cannot be; see retried.Retried."""

    def newest(self, timeout: float) -> Shot | None:
        """The newest picture, waited for at most so many seconds; older ones are left out.

        Never the same one twice. Raises Lost.
        """

    def close(self) -> None:
        """Let go of everything: no thread and no descriptor is left."""


def kind(source: str) -> type[Source]:
    """The class of a Live Camera's source. Imports nothing that is optional."""
    return importlib.import_module(f".{PULLED[source][0]}", __package__).Kind


def needs(condition: bool, name: str, what: str) -> None:
    """Raises Refused for the input `name` where something is lacking."""
    if not condition:
        raise Refused(f"{name}: {what}")


_PATIENCE = 5.0  # seconds that a source has to give one picture


def one(source: str, wanted: Wanted) -> np.ndarray:
    """One picture of a source, [H, W, 3] uint8, for an ordinary prompt.

    Raises:
        ValueError: there is none; the message begins with the node's input.
    """
    made, name = kind(source), PULLED[source][1]
    made.check(wanted.name)
    connection = made(wanted)
    try:
        connection.open()
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            if (shot := connection.newest(0.25)) is not None:
                return shot.picture
    except Lost as reason:
        raise ValueError(f"{name}: {reason}") from None
    finally:
        connection.close()
    raise ValueError(f"{name}: no picture has come within {_PATIENCE:.0f} seconds.")
