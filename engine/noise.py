"""The noise of the slots: one for all frames, or of each frame its own."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .upload import uploaded


class Noise(Protocol):
    """What a frame brings into the ring.

    Attributes:
        fixed: other frames bring the same object.
        seed: it was drawn with.
    """

    fixed: bool
    seed: int

    def slot(self, k: int) -> Tensor:
        """Noise of slot k, [C, H, W], or of each of the frames that enter, [b, C, H, W]."""


class SlotNoise:
    """One Gaussian picture per slot, the same for every frame that passes: it keeps a stream calm.

    Drawn on the CPU so that a seed means the same on every machine. The noise of slot 0 is what
    ComfyUI's RandomNoise gives for that seed and one latent; more slots never change the earlier.

    Args:
        seed: any integer that torch's generator takes.
        shape: of one latent, (C, H, W).
        device: where the noise is used.
    """

    fixed = True

    def __init__(self, seed: int, shape: tuple[int, ...], device: torch.device | str = "cpu"):
        self.seed = seed
        self.shape = tuple(shape)
        self.device = torch.device(device)
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._slots: list[Tensor] = []

    def slot(self, k: int) -> Tensor:
        """Noise of slot k, [C, H, W], float32."""
        while len(self._slots) <= k:
            drawn = torch.randn((1, *self.shape), generator=self._generator, device="cpu")
            self._slots.append(uploaded(drawn[0], self.device))
        return self._slots[k]


class FrameNoise:
    """Noise of its own for every frame that enters.

    Args:
        frames: of each frame, the noise of the first slots, [S, C, H, W].
        later: has that of the slots after those.
    """

    fixed = False

    def __init__(self, frames: Sequence[Tensor], later: SlotNoise):
        self.seed = later.seed
        self._frames = list(frames)
        self._later = later

    def slot(self, k: int) -> Tensor:
        """Noise of slot k, [b, C, H, W], float32."""
        first = self._frames[0]
        if k >= len(first):
            return self._later.slot(k).expand(len(self._frames), *first.shape[1:])
        if len(self._frames) == 1:
            return first[k : k + 1]
        return torch.stack([frame[k] for frame in self._frames])
