"""Bad pictures, said in the words of the node that was given them."""

from typing import Any

import torch
from torch import Tensor


def checked_image(
    name: str, image: Any, wanted: str = "an IMAGE", numbers: str = "numbers from 0 to 1"
) -> Tensor:
    """An IMAGE, [B, H, W, C] of floating numbers with at least one frame and one pixel.

    Args:
        name: of the node's input.
        wanted: what may be connected there.
        numbers: what its values mean there.

    Raises:
        ValueError: it is none; the message begins with the name.
    """
    if not isinstance(image, Tensor) or image.layout is not torch.strided or image.is_nested:
        raise ValueError(f"{name}: expected frames, got {type(image).__name__}. Connect {wanted}.")
    shape = tuple(image.shape)
    if image.ndim != 4:
        raise ValueError(
            f"{name}: expected 4 dimensions (frames, height, width, channels), got the shape "
            f"{shape}. Connect {wanted}."
        )
    if 0 in shape:
        raise ValueError(
            f"{name}: the batch holds no frame, or frames without a pixel (shape {shape}). Check "
            "the node before this one."
        )
    if not image.is_floating_point():
        raise ValueError(
            f"{name}: expected {numbers}, got {str(image.dtype).removeprefix('torch.')}. Check the "
            "node before this one."
        )
    return image
