"""The counter film: pictures that carry their number, through resizing, JPEG and codecs."""

import numpy as np

BITS, SIDE = 12, 96


def counted(number, height=SIDE, width=SIDE):
    """[height, width, 3] uint8 that carries a number as black and white blocks, low bit first.

    It survives resizing, JPEG and video codecs.
    """
    picture = np.full((height, width, 3), 128, np.uint8)
    block = width // BITS
    for bit in range(BITS):
        picture[height // 4 : 3 * height // 4, bit * block : (bit + 1) * block] = (
            235 if number >> bit & 1 else 16
        )
    return picture


def count(picture):
    """The number in a picture [H, W, 3]; None where it cannot be read."""
    height, width = picture.shape[:2]
    block, number = width // BITS, 0
    for bit in range(BITS):
        left = bit * block
        part = picture[height * 3 // 8 : height * 5 // 8, left + block // 4 : left + block * 3 // 4]
        grey = float(part.mean())
        if 90 < grey < 166:
            return None
        number |= (grey > 128) << bit
    return number
