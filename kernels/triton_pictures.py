"""Triton kernels of pictures.py.

Programs go over the result as it lies in memory, so that a thread writes 16 bytes at once whatever
the layout; it gathers what they are made of, or reads it in one piece where it lies the same way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pictures import as_rows, axes
from .triton_launch import launch

WARPS = 4
BLOCK = 2048  # elements for each program: 16 bytes of uint8 for each thread
RESIZED = 512
# a fused multiply-add would round otherwise than the reference
EXACT = {"num_warps": WARPS, "enable_fp_fusion": False}


@triton.jit
def _nearest(where, size, first, inner, num, den):
    """The pixel left of a target pixel's centre, and how far the centre is from its middle."""
    # twice den times the centre is a whole number
    centre = size * den + (2 * (where - first) + 1 - inner) * num
    # integers are divided towards zero, so nothing here is negative
    pixel = (centre + den) // (2 * den) - 1
    beyond = centre - den - 2 * den * pixel
    return pixel, beyond.to(tl.float32) / (2 * den).to(tl.float32)


@triton.jit
def _weight(pixel, tap, beyond, size, slope):
    """Of the source's pixel + tap in the filter, 0 outside of the picture."""
    weight = tl.maximum(1.0 - tl.abs(tap - beyond) * slope, 0.0)
    return tl.where((pixel + tap >= 0) & (pixel + tap < size), weight, 0.0)


@triton.jit(
    do_not_specialize=[
        *("height", "width", "row", "column", "channel"),
        *("y_size", "y_first", "y_inner", "y_num", "y_den", "y_reach"),
        *("x_size", "x_first", "x_inner", "x_num", "x_den", "x_reach"),
    ]
)
def _in_kernel(
    picture, result, total, height, width, row, column, channel,
    y_size, y_first, y_inner, y_num, y_den, y_reach,
    x_size, x_first, x_inner, x_num, x_den, x_reach,
    scale, shift,
    RESIZE: tl.constexpr, FLAT: tl.constexpr, PLANAR: tl.constexpr, MIRROR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    if FLAT:
        level = tl.load(picture + at, mask=inside, other=0).to(tl.float32)
    else:
        if PLANAR:
            c, pixel = at // (height * width), at % (height * width)
        else:
            c, pixel = at % 3, at // 3
        y, x = pixel // width, pixel % width
        if MIRROR:
            x = width - 1 - x
        if RESIZE:
            shown = inside & (y >= y_first) & (y < y_first + y_inner)
            shown &= (x >= x_first) & (x < x_first + x_inner)
            top, below = _nearest(y, y_size, y_first, y_inner, y_num, y_den)
            left, right = _nearest(x, x_size, x_first, x_inner, x_num, x_den)
            y_slope = tl.minimum(y_den.to(tl.float32) / y_num.to(tl.float32), 1.0)
            x_slope = tl.minimum(x_den.to(tl.float32) / x_num.to(tl.float32), 1.0)
            level = tl.zeros([BLOCK], tl.float32)
            weights = tl.zeros([BLOCK], tl.float32)
            for y_tap in range(1 - y_reach, y_reach + 1):
                y_weight = _weight(top, y_tap, below, y_size, y_slope)
                line = c * channel + (top + y_tap) * row
                for x_tap in range(1 - x_reach, x_reach + 1):
                    weight = y_weight * _weight(left, x_tap, right, x_size, x_slope)
                    counted = shown & (weight > 0)
                    value = tl.load(picture + line + (left + x_tap) * column, mask=counted, other=0)
                    level += weight * value.to(tl.float32)
                    weights += weight
            level /= tl.where(shown, weights, 1.0)
        else:
            source = picture + c * channel + y * row + x * column
            level = tl.load(source, mask=inside, other=0).to(tl.float32)
    tl.store(result + at, (level * scale + shift).to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["height", "width", "frame", "row", "column", "channel"])
def _out_kernel(
    image, result, total, height, width, frame, row, column, channel, scale, shift,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    if FLAT:
        source = at
    else:
        pixel = at // 3
        x, y, b = pixel % width, pixel // width % height, pixel // width // height
        source = b * frame + y * row + x * column + at % 3 * channel
    level = tl.load(image + source, mask=inside, other=0).to(tl.float32) * scale + shift
    # of a number and none, the maximum is the number
    level = tl.minimum(tl.maximum(level, 0.0), 255.0)
    # whole numbers are what float32 has there: the sum is rounded, half to even
    level = (level + 8388608.0) - 8388608.0
    tl.store(result + at, level.to(tl.uint8), mask=inside)


def picture_in(
    picture: Tensor,
    height: int,
    width: int,
    fit: str,
    mirror: bool,
    dtype: torch.dtype,
    layout: str,
    scale: float,
    shift: float,
) -> Tensor:
    """pictures.picture_in, by the kernel."""
    picture = picture[..., :3]
    planar = layout == "NCHW"
    shape = (1, 3, height, width) if planar else (1, height, width, 3)
    result = torch.empty(shape, dtype=dtype, device=picture.device)
    vertical, horizontal = axes(picture.shape[:2], (height, width), fit)
    resize = picture.shape[:2] != (height, width)
    flat = picture.is_contiguous() and not (resize or planar or mirror)
    # 16 bytes for each thread to write, unless its filters need the registers
    block = BLOCK if flat else RESIZED if resize else BLOCK // result.element_size()
    total = result.numel()
    launch(
        _in_kernel, (triton.cdiv(total, block),),
        picture, result, total, height, width, *picture.stride(),
        *vertical, vertical.reach, *horizontal, horizontal.reach, scale, shift,
        RESIZE=resize, FLAT=flat, PLANAR=planar, MIRROR=mirror, BLOCK=block, **EXACT,
    )  # fmt: skip
    return result.movedim(-1, 1) if layout == "channels_last" else result


def picture_out(image: Tensor, layout: str, scale: float, shift: float) -> Tensor:
    """pictures.picture_out, by the kernel."""
    image = as_rows(image, layout)
    result = torch.empty(image.shape, dtype=torch.uint8, device=image.device)
    total = result.numel()
    launch(
        _out_kernel, (triton.cdiv(total, BLOCK),),
        image, result, total, *image.shape[1:3], *image.stride(), scale, shift,
        FLAT=image.is_contiguous(), BLOCK=BLOCK, **EXACT,
    )  # fmt: skip
    return result
