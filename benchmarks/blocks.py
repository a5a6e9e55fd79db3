"""Sides in blocks of frames, so that each is measured as it is when it runs alone."""

import collections
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from measure import Device, Times, short

NO_TIME = "no time was left"
BLOCK, DROP = 20, 3  # frames of a block, and of them those before it is measured


@dataclass(frozen=True)
class Way:
    """One side, for in_blocks.

    Attributes:
        frame: one frame, from a picture to a picture on the host.
        flow: one frame of many, where the next may be under way before this one is fetched.
        counts: running counts by name, such as of frames that went the prepared road.
    """

    frame: Callable[[], Any]
    flow: Callable[[], Any]
    counts: dict[str, Callable[[], int]] = field(default_factory=dict)


@dataclass
class Blocks(Times):
    """Milliseconds of one side in blocks.

    Attributes:
        medians: of each block.
        flowing: milliseconds per frame of each block that waited once, at its end.
        counted: by how much each count grew in the measured frames.
        of: how many those were.
    """

    medians: list[float] = field(default_factory=list)
    flowing: list[float] = field(default_factory=list)
    counted: collections.Counter[str] = field(default_factory=collections.Counter)
    of: int = 0

    @property
    def spread(self) -> float:
        """By how much the medians of the blocks differ: noise, and drift."""
        return max(self.medians) / min(self.medians) - 1

    @property
    def flow(self) -> float:
        return statistics.median(self.flowing)

    def row(self) -> dict[str, Any]:
        """Latency, throughput and counts."""
        if self.failed is not None:
            return {"failed": self.failed}
        told = {
            "latency ms": self.median, "p99": self.p99, "throughput ms": self.flow,
            "fps": 1000 / self.flow, "A/A": self.spread, "frames": len(self.ms),
        }  # fmt: skip
        row: dict[str, Any] = {name: round(value, 4) for name, value in told.items()}
        return row | {name: f"{count} of {self.of}" for name, count in self.counted.items()}


def in_blocks(
    ways: dict[str, Way],
    device: Device,
    frames: int,
    warm: int,
    seconds: float = math.inf,
    most: float = math.inf,
) -> dict[str, Blocks]:
    """Frames of all ways in blocks, several rounds of them; every other round backwards.

    Within a block a side is as it is alone: ComfyUI keeps one clone of a model loaded, so clones
    that take turns frame by frame load each time. Each block is run twice: waiting for each frame,
    and once at its end. A way that raises is out, and its reason is told.

    Args:
        frames: measured of each way, in whole blocks.
        warm: frames of each way before the first block.
        seconds: after these, warm-up included, no further round begins.
        most: nothing begins that would not end in these; ways that had no block yet are told.
    """
    deadline, end = time.monotonic() + seconds, time.monotonic() + most
    times = {name: Blocks() for name in ways}
    drop, block = min(DROP, warm), min(BLOCK - DROP, frames)
    takes: dict[str, float] = {}  # seconds of a round

    def run(name: str, work: Callable[[str, Way, Blocks], None]) -> None:
        try:
            work(name, ways[name], times[name])
        except Exception as error:
            times[name].failed = short(error)

    def warmed(name: str, way: Way, own: Blocks) -> None:
        for _ in range(warm):
            last = device.timed(way.frame)
        if warm:
            # of both its blocks
            takes[name] = 2 * (drop + block) * last / 1000

    def measured(name: str, way: Way, own: Blocks) -> None:
        ms, flowing = _block(way, device, own, block, drop)
        own.ms += ms
        own.medians.append(statistics.median(ms))
        own.flowing.append(flowing)

    for name in ways:
        if time.monotonic() < end:
            run(name, warmed)
        else:
            times[name].failed = NO_TIME
    longest = 0.0
    for i in range(max(1, round(frames / block))):
        began = time.monotonic()
        alive = [name for name, own in times.items() if own.failed is None]
        # a round that would not end in time does not begin
        if i and began + longest > min(deadline, end):
            break
        for name in alive if i % 2 == 0 else alive[::-1]:
            if i == 0 and time.monotonic() + takes.get(name, 0.0) >= end:
                times[name].failed = NO_TIME
                continue
            run(name, measured)
        longest = max(longest, time.monotonic() - began)
    return times


def _block(
    way: Way, device: Device, own: Blocks, block: int, drop: int
) -> tuple[list[float], float]:
    """Milliseconds of each frame, and per frame where only the last one is waited for."""

    def counting(work: Callable[[], Any]) -> Any:
        before = {name: count() for name, count in way.counts.items()}
        out = work()
        own.counted.update({name: count() - before[name] for name, count in way.counts.items()})
        own.of += block
        return out

    def flowing() -> None:
        for _ in range(block):
            way.flow()

    for _ in range(drop):
        way.frame()
    device.wait()
    ms = counting(lambda: [device.timed(way.frame) for _ in range(block)])
    for _ in range(drop):
        way.flow()
    device.wait()
    return ms, counting(lambda: device.timed(flowing)) / block
