"""Where a frame differs from the one that is kept."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

SIDE = 4  # positions of a latent along a tile
_BLUR = 3  # positions over which a difference is averaged: a camera's noise loses two thirds


@dataclass(frozen=True)
class Patchwork:
    """Only changed tiles are computed.

    Attributes:
        threshold: RMS over channels by which a position of the network's input, blurred, has to
            differ from what is kept; that input has about the variance 1. 0: any difference.
        grow: positions by which what has changed is grown, since convolutions and attention carry
            changes on.
        most: share of the tiles above which a row is computed whole, 0 to 1.
        astray: a row runs whole once how far it is from its last whole pass, added up over the
            calls since, comes to this: statistics of another picture make other colours. How far:
            the share of its tiles that differ, and 4 times the square of the mean square
            difference.
    """

    threshold: float = 0.1
    grow: int = 1
    most: float = 0.5
    astray: float = 4.0


def changed(x: Tensor, kept: Tensor, settings: Patchwork) -> Tensor:
    """Which tiles have changed, bool [R, H / SIDE, W / SIDE].

    Each position is compared with the picture that its own kept features are of, so what changes
    too slowly to be seen from frame to frame is still seen as soon as it has come far enough.

    Args:
        x, kept: [R, C, H, W]; H and W are multiples of SIDE.
    """
    apart = (x - kept).float()
    apart = F.avg_pool2d(apart, _BLUR, 1, _BLUR // 2, count_include_pad=False)
    apart = apart.square().mean(1, keepdim=True).sqrt()
    if settings.grow:
        apart = F.max_pool2d(apart, 2 * settings.grow + 1, 1, settings.grow)
    return F.max_pool2d(apart, SIDE)[:, 0] > settings.threshold


def spread(mask: Tensor) -> Tensor:
    """[R, h, w] of tiles as [R, 1, h * SIDE, w * SIDE] of positions."""
    return mask.repeat_interleave(SIDE, 1).repeat_interleave(SIDE, 2)[:, None]
