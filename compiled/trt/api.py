"""The door to TensorRT and TensorRT for RTX: which is here, on which GPU, and what of it is used.

Only names common to TensorRT 8.5 ... 11.4 and TensorRT for RTX 1.7 are used; what is younger or
gone is asked for before (docs/engines.md). Importing this module imports nothing of either.
"""

import importlib
import importlib.util
import logging
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from ..engine import Refused
from . import targets

AUTO, TRT, RTX = "auto", "tensorrt", "tensorrt-rtx"
MODULES = {TRT: "tensorrt", RTX: "tensorrt_rtx"}
HOW = {
    TRT: "pip install tensorrt (Linux and Windows, NVIDIA GPUs; about 2 GB)",
    RTX: "pip install tensorrt_rtx (Linux and Windows, GeForce RTX and its like; 95 MB)",
}
_THEN = "then restart ComfyUI; docs/engines.md says more"

# every function that is called, with its parameters, as the bindings' docstrings give them
CALLED = {
    "Logger": ("min_severity",),
    "ILogger": (),
    "ILogger.log": ("severity", "msg"),
    "Builder": ("logger",),
    "Builder.create_network": ("flags",),
    "Builder.create_builder_config": (),
    "Builder.create_optimization_profile": (),
    "Builder.build_serialized_network": ("network", "config"),
    "IBuilderConfig.set_flag": ("flag",),
    "IBuilderConfig.add_optimization_profile": ("profile",),
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
# of TensorRT alone: in TensorRT for RTX they do nothing, ask for a GPU, and are to go
CALLED_TIMING = {
    "IBuilderConfig.create_timing_cache": ("serialized_timing_cache",),
    "IBuilderConfig.set_timing_cache": ("cache", "ignore_mismatch"),
    "IBuilderConfig.get_timing_cache": (),
    "ITimingCache.serialize": (),
}
# of TensorRT for RTX alone
CALLED_RTX = {
    "IBuilderConfig.set_compute_capability": ("compute_capability", "index"),
    "ICudaEngine.create_runtime_config": (),
    "ICudaEngine.create_execution_context": ("runtime_config",),
    "IRuntimeConfig.create_runtime_cache": (),
    "IRuntimeConfig.set_runtime_cache": ("cache",),
    "IRuntimeCache.deserialize": ("blob",),
    "IRuntimeCache.serialize": (),
}
READ_RTX = (
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
    "DynamicShapesKernelSpecializationStrategy.LAZY",
)
# attributes and enumeration members that are read
READ = (
    "Logger.INTERNAL_ERROR",
    "Logger.ERROR",
    "Logger.WARNING",
    "OnnxParser.num_errors",
    "ICudaEngine.num_io_tensors",
    "ICudaEngine.refittable",
    "IHostMemory",
    "TensorIOMode.INPUT",
    "DataType.FLOAT",
    "DataType.HALF",
)
# used where it is there: these came or went between 8.5 and 11.4, or are not in both libraries
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


@dataclass(frozen=True)
class Library:
    """TensorRT or TensorRT for RTX, and what this version of it has.

    Attributes:
        name: TRT or RTX.
        module: its Python module.
    """

    name: str
    module: Any

    @property
    def version(self) -> str:
        return self.module.__version__

    @property
    def called(self) -> str:
        """As messages call it."""
        return "TensorRT for RTX" if self.name == RTX else "TensorRT"

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities that it can be told to build for; none: only for the GPU here."""
        known = getattr(self.module, "ComputeCapability", None)
        names = [] if known is None else known.__members__
        numbers = [name.removeprefix("SM") for name in names if name.startswith("SM")]
        return tuple(f"{number[:-1]}.{number[-1]}" for number in numbers)

    @property
    def typed(self) -> bool:
        """Whether the types of the ONNX file are taken as they are."""
        return hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    @property
    def times(self) -> bool:
        """Whether it measures kernels while it builds, so that a timing cache helps the next build.

        TensorRT for RTX compiles kernels where they run instead (runtime.py).
        """
        return not self.targets

    def flags(self) -> int:
        """Of a new network; the numbers behind the names differ between versions."""
        known = self.module.NetworkDefinitionCreationFlag
        wanted = [n for n in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(known, n)]
        return sum(1 << int(getattr(known, name)) for name in wanted)

    def capability(self, name: str) -> Any:
        """The member for a compute capability such as "8.9"."""
        return getattr(self.module.ComputeCapability, f"SM{name.replace('.', '')}")

    def listener(self) -> Any:
        """A logger that keeps what is reported as errors from now on; for builders.

        Not for what lives on: threads that compile beside a run would wait for Python in it, and
        whoever ends them for them. It stays for good, as the library may not have let go of it. An
        error recorder would be simpler: with one, TensorRT for RTX 1.7 crashes when a builder goes.
        """
        listener = _LISTENERS.get(self.module)
        if listener is None:
            listener = _LISTENERS[self.module] = _listener(self.module)
        listener.errors.clear()
        return listener


_LISTENERS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_KEPT_ERRORS = 8


def _listener(module: Any) -> Any:
    known = module.Logger
    bad, worth = (known.INTERNAL_ERROR, known.ERROR), known.WARNING

    class Listener(module.ILogger):
        def __init__(self):
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity, msg):
            if severity in bad:
                logging.error("LiveDiffusion: TensorRT: %s", msg)
                if len(self.errors) < _KEPT_ERRORS:
                    self.errors.append(" ".join(str(msg).split())[:300])
            elif severity == worth:
                logging.warning("LiveDiffusion: TensorRT: %s", msg)

    return Listener()


def because(listener: Any) -> str:
    """What was reported first, as the end of a sentence."""
    return f": {listener.errors[0]}" if listener.errors else "; its messages are in the log above"


def installed(name: str) -> bool:
    """Whether one of MODULES can be found. Imports nothing."""
    module = MODULES[name]
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


def missing() -> str | None:
    """Why no engine can run here and what to do, or None where one can. Imports nothing."""
    if not any(installed(name) for name in MODULES):
        here = gpu()
        fits = here is None or here["capability"] in targets.GPUS
        first, other = (RTX, TRT) if fits else (TRT, None)
        also = f", or {HOW[other]}" if other else ""
        return f"tensorrt not installed: {HOW[first]}{also}, {_THEN}"
    return None if gpu() else "TensorRT needs an NVIDIA GPU, and torch sees none here"


def load(name: str) -> Library:
    """One of the two libraries.

    Raises:
        Refused: it is not installed, does not load, or needs a GPU to load.
    """
    if not installed(name):
        raise Refused(f"{name} not installed: {HOW[name]}, {_THEN}")
    # without a driver TensorRT does not fail, it crashes the process; TensorRT for RTX builds
    if name == TRT and gpu() is None:
        raise Refused("TensorRT needs an NVIDIA GPU, and torch sees none here")
    try:
        return Library(name, importlib.import_module(MODULES[name]))
    except Exception as error:  # broken installations raise all kinds
        raise Refused(
            f"{name} is installed but does not load ({error}): {HOW[name]}, {_THEN}"
        ) from error


def chosen(name: str, asked: tuple[str, ...] | None) -> tuple[Library, tuple[str, ...], str]:
    """The library that builds an engine.

    Args:
        name: AUTO, TRT or RTX.
        asked: compute capabilities that the engine is for; None for the GPU here.

    Returns:
        The library, the compute capabilities to tell it (none for TensorRT, which builds for the
        GPU that it measures on), and why it is this one, in a few words.

    Raises:
        Refused: none can, and what to do.
    """
    here = gpu()
    if name == AUTO:
        name, why = _best(asked, here)
    else:
        why = "chosen"
    if name == TRT:
        if asked is not None and installed(TRT):
            raise Refused(
                "tensorrt builds for the GPU it runs on alone: choose targets this GPU, or library "
                "tensorrt-rtx"
            )
        return load(TRT), (), why
    library = load(RTX)
    if asked is None:
        if here is None:
            raise Refused("there is no NVIDIA GPU here to build for: choose targets by name")
        asked = (here["capability"],)
    known = tuple(c for c in asked if c in library.targets)
    if not known:
        raise Refused(
            f"tensorrt-rtx {library.version} does not build for {targets.named(asked)}, only for "
            f"{targets.named(library.targets)}: choose library tensorrt there ({HOW[TRT]})"
        )
    return library, known, why


def _best(asked: tuple[str, ...] | None, here: dict[str, Any] | None) -> tuple[str, str]:
    """The library for `auto`, and why."""
    if not any(installed(name) for name in MODULES):
        raise Refused(missing())
    if asked is not None:
        return RTX, "tensorrt builds for no other GPUs than the one here"
    if here is not None and here["capability"] not in targets.GPUS:
        reason = f"tensorrt-rtx does not run on compute capability {here['capability']}"
        if not installed(TRT):
            raise Refused(f"{reason}: {HOW[TRT]}, {_THEN}")
        return TRT, reason
    if not installed(RTX):
        return TRT, "tensorrt-rtx is not installed"
    if not installed(TRT):
        return RTX, "tensorrt is not installed"
    return RTX, "it builds in less time, for every GPU of a kind and not for this one alone"


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


def run(context: Any, device: torch.device, aside: "torch.cuda.Stream | None") -> bool:
    """Have an execution context do its work in the order of torch's current stream.

    On CUDA's default stream, which is ComfyUI's, TensorRT waits for the device in each call, and
    nothing can be captured as a CUDA graph: there the work goes to a stream of its own, `aside`.
    """
    if device.type != "cuda":
        return context.execute_async_v3(0)
    now = torch.cuda.current_stream(device)
    if now.cuda_stream or aside is None:
        return context.execute_async_v3(now.cuda_stream)
    aside.wait_stream(now)
    done = context.execute_async_v3(aside.cuda_stream)
    now.wait_stream(aside)
    return done


def dtype(module: Any, kind: Any) -> torch.dtype:
    """torch's type of a TensorRT DataType."""
    known = {
        "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16,
        "INT32": torch.int32, "INT64": torch.int64,
    }  # fmt: skip
    for name, own in known.items():
        if kind == getattr(module.DataType, name, object()):
            return own
    raise Refused(f"the engine has a tensor of type {kind}, which no UNet of ours has; rebuild it")
