"""Limits on time that a busy machine does not fail: they grow with what else runs on it."""

import time

_MOST = 5  # times as long, at the most
_SPIN = 0.03  # seconds of work that a look at the machine takes


def crowded(work: float = _SPIN) -> float:
    """How many times as long work takes now as it would alone; 1 on an idle machine.

    Args:
        work: seconds of processor time that the look takes.
    """
    began, worked = time.perf_counter(), time.thread_time()
    while (done := time.thread_time() - worked) < work:
        pass
    return max(1.0, (time.perf_counter() - began) / done)


class Limit:
    """Some seconds from now, on an idle machine; more of them where others take the processor.

    Attributes:
        seconds: on an idle machine.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._began = time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self._began

    @property
    def over(self) -> bool:
        if self.spent <= self.seconds:
            return False
        # several processes wait for each other here, so each may be held up in turn; but what has
        # not happened after so long does not happen, and who waits for it keeps the machine busy
        return self.spent > self.seconds * min(_MOST, 2 * crowded() - 1)
