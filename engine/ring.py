"""The stream batch: frames at different noise levels share one model call (arXiv 2312.12491).

A frame is written into a place of the ring when it enters and stays there until it is finished;
what moves is the place's step number. So nothing is shifted, and a tick is one model call plus one
linear combination of buffers that keep their addresses.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .noise import SlotNoise
from .step_rules import Course, Keep

_PREDICTION = Keep()
_PLANS = 64  # row layouts kept; a steady stream of n slots needs n


@dataclass
class Place:
    """The frames that entered together and step together: at most F rows."""

    course: Course
    noise: SlotNoise
    payloads: list[Any]
    age: int
    k: int = 0

    @property
    def count(self) -> int:
        return len(self.payloads)

    @property
    def sigma(self) -> float:
        return self.course.levels[self.k]


@dataclass
class _Plan:
    """Everything about a layout of rows that does not change from tick to tick."""

    places: list[int]
    rows: slice | Tensor
    spans: list[slice]  # the rows of each place
    sigma: Tensor  # [R]
    x: Tensor | None  # [R, 1, 1, 1], None where the weight is 0 for all rows
    denoised: Tensor | None  # None where the weight is 1 for all rows
    past: list[Tensor]
    noise: Tensor | None  # weighted noise, [R, C, H, W]
    keep: tuple[Tensor, Tensor, Tensor] | None  # of x, denoised, past[0]; None keeps denoised
    holds: list[Any]  # what the plan's key names by id must outlive the plan


@dataclass
class TickRows:
    """The rows of one model call, as guidance and the host see them (engine.guidance.Rows)."""

    x: Tensor
    sigma: Tensor
    source: Tensor
    entered: slice
    places: list[Place]
    spans: list[slice]
    _ring: "Ring"
    _rows: slice | Tensor
    _entered_at: int | None

    def remember(self, negative: Tensor | None, offsets: Sequence[int] | None = None) -> Tensor:
        """Keep the entered rows' reference; returns the references of all rows, [R, C, H, W].

        Args:
            negative: [E, C, H, W], or None to keep what is there.
            offsets: which of the entered rows it belongs to; None means all.
        """
        return self._ring._remember(negative, self._entered_at, offsets, self._rows)


@dataclass
class Tick:
    """What a tick gave.

    Attributes:
        finished: latents of the frames that left, oldest first, [b, C, H, W], and their payloads.
        estimate: clean prediction of the most advanced frames, for display while nothing leaves.
        rows: rows of the model call.
    """

    finished: list[tuple[list[Any], Tensor]] = field(default_factory=list)
    estimate: Tensor | None = None
    rows: int = 0


Guide = Callable[[TickRows], Tensor]


class Ring:
    """State of one stream. Not thread-safe: one stream, one thread.

    Args:
        frames_per_slot: F, the most rows that enter together.
    """

    def __init__(self, frames_per_slot: int = 1):
        if frames_per_slot < 1:
            raise ValueError(f"frames_per_slot must be at least 1, not {frames_per_slot}")
        self.frames_per_slot = frames_per_slot
        self.dropped: Tensor | None = None  # non-finite rows replaced so far, int64 on the device
        self.overtaken = 0  # frames that a shorter schedule behind them made stale
        self._places: list[Place | None] = []
        self._ticks = 0
        self._shape: tuple[int, ...] | None = None
        self._device: torch.device | None = None
        self._plans: OrderedDict[tuple, _Plan] = OrderedDict()

    @property
    def in_flight(self) -> list[Place]:
        """The occupied places, oldest first."""
        return sorted((p for p in self._places if p), key=lambda p: p.age)

    def clear(self) -> None:
        """Forget every frame in flight."""
        self._places = [None] * len(self._places)

    def tick(
        self,
        guide: Guide,
        source: Tensor | None = None,
        payloads: Sequence[Any] = (),
        course: Course | None = None,
        noise: SlotNoise | None = None,
        entry_noise: Tensor | None = None,
    ) -> Tick:
        """One model call for all frames in flight; the frames given enter first.

        Args:
            guide: gives the clean prediction of every row.
            source: clean latents that enter, [b, C, H, W], b <= F; None only drives the ring.
            payloads: one object per entering frame, handed to `guide` with its rows.
            course: the way the entering frames will take.
            noise: the slots' noise, for entering and for re-noising.
            entry_noise: noise of the entering frames instead of slot 0's, [b, C, H, W].

        Raises:
            Whatever `guide` raises; the frames that entered are gone then, the others untouched.
        """
        entered = None
        if source is not None:
            entered = self._enter(source, list(payloads), course, noise, entry_noise)
        if not any(self._places):
            return Tick()
        plan = self._plan()
        places = [self._places[p] for p in plan.places]
        x = self._take(self._x, plan.rows)
        span = slice(0, 0) if entered is None else plan.spans[plan.places.index(entered)]
        rows = TickRows(
            x, plan.sigma, self._take(self._source, plan.rows), span, places, plan.spans,
            self, plan.rows, entered,
        )  # fmt: skip
        try:
            denoised = self._finite(guide(rows), rows.source)
        except BaseException:
            # nothing has moved yet: without the frame that entered, the ring is as it was before
            if entered is not None:
                self._places[entered] = None
            raise
        after = self._step(plan, x, denoised)
        return self._advance(plan, places, after, denoised)

    def _enter(self, source, payloads, course, noise, entry_noise) -> int:
        if not 1 <= source.shape[0] <= self.frames_per_slot or len(payloads) != source.shape[0]:
            raise ValueError(
                f"{source.shape[0]} frames with {len(payloads)} payloads cannot enter a slot of "
                f"{self.frames_per_slot} frames"
            )
        self._fit(tuple(source.shape[1:]), source.device, course)
        at = self._places.index(None)
        clean = self._clean(source)
        x = noise.slot(0) if entry_noise is None else entry_noise
        mix = course.entry
        b = source.shape[0]
        self._source[at, :b] = clean
        self._x[at, :b] = torch.add(clean * mix.source, x, alpha=mix.noise) if mix.noise else clean
        if self._reference is not None:
            self._reference[at, :b] = clean
        self._places[at] = Place(course, noise, payloads, self._ticks)
        return at

    def _fit(self, shape, device, course) -> None:
        """Buffers for this size and for every course in flight; frames of another size are gone."""
        if shape != self._shape or device != self._device:
            self._shape, self._device = shape, device
            self._allocate(course.n, course.rule.history, [])
            self.dropped = torch.zeros((), dtype=torch.int64, device=device)
            return
        flying = self.in_flight
        needed = max([course.n, *(p.course.n for p in flying)])
        history = max([course.rule.history, *(p.course.rule.history for p in flying)])
        if needed != len(self._places) or history > len(self._past):
            self._allocate(needed, history, flying)

    def _allocate(self, n: int, history: int, keep: list[Place]) -> None:
        f, old = self.frames_per_slot, self._places
        before = [(old.index(p), p) for p in keep]

        def moved(buffer: Tensor | None) -> Tensor:
            fresh = torch.zeros((n, f, *self._shape), device=self._device)
            for new, (at, _) in enumerate(before if buffer is not None else []):
                fresh[new] = buffer[at]
            return fresh

        had = bool(keep)
        self._x = moved(self._x if had else None)
        self._source = moved(self._source if had else None)
        self._reference = moved(self._reference) if had and self._reference is not None else None
        past = self._past if had else []
        self._past = [moved(past[i] if i < len(past) else None) for i in range(history)]
        if not had:
            self._last = torch.zeros(self._shape, device=self._device)
        self._places = [*keep, *[None] * (n - len(keep))]
        self._plans.clear()

    def _clean(self, source: Tensor) -> Tensor:
        """A frame with a non-finite value is replaced by the frame before it, on the device."""
        finite = source.flatten(1).sum(1).isfinite()
        clean = torch.where(self._wide(finite), source, self._last)
        self._last.copy_(clean[-1])
        self.dropped += source.shape[0] - finite.sum()
        return clean

    def _finite(self, denoised: Tensor, source: Tensor) -> Tensor:
        """A non-finite prediction is replaced by the row's source and never reaches the state."""
        finite = denoised.flatten(1).sum(1).isfinite()
        self.dropped += denoised.shape[0] - finite.sum()
        return torch.where(self._wide(finite), denoised, source)

    def _wide(self, per_row: Tensor) -> Tensor:
        return per_row.view(-1, *[1] * len(self._shape))

    def _take(self, buffer: Tensor, rows: slice | Tensor) -> Tensor:
        flat = buffer.flatten(0, 1)
        return flat[rows] if isinstance(rows, slice) else flat.index_select(0, rows)

    def _put(self, buffer: Tensor, rows: slice | Tensor, values: Tensor) -> None:
        flat = buffer.flatten(0, 1)
        if isinstance(rows, slice):
            flat[rows].copy_(values)
        else:
            flat.index_copy_(0, rows, values)

    def _remember(self, negative, at, offsets, rows) -> Tensor:
        if self._reference is None:
            # frames that entered under another mode point at their source
            self._reference = self._source.clone()
        if negative is not None:
            here = slice(0, negative.shape[0]) if offsets is None else list(offsets)
            self._reference[at, here] = self._finite(negative, self._source[at, here])
        return self._take(self._reference, rows)

    def _plan(self) -> _Plan:
        key = tuple(
            (i, p.k, p.count, id(p.course), id(p.noise)) for i, p in enumerate(self._places) if p
        )
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._make_plan([i for i, *_ in key])
            while len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        return plan

    def _make_plan(self, at: list[int]) -> _Plan:
        f = self.frames_per_slot
        places = [self._places[i] for i in at]
        index = [i * f + j for i, p in zip(at, places, strict=True) for j in range(p.count)]
        ends = [sum(p.count for p in places[: i + 1]) for i in range(len(places))]
        spans = [slice(e - p.count, e) for e, p in zip(ends, places, strict=True)]
        per_row = [(p, p.course.steps[p.k]) for p in places for _ in range(p.count)]

        def column(values: list[float]) -> Tensor:
            return self._wide(torch.tensor(values, dtype=torch.float32).to(self._device))

        def past(i: int) -> Tensor:
            return column([w.past[i] if i < len(w.past) else 0.0 for _, w in per_row])

        x, denoised = [w.x for _, w in per_row], [w.denoised for _, w in per_row]
        contiguous = index == list(range(index[0], index[0] + len(index)))
        noise = None
        if any(w.noise for _, w in per_row):
            zero = torch.zeros(self._shape, device=self._device)
            noise = torch.stack(
                [p.noise.slot(p.k + 1) * w.noise if w.noise else zero for p, w in per_row]
            )
        return _Plan(
            places=at,
            rows=slice(index[0], index[-1] + 1)
            if contiguous
            else torch.tensor(index, device=self._device),
            spans=spans,
            sigma=column([p.sigma for p, _ in per_row]).flatten(),
            x=column(x) if any(x) else None,
            denoised=column(denoised) if any(d != 1 for d in denoised) else None,
            past=[past(i) for i in range(len(self._past))],
            noise=noise,
            keep=None
            if all(w.keep == _PREDICTION for _, w in per_row)
            else tuple(column([w.keep[i] for _, w in per_row]) for i in range(3)),
            holds=[(p.course, p.noise) for p in places],
        )

    def _step(self, plan: _Plan, x: Tensor, denoised: Tensor) -> Tensor:
        """Every row takes its step; returns the new x, which is in the ring too."""
        after = denoised if plan.denoised is None else denoised * plan.denoised
        if plan.x is not None:
            after = torch.addcmul(after, x, plan.x)
        for weight, past in zip(plan.past, self._past, strict=True):
            after = torch.addcmul(after, self._take(past, plan.rows), weight)
        if plan.noise is not None:
            after = after + plan.noise
        if self._past:
            kept = denoised
            if plan.keep is not None:
                of_x, of_denoised, of_past = plan.keep
                kept = torch.addcmul(denoised * of_denoised, x, of_x)
                kept = torch.addcmul(kept, self._take(self._past[0], plan.rows), of_past)
            for newer, older in zip(self._past[-2::-1], self._past[:0:-1], strict=True):
                older.copy_(newer)
            self._put(self._past[0], plan.rows, kept)
        self._put(self._x, plan.rows, after)
        return after

    def _advance(self, plan: _Plan, places: list[Place], after: Tensor, denoised: Tensor) -> Tick:
        tick = Tick(rows=after.shape[0])
        self._ticks += 1
        furthest = max(range(len(places)), key=lambda i: (places[i].k / places[i].course.n, -i))
        tick.estimate = denoised[plan.spans[furthest]]
        left: list[tuple[Place, Tensor]] = []
        for at, place, span in zip(plan.places, places, plan.spans, strict=True):
            place.k += 1
            if place.k == place.course.n:
                self._places[at] = None
                out = after[span]
                left.append((place, out if place.course.unmix == 1 else out * place.course.unmix))
        left.sort(key=lambda pair: pair[0].age)
        tick.finished = [(place.payloads, out) for place, out in left]
        if left:
            # a stream never shows an older frame after a newer one
            newest = left[-1][0].age
            for at, place in enumerate(self._places):
                if place and place.age < newest:
                    self._places[at] = None
                    self.overtaken += place.count
        return tick
