"""The stream batch: frames at different noise levels share one model call (arXiv 2312.12491).

A frame is written into a place of the ring when it enters and stays there until it is finished;
what moves is the place's step number. So nothing is shifted, and a tick is one model call plus one
linear combination of buffers that keep their addresses.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .buffers import Buffers
from .noise import Noise
from .plan import Place, Plan, plan
from .step_rules import Course
from .work import Guide, Way, Work

_PLANS = 64  # row layouts kept; a steady stream of n slots needs n


@dataclass
class Tick:
    """What a tick gave.

    Attributes:
        finished: latents of the frames that left, oldest first, [b, C, H, W], and their payloads.
        predictions: their last clean predictions, in the same order, where the ring gives them.
        estimate: clean prediction of the most advanced frames, for display while nothing leaves.
        rows: rows of the model call.
    """

    finished: list[tuple[list[Any], Tensor]] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    estimate: Tensor | None = None
    rows: int = 0


class Ring:
    """State of one stream. Not thread-safe: one stream, one thread.

    Args:
        frames_per_slot: F, the most rows that enter together.
        predictions: also give the last predictions of the frames that leave. They end at a noise
            level above 0, or else these are what leaves; a tick takes a few operations more.
    """

    def __init__(self, frames_per_slot: int = 1, predictions: bool = False):
        if frames_per_slot < 1:
            raise ValueError(f"frames_per_slot must be at least 1, not {frames_per_slot}")
        self.frames_per_slot = frames_per_slot
        self._predictions = predictions
        self.overtaken = 0  # frames that a shorter schedule behind them made stale
        self.buffers: Buffers | None = None
        self._places: list[Place | None] = []
        self._ticks = 0
        self._plans: OrderedDict[tuple, Plan] = OrderedDict()
        self._newest: tuple[Course, Noise] | None = None  # of the frames that entered last

    @property
    def in_flight(self) -> list[Place]:
        """The occupied places, oldest first."""
        return sorted((p for p in self._places if p), key=lambda p: p.age)

    @property
    def dropped(self) -> int:
        """Non-finite rows replaced so far; reading it waits for the device."""
        return 0 if self.buffers is None else int(self.buffers.dropped)

    def clear(self) -> None:
        """Forget every frame in flight."""
        self._places = [None] * len(self._places)

    def tick(
        self,
        guide: Guide,
        source: Tensor | None = None,
        payloads: Sequence[Any] = (),
        course: Course | None = None,
        noise: Noise | None = None,
        entry_noise: Tensor | None = None,
        road: Way | None = None,
    ) -> Tick:
        """One model call for all frames in flight; the frames given enter first.

        Args:
            guide: gives the clean prediction of every row.
            source: clean latents that enter, [b, C, H, W], b <= F; None only drives the ring.
            payloads: one object per entering frame, handed to `guide` with its rows.
            course: the way the entering frames will take.
            noise: the slots' noise, for entering and for re-noising; it goes with the frames.
            entry_noise: noise of the entering frames instead of slot 0's, [b, C, H, W].
            road: does the work on the device, `work(guide)`, in its own way.

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
        plan.renew(places)
        if entry_noise is None and noise is not None:
            entry_noise = noise.slot(0)
        f = self.frames_per_slot
        leaves = any(p.finishes for p in places)
        # else somebody looks at the predictions
        finishes = leaves and not self._predictions
        full = (
            finishes
            and source is not None
            and all(p is not None and p.count == f for p in self._places)
        )
        steady = leaves and source is not None
        work = Work(self.buffers, source, entry_noise, plan, places, finishes, full, steady)
        try:
            after, denoised = work(guide) if road is None else road(work, guide)
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
        self._newest = course, noise
        return at

    def _fit(self, shape, device, course) -> None:
        """Buffers for this size and for every course in flight; frames of another size are gone."""
        known = self.buffers
        if known is None or (shape, device) != (known.shape, known.device):
            self._allocate(course.n, course.rule.history, shape, device)
            return
        courses = {course, *[p.course for p in self._places if p]}
        needed = max([c.n for c in courses])
        history = max([c.rule.history for c in courses])
        if needed != len(self._places) or history > len(known.past):
            self._allocate(needed, history, shape, device, self.in_flight)

    def _allocate(self, n, history, shape, device, keep: list[Place] | None = None) -> None:
        before = None
        if keep is not None:
            before = self.buffers, [self._places.index(p) for p in keep]
        dropped = 0 if self.buffers is None else self.buffers.dropped
        self.buffers = Buffers(n, self.frames_per_slot, shape, device, history, before, dropped)
        keep = keep or []
        self._places = [*keep, *[None] * (n - len(keep))]
        self._plans.clear()

    def _plan(self, entered: int | None) -> Plan:
        key = tuple(
            (i, p.k, p.count, id(p.course), id(p.lasting)) for i, p in enumerate(self._places) if p
        )
        known = self._plans.get(key)
        if known is None:
            self._forget()
            own = self.buffers
            known = self._plans[key] = plan(
                self._places, [i for i, *_ in key], entered, own.f, len(own.past), own.shape,
                own.device,
            )  # fmt: skip
            while len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        return known

    def _forget(self) -> None:
        """Drop the plans that name a course or noise which no frame has and none entered with last.

        Each holds its rows' noise, weighted; with a new seed per frame none of them comes again.
        """
        taken = [(place.course, place.lasting) for place in self._places if place]
        alive = {id(part) for pair in [*taken, self._newest, (None,)] for part in pair}
        for key, known in list(self._plans.items()):
            if any(id(part) not in alive for pair in known.holds for part in pair):
                del self._plans[key]

    def _advance(self, plan: Plan, places: list[Place], after: Tensor, denoised) -> Tick:
        tick = Tick(rows=after.shape[0])
        self._ticks += 1
        if denoised is not None:
            furthest = max(range(len(places)), key=lambda i: (places[i].k / places[i].course.n, -i))
            tick.estimate = denoised[plan.spans[furthest]]
        left: list[tuple[Place, slice]] = []
        for at, place, span in zip(plan.places, places, plan.spans, strict=True):
            place.k += 1
            if place.k == place.course.n:
                self._places[at] = None
                left.append((place, span))
        if not left:
            return tick
        left.sort(key=lambda one: one[0].age)
        # a stream never shows an older frame after a newer one
        newest = left[-1][0].age
        for at, place in enumerate(self._places):
            if place and place.age < newest:
                self._places[at] = None
                self.overtaken += place.count
        # behind all that moves: here memory may be short, which costs these frames only
        for place, span in left:
            out, unmix = after[span], place.course.unmix
            # the next tick writes over the rows
            tick.finished.append((place.payloads, out.clone() if unmix == 1 else out * unmix))
        if self._predictions:
            tick.predictions = [denoised[span] for _, span in left]
        if tick.estimate is None:
            tick.estimate = tick.finished[-1][1]
        return tick
