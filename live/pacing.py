"""When what is due. Pure functions: the clock is the caller's."""


def show(time: float, elapsed: float, last: float | None, least: float) -> float | None:
    """When a frame of a file is shown that plays at its own pace.

    Args:
        time: the frame's place in the film, seconds.
        elapsed: seconds since the film began.
        last: place in the film of the frame shown last, None for the first.
        least: the shortest time between two shown frames, seconds.

    Returns:
        Seconds to wait, 0 for now; None to leave the frame out.
    """
    # half a millisecond, because 1 / rate and sums of it differ by rounding
    if last is not None and time - last < least - 5e-4:
        return None
    return max(0.0, time - elapsed)


def late(next_time: float | None, elapsed: float) -> bool:
    """Whether a frame is over before it is shown, because the one after it is due already."""
    return next_time is not None and elapsed >= next_time


def capture_interval(frame: float, fps: float) -> float:
    """How often a camera is asked for a picture, in seconds.

    Each picture costs encoding and decoding. A run that takes `frame` seconds per frame gets
    three to choose from, so that the newest is at most a third of that time old.

    Args:
        frame: seconds that one frame takes now, 0 when not known.
        fps: the most pictures per second.
    """
    return max(1 / fps, frame / 3)
