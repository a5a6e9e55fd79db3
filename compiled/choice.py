"""Which engines there are, which of them work here, and which one `auto` takes."""

import sys
from collections.abc import Callable

import torch

from . import ort
from .engine import Eager, Engine, Refused

AUTO = "auto"


def _cudagraph(device: torch.device) -> Engine:
    from .cudagraph import CudaGraph

    return CudaGraph()


def _inductor(device: torch.device) -> Engine:
    from .inductor import Inductor

    return Inductor()


# in the order of LiveCompile's list
ENGINES: dict[str, Callable[[torch.device], Engine]] = {
    "cudagraph": _cudagraph,
    "inductor": _inductor,
    "onnxruntime": lambda device: ort.OnnxRuntime(),
    "eager": lambda device: Eager(),
}


def missing(name: str, device: torch.device) -> str | None:
    """Why an engine cannot run on a device and what to do; None where it can. Imports nothing."""
    if name == "cudagraph" and device.type != "cuda":
        return f"CUDA graphs need an NVIDIA GPU, and the model runs on {device.type}"
    if name == "inductor":
        from .inductor import missing as absent

        return absent(device)
    return ort.missing() if name == "onnxruntime" else None


def chosen(name: str, device: torch.device) -> tuple[str, str]:
    """The engine for a choice of the user's, and why, in a few words.

    Raises:
        Refused: it does not work here, and what to install.
    """
    if name != AUTO:
        reason = missing(name, device)
        if reason:
            raise Refused(reason)
        return name, "chosen"
    if device.type == "cuda":
        return "cudagraph", (
            "an NVIDIA GPU is here, and recording the UNet takes a second; inductor and TensorRT "
            "are faster, but take minutes to build"
        )
    if device.type == "cpu":
        return "eager", "on a CPU the others gain little (docs/engines.md)"
    return "eager", f"nothing else runs on {device.type} ({sys.platform})"


def make(name: str, device: torch.device) -> Engine:
    """An engine by name."""
    return ENGINES[name](device)
