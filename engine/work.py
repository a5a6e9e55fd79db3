"""What a tick does on the device, from the entering frames to the rows after their step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .buffers import Buffers
from .coherence.carry import Carried
from .plan import Place, Plan
from .upload import uploaded


@dataclass
class TickRows:
    """The rows of one model call, as guidance and the host see them (engine.guidance.Rows)."""

    x: Tensor
    sigma: Tensor
    source: Tensor
    entered: slice
    places: list[Place]
    spans: list[slice]
    _buffers: Buffers
    _plan: Plan

    def remember(self, negative: Tensor | None, offsets: Sequence[int] | None = None) -> Tensor:
        """Keep the entered rows' reference; returns the references of all rows, [R, C, H, W].

        Args:
            negative: [E, C, H, W], or None to keep what is there.
            offsets: which of the entered rows it belongs to; None means all.
        """
        buffers, plan = self._buffers, self._plan
        reference = buffers.references(self.places, plan)
        if negative is not None:
            here = plan.entering
            if offsets is not None:
                own = [here.start + i for i in offsets]
                here = uploaded(torch.tensor(own), negative.device)
            known = buffers.take(buffers.source, here)
            buffers.put(reference, here, buffers.finite(negative, known))
        return buffers.take(reference, plan.rows)


@dataclass
class Work:
    """What a tick does on the device: a function of the ring's buffers and of this.

    Attributes:
        source: latents that enter, [b, C, H, W], or None.
        noise: theirs, [b or 1, C, H, W].
        plan: of all rows.
        places: in the plan's order.
        finishes: frames leave after this tick, and nobody looks at predictions.
        full: they do, F enter, and every place holds F.
        steady: frames enter and frames leave, so the next tick has as many rows.
        recorded: this is recorded, so Python sees it once only.
        carried: what is carried from the predictions of frames before; None for nothing.
    """

    buffers: Buffers
    source: Tensor | None
    noise: Tensor | None
    plan: Plan
    places: list[Place]
    finishes: bool
    full: bool
    steady: bool
    recorded: bool = False
    carried: Carried | None = None

    def __call__(self, guide: "Guide") -> tuple[Tensor, Tensor | None]:
        """Rows after the step, and the clean predictions, [R, C, H, W].

        The rows may be the ring's own; the predictions may be None while frames leave.
        """
        if isinstance(guide, OwnWay):
            return guide.carry_out(self)
        buffers, plan = self.buffers, self.plan
        if self.source is not None:
            buffers.enter(plan, self.source, self.noise)
        x, source = (buffers.take(own, plan.rows) for own in (buffers.x, buffers.source))
        rows = TickRows(x, plan.sigma, source, plan.entered, self.places, plan.spans, buffers, plan)
        denoised = buffers.finite(guide(rows), source)
        if self.carried is not None:
            denoised = self.carried(plan, denoised)
        return buffers.step(plan, x, denoised), denoised


class OwnWay:
    """A guide that does all of the work itself, instead of giving clean predictions."""

    def carry_out(self, work: Work) -> tuple[Tensor, Tensor | None]:
        """As Work.__call__."""
        raise NotImplementedError


Guide = Callable[[TickRows], Tensor] | OwnWay
# how the work reaches the model: work(guide), or the same done in another way
Way = Callable[[Work, Guide], tuple[Tensor, Tensor | None]]
