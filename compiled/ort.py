"""ONNX Runtime as an engine: a compiled UNet wherever it is installed, CPUs included."""

import importlib.util
import pathlib
import tempfile
import time
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from .engine import Call, Refused, Shapes, UNet
from .onnx_export import ROWS, SIZE, TOKENS, Exported, export, needed

_NO_CUDA = (
    "this onnxruntime has no CUDA: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
)
_HOW = "pip install onnx onnxruntime (onnxruntime-gpu for CUDA)"


def missing(device: torch.device | None = None) -> str | None:
    """What to install, or None where it can be used, on a device if one is given.

    Imports nothing.
    """
    absent = [p for p in ("onnx", "onnxruntime") if importlib.util.find_spec(p) is None]
    if absent:
        return f"{' and '.join(absent)} not installed: {_HOW}"
    if device is None or device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"ONNX Runtime is used on CPU and CUDA, not on {device.type}"
    places = importlib.util.find_spec("onnxruntime").submodule_search_locations or ()
    libraries = (pathlib.Path(place, "capi").glob("*providers_cuda*") for place in places)
    return None if any(map(any, libraries)) else _NO_CUDA


class OnnxRuntime:
    """The UNet run by ONNX Runtime, on the device of the calls.

    One file serves every number of rows, size and prompt length; weights are those at `prepare`.

    Attributes:
        seconds: that the export and making the session took.
    """

    name = "onnxruntime"
    bakes = True
    capturable = False
    placed = False
    per_shape = False

    def __init__(self) -> None:
        self._session = None
        self._folder: tempfile.TemporaryDirectory | None = None
        self.seconds = {"export": 0.0, "session": 0.0}

    def scope(self, shapes: Shapes) -> Hashable:
        return shapes.names, shapes.dtype, shapes.device

    def prepare(self, unet: UNet, shapes: Shapes) -> None:
        """See Engine.prepare.

        Raises:
            Refused: not installed, or a UNet or device it cannot take.
        """
        self._import()
        needed()
        # the CPU's kernels know no bfloat16
        dtype = torch.float32 if shapes.dtype == "bfloat16" else getattr(torch, shapes.dtype)
        folder = tempfile.TemporaryDirectory(prefix="livediffusion-", ignore_cleanup_errors=True)
        try:
            started = time.perf_counter()
            exported = export(
                unet,
                shapes.example(),
                pathlib.Path(folder.name) / "unet.onnx",
                dtype,
                frozenset({ROWS, SIZE, TOKENS}),
            )
            self.seconds["export"] = time.perf_counter() - started
            self.load(exported, shapes.device)
        except BaseException:
            folder.cleanup()
            raise
        self._folder = folder

    def load(self, exported: Exported, device: str = "cpu") -> None:
        """Make the session of a file that is there already."""
        onnxruntime = self._import()
        started = time.perf_counter()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        # its threads would go on turning after a call and take the cores from what comes next
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        kind, _, index = device.partition(":")
        providers: list[Any] = ["CPUExecutionProvider"]
        if reason := missing(torch.device(device)):
            raise Refused(reason)
        if kind == "cuda":
            own = {
                "device_id": int(index or 0),
                "user_compute_stream": str(torch.cuda.current_stream(device).cuda_stream),
            }
            providers.insert(0, ("CUDAExecutionProvider", own))
        self._session = onnxruntime.InferenceSession(
            str(exported.path), options, providers=providers
        )
        self._inputs = {entry.name: _TYPES[entry.type] for entry in self._session.get_inputs()}
        self.seconds["session"] = time.perf_counter() - started

    def __call__(self, call: Call) -> Tensor:
        named = call.named()
        fed = {
            name: named[name].detach().to(dtype).contiguous()
            for name, dtype in self._inputs.items()
        }
        if call.x.device.type == "cpu":
            out = self._session.run(None, {name: t.numpy() for name, t in fed.items()})[0]
            return torch.from_numpy(out).to(call.x.dtype)
        return self._bound(fed, call.x).to(call.x.dtype)

    def _bound(self, fed: dict[str, Tensor], x: Tensor) -> Tensor:
        """On the GPU: tensors are handed over where they lie."""
        import numpy as np

        binding = self._session.io_binding()
        place = ("cuda", x.device.index or 0)
        for name, tensor in fed.items():
            kind = np.float16 if tensor.dtype is torch.float16 else np.float32
            binding.bind_input(name, *place, kind, tuple(tensor.shape), tensor.data_ptr())
        out = torch.empty_like(x, dtype=self._inputs["x"], memory_format=torch.contiguous_format)
        kind = np.float16 if out.dtype is torch.float16 else np.float32
        name = self._session.get_outputs()[0].name
        binding.bind_output(name, *place, kind, tuple(out.shape), out.data_ptr())
        self._session.run_with_iobinding(binding)
        return out

    def moved(self) -> None:
        """Nothing to do: it has weights of its own."""

    def describe(self) -> dict[str, Any]:
        providers = self._session.get_providers() if self._session else []
        return {
            "engine": self.name,
            "provider": providers[0].removesuffix("ExecutionProvider") if providers else None,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    def release(self) -> None:
        self._session = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    @staticmethod
    def _import() -> Any:
        reason = missing()
        if reason:
            raise Refused(reason)
        import onnxruntime

        return onnxruntime


_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
