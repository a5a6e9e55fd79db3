"""One half of an autoencoder as a CUDA graph, in channels_last."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .engine import Refused
from .graph import CudaRecording, Recording
from .precision import DEFAULT


class CudaHalf:
    """See half.Half: a recording on a copy of the weights, which are small.

    Args:
        recording: makes what records.
    """

    name = "cudagraph"
    precision = DEFAULT
    settled = True

    def __init__(self, recording: Callable[[], Recording] = CudaRecording):
        self._new = recording
        self._recording: Recording | None = None

    def prepare(self, network: nn.Module, x: Tensor) -> None:
        """See Half.prepare.

        Raises:
            Refused: `x` is no picture or latents.
        """
        if x.ndim != 4:
            raise Refused(f"it takes [B, C, H, W], not {list(x.shape)}")
        own = network.to(x.device, x.dtype, memory_format=torch.channels_last)
        self._network = own
        self._x = torch.zeros_like(x, memory_format=torch.channels_last)

        def work() -> None:
            self._out.copy_(own(self._x))

        for _ in range(2):  # in which libraries set themselves up
            self._out = own(self._x)
        recording = self._new()
        recording.capture(work)
        self._recording = recording

    def __call__(self, x: Tensor) -> Tensor:
        self._x.copy_(x)
        self._recording.replay()
        return self._out.clone(memory_format=torch.contiguous_format)

    def describe(self) -> dict[str, Any]:
        return {"engine": self.name}

    def release(self) -> None:
        if self._recording is not None:
            self._recording.release()
        self._recording = self._network = self._x = self._out = None
