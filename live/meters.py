"""Rates and percentiles over the last few seconds."""

import math
from collections import deque


class Rate:
    """Events per second over the last `window` seconds; times are the caller's, ascending."""

    def __init__(self, window: float = 2.0):
        self.window = window
        self._times: deque[float] = deque()

    def add(self, now: float) -> None:
        self._times.append(now)
        self._forget(now)

    def value(self, now: float) -> float:
        """0 while fewer than two events are known."""
        self._forget(now)
        if len(self._times) < 2:
            return 0.0
        return (len(self._times) - 1) / max(self._times[-1] - self._times[0], 1e-9)

    def _forget(self, now: float) -> None:
        while self._times and now - self._times[0] > self.window:
            self._times.popleft()


class Spread:
    """The last `most` values and their percentiles."""

    def __init__(self, most: int = 300):
        self._values: deque[float] = deque(maxlen=most)

    def add(self, value: float) -> None:
        self._values.append(value)

    def percentile(self, p: float) -> float | None:
        """The value that p percent do not exceed (nearest rank); None if there is none yet."""
        values = sorted(self._values.copy())
        if not values:
            return None
        return values[max(0, math.ceil(len(values) * p / 100) - 1)]
