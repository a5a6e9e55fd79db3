"""One tick's rows through the user's model, exactly as ComfyUI would evaluate each frame alone.

Where the route says so (route.py), the model is called once with rows prepared beforehand.
Everything else goes through the guider itself, so LoRA hooks, ControlNet, attention patches,
wrappers and cfg functions act. Where something looks at the first row only (percent ranges, hooks,
cfg functions), rows are split into calls whose first row speaks for all.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import comfy.samplers
import torch
from torch import Tensor

from ...engine.coherence.neighbours import Row
from ...engine.work import TickRows
from .coherence import asked_rows, rows_of
from .guider import RCFGGuider
from .payload import Payload
from .route import Road
from .rows import Joint, Sides, merge_entries
from .visit import Visit

_PREPARED = 32  # batches of one conditioning that are kept


@dataclass
class Group:
    """Rows of a tick that share a call (engine.guidance.Rows)."""

    x: Tensor
    sigma: Tensor
    source: Tensor
    entered: slice
    joint: Joint
    index: list[int] | None = None  # rows of the tick; None means all
    whole: TickRows | None = None
    levels: tuple[float, ...] | None = None  # of their course, where something may look at them
    who: list[Row] = field(default_factory=list)  # told where frames help each other

    def remember(self, negative: Tensor | None) -> Tensor:
        if self.index is None:
            return self.whole.remember(negative)
        first = self.whole.entered.start
        offsets = [self.index[j] - first for j in range(self.entered.start, self.entered.stop)]
        return self.whole.remember(negative, offsets)[self.index]


def evaluate(visit: Visit, rows: TickRows) -> Tensor:
    """Guided clean predictions of all rows, [R, C, H, W]."""
    payloads = [p for place in rows.places for p in place.payloads]
    if visit.neighbours is not None:
        visit.neighbours.begin()  # a direct call may have been told that was not made
    masked = any(p.mask is not None for p in payloads)
    if masked:
        mask, rows, source = _inpaint(visit, rows, payloads)
    if visit.route.road is Road.PER_FRAME:
        sides = payloads[0].conditioning.alone(visit.model)
        out = _guided(visit, rows, sides, who=rows_of(rows.places))
    elif len(groups := _groups(visit, rows, payloads)) == 1:
        out = _call(visit, groups[0])
    else:
        out = torch.empty_like(rows.x)
        for group in groups:
            out[group.index] = _call(visit, group)
    return out * mask + source * (1.0 - mask) if masked else out


def _groups(visit: Visit, rows: TickRows, payloads: list[Payload]) -> list[Group]:
    """The calls of a tick: rows that ComfyUI's look at its first row treats alike."""
    per_level = visit.route.road is Road.PER_LEVEL
    buckets: dict[tuple, list[int]] = {}
    r = 0
    for place in rows.places:
        for payload in place.payloads:
            gate, levels = payload.conditioning.gate(place.sigma), None
            if per_level or payload.conditioning.batch.look:
                gate, levels = (*gate, place.sigma), place.course.sigmas
            buckets.setdefault((gate, levels), []).append(r)
            r += 1
    calls: list[tuple[list[int], Joint, tuple | None]] = []
    for (_, levels), index in buckets.items():
        frames = [payloads[i].conditioning for i in index]
        for part, joint in visit.joints.split(frames, index, visit.model):
            calls.append((part, joint, levels))
    who = rows_of(rows.places)
    if len(calls) == 1:
        _, joint, levels = calls[0]
        return [
            Group(rows.x, rows.sigma, rows.source, rows.entered, joint, None, rows, levels, who)
        ]
    out = []
    for index, joint, levels in calls:
        entered = [j for j, i in enumerate(index) if rows.entered.start <= i < rows.entered.stop]
        span = slice(entered[0], entered[-1] + 1) if entered else slice(0, 0)
        x, sigma, source = rows.x[index], rows.sigma[index], rows.source[index]
        out.append(
            Group(x, sigma, source, span, joint, index, rows, levels, [who[i] for i in index])
        )
    return out


def _call(visit: Visit, group: Group) -> Tensor:
    if visit.guidance is not None and group.joint.plain:
        return visit.guidance(group, lambda rows, which: _predict(visit, rows, which))
    return _guided(visit, group, group.joint.sides, group.levels, group.who)


def _guided(
    visit: Visit, rows: Group | TickRows, sides: Sides, levels: tuple[float, ...] | None = None,
    who: Sequence[Row] = (),
) -> Tensor:  # fmt: skip
    """Clean predictions by the guider itself, [R, C, H, W].

    Args:
        sides: the conditioning of just these rows.
        levels: of their course, where something may look at them.
        who: the rows are.
    """
    guider, options = visit.guider, visit.options
    if visit.neighbours is not None:
        several = any(len(entries) > 1 for entries in sides.values())
        visit.neighbours.among(who, rows.entered, several)
    if levels is not None:
        # the frames of a call may be on another course than the newest
        own = {"sample_sigmas": torch.tensor(levels, device=rows.x.device)}
        transformer = {**options.get("transformer_options", {}), **own}
        options = {**options, "transformer_options": transformer}
    before, ours = guider.conds, isinstance(guider, RCFGGuider)
    guider.conds = sides
    if ours:
        guider.rows = rows
    try:
        return guider(rows.x, rows.sigma, model_options=options, seed=visit.seed)
    finally:
        guider.conds = before
        if ours:
            guider.rows = None


def _predict(visit: Visit, rows: Group, which: str) -> tuple[Tensor, Tensor | None]:
    """The fast path: what calc_cond_batch does for plain conditioning, prepared once per batch."""
    batch = prepared(rows.joint, visit.model, which, rows.x.shape[0], rows.entered)
    if batch is None:
        at = rows.entered if which == "entered" else slice(0, rows.x.shape[0])
        return _predict_apart(visit, rows, at)
    return apply(visit, rows, which, batch)


def asked(values: Tensor, entered: slice, which: str) -> Tensor:
    """What a call is asked of x or sigma: [R, ...] for the prompt, and the negative's rows."""
    if which == "none":
        return values
    # comfy.samplers._calc_cond_batch puts the unconditional rows first
    return torch.cat([values, values[entered] if which == "entered" else values])


def apply(visit: Visit, rows, which: str, batch: tuple) -> tuple[Tensor, Tensor | None]:
    """One call of the model for rows whose conditioning is `prepared`."""
    cond, labels, uuids = batch
    options = visit.options.get("transformer_options", {})
    transformer = {**options, "cond_or_uncond": labels[:], "uuids": uuids[:], "sigmas": rows.sigma}
    x, sigma = (asked(values, rows.entered, which) for values in (rows.x, rows.sigma))
    if visit.neighbours is not None:
        visit.neighbours.ours(asked_rows(rows.who, rows.entered, which))
    out = visit.model.apply_model(x, sigma, **cond, transformer_options=transformer)
    r = rows.x.shape[0]
    if which == "none":
        return out, None
    if which == "entered":
        return out[:r], out[r:]
    negative, positive = out.chunk(2)
    return positive, negative


def _predict_apart(visit: Visit, rows: Group, at: slice) -> tuple[Tensor, Tensor]:
    """Two sides that cannot share a call (prompts of odd lengths) get one each."""
    denoised, _ = _predict(visit, rows, "none")
    negative = rows.joint.flipped(at)
    asked = Group(
        rows.x[at], rows.sigma[at], rows.source[at], slice(0, 0), negative,
        who=[row._replace(side=1) for row in rows.who[at]],
    )  # fmt: skip
    return denoised, _predict(visit, asked, "none")[0]


def prepared(joint: Joint, model, which: str, r: int, span: slice) -> tuple | None:
    """Model conditioning for r rows of a plain joint: (kwargs, cond_or_uncond, uuids).

    None where the two sides cannot share a call.

    Args:
        which: negative rows in the call: none, those of the rows in `span` at its end, or all.
    """
    if joint.rows not in (None, r):
        raise AssertionError(f"conditioning of {joint.rows} rows for {r}")
    if which != "entered":
        span = slice(0, 0)
    key = (which, r, span.start, span.stop)
    if key in joint.prepared:
        return joint.prepared[key]
    positive, negative = joint.sides["positive"], joint.sides.get("negative")
    if which == "entered":
        sides = [*[positive] * r, *[negative] * (span.stop - span.start)]
        indices = [*range(r), *range(r)[span]]
        entries, labels = merge_entries(sides, indices, model), [0]
    else:
        entries = [negative[0], positive[0]] if which == "all" else positive
        labels = [1, 0] if which == "all" else [0]
    batch = None
    if entries is not None:
        size = r if which != "entered" else r + span.stop - span.start
        parts = [
            {k: v.process_cond(batch_size=size, area=None) for k, v in e["model_conds"].items()}
            for e in entries
        ]
        if all(comfy.samplers.cond_equal_size(parts[0], c) for c in parts[1:]):
            batch = (comfy.samplers.cond_cat(parts), labels, [e["uuid"] for e in entries])
    joint.prepared[key] = batch
    while len(joint.prepared) > _PREPARED:
        del joint.prepared[next(iter(joint.prepared))]
    return batch


def _inpaint(visit: Visit, rows: TickRows, payloads: list[Payload]):
    """Outside a frame's mask, x is the source at the row's noise level (KSamplerX0Inpaint)."""
    everywhere = torch.ones_like(rows.source[:1])
    # ComfyUI gives masks of one channel or of all
    mask = torch.cat(
        [everywhere if p.mask is None else p.mask.expand_as(everywhere) for p in payloads]
    )
    change = visit.options.get("denoise_mask_function")
    if change is not None:
        parts = []
        for place, span in zip(rows.places, rows.spans, strict=True):
            extra = {
                "model": visit.guider,
                "sigmas": torch.tensor(place.course.sigmas, device=rows.x.device),
            }
            parts.append(change(rows.sigma[span], mask[span], extra_options=extra))
        mask = torch.cat(parts)
    zero = torch.zeros_like(rows.source[:1])
    noise = torch.cat([zero if p.noise is None else p.noise for p in payloads])
    known = visit.model.scale_latent_inpaint(
        x=rows.x, sigma=rows.sigma, noise=noise, latent_image=rows.source, denoise_mask=mask
    )
    x = rows.x * mask + known * (1.0 - mask)
    return mask, dataclasses.replace(rows, x=x), rows.source

