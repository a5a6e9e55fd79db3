"""The UNet as a CUDA graph: one launch instead of hundreds."""

import contextlib
import time
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from .engine import Call, Shapes, UNet
from .graph import CudaRecording, Folded, Knobs, Recording, pool_size
from .layout import Led
from .weights import fixed

_WARM = 2  # runs before recording, in which libraries set themselves up


class CudaGraph:
    """The UNet recorded once per shape and replayed (performance notes: docs/performance.md).

    Weights are read where they lie, so a LoRA patched in place acts at once; it must not be called
    any more once they lie elsewhere.

    Args:
        recording: makes what records.
    """

    name = "cudagraph"
    bakes = False
    capturable = True
    placed = True
    per_shape = True
    remembers = False
    mixes = False

    def __init__(self, recording: Callable[[], Recording] = CudaRecording):
        self._new = recording
        self._recording: Recording | None = None
        self._stale = False
        self.seconds = 0.0

    def scope(self, shapes: Shapes) -> Hashable:
        return shapes

    def prepare(self, unet: UNet, shapes: Shapes) -> None:
        """See Engine.prepare.

        Raises:
            WeightsAway: the weights are not all on the device.
        """
        started = time.perf_counter()
        fixed(unet.module, shapes.device)
        named = {
            name: tensor.to(shapes.device) for name, tensor in shapes.example().named().items()
        }
        self._knobs = Knobs(named)
        call = Call.of(self._knobs.tensors)
        self._folded = Folded(unet.module, call.context) if call.context is not None else None
        self._led = Led(unet.module)

        def work() -> None:
            self._out.copy_(unet(call))

        self._led.try_on(lambda: unet(call))
        with contextlib.ExitStack() as inside:
            inside.enter_context(self._led.inside())
            if self._folded is not None:
                inside.enter_context(self._folded.inside())
            for _ in range(_WARM):
                self._out = unet(call)
            self._recording = self._new()
            self._recording.capture(work)
        self.seconds = time.perf_counter() - started

    def __call__(self, call: Call) -> Tensor:
        named = call.named()
        new = self._knobs.fill(named, frozenset(named) - {"context"})
        if self._folded is not None and (self._stale or "context" in new):
            self._folded.prompt(self._knobs.tensors["context"])
        if self._stale:
            self._led.read()
        self._stale = False
        self._recording.replay()
        return self._out.clone()

    def moved(self) -> None:
        self._stale = True

    def describe(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "seconds": {"capture": round(self.seconds, 3)},
            "pool_mb": round(pool_size() / 2**20, 1),
            **self._led.told(),
        }

    def release(self) -> None:
        if self._recording is not None:
            self._recording.release()
        self._recording = self._folded = self._led = self._out = None
        self._stale = False
