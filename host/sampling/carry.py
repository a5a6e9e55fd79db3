"""What a stream needs to carry predictions along the motion: the motion, and where it is kept."""

import functools
from typing import Any

import torch
from torch import Tensor

from ...engine import flow
from ...engine.coherence.carry import Carried, Carry
from ...engine.upload import uploaded
from ...engine.work import Work
from .visit import Visit

# pixels along the longer side of what motion is seen by: with 128 it is found to 0.18 pixels of 256
# instead of 0.22 and takes 1.4 times as long
_LONGEST = 96
_LIGHT = 0.008  # share by which light changes from a frame to the next, where a third is carried


class Carrying:
    """Of one stream.

    Attributes:
        carried: what its slots remember; None while nothing is carried.
    """

    def __init__(self):
        self.carried: Carried | None = None
        self._carry: Carry | None = None
        self._format: Any = None
        self._view: Tensor | None = None  # of the frame that was accepted last, [1, 1, h, w]
        self._next: Tensor | None = None  # of the one under way

    def settle(self, visit: Visit, carry: Carry | None) -> None:
        """What holds for the ticks of a run."""
        self._carry, self._format = carry, visit.model.latent_format
        if carry is None:
            self.carried = self._view = None

    def begin(self, work: Work) -> None:
        """Before a tick, which knows of it from now on."""
        if self._carry is None:
            return
        own, patch = work.buffers, pixels(self._format)
        made_of = (
            self._carry, own.x.shape[0] // own.f, own.f, tuple(own.shape), own.device, patch
        )  # fmt: skip
        if self.carried is None or self.carried.made_of != made_of:
            self.carried, self._view = Carried(*made_of), None
        at = motion = self._next = None
        if work.source is not None:
            both = zip(work.plan.places, work.places, strict=True)
            at, entered = next((at, place) for at, place in both if not place.k)
            views = view(work.source, self._format)
            self._next = views[-1:]
            # outside of a mask a frame stays its source
            masked = any(p.mask is not None for p in entered.payloads)
            if not masked:
                # the first frame of all has none before it, and nothing is carried to it
                before = views[:1] if self._view is None else self._view
                motion = seen_motion(views, torch.cat([before, views[:-1]]))
        self.carried.begin(work.plan, work.places, at, motion)
        work.carried = self.carried

    def done(self, work: Work) -> None:
        """The tick is done."""
        if work.carried is not None:
            work.carried.done(work.plan, work.places)
            if self._next is not None:
                self._view = self._next


def seen_motion(new: Tensor, old: Tensor) -> flow.Motion:
    """The motion between two views, of which less is sure the more the light has changed: what is
    carried would come out as bright as before."""
    motion = flow.match(new, old)
    change = flow.exposure(new, old, motion) - 1
    sure = torch.exp(-(change / _LIGHT).square_())
    return flow.Motion(motion.flow, motion.confidence * sure)


def pixels(latent_format: Any) -> int:
    """Pixels on each side of a latent's position, where its channels are the pixels of a patch.

    Only our own latent format says so; of a VAE's nothing is known, and 1 is right.
    """
    return getattr(latent_format, "patch", 1)


def view(latents: Tensor, latent_format: Any) -> Tensor:
    """What motion is seen by (engine.flow.view) of latents in the model's scale, [B, C, H, W]."""
    # a latent has no noise of a camera that half its size would take away
    return flow.view((colours(latents, latent_format) + 1) / 2, _LONGEST, finest=1.0)


def colours(latents: Tensor, latent_format: Any) -> Tensor:
    """What latents in the model's scale, [B, C, H, W], look like: [B, h, w, 3 or 1], -1..1.

    Colours are those of ComfyUI's previews; of a format that has none the channels' mean is taken.
    """
    patch = pixels(latent_format)
    if patch > 1:
        # half of a patch's side is enough (engine.flow.view), and much less to lay out
        half = latents.unflatten(1, (3, 2, patch // 2, 2, patch // 2)).mean((3, 5)).flatten(1, 3)
        out = torch.nn.functional.pixel_shuffle(half, 2) / latent_format.scale_factor
        return out.movedim(1, -1)
    factors = latent_format.latent_rgb_factors
    if factors is None or len(factors) != latents.shape[1]:
        grey = latents.mean(1, keepdim=True)
        grey = grey / grey.flatten(1).std(1).clamp(min=1e-6).view(-1, 1, 1, 1) / 2
        return grey.movedim(1, -1)
    weights = _weights(tuple(map(tuple, factors)), latents.device)
    return latents.float().movedim(1, -1) @ weights


@functools.lru_cache(maxsize=16)
def _weights(factors: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    """On a device, sent there once."""
    return uploaded(torch.tensor(factors, dtype=torch.float32), device)
