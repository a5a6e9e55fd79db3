"""Noise that goes with the pictures of a stream, from one frame to the next."""

from collections.abc import Callable, Iterator
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


def follow(
    before: Scene | None, pictures: Pictures, noise: SlotNoise, slots: int
) -> Iterator[Scene]:
    """The scene of every frame, made when it is asked for: of a long clip only the newest is held.

    Nothing is remembered here: ask again, and it is the same.

    Args:
        before: of the frame before them; None begins with the noise as it is, and so does one of
            another size, device or seed.
        noise: of a scene's first frame; (C, H, W) and device are its.
        slots: how many of the first ones are wanted.
    """
    for i in range(0, len(pictures.frames), _AT_ONCE):
        part = slice(i, i + _AT_ONCE)
        frames = pictures.frames[part]
        views = [_sent(view(each[None]), noise.device) for each in frames]
        if i == 0 and before is not None and not _goes_on(before, views[0], noise):
            before = None
        # a frame with a bad value is taken for the one before it
        last = before and before.view
        for j, frame in enumerate(frames):
            if last is not None:
                sound = _sent(frame.sum().isfinite(), noise.device)
                views[j] = torch.where(sound, views[j], last)
            last = views[j]
        olds = [before.view if before else views[0], *views[:-1]]
        if pictures.flow is None:
            found = match(torch.cat(views), torch.cat(olds))
        else:
            found = _given(_sent(pictures.flow[part], noise.device))
        motions = map(Motion, found.flow.split(1), found.confidence.split(1))
        for seen, motion in zip(views, motions, strict=True):
            if before is None:
                field = begun(noise, slots, _ratio(pictures.frames, noise))
            else:
                field = moved(grown(before.field, noise, slots), motion)
            before = Scene(seen, field)
            yield before


class Scenes:
    """The scenes of a run's frames. Of frames before those asked for last none is held.

    Args:
        make: begins with the first one's.
        count: frames.
    """

    def __init__(self, make: Callable[[], Iterator[Scene]], count: int):
        self._make, self._count = make, count
        self._first = 0  # the frame of the first of those that are held
        self._held: list[Scene] = []
        self._coming = make()

    def at(self, part: slice) -> list[Scene]:
        """Of some frames; of earlier ones than before they are made anew, the same."""
        start, stop, _ = part.indices(self._count)
        if start >= stop:
            return []
        if start < self._first:
            self._first, self._held, self._coming = 0, [], self._make()
        while self._first + len(self._held) < stop or self._first < start:
            if self._first < start and self._held:
                del self._held[0]
                self._first += 1
            else:
                self._held.append(next(self._coming))
        return self._held[: stop - start]

    def entry(self) -> Tensor:
        """What all frames enter with, [B, C, H, W], in a pass of its own if they are several."""
        made = self.at(slice(None)) if self._count == 1 else self._make()
        return torch.cat([scene.field.pixels[:1] for scene in made])


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
