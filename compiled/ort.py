"""ONNX Runtime as an engine: a compiled UNet wherever it is installed, CPUs included."""

import importlib.util
import pathlib
import tempfile
import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from .engine import Call, Refused, Shapes, UNet
from .graph import Knobs
from .onnx_export import EVERY, OUTPUT, Exported, export, needed

_NO_CUDA = (
    "this onnxruntime has no CUDA: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
)
_KEPT = 4  # shapes whose buffers are kept
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
    remembers = True
    mixes = True

    def __init__(self) -> None:
        self._session = None
        self._aside: torch.cuda.Stream | None = None
        self._bound: OrderedDict[Shapes, _Bound] = OrderedDict()
        self._folder: tempfile.TemporaryDirectory | None = None
        self.seconds = {"export": 0.0, "session": 0.0}

    def scope(self, shapes: Shapes) -> Hashable:
        return shapes.graph, shapes.dtype, shapes.device

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
                EVERY,
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
            # told CUDA's default stream, "0", it would take one that nobody can wait for
            self._aside = torch.cuda.Stream(device)
            own = {
                "device_id": int(index or 0),
                "user_compute_stream": str(self._aside.cuda_stream),
            }
            providers.insert(0, ("CUDAExecutionProvider", own))
        self._session = onnxruntime.InferenceSession(
            str(exported.path), options, providers=providers
        )
        self._inputs = {entry.name: _TYPES[entry.type] for entry in self._session.get_inputs()}
        self.seconds["session"] = time.perf_counter() - started

    def __call__(self, call: Call) -> Tensor:
        shapes = Shapes.of(call)
        bound = self._bound.get(shapes)
        if bound is None:
            bound = self._bound[shapes] = _Bound(
                self._session, self._inputs, call, self._aside
            )
            while len(self._bound) > _KEPT:
                self._bound.popitem(last=False)
        self._bound.move_to_end(shapes)
        return bound(call)

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
        self._bound.clear()
        self._session = self._aside = None
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


class _Bound:
    """Buffers of one shape at fixed addresses, handed to ONNX Runtime once.

    Args:
        session: an InferenceSession.
        inputs: its inputs' dtypes by name.
        call: of this shape.
        aside: the stream that it runs on; None on a CPU.
    """

    def __init__(
        self, session: Any, inputs: dict[str, torch.dtype], call: Call,
        aside: "torch.cuda.Stream | None",
    ):  # fmt: skip
        named = call.named()
        self._aside = aside
        self._session = session
        self._names = list(inputs)
        self._knobs = Knobs(
            {name: named[name].to(dtype).contiguous() for name, dtype in inputs.items()}
        )
        self._always = frozenset(inputs) - {"context"}
        rows, _, *size = call.x.shape
        self._outs = {}
        for told in session.get_outputs():
            shape = (rows, told.shape[1], *size)
            if told.name != OUTPUT:
                shape = call.shape(told.name)
            self._outs[told.name] = torch.empty(
                shape, dtype=_TYPES[told.type], device=call.x.device
            )
        self._binding = session.io_binding()
        for name, tensor in self._knobs.tensors.items():
            self._binding.bind_input(name, *_place(tensor))
        for name, tensor in self._outs.items():
            self._binding.bind_output(name, *_place(tensor))

    def __call__(self, call: Call) -> Tensor:
        named = call.named()
        self._knobs.fill({name: named[name] for name in self._names}, self._always)
        self._run(call.x.device)
        call.wrote(self._outs)  # taken out before the next call
        return self._outs[OUTPUT].to(call.x.dtype, copy=True)

    def _run(self, device: torch.device) -> None:
        """In the order of torch's current stream: after what fills the buffers, before what
        reads them."""
        now = None if self._aside is None else torch.cuda.current_stream(device)
        if now is not None:
            self._aside.wait_stream(now)
        self._session.run_with_iobinding(self._binding)
        if now is not None:
            now.wait_stream(self._aside)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor as onnxruntime's bindings take it."""
    import numpy as np

    kinds = {torch.float16: np.float16, torch.int64: np.int64}
    device = tensor.device
    kind = kinds.get(tensor.dtype, np.float32)
    return device.type, device.index or 0, kind, tuple(tensor.shape), tensor.data_ptr()


_TYPES = {
    "tensor(float)": torch.float32, "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
}  # fmt: skip
