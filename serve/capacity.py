"""How much a GPU holds: from one ComfyUI's measured tick and memory to streams and fractions."""

import math

from .admission import BUSY

MOST = 16  # replicas on one GPU; each is a process with a CUDA context of its own
SPARE_MEMORY = 0.9  # of a GPU's memory that replicas may take together


def streams_by_time(tick_s: float, fps: float) -> int:
    """Streams whose ticks fit into a GPU's time; the first one always does.

    Args:
        tick_s: seconds of one tick, of one stream alone, measured.
        fps: frames a second that each is to keep, above 0.
    """
    return max(1, int(BUSY / max(tick_s * fps, BUSY / MOST) + 1e-9))


def replicas_by_memory(memory_bytes: float, total_bytes: float) -> int:
    """Replicas whose memory fits into a GPU's; the first one always does.

    Args:
        memory_bytes: that one takes, measured with its models loaded.
        total_bytes: of the GPU; 0 where it is not known.
    """
    if memory_bytes <= 0 or total_bytes <= 0:
        return 1
    return min(MOST, max(1, int(SPARE_MEMORY * total_bytes / memory_bytes + 1e-9)))


def fraction(memory_bytes: float, total_bytes: float, tick_s: float, fps: float) -> float:
    """What of a GPU a replica gets, so that as many share it as time and memory allow.

    Returns:
        1/n, rounded down to Ray's ten-thousandths: n of them never are more than 1.
    """
    n = min(streams_by_time(tick_s, fps), replicas_by_memory(memory_bytes, total_bytes))
    return math.floor(1e4 / n) / 1e4


def slots(tick_s: float, fps: float, each: float) -> float:
    """Streams that one replica keeps at the rate, when all that share its GPU run.

    Args:
        tick_s: measured, alone.
        each: of a GPU that it has; 0 or 1: nobody shares it.

    Returns:
        Above 0, at most 1: a ComfyUI has one live run at a time, however fast it is.
    """
    sharing = max(1, int(1 / each + 1e-6)) if 0 < each < 1 else 1
    return min(1.0, streams_by_time(tick_s, fps) / sharing)
