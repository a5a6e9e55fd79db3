"""When a run is due and how often a camera is asked. Pure functions: the clock is the caller's."""

from collections.abc import Sequence
from typing import NamedTuple

GRACE = 0.5  # seconds that a source which has given nothing yet holds the others up
# how much faster another source must be to set the pace: two of one rate would take turns
_FASTER = 1.2


def capture_interval(frame: float, fps: float) -> float:
    """How often a camera is asked for a picture, in seconds.

    Each picture costs encoding and decoding. A run that takes `frame` seconds per frame gets
    three to choose from, so that the newest is at most a third of that time old.

    Args:
        frame: seconds that one frame takes now, 0 when not known.
        fps: the most pictures per second.
    """
    return max(1 / fps, frame / 3)


def milliseconds(interval: float) -> float:
    """An interval in seconds as it is told: whole ms, so that few changes are worth a message.

    Below 10 ms with two digits: at 240 frames per second they are 4.17 ms apart, not 4.
    """
    return round(1000 * interval, 2 if interval < 0.01 else None)


class Source(NamedTuple):
    """A source, as the pace sees it.

    Attributes:
        fresh: a frame waits that no run has taken.
        known: it has given a frame before.
        over: nothing will come any more.
        rate: frames per second of late, falling while none comes.
    """

    fresh: bool
    known: bool
    over: bool
    rate: float


class Due(NamedTuple):
    """What to do now.

    Attributes:
        leader: index of the source that sets the pace, None before that is known.
        run: run the graph now, on the latest of each source.
        awaited: indices of the sources whose frames would change that.
        look: seconds after which to look again in any case, None for never.
    """

    leader: int | None
    run: bool
    awaited: list[int]
    look: float | None = None


def due(sources: Sequence[Source], leader: int | None, waited: float) -> Due:
    """Whether the graph is run: with each frame of the fastest source, and no faster.

    A source that sends nothing holds the others up for GRACE and never again.

    Args:
        leader: index of the source that set the pace so far.
        waited: seconds since these sources were first asked for frames.
    """
    going = [i for i, source in enumerate(sources) if not source.over or source.fresh]
    fresh = [i for i in going if sources[i].fresh]
    leader = _leader(sources, going, leader)
    if not fresh:
        return Due(leader, False, going)
    missing = [i for i in going if not sources[i].fresh and not sources[i].known]
    if missing and waited < GRACE:
        return Due(leader, False, missing, GRACE - waited)
    if leader is None or sources[leader].fresh or not sources[leader].known:
        return Due(leader, True, [])
    # the leader is late, and gives way when it is so late that another is the faster one
    fastest = max(sources[i].rate for i in fresh)
    if fastest <= 0:
        return Due(leader, True, [])
    return Due(leader, False, [leader], 0.3 / fastest)


def _leader(sources: Sequence[Source], going: list[int], before: int | None) -> int | None:
    rated = [i for i in going if sources[i].rate > 0]
    if not rated:
        return None
    best = max(rated, key=lambda i: sources[i].rate)
    if before in rated and sources[best].rate <= _FASTER * sources[before].rate:
        return before
    return best
