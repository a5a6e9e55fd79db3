"""What a frame needs to be sampled by itself, as ComfyUI would have sampled it.

Whoever looks at the step, counts calls or remembers the call before (EasyCache, momentum, a guider
that sums over the batch) is right only if a frame has a sample() of its own. So it gets one, with
all that ComfyUI does at its beginning and end.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import comfy.sample
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..models.looks import PLACE, Look
from .check import checked_sigmas
from .rows import Batch
from .visit import Visit

_KEY = "livediffusion.place"


def noise_of(latents: Tensor, seed: int, add_noise: bool) -> Tensor:
    """ComfyUI's noise, which also seeds whatever draws random numbers while sampling.

    Of one latent it is the noise of slot 0.
    """
    latents = latents.float()
    if not add_noise:
        return torch.zeros_like(latents)
    return comfy.sample.prepare_noise(latents, seed).to(latents)


def levels_of(visit: Visit, known: Sequence[float]) -> tuple[float, ...]:
    """The noise levels that a frame's sampler was called with: `known`, or another node's.

    Raises:
        ValueError: a stream cannot go by them.
    """
    asked = visit.received.sigmas
    if torch.equal(asked.cpu(), torch.tensor(known, dtype=asked.dtype)):
        return tuple(known)
    return checked_sigmas(asked)


def heard_by_nobody(step: int, x0: Tensor, x: Tensor, steps: int) -> None:
    """A callback, since ComfyUI's nodes always pass one and what wraps it counts on it."""


def mask_of(mask: Tensor | None, index: int, latents: Tensor) -> Tensor | None:
    """ComfyUI's noise_mask of one frame, as comfy.utils.reshape_mask spreads it over [B, C, H, W];
    of latents with a time axis, whose masks have one, only a batch of masks is taken apart."""
    if mask is None or mask.ndim < 3:
        return mask
    if latents.ndim == 4:
        mask = mask.reshape(-1, 1, *mask.shape[-2:])
    elif mask.ndim < 5:
        return mask
    return mask[index % mask.shape[0]][None]


def tell_place(visit: Visit, batch: Batch, index: int, count: int) -> None:
    """Give a frame what is its own of what several came with.

    Args:
        visit: of the frame's own sample().
        batch: the conditioning of all of them.
        index: its place.
        count: frames.
    """
    visit.batch = batch.only(index, visit.batch)
    if not _may_read(visit):
        return
    place = {"sub_idxs": [index], "full_length": count, "context_length": 1}
    # for patches that have something for every picture of a batch
    visit.options.setdefault("transformer_options", {}).setdefault(PLACE, place)
    add_wrapper_with_key(
        WrappersMP.CALC_COND_BATCH, _KEY, _Teller(place), visit.options, is_model_options=True
    )


def _may_read(visit: Visit) -> bool:
    """False where a compiled model is all there is.

    ComfyUI compiles without guards on transformer_options: a model that was compiled with a key
    fails where another sampler leaves it out.
    """
    transformer = visit.options.get("transformer_options", {})
    around = transformer.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    patched = any(transformer.get(name) for name in ("patches", "patches_replace"))
    return "torch.compile" not in around or patched or visit.batch.look > Look.ROWS


@dataclasses.dataclass
class _Teller:
    """Tells a frame's place again where somebody has told that it is the whole batch."""

    place: dict[str, Any]

    def __call__(self, executor, model, conds, x, timestep, options):
        transformer = options.get("transformer_options", {})
        told = transformer.get(PLACE)
        if told is None or told.get("sub_idxs") is None:
            options = {**options, "transformer_options": {**transformer, PLACE: self.place}}
        return executor(model, conds, x, timestep, options)
