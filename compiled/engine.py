"""What an engine is: one way to run a UNet, with everything it needs to be told.

torch only: the host hands over the network as a `UNet`, so nothing here knows ComfyUI.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

SIDES = ("input", "middle", "output")


class Refused(Exception):
    """An engine cannot be made or cannot run a call; the text says why and what to do."""


class WeightsAway(Refused):
    """It cannot for as long as the weights are where ComfyUI has put them, and no longer."""


class Outdated(WeightsAway):
    """The engine was made for weights of another kind; another one is to be made."""


@dataclass(frozen=True)
class Call:
    """The tensors of one UNet call.

    Attributes:
        x: scaled latents, [R, C, H, W].
        timesteps: float32, [R].
        context: prompt, [R, tokens, D].
        y: pooled vector, [R, P], or None.
        residuals: a ControlNet's, each [R, C_i, H_i, W_i], by name: "control_output_0" is what the
            first output block adds (ComfyUI takes its lists from the end).
    """

    x: Tensor
    timesteps: Tensor
    context: Tensor | None
    y: Tensor | None = None
    residuals: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, named: dict[str, Tensor]) -> "Call":
        """The call that these tensors make, by name; what is not named is not there."""
        residuals = {name: t for name, t in named.items() if name.startswith("control_")}
        return cls(named["x"], named["timesteps"], named.get("context"), named.get("y"), residuals)

    def named(self) -> dict[str, Tensor]:
        """Its tensors by the names that a compiled UNet's inputs have."""
        named = {"x": self.x, "timesteps": self.timesteps, "context": self.context, "y": self.y}
        return {name: t for name, t in {**named, **self.residuals}.items() if t is not None}

    @property
    def control(self) -> dict[str, list[Tensor | None]] | None:
        """The residuals as ComfyUI's UNet takes them, in lists that it may consume."""
        out = {}
        for side in SIDES:
            prefix = f"control_{side}_"
            found = {int(n.removeprefix(prefix)): n for n in self.residuals if n.startswith(prefix)}
            if found:
                order = range(max(found), -1, -1)
                out[side] = [self.residuals.get(found.get(i)) for i in order]
        return out or None


def residuals(control: dict[str, Any] | None, rows: int) -> dict[str, Tensor]:
    """A ComfyUI control dict as a Call holds it; a residual of one row serves all rows."""
    out = {}
    for side in SIDES:
        for i, tensor in enumerate(reversed((control or {}).get(side) or ())):
            if tensor is not None:
                spread = tensor.shape[0] != rows
                shape = (rows, *tensor.shape[1:])
                out[f"control_{side}_{i}"] = tensor.expand(shape) if spread else tensor
    return out


@dataclass(frozen=True)
class Shapes:
    """Everything about a call that an engine may be made for: equal shapes share an engine.

    Attributes:
        sizes: (name, shape) of each input in the order of Call.named.
        dtype: of x, such as "float16".
        device: such as "cuda:0".
    """

    sizes: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: str
    device: str

    @classmethod
    def of(cls, call: Call) -> "Shapes":
        sizes = tuple((name, tuple(t.shape)) for name, t in call.named().items())
        return cls(sizes, str(call.x.dtype).removeprefix("torch."), str(call.x.device))

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return dict(self.sizes)[name]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.sizes)

    def example(self) -> Call:
        """A call of these shapes, on the CPU."""
        dtype = getattr(torch, self.dtype)
        named = {name: torch.zeros(size, dtype=dtype) for name, size in self.sizes}
        named["timesteps"] = named["timesteps"].float()
        return Call.of(named)

    @property
    def residuals(self) -> tuple[str, ...]:
        """Names of the ControlNet residual inputs."""
        return tuple(name for name in self.names if name.startswith("control_"))

    def __str__(self) -> str:
        rows, _, height, width = self["x"]
        tokens = self["context"][1] if "context" in self.names else 0
        control = f", {len(self.residuals)} ControlNet residuals" if self.residuals else ""
        return f"{rows} rows of {width} x {height} latents, {tokens} tokens{control}, {self.dtype}"


class UNet(Protocol):
    """What a host hands over: a network that runs a Call."""

    module: torch.nn.Module

    def __call__(self, call: Call) -> Tensor: ...

    def bare(self) -> "UNet":
        """With attention as one operation, whatever the user has chosen."""

    def traceable(self, dtype: torch.dtype) -> "UNet":
        """With the weights as they are now in `dtype`, and operations that an exporter knows.

        Raises:
            Refused: the weights are not all there, or it is no UNet.
        """

    def copied(self) -> "UNet":
        """With weights of its own, as they are now, for a thread of its own.

        Raises:
            Refused: the weights are not all there, or it is no UNet.
        """


class Engine(Protocol):
    """One way to run a UNet.

    Attributes:
        name: as in LiveCompile.
        bakes: its weights are those at `prepare`; a change of them asks for another one.
        capturable: a CUDA graph of the whole tick may take its calls in.
        placed: it reads the weights where they were at `prepare`, so it ends when they move.
        per_shape: it is made for one shape, so only for shapes that keep coming.
    """

    name: str
    bakes: bool
    capturable: bool
    placed: bool
    per_shape: bool

    def prepare(self, unet: UNet, shapes: Shapes) -> None:
        """Make what runs calls of these shapes.

        Raises:
            Refused: it cannot be done, and why.
        """

    def scope(self, shapes: Shapes) -> Hashable:
        """What of the shapes it is made for: equal scopes share an engine."""

    def __call__(self, call: Call) -> Tensor:
        """The UNet's output, [R, C, H, W], in x's dtype and on its device."""

    def moved(self) -> None:
        """The weights may have other values, where they lie."""

    def describe(self) -> dict[str, Any]:
        """What it is and what making it took, for people; plain JSON values."""

    def release(self) -> None:
        """Give back what it holds; it may be prepared again."""


class Eager:
    """The UNet as it is."""

    name = "eager"
    bakes = False
    capturable = False
    placed = False
    per_shape = False

    def scope(self, shapes: Shapes) -> Hashable:
        return ()

    def prepare(self, unet: UNet, shapes: Shapes) -> None:
        self._unet = unet

    def __call__(self, call: Call) -> Tensor:
        return self._unet(call)

    def moved(self) -> None:
        """Nothing to do: it looks at them in each call."""

    def describe(self) -> dict[str, Any]:
        return {"engine": self.name}

    def release(self) -> None:
        self._unet = None
