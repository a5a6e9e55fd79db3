"""What a frame needs to be sampled by itself, as ComfyUI would have sampled it.

Whoever looks at the step, counts calls or remembers the call before (EasyCache, momentum, a guider
that sums over the batch) is right only if a frame has a sample() of its own. So it gets one, with
all that ComfyUI does at its beginning and end.
"""

import comfy.sample
import torch
from torch import Tensor

from ..models.looks import PLACE
from .rows import Batch
from .visit import Visit


def noise_of(latents: Tensor, seed: int, add_noise: bool) -> Tensor:
    """ComfyUI's noise, which also seeds whatever draws random numbers while sampling."""
    if not add_noise:
        return torch.zeros_like(latents)
    return comfy.sample.prepare_noise(latents, seed).to(latents)


def mask_of(mask: Tensor | None, index: int) -> Tensor | None:
    """ComfyUI's noise_mask of one frame."""
    if mask is None or mask.ndim < 3 or mask.shape[0] == 1:
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
    transformer = visit.options.setdefault("transformer_options", {})
    # for patches that have something for every picture of a batch
    transformer.setdefault(PLACE, {"sub_idxs": [index], "full_length": count})
