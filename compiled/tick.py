"""The whole tick as one recording: entry, UNet, guidance, step.

Everything that may change between two ticks is read from tensors (`graph.Knobs`), so prompt, cfg,
delta, noise and noise levels never ask for a new recording.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..engine.ring import Guide, Plan, Ring, Work
from .graph import Knobs, Recording

_FRESH = frozenset({"source"})  # other values at each tick, even where the tensor is the same


class Recorded:
    """One recorded tick.

    Args:
        work: an example; nothing of it but its layout is kept.
        guide: makes the guide that is recorded, from the tensors that hold the knobs.
        knobs: what the guide reads, by name.
        recording: what records.
    """

    def __init__(
        self,
        work: Work,
        guide: Callable[[dict[str, Tensor]], Guide],
        knobs: dict[str, Tensor],
        recording: Recording,
    ):
        self._recording = recording
        self._knobs = Knobs({**_read(work), **knobs})
        self._own = frozenset(knobs)
        mine = self._knobs.tensors
        plan = work.plan.at(mine["dial"], mine.get("noise"), mine["entering"])
        still = Work(work.ring, mine["source"], mine["entry"], plan, work.places, True)
        asked = guide({name: mine[name] for name in knobs})
        self._after, self._denoised = recording.capture(lambda: still(asked))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Where the knobs are read from."""
        return self._knobs.tensors

    def fill(self, work: Work, knobs: dict[str, Tensor]) -> set[str]:
        """Set everything for a tick; returns which of `knobs` are new."""
        return self._knobs.fill({**_read(work), **knobs}, _FRESH) & self._own

    def replay(self, work: Work) -> tuple[Tensor, Tensor]:
        """The tick: rows after the step, and the clean predictions, [R, C, H, W]."""
        self._recording.replay()
        finishes = any(place.k + 1 == place.course.n for place in work.places)
        # the next replay writes over both; predictions are shown only while nothing has left
        return self._after.clone(), self._denoised if finishes else self._denoised.clone()

    def release(self) -> None:
        self._recording.release()


def layout(work: Work) -> tuple[Any, ...]:
    """Ticks of equal layouts can share a recording, as far as the ring is concerned."""
    return (
        work.plan.form, work.plan.noise is not None, tuple(work.noise.shape), where(work.ring)
    )  # fmt: skip


def where(ring: Ring) -> tuple[int, ...]:
    """Addresses of the ring's buffers."""
    return tuple(buffer.data_ptr() for buffer in ring.buffers())


def _read(work: Work) -> dict[str, Tensor]:
    plan: Plan = work.plan
    read = {
        "source": work.source,
        "entry": work.noise,
        "dial": plan.dial,
        "entering": plan.index,
    }
    if plan.noise is not None:
        read["noise"] = plan.noise
    return read
