"""The stream batch: frames at different noise levels share one model call (arXiv 2312.12491).

A frame is written into a place of the ring when it enters and stays there until it is finished;
what moves is the place's step number. So nothing is shifted, and a tick is one model call plus one
linear combination of buffers that keep their addresses.
"""

import functools
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
class Plan:
    """Everything about a layout of rows that does not change from tick to tick.

    What is a number per row lies in one tensor, the dial; the others are views of it. So a plan of
    the same `form` is put in another's place by copying dial, noise and entering rows.
    """

    form: tuple  # which of the optional parts there are, and their sizes
    places: list[int]
    spans: list[slice]  # the rows of each place
    rows: slice | Tensor
    entering: slice | Tensor | None  # the rows, in the ring's buffers, of the place in slot 0
    entered: slice | Tensor  # the same rows in the order of the call
    dial: Tensor  # 1-D, float32
    noise: Tensor | None  # weighted noise, [R, C, H, W]
    dims: int = 3  # of a latent
    holds: list[Any] = field(default_factory=list)  # what the plan's key names by id

    def __post_init__(self) -> None:
        parts, at = {}, 0
        for name, count in self.form:
            parts[name] = self.dial[at : at + count]
            at += count

        def column(name: str) -> Tensor | None:
            return parts[name].view(-1, *[1] * self.dims) if name in parts else None

        self.sigma = parts["sigma"]  # [R]
        self.x = column("x")  # [R, 1, 1, 1], None where the weight is 0 for all rows
        self.denoised = column("denoised")  # None where the weight is 1 for all rows
        self.past = [column(name) for name in parts if name.startswith("past")]
        keep = [column(name) for name in ("keep_x", "keep_denoised", "keep_past")]
        self.keep = None if keep[0] is None else keep  # None keeps denoised
        self.mix_source = column("mix_source")  # how the entering rows take in noise, [b, 1, 1, 1]
        self.mix_noise = column("mix_noise")  # None where they take none

    @functools.cached_property
    def index(self) -> Tensor:
        """`entering` as a tensor."""
        return torch.arange(self.entering.start, self.entering.stop, device=self.dial.device)

    def at(self, dial: Tensor, noise: Tensor | None, entering: Tensor) -> "Plan":
        """The same layout with its values elsewhere; every place is full."""
        return Plan(
            self.form, self.places, self.spans, self.rows, entering, entering, dial, noise,
            self.dims,
        )  # fmt: skip


@dataclass
class TickRows:
    """The rows of one model call, as guidance and the host see them (engine.guidance.Rows)."""

    x: Tensor
    sigma: Tensor
    source: Tensor
    entered: slice | Tensor
    places: list[Place]
    spans: list[slice]
    _ring: "Ring"
    _plan: Plan

    def remember(self, negative: Tensor | None, offsets: Sequence[int] | None = None) -> Tensor:
        """Keep the entered rows' reference; returns the references of all rows, [R, C, H, W].

        Args:
            negative: [E, C, H, W], or None to keep what is there.
            offsets: which of the entered rows it belongs to; None means all.
        """
        return self._ring._remember(negative, offsets, self._plan)


@dataclass
class Work:
    """What a tick does on the device: a function of the ring's buffers and of this.

    Attributes:
        source: latents that enter, [b, C, H, W], or None.
        noise: theirs, [b or 1, C, H, W].
        plan: of all rows.
        places: in the plan's order.
        full: every place holds F frames, and F enter.
    """

    ring: "Ring"
    source: Tensor | None
    noise: Tensor | None
    plan: Plan
    places: list[Place]
    full: bool

    def __call__(self, guide: "Guide") -> tuple[Tensor, Tensor]:
        """Rows after the step, and the clean predictions, [R, C, H, W]."""
        ring, plan = self.ring, self.plan
        if self.source is not None:
            ring._admit(plan, self.source, self.noise)
        x, source = ring._take(ring._x, plan.rows), ring._take(ring._source, plan.rows)
        rows = TickRows(x, plan.sigma, source, plan.entered, self.places, plan.spans, ring, plan)
        denoised = ring._finite(guide(rows), source)
        return ring._step(plan, x, denoised), denoised


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
Through = Callable[[Work, Guide], tuple[Tensor, Tensor]]


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
        self._plans: OrderedDict[tuple, Plan] = OrderedDict()

    @property
    def in_flight(self) -> list[Place]:
        """The occupied places, oldest first."""
        return sorted((p for p in self._places if p), key=lambda p: p.age)

    def buffers(self) -> list[Tensor]:
        """Every tensor that a tick reads and writes."""
        own = [self._x, self._source, self._last, self.dropped, *self._past]
        return own if self._reference is None else [*own, self._reference]

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
        through: Through | None = None,
    ) -> Tick:
        """One model call for all frames in flight; the frames given enter first.

        Args:
            guide: gives the clean prediction of every row.
            source: clean latents that enter, [b, C, H, W], b <= F; None only drives the ring.
            payloads: one object per entering frame, handed to `guide` with its rows.
            course: the way the entering frames will take.
            noise: the slots' noise, for entering and for re-noising.
            entry_noise: noise of the entering frames instead of slot 0's, [b, C, H, W].
            through: does the work on the device, `work(guide)`, in its own way.

        Raises:
            Whatever `guide` raises; the frames that entered are gone then, the others untouched.
        """
        entered = None
        if source is not None:
            entered = self._enter(source, list(payloads), course, noise)
        if not any(self._places):
            return Tick()
        plan = self._plan(entered)
        places = [self._places[p] for p in plan.places]
        if entry_noise is None and noise is not None:
            entry_noise = noise.slot(0)
        full = source is not None and all(
            p and p.count == self.frames_per_slot for p in self._places
        )
        work = Work(self, source, entry_noise, plan, places, full)
        try:
            after, denoised = work(guide) if through is None else through(work, guide)
        except BaseException:
            # nothing has moved yet: without the frame that entered, the ring is as it was before
            if entered is not None:
                self._places[entered] = None
            raise
        return self._advance(plan, places, after, denoised)

    def _enter(self, source, payloads, course, noise) -> int:
        if not 1 <= source.shape[0] <= self.frames_per_slot or len(payloads) != source.shape[0]:
            raise ValueError(
                f"{source.shape[0]} frames with {len(payloads)} payloads cannot enter a slot of "
                f"{self.frames_per_slot} frames"
            )
        self._fit(tuple(source.shape[1:]), source.device, course)
        at = self._places.index(None)
        self._places[at] = Place(course, noise, payloads, self._ticks)
        return at

    def _admit(self, plan: Plan, source: Tensor, noise: Tensor) -> None:
        """Frames enter at the noise level of slot 0."""
        clean = self._clean(source)
        x = clean
        if plan.mix_noise is not None:
            x = torch.addcmul(clean * plan.mix_source, noise, plan.mix_noise)
        self._put(self._source, plan.entering, clean)
        self._put(self._x, plan.entering, x)
        if self._reference is not None:
            self._put(self._reference, plan.entering, clean)

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

    def _remember(self, negative, offsets, plan: Plan) -> Tensor:
        if self._reference is None:
            # frames that entered under another mode point at their source
            self._reference = self._source.clone()
        if negative is not None:
            here = plan.entering
            if offsets is not None:
                own = [here.start + i for i in offsets]
                here = torch.tensor(own, device=negative.device)
            known = self._take(self._source, here)
            self._put(self._reference, here, self._finite(negative, known))
        return self._take(self._reference, plan.rows)

    def _plan(self, entered: int | None) -> Plan:
        key = tuple(
            (i, p.k, p.count, id(p.course), id(p.noise)) for i, p in enumerate(self._places) if p
        )
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._make_plan([i for i, *_ in key], entered)
            while len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        return plan

    def _make_plan(self, at: list[int], entered: int | None) -> Plan:
        f = self.frames_per_slot
        places = [self._places[i] for i in at]
        index = [i * f + j for i, p in zip(at, places, strict=True) for j in range(p.count)]
        ends = [sum(p.count for p in places[: i + 1]) for i in range(len(places))]
        spans = [slice(e - p.count, e) for e, p in zip(ends, places, strict=True)]
        per_row = [(p, p.course.steps[p.k]) for p in places for _ in range(p.count)]
        parts = {"sigma": [p.sigma for p, _ in per_row]}
        x, denoised = [w.x for _, w in per_row], [w.denoised for _, w in per_row]
        if any(x):
            parts["x"] = x
        if any(d != 1 for d in denoised):
            parts["denoised"] = denoised
        for i in range(len(self._past)):
            parts[f"past{i}"] = [w.past[i] if i < len(w.past) else 0.0 for _, w in per_row]
        if any(w.keep != _PREDICTION for _, w in per_row):
            for i, name in enumerate(("keep_x", "keep_denoised", "keep_past")):
                parts[name] = [w.keep[i] for _, w in per_row]
        entering, span = None, slice(0, 0)
        if entered is not None:
            place = self._places[entered]
            span, mix = spans[at.index(entered)], place.course.entry
            entering = slice(entered * f, entered * f + place.count)
            if mix.noise:
                parts["mix_source"] = [mix.source] * place.count
                parts["mix_noise"] = [mix.noise] * place.count
        noise = None
        if any(w.noise for _, w in per_row):
            zero = torch.zeros(self._shape, device=self._device)
            noise = torch.stack(
                [p.noise.slot(p.k + 1) * w.noise if w.noise else zero for p, w in per_row]
            )
        contiguous = index == list(range(index[0], index[0] + len(index)))
        numbers = [value for part in parts.values() for value in part]
        return Plan(
            form=tuple((name, len(part)) for name, part in parts.items()),
            places=at,
            spans=spans,
            rows=slice(index[0], index[-1] + 1)
            if contiguous
            else torch.tensor(index, device=self._device),
            entering=entering,
            entered=span,
            dial=torch.tensor(numbers, dtype=torch.float32).to(self._device),
            noise=noise,
            dims=len(self._shape),
            holds=[(p.course, p.noise) for p in places],
        )

    def _step(self, plan: Plan, x: Tensor, denoised: Tensor) -> Tensor:
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

    def _advance(self, plan: Plan, places: list[Place], after: Tensor, denoised: Tensor) -> Tick:
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
