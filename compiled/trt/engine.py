"""Running an engine of TensorRT or of TensorRT for RTX."""

import pathlib
import time
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ..engine import Call, Refused, Shapes, UNet
from ..onnx_export import OUTPUT
from ..remembered import SEEN, Remembered, read_of
from ..reused import FEATURES, GIVEN, PICK, WHOLE, Reused
from . import api, files, runtime


class TensorRT:
    """One engine file, loaded and bound (compiled.engine.Engine).

    Inputs and output have buffers of their own, bound once; a call copies in, runs on torch's
    current stream, and copies out. Fewer rows than it was built for are padded.

    Args:
        path: of the engine.
        sidecar: what stands beside it.
        device: that calls come from.

    Attributes:
        loads: how often it was loaded; each time its weights are those it was built with.
    """

    name = "tensorrt"
    bakes = True
    capturable = False
    placed = False
    per_shape = False
    remembers = True
    mixes = False

    def __init__(self, path: pathlib.Path, sidecar: files.Sidecar, device: torch.device):
        self.path = path
        self.sidecar = sidecar
        self.device = device
        self.seconds = 0.0
        self.loads = 0
        self._engine: Any = None
        self._context: Any = None
        self._compiled: runtime.Cache | None = None
        self._aside: torch.cuda.Stream | None = None

    def scope(self, shapes: Shapes) -> Hashable:
        return shapes.device

    @property
    def loaded(self) -> bool:
        return self._context is not None

    def prepare(self, unet: UNet | None, shapes: Shapes | None) -> None:
        """Load it, unless it is.

        Raises:
            Refused: it cannot be loaded, and why.
        """
        if self.loaded:
            return
        started = time.perf_counter()
        library = api.load(self.sidecar.made.library)
        self._trt = trt = library.module
        self._logger = trt.Logger(trt.Logger.WARNING)
        loader = trt.Runtime(self._logger)
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise Refused(f"{self.path.name} cannot be read ({error})") from error
        engine = loader.deserialize_cuda_engine(data)
        if engine is None:
            del loader
            listener = library.listener()
            trt.Runtime(listener).deserialize_cuda_engine(data)  # once more, for its words
            said = api.because(listener)
            raise Refused(f"{library.called} cannot load {self.path.name}{said}. Build it anew")
        here = api.gpu()
        if self.sidecar.made.targets and here is not None:
            file = files.runtime_cache(self.path, here["gpu"])
            self._compiled = runtime.Cache(self, file)
        context = runtime.context(library, engine, self._compiled)
        if context is None:
            self.release()
            raise Refused(
                f"there is not enough GPU memory for {self.path.name}: unload other models, or "
                "build it for fewer rows"
            )
        self._runtime, self._engine, self._context = loader, engine, context
        if self.device.type == "cuda":
            self._aside = torch.cuda.Stream(self.device)
        self._bind()
        if self._compiled is not None:
            self._compiled.save()  # kernels of fixed shapes are compiled by now
        self.loads += 1
        self.seconds = time.perf_counter() - started

    def _bind(self) -> None:
        """Buffers for the biggest shapes, whose addresses stay."""
        profile = self.sidecar.made.profile
        self._least = {name: low for name, (low, _, _) in profile.items()}
        self._most = {name: high for name, (_, _, high) in profile.items()}
        self._buffers: dict[str, Tensor] = {}
        engine = self._engine
        types, inputs = {}, set()
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            types[name] = api.dtype(self._trt, engine.get_tensor_dtype(name))
            if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT:
                inputs.add(name)
        made = self.sidecar.made
        self._own = () if made.layers is None else made.layers.outputs
        if made.depth is not None:
            self._own = (*self._own, GIVEN)
        if inputs != set(self._most) or types.keys() - inputs != {OUTPUT, *self._own}:
            raise Refused(f"{self.path.name} has other inputs than it says; build it anew")
        shapes = {**self._most, OUTPUT: self._most["x"]}
        for name in self._own:
            if name == GIVEN:
                shapes[name] = self._most[FEATURES]
                continue
            rows, tokens, channels = self._most[read_of(name)]
            shapes[name] = rows, tokens // made.frames, channels
        for name, shape in shapes.items():
            elements = torch.Size(shape).numel()
            buffer = torch.zeros(elements, dtype=types[name], device=self.device)
            self._buffers[name] = buffer
            if not self._context.set_tensor_address(name, buffer.data_ptr()):
                raise Refused(f"TensorRT does not accept a buffer for {name}")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._zeroed: set[str] = set(self._most)

    def __call__(self, call: Call) -> Tensor:
        """See Engine.__call__.

        Raises:
            Refused: the call does not fit what the engine was built for.
        """
        self._remembers(call.memory)
        self._reuses(call.reuse)
        rows = call.x.shape[0]
        named = call.named()
        if call.reuse is not None:
            named |= self._padded(call.reuse, rows)
        self._admit(named, rows)
        for name in self._most:
            self._feed(name, named.get(name), named, rows)
        missing = self._context.infer_shapes()
        if missing:
            raise RuntimeError(f"TensorRT lacks shapes of {', '.join(missing)}")
        out = tuple(self._context.get_tensor_shape(OUTPUT))
        if not api.run(self._context, self.device, self._aside):
            raise RuntimeError("TensorRT could not run; its messages are in the log")
        for name in call.more:
            size = tuple(self._context.get_tensor_shape(name))
            part = call.reuse if name == GIVEN else call.memory
            part.wrote[name] = self._view(name, size)[:rows]
        return self._view(OUTPUT, out)[:rows].to(call.x.dtype, copy=True)

    def _remembers(self, memory: Remembered | None) -> None:
        """Refuses a call whose frames help each other otherwise than the engine was built for."""
        made = self.sidecar.made
        has = "" if made.layers is None else made.layers.words(made.frames, made.inputs)
        asked = "" if memory is None else memory.layers.words(memory.frames, memory.reads)
        if asked and not has:
            raise Refused(
                f"the engine was built without what the MODEL has now ({asked}): build it from the "
                "model behind Live Memory and Live Future Attention"
            )
        if has and not asked:
            raise Refused(f"the engine was built with {has}, and this call has none of it")
        if has and (has != asked or made.layers != memory.layers):
            raise Refused(
                f"the engine was built with {has}, and this call has {asked}: build it anew"
            )
        if memory is not None and f"{SEEN}1" in memory.reads:
            raise Refused(
                "rows of this guidance see unequally many others, which an engine of TensorRT "
                "cannot: with Live Memory and Live Future Attention use self-negative or full"
            )

    def _reuses(self, reuse: Reused | None) -> None:
        """Refuses a call whose rows go on with other features than the engine was built for."""
        depth = self.sidecar.made.depth
        if (None if reuse is None else reuse.depth) == depth:
            return
        if depth is None:
            raise Refused(
                "the engine was built without Live Reuse, which the MODEL has now: build it from "
                "the model behind it"
            )
        if reuse is None:
            raise Refused("the engine was built with Live Reuse, and this call has none of it")
        raise Refused(
            f"the engine was built with Live Reuse at depth {depth}, and this call is at "
            f"{reuse.depth}: build it anew"
        )

    def _padded(self, reuse: Reused, rows: int) -> dict[str, Tensor]:
        """Indices for as many rows as the engine has. One row runs whole where none has to, and
        goes on with what is kept all the same."""
        pick = reuse.reads.get(PICK)
        if pick is not None:
            return {}
        device = reuse.reads[FEATURES].device
        return {
            WHOLE: torch.zeros(1, dtype=torch.int64, device=device),
            PICK: torch.arange(1, 1 + rows, device=device),
        }

    def _admit(self, named: dict[str, Tensor], rows: int) -> None:
        unknown = [name for name in named if name not in self._most]
        if any(name.startswith("control_") for name in unknown):
            if any(name.startswith("control_") for name in self._most):
                raise Refused(
                    f"this ControlNet gives {unknown[0]}, which the engine has no input for; "
                    "remove the ControlNet"
                )
            raise Refused("the engine was built without ControlNet; build it with controlnet on")
        if unknown:
            raise Refused(f"the engine has no input {unknown[0]}; build it from this model")
        most = self._most["x"][0]
        if rows > most:
            raise Refused(
                f"the engine was built for {most} rows, and this call has {rows}: build it with "
                f"rows {rows}, or use fewer steps or frames"
            )
        height, width = named["x"].shape[2:]
        low, high = self._least["x"][2:], self._most["x"][2:]
        if not (low[0] <= height <= high[0] and low[1] <= width <= high[1]):
            span = " x ".join(
                f"{a}" if a == b else f"{a}..{b}" for a, b in zip(low, high, strict=True)
            )
            raise Refused(
                f"the engine was built for latents of {span} (height x width), and this call has "
                f"{height} x {width}: build it with this width and height, or with dynamic_size"
            )
        if "context" in named:
            built, tokens = self._most["context"][1], named["context"].shape[1]
            if built % tokens:
                raise Refused(
                    f"the engine was built for {built} tokens, and this prompt has {tokens}: build "
                    f"it with context_tokens {tokens}"
                )

    def _feed(self, name: str, tensor: Tensor | None, named: dict[str, Tensor], rows: int) -> None:
        """Put an input where the engine reads it."""
        most = self._most[name]
        if tensor is None:
            if name not in named and not name.startswith("control_"):
                raise Refused(f"the engine needs {name}, which this call has not")
            scale = self._most["x"][-1] // most[-1]
            size = (*most[:2], *(s // scale for s in named["x"].shape[2:]))
            if name not in self._zeroed:
                self._buffers[name].zero_()
                self._zeroed.add(name)
            self._shape(name, size)
            return
        self._zeroed.discard(name)
        if name == WHOLE:
            self._shape(name, tuple(tensor.shape))
            self._view(name, tuple(tensor.shape)).copy_(tensor)
            return
        if name == "context" and tensor.shape[1] != most[1]:
            # attention over a prompt said twice is attention over the prompt
            tensor = tensor.repeat(1, most[1] // tensor.shape[1], 1)
        self._shape(name, (most[0], *tensor.shape[1:]))
        view = self._view(name, self._shapes[name])
        view[:rows].copy_(tensor)
        if rows < most[0]:
            view[rows:].copy_(tensor[-1:].expand(most[0] - rows, *tensor.shape[1:]))

    def _shape(self, name: str, size: tuple[int, ...]) -> None:
        if self._shapes.get(name) != size:
            if not self._context.set_input_shape(name, size):
                raise Refused(f"the engine does not take {name} of shape {size}; build it anew")
            self._shapes[name] = size

    def _view(self, name: str, size: tuple[int, ...]) -> Tensor:
        return self._buffers[name][: torch.Size(size).numel()].view(size)

    @property
    def refittable(self) -> bool:
        return bool(self.sidecar.weights)

    def refit(self, weights: dict[str, Tensor]) -> int:
        """Exchange weights by their names in the UNet; returns how many.

        Raises:
            Refused: the engine cannot.
        """
        if not self.refittable or not self._engine.refittable:
            raise Refused("the engine was built without refit")
        refitter = self._trt.Refitter(self._engine, self._logger)
        known = set(refitter.get_all_weights())
        dtype = {"fp16": torch.float16}.get(self.sidecar.made.precision, torch.float32)
        kept = []  # TensorRT reads them when it refits
        for name, (parameter, transposed) in self.sidecar.weights.items():
            if parameter not in weights:
                continue
            if name not in known:
                raise Refused(f"the engine cannot exchange {parameter}: build it anew")
            weight = weights[parameter]
            weight = (weight.t() if transposed else weight).to("cpu", dtype)
            array = weight.contiguous().numpy()
            kept.append(array)
            if not refitter.set_named_weights(name, self._trt.Weights(array)):
                raise Refused(f"TensorRT does not take new weights for {parameter}")
        if kept and not refitter.refit_cuda_engine():
            raise Refused("TensorRT could not exchange the weights")
        return len(kept)

    @property
    def memory(self) -> int:
        """Bytes on the GPU, about: weights, and once it is loaded working memory."""
        working = 0
        for name in ("device_memory_size_v2", "device_memory_size"):
            working = working or int(getattr(self._engine, name, 0) or 0)
        return self.sidecar.size + working

    def moved(self) -> None:
        """Nothing to do: it has weights of its own."""

    def describe(self) -> dict[str, Any]:
        made = self.sidecar.made
        return {
            "engine": self.name, "file": self.path.name, "library": made.library,
            "tensorrt": made.tensorrt, "precision": made.precision,
            "seconds": {"load": round(self.seconds, 3), "build": self.sidecar.built.get("seconds")},
        }  # fmt: skip

    def release(self) -> None:
        self._context = self._engine = self._runtime = None
        self._buffers = {}
        if self._compiled is not None:
            self._compiled.end()
            self._compiled = None
