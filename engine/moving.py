"""Noise that goes with the pictures of a stream, from one frame to the next."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .flow import Motion, match, view
from .noise import SlotNoise
from .upload import uploaded
from .warp import Field, begun, grown, moved

_AT_ONCE = 16  # frames that are matched together


@dataclass(frozen=True)
class Pictures:
    """Frames as a camera gives them.

    Attributes:
        frames: [B, H, W, C], 0..1, oldest first.
        flow: [B, h, w, 2 or more], in pixels of its own grid: where each pixel of a frame was in
            the frame before, less where it is, across and down; None has it found.
    """

    frames: Tensor
    flow: Tensor | None = None


@dataclass(frozen=True)
class Scene:
    """What one frame leaves for the next."""

    view: Tensor  # [1, 1, h, w] (engine.flow.view)
    field: Field


def follow(before: Scene | None, pictures: Pictures, noise: SlotNoise, slots: int) -> list[Scene]:
    """The scene of every frame. Nothing is remembered here: ask again, and it is the same.

    Args:
        before: of the frame before them; None begins with the noise as it is, and so does one of
            another size, device or seed.
        noise: of a scene's first frame; (C, H, W) and device are its.
        slots: how many of the first ones are wanted.
    """
    views = [_sent(view(each[None]), noise.device) for each in pictures.frames]
    if before is not None and not _goes_on(before, views[0], noise):
        before = None
    # a frame with a bad value is taken for the one before it
    last = before and before.view
    for i, frame in enumerate(pictures.frames):
        if last is not None:
            sound = _sent(frame.sum().isfinite(), noise.device)
            views[i] = torch.where(sound, views[i], last)
        last = views[i]
    olds = [before.view if before else views[0], *views[:-1]]
    motions: list[Motion] = []
    for i in range(0, len(views), _AT_ONCE):
        part = slice(i, i + _AT_ONCE)
        if pictures.flow is None:
            found = match(torch.cat(views[part]), torch.cat(olds[part]))
        else:
            found = _given(_sent(pictures.flow[part], noise.device))
        motions += map(Motion, found.flow.split(1), found.confidence.split(1))
    scenes: list[Scene] = []
    for i, (seen, motion) in enumerate(zip(views, motions, strict=True)):
        if i == 0 and before is None:
            field = begun(noise, slots, _ratio(pictures.frames, noise))
        else:
            last_field = scenes[-1].field if scenes else before.field
            field = moved(grown(last_field, noise, slots), motion)
        scenes.append(Scene(seen, field))
    return scenes


def _goes_on(before: Scene, seen: Tensor, noise: SlotNoise) -> bool:
    field = before.field
    return (
        before.view.shape == seen.shape
        and field.seed == noise.seed
        and field.pixels.shape[1:] == noise.shape
        and field.pixels.device == noise.device
    )


def _ratio(frames: Tensor, noise: SlotNoise) -> int:
    """A picture's pixels along one of the latent's; 0 where that is no whole number."""
    (height, width), (h, w) = frames.shape[1:3], noise.shape[-2:]
    ratio = height // h
    return ratio if (ratio * h, ratio * w) == (height, width) else 0


def _given(flow: Tensor) -> Motion:
    """[B, h, w, 2 or more] as a motion; nothing is known where it is not finite."""
    flow = flow[..., :2].float().movedim(-1, 1)
    known = flow.isfinite().all(1, keepdim=True)
    return Motion(torch.where(known, flow, 0.0), known.float())


def _sent(values: Tensor, device: torch.device) -> Tensor:
    if values.device == device:
        return values
    return uploaded(values, device) if values.device.type == "cpu" else values.to(device)
