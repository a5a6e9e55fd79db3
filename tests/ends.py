"""The other ends of sources and sinks: a counter film, and a cable that a test has in hand."""

import threading
import time

import numpy as np
from livediffusion.live.sources import Lost, Shot

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


class Cable:
    """A source or sink as a test has it in hand: pulled and plugged in again; see Source, Sink."""

    REPEATS = True

    def __init__(self):
        self.plugged, self.number, self.opened, self.closed = True, 0, 0, 0
        self.taken, self.threads = [], set()

    def __call__(self, wanted):
        """A connection, as the class of a source or sink gives one."""
        return _Connection(self, wanted)

    @staticmethod
    def check(name):
        pass

    @staticmethod
    def listed():
        return ["cable"]


class _Connection:
    REPEATS = True

    def __init__(self, cable, wanted):
        self.cable, self.wanted = cable, wanted

    def open(self, *size):
        self.cable.opened += 1
        self.cable.threads.add(threading.current_thread())
        self._look()

    def _look(self):
        if not self.cable.plugged:
            raise Lost("the cable is pulled")

    def newest(self, timeout):
        self._look()
        time.sleep(0.005)
        self.cable.number += 1
        return Shot(counted(self.cable.number), time.time())

    def send(self, picture, at):
        self._look()
        self.cable.taken.append((picture, at))

    def close(self):
        self.cable.closed += 1
