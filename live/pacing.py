"""How often a camera is asked."""


def capture_interval(frame: float, fps: float) -> float:
    """How often a camera is asked for a picture, in seconds.

    Each picture costs encoding and decoding. A run that takes `frame` seconds per frame gets
    three to choose from, so that the newest is at most a third of that time old.

    Args:
        frame: seconds that one frame takes now, 0 when not known.
        fps: the most pictures per second.
    """
    return max(1 / fps, frame / 3)
