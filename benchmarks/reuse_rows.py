"""Frames whose rows go on with kept features (Live Reuse): how near their pictures are to those of
the whole network, and whether the time follows the work.
"""

import math
from collections.abc import Callable
from typing import Any

import measure
import numpy as np
import torch
from measure import Bar, Device, Report

# what the rows "with reuse" are, besides the node's own settings
WAYS: dict[str, dict] = {
    "with reuse": {}, "with reuse, interval 8": {"interval": 8},
    "with reuse, outermost block": {"depth": "outermost block"},
}  # fmt: skip
CLIPS = 3
SIZE = 256  # of `share`
NEAR = 0.15  # how far the time may be from the work


def asked(way: str):
    """Live Reuse's settings of one of WAYS."""
    from livediffusion.engine.blocks.schedule import Reuse

    return Reuse(**WAYS[way])


def psnr(ours: Callable[[], Any], whole: Callable[[], Any], clips: int) -> dict[str, float]:
    """How near a way with reuse is to one without, in dB of the mean squared error over all frames
    that count: of clips in motion, of the worst clip, and of a picture that stands still.

    Args:
        ours, whole: make a side (rivals) whose stream is empty.
        clips: how many, of those that nothing was tuned on.
    """
    import calm_clips

    films = [
        (clip.noisy.movedim(1, -1) * 255).round().to(torch.uint8).numpy()
        for clip in [*calm_clips.clips("judged", True, clips), calm_clips.clips("judged", False)[0]]
    ]
    errors = []
    for film in films:
        sides, error = (ours(), whole()), []
        for t, picture in enumerate(film[: calm_clips.WARM + calm_clips.FRAMES]):
            a, b = (side.frames(picture[None]).astype(np.float64) for side in sides)
            if t >= calm_clips.WARM:
                error.append(np.square(a - b).mean() / 255**2)
        errors.append(float(np.mean(error)))
    *moving, still = errors
    return {
        "in motion": _decibels(float(np.mean(moving))), "worst clip": _decibels(max(moving)),
        "still": _decibels(still),
    }  # fmt: skip


def _decibels(error: float) -> float:
    return round(-10 * math.log10(max(error, 1e-12)), 1)


def sd_turbo():
    """ComfyUI's UNet in SD-Turbo's layout, random weights; by itself, as it is of 3.5 GB."""
    from calm_cost import TURBO
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(**TURBO, dtype=torch.float32).train(False)
    generator = torch.Generator().manual_seed(0)
    for weight in unet.parameters():
        weight.requires_grad_(False).normal_(0, 0.02, generator=generator)
    return unet


def share(report: Report, device: Device, repeats: int) -> None:
    """A call of SD-Turbo's layout, random weights: time against FLOPs where rows reuse."""
    from livediffusion.compiled.reused import Reused
    from livediffusion.engine.blocks.plan import BlockPlan
    from livediffusion.host.models import walk
    from livediffusion.host.models.coherence import depth_of
    from livediffusion.host.models.reused import feature
    from torch.utils.flop_counter import FlopCounterMode

    unet, rows = sd_turbo(), 4
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, SIZE // 8, SIZE // 8, generator=generator)
    call = {
        "x": x, "timesteps": torch.linspace(639.0, 99.0, rows),
        "context": torch.randn(rows, 77, 1024, generator=generator),
    }  # fmt: skip
    ways: dict[str, Callable[[], object]] = {"whole": lambda: unet(**call)}
    for name in ("outermost block", "finest level"):
        depth = depth_of(unet, name)
        features = torch.randn(rows, *feature(unet, depth, x.shape[2:]))
        for count in (0, 1, 2):
            plan = BlockPlan(Reused.of(depth, torch.arange(count), features))
            ways[f"{name}, {count} of {rows} rows whole"] = (
                lambda plan=plan: walk.walk(unet, plan, **call)
            )  # fmt: skip
    work = {}
    for name, way in ways.items():
        with FlopCounterMode(display=False) as counted:
            way()
        work[name] = counted.get_total_flops()
    times = measure.in_turns(ways, device, repeats, 2)
    table = []
    for name, own in times.items():
        part, flops = own.median / times["whole"].median, work[name] / work["whole"]
        table.append(
            {"call": name, **own.row(), "of the time": part, "of the FLOPs": flops,
             "time / FLOPs": part / flops}
        )  # fmt: skip
    report.add("rows that reuse, time against work", table, f"SD-Turbo's layout, {SIZE} x {SIZE}")
    worst = max(abs(row["time / FLOPs"] - 1) for row in table)
    report.bars.append(Bar("time against FLOPs, off by at most", worst, NEAR))
