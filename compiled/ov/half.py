"""A half of an autoencoder run by OpenVINO."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..engine import Refused
from ..onnx_export import export_network
from . import api
from .network import Asked, Network


class OpenVinoHalf:
    """See compiled.half.Half; for networks on the CPU.

    Args:
        asked: device, precision and cache.
    """

    name = "openvino"

    def __init__(self, asked: Asked):
        self._asked = asked
        self.precision = asked.precision
        self._network: Network | None = None

    def prepare(self, network: torch.nn.Module, x: Tensor) -> None:
        """See Half.prepare.

        Raises:
            Refused: not installed, or a device or precision it cannot take.
        """
        api.needed()
        if x.device.type != "cpu":
            raise Refused(f"OpenVINO takes networks on the CPU, and this one is on {x.device}")
        example = torch.zeros(x.shape)

        @contextlib.contextmanager
        def source() -> Iterator[pathlib.Path]:
            with tempfile.TemporaryDirectory(prefix="livediffusion-") as folder:
                yield export_network(network, example, pathlib.Path(folder) / "half.onnx").path

        self._network = Network(source, {"x": tuple(x.shape)}, self._asked)

    @property
    def settled(self) -> bool:
        return self._network is not None and self._network.settled

    def __call__(self, x: Tensor) -> Tensor:
        return self._network({"x": x}).to(x.dtype)

    def describe(self) -> dict[str, Any]:
        told = {"engine": self.name, "precision": self.precision}
        return told if self._network is None else {**told, **self._network.describe()}

    def release(self) -> None:
        self._network = None
