"""Where a device's time goes: a profile's kernels by name, and by what they are for."""

import re
from typing import Any, NamedTuple

import torch

# the first that is found in a kernel's name; CPU operations are named so, too
KINDS = (
    ("layout", r"nchwToNhwc|nhwcToNchw|transpose|Transpose"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("norm", r"[Nn]orm|Moments"),
    ("convolution, GEMM", r"conv|gemm|xmma|cutlass|fprop|nvjet|cudnn|cublas|sm90|addmm|splitK|mm$"),
    ("ours", r"stream_|picture|likeness"),
    ("copy", r"[Mm]emcpy|[Mm]emset|copy|Copy|CatArray|cat$|clone"),
    ("elementwise", r"elementwise|vectorized|add|mul|silu|gelu|Functor|reduce"),
)


class Spent(NamedTuple):
    """A kernel: milliseconds and calls per frame."""

    name: str
    ms: float
    calls: float


def spent(profile: torch.profiler.profile, frames: int, cuda: bool) -> list[Spent]:
    """The kernels of a profile, the longest first; on a CPU, its operations."""
    events = profile.key_averages()
    if cuda:
        # an operation has its kernels' time, too: only the kernels themselves are counted
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    which = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = [Spent(e.key, getattr(e, which) / 1000 / frames, e.count / frames) for e in events]
    return sorted(found, key=lambda one: -one.ms)


def kind(name: str) -> str:
    """What a kernel is for."""
    return next((kind for kind, words in KINDS if re.search(words, name)), "other")


def by_kind(every: list[Spent]) -> list[dict[str, Any]]:
    """A row for each kind, the longest first."""
    sums: dict[str, list[float]] = {}
    for one in every:
        own = sums.setdefault(kind(one.name), [0.0, 0.0])
        own[0] += one.ms
        own[1] += one.calls
    whole = sum(ms for ms, _ in sums.values())
    return [
        {"kind": kind, "ms/frame": ms, "share": ms / whole, "kernels/frame": calls}
        for kind, (ms, calls) in sorted(sums.items(), key=lambda item: -item[1][0])
    ]


def by_name(every: list[Spent], most: int) -> list[dict[str, Any]]:
    """A row for each of the longest."""
    whole = sum(one.ms for one in every)
    return [
        {"kernel": one.name[:90], "kind": kind(one.name), "calls/frame": one.calls,
         "ms/frame": one.ms, "share": one.ms / whole}
        for one in every[:most]
    ]  # fmt: skip
