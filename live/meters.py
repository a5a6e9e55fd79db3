"""Rates and percentiles over the last events."""

import math
from collections import deque

from .bounds import most


class Rate:
    """Events per second over the last few, however slow; times are the caller's, ascending.

    One thread adds, any may ask.

    Args:
        over: events that count.
    """

    def __init__(self, over: int = most("meters.Rate._times")):
        self._times: deque[float] = deque(maxlen=over)

    def add(self, now: float) -> None:
        self._times.append(now)

    @property
    def last(self) -> float | None:
        """The time of the last event."""
        times = self._times.copy()
        return times[-1] if times else None

    def value(self, now: float) -> float:
        """0 while fewer than two events are known; falls while none comes."""
        times = self._times.copy()
        if len(times) < 2:
            return 0.0
        rate = (len(times) - 1) / max(times[-1] - times[0], 1e-9)
        return min(rate, 1 / max(now - times[-1], 1e-9))


class Spread:
    """The last values and their percentiles."""

    def __init__(self, over: int = most("meters.Spread._values")):
        self._values: deque[float] = deque(maxlen=over)

    def add(self, value: float) -> None:
        self._values.append(value)

    def percentile(self, p: float) -> float | None:
        """The value that p percent do not exceed (nearest rank); None if there is none yet."""
        values = sorted(self._values.copy())
        if not values:
            return None
        return values[max(0, math.ceil(len(values) * p / 100) - 1)]
