"""The whole tick as one recording: entry, UNet, guidance, step.

Everything that may change between two ticks is read from tensors (`graph.Knobs`), so prompt, cfg,
delta, noise and noise levels never ask for a new recording.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..engine.buffers import Buffers
from ..engine.fold import Fold
from ..engine.linear import Linear
from ..engine.work import Work
from .graph import Knobs, Recording

_FRESH = frozenset({"source"})  # other values at each tick, even where the tensor is the same


class RecordedTick:
    """One recorded tick.

    Args:
        work: an example; nothing of it but its layout is kept.
        fold: its weights.
        guide: makes the guide that is recorded, from the tensors that hold the knobs.
        knobs: what the guide reads, by name.
        recording: what records.
    """

    def __init__(
        self,
        work: Work,
        fold: Fold,
        guide: Callable[[dict[str, Tensor]], Linear],
        knobs: dict[str, Tensor],
        recording: Recording,
    ):
        self._recording = recording
        self._knobs = Knobs({**_read(work, fold), **knobs})
        self._own = frozenset(knobs)
        mine = self._knobs.tensors
        plan = work.plan.at(mine["entering"])
        still = dataclasses.replace(
            work, source=mine["source"], noise=mine.get("entry"), plan=plan, recorded=True
        )
        weights = fold.at(mine["dial"], mine.get("base"))
        held = guide({name: mine[name] for name in knobs})

        def once() -> None:
            held.carry_out(still, weights)  # whose rows end in the ring

        recording.capture(once)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Where the knobs are read from."""
        return self._knobs.tensors

    def fill(self, work: Work, fold: Fold, knobs: dict[str, Tensor]) -> set[str]:
        """Set everything for a tick; returns which of `knobs` are new."""
        fresh = _FRESH | {"base"} if work.plan.renewed else _FRESH
        return self._knobs.fill({**_read(work, fold), **knobs}, fresh) & self._own

    def replay(self, work: Work) -> tuple[Tensor, None]:
        """The tick: rows after the step, as they lie in the ring, [R, C, H, W]."""
        self._recording.replay()
        own = work.buffers
        return own.take(own.x, work.plan.rows), None

    def release(self) -> None:
        self._recording.release()


def layout(work: Work, fold: Fold) -> tuple[Any, ...]:
    """Ticks of equal layouts can share a recording, as far as the ring is concerned."""
    own = work.buffers
    entry = own.entry(work.noise, work.plan.mix)
    # the addresses alone do not tell: buffers of another size may come to lie at the same ones
    return (
        fold.form, fold.which, fold.base is None, None if entry is None else tuple(entry.shape),
        tuple(own.shape), where(own), None if work.carried is None else work.carried.key,
    )  # fmt: skip


def where(buffers: Buffers) -> tuple[int, ...]:
    """Addresses of the ring's buffers."""
    return tuple(buffer.data_ptr() for buffer in buffers.all())


def _read(work: Work, fold: Fold) -> dict[str, Tensor]:
    plan = work.plan
    read = {"source": work.source, "dial": fold.dial, "entering": plan.index}
    entry = work.buffers.entry(work.noise, plan.mix)
    if entry is not None:
        read["entry"] = entry
    if fold.base is not None:
        read["base"] = fold.base
    return read
