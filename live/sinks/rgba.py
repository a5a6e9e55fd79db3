"""Pictures for places that want four bytes a pixel."""

import numpy as np


def canvas(width: int, height: int) -> np.ndarray:
    """[height, width, 4] uint8, opaque black."""
    made = np.zeros((height, width, 4), np.uint8)
    made[..., 3] = 255
    return made


def draw(onto: np.ndarray, picture: np.ndarray) -> None:
    """Put a picture, [H, W, 3 or 4] uint8, on a canvas of its size; 3 are opaque."""
    channels = picture.shape[2]
    onto[..., :channels] = picture
    if channels == 3:
        onto[..., 3] = 255
