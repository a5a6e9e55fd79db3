"""gpu.py's headline: all sides of one network, cell by cell, by value.

A cell is a stream's (n, mode, frames per slot). Its table is printed and written before the next
one begins, and what no time was left for is told by name.
"""

import functools
import time
from typing import Any

import best
import measure
import rivals
from blocks import NO_TIME, Blocks, Way, in_blocks

# (n, mode, frames per slot), those first that tell most
CELLS = (
    (1, "off", 1), (4, "self-negative", 1), (4, "off", 1), (2, "off", 1), (4, "off", 4),
    (1, "off", 4), (4, "full", 1), (4, "onetime-negative", 1),
)  # fmt: skip
FIRST = 3  # before all else; and the others at their best in these
ENGINES = ("cudagraph", "eager", "graph")
PUBLIC = rivals.Public.title
OTHERS = (rivals.Public, rivals.ComfyQueue, rivals.AutoPipeline, rivals.Floor, rivals.ComfySampler)


def side_by_side(bench, kit, cells) -> None:
    """Milliseconds per frame of every side, in each cell."""
    for i, cell in enumerate(cells):
        # a third of the time is enough for a cell; the last ones share what is left
        share = bench.left / min(len(cells) - i, 3)
        _cell(bench, kit, cell, makers(bench, cell), "side by side", share)


def makers(bench, cell) -> dict[str, Any]:
    """What makes each side that knows the cell's mode, by name; those first that tell most."""
    _, mode, _ = cell
    ours = {f"LiveDiffusion, {name}": bench.engine(name) for name in ENGINES}
    others = {side.title: side for side in OTHERS if mode in side.modes}
    first = next(iter(ours))
    return {first: ours[first], **best.ours(bench), **others, **ours}


def at_their_best(bench, kit, cells) -> None:
    """The public class and diffusers with torch.compile and channels_last, beside ours."""
    kept: dict[str, Any] = {}  # compiled once for all cells
    for cell in cells:
        _, mode, f = cell
        if f > 1:
            continue
        making = {"LiveDiffusion, cudagraph": bench.engine("cudagraph"), PUBLIC: rivals.Public}
        making |= best.ours(bench) | best.makers(bench, kit, mode, kept)
        needs = 0.0 if bench.rehearse else best.SECONDS
        _cell(bench, kit, cell, making, "others at their best", bench.left, needs)


def agree(bench, kit, cells) -> None:
    """How far our latents are from the public class's, for each (n, mode), before any is timed."""
    rows = []
    for n, mode in dict.fromkeys((n, mode) for n, mode, _ in cells):
        row: dict[str, Any] = {"n": n, "mode": mode}
        if bench.left <= 0:
            rows.append({**row, "failed": NO_TIME})
            continue
        try:
            row["relative RMS"] = rivals.apart(kit, n, mode)
        except Exception as error:
            row["failed"] = measure.short(error)
        rows.append(row)
    bench.report.add(f"{kit.name}: our latents against the public class's", rows, str(kit.dtype))


def _cell(
    bench, kit, cell, making: dict[str, Any], what: str, share: float, needs: float = 0.0
) -> None:
    """One table.

    Args:
        making: makes each side, by name.
        share: seconds after which no further round of blocks begins.
        needs: seconds without which the cell is not begun.
    """
    n, mode, f = cell
    name = f"{kit.name}: {what}, n = {n}, {mode}, F = {f}"
    if bench.left <= needs:
        bench.skip(name)
        return
    with bench.report.part(name):
        began = time.monotonic()
        sides = {title: made(make, kit, n, mode, f) for title, make in making.items()}
        fed = rivals.pictures(kit, f)
        ways = {title: way(side, fed) for title, side in sides.items() if able(side)}
        share -= time.monotonic() - began
        times = in_blocks(ways, bench.device, bench.frames, bench.warm, share, bench.left)
        base = times.get(PUBLIC)
        rows = []
        for title, side in sides.items():
            told = {"failed": measure.short(side)} if not able(side) else times[title].row()
            if "failed" not in told:
                told["throughput ms"] = round(told["throughput ms"] / f, 4)
                told["fps"] = round(told["fps"] * f, 2)
                told |= _against(base, times[title])
                told["MiB"] = bench.device.peak(ways[title].frame)
            rows.append({"side": title, **told, **engine(side)})
            if hasattr(side, "close"):
                side.close()
        note = f"{kit.size} x {kit.size}, {kit.dtype}; latency of a call of F frames"
        bench.report.add(name, rows, note)


def _against(base: Blocks | None, own: Blocks) -> dict[str, float]:
    """How often it is the public class's speed."""
    if base is None or base.failed is not None:
        return {}
    return {
        "x latency": round(base.median / own.median, 3),
        "x fps": round(base.flow / own.flow, 3),
    }


def made(make, *how):
    """A side, or the error that making it gave."""
    try:
        return make(*how)
    except Exception as error:
        return error


def able(side) -> bool:
    return not isinstance(side, Exception)


def way(side, fed) -> Way:
    """A side as in_blocks runs it."""
    flow = getattr(side, "flow", side.frames)
    return Way(
        functools.partial(side.frames, fed), functools.partial(flow, fed),
        getattr(side, "counts", {}),
    )  # fmt: skip


def engine(side) -> dict[str, Any]:
    """What its engine has to tell: ticks recorded, and why it did not run."""
    told = {
        "recorded": getattr(side, "captures", None),
        "fell back": getattr(side, "fallback", None),
    }
    return {name: value for name, value in told.items() if value is not None}
