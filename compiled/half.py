"""One half of an autoencoder on an engine: pictures to latents, or latents to pictures."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .ov import api as openvino
from .precision import DEFAULT


class Half(Protocol):
    """An engine for a network of one tensor, made for one shape.

    Attributes:
        name: as in LiveCompileVAE.
        precision: see compiled.precision.
    """

    name: str
    precision: str

    def prepare(self, network: torch.nn.Module, x: Tensor) -> None:
        """Make what runs calls in the shape, dtype and place of `x`, with the weights as they are.

        Raises:
            Refused: it cannot be done, and why.
        """

    @property
    def settled(self) -> bool:
        """Whether it computes in its precision already, as after observing some calls."""

    def __call__(self, x: Tensor) -> Tensor:
        """The output, in x's dtype and place; a tensor of its own."""

    def describe(self) -> dict[str, Any]:
        """What it is and what making it took, for people; plain JSON values."""

    def release(self) -> None:
        """Give back what it holds."""


def _openvino(wish) -> Half:
    from .ov.half import OpenVinoHalf
    from .ov.network import Asked

    return OpenVinoHalf(Asked(wish.place, wish.precision, wish.folder))


def _cudagraph(wish) -> Half:
    from .cuda_half import CudaHalf

    return CudaHalf()


# in the order of LiveCompileVAE's list, which has "auto" and "eager" besides
HALVES: dict[str, Callable[..., Half]] = {"cudagraph": _cudagraph, "openvino": _openvino}


def picked(device: torch.device, wish) -> tuple[str, str]:
    """The engine that "auto" takes, and why; "eager" where there is none."""
    asked = wish.precision != DEFAULT or wish.place != openvino.AUTO
    if device.type == "cuda" and not asked:
        return "cudagraph", "an NVIDIA GPU"
    reason = missing("openvino", device, wish)
    return ("openvino", "installed") if reason is None else ("eager", reason)


def missing(name: str, device: torch.device, wish) -> str | None:
    """Why an engine cannot run an autoencoder's halves on a device; None where it can."""
    if name == "openvino":
        return openvino.refused(device, wish.place, wish.precision)
    if name == "cudagraph" and (device.type != "cuda" or torch.version.hip is not None):
        return f"cudagraph needs an NVIDIA GPU, and the VAE is on {device}"
    if wish.precision != DEFAULT:
        return f"precision: {name} has the VAE's own; {wish.precision} needs openvino"
    if wish.place != openvino.AUTO:
        return f"device: only openvino has a choice of devices, and {name} is chosen"
    return None
