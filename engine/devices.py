"""What not every device has, or calls by one name."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .upload import uploaded

# Apple's GPUs: grid_sample goes on beyond the border from torch 2.13 on, and has no bicubic means;
# adaptive pools want sides that divide
_LACKING = {"mps"}
_CUBIC = -0.75  # torch's own


def lies_on(device: torch.device | str) -> torch.device:
    """What a tensor says that was made there: "mps:0" of one on "mps"."""
    return torch.empty(0, device=device).device


def sampled(pictures: Tensor, grid: Tensor, mode: str = "bilinear") -> Tensor:
    """F.grid_sample that goes on beyond the border, corners not aligned.

    Args:
        pictures: [B, C, h, w].
        grid: [B, H, W, 2].
        mode: `bilinear` or `bicubic`.
    """
    if pictures.device.type not in _LACKING:
        return F.grid_sample(pictures, grid, mode, "border", align_corners=False)
    h, w = pictures.shape[-2:]
    x, y = grid.unbind(-1)
    if mode == "bicubic":
        return _bicubic(pictures, ((x + 1) * w - 1) / 2, ((y + 1) * h - 1) / 2)
    inside = [x.clamp(1 / w - 1, 1 - 1 / w), y.clamp(1 / h - 1, 1 - 1 / h)]
    return F.grid_sample(pictures, torch.stack(inside, -1), mode, "zeros", align_corners=False)


def pooled(pictures: Tensor, size: tuple[int, int] | list[int]) -> Tensor:
    """F.adaptive_avg_pool2d, which is F.interpolate by area: [..., h, w] in another size."""
    sides = pictures.shape[-2:]
    fits = all(side % new == 0 for side, new in zip(sides, size, strict=True))
    if fits or pictures.device.type not in _LACKING:
        return F.adaptive_avg_pool2d(pictures, size)
    down, across = (
        uploaded(_means(side, new), pictures.device).to(pictures.dtype)
        for side, new in zip(sides, size, strict=True)
    )
    return down @ pictures @ across.T


@functools.lru_cache(maxsize=32)
def _means(side: int, new: int) -> Tensor:
    """The means of an adaptive pool along one side, [new, side]."""
    at, to = torch.arange(side), torch.arange(new)[:, None]
    first, last = to * side // new, ((to + 1) * side + new - 1) // new
    return ((at >= first) & (at < last)) / (last - first)


def _bicubic(pictures: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Pictures at places in pixels, [B, H, W] each."""
    h, w = pictures.shape[-2:]
    flat, shape = pictures.flatten(2), (*pictures.shape[:2], *x.shape[1:])
    (columns, across), (rows, down) = _taps(x, w), _taps(y, h)
    out = torch.zeros(shape, dtype=pictures.dtype, device=pictures.device)
    for row, weight in zip(rows, down, strict=True):
        for column, share in zip(columns, across, strict=True):
            index = (row * w + column).flatten(1)[:, None].expand(-1, shape[1], -1)
            out += flat.gather(2, index).view(shape) * (weight * share)[:, None]
    return out


def _taps(at: Tensor, side: int) -> tuple[list[Tensor], list[Tensor]]:
    """The four pixels around places along one side, and their weights."""
    first = at.floor()
    t = at - first
    pixels = [(first + i).clamp(0, side - 1).long() for i in (-1, 0, 1, 2)]
    return pixels, [_far(t + 1), _near(t), _near(1 - t), _far(2 - t)]


def _near(t: Tensor) -> Tensor:
    return ((_CUBIC + 2) * t - (_CUBIC + 3)) * t * t + 1


def _far(t: Tensor) -> Tensor:
    return ((_CUBIC * t - 5 * _CUBIC) * t + 8 * _CUBIC) * t - 4 * _CUBIC
