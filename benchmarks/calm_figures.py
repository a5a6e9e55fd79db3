"""How calm a clip is, and what calm has cost it. Pictures are [T, 3, H, W] in 0..1."""

import math
import statistics
from collections.abc import Iterable

import torch
from calm_clips import Clip, places, sampled
from torch import Tensor

FIGURES = ("warp error", "flicker", "sharpness", "look", "layout")
LOOKED_AT = 4  # frames of a clip that are compared with the look's own filter


def warped(picture: Tensor, flow: Tensor) -> Tensor:
    """[1, C, H, W] by a backward flow in pixels, [2, H, W]: what is at a pixel comes from there."""
    return sampled(picture, places(picture.shape[-1]) + flow.movedim(0, -1).double())


def warp_errors(out: Tensor, flow: Tensor, seen: Tensor) -> list[float]:
    """Mean |out(t + 1) - warp(out(t))| where the pixel was seen at t, in bytes, of each pair.

    Args:
        flow, seen: of T - 1 pairs, see calm_clips.Clip.
    """
    every = []
    for t in range(len(out) - 1):
        gone = (out[t + 1 : t + 2] - warped(out[t : t + 1], flow[t])).abs()
        every.append(255 * float((gone * seen[t]).sum() / (3 * seen[t].sum())))
    return every


def flicker(out: Tensor) -> float:
    """Standard deviation over time of what stands still, in bytes, mean over the picture."""
    return 255 * float(out.std(0).mean())


def measure(out: Tensor, clip: Clip, first: int, off: Tensor | None = None) -> dict[str, float]:
    """The figures of one clip.

    Args:
        out: frames `first`, `first` + 1, ... of the clip, restyled.
        off: the same frames of the run without.

    Returns:
        "warp error" of a clip that moves, "flicker" of one that does not; both in bytes.
        "sharpness": energy of the edges, as a share of off's. "look": PSNR to the look's own filter
        of the clean frame, in dB. "layout": correlation of the edges with the clean frame's.
    """
    from livediffusion.demo import measure as figures

    last = first + len(out)
    told: dict[str, float] = {}
    if clip.moves:
        at = slice(first, last - 1)
        told["warp error"] = statistics.mean(warp_errors(out, clip.flow[at], clip.seen[at]))
    else:
        told["flicker"] = flicker(out)
    if off is not None:
        told["sharpness"] = float(figures.sharpness(out, off).mean())
    clean = clip.clean[first:last]
    told["layout"] = float(figures.edge_correlation(out, clean).mean())
    some = torch.linspace(0, len(out) - 1, LOOKED_AT if clip.moves else 1).long().tolist()
    target = torch.cat([clip.filtered(first + t) for t in some])
    told["look"] = float(figures.psnr(out[some], target).mean())
    return told


def geometric(values: Iterable[float]) -> float:
    """Geometric mean of positive numbers."""
    return math.exp(statistics.mean(math.log(max(value, 1e-9)) for value in values))


def together(clips: list[dict[str, float]]) -> dict[str, float]:
    """One row of many clips: geometric means; arithmetic ones of what may be below 0."""
    told = {}
    for name in FIGURES:
        values = [own[name] for own in clips if name in own]
        if values:
            mean = statistics.mean if name in ("look", "layout") else geometric
            told[name] = mean(values)
    return told
