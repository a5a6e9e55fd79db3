"""White noise that moves with a scene and stays white.

Integral noise warping (Deng et al., ICLR 2025): a picture of noise is Brownian, so a pixel's value
can be shared out among all who ask for a part of it, as the increments of a Brownian bridge over
their shares, and those of different parts are independent. Who gathers increments of variance w in
all divides by its root; who gathers none draws afresh.

Frame after frame, reading between pixels would wear a pattern down: half a pixel of pan halves it.
So the field is kept on a finer grid, is moved by whole cells of it, and remembers with each cell by
how much it is off, until that makes a cell. What a sampler takes is the sum over a pixel's cells;
of models that see patches of a picture's pixels side by side, the cells are these pixels.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .flow import Motion, places, resized
from .noise import SlotNoise

FINEST = 4  # most cells along the side of a latent's pixel
_CELLS = 131_072  # values of one slot's field, above which its cells are larger
_SURE = 0.5  # confidence below which nothing is known of where a cell was
Draw = Callable[..., Tensor]  # of a shape, N(0, 1)


class Field(NamedTuple):
    """The noise of one frame, at every slot."""

    pixels: Tensor  # [S, C, h, w], N(0, 1): what a sampler takes
    cells: Tensor  # [S * C, u h, u w]; of patches [S * 3, u h, u w]
    off: Tensor  # [2, u h, u w], cells, -0.5..0.5: what each cell has is meant for here + off
    seed: int
    number: int  # of frames before it
    patch: bool  # a latent's pixel is u x u pixels of three colours (torch's pixel_unshuffle)


def begun(noise: SlotNoise, slots: int, ratio: int = 0) -> Field:
    """The field of a first frame: in pixels, the noise of the slots as it is.

    Args:
        slots: S, the first ones.
        ratio: a picture's pixels along one of the latent's, where that is a whole number.
    """
    pixels = torch.stack([noise.slot(k) for k in range(slots)])
    _, channels, h, w = pixels.shape
    fits = (u for u in range(FINEST, 1, -1) if channels * h * w * u * u <= _CELLS)
    u = next(fits, 1)
    patch = ratio > 1 and channels == 3 * ratio * ratio
    if patch:
        u, cells = ratio, F.pixel_shuffle(pixels, ratio).flatten(0, 1)
    else:
        cells = pixels.flatten(0, 1)
    if u > 1 and not patch:
        free = _draws(noise.seed, -1, noise.device)(len(cells), u * h, u * w)
        # given its sum, what a pixel's cells are beside the mean stays as it was
        cells = free + _spread(cells - _summed(free, u), u) / u
    off = torch.zeros(2, u * h, u * w, device=noise.device)
    return Field(pixels, cells, off, noise.seed, 0, patch)


def moved(before: Field, motion: Motion) -> Field:
    """The field of the next frame.

    Args:
        motion: to this frame from the one before, of one picture, on any grid. What moves goes by
            whole cells, and where the flow is 0 everything stays exactly as it is.
    """
    cells, off = before.cells, before.off
    h, w = cells.shape[-2:]
    u = h // before.pixels.shape[-2]
    flow, confidence = (part[0] for part in resized(motion, h, w))
    number = before.number + 1
    if flow.device.type == "cpu" and not flow.any() and bool((confidence > _SURE).all()):
        return before._replace(number=number)
    here = places(h, w, flow.device)
    was = here + flow
    near = _index((was + 0.5).floor(), h, w)
    # where what was meant for that place lies
    at = (was - off.flatten(1).index_select(1, near).view(2, h, w) + 0.5).floor()
    at = torch.where((flow == 0).all(0), here, at)
    known = _inside(at, h, w) & (confidence[0] > _SURE)
    index = _index(at, h, w)
    draw = _draws(before.seed, number, flow.device)
    out, alone = _taken(cells.flatten(1), index, known.flatten(), draw)
    off = off.flatten(1).index_select(1, index).view(2, h, w)
    off = torch.where(known, at + off - was, 0.0)
    cells = out.view_as(cells)
    if before.patch:
        pixels = F.pixel_unshuffle(cells.unflatten(0, (-1, 3)), u)
    else:
        pixels = _summed(cells, u).view_as(before.pixels)
    if u > 1 and not before.patch:
        # exactly as it was, without rounding
        stays = (alone.view(h, w) & (at == here).all(0)).view(h // u, u, w // u, u).all(3).all(1)
        pixels = torch.where(stays, before.pixels, pixels)
    return Field(pixels, cells, off.clamp_(-0.5, 0.5), before.seed, number, before.patch)


def grown(field: Field, noise: SlotNoise, slots: int) -> Field:
    """The same with more slots, whose noise begins now, or with fewer."""
    have = field.pixels.shape[0]
    each = len(field.cells) // have
    if slots <= have:
        return field._replace(pixels=field.pixels[:slots], cells=field.cells[: slots * each])
    more = begun(noise, slots, field.cells.shape[-1] // field.pixels.shape[-1] * field.patch)
    return field._replace(
        pixels=torch.cat([field.pixels, more.pixels[have:]]),
        cells=torch.cat([field.cells, more.cells[have * each :]]),
    )


def gathered(noise: Tensor, index: Tensor, area: Tensor, draw: Draw) -> Tensor:
    """White noise made of parts of white noise (Deng et al. 2025, section 3.2).

    Args:
        noise: [K, M], N(0, 1), independent.
        index: [J, N] int64, of the J values that each of N asks.
        area: [J, N], >= 0: how much of them. What is asked of one value in all counts as the whole
            of it.
        draw: gives N(0, 1) of a shape; asked once.

    Returns:
        [K, N], N(0, 1), independent: drawn afresh where all areas are 0, and exactly a value where
        nobody else asks for it.
    """
    k, m = noise.shape
    j, n = index.shape
    flat = index.flatten()
    asked = torch.zeros(m, device=noise.device).index_add_(0, flat, area.flatten())
    share = area / asked.index_select(0, flat).view(j, n).clamp_(min=1e-20)
    fresh = draw(k, j, n)
    # increments of a Brownian motion, then those of one that ends where the value is: the bridge
    free = fresh * share.sqrt()
    ends = torch.zeros_like(noise).index_add_(1, flat, free.flatten(1))
    whole = noise.index_select(1, flat).view(k, j, n)
    part = torch.addcmul(free, share, whole - ends.index_select(1, flat).view(k, j, n))
    part = torch.where(share == 1, whole, part)
    total = share.sum(0)
    return torch.where(total > 0, part.sum(1) * total.clamp(min=1e-20).rsqrt(), fresh[:, 0])


def _taken(noise: Tensor, index: Tensor, known: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """`gathered` of whole values, and who is alone in asking for one, [N]."""
    asked = torch.zeros(noise.shape[1], device=noise.device).index_add_(0, index, known.float())
    alone = known & (asked.index_select(0, index) == 1)
    if noise.device.type != "cpu":
        # to know how many are not the host would wait
        return gathered(noise, index[None], known[None].float(), draw), alone
    out = noise.index_select(1, index)
    rest = (~alone).nonzero()[:, 0]
    if len(rest):
        share = known[rest][None].float()
        out.index_copy_(1, rest, gathered(noise, index[rest][None], share, draw))
    return out, alone


def _draws(seed: int, number: int, device: torch.device) -> Draw:
    """Random numbers of a frame, whatever was drawn for others.

    On a GPU they are not those of a CPU: what is uncovered differs by machine.
    """
    generator = torch.Generator(device)
    generator.manual_seed((seed * 0x9E3779B97F4A7C15 + number + 1) % 2**63)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def _summed(cells: Tensor, u: int) -> Tensor:
    return cells if u == 1 else F.avg_pool2d(cells, u) * u


def _spread(pixels: Tensor, u: int) -> Tensor:
    return pixels.repeat_interleave(u, -1).repeat_interleave(u, -2)


def _index(at: Tensor, h: int, w: int) -> Tensor:
    return (at[0].clamp(0, w - 1) + w * at[1].clamp(0, h - 1)).long().flatten()


def _inside(at: Tensor, h: int, w: int) -> Tensor:
    return (at[0] >= 0) & (at[0] < w) & (at[1] >= 0) & (at[1] < h)
