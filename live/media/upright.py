"""Which way up: EXIF's number, and the display matrix of films."""

from typing import NamedTuple

import numpy as np


class Turn(NamedTuple):
    """What makes a picture upright: first rows and columns change places, then flips.

    Attributes:
        swap: rows become columns.
        left_right, up_down: flipped.
    """

    swap: bool = False
    left_right: bool = False
    up_down: bool = False

    def upright(self, picture: np.ndarray) -> np.ndarray:
        """[H, W, C] to [H, W, C], or [W, H, C] where rows become columns."""
        if self.swap:
            picture = picture.swapaxes(0, 1)
        if self.left_right:
            picture = picture[:, ::-1]
        if self.up_down:
            picture = picture[::-1]
        return np.ascontiguousarray(picture)


AS_IT_IS = Turn()
# by EXIF's orientation (tag 0x0112): where the picture's first row and first column are
EXIF = {
    2: Turn(left_right=True),
    3: Turn(left_right=True, up_down=True),
    4: Turn(up_down=True),
    5: Turn(swap=True),
    6: Turn(swap=True, left_right=True),
    7: Turn(swap=True, left_right=True, up_down=True),
    8: Turn(swap=True, up_down=True),
}


def display(matrix: bytes) -> Turn:
    """FFmpeg's AV_FRAME_DATA_DISPLAYMATRIX, to the nearest quarter turn.

    Args:
        matrix: nine int32 (a b u, c d v, x y w): the pixel (p, q) is shown at
            (a p + c q + x, b p + d q + y).
    """
    a, b, _, c, d = (int(value) for value in np.frombuffer(matrix, np.int32, 5))
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Turn(True, c < 0, b < 0)
    return Turn(False, a < 0, d < 0)
