"""Which engines there are, which of them work here, and which one `auto` takes."""

import pathlib
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import bfloat16, ort
from .engine import Eager, Engine, Refused
from .kept import Kept
from .ov import api as openvino
from .precision import BFLOAT16, DEFAULT

AUTO = "auto"


@dataclass(frozen=True)
class Wish:
    """What is asked for besides an engine's name.

    Attributes:
        precision: of compiled.precision.
        place: the device that OpenVINO runs on: "auto", "CPU", "GPU" or "NPU".
        folder: where compiled networks and measurements are kept; None keeps none.
        note: called with what the engine finds out about itself.
    """

    precision: str = DEFAULT
    place: str = openvino.AUTO
    folder: pathlib.Path | None = None
    note: Callable[[str], None] = lambda text: None


def _cudagraph(device: torch.device, wish: Wish) -> Engine:
    from .cudagraph import CudaGraph

    return CudaGraph()


def _inductor(device: torch.device, wish: Wish) -> Engine:
    from .inductor import Inductor

    return Inductor()


def _openvino(device: torch.device, wish: Wish) -> Engine:
    from .ov.network import Asked
    from .ov.unet import OpenVino

    return OpenVino(Asked(wish.place, wish.precision, wish.folder), wish.note)


def _eager(device: torch.device, wish: Wish) -> Engine:
    return bfloat16.Bfloat16(wish.note) if wish.precision == BFLOAT16 else Eager()


# in the order of LiveCompile's list
ENGINES: dict[str, Callable[[torch.device, Wish], Engine]] = {
    "cudagraph": _cudagraph,
    "inductor": _inductor,
    "onnxruntime": lambda device, wish: ort.OnnxRuntime(),
    "openvino": _openvino,
    "eager": _eager,
}


def missing(name: str, device: torch.device, wish: Wish = Wish()) -> str | None:
    """Why an engine cannot run on a device and what to do; None where it can.

    Imports nothing, but for OpenVINO where it is installed and a device or precision is asked for.
    """
    if name == "openvino":
        return openvino.refused(device, wish.place, wish.precision)
    if wish.place != openvino.AUTO:
        return f"device: only openvino has a choice of devices, and {name} is chosen"
    if name == "eager" and wish.precision == BFLOAT16:
        return bfloat16.missing(device)
    if wish.precision != DEFAULT:
        return f"precision: {name} has the model's own; {wish.precision} needs openvino" + (
            " or eager" if wish.precision == BFLOAT16 else ""
        )
    if name == "cudagraph" and device.type != "cuda":
        return f"CUDA graphs need an NVIDIA GPU, and the model runs on {device.type}"
    if name == "inductor":
        from .inductor import missing as absent

        return absent(device)
    return ort.missing(device) if name == "onnxruntime" else None


def chosen(name: str, device: torch.device, wish: Wish = Wish()) -> tuple[str, str]:
    """The engine for a choice of the user's, and why, in a few words.

    Raises:
        Refused: it does not work here, and what to install or to choose.
    """
    if name == AUTO:
        name, why = _best(device, wish)
    else:
        why = "chosen"
    reason = missing(name, device, wish)
    if reason:
        raise Refused(reason)
    return name, why


def _best(device: torch.device, wish: Wish) -> tuple[str, str]:
    asked = (wish.place, wish.precision) != (openvino.AUTO, DEFAULT)
    if device.type == "cuda":
        return "cudagraph", (
            "an NVIDIA GPU is here, and recording the UNet takes a second; inductor and TensorRT "
            "are faster, but take minutes to build"
        )
    if device.type == "cpu" and openvino.missing() is None:
        return "openvino", "it has what is asked for" if asked else "if it is faster here"
    if device.type == "cpu":
        if asked and wish.precision != BFLOAT16:
            return "openvino", "it alone has what is asked for"
        return "eager", f"nothing faster is installed ({openvino.missing()})"
    return "eager", f"nothing else runs on {device.type} ({sys.platform})"


def make(name: str, device: torch.device, wish: Wish = Wish()) -> Engine:
    """An engine by name."""
    return ENGINES[name](device, wish)


def make_faster(name: str, device: torch.device, wish: Wish = Wish()) -> Engine:
    """An engine by name that runs only where it is measured faster than eager."""
    from .faster import Faster

    kept = Kept(None if wish.folder is None else wish.folder / "measured.json")
    return Faster(lambda: make(name, device, wish), kept, _about, wish.note)


def _about() -> str:
    """What the speed of an engine on a processor depends on, besides the network."""
    threads = torch.get_num_threads()
    processor = openvino.label("CPU") if openvino.missing() is None else platform.processor()
    return f"{processor}, {threads} threads, torch {torch.__version__}, {openvino.version()}"
