"""Where each pixel of a frame was in the frame before: a small pyramidal matcher.

Coarse to fine on grey pictures of at most 128 pixels a side. The coarsest level compares blocks
with all shifts around them (sums of absolute differences); every level then refines overlapping
patches by Gauss-Newton steps whose matrix belongs to the new frame and is made once (inverse
search: Baker and Matthews, IJCV 2004; on patches: Kroeger et al., ECCV 2016). The picture's gain
and the patches' means are taken out, so that an exposure that changes is no motion. Both directions
are matched at once: where they disagree something was hidden (Sundaram et al., ECCV 2010).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .devices import pooled, sampled

LONGEST = 128  # pixels along the longer side of what is compared
_CELL = 4  # pixels of each level between patches, whose sides are three times as long
_STEPS = (3, 3, 2)  # of refinement at each level, coarsest first
_UNIT = _CELL * 2 ** (len(_STEPS) - 1)  # sides are multiples of it: cells fit at every level
_REACH = 4  # pixels of the coarsest level that the search looks around
_FAR = 0.004  # grey values that a shift by a pixel costs in the search: none unless it is clear
_FLAT = 2e-5  # gradient energy per pixel below which a patch keeps what the coarser level found
_BETTER = 0.8  # a motion leaves less than this share of what standing still leaves, or it is none
_APART = (0.01, 0.25)  # of the squared lengths, and squared pixels, that there and back may differ
_UNLIKE = (10.0, 5e-4, 0.002)  # times the usual variance, its most, and what is allowed beside it


class Motion(NamedTuple):
    """Between two frames, on one grid."""

    flow: Tensor  # [B, 2, h, w], pixels: new(x, y) was old(x + flow[0], y + flow[1])
    confidence: Tensor  # [B, 1, h, w], 0..1: 0 where it was hidden, out of sight or not found


def view(frames: Tensor, longest: int = LONGEST, finest: float = 0.5) -> Tensor:
    """What `match` compares: grey, half the size or less.

    Args:
        frames: [B, H, W, C], 0..1; of 3 or more channels the first are RGB, else the first is grey.
        longest: pixels along the longer side, at most.
        finest: of the frames' own sides, at most; the noise of a camera asks for half of them.

    Returns:
        [B, 1, h, w], sides multiples of 16 and at least 32. What is not finite is black.
    """
    frames = frames.float()
    if frames.shape[-1] >= 3:
        red, green, blue = frames[..., :3].unbind(-1)
        grey = 0.299 * red + 0.587 * green + 0.114 * blue
    else:
        grey = frames[..., 0]
    grey = grey.nan_to_num(0.0, 0.0, 0.0).clamp_(0, 1)
    h, w = grey.shape[1:]
    scale = min(finest, longest / max(h, w))
    size = [max(2 * _UNIT, round(side * scale / _UNIT) * _UNIT) for side in (h, w)]
    return pooled(grey[:, None], size)


def match(new: Tensor, old: Tensor) -> Motion:
    """The motion between two pictures.

    Args:
        new, old: [B, 1, h, w] from `view`.

    Returns:
        On the grid of the pictures, in their pixels. Where standing still explains the new picture
        nearly as well, the flow is exactly 0.

    Raises:
        ValueError: they differ in size, or it is none that `view` gives.
    """
    if new.shape != old.shape or new.shape[1] != 1 or any(s % _UNIT for s in new.shape[2:]):
        raise ValueError(f"{tuple(new.shape)} and {tuple(old.shape)}: not two views of one size")
    batch = new.shape[0]
    # both directions side by side
    pyramid = [_smooth(torch.stack([torch.cat([new, old]), torch.cat([old, new])]))]
    for _ in _STEPS[1:]:
        pyramid.append(_smooth(F.avg_pool2d(pyramid[-1].flatten(0, 1), 2).unflatten(0, (2, -1))))
    flow = _search(*pyramid[-1])
    gain: Tensor | float = 1.0
    for i, ((ours, theirs), steps) in enumerate(zip(reversed(pyramid), _STEPS, strict=True)):
        if i:
            flow = 2 * F.interpolate(flow, scale_factor=2, mode="bilinear")
        flow, left = _refine(ours, theirs * gain, flow, steps)
        if not i:
            gain = _gain(ours, _moved(theirs, flow))
    ours, theirs = pyramid[0][0], pyramid[0][1] * gain
    flow = _still(ours, theirs, flow, left)
    flow = F.interpolate(flow, scale_factor=_CELL, mode="bilinear")
    there, back = flow[:batch], flow[batch:]
    alike = _alike(ours[:batch], theirs[:batch], there, left[:batch])
    return Motion(there, _agree(there, back) * alike)


def exposure(new: Tensor, old: Tensor, motion: Motion) -> Tensor:
    """How many times as bright most of each picture is as the one before it, [B, 1, 1, 1], 0.5..2.

    Args:
        new, old, motion: see `match`.
    """
    moved = warped(old, motion.flow)
    return _gain(F.avg_pool2d(new, _CELL), F.avg_pool2d(moved, _CELL))


def resized(motion: Motion, height: int, width: int) -> Motion:
    """The same motion on a grid of another size, in its pixels; on a smaller one the flow is the
    mean of what is known, by confidence."""
    flow, confidence = motion
    h, w = flow.shape[-2:]
    if (h, w) == (height, width):
        return motion
    size = height, width
    if height < h or width < w:
        known = confidence + 1e-3
        flow = pooled(flow * known, size) / pooled(known, size)
        confidence = pooled(confidence, size)
    else:
        flow = F.interpolate(flow, size, mode="bilinear")
        confidence = F.interpolate(confidence, size, mode="bilinear")
    return Motion(torch.stack([flow[:, 0] * (width / w), flow[:, 1] * (height / h)], 1), confidence)


def warped(pictures: Tensor, flow: Tensor, mode: str = "bilinear") -> Tensor:
    """The old pictures as they look after the motion: out(x) = pictures(x + flow(x)).

    Args:
        pictures: [B, C, h, w].
        flow: [B, 2, h, w], pixels of this grid.
        mode: see sampled. Beyond the border it goes on.
    """
    return sampled(pictures, grid(flow), mode)


def grid(flow: Tensor) -> Tensor:
    """A flow [B, 2, h, w] as F.grid_sample takes it, [B, h, w, 2]."""
    h, w = flow.shape[-2:]
    x, y = (flow + places(h, w, flow.device)).unbind(1)
    return torch.stack([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1], -1)


def places(h: int, w: int, device: torch.device | str = "cpu") -> Tensor:
    """x and y of every pixel, [2, h, w]."""
    x = torch.arange(w, device=device, dtype=torch.float32)
    y = torch.arange(h, device=device, dtype=torch.float32)
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w)])


def _smooth(pictures: Tensor) -> Tensor:
    """Without noise that reading between pixels would take away: it is no proof of a motion."""
    wide = F.pad(pictures.flatten(0, 1), [1] * 4, "replicate")
    across = wide[..., 2:] + wide[..., :-2] + 2 * wide[..., 1:-1]
    down = across[..., 2:, :] + across[..., :-2, :] + 2 * across[..., 1:-1, :]
    return down.div_(16).view_as(pictures)


def _gain(new: Tensor, moved: Tensor) -> Tensor:
    """How much brighter most of the new picture is, [B, 1, 1, 1]."""
    ratio = ((new + 0.02) / (moved + 0.02)).flatten(1).median(1).values
    return ratio.clamp(0.5, 2).view(-1, 1, 1, 1)


def _still(new: Tensor, old: Tensor, flow: Tensor, left: Tensor) -> Tensor:
    """The motion, or none where it explains little more than none does."""
    both = F.avg_pool2d(torch.cat([left, _variance(old - new)], 1), 5, 1, 2)
    return flow * (both[:, :1] < _BETTER * both[:, 1:])


def _search(new: Tensor, old: Tensor) -> Tensor:
    """Whole-pixel motion of each block, on the grid of patches, [B, 2, h / 4, w / 4]."""
    h, w = new.shape[-2:]
    across = 2 * _REACH + 1
    wide = F.pad(old, [_REACH] * 4, "replicate")
    # the old picture in all shifts
    shifted = wide[:, 0].unfold(1, h, 1).unfold(2, w, 1).flatten(1, 2)
    cells = F.avg_pool2d((shifted - new).abs_(), _CELL)
    cost = cells + F.avg_pool2d(cells, 3, 1, 1, count_include_pad=False)
    steps = torch.arange(-_REACH, _REACH + 1, device=new.device, dtype=torch.float32)
    far = (steps[:, None].abs() + steps.abs()).flatten()
    best = (cost + far.view(1, -1, 1, 1) * _FAR).argmin(1)
    return torch.stack([best % across, best.div(across, rounding_mode="floor")], 1) - float(_REACH)


def _refine(new: Tensor, old: Tensor, flow: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Gauss-Newton steps of every patch, on the grid of patches, in pixels of this level.

    Returns:
        The flow, each patch's seen together with those around it, and what it leaves unexplained.
    """
    x, y = _gradients(new)
    mean_x, mean_y, xx, xy, yy = _patches(torch.cat([x, y, x * x, x * y, y * y], 1)).split(1, 1)
    xx, xy = xx - mean_x * mean_x + _FLAT, xy - mean_x * mean_y
    yy = yy - mean_y * mean_y + _FLAT
    scale = 1 / (xx * yy - xy * xy)
    for _ in range(steps):
        off = _moved(old, flow) - new
        of_x, of_y, mean = _patches(torch.cat([x * off, y * off, off], 1)).split(1, 1)
        of_x, of_y = of_x - mean_x * mean, of_y - mean_y * mean
        step = torch.cat([yy * of_x - xy * of_y, xx * of_y - xy * of_x], 1) * scale
        flow = flow - step.clamp_(-1, 1)
    left = _variance(_moved(old, flow) - new)
    weight = (xx + yy) / (left + 1e-5)
    both = F.avg_pool2d(torch.cat([flow * weight, weight], 1), 3, 1, 1)
    return both[:, :2] / both[:, 2:], left


def _moved(old: Tensor, flow: Tensor) -> Tensor:
    return warped(old, F.interpolate(flow, scale_factor=_CELL, mode="bilinear"))


def _variance(off: Tensor) -> Tensor:
    square, mean = _patches(torch.cat([off * off, off], 1)).split(1, 1)
    return square - mean * mean


def _patches(values: Tensor) -> Tensor:
    """Means over the patches: each cell and those around it."""
    cells = F.avg_pool2d(values, _CELL)
    return F.avg_pool2d(cells, 3, 1, 1, count_include_pad=False)


def _gradients(picture: Tensor) -> tuple[Tensor, Tensor]:
    wide = F.pad(picture, [1] * 4, "replicate")
    x = (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) * 0.5
    y = (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) * 0.5
    return x, y


def _agree(flow: Tensor, back: Tensor) -> Tensor:
    """1 where the way there and back ends where it began, 0 where it does not or leaves."""
    h, w = flow.shape[-2:]
    there = warped(back, flow)
    apart = (flow + there).square().sum(1, keepdim=True)
    share, least = _APART
    bound = share * (flow.square() + there.square()).sum(1, keepdim=True) + least
    x, y = (flow + places(h, w, flow.device)).split(1, 1)
    inside = (x >= -0.5) & (x <= w - 0.5) & (y >= -0.5) & (y <= h - 0.5)
    return (2 - apart / bound).clamp_(0, 1) * inside


def _alike(new: Tensor, old: Tensor, flow: Tensor, left: Tensor) -> Tensor:
    """1 where the old picture, moved, looks like the new one, as far as its noise allows.

    Args:
        left: what the motion leaves unexplained, by patch.
    """
    off = F.avg_pool2d((warped(old, flow) - new).square_(), 3, 1, 1, count_include_pad=False)
    times, most, beside = _UNLIKE
    usual = left.flatten(1).median(1).values.clamp(max=most).view(-1, 1, 1, 1)
    return (2 - off / (times * usual + beside)).clamp_(0, 1)
