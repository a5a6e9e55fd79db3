"""The other ends of sources and sinks: a counter film, and a cable that a test has in hand."""

import os
import threading
import time

from counting import BITS, SIDE, count, counted
from livediffusion.live.faults import Refused
from livediffusion.live.sources import Lost, Shot

__all__ = ["BITS", "LONG", "SIDE", "Cable", "count", "counted", "pulls"]
LONG = "LIVEDIFFUSION_LONG" in os.environ


def pulls(few: int) -> int:
    """How many times a test takes the other end away, for all kinds of them alike:
    LIVEDIFFUSION_PULLS, else 20 with LIVEDIFFUSION_LONG set, else few."""
    return int(os.environ.get("LIVEDIFFUSION_PULLS", 20 if LONG else few))


class Cable:
    """A source or sink as a test has it in hand: pulled and plugged in again; see Source, Sink."""

    REPEATS = True

    def __init__(self):
        self.plugged, self.number, self.opened, self.closed = True, 0, 0, 0
        self.refused = None  # what the other end, or who leads there, has turned to
        self.forbidden = None  # what is wrong with the setting, found after the run was taken
        self.closes, self.joined = True, True  # whether it closes well, and takes what is sent
        self.taken, self.threads = [], set()

    def __call__(self, wanted):
        """A connection, as the class of a source or sink gives one."""
        return _Connection(self, wanted)

    def check(self, wanted):
        if self.forbidden and threading.current_thread() in self.threads:
            raise Refused(self.forbidden)

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
        if self.cable.refused:
            raise Refused(self.cable.refused)

    def newest(self, timeout):
        self._look()
        time.sleep(0.005)
        self.cable.number += 1
        return Shot(counted(self.cable.number), time.time())

    def send(self, picture, at):
        self._look()
        if not self.cable.joined:
            return False
        self.cable.taken.append((picture, at))
        return None

    def close(self):
        self.cable.closed += 1
        if not self.cable.closes:
            raise RuntimeError("it is closed already")
