"""The UNet as a CUDA graph: one launch instead of hundreds."""

import contextlib
import time
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from .engine import Call, Shapes, UNet
from .graph import CudaRecording, Folded, Knobs, Recording, fused_norms
from .weights import addresses, fixed

_WARM = 2  # runs before recording, in which libraries set themselves up


class CudaGraph:
    """The UNet recorded once per shape and replayed (performance notes: docs/performance.md).

    Weights are read where they lie, so a LoRA patched in place acts at once; where ComfyUI moves
    them, it is recorded anew.

    Args:
        recording: makes what records.
    """

    name = "cudagraph"
    bakes = False
    capturable = True

    def __init__(self, recording: Callable[[], Recording] = CudaRecording):
        self._new = recording
        self._recording: Recording | None = None
        self._unet: UNet | None = None
        self._stale = False
        self._addresses: tuple[int, ...] = ()
        self.seconds = 0.0
        self.captures = 0

    def scope(self, shapes: Shapes) -> Hashable:
        return shapes

    def prepare(self, unet: UNet, shapes: Shapes) -> None:
        """See Engine.prepare.

        Raises:
            Refused: the weights are not all on the device.
        """
        started = time.perf_counter()
        fixed(unet.module, shapes.device)
        self._unet = unet
        named = {
            name: tensor.to(shapes.device) for name, tensor in shapes.example().named().items()
        }
        self._knobs = Knobs(named)
        call = Call.of(self._knobs.tensors)
        self._folded = Folded(unet.module, call.context) if call.context is not None else None
        for _ in range(_WARM):
            unet(call)
        self._recording = self._new()

        def work() -> Tensor:
            with contextlib.ExitStack() as inside:
                inside.enter_context(fused_norms(unet.module))
                if self._folded is not None:
                    inside.enter_context(self._folded.inside())
                return unet(call)

        self._out = self._recording.capture(work)
        self._addresses = addresses(unet.module)
        self.captures += 1
        self.seconds = time.perf_counter() - started

    def __call__(self, call: Call) -> Tensor:
        if self._stale:
            self._refresh(Shapes.of(call))
        named = call.named()
        new = self._knobs.fill(named, frozenset(named) - {"context"})
        if self._folded is not None and "context" in new:
            self._folded.prompt(self._knobs.tensors["context"])
        self._recording.replay()
        return self._out.clone()

    def moved(self) -> None:
        self._stale = True

    def _refresh(self, shapes: Shapes) -> None:
        """ComfyUI has touched the weights: record anew if they lie elsewhere."""
        self._stale = False
        if addresses(self._unet.module) != self._addresses:
            unet = self._unet
            self.release()
            self.prepare(unet, shapes)
        elif self._folded is not None:
            self._folded.prompt(self._knobs.tensors["context"])

    def describe(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "seconds": {"capture": round(self.seconds, 3)},
            "captures": self.captures,
        }

    def release(self) -> None:
        if self._recording is not None:
            self._recording.release()
        self._recording = self._folded = self._unet = self._out = None
        self._stale = False
