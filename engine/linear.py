"""A tick in a handful of operations, for models whose prediction is linear in what they return.

Per row the whole tick is one weighted sum (engine.fold has its weights):

    x' = x * w_x + noise + output * w_output + negative * w_negative + reference * w_reference + ...
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import stream_enter, stream_step
from .fold import Fold, Levels, fold
from .guidance import Guidance, Which
from .plan import Plan
from .sums import weighted
from .work import OwnWay, Work

_SECOND = {"off": "nothing", "self-negative": "source", "onetime-negative": "reference"}


@dataclass
class Linear(OwnWay):
    """A guide that knows the model only by its levels and its raw output.

    Attributes:
        guidance: with cfg and delta as numbers.
        which: negative rows in the call: none, those of the entered rows at its end, or all of them
            at its beginning.
        levels: gives the Level of a sigma; the same object as long as the model means the same.
        model: the raw output of y [M, C, H, W] at the fold's timesteps [M].
        dtype: what y is given in.
    """

    guidance: Guidance
    which: Which
    levels: Levels
    model: Callable[[Tensor, Fold], Tensor]
    dtype: torch.dtype = torch.float32

    def fold(self, plan: Plan) -> Fold:
        """The weights for a layout of rows."""
        return fold(plan, self.guidance, self.which, self.levels)

    def carry_out(self, work: Work, weights: Fold | None = None) -> tuple[Tensor, Tensor | None]:
        """See engine.work.OwnWay. A non-finite value becomes 0 before it reaches the state, and
        its row is counted.

        Args:
            weights: read instead of the plan's own, for work that is recorded.

        Returns:
            The rows after the step, which may be the ring's own, and the guided predictions
            [R, C, H, W]; None for these while a frame leaves, because nobody looks at them then.
        """
        if weights is None:
            weights = self.fold(work.plan)
            prepare(work, self)
        fused = work.full and not work.buffers.unfused and work.carried is None
        return (_fused if fused else _unfused)(work, self, weights)


def _unfused(work: Work, guide: Linear, fold: Fold) -> tuple[Tensor, Tensor | None]:
    own, plan = work.buffers, work.plan
    if work.source is not None:
        entry = work.noise if work.recorded else own.entry(work.noise, plan.mix)
        own.admit(plan, work.source, entry, fold.mix)
    views = own.views(plan)
    x = own.take(own.x, plan.rows) if views.x is None else views.x
    # what the model sees, once or twice, and x's own part of the step
    if fold.base is None:
        planes = torch.mul(x[None], fold.gain)
    else:
        planes = torch.addcmul(fold.base, x[None], fold.gain)
    y, after = planes if len(planes) == 2 else (planes[:-1].flatten(0, 1), planes[-1])
    if fold.which == "entered":
        y = torch.cat([y, own.take(y, plan.entered)])
    out = guide.model(y.to(guide.dtype), fold)
    terms = {"x": x, "output": out}
    if fold.which == "all":
        # comfy.samplers._calc_cond_batch puts the unconditional rows first
        terms["negative"], terms["output"] = out.chunk(2)
    elif fold.which == "entered":
        terms["output"] = out[: x.shape[0]]
    reference = _reference(work, guide, fold, terms, out)
    for i, past in enumerate(own.past):
        terms[f"past{i}"] = own.take(past, plan.rows)
    weighted(fold.weights["after"], terms, onto=after)
    denoised = None
    if work.carried is not None or not work.finishes:
        denoised = weighted(fold.weights["denoised"], terms)
    kept = weighted(fold.weights["kept"], terms) if own.past else None
    if work.carried is not None:
        before, denoised = denoised, work.carried(plan, denoised)
        more = denoised - before
        after.addcmul_(more, fold.weights["carried"]["after"])
        if kept is not None:
            kept.addcmul_(more, fold.weights["carried"]["kept"])
    if kept is not None:
        own.push(plan.rows, kept.nan_to_num_(0.0, 0.0, 0.0))
    own.count(after, work.recorded)
    if reference is not None and work.source is not None:
        own.heal(reference, plan)
    if views.x is not None:
        return torch.nan_to_num(after, 0.0, 0.0, 0.0, out=x), denoised
    own.put(own.x, plan.rows, after.nan_to_num_(0.0, 0.0, 0.0))
    return after, denoised


def _fused(work: Work, guide: Linear, fold: Fold) -> tuple[Tensor, None]:
    """A tick of full slots as two kernels and the model (kernels.stream)."""
    own, plan = work.buffers, work.plan
    entering = plan.index if isinstance(plan.entering, slice) else plan.entering
    entry = work.noise if work.recorded else own.entry(work.noise, plan.mix)
    y, after = stream_enter(
        own.state, work.source, entry, entering, fold.mix, fold.base, fold.gain, own.bad,
        own.bad_rows, fold.which == "entered", guide.dtype,
    )  # fmt: skip
    out = guide.model(y, fold).contiguous()
    second = "negative" if fold.which == "all" else _SECOND.get(guide.guidance.mode, "nothing")
    stream_step(
        own.state, after, out, fold.after, second,
        own.reference if second == "reference" else None, own.past, fold.kept, fold.own, entering,
        own.bad,
    )  # fmt: skip
    return own.x, None


def prepare(work: Work, guide: Linear) -> None:
    """What Python has to see before a tick, recorded or not."""
    if guide.guidance.mode == "onetime-negative":
        if guide.which == "entered":
            for place in work.places:
                place.referenced |= place.k == 0
        work.buffers.references(work.places, work.plan)


def _reference(work: Work, guide: Linear, fold: Fold, terms: dict, out: Tensor) -> Tensor | None:
    """Adds what residual guidance points at to `terms`; returns its buffer."""
    mode, own, plan = guide.guidance.mode, work.buffers, work.plan
    if mode not in ("self-negative", "onetime-negative"):
        return None
    buffer = own.source if mode == "self-negative" else own.reference
    if fold.which == "entered":
        # the negative prediction of the frames in slot 0, made once
        fresh = {"x": own.take(terms["x"], plan.entered), "output": out[terms["x"].shape[0] :]}
        if isinstance(plan.entering, slice):
            weighted(fold.weights["entered"], fresh, out=buffer[plan.entering])
        else:
            own.put(buffer, plan.entering, weighted(fold.weights["entered"], fresh))
    source = own.views(plan).source if buffer is own.source else None
    terms["reference"] = own.take(buffer, plan.rows) if source is None else source
    return buffer
