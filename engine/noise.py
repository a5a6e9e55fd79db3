"""The fixed noise of the slots."""

import torch
from torch import Tensor

from .upload import uploaded


class SlotNoise:
    """One Gaussian picture per slot, the same for every frame that passes: it keeps a stream calm.

    Drawn on the CPU so that a seed means the same on every machine. The noise of slot 0 is what
    ComfyUI's RandomNoise gives for that seed and one latent; more slots never change the earlier.

    Args:
        seed: any integer that torch's generator takes.
        shape: of one latent, (C, H, W).
        device: where the noise is used.
    """

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
