"""How everything here is measured: in turns, on one clock, with what it ran on beside it."""

import collections
import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "diffusers", "streamdiffusion", "transformers", "triton", "onnxruntime",
            "openvino", "tensorrt")  # fmt: skip


class Device:
    """Where it is measured. What only CUDA can tell is None elsewhere, and `missing` names it."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.missing: dict[str, None] = {}

    def _asks(self, what: str) -> bool:
        if not self.cuda:
            self.missing[what] = None
        return self.cuda

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], Any]) -> float:
        """Milliseconds of one call, the device's work included."""
        began = time.perf_counter()
        work()
        self.wait()
        return 1000 * (time.perf_counter() - began)

    def busy(self, work: Callable[[], Any], repeats: int) -> float:
        """Median milliseconds between two CUDA events around a call; on a CPU, of the clock."""
        if not self._asks("times between CUDA events (the clock's instead)"):
            return statistics.median(self.timed(work) for _ in range(repeats))
        pairs = []
        for _ in range(repeats):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            work()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in pairs)

    def host(self, work: Callable[[], Any], repeats: int) -> float:
        """Median milliseconds until a call returns, with nothing queued on the device before it."""
        times = []
        for _ in range(repeats):
            self.wait()
            began = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - began))
        self.wait()
        return statistics.median(times)

    def syncs(self, work: Callable[[], Any]) -> int | None:
        """How often a call makes the host wait for the device."""
        if not self._asks("waits of the host for the device"):
            work()
            return None
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        # torch's first one only tells that the mode is a prototype
        return sum("called a synchronizing" in str(warning.message) for warning in seen)

    def allocations(self, work: Callable[[], Any]) -> dict[str, int | None]:
        """What a call asks of torch's allocator, and how often that has to ask CUDA for more."""
        names = {"allocations": "allocation.all.allocated", "from CUDA": "segment.all.allocated"}
        if not self._asks("allocations of device memory"):
            work()
            return dict.fromkeys(names)
        before = torch.cuda.memory_stats()
        work()
        after = torch.cuda.memory_stats()
        return {name: after[key] - before[key] for name, key in names.items()}

    def peak(self, work: Callable[[], Any]) -> float | None:
        """The most device memory allocated during a call, in MiB."""
        if not self._asks("peak device memory"):
            work()
            return None
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 2**20


@dataclass
class Times:
    """Milliseconds of one side. Every second one stands for a second measurement of the same."""

    ms: list[float] = field(default_factory=list)
    failed: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def p99(self) -> float:
        # of few frames: the slowest, not more than that
        return statistics.quantiles(self.ms, n=100, method="inclusive")[98]

    @property
    def spread(self) -> float:
        """A/A: by how much the medians of the two measurements differ."""
        return abs(statistics.median(self.ms[::2]) / statistics.median(self.ms[1::2]) - 1)

    def row(self) -> dict[str, Any]:
        if self.failed is not None:
            return {"failed": self.failed}
        told = {"ms": self.median, "p99": self.p99, "A/A": self.spread, "frames": len(self.ms)}
        return {name: round(value, 4) for name, value in told.items()}


def in_turns(
    ways: dict[str, Callable[[], Any]],
    device: Device,
    frames: int,
    warm: int,
    seconds: float = math.inf,
    rest: float = 0.0,
) -> dict[str, Times]:
    """Frames of all ways in turns, so that a busy machine slows all; the order turns, too.

    A way that raises is out, and its reason is told. Stops early, at a full round, after `seconds`;
    warm-up does not count. `rest` seconds lie before each frame.
    """
    times = {name: Times() for name in ways}
    for name, way in ways.items():
        try:
            for _ in range(warm):
                way()
            device.wait()
        except Exception as error:
            times[name].failed = short(error)
    deadline = time.monotonic() + seconds
    for i in range(frames):
        alive = [name for name, own in times.items() if own.failed is None]
        # two rounds of each order, so that both measurements of a side see the same orders
        at = i // 2 % len(alive) if alive else 0
        for name in alive[at:] + alive[:at]:
            time.sleep(rest)
            try:
                times[name].ms.append(device.timed(ways[name]))
            except Exception as error:
                times[name].failed = short(error)
        if time.monotonic() > deadline and i >= 3:
            break
    return times


def short(error: Exception) -> str:
    """The kind and the first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:150]}"


class Ops(TorchDispatchMode):
    """Counts aten operations that touch elements; views and bare allocations do not."""

    def __init__(self):
        super().__init__()
        self.names: collections.Counter[str] = collections.Counter()

    @property
    def total(self) -> int:
        return sum(self.names.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            # what is only written in other operations is counted as those
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        name = func.overloadpacket.__name__
        if not (_is_view(func) or "empty" in name):
            self.names[name] += 1
        return func(*args, **kwargs)


def _is_view(func) -> bool:
    schema = func._schema
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    aliases = any(r.alias_info is not None for r in schema.returns)
    return (aliases and not writes) or func.overloadpacket.__name__ == "_unsafe_view"


def ops(work: Callable[[], Any]) -> collections.Counter[str]:
    """The aten operations of a call, by name."""
    with Ops() as counted:
        work()
    return counted.names


def slope(points: dict[float, float]) -> float:
    """Of log cost over log size, least squares: 1 means twice the cost for twice the size."""
    sizes, costs = zip(*((math.log(x), math.log(y)) for x, y in points.items()), strict=True)
    return statistics.linear_regression(sizes, costs).slope


@dataclass(frozen=True)
class Bar:
    """A figure, and what it has to be.

    Attributes:
        counted: it is a count, so it does not depend on the machine.
    """

    name: str
    figure: float
    most: float = math.inf
    least: float = -math.inf
    counted: bool = False

    @property
    def ok(self) -> bool:
        return self.least <= self.figure <= self.most

    @property
    def bound(self) -> str:
        if math.isinf(self.least):
            return f"<= {self.most:g}"
        if math.isinf(self.most):
            return f">= {self.least:g}"
        return f"= {self.most:g}" if self.least == self.most else f"{self.least:g} to {self.most:g}"

    def row(self) -> dict[str, Any]:
        kind = "count" if self.counted else "time"
        verdict = "ok" if self.ok else "MISSED"
        return {"bar": self.name, "figure": float(f"{self.figure:.3g}"), "bound": self.bound,
                "of": kind, "verdict": verdict}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal or different keys, in columns as wide as they need to be."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))
             for line in cells]  # fmt: skip
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Report:
    """What was measured: printed at once, and in a file after every part, so an end loses nothing.

    Args:
        path: of the JSON.
        about: the machine and the versions.
    """

    def __init__(self, path: pathlib.Path, about: dict[str, Any]):
        self.path = path
        self.told: dict[str, Any] = {"on": about}
        self.bars: list[Bar] = []
        self.failed: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def add(self, name: str, rows: list[dict[str, Any]], note: str = "") -> None:
        """A table."""
        print(f"\n{name}{f' ({note})' if note else ''}\n\n{table(rows)}", flush=True)
        self.told[name] = rows
        self.write()

    @contextlib.contextmanager
    def part(self, name: str):
        """A part of the run: its failure is told by name, and the others go on."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            self.failed[name] = short(error)
            print(f"\n{name} FAILED: {short(error)}", flush=True)
        self.seconds[name] = round(time.monotonic() - began, 1)
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        bars = [bar.row() for bar in self.bars]
        whole = {**self.told, "bars": bars, "failed": self.failed, "seconds": self.seconds}
        self.path.write_text(json.dumps(whole, indent=1), encoding="utf-8")


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    told: dict[str, Any] = {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }  # fmt: skip
    if torch.cuda.is_available():
        told |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            told[package] = importlib.metadata.version(package)
    if "comfyui_version" in sys.modules:
        told["comfyui"] = sys.modules["comfyui_version"].__version__
    return told


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
