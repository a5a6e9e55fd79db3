"""Cost against frames, steps, rows and pixels, and memory against frames.

A slope is that of log cost over log size: 1 is proportional. Used by bench.py and gpu.py.
"""

import dataclasses
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import Device, in_turns, slope
from networks import Kit
from rivals import pictures

Make = Callable[..., Any]  # of a side: (kit, n, mode, f)


def costs(
    sizes: dict[float, Any], device: Device, repeats: int, warm: int = 2
) -> dict[float, float]:
    """The least milliseconds of each way, by its size; all in turns.

    The least and not the median: what other processes add is no part of how cost grows.

    Raises:
        RuntimeError: one of them failed, and why.
    """
    times = in_turns({str(size): way for size, way in sizes.items()}, device, repeats, warm)
    for size, own in times.items():
        if own.failed is not None:
            raise RuntimeError(f"{size}: {own.failed}")
    return {size: min(times[str(size)].ms) for size in sizes}


def row(what: str, points: dict[float, float]) -> dict[str, Any]:
    """A line of the table: milliseconds at each size, and the slope."""
    told = ", ".join(f"{size:g}: {cost:.4g}" for size, cost in points.items())
    return {"cost against": what, "slope": round(slope(points), 3), "ms": told}


def frames(kit: Kit, device: Device, make: Make, counts: list[int], n: int, repeats: int):
    """N frames through a stream of their own that has settled: {N: ms}."""
    fed, ways = pictures(kit), {}
    for count in counts:
        side = make(kit, n, "self-negative")
        for _ in range(3 * n):
            side.frames(fed)
        ways[count] = lambda side=side, count=count: [side.frames(fed) for _ in range(count)]
    return costs(ways, device, repeats, warm=0)


def pixels(kit: Kit, device: Device, make: Make, sizes: list[int], n: int, repeats: int):
    """One frame, encode to decode: {pixels: ms}."""
    ways = {}
    for size in sizes:
        other = dataclasses.replace(kit, size=size)
        side, fed = make(other, n, "self-negative"), pictures(other)
        for _ in range(3 * n):
            side.frames(fed)
        ways[size * size] = lambda side=side, fed=fed: side.frames(fed)
    return costs(ways, device, repeats)


def ticks(kit: Kit, device: Device, make: Make, shapes: dict[float, tuple], repeats: int):
    """One frame's ticks at each (n, mode, F), latents in and out: {size: ms}."""
    ways = {}
    for size, (n, mode, f) in shapes.items():
        side = make(kit, n, mode, f)
        latents = torch.randn(f, *kit.latent, device=kit.device)
        for _ in range(3 * n):
            side.step(latents)
        ways[size] = lambda side=side, latents=latents: side.step(latents)
    return costs(ways, device, repeats)


@dataclasses.dataclass
class Held:
    """What there is in memory after some frames.

    Attributes:
        objects: of Python's, as the garbage collector lists them.
        tensors: of them, and their size in MiB.
        device: MiB allocated on it, or None where that cannot be told.
        seconds: that the frames took.
    """

    frames: int
    objects: int
    tensors: int
    mib: float
    device: float | None
    seconds: float


def memory(kit: Kit, device: Device, make: Make, counts: list[int], n: int, mode: str):
    """What is held after this many ticks of one stream."""
    side, out = make(kit, n, mode), []
    latents = torch.randn(1, *kit.latent, device=kit.device)
    done, began = 0, time.perf_counter()
    for count in counts:
        for _ in range(count - done):
            side.step(latents)
        done = count
        device.wait()
        gc.collect()
        objects = gc.get_objects()
        alive = [o for o in objects if issubclass(type(o), torch.Tensor)]
        mib = sum(t.untyped_storage().nbytes() for t in alive) / 2**20
        held = torch.cuda.memory_allocated() / 2**20 if device.cuda else None
        seconds = time.perf_counter() - began
        out.append(Held(count, len(objects), len(alive), mib, held, seconds))
        del objects, alive
    return out
