"""The UNet in bfloat16 by torch, for a processor that multiplies it."""

import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .engine import EXACT, Call, Refused, Shapes, UNet, dtype_of
from .precision import Against, missing_bfloat16


class Bfloat16:
    """A copy of the UNet in bfloat16, its convolutions with channels last.

    Only the UNet: what comes in is rounded for it and what goes out is in x's dtype again, so the
    state of the sampling stays in float32.

    Args:
        note: called with a line for people once there is something to say.
    """

    name = "eager"
    bakes = True
    capturable = False
    placed = False
    per_shape = False
    remembers = True
    mixes = True

    def __init__(self, note: Callable[[str], None] = lambda text: None):
        self._note = note
        self._unet: UNet | None = None
        self._against: Against | None = None
        self._seconds = 0.0

    def scope(self, shapes: Shapes) -> Hashable:
        return shapes.dtype, shapes.device

    def prepare(self, unet: UNet, shapes: Shapes) -> None:
        """See Engine.prepare.

        Raises:
            Refused: no UNet, weights that are not there, or a device that gains nothing.
        """
        reason = missing(torch.device(shapes.device))
        if reason:
            raise Refused(reason)
        began = time.perf_counter()
        own = unet.traceable(torch.bfloat16)
        if own.module is not unet.module:
            own.module.to(memory_format=torch.channels_last)
        self._unet, self._against = own, Against(unet)
        self._seconds = time.perf_counter() - began

    def __call__(self, call: Call) -> Tensor:
        out = self._unet(_rounded(call)).to(call.x.dtype)
        if self._against.look(call, out):
            error = self._against.error
            self._note(f"bfloat16 by torch, relative error {error:.1e} against the UNet itself")
        return out

    def moved(self) -> None:
        """Nothing to do: it has weights of its own."""

    def describe(self) -> dict[str, Any]:
        return {
            "engine": self.name, "precision": "bfloat16",
            "seconds": {"copy": round(self._seconds, 3)},
            "error": None if self._against is None else self._against.error,
        }  # fmt: skip

    def release(self) -> None:
        self._unet = self._against = None


def missing(device: torch.device) -> str | None:
    """Why bfloat16 by torch is not for this device; None where it is."""
    if device.type != "cpu":
        return (
            f"precision: on {device.type} ComfyUI chooses the model's precision; load it with "
            "another weight_dtype, or start ComfyUI with --bf16-unet"
        )
    reason = missing_bfloat16()
    return None if reason is None else f"precision: {reason}; choose default"


def _rounded(call: Call) -> Call:
    named = {}
    for name, tensor in call.named().items():
        if name not in EXACT:
            tensor = tensor.to(dtype_of(name, torch.bfloat16))
            if tensor.ndim == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
        named[name] = tensor
    return Call.of(named, call.memory, call.reuse)
