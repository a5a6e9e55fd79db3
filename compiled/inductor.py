"""torch.compile as an engine."""

import contextlib
import shutil
import sys
import threading
import time
import types
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from .engine import Call, Outdated, Refused, Shapes, UNet, WeightsAway

# torch.compile can be told since then to refuse what would have to be compiled again
_STANCES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)
# the stance is the whole process's, so that a call that forbids it must not meet a compilation
_compiling = threading.Lock()


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
    """The UNet compiled by torch.compile as one graph, one compilation per shape.

    Weights stay ComfyUI's: they are inputs of the compiled code, so LoRA and unloading need no new
    compilation. Nothing is ever compiled in a call, which would stop a stream for minutes.

    Args:
        backend: of torch.compile.
    """

    name = "inductor"
    bakes = False
    placed = False
    per_shape = True
    remembers = False
    mixes = False

    def __init__(self, backend: str = "inductor"):
        self._backend = backend
        self._compiled: Any = None
        self._doubt = False  # whether the weights may be of another kind than those compiled for
        self.capturable = not _apart()
        self.seconds = 0.0

    def scope(self, shapes: Shapes) -> Hashable:
        return shapes

    def prepare(self, unet: UNet, shapes: Shapes) -> None:
        """See Engine.prepare. Takes minutes for a big UNet.

        Raises:
            Refused: no compiler, or it is not one graph, and where it breaks.
        """
        device = torch.device(shapes.device)
        reason = missing(device)
        if reason and self._backend == "inductor":
            raise Refused(reason)
        started = time.perf_counter()
        example = [tensor.to(device) for tensor in shapes.example().named().values()]
        # what ComfyUI takes for attention on a CPU asks for free memory, which cannot be compiled,
        # and so may what the user has chosen
        ways = [unet.bare()] if device.type == "cpu" else [unet, unet.bare()]
        with _compiling:
            for last, way in zip((*[False] * (len(ways) - 1), True), ways, strict=True):
                self._compiled = torch.compile(
                    _forward(way, shapes.names), backend=self._backend, dynamic=False,
                    fullgraph=True,
                )  # fmt: skip
                try:
                    self._compiled(*example)
                    break
                except torch._dynamo.exc.Unsupported as error:
                    if last:
                        raise Refused(
                            f"torch.compile cannot take this UNet as one graph: {_first(error)}"
                        ) from error
        self._doubt = False
        self.seconds = time.perf_counter() - started

    def __call__(self, call: Call) -> Tensor:
        """See Engine.

        Raises:
            Outdated: the weights are of a kind that it was not compiled for.
            WeightsAway: they may be, and that cannot be asked now.
        """
        with self._as_compiled():
            return self._compiled(*call.named().values())

    @contextlib.contextmanager
    def _as_compiled(self):
        """Inside, torch compiles nothing."""
        if not _STANCES:
            yield
            return
        if not _compiling.acquire(blocking=False):
            if self._doubt:
                raise WeightsAway("the weights have changed while another shape is compiled")
            yield
            return
        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                yield
            self._doubt = False
        except RuntimeError as error:
            if "fail_on_recompile" not in str(error):
                raise
            raise Outdated("the weights are of another kind; it is compiled anew") from error
        finally:
            _compiling.release()

    def moved(self) -> None:
        self._doubt = True

    def describe(self) -> dict[str, Any]:
        told = {"engine": self.name, "seconds": {"compile": round(self.seconds, 3)}}
        return told if self.capturable else {**told, "tick": f"not recorded as a whole: {_apart()}"}

    def release(self) -> None:
        self._compiled = None


def _forward(unet: UNet, names: tuple[str, ...]) -> types.FunctionType:
    """The UNet as a function of tensors only, in a fixed order: nothing else can be guarded on."""

    def forward(*tensors: Tensor) -> Tensor:
        return unet(Call.of(dict(zip(names, tensors, strict=True))))

    return _own_code(forward)


def _apart() -> str:
    """Why no CUDA graph can take what is compiled in; empty where one can."""
    if torch.cuda.is_available() and torch.cuda.get_allocator_backend() == "cudaMallocAsync":
        # what inductor launches its kernels by asks the driver about every pointer
        return "its kernels take no memory of cudaMallocAsync (--disable-cuda-malloc)"
    return ""


def _first(error: Exception) -> str:
    """What torch says first."""
    return str(error).strip().partition("\n")[0].rstrip(".")


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
