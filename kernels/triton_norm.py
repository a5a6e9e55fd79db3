"""Triton kernels of norm.py: moments of every group in parts, then one pass over the values."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norm import memory_format
from .triton_launch import launch

BLOCK = 2048  # values that a program of the first pass takes at a time
TILE = 2048  # values for each program of the second
CHANNELS = 64  # of those in channels_last: enough for whole lines of memory
PARTS = 8  # programs for a group, at most: 32 groups alone leave most of a GPU idle
WARPS = 4


@triton.jit
def _moment_kernel(
    x, moments, channels, pixels, groups, part,
    DEPTH: tl.constexpr, PARTS: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean, squared deviation and count of a part of a group of DEPTH channels (Welford 1962)."""
    row = tl.program_id(0)
    size = DEPTH * pixels
    if LAST:
        x += row // groups * channels * pixels + row % groups * DEPTH
    else:
        x += row * size
    start = tl.program_id(1) * part
    mean = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for step in range(0, tl.cdiv(part, BLOCK)):
        at = start + step * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        place = at // DEPTH * channels + at % DEPTH if LAST else at
        value = tl.load(x + place, mask=inside, other=0).to(tl.float32)
        off = tl.where(inside, value - mean, 0.0)
        mean += off * (1.0 / (step + 1))
        squares += off * (value - mean)
        count += inside.to(tl.float32)
    total = tl.sum(count)
    middle = tl.sum(mean * count) / tl.maximum(total, 1.0)
    squares += count * (mean - middle) * (mean - middle)
    moments += (row * PARTS + tl.program_id(1)) * 3
    tl.store(moments, middle)
    tl.store(moments + 1, tl.sum(squares))
    tl.store(moments + 2, total)


@triton.jit
def _apply_kernel(
    x, result, moments, weight, bias, channels, pixels, groups, eps,
    DEPTH: tl.constexpr, PARTS: tl.constexpr, LAST: tl.constexpr, SILU: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * P + tl.arange(0, P)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    image = tl.program_id(2)
    known = channel < channels
    # the parts of each channel's group become one (Chan et al. 1979)
    part = ((image * groups + channel // DEPTH) * PARTS)[:, None] + tl.arange(0, PARTS)[None, :]
    means = tl.load(moments + 3 * part, mask=known[:, None], other=0)
    squares = tl.load(moments + 3 * part + 1, mask=known[:, None], other=0)
    counts = tl.load(moments + 3 * part + 2, mask=known[:, None], other=1)
    size = tl.sum(counts, 1)
    mean = tl.sum(means * counts, 1) / size
    off = means - mean[:, None]
    variance = tl.sum(squares + counts * off * off, 1) / size
    gain = tl.load(weight + channel, mask=known, other=0).to(tl.float32) / tl.sqrt(variance + eps)
    lift = tl.load(bias + channel, mask=known, other=0).to(tl.float32)
    if LAST:
        at = pixel[:, None] * channels + channel[None, :]
        inside = (pixel < pixels)[:, None] & known[None, :]
        mean, gain, lift = mean[None, :], gain[None, :], lift[None, :]
    else:
        at = channel[:, None] * pixels + pixel[None, :]
        inside = known[:, None] & (pixel < pixels)[None, :]
        mean, gain, lift = mean[:, None], gain[:, None], lift[:, None]
    at += image * channels * pixels
    y = (tl.load(x + at, mask=inside, other=0).to(tl.float32) - mean) * gain + lift
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(result + at, y.to(result.dtype.element_ty), mask=inside)


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    """norm.group_norm_silu, by the kernels."""
    batch, channels, height, width = x.shape
    pixels, depth = height * width, channels // groups
    layout = memory_format(x)
    last = layout == torch.channels_last
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)

    blocks = triton.cdiv(depth * pixels, BLOCK)
    parts = min(PARTS, triton.next_power_of_2(blocks))
    part = triton.cdiv(blocks, parts) * BLOCK
    moments = torch.empty(batch * groups, parts, 3, dtype=torch.float32, device=x.device)
    kind = {"DEPTH": depth, "PARTS": parts, "LAST": last, "num_warps": WARPS}
    launch(
        _moment_kernel, (batch * groups, parts),
        x, moments, channels, pixels, groups, part, BLOCK=BLOCK, **kind
    )

    if last:
        c = min(CHANNELS, triton.next_power_of_2(channels))
        p = TILE // c
    else:
        p = min(TILE, triton.next_power_of_2(pixels))
        c = TILE // p
    launch(
        _apply_kernel, (triton.cdiv(pixels, p), triton.cdiv(channels, c), batch),
        x, result, moments, weight, bias, channels, pixels, groups, eps,
        SILU=silu, C=c, P=p, **kind,
    )  # fmt: skip
    return result
