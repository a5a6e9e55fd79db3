"""Whichever of an engine and the UNet itself is faster on this machine, found while both run.

Nothing waits: the engine is made in a thread of its own while the UNet runs, on a copy of the
weights. Then the two take calls in turns, so that what else the machine does slows both, and the
faster one stays. Only an engine in float32, so that no picture tells which of the two it was.
"""

import statistics
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .engine import Call, Engine, Refused, Shapes, UNet
from .kept import Kept
from .precision import relative

TURNS = 6  # calls of each that are timed
LEAST = 1.05  # times as fast as the UNet itself, or it is not worth its memory
CLOSE = 1e-4  # relative RMS: float rounding and no more


class Faster:
    """An engine beside the UNet itself; see above.

    Args:
        make: the engine, not prepared yet.
        kept: what was measured before.
        about: what a measurement depends on besides shapes and network: processor and versions.
        note: called with a line for people whenever there is something new to say.
        clock: seconds.

    Attributes:
        chosen: the engine's name, "eager", or None while that is open.
        gain: how many times as fast as the UNet itself the engine is.
    """

    bakes = True
    capturable = False
    placed = False
    per_shape = True

    def __init__(
        self,
        make: Callable[[], Engine],
        kept: Kept,
        about: Callable[[], str],
        note: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._clock = clock
        self._engine = make()
        self.name = self._engine.name
        self.remembers, self.mixes = self._engine.remembers, self._engine.mixes
        self._kept, self._about, self._note = kept, about, note
        self._unet: UNet | None = None
        self._made = threading.Event()
        self._gone = threading.Event()
        self._trouble: str | None = None
        self._times: dict[tuple, tuple[list[float], list[float]]] = {}  # by what a call runs
        self._checked = False
        self.chosen: str | None = None
        self.gain: float | None = None

    def scope(self, shapes: Shapes) -> Hashable:
        return shapes.open

    def prepare(self, unet: UNet, shapes: Shapes) -> None:
        """Begin; returns at once, but for a copy of the weights.

        Raises:
            Refused: it is no UNet, or its weights are not there.
        """
        self._unet = unet
        self._key = f"{self._about()}, {_layout(unet)}, {shapes.open}"
        self.gain = self._kept.get(self._key)
        if self.gain is not None and self.gain < LEAST:
            self._stay()
            return
        own = unet.copied()

        def make() -> None:
            try:
                with torch.inference_mode():
                    self._engine.prepare(own, shapes)
            except Exception as error:
                plain = isinstance(error, Refused)
                self._trouble = str(error) if plain else f"{type(error).__name__}: {error}"
            self._made.set()
            if self._gone.is_set():
                self._engine.release()

        # no daemon: Python ends those inside the engine's library, which aborts the process
        threading.Thread(target=make, name=f"livediffusion-{self.name}", daemon=False).start()

    def __call__(self, call: Call) -> Tensor:
        if self.chosen == self.name:
            return self._engine(call)
        if self.chosen is not None or not self._made.is_set():
            return self._unet(call)
        if self._trouble is not None:
            self._stay(f"{self.name} cannot: {self._trouble}")
            return self._unet(call)
        if not self._checked:
            return self._check(call)
        return self._turn(call)

    def _check(self, call: Call) -> Tensor:
        """Both, once: what is told apart is not taken."""
        truth, out = self._unet(call), self._engine(call)
        self._checked = True
        error = relative(out, truth)
        if not error <= CLOSE:
            self._stay(f"{self.name} is {error:.1e} from the UNet itself")
        elif self.gain is not None:
            self._take()
        return truth

    def _turn(self, call: Call) -> Tensor:
        """One of the two, timed; after enough turns the faster one is known."""
        times = self._times.setdefault(Shapes.of(call).sizes, ([], []))
        at = len(times[0]) > len(times[1])
        began = self._clock()
        out = self._engine(call) if at else self._unet(call)
        times[at].append(self._clock() - began)
        if len(times[1]) >= TURNS:
            eager, engine = map(statistics.median, times)
            self.gain = eager / engine
            self._kept.put(self._key, self.gain)
            self._take() if self.gain >= LEAST else self._stay()
        return out

    def _take(self) -> None:
        self.chosen, self._unet = self.name, None
        self._note(f"{self.name} is {self.gain:.2f} times as fast as eager here")

    def _stay(self, why: str | None = None) -> None:
        self.chosen = "eager"
        self._note(
            f"eager, as {why}"
            if why is not None
            else f"eager, as {self.name} is {self.gain:.2f} times as fast here"
        )
        if self._made.is_set():
            self._engine.release()

    def moved(self) -> None:
        """Nothing to do: new weights ask for another one."""

    def describe(self) -> dict[str, Any]:
        told = {
            "engine": self.chosen or "eager", "measuring": self.chosen is None,
            "gain": None if self.gain is None else round(self.gain, 3),
        }  # fmt: skip
        return {**self._engine.describe(), **told} if self.chosen == self.name else told

    def release(self) -> None:
        self._gone.set()
        if self._made.is_set():
            self._engine.release()
        self._unet = None


def _layout(unet: UNet) -> str:
    """What of a network its speed depends on, in a few characters."""
    weights = [tuple(weight.shape) for weight in unet.module.parameters()]
    return f"{type(unet.module).__name__} of {len(weights)} weights, {sum(map(_count, weights))}"


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
