"""What the reader gives, what it counts, what it refuses."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# what one decoded picture may hold: 200 MB as RGB. A phone's photo has 12 to 50 million pixels.
MOST_PIXELS = 8192 * 8192
# of a film or animation, whose decoders keep several pictures: a cinema's 8K
MOST_PIXELS_MOVING = 8192 * 4320
# browsers show a frame of an animation that asks for less than this, in seconds, for a tenth of
# one, and animations are made for that
_LEAST = 0.011


class Still(NamedTuple):
    """One frame of a film.

    Attributes:
        time: its place in the film, seconds; the first is at 0, and each is later than the last.
        lasts: how long it is shown, seconds; more than 0.
        picture: gives it upright, [H, W, 3] uint8; not called for a frame that is left out.
            Raises Unreadable where the frame cannot be shown.
    """

    time: float
    lasts: float
    picture: Callable[[], np.ndarray]


@dataclasses.dataclass
class Damage:
    """What was wrong in a file that is played all the same.

    Attributes:
        parts: that could not be decoded and were left out.
    """

    parts: int = 0


class Unreadable(ValueError):
    """A file, or a frame of it, that cannot be shown; the message is one sentence.

    Args:
        what: the sentence, without the name of an input before it.

    Attributes:
        what: the same.
    """

    def __init__(self, what: str):
        super().__init__(f"file: {what}")
        self.what = what


def animated(lasts: float) -> float:
    """How long a frame of an animated picture is shown that asks for so long; seconds."""
    return lasts if lasts >= _LEAST else 0.1


def bounded(name: str, width: int, height: int, moving: bool) -> None:
    """Refuse a size before anything of it is decoded.

    Args:
        name: of the file.
        width, height: pixels.
        moving: whether there are several frames.

    Raises:
        Unreadable: it is too large.
    """
    most = MOST_PIXELS_MOVING if moving else MOST_PIXELS
    if width * height > most:
        what = "film or animation" if moving else "picture"
        raise Unreadable(
            f"{name} is {width} x {height}, and a {what} may have {most / 1e6:.0f} million pixels "
            "at most. Make it smaller."
        )
