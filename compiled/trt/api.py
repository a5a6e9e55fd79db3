"""The door to TensorRT: whether it is here, on which GPU, and what of it is used.

Only names common to 8.5 ... 11.4 are used; what is younger or gone is asked for before
(docs/engines.md). Importing this module imports nothing of TensorRT.
"""

import importlib
import importlib.util
import sys
from typing import Any

import torch

from ..engine import Refused

HOW = (
    "pip install tensorrt (Linux and Windows, NVIDIA GPUs; about 2 GB), then restart ComfyUI; "
    "docs/engines.md says more"
)

# every function that is called, with its parameters, as the bindings' docstrings give them
CALLED = {
    "Logger": ("min_severity",),
    "Builder": ("logger",),
    "Builder.create_network": ("flags",),
    "Builder.create_builder_config": (),
    "Builder.create_optimization_profile": (),
    "Builder.build_serialized_network": ("network", "config"),
    "IBuilderConfig.set_flag": ("flag",),
    "IBuilderConfig.add_optimization_profile": ("profile",),
    "IBuilderConfig.create_timing_cache": ("serialized_timing_cache",),
    "IBuilderConfig.set_timing_cache": ("cache", "ignore_mismatch"),
    "IBuilderConfig.get_timing_cache": (),
    "ITimingCache.serialize": (),
    "IOptimizationProfile.set_shape": ("input", "min", "opt", "max"),
    "OnnxParser": ("network", "logger"),
    "OnnxParser.parse_from_file": ("model",),
    "OnnxParser.get_error": ("index",),
    "Runtime": ("logger",),
    "Runtime.deserialize_cuda_engine": ("serialized_engine",),
    "ICudaEngine.get_tensor_name": ("index",),
    "ICudaEngine.get_tensor_mode": ("name",),
    "ICudaEngine.get_tensor_dtype": ("name",),
    "ICudaEngine.create_execution_context": (),
    "IExecutionContext.set_input_shape": ("name", "shape"),
    "IExecutionContext.infer_shapes": (),
    "IExecutionContext.get_tensor_shape": ("name",),
    "IExecutionContext.set_tensor_address": ("name", "memory"),
    "IExecutionContext.execute_async_v3": ("stream_handle",),
    "Refitter": ("engine", "logger"),
    "Refitter.get_all_weights": (),
    "Refitter.set_named_weights": ("name", "weights"),
    "Refitter.refit_cuda_engine": (),
    "Weights": ("a",),
}
# attributes and enumeration members that are read
READ = (
    "Logger.WARNING",
    "OnnxParser.num_errors",
    "ICudaEngine.num_io_tensors",
    "ICudaEngine.refittable",
    "IHostMemory",
    "TensorIOMode.INPUT",
    "DataType.FLOAT",
    "DataType.HALF",
)
# used where it is there: these came or went between 8.5 and 11.4
DETECTED = (
    "BuilderFlag.FP16",
    "BuilderFlag.BF16",
    "BuilderFlag.REFIT_INDIVIDUAL",
    "DataType.BF16",
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "INetworkDefinition.mark_weights_refittable",
    "IProgressMonitor",
    "ICudaEngine.device_memory_size",
    "ICudaEngine.device_memory_size_v2",
)


def missing() -> str | None:
    """What to install or what is not there, or None where it can be used. Imports nothing."""
    if sys.modules.get("tensorrt") is None and importlib.util.find_spec("tensorrt") is None:
        return f"tensorrt not installed: {HOW}"
    # without a driver TensorRT does not fail, it crashes the process
    return None if gpu() else "TensorRT needs an NVIDIA GPU, and torch sees none here"


def load() -> Any:
    """The tensorrt module.

    Raises:
        Refused: it is not installed, does not load, or there is no GPU.
    """
    reason = missing()
    if reason:
        raise Refused(reason)
    try:
        return importlib.import_module("tensorrt")
    except Exception as error:  # broken installations raise all kinds
        raise Refused(f"tensorrt is installed but does not load ({error}): {HOW}") from error


def gpu() -> dict[str, Any] | None:
    """What an engine depends on of the GPU and its driver, or None without one."""
    if not torch.cuda.is_available():
        return None
    at = torch.cuda.current_device()
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return {
        "gpu": torch.cuda.get_device_name(at),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(at))),
        "cuda_driver": driver // 1000,
    }


def stream(device: torch.device) -> int:
    """Handle of the stream that torch works on now."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def dtype(module: Any, kind: Any) -> torch.dtype:
    """torch's type of a TensorRT DataType."""
    known = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}
    for name, own in known.items():
        if kind == getattr(module.DataType, name, object()):
            return own
    raise Refused(f"the engine has a tensor of type {kind}, which no UNet of ours has; rebuild it")
