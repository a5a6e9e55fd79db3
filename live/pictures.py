"""Pictures between camera, graph and screen, for worker threads."""

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..host.frames.check import checked_image
from ..host.frames.transfer import Fetched, fetch
from .faults import Refused

FITS = ("crop", "pad", "stretch")
LEAST_SIDE, MOST_SIDE = 16, 4096  # pixels of a frame that a LiveCamera gives
MOST_RATE = 1000  # frames per second that a LiveCamera may be set to: intervals are told in ms
# of a picture that is shown: what JPEG can hold, and what is coded in a moment
JPEG_SIDE, MOST_SHOWN = 65_500, 2**26
_STRIP = 32  # rows that are converted at a time


class Shape(NamedTuple):
    """How a LiveCamera wants its frames.

    Attributes:
        width, height: pixels.
        fit: crop cuts what is over, pad adds black, stretch ignores the aspect.
        mirror: left becomes right.
    """

    width: int
    height: int
    fit: str = "crop"
    mirror: bool = False


def checked_shape(width: Any, height: Any, fit: Any, mirror: Any) -> Shape:
    """A LiveCamera's settings, which may come by a wire and then were looked at by nobody.

    Raises:
        Refused: a side that is no whole number from LEAST_SIDE to MOST_SIDE, another fit, or a
            mirror that is neither on nor off; names the input.
    """
    for name, side in (("width", width), ("height", height)):
        number = isinstance(side, int | float) and LEAST_SIDE <= side <= MOST_SIDE
        if not number or side != int(side):
            raise Refused(
                f"{name}: {short(side)} pixels cannot be. Give a whole number from {LEAST_SIDE} "
                f"to {MOST_SIDE}."
            )
    if fit not in FITS:
        raise Refused(f"fit: {short(fit)} is not known. Choose one of {', '.join(FITS)}.")
    if not isinstance(mirror, bool):
        raise Refused(f"mirror: {short(mirror)} is neither on nor off. Connect a BOOLEAN.")
    return Shape(int(width), int(height), fit, mirror)


def short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # as of a number of thousands of digits
        text = type(value).__name__
    return text if len(text) <= 40 else f"{text[:40]}..."


def showable(image: Any) -> Tensor:
    """The IMAGE of a LiveView, [B, H, W, C].

    Raises:
        Refused: it is none, has other than 1, 3 or more channels, or is too large for a JPEG.
    """
    try:
        checked_image("image", image)
    except ValueError as reason:
        raise Refused(str(reason)) from None
    height, width, channels = image.shape[1:]
    if channels == 2:
        raise Refused("image: pictures of 2 channels cannot be shown. Give 1 (grey) or 3 (RGB).")
    if max(height, width) > JPEG_SIDE or height * width > MOST_SHOWN:
        raise Refused(
            f"image: {width} x {height} is too large to be shown. Give at most {JPEG_SIDE} pixels "
            f"a side and {MOST_SHOWN >> 20} million in all."
        )
    return image


def fitted(picture: np.ndarray, shape: Shape) -> np.ndarray:
    """[H, W, 3] uint8 to [shape.height, shape.width, 3] uint8."""
    height, width = picture.shape[:2]
    wanted = (shape.width, shape.height)
    if (width, height) != wanted:
        image = Image.fromarray(picture)
        if shape.fit == "stretch":
            image = image.resize(wanted, Image.Resampling.BILINEAR)
        else:
            choose = max if shape.fit == "crop" else min
            scale = choose(shape.width / width, shape.height / height)
            if shape.fit == "crop":
                # the box is cut before it is resized: only what stays is worked on
                w, h = shape.width / scale, shape.height / scale
                left, top = max(0.0, (width - w) / 2), max(0.0, (height - h) / 2)
                # rounding must not reach outside the picture
                box = (left, top, min(left + w, width), min(top + h, height))
                image = image.resize(wanted, Image.Resampling.BILINEAR, box)
            else:
                size = max(1, round(width * scale)), max(1, round(height * scale))
                inner = image.resize(size, Image.Resampling.BILINEAR)
                image = Image.new("RGB", wanted)
                image.paste(inner, ((wanted[0] - size[0]) // 2, (wanted[1] - size[1]) // 2))
        picture = np.asarray(image)
    return picture[:, ::-1] if shape.mirror else picture


def to_image(picture: np.ndarray) -> Tensor:
    """[H, W, 3] uint8 to ComfyUI's IMAGE, [1, H, W, 3] float 0..1."""
    # numpy, because torch would start a pool of threads for each worker thread
    values = np.multiply(picture, np.float32(1 / 255), dtype=np.float32)
    # nodes run in inference_mode, whose tensors do not count what is written into them
    # (host.frames.transfer.near asks); others do, in inference_mode as well
    with torch.inference_mode(False):
        return torch.from_numpy(values)[None]


def on_its_way(image: Tensor, alpha: bool = False) -> Fetched | Tensor:
    """The newest frame of an IMAGE [B, H, W, C], for `landed`; waits for nothing.

    Args:
        alpha: a fourth channel is wanted, too; `landed` then waits for a frame of a GPU.

    Returns:
        What fetches it from a GPU; elsewhere [H, W, C], for `landed` to convert in its thread.
    """
    if alpha and image.shape[-1] >= 4:
        return image[-1]
    return fetch(image) or image[-1]


def landed(frame: Fetched | Tensor, alpha: bool = False) -> np.ndarray:
    """[H, W, 3] uint8 on the CPU; waits for the frame.

    Args:
        alpha: [H, W, 4] where the frame has a fourth channel.
    """
    if isinstance(frame, Fetched):
        return frame.picture()
    values = frame.detach().to("cpu", torch.float32).numpy()
    picture = np.empty(values.shape, np.uint8)
    # in strips, which stay in the cache: at 2048 x 2048 a copy of it all is 50 MB
    for top in range(0, len(values), _STRIP):
        strip = np.nan_to_num(values[top : top + _STRIP])
        np.clip(strip, 0, 1, out=strip)
        np.rint(np.multiply(strip, 255, out=strip), out=strip)
        picture[top : top + _STRIP] = strip
    if picture.shape[-1] == 1:
        picture = picture.repeat(3, -1)
    return np.ascontiguousarray(picture[..., : 4 if alpha else 3])
