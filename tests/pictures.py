"""Synthetic pictures with edges, colour and a layout of their own, for tests of whole graphs."""

import numpy as np
import torch


def picture(number: int, height: int = 256, width: int = 256) -> np.ndarray:
    """A scene of uint8 [height, width, 3]: light falling over a wall, discs and boxes before it.

    Scenes of different numbers share nothing but the kind of things in them.
    """
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width] / (min(height, width) - 1)
    light = np.cos(rng.uniform(0, 6.28)) * x + np.sin(rng.uniform(0, 6.28)) * y
    out = (0.5 + 0.25 * light)[..., None] * rng.uniform(0.5, 1.2, 3)
    for kind in rng.permutation(["disc", "box"] * 3):
        across, down = rng.uniform(0.1, width / min(height, width)), rng.uniform(0.1, 0.9)
        size, colour = rng.uniform(0.08, 0.25), rng.uniform(0, 1, 3)
        if kind == "disc":
            inside = (x - across) ** 2 + (y - down) ** 2 < size**2
        else:
            inside = (abs(x - across) < size) & (abs(y - down) < 0.6 * size)
        # each is lit from above, so that no area is quite flat
        out[inside] = ((1.15 - 0.5 * y)[..., None] * colour)[inside]
    return (out.clip(0, 1) * 255).round().astype(np.uint8)


def pictures(count: int, first: int = 0, height: int = 256, width: int = 256) -> torch.Tensor:
    """Scenes as an IMAGE, [count, height, width, 3] in 0..1."""
    drawn = [picture(first + i, height, width) for i in range(count)]
    return torch.from_numpy(np.stack(drawn)).float() / 255
