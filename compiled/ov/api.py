"""OpenVINO itself: whether it is here, what it runs on, and with which settings."""

import functools
import importlib
import importlib.util
from typing import Any

import torch

from ..engine import Refused
from ..precision import BFLOAT16, DEFAULT, FLOAT16, INT8

AUTO = "auto"
DEVICES = ("CPU", "GPU", "NPU")
_HOW = "pip install openvino onnx"
# what OpenVINO calls a precision, for what is not quantised and among a device's capabilities
_HINT = {DEFAULT: "f32", FLOAT16: "f16", BFLOAT16: "bf16"}
_CAPABILITY = {DEFAULT: "FP32", FLOAT16: "FP16", BFLOAT16: "BF16", INT8: "INT8"}


def missing() -> str | None:
    """What to install, or None where it can be used. Imports nothing."""
    absent = [p for p in ("onnx", "openvino") if _is_absent(p)]
    return f"{' and '.join(absent)} not installed: {_HOW}" if absent else None


def _is_absent(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ValueError:  # a module that is there and has no spec
        return True


def needed() -> Any:
    """The openvino package.

    Raises:
        Refused: it, or onnx, is not installed, or does not load.
    """
    reason = missing()
    if reason:
        raise Refused(reason)
    try:
        return importlib.import_module("openvino")
    except Exception as error:  # its libraries, or what it needs of others
        raise Refused(f"openvino is installed and does not load ({error}): {_HOW}") from error


@functools.cache
def core() -> Any:
    """OpenVINO's Core; its plugins are loaded once in a process."""
    return needed().Core()


def version() -> str:
    """OpenVINO's, in full."""
    return needed().get_version()


def placed(device: str, precision: str = DEFAULT) -> str:
    """The device by OpenVINO's name, if it is here and computes in this precision.

    Args:
        device: "auto", "CPU", "GPU" or "NPU".

    Raises:
        Refused: there is no such device, or it does not compute so; what is there is said.
    """
    here = core().available_devices
    name = "CPU" if device == AUTO else device
    if not any(one.partition(".")[0] == name for one in here):
        raise Refused(f"device: OpenVINO finds no {name} here, only {', '.join(here)}")
    can = core().get_property(name, "OPTIMIZATION_CAPABILITIES")
    if _CAPABILITY[precision] not in can:
        wide = [ours for ours, theirs in _CAPABILITY.items() if theirs in can]
        what = "float32" if precision == DEFAULT else precision
        raise Refused(
            f"precision: this {name} does not compute in {what}; it does in {', '.join(wide)}"
        )
    return name


def refused(device: torch.device, place: str, precision: str) -> str | None:
    """Why it cannot take a network that torch has on a device; None where it can.

    Imports OpenVINO only where it is installed and something is asked of it.
    """
    reason = missing()
    if reason is not None:
        return reason
    if device.type != "cpu":
        return f"OpenVINO takes what is on the CPU, and this is on {device.type}"
    if (place, precision) != (AUTO, DEFAULT):
        try:
            placed(place, precision)
        except Refused as why:
            return str(why)
    return None


def label(device: str) -> str:
    """What a device is called by its maker."""
    return core().get_property(device, "FULL_DEVICE_NAME").strip()


def threads() -> int:
    """Of a call on the processor: torch's number, less one for the loop where there are four."""
    most = torch.get_num_threads()
    return most - 1 if most >= 4 else most


def settings(device: str, precision: str) -> dict[str, Any]:
    """How a network is compiled; always in words, as OpenVINO takes bfloat16 by itself."""
    if precision == INT8:
        # what is not quantised; bfloat16 costs next to nothing beside int8's error
        can = core().get_property(device, "OPTIMIZATION_CAPABILITIES")
        rest = next((one for one in (BFLOAT16, FLOAT16) if _CAPABILITY[one] in can), DEFAULT)
    else:
        rest = precision
    asked: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _HINT[rest]}
    if device == "CPU":
        # torch's threads are pinned to nothing, and would wait on cores that OpenVINO has taken
        asked |= {
            "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads(), "ENABLE_CPU_PINNING": False,
        }  # fmt: skip
    return asked
