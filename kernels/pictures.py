"""Camera pictures into what a model takes, and back: uint8 on one side, float on the other."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .choice import INDEX, extent, op

FITS = ("crop", "pad", "stretch")
LAYOUTS = ("BHWC", "NCHW", "channels_last")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIDE = 16384  # longest side in pixels: places are computed in 32-bit integers
SHRINK = 8  # a kernel that shrinks more reads over 256 pixels for each one it writes


class Axis(NamedTuple):
    """How one side of a picture is resized, in whole numbers so that places are exact.

    The middles of picture and target lie on each other; the target's pixels first to
    first + inner - 1 show the picture, the others are black.

    Attributes:
        size: pixels of the source.
        first, inner: of the target.
        num, den: num / den pixels of the source make one of the target.
    """

    size: int
    first: int
    inner: int
    num: int
    den: int

    @property
    def reach(self) -> int:
        """Pixels that the filter reaches to each side: 1 where the picture grows."""
        return max(1, math.ceil(self.num / self.den))


def axes(source: tuple[int, int], target: tuple[int, int], fit: str) -> tuple[Axis, Axis]:
    """Where the pixels of the target lie in the source, as `fitted` in live/pictures.py has it.

    Args:
        source, target: height and width in pixels.
        fit: crop cuts what is over, pad adds black, stretch ignores the aspect.

    Returns:
        the vertical axis and the horizontal one.

    Raises:
        ValueError: an unknown fit.
    """
    if fit not in FITS:
        raise ValueError(f"fit: expected one of {FITS}, got {fit!r}")
    (height, width), (h, w) = source, target
    if fit == "crop":
        # the side that is cut less decides
        num, den = (width, w) if width * h <= height * w else (height, h)
        return Axis(height, 0, h, num, den), Axis(width, 0, w, num, den)
    if fit == "pad":
        scale = min(w / width, h / height)
        inner = max(1, round(height * scale)), max(1, round(width * scale))
    else:
        inner = h, w
    return (
        Axis(height, (h - inner[0]) // 2, inner[0], height, inner[0]),
        Axis(width, (w - inner[1]) // 2, inner[1], width, inner[1]),
    )


def _resized(picture: Tensor, axis: Axis, target: int, dim: int) -> Tensor:
    """A float picture [H, W, C] with one side resized by a triangle filter."""
    where = torch.arange(target, dtype=torch.float64, device=picture.device) - axis.first
    shown = (where >= 0) & (where < axis.inner)
    centre = axis.size / 2 + (2 * where + 1 - axis.inner) * axis.num / (2 * axis.den)
    nearest = (centre - 0.5).floor()
    result, weights = 0.0, 0.0
    for tap in range(1 - axis.reach, axis.reach + 1):
        at = nearest + tap
        weight = 1 - (at + 0.5 - centre).abs() / max(1.0, axis.num / axis.den)
        weight = weight.clamp(min=0) * ((at >= 0) & (at < axis.size))
        pixels = picture.index_select(dim, at.clamp(0, axis.size - 1).long())
        result = result + pixels * weight.float().reshape([-1 if d == dim else 1 for d in range(3)])
        weights = weights + weight
    share = torch.where(shown, 1 / weights, 0).float()
    return result * share.reshape([-1 if d == dim else 1 for d in range(3)])


def _in_unfit(picture, height, width, fit, mirror, dtype, layout, scale, shift) -> str:
    if picture.dtype != torch.uint8 or dtype not in DTYPES:
        return f"the kernel makes {DTYPES} of uint8, not {dtype} of {picture.dtype}"
    if picture.ndim != 3 or picture.shape[2] < 3 or fit not in FITS or layout not in LAYOUTS:
        return "the arguments are wrong"
    if min(*picture.shape, height, width) < 1:
        return "the picture is empty"
    if max(*picture.shape[:2], height, width) > SIDE or extent(picture) >= INDEX:
        return f"the picture is too large: more than {SIDE} pixels along a side, or 2 GiB"
    if max(axis.num / axis.den for axis in axes(picture.shape[:2], (height, width), fit)) > SHRINK:
        return f"the picture shrinks by more than {SHRINK}"
    return ""


@op("triton_pictures", unfit=_in_unfit)
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
    """A camera picture as a model or the graph takes it: fitted, mirrored, scaled, in one pass.

    Shrinking averages (a triangle filter as wide as the step, which is
    F.interpolate(mode="bilinear", antialias=True, align_corners=False) and Pillow's BILINEAR);
    growing is bilinear. Nothing is rounded to whole levels in between. crop reads beyond the cut
    as far as the filter reaches, as Pillow does with a box.

    Args:
        picture: [H, W, C] uint8, any strides; channels after the third are not looked at.
        height, width: of the result, in pixels.
        fit: crop cuts what is over, pad adds black, stretch ignores the aspect.
        mirror: left becomes right.
        dtype: of the result, float32, float16 or bfloat16; the arithmetic is float32.
        layout: BHWC gives [1, h, w, 3], NCHW gives [1, 3, h, w], channels_last gives that with
            channels_last strides.
        scale, shift: level * scale + shift; 1/255 and 0 for ComfyUI's IMAGE (0..1), 2/255 and -1
            for what a VAE takes (-1..1).

    Raises:
        ValueError: not such a picture, an unknown fit or layout.
    """
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[2] < 3:
        raise ValueError(
            f"picture: expected uint8 [height, width, 3 or 4], got {picture.dtype} "
            f"{tuple(picture.shape)}"
        )
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    vertical, horizontal = axes(picture.shape[:2], (height, width), fit)
    values = picture[..., :3].float()
    if values.shape[:2] != (height, width):
        values = _resized(_resized(values, vertical, height, 0), horizontal, width, 1)
    if mirror:
        values = values.flip(1)
    result = (values * scale + shift).to(dtype)[None].contiguous()
    if layout == "BHWC":
        return result
    result = result.movedim(-1, 1)
    return result.contiguous() if layout == "NCHW" else result


def as_rows(image: Tensor, layout: str) -> Tensor:
    """A view of an image as [B, H, W, 3].

    Raises:
        ValueError: no such image, or an unknown layout.
    """
    if layout not in ("BHWC", "NCHW"):
        raise ValueError(f"layout: expected 'BHWC' or 'NCHW', got {layout!r}")
    rows = image if layout == "BHWC" or image.ndim != 4 else image.movedim(1, -1)
    if rows.ndim != 4 or rows.shape[-1] not in (1, 3, 4):
        raise ValueError(f"image: expected 1, 3 or 4 channels, {layout}, got {tuple(image.shape)}")
    return rows.expand(*rows.shape[:3], 3) if rows.shape[-1] == 1 else rows[..., :3]


def _out_unfit(image, layout, scale, shift) -> str:
    if image.dtype not in DTYPES:
        return f"the kernel takes {DTYPES}, not {image.dtype}"
    if layout not in ("BHWC", "NCHW") or image.ndim != 4:
        return "the arguments are wrong"
    if image.numel() == 0:
        return "the image is empty"
    if max(extent(image), 3 * image.numel()) >= INDEX:
        return "the image is too large"
    return ""


@op("triton_pictures", unfit=_out_unfit)
def picture_out(image: Tensor, layout: str, scale: float, shift: float) -> Tensor:
    """A batch of images as bytes for a screen or a codec, in one pass.

    The same as `landed` in live/pictures.py: not a number is 0, what lies outside 0..255 is cut
    off, the rest is rounded half to even.

    Args:
        image: float32, float16 or bfloat16, [B, H, W, C] or [B, C, H, W], any strides; C is 3, or
            4 (the last is not looked at), or 1 (grey).
        layout: BHWC or NCHW.
        scale, shift: value * scale + shift is the level; 255 and 0 for ComfyUI's IMAGE (0..1),
            127.5 and 127.5 for what a VAE gives (-1..1).

    Returns:
        [B, H, W, 3] uint8, contiguous.

    Raises:
        ValueError: not such an image, an unknown layout.
    """
    levels = as_rows(image, layout).float() * scale + shift
    return levels.nan_to_num(0.0, 255.0, 0.0).clamp(0, 255).round().to(torch.uint8).contiguous()
