"""ONNX files to programs of OpenVINO: shapes, precision, and what is kept on disk."""

import contextlib
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..engine import Refused
from ..precision import DEFAULT, INT8
from . import api, cache, int8
from .program import Program


@dataclass(frozen=True)
class Asked:
    """How a network is to be run.

    Attributes:
        device: "auto", "CPU", "GPU" or "NPU".
        precision: see compiled.precision.
        folder: where compiled networks are kept; None keeps none.
    """

    device: str = api.AUTO
    precision: str = DEFAULT
    folder: pathlib.Path | None = None


class Compiling:
    """ONNX files on one device, in one shape.

    Args:
        sizes: shape of each input, -1 for what is left open; the file may have fewer.
        asked: see Asked.

    Attributes:
        seconds: that compiling took, or reading what was kept.
        kept: it was read from disk.

    Raises:
        Refused: there is no such device, or it does not compute so.
    """

    def __init__(self, sizes: dict[str, tuple[int, ...]], asked: Asked):
        self.device = api.placed(asked.device, asked.precision)
        self.seconds, self.kept = 0.0, False
        self._asked = asked
        self._sizes = {name: list(size) for name, size in sizes.items()}

    def program(self, path: pathlib.Path, ranges: int8.Ranges | None = None) -> Program:
        """The program of a file; for int8 with the ranges that were observed."""
        precision = self._asked.precision
        if (precision == INT8) != (ranges is not None):
            raise Refused("int8 needs the ranges of what flows through the network")
        began = time.perf_counter()
        settings = api.settings(self.device, precision)
        folder, name = self._asked.folder, None
        if folder is not None and ranges is None:
            name = self._name(path, settings)
            data = cache.read(folder, name)
            if data is not None:
                compiled = self._imported(data, settings)
                if compiled is not None:
                    self.kept = True
                    self.seconds += time.perf_counter() - began
                    return Program(compiled)
        model = self._model(path)
        if ranges is not None:
            int8.quantise(model, ranges)
        compiled = api.core().compile_model(model, self.device, settings)
        if name is not None:
            cache.write(folder, name, compiled.export_model().getvalue())
        self.seconds += time.perf_counter() - began
        return Program(compiled)

    def observer(self, path: pathlib.Path) -> int8.Observer:
        """A float32 program that also tells the ranges of what flows through it."""
        began = time.perf_counter()
        model = self._model(path)
        names = int8.observe(model)
        compiled = api.core().compile_model(model, self.device, api.settings(self.device, DEFAULT))
        self.seconds += time.perf_counter() - began
        return int8.Observer(compiled, names)

    def _model(self, path: pathlib.Path) -> Any:
        model = api.core().read_model(str(path))
        ports = {port.get_node().get_friendly_name(): port for port in model.inputs}
        model.reshape({port: self._sizes[name] for name, port in ports.items()})
        return model

    def _name(self, path: pathlib.Path, settings: dict[str, Any]) -> str:
        files = [path, path.with_name(f"{path.name}.data")]
        return cache.key(
            cache.digest([file for file in files if file.is_file()]), sorted(self._sizes.items()),
            self.device, api.label(self.device), sorted(settings.items()), api.version(),
        )  # fmt: skip

    def _imported(self, data: bytes, settings: dict[str, Any]) -> Any | None:
        """What was kept, if OpenVINO still takes it."""
        try:
            return api.core().import_model(data, self.device, settings)
        except RuntimeError:
            return None


class Network:
    """A network in one shape and precision; in int8 once its first calls have been observed.

    Args:
        source: opens the ONNX file; for int8 once more after some calls.
        sizes: shape of each input.
        asked: see Asked.

    Attributes:
        compiling: what making it took.
        settled: it computes in the precision that was asked for.
        own: see Program.

    Raises:
        Refused: see Compiling.
    """

    def __init__(
        self,
        source: Callable[[], contextlib.AbstractContextManager[pathlib.Path]],
        sizes: dict[str, tuple[int, ...]],
        asked: Asked,
    ):
        self.compiling = Compiling(sizes, asked)
        self._source, self._program, self._observer = source, None, None
        self.own: dict[str, Tensor] = {}
        with source() as path:
            if asked.precision == INT8:
                self._observer = self.compiling.observer(path)
            else:
                self._program = self.compiling.program(path)

    @property
    def settled(self) -> bool:
        return self._program is not None

    def __call__(self, named: dict[str, Tensor]) -> Tensor:
        """The output, a tensor of its own, for inputs by name."""
        if self._program is not None:
            out, self.own = self._program(named), self._program.own
            return out
        out, self.own = self._observer(named), self._observer.own
        if self._observer.frames >= int8.FRAMES:
            with self._source() as path:
                self._program = self.compiling.program(path, self._observer.ranges)
            self._observer = None
        return out

    def describe(self) -> dict[str, Any]:
        """For people; plain JSON values."""
        return {
            "device": self.compiling.device,
            "maker": api.label(self.compiling.device),
            "seconds": {"compile": round(self.compiling.seconds, 3)},
            "kept": self.compiling.kept,
        }
