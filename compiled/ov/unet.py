"""The UNet run by OpenVINO."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..engine import Call, Refused, Shapes, UNet
from ..exports import exported
from ..precision import DEFAULT, Against
from . import api
from .network import Asked, Network


class OpenVino:
    """The UNet run by OpenVINO, for models on the CPU; made for one shape, whatever number of rows
    runs the inner blocks.

    The weights are those at `prepare`. float32 whatever the model is in, unless asked for less.

    Args:
        asked: device, precision and cache.
        note: called with a line for people once there is something to say.

    Attributes:
        error: against the UNet on the first call, relative RMS; None before that.
    """

    name = "openvino"
    bakes = True
    capturable = False
    placed = False
    per_shape = True
    remembers = True
    mixes = True

    def __init__(self, asked: Asked | None = None, note: Callable[[str], None] = lambda text: None):
        self._asked, self._note = asked or Asked(), note
        self._network: Network | None = None
        self._against: Against | None = None

    def scope(self, shapes: Shapes) -> Hashable:
        return shapes.open

    def prepare(self, unet: UNet, shapes: Shapes) -> None:
        """See Engine.prepare.

        Raises:
            Refused: not installed, or a UNet, device or precision it cannot take.
        """
        api.needed()
        if shapes.device != "cpu":
            raise Refused(f"OpenVINO takes models on the CPU, and this one is on {shapes.device}")
        api.placed(self._asked.device, self._asked.precision)
        dtype = torch.float16 if shapes.dtype == "float16" else torch.float32
        sizes = dict(shapes.open.sizes)
        self._network = Network(lambda: exported(unet, shapes, dtype), sizes, self._asked)
        self._against = Against(unet)

    def __call__(self, call: Call) -> Tensor:
        settled = self._network.settled
        out = self._network(call.named()).to(call.x.dtype)
        call.wrote(self._network.own)
        if settled and self._against.look(call, out):
            what = "float32" if self._asked.precision == DEFAULT else self._asked.precision
            self._note(
                f"{what} on the {self._network.compiling.device}, relative error "
                f"{self._against.error:.1e} against the UNet itself"
            )
        return out

    def moved(self) -> None:
        """Nothing to do: it has weights of its own."""

    @property
    def error(self) -> float | None:
        return None if self._against is None else self._against.error

    def describe(self) -> dict[str, Any]:
        told = {"engine": self.name, "precision": self._asked.precision, "error": self.error}
        return told if self._network is None else {**told, **self._network.describe()}

    def release(self) -> None:
        self._network = self._against = None
