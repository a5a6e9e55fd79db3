"""What an engine is: one way to run a UNet, with everything it needs to be told.

torch only: the host hands over the network as a `UNet`, so nothing here knows ComfyUI.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .remembered import AMOUNT, BANK, SEEN, THRESHOLD, WHO, Layers, Remembered, narrow
from .reused import GIVEN, INDICES, KEPT, WHOLE, Reused

EXACT = frozenset({"timesteps", AMOUNT, THRESHOLD})  # float32 whatever a network is in
SIDES = ("input", "middle", "output")


class Refused(Exception):
    """An engine cannot be made or cannot run a call; the text says why and what to do."""


class WeightsAway(Refused):
    """It cannot for as long as the weights are where ComfyUI has put them, and no longer."""


class Outdated(WeightsAway):
    """The engine was made for weights of another kind; another one is to be made."""


class NotYet(Refused):
    """It cannot run this call, and will run those that come once the stream has gone on."""


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
        memory: what is read and written where frames help each other, or None.
        reuse: what is read and written where rows go on with kept features, or None.
    """

    x: Tensor
    timesteps: Tensor
    context: Tensor | None
    y: Tensor | None = None
    residuals: dict[str, Tensor] = field(default_factory=dict)
    memory: Remembered | None = None
    reuse: Reused | None = None

    @classmethod
    def of(
        cls, named: dict[str, Tensor], memory: Remembered | None = None,
        reuse: Reused | None = None,
    ) -> "Call":  # fmt: skip
        """The call that these tensors make, by name; what is not named is not there.

        Args:
            memory, reuse: of the call, with other tensors in them.
        """
        residuals = {name: t for name, t in named.items() if name.startswith("control_")}
        if memory is not None:
            reads = {name: t for name, t in named.items() if name.startswith(BANK)}
            memory = replace(memory, reads=reads)
        if reuse is not None:
            reads = {name: t for name, t in named.items() if name.startswith(KEPT)}
            reuse = replace(reuse, reads=reads)
        return cls(
            named["x"], named["timesteps"], named.get("context"), named.get("y"), residuals, memory,
            reuse,
        )  # fmt: skip

    def named(self) -> dict[str, Tensor]:
        """Its tensors by the names that a compiled UNet's inputs have."""
        named = {"x": self.x, "timesteps": self.timesteps, "context": self.context, "y": self.y}
        reads = [part.reads for part in (self.memory, self.reuse) if part is not None]
        every = {**named, **self.residuals}
        for more in reads:
            every |= more
        return {name: t for name, t in every.items() if t is not None}

    @property
    def more(self) -> tuple[str, ...]:
        """Names of what the network gives besides its result."""
        memory = () if self.memory is None else self.memory.layers.outputs
        return memory if self.reuse is None else (*memory, *self.reuse.outputs)

    def shape(self, output: str) -> tuple[int, ...]:
        """Of one of `more`."""
        return self.reuse.shape() if output == GIVEN else self.memory.shape(output)

    def wrote(self, outputs: Mapping[str, Tensor]) -> None:
        """Hand on these of `more`."""
        for name in self.more:
            part = self.reuse if name == GIVEN else self.memory
            part.wrote[name] = outputs[name]

    def given(self) -> tuple[Tensor, ...]:
        """What was handed on, in the order of `more`."""
        return tuple(
            (self.reuse if name == GIVEN else self.memory).wrote[name] for name in self.more
        )

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


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """What the input of this name is in, in a network of this dtype."""
    if name.startswith((SEEN, WHO)) or name in INDICES:
        return torch.int64
    return torch.float32 if name in EXACT else dtype


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
        layers: where frames help each other, or None.
        frames: that these remember.
        depth: what every row runs where rows go on with kept features, or None.
        inner: those of `layers` that only the others have, see Remembered.
    """

    sizes: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: str
    device: str
    layers: Layers | None = None
    frames: int = 1
    depth: int | None = None
    inner: tuple[str, ...] = ()

    @classmethod
    def of(cls, call: Call) -> "Shapes":
        sizes = tuple((name, tuple(t.shape)) for name, t in call.named().items())
        dtype, device, memory = call.x.dtype, str(call.x.device), call.memory
        more = (None, 1) if memory is None else (memory.layers, memory.frames)
        depth = None if call.reuse is None else call.reuse.depth
        inner = () if memory is None else memory.inner
        return cls(sizes, str(dtype).removeprefix("torch."), device, *more, depth, inner)

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return dict(self.sizes)[name]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.sizes)

    def example(self) -> Call:
        """A call of these shapes, on the CPU."""
        dtype = getattr(torch, self.dtype)
        named = {name: torch.zeros(size, dtype=dtype_of(name, dtype)) for name, size in self.sizes}
        memory = None
        if self.layers is not None:
            memory = Remembered(self.layers, self.frames, {}, self.inner)
        reuse = None if self.depth is None else Reused(self.depth, {})
        return Call.of(named, memory, reuse)

    @property
    def open(self) -> "Shapes":
        """With -1 for how many rows run the inner blocks."""
        sizes = tuple(
            (name, (-1, *size[1:]) if name == WHOLE or narrow(name, self.inner) else size)
            for name, size in self.sizes
        )
        return replace(self, sizes=sizes)

    @property
    def graph(self) -> Hashable:
        """What one graph, open in all its sizes, holds for."""
        return self.names, self.layers, self.depth

    @property
    def residuals(self) -> tuple[str, ...]:
        """Names of the ControlNet residual inputs."""
        return tuple(name for name in self.names if name.startswith("control_"))

    def __str__(self) -> str:
        rows, _, height, width = self["x"]
        tokens = self["context"][1] if "context" in self.names else 0
        control = f", {len(self.residuals)} ControlNet residuals" if self.residuals else ""
        more = f", {self.layers}" if self.layers is not None else ""
        if self.depth is not None:
            inner = "some" if WHOLE in self.names else "none"
            more += f", {inner} run more than depth {self.depth}"
        return (
            f"{rows} rows of {width} x {height} latents, {tokens} tokens{control}{more}, "
            f"{self.dtype}"
        )


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
        remembers: it takes calls in which frames help each other, or rows go on with kept features.
        mixes: it takes calls with both.
    """

    name: str
    bakes: bool
    capturable: bool
    placed: bool
    per_shape: bool
    remembers: bool
    mixes: bool

    def prepare(self, unet: UNet, shapes: Shapes) -> None:
        """Make what runs calls of these shapes.

        Raises:
            Refused: it cannot be done, and why.
        """

    def scope(self, shapes: Shapes) -> Hashable:
        """What of the shapes it is made for: equal scopes share an engine."""

    def __call__(self, call: Call) -> Tensor:
        """The UNet's output, [R, C, H, W], in x's dtype and on its device.

        What else it gives goes to `call.memory.wrote`.
        """

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
    remembers = True
    mixes = True

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
