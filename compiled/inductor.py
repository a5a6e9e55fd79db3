"""torch.compile as an engine."""

import shutil
import sys
import time
import types
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from .engine import Call, Refused, Shapes, UNet


def missing(device: torch.device) -> str | None:
    """What to install, or None where it can be used. Imports nothing."""
    import importlib.util

    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            package = "triton-windows" if sys.platform == "win32" else "triton"
            return f"triton not installed: pip install {package}"
        return None
    if device.type == "cpu":
        if any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
            return None
        return "no C++ compiler found; install g++ (Linux), Xcode tools (macOS) or MSVC (Windows)"
    return f"inductor is used on CUDA and CPU, not on {device.type}"


class Inductor:
    """The UNet compiled by torch.compile, one compilation per shape.

    Weights stay ComfyUI's: they are inputs of the compiled code, so LoRA and unloading need no new
    compilation.

    Args:
        backend: of torch.compile.
    """

    name = "inductor"
    bakes = False
    capturable = True
    placed = False
    per_shape = True

    def __init__(self, backend: str = "inductor"):
        self._backend = backend
        self._compiled: Any = None
        self.seconds = 0.0

    def scope(self, shapes: Shapes) -> Hashable:
        return shapes

    def prepare(self, unet: UNet, shapes: Shapes) -> None:
        """See Engine.prepare. Takes minutes for a big UNet.

        Raises:
            Refused: no compiler.
        """
        device = torch.device(shapes.device)
        reason = missing(device)
        if reason and self._backend == "inductor":
            raise Refused(reason)
        started = time.perf_counter()
        names = shapes.names
        if device.type != "cuda":
            unet = (
                unet.bare()
            )  # what ComfyUI takes there asks for free memory, which cannot compile

        # tensors only, in a fixed order: nothing else that could be guarded on
        def forward(*tensors: Tensor) -> Tensor:
            return unet(Call.of(dict(zip(names, tensors, strict=True))))

        self._compiled = torch.compile(_own_code(forward), backend=self._backend, dynamic=False)
        named = shapes.example().named().values()
        self._compiled(*(tensor.to(device) for tensor in named))
        self.seconds = time.perf_counter() - started

    def __call__(self, call: Call) -> Tensor:
        return self._compiled(*call.named().values())

    def moved(self) -> None:
        """Nothing to do: weights are looked up at each call."""

    def describe(self) -> dict[str, Any]:
        return {"engine": self.name, "seconds": {"compile": round(self.seconds, 3)}}

    def release(self) -> None:
        self._compiled = None


def _own_code(function: types.FunctionType) -> types.FunctionType:
    """The same function with a code object of its own.

    torch counts compilations by code object and after eight of one (recompile_limit) runs it as it
    is, without a word: the engines of all shapes, models and sessions would share them.
    """
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    own.__annotations__ = function.__annotations__
    return own
