"""Live Patchwork: what a moving share of the picture costs, what a head that moves costs in a
stream, how far pictures are off, and whether a still scene drifts.

The part `patchwork` of `run.py bench`, with the embedded model: its UNet by itself, and streams of
the live template's settings at n = 4. docs/patchwork.md says what came out. Times are CPU time, in
turns, so that a busy machine matters little.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import calm_clips
import networks
import torch
from calm_clips import NOISE, WARM, Clip, Layer, Plan
from calm_ways import OFF, Kit, Run, Way, attached
from measure import Bar, Report
from reuse import clocked
from torch import Tensor

SHARES = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
SIZES = (256, 512)
THRESHOLDS = (0.05, 0.1)
LOOKS = ("ink", "neon", "watercolor", "comic", "oil", "photo")
LONG = 500  # frames of a scene that stands still
ROWS = 4
TIMED = 3  # looks whose streams are timed
HEAD = (0.0, 10.0, 52.0, 68.0)  # a sixth of the picture


def shaken(first: int) -> calm_clips.Path:
    """A shaking hand's way from frame `first` on."""
    hand = calm_clips.hand(4.0)
    return lambda t: hand(t + first)


def near(a: Tensor, b: Tensor) -> float:
    """PSNR in dB of pictures in 0..1, their squared errors put together."""
    return -10 * math.log10(max(1e-12, float((a - b).square().mean())))


def heads(count: int) -> list[Clip]:
    """A still ground, and a cut-out of the size of a head that a shaking hand moves before it."""
    photos = calm_clips.HALVES["judged"]
    out = []
    for i, look in enumerate(LOOKS[:count]):
        layers = Layer(photos[i], calm_clips.still), Layer(photos[12 + i % 3], shaken(7 * i), HEAD)
        out.append(Clip(Plan(f"head, {look}", look, layers), 5))
    return out


def times(size: int, rounds: int) -> dict[str, Any]:
    """Of a call of the UNet with ROWS rows, as shares of the whole call's time."""
    from livediffusion.engine.patchwork.mask import SIDE, Patchwork
    from livediffusion.engine.patchwork.patching import Patching
    from livediffusion.host.models import patchwork

    kit = networks.embedded(size)
    unet = kit.model.model.diffusion_model
    asked = kit.call(ROWS, torch.Generator().manual_seed(0))
    x, timesteps, context = asked["x"], asked["timesteps"], asked["context"]
    y = kit.pooled.expand(ROWS, -1)
    patching = Patching(x.device)
    patching.settle(Patchwork(0.0, 0, 1.0), size)

    def call(now: Tensor) -> None:
        patching.call(patchwork.network(unet), range(ROWS), now, timesteps, context, y)

    def anew() -> None:
        patching.forget()
        call(x)

    across = x.shape[-1] // SIDE
    ways: dict[str, Callable[[], Any]] = {
        "all of it": lambda: unet(x, timesteps, context=context, y=y), "all of it, kept": anew,
    }  # fmt: skip
    # the middle of a tile, so that the blur reaches no other
    middle = torch.zeros(SIDE, SIDE)
    middle[1:-1, 1:-1] = 1
    for share in SHARES:
        tiles = torch.zeros(across**2)
        tiles[: round(share * across**2)] = 1
        moving = torch.kron(tiles.view(across, across), middle)
        ways[f"{share:.0%}"] = lambda moving=moving: call(x + moving * (1 + time.monotonic() % 7))
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            # what moved in the way before comes back here
            way()
            began = time.process_time()
            way()
            took[name].append(time.process_time() - began)
    medians = {name: statistics.median(of) for name, of in took.items()}
    row: dict[str, Any] = {"size": size, "all of it, ms": 1000 * medians.pop("all of it")}
    row |= {name: 1000 * one / row["all of it, ms"] for name, one in medians.items()}
    return row | {"kept, MB": patching.size / 2**20}


def frames(kit: Kit, clip: Clip, pictures: Tensor, threshold: float | None) -> tuple[Tensor, float]:
    """What leaves a stream, [T', 3, H, W], and the share of the picture that was computed of the
    frames that count; None computes all."""
    from livediffusion.engine.patchwork.mask import Patchwork

    way = OFF if threshold is None else Way("", attached(patchwork=Patchwork(threshold)))
    run, out, shares = Run(kit, clip, way), [], [1.0]
    for t, picture in enumerate(pictures):
        out.append(run.frame(picture.movedim(0, -1)[None]))
        if threshold is not None:
            share = run.stream.coherent.neighbours.patching.looked()
            # every 32 ticks the stream has asked before, for its node
            shares += [share] if t >= WARM and (t + 1) % 32 else []
    left = torch.cat([one for one in out if one is not None]).movedim(-1, 1)
    return left, statistics.mean(shares[1:] or shares)


@contextlib.contextmanager
def trying():
    """CPU seconds of each call in the place of a network's, finding what has changed included,
    while it lasts.

    Raises:
        RuntimeError: where a call was made as it is, which would not be counted.
    """
    from livediffusion.host.models import patchwork

    spent, own = [], patchwork.tried

    def tried(neighbours: Any, *args: Any) -> Tensor:
        began = time.process_time()
        out = own(neighbours, *args)
        spent.append(time.process_time() - began)
        if out is None:
            raise RuntimeError(neighbours.patching.why)
        return out

    patchwork.tried = tried
    try:
        yield spent
    finally:
        patchwork.tried = own


def streamed(kit: Kit, clip: Clip, pictures: Tensor) -> dict[str, Any]:
    """Two streams of the same pictures in turns, one with Live Patchwork as it is put in: what all
    calls of the network take in a tick, rows that run whole beside tiles and rows whose turn it is
    to be renewed among them.

    Args:
        pictures: [T, 3, H, W]; those from WARM on count, fewer than 32 in all, as a stream then
            asks itself what was computed.
    """
    from livediffusion.engine.patchwork.mask import Patchwork

    ours, whole = Run(kit, clip, Way("", attached(patchwork=Patchwork()))), Run(kit, clip, OFF)
    unet = kit.model.get_model_object("diffusion_model")
    shown: tuple[list[Tensor], list[Tensor]] = [], []
    ratios, ms = [], []
    for t, picture in enumerate(pictures):
        if t == WARM:
            ours.stream.coherent.neighbours.patching.looked()
        took = [0.0, 0.0]
        for side in (0, 1) if t % 2 else (1, 0):
            run = (ours, whole)[side]
            with trying() if run is ours else clocked(unet, time.process_time) as spent:
                out = run.frame(picture.movedim(0, -1)[None])
            took[side] = sum(spent)
            if t >= WARM:
                shown[side].append(out)
        if t >= WARM:
            ratios.append(took[0] / took[1])
            ms.append(1000 * took[1])
    return {
        "look": clip.look, "UNet / whole": statistics.median(ratios), "longest": max(ratios),
        "whole, ms": statistics.median(ms), "PSNR": near(*(torch.cat(side) for side in shown)),
        "computed": ours.stream.coherent.neighbours.patching.share,
    }  # fmt: skip


def drift(kit: Kit, look: str, count: int) -> dict[str, Any]:
    """A scene that stands still, with a camera's noise, middle 128 x 128 pixels: how far the first
    and the last frames are off."""
    photo = calm_clips.HALVES["judged"][0]
    clip = Clip(Plan("still", look, (Layer(photo, calm_clips.still),), False), 5)
    clean, g = clip.clean[:1, :, 64:192, 64:192], torch.Generator().manual_seed(3)
    noisy = torch.cat([clean + NOISE * torch.randn(clean.shape, generator=g) for _ in range(count)])
    noisy = (noisy.clamp(0, 1) * 255).round() / 255
    ours, share = frames(kit, clip, noisy, THRESHOLDS[-1])
    ends = {}
    for name, first in (("first", 0), ("last", count - 24)):
        full, _ = frames(kit, clip, noisy[first : first + 24], None)
        ends[f"{name}, dB"] = near(ours[first + WARM : first + len(full)], full[WARM:])
    return {"look": look, **ends, "computed": share}


def part(report: Report, quick: bool) -> None:
    """The whole part.

    Args:
        quick: two clips, one of them timed, and a still scene of 100 frames.
    """
    torch.set_num_threads(1)
    kit = Kit(steps=4)
    rows = [times(size, 3 if quick else 7) for size in SIZES]
    report.add("patchwork: CPU time by the share that moves", rows, "parts of all of it, eager")
    clips = heads(2 if quick else len(LOOKS))
    in_streams = [streamed(kit, clip, clip.noisy) for clip in clips[: 1 if quick else TIMED]]
    report.add("patchwork: a head before a still ground, in a stream", in_streams, "CPU time")
    made = {clip.name: frames(kit, clip, clip.noisy, None)[0][WARM:] for clip in clips}
    pictures, means = [], {}
    for threshold in THRESHOLDS:
        own = [frames(kit, clip, clip.noisy, threshold) for clip in clips]
        db = [near(out[WARM:], made[c.name]) for (out, _), c in zip(own, clips, strict=True)]
        means[threshold] = statistics.mean(db), statistics.mean(share for _, share in own)
        row = dict(zip([c.look for c in clips], db, strict=True))
        pictures.append({"threshold": threshold, "mean, dB": means[threshold][0], **row,
                         "computed": means[threshold][1]})  # fmt: skip
    report.add("patchwork: a head before a still ground", pictures, "PSNR against all of it")
    still = [drift(kit, look, 100 if quick else LONG) for look in LOOKS[: 1 if quick else 3]]
    count = 100 if quick else LONG
    report.add("patchwork: a still scene with 2 % of noise", still, f"{count} frames")
    mean = means[THRESHOLDS[-1]][0]
    spent = statistics.mean(row["UNet / whole"] for row in in_streams)
    lost = max(row["first, dB"] - row["last, dB"] for row in still)
    report.bars += [
        Bar("patchwork: PSNR of a head before a still ground, dB", mean, least=34, counted=True),
        Bar("patchwork: the UNet's time of it in a stream, x all of it", spent, 0.5),
        Bar("patchwork: dB lost in a still scene", lost, 0.5, counted=True),
    ]  # fmt: skip
