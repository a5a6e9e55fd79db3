"""A UNet as an ONNX file: the common road to ONNX Runtime and TensorRT.

torch's TorchScript exporter is used: it writes float16 graphs whose shapes stay dynamic, needs no
package but `onnx`, and takes seconds where the newer one takes minutes.
"""

import contextlib
import hashlib
import inspect
import os
import pathlib
import threading
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .engine import EXACT, Call, Refused, UNet, dtype_of
from .remembered import BANK, OWN, SEEN, WHO, narrow
from .reused import FEATURES, GIVEN, PICK, WHOLE

OPSET = 17  # LayerNormalization; what TensorRT 8.6 reads
VERSION = 1  # of what this module writes; part of every engine's key
EXTERNAL = 1 << 30  # bytes of weights that go to a file of their own; protobuf ends at 2 GB
ROWS, SIZE, TOKENS, SEEN_ROWS, RUN = "rows", "size", "tokens", "seen", "run"
EVERY = frozenset({ROWS, SIZE, TOKENS, SEEN_ROWS, RUN})
OUTPUT = "out"

_AXES = {
    "x": {0: "rows", 2: "height", 3: "width"},
    "timesteps": {0: "rows"},
    "context": {0: "rows", 1: "tokens"},
    "y": {0: "rows"},
    OUTPUT: {0: "rows", 2: "height", 3: "width"},
    FEATURES: {0: "rows", 2: "kept_height", 3: "kept_width"},
    WHOLE: {0: "run"},
    PICK: {0: "rows"},
    GIVEN: {0: "run", 2: "kept_height", 3: "kept_width"},
}
# torch's exporter keeps its state for the whole process, and engines are made in threads
_exporting = threading.Lock()
_KIND = {"run": RUN, "rows": ROWS, "height": SIZE, "width": SIZE, "tokens": TOKENS}


@dataclass(frozen=True)
class Exported:
    """An ONNX file.

    Attributes:
        path: of the graph; weights past `EXTERNAL` lie beside it, named like it with `.data`.
        weights: names of its weights: (parameter of the network, transposed). Only if asked for.
    """

    path: pathlib.Path
    weights: dict[str, tuple[str, bool]] = field(default_factory=dict)


def export(
    unet: UNet,
    call: Call,
    path: pathlib.Path,
    dtype: torch.dtype,
    dynamic: frozenset[str] = frozenset(),
    external: int = EXTERNAL,
    named: bool = False,
) -> Exported:
    """Write a UNet, its weights as they are now, to an ONNX file and have it checked.

    Args:
        unet: the network.
        call: an example; its values do not matter. What is of engine.EXACT
            stays float32, the rest takes `dtype`.
        path: of the file; its folder exists.
        dtype: of weights and tensors: float32, float16 or bfloat16.
        dynamic: which of EVERY the file leaves open; "seen" is how many rows each row sees, "run"
            how many run the inner blocks.
        external: bytes of weights from which on they go beside the graph.
        named: find out which weight of the file is which parameter.

    Raises:
        Refused: `onnx` is not installed, or the network cannot be exported.
    """
    onnx = needed()
    plain = unet.traceable(dtype)
    traced = _Traced(plain, call)
    device = next(traced.parameters()).device
    example = {
        name: tensor.to(device, dtype_of(name, dtype))
        for name, tensor in _narrowing(call.named(), _inner(call), dynamic).items()
    }
    if call.residuals:
        _fitting(plain, Call.of(example))
    weights = _write(
        onnx, traced, example, pathlib.Path(path), dynamic, external, named, traced.more,
        _inner(call),
    )  # fmt: skip
    return Exported(path, weights)


def export_network(module: torch.nn.Module, x: Tensor, path: pathlib.Path) -> Exported:
    """Write a network of one tensor, named "x", to an ONNX file, in the shape and dtype of `x`.

    Raises:
        Refused: `onnx` is not installed.
    """
    _write(needed(), module, {"x": x}, path, frozenset(), EXTERNAL, False)
    return Exported(path)


def _write(
    onnx, traced: torch.nn.Module, example: dict[str, Tensor], path: pathlib.Path,
    dynamic: frozenset[str], external: int, named: bool, more: tuple[str, ...] = (),
    inner: tuple[str, ...] = (),
) -> dict[str, tuple[str, bool]]:  # fmt: skip
    """Trace it, and have the file checked; returns which weight is which if that is asked for."""
    raw = path.with_name(f"{path.name}.raw")
    raw.mkdir()
    try:
        # an exporter cannot trace what inference mode made
        with _exporting, torch.inference_mode(False), torch.no_grad(), _quiet():
            torch.onnx.export(
                traced,
                tuple(tensor.clone() for tensor in example.values()),
                str(raw / "unet.onnx"),
                input_names=list(example),
                output_names=[OUTPUT, *more],
                dynamic_axes=_axes(example, more, dynamic, inner) or None,
                opset_version=OPSET,
                **_exporter(),
            )
        weights = _weights(onnx, raw / "unet.onnx", traced.module) if named else {}
        _gather(onnx, raw / "unet.onnx", path, external)
    finally:
        for left in raw.iterdir():
            left.unlink()
        raw.rmdir()
    # ONNX has bfloat16 in convolutions from opset 22 on, TensorRT in every opset
    full = all(tensor.dtype != torch.bfloat16 for tensor in example.values())
    onnx.checker.check_model(str(path), full_check=full)
    return weights


def needed() -> Any:
    """The onnx package.

    Raises:
        Refused: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise Refused("the onnx package is missing: pip install onnx") from error
    return onnx


def residual_shapes(unet: UNet, call: Call) -> dict[str, torch.Size]:
    """Shapes of the residuals that this UNet can take, by Call's names.

    One at each input block, one in the middle, one for each skip connection.
    """
    seen: list[torch.Size] = []
    middle: list[torch.Size] = []
    # a block's layers are called one by one; the last one's output is the block's
    hooks = [
        block[-1].register_forward_hook(lambda m, i, out: seen.append(out.shape))
        for block in unet.module.input_blocks
    ]
    last = unet.module.middle_block[-1]
    hooks.append(last.register_forward_hook(lambda m, i, out: middle.append(out.shape)))
    try:
        with torch.no_grad():
            unet(Call(call.x, call.timesteps, call.context, call.y))
    finally:
        for hook in hooks:
            hook.remove()
    named = {f"control_input_{i}": size for i, size in enumerate(seen)}
    named["control_middle_0"] = middle[0]
    # the first output block takes the last skip connection
    return named | {f"control_output_{i}": size for i, size in enumerate(reversed(seen))}


def _fitting(unet: UNet, call: Call) -> None:
    """A residual of the wrong shape, which ComfyUI leaves out, crashes the tracer."""
    known = residual_shapes(unet, call)
    for name, tensor in call.residuals.items():
        if tensor.shape != known.get(name):
            there = "nothing" if name not in known else tuple(known[name])
            raise Refused(
                f"the ControlNet gives {name} of {tuple(tensor.shape)} where the UNet has {there}: "
                "it is made for another model"
            )


def _inner(call: Call) -> tuple[str, ...]:
    return () if call.memory is None else call.memory.inner


def _narrowing(
    named: dict[str, Tensor], inner: tuple[str, ...], dynamic: frozenset[str]
) -> dict[str, Tensor]:
    """An example in which not every row runs the inner blocks: only then is it traced which do."""
    whole, rows = named.get(WHOLE), named["x"].shape[0]
    if whole is None or RUN not in dynamic or whole.shape[0] < rows:
        return named
    if rows == 1:
        if ROWS not in dynamic:
            return named
        axes = _axes(named, (), EVERY, inner)
        of_rows = {
            name for name, own in axes.items()
            if own.get(0) == "rows" or (name.startswith(SEEN) and not narrow(name, inner))
        }  # fmt: skip
        named = {name: torch.cat([t, t]) if name in of_rows else t for name, t in named.items()}
    return {n: t[:1] if n == WHOLE or narrow(n, inner) else t for n, t in named.items()}


class _Traced(torch.nn.Module):
    """A UNet whose inputs are tensors only, in the order of their names."""

    def __init__(self, unet: UNet, call: Call):
        super().__init__()
        self.module = unet.module
        self._unet = unet
        self._names = tuple(call.named())
        self._memory, self._reuse = call.memory, call.reuse
        self.more = call.more

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        memory = None if self._memory is None else replace(self._memory, wrote={})
        reuse = None if self._reuse is None else replace(self._reuse, wrote={})
        call = Call.of(dict(zip(self._names, tensors, strict=True)), memory, reuse)
        out = self._unet(call)
        return (out, *call.given()) if self.more else out


def _axes(
    named: dict[str, Tensor], more: tuple[str, ...], dynamic: frozenset[str],
    inner: tuple[str, ...] = (),
) -> dict[str, dict[int, str]]:  # fmt: skip
    out = {}
    for name in (*named, OUTPUT, *more):
        # a residual's height and width are the latent's divided, each level its own, and so are a
        # layer's tokens
        levels = {0: "rows", 2: f"{name}_height", 3: f"{name}_width"}
        if name.startswith((BANK, OWN)):
            rows = "run" if narrow(name, inner) else "rows"
            levels = {} if name in EXACT else {0: rows, 1: f"{name}_tokens"}
        kinds = _KIND
        if name.startswith((SEEN, WHO)):
            levels = {i: f"{name}_{i}" for i in range(named[name].ndim)}
            kinds = {f"{name}_0": RUN if narrow(name, inner) else ROWS, f"{name}_1": SEEN_ROWS}
        axes = _AXES.get(name, levels)
        kept = {i: axis for i, axis in axes.items() if kinds.get(axis, SIZE) in dynamic}
        if kept:
            out[name] = kept
    return out


def _exporter() -> dict[str, Any]:
    """The arguments that choose the TorchScript exporter in this torch."""
    known = inspect.signature(torch.onnx.export).parameters
    return {"dynamo": False} if "dynamo" in known else {}


@contextlib.contextmanager
def _quiet():
    """Without the tracer's warnings about Python values: they are what makes shapes static."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _gather(onnx, source: pathlib.Path, path: pathlib.Path, external: int) -> None:
    """One file for the graph, and one for the weights where they are big.

    Past 2 GB the exporter writes a file for every weight.
    """
    size = sum(os.path.getsize(file) for file in source.parent.iterdir())
    if size <= external:
        source.replace(path)
        return
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # onnx would append to it
    onnx.save_model(
        onnx.load(str(source)), str(path), save_as_external_data=True,
        all_tensors_to_one_file=True, location=data.name, size_threshold=1024,
    )  # fmt: skip


def _weights(onnx, path: pathlib.Path, module: torch.nn.Module) -> dict[str, tuple[str, bool]]:
    """Which weight is which parameter: the exporter renames and transposes those of linear layers.

    Parameters of equal content cannot be told apart and are left out.
    """
    by_content: dict[bytes, tuple[str, bool] | None] = {}
    for name, parameter in module.named_parameters():
        forms = [(parameter, False)] + ([(parameter.t(), True)] if parameter.ndim == 2 else [])
        for tensor, transposed in forms:
            key = _content(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            by_content[key] = None if key in by_content else (name, transposed)
    found = {}
    for weight in onnx.load(str(path)).graph.initializer:
        parameter = by_content.get(_content(onnx.numpy_helper.to_array(weight).tobytes()))
        if parameter is not None:
            found[weight.name] = parameter
    return found


def _content(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
