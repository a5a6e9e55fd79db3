"""The UNet run by OpenVINO."""

import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..engine import Call, Refused, Shapes, UNet
from ..exports import exported
from ..precision import INT8, Against
from . import api, int8
from .network import Asked, Compiling
from .program import Program


class OpenVino:
    """The UNet run by OpenVINO, for models on the CPU; made for one shape.

    The weights are those at `prepare`. float32 whatever the model is in, unless asked for less.

    Args:
        asked: device, precision and cache.
        note: called with a line for people once there is something to say.

    Attributes:
        seconds: that the export and compiling took.
        error: against the UNet on the first call, relative RMS; None before that.
    """

    name = "openvino"
    bakes = True
    capturable = False
    placed = False
    per_shape = True

    def __init__(self, asked: Asked | None = None, note: Callable[[str], None] = lambda text: None):
        self._asked, self._note = asked or Asked(), note
        self._compiling: Compiling | None = None
        self._program: Program | None = None
        self._observer: int8.Observer | None = None
        self._against: Against | None = None
        self._made_of: tuple[UNet, Shapes, torch.dtype] | None = None
        self._export = 0.0

    def scope(self, shapes: Shapes) -> Hashable:
        return shapes

    def prepare(self, unet: UNet, shapes: Shapes) -> None:
        """See Engine.prepare.

        Raises:
            Refused: not installed, or a UNet, device or precision it cannot take.
        """
        api.needed()
        if shapes.device != "cpu":
            raise Refused(f"OpenVINO takes models on the CPU, and this one is on {shapes.device}")
        api.placed(self._asked.device, self._asked.precision)
        dtype = torch.float16 if shapes.dtype == "float16" else torch.float32
        began = time.perf_counter()
        with exported(unet, shapes, dtype) as path:
            self._export = time.perf_counter() - began
            compiling = Compiling(dict(shapes.sizes), self._asked)
            if self._asked.precision == INT8:
                self._observer = compiling.observer(path)
            else:
                self._program = compiling.program(path)
        self._compiling, self._against = compiling, Against(unet)
        self._made_of = unet, shapes, dtype

    def __call__(self, call: Call) -> Tensor:
        named = call.named()
        if self._observer is not None:
            return self._observed(named).to(call.x.dtype)
        out = self._program(named).to(call.x.dtype)
        if self._against.look(call, out):
            self._made_of = None
            self._note(self._said())
        return out

    def _observed(self, named: dict[str, Tensor]) -> Tensor:
        """A call in float32; after the last one what was seen becomes the network in int8."""
        out = self._observer(named)
        if self._observer.frames >= int8.FRAMES:
            with exported(*self._made_of) as path:
                self._program = self._compiling.program(path, self._observer.ranges)
            self._observer = None
        return out

    def _said(self) -> str:
        what = "float32" if self._asked.precision == "default" else self._asked.precision
        return (
            f"{what} on the {self._compiling.device}, relative error {self._against.error:.1e} "
            "against the UNet itself"
        )

    def moved(self) -> None:
        """Nothing to do: it has weights of its own."""

    @property
    def error(self) -> float | None:
        return None if self._against is None else self._against.error

    def describe(self) -> dict[str, Any]:
        told: dict[str, Any] = {"engine": self.name, "precision": self._asked.precision}
        if self._compiling is not None:
            told |= {
                "device": self._compiling.device,
                "maker": api.label(self._compiling.device),
                "seconds": {
                    "export": round(self._export, 3),
                    "compile": round(self._compiling.seconds, 3),
                },
                "kept": self._compiling.kept,
                "error": self.error,
            }
        return told

    def release(self) -> None:
        self._program = self._observer = self._compiling = self._against = None
        self._made_of = None
