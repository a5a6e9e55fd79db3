"""The recordings of a stream's ticks: when one is made, when it ends, when a tick takes it."""

import contextlib
import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from ...compiled.engine import WeightsAway
from ...compiled.graph import CudaRecording, Folded, Recording, pool_size
from ...compiled.layout import Led
from ...compiled.tick import RecordedTick, layout
from ...compiled.weights import fixed
from ...engine.fold import Fold
from ...engine.linear import Linear, prepare
from ...engine.work import Guide, Way, Work
from ...kernels import stream_enter, stream_step
from ...kernels.choice import graph_unfit
from ..models.compiler import uncompiled
from ..models.engines import REST, Attached, engine_of, reason_of
from ..models.unet import ComfyUNet, inference_dtype
from ..models.weights import weights_version
from .coherence import told
from .direct import Direct
from .route import Road
from .visit import Calls, Visit

_WARM = 2  # ticks that a stream runs as it is before one is recorded
_KEPT = 8  # recordings of other layouts that are kept: of other numbers of rows that run whole
_FOLDS = 64  # time embeddings kept; a steady stream of n slots needs n
_APART = "its frames have a mask, or prompts that take calls of their own"


class Recordings:
    """The recorded ticks of one stream.

    A tick is recorded where its MODEL's engine allows it, every slot is full, and one plain call
    serves all rows. A plain call that is not recorded is made directly; every other tick runs
    through ComfyUI's own evaluation.

    Args:
        calls: counts model calls; a replay makes one.
        recording: makes what records.
    """

    def __init__(self, calls: Calls, recording: Callable[[], Recording] = CudaRecording):
        self._calls = calls
        self._new = recording
        self._direct = Direct(calls)
        self._kept: OrderedDict[tuple, _FoldedTick] = OrderedDict()
        self._seen: dict[tuple, int] = {}
        self._failed: set[tuple] = set()
        self._weights: tuple | None = None
        self._away = False  # they are where no tick can be recorded on them
        self._engine: Callable = lambda: None
        self._sampling: Callable = lambda: None
        self._rests_until = 0.0
        self.captures = 0

    def road(self, visit: Visit) -> Way | None:
        """How this run's ticks are done, or None for as the guide says."""
        attached = self._recording_engine(visit)
        engine = engine_of(visit.guider.model_patcher)
        direct = visit.route.road is Road.DIRECT
        if not direct and engine is None:
            return None

        def as_it_is(work: Work, guide: Guide) -> tuple[Tensor, Tensor | None]:
            asked = self._direct.asked(visit, work) if direct else None
            straight = None if asked is None else self._direct.guide(visit, work, asked)
            if straight is not None:
                told(visit, work, asked.which)
            return work(guide if straight is None else straight)

        def road(work: Work, guide: Guide) -> tuple[Tensor, Tensor | None]:
            aside = visit.route.why
            if direct and attached is not None and work.full:
                asked = self._direct.asked(visit, work, steady=True)
                aside = _APART if asked is None else ""
                done = None if asked is None else self._tick(visit, attached, work, asked)
                if done is not None:
                    return done
            if engine is None:
                return as_it_is(work, guide)
            # a ring that fills or drains has as many rows once only, and in every clip again
            with engine.passing(not work.steady, aside):
                return as_it_is(work, guide)

        return road

    def linear(self, model, levels: tuple[float, ...]) -> bool:
        """See Direct.linear."""
        return self._direct.linear(model, levels)

    def _recording_engine(self, visit: Visit) -> Attached | None:
        """The engine that allows recordings of this MODEL's ticks, if there is one."""
        patcher = visit.guider.model_patcher
        attached = engine_of(patcher)
        if attached is not None and not attached.capturable:
            attached = None
        if self._new is CudaRecording and patcher.load_device.type != "cuda":
            attached = None
        self._same_engine(visit, attached)
        return attached

    def release(self) -> None:
        """Forget every recording."""
        while self._kept:
            self._kept.popitem()[1].recorded.release()
        self._seen.clear()
        self._failed.clear()

    def _same_engine(self, visit: Visit, attached: Attached | None) -> None:
        """Recordings end with the MODEL's engine, and when its model_sampling is another."""
        sampling = visit.model.model_sampling
        if self._engine() is attached and self._sampling() is sampling:
            return
        self.release()
        self._weights = None
        self._engine = (lambda: None) if attached is None else weakref.ref(attached)
        # its tables and factors are part of what was recorded
        self._sampling = weakref.ref(sampling)

    def _same_weights(self, visit: Visit, attached: Attached) -> None:
        """Recordings end when ComfyUI puts other weights in place, or the same ones elsewhere."""
        self._same_engine(visit, attached)
        before = self._weights
        now = id(visit.model), attached.epoch, weights_version(visit.guider.model_patcher)
        if before == now:
            return
        self._weights, self._away = now, False
        if before is not None and (before[0] != now[0] or before[2].at != now[2].at):
            self.release()
            self._rests_until = time.monotonic() + REST
        for tick in self._kept.values():
            tick.stale = True

    def _tick(self, visit, attached, work, asked) -> tuple[Tensor, Tensor | None] | None:
        """A tick whose layout is recorded, or settles; None where it is to be done as it is."""
        # a node may have loaded a model since the last tick, even within a run
        self._same_weights(visit, attached)
        guide = self._direct.guide(visit, work, asked)
        if guide is None:
            return None
        prepare(work, guide)
        who = told(visit, work, asked.which)
        if who is None:
            return None  # not all is remembered yet
        key = (
            layout(work, guide.fold(work.plan)), who, visit.guidance.mode, tuple(asked.labels),
            repr(sorted(asked.still.items())),
            tuple((name, value.shape, value.dtype) for name, value in sorted(asked.cond.items())),
        )  # fmt: skip
        tick = self._kept.get(key)
        if tick is None:
            if not self._may(key):
                return None
            seen = self._seen.setdefault(key, 0)
            if seen < _WARM:
                # the very call that is going to be recorded, so that libraries know its shapes; a
                # recording of the tick needs none of the UNet
                alone, ran = attached.name == "cudagraph", attached.ran
                with attached.passing(alone):
                    done = work(guide)
                # an engine inside the tick has to be made first
                self._seen[key] += alone or attached.ran > ran
                return done
            try:
                tick = self._record(visit, attached, work, asked, guide)
            except comfy.model_management.InterruptProcessingException:
                raise
            except Exception as error:
                passing = self._away = isinstance(error, WeightsAway)
                if not passing:
                    self._failed.add(key)
                attached.fall_back(f"the tick could not be recorded ({reason_of(error)})", passing)
                logging.debug("LiveDiffusion: recording failed", exc_info=True)
                return None
            self._kept[key] = tick
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)[1].recorded.release()
        self._kept.move_to_end(key)
        self._calls.calls += 1
        self._calls.rows += tick.rows
        attached.done()
        attached.used = time.monotonic()
        if visit.neighbours is not None:
            visit.neighbours.replayed()
        return tick.run(visit, work, guide.fold(work.plan), asked.cond)

    def _may(self, key: tuple) -> bool:
        """Whether this layout may be recorded now; weights that keep changing never are."""
        return key not in self._failed and not self._away and time.monotonic() >= self._rests_until

    def _record(self, visit: Visit, attached: Attached, work: Work, asked, guide) -> "_FoldedTick":
        started = time.perf_counter()
        fixed(visit.model.diffusion_model, work.plan.device)
        fold = guide.fold(work.plan)
        tick = _FoldedTick(visit, fold, asked.cond, folds=attached.name == "cudagraph")

        def again(mine: dict[str, Tensor]) -> Linear:
            return self._direct.guide(visit, work, asked, {name: mine[name] for name in asked.cond})

        before = self._calls.calls, self._calls.rows
        attached.inside = True
        try:
            shape = (fold.timestep.shape[0], *work.buffers.shape)
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            x = x.to(work.plan.device, guide.dtype)
            known = visit.neighbours
            untouched = contextlib.nullcontext if known is None else known.untouched
            with untouched():
                tick.try_on(lambda: guide.model(x, fold))
            with uncompiled(), tick.inside():
                with untouched():
                    # compiles and loads what the warm ticks have not run, outside of the capture
                    guide.model(x, fold)
                warm = self._calls.rows
                tick.recorded = RecordedTick(work, fold, again, asked.cond, self._new())
            tick.rows = self._calls.rows - warm
        finally:
            attached.inside = False
            self._calls.calls, self._calls.rows = before
        tick.keeps = known.read_as_is() if known is not None else ()
        self.captures += 1
        seconds = round(time.perf_counter() - started, 3)
        attached.notes["ticks"] = {
            "captures": self.captures, "seconds": seconds,
            "pool_mb": round(pool_size() / 2**20, 1),
            **tick.told(),
            "kernels": work.buffers.unfused or stream_enter.failed or stream_step.failed
            or graph_unfit() or "triton",
        }  # fmt: skip
        return tick


class _FoldedTick:
    """A recorded tick, and what the UNet has computed for it of prompt and time.

    Attributes:
        keeps: what it reads and its key does not name by address.
    """

    recorded: RecordedTick
    rows: int
    keeps: Sequence[Any]

    def __init__(self, visit: Visit, fold: Fold, cond: dict[str, Tensor], folds: bool):
        self.stale = False
        self._now: tuple | None = None  # the levels of its rows
        self._levels: OrderedDict[tuple, list[Tensor]] = OrderedDict()
        self._folded: Folded | None = None
        model, context = visit.model, cond.get("c_crossattn")
        if folds and context is not None and isinstance(model.diffusion_model, UNetModel):
            emb = self._emb(model, fold, cond)
            self._folded = Folded(model.diffusion_model, context, emb)
        self._led = Led(model.diffusion_model) if folds else None

    @contextlib.contextmanager
    def inside(self):
        """While recording."""
        with contextlib.ExitStack() as both:
            for part in (self._led, self._folded):
                if part is not None:
                    both.enter_context(part.inside())
            yield

    def try_on(self, call: Callable[[], Tensor]) -> None:
        """See Led.try_on."""
        if self._led is not None:
            self._led.try_on(call)

    def told(self) -> dict[str, Any]:
        """For the live stats."""
        return {} if self._led is None else self._led.told()

    def run(self, visit: Visit, work: Work, fold: Fold, cond: dict[str, Tensor]):
        """One tick."""
        new = self.recorded.fill(work, fold, cond)
        if self.stale and self._led is not None:
            self._led.read()
        if self._folded is not None:
            self._refold(visit.model, fold, tuple(level for level, _ in work.plan.steps), new)
        self.stale = False
        return self.recorded.replay(work)

    def _refold(self, model, fold: Fold, levels: tuple[float, ...], new: set[str]) -> None:
        mine = self.recorded.tensors
        if self.stale or "c_crossattn" in new:
            self._folded.prompt(mine["c_crossattn"])
        if self.stale or "y" in new:
            self._levels.clear()
            self._now = None
        if levels == self._now:
            return
        known = self._levels.get(levels)
        if known is None:
            known = self._folded.embeddings(self._emb(model, fold, mine))
            self._levels[levels] = known
            while len(self._levels) > _FOLDS:
                self._levels.popitem(last=False)
        self._folded.levels(known)
        self._now = levels

    @staticmethod
    def _emb(model, fold: Fold, cond: dict[str, Tensor]) -> Tensor:
        unet = ComfyUNet(model.diffusion_model)
        return unet.embedding(fold.timestep, cond.get("y"), inference_dtype(model))
