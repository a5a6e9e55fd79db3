"""When the frames of a film are shown. The clock is the caller's."""

# a film that falls back further than this, in seconds, goes on from where it is
BEHIND = 0.25


class Pace:
    """A film's own pace on the caller's clock, and the most frames per second, pass after pass.

    Attributes:
        dropped: frames that were over before they could be shown.
    """

    def __init__(self):
        self.dropped = 0
        self._zero = 0.0  # when the current pass began, or should have
        self._end: float | None = None  # when the frame placed last is over
        self._due: float | None = None  # of the frame shown last
        self._shown: float | None = None

    def again(self, now: float) -> None:
        """The film begins, for the first time or where the pass before it ended."""
        late = self._end is None or now - self._end > BEHIND
        self._zero = now if late else self._end

    def wait(self, time: float, lasts: float, now: float, fps: float) -> float | None:
        """When the next frame is shown.

        Args:
            time, lasts: its place in the film, and how long it is shown; seconds.
            now: seconds.
            fps: the most frames per second.

        Returns:
            Seconds to wait, 0 for now; None to leave the frame out.
        """
        least = 1 / fps
        due = self._zero + time
        self._end = due + lasts
        # half a millisecond, because 1 / rate and sums of it differ by rounding
        if self._due is not None and due - self._due < least - 5e-4:
            return None
        if now - due > BEHIND:
            self._zero += now - due
            due, self._end = now, now + lasts
        elif now >= self._end:
            self.dropped += 1
            return None
        at = max(due, now)
        if self._shown is not None:
            at = max(at, self._shown + least)
        self._due, self._shown = due, at
        return at - now

    def left(self, now: float) -> float:
        """Seconds until the frame placed last is over."""
        return 0.0 if self._end is None else max(0.0, self._end - now)
