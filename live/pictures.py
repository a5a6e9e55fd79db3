"""Pictures between camera, graph and screen, for worker threads."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..host.frames.transfer import Fetched, fetch

FITS = ("crop", "pad", "stretch")


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


def on_its_way(image: Tensor) -> Fetched | Tensor:
    """The newest frame of an IMAGE [B, H, W, C], for `landed`; waits for nothing.

    Returns:
        What fetches it from a GPU; elsewhere [H, W, C], for `landed` to convert in its thread.
    """
    return fetch(image) or image[-1]


def landed(frame: Fetched | Tensor) -> np.ndarray:
    """[H, W, 3] uint8 on the CPU; waits for the frame."""
    if isinstance(frame, Fetched):
        return frame.picture()
    picture = np.nan_to_num(frame.detach().cpu().numpy().astype(np.float32, copy=False))
    picture = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    if picture.shape[-1] == 1:
        picture = picture.repeat(3, -1)
    return np.ascontiguousarray(picture[..., :3])
