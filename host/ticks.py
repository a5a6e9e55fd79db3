"""Streams on a graph: which ticks are recorded, and what makes a recording stale."""

import contextlib
import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable

import comfy.model_management
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import BaseModel
from torch import Tensor

from ..compiled.cudagraph import addresses, fixed
from ..compiled.graph import CudaRecording, Folded, Recording
from ..compiled.tick import Recorded, layout
from ..engine.guidance import Guidance
from ..engine.ring import Guide, Plan, Work
from .conditioning import plain, same_for_every_frame
from .engines import REST, Attached, engine_of, told
from .evaluate import Calls, Visit, apply, asked, prepared, sharing
from .options import unet_parts
from .unet import ComfyUNet, inference_dtype

_WARM = 2  # ticks that a stream runs as it is before one is recorded
_KEPT = 4  # recordings of other layouts that are kept
_PLANS = 64  # time embeddings kept; a steady stream of n slots needs n

_WHICH = {"off": "none", "self-negative": "none", "onetime-negative": "entered", "full": "all"}


class Ticks:
    """The recorded ticks of one stream.

    A tick is recorded where its MODEL's engine allows it, every slot is full, and one plain call
    serves all rows; every other tick runs as it is.

    Args:
        calls: counts model calls; a replay makes one.
        recording: makes what records.
    """

    def __init__(self, calls: Calls, recording: Callable[[], Recording] = CudaRecording):
        self._calls = calls
        self._new = recording
        self._kept: OrderedDict[tuple, _Tick] = OrderedDict()
        self._seen: dict[tuple, int] = {}
        self._failed: set[tuple] = set()
        self._weights: tuple | None = None
        self._sampling: Callable = lambda: None
        self._rests_until = 0.0
        self.captures = 0

    def through(self, visit: Visit) -> Callable[[Work, Guide], tuple[Tensor, Tensor]] | None:
        """How this run's ticks are done, or None for as they are."""
        attached = engine_of(visit.guider.model_patcher)
        if attached is None or not attached.capturable or visit.guidance is None:
            return None
        patcher = visit.guider.model_patcher
        if self._new is CudaRecording and patcher.load_device.type != "cuda":
            return None
        if unet_parts(patcher):
            return None
        self._same_weights(visit, attached)

        def through(work: Work, guide: Guide) -> tuple[Tensor, Tensor]:
            asks = self._asks(visit, work) if work.full else None
            return work(guide) if asks is None else self._tick(visit, attached, work, guide, asks)

        return through

    def release(self) -> None:
        """Forget every recording."""
        while self._kept:
            self._kept.popitem()[1].recorded.release()
        self._seen.clear()
        self._failed.clear()

    def _same_weights(self, visit: Visit, attached: Attached) -> None:
        """Recordings end when ComfyUI puts other weights in place, or the same ones elsewhere."""
        model = visit.model
        if self._sampling() is not model.model_sampling:
            # its tables and factors are part of what was recorded
            self.release()
            self._sampling = weakref.ref(model.model_sampling)
        known = self._weights
        now = (id(model), getattr(model, "current_weight_patches_uuid", None), attached.epoch)
        if known is not None and known[0] == now:
            return
        at = addresses(model.diffusion_model)
        if known is not None and (known[1] != at or known[0][0] != now[0]):
            self.release()
            self._rests_until = time.monotonic() + REST
        for tick in self._kept.values():
            tick.stale = True
        self._weights = (now, at)

    def _asks(self, visit: Visit, work: Work) -> tuple[str, dict, list, list] | None:
        """What the tick asks of the model: rows, kwargs, cond_or_uncond and uuids.

        None where it takes more than one plain call.
        """
        frames = [p for place in work.places for p in place.payloads]
        if any(p.mask is not None or p.ranges or p.per_sigma or p.controlled for p in frames):
            return None
        shared = sharing(frames, list(range(len(frames))), visit.model)
        if len(shared) != 1 or not plain(shared[0][1]):
            return None
        conds, guidance = shared[0][1], visit.guidance
        which, span = _WHICH[guidance.mode], work.plan.entered
        if guidance.mode == "full" and guidance.cfg == 1.0:
            return None  # a call of half the rows: as it is
        if which == "entered" and same_for_every_frame(conds):
            span = slice(0, span.stop - span.start)  # the same wherever a frame enters
        batch = prepared(visit, conds, which, len(frames), span)
        return None if batch is None else (which, *batch)

    def _tick(self, visit, attached, work, guide, asks) -> tuple[Tensor, Tensor]:
        which, cond, labels, _ = asks
        knobs = {name: value for name, value in cond.items() if isinstance(value, Tensor)}
        still = {name: value for name, value in cond.items() if name not in knobs}
        key = (
            layout(work), which, visit.guidance.mode, tuple(labels), repr(sorted(still.items())),
            tuple((name, value.shape, value.dtype) for name, value in sorted(knobs.items())),
        )  # fmt: skip
        tick = self._kept.get(key)
        if tick is None:
            if not self._due(key):
                return work(guide)
            try:
                tick = self._record(visit, attached, work, asks, knobs, still)
            except comfy.model_management.InterruptProcessingException:
                raise
            except Exception as error:
                self._failed.add(key)
                attached.fall_back(f"the tick could not be recorded ({told(error)})")
                logging.debug("LiveDiffusion: recording failed", exc_info=True)
                return work(guide)
            self._kept[key] = tick
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)[1].recorded.release()
        self._kept.move_to_end(key)
        self._calls.calls += 1
        self._calls.rows += tick.rows
        attached.ran += 1
        attached.used = time.monotonic()
        return tick.run(visit, work, knobs)

    def _due(self, key: tuple) -> bool:
        """True for a layout that has settled; weights that keep changing are never recorded."""
        if key in self._failed or time.monotonic() < self._rests_until:
            return False
        self._seen[key] = self._seen.get(key, 0) + 1
        return self._seen[key] > _WARM

    def _record(self, visit: Visit, attached: Attached, work: Work, asks, knobs, still) -> "_Tick":
        which, _, labels, uuids = asks
        started = time.perf_counter()
        fixed(visit.model.diffusion_model, work.source.device)
        tick = _Tick(visit, which, work, knobs, folds=attached.name == "cudagraph")

        def guide(mine: dict[str, Tensor]) -> Guide:
            batch = {**still, **{name: mine[name] for name in knobs}}, labels, uuids
            guidance = Guidance(visit.guidance.mode, tick.cfg, tick.delta)
            return lambda rows: guidance(
                rows, lambda rows, which: apply(visit, rows, which, batch)
            )  # fmt: skip

        before = self._calls.calls, self._calls.rows
        attached.inside = True
        try:
            with tick.inside():
                tick.recorded = Recorded(work, guide, knobs, self._new())
            tick.rows = self._calls.rows - before[1]
        finally:
            attached.inside = False
            self._calls.calls, self._calls.rows = before
        self.captures += 1
        seconds = round(time.perf_counter() - started, 3)
        attached.notes["ticks"] = {"captures": self.captures, "seconds": seconds}
        return tick


class _Tick:
    """A recorded tick and what it reads besides the ring's buffers."""

    recorded: Recorded
    rows: int

    def __init__(self, visit: Visit, which: str, work: Work, knobs: dict, folds: bool):
        number = {"dtype": torch.float32, "device": work.source.device}
        self.cfg = torch.tensor(visit.guidance.cfg, **number)
        self.delta = torch.tensor(visit.guidance.delta, **number)
        self.stale = False
        self._which = which
        self._dialled = visit.guidance.cfg, visit.guidance.delta
        self._plan: Plan | None = None
        self._levels: OrderedDict[int, tuple[Plan, list[Tensor]]] = OrderedDict()
        self._folded: Folded | None = None
        model = visit.model
        context = knobs.get("c_crossattn")
        if folds and context is not None and isinstance(model.diffusion_model, UNetModel):
            own = getattr(getattr(model, "process_timestep", None), "__func__", None)
            plain_time = own is getattr(BaseModel, "process_timestep", None)
            emb = self._emb(model, work.plan, knobs) if plain_time else None
            self._folded = Folded(model.diffusion_model, self._cast(model, context), emb)

    def inside(self):
        """While recording."""
        return contextlib.nullcontext() if self._folded is None else self._folded.inside()

    def run(self, visit: Visit, work: Work, knobs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One tick."""
        dialled = visit.guidance.cfg, visit.guidance.delta
        if dialled != self._dialled:
            self._dialled = dialled
            self.cfg.fill_(dialled[0])
            self.delta.fill_(dialled[1])
        new = self.recorded.fill(work, knobs)
        if self._folded is not None:
            self._fold(visit.model, work.plan, new)
        return self.recorded.replay(work)

    def _fold(self, model, plan: Plan, new: set[str]) -> None:
        mine = self.recorded.tensors
        if self.stale or "c_crossattn" in new:
            self._folded.prompt(self._cast(model, mine["c_crossattn"]))
        if self.stale or "y" in new:
            self._levels.clear()
            self._plan = None
        self.stale = False
        if not self._folded.timed or plan is self._plan:
            return
        known = self._levels.get(id(plan))
        if known is None:
            embeddings = self._folded.embeddings(self._emb(model, plan, mine))
            known = self._levels[id(plan)] = plan, embeddings
            while len(self._levels) > _PLANS:
                self._levels.popitem(last=False)
        self._folded.levels(known[1])
        self._plan = plan

    def _emb(self, model, plan: Plan, knobs: dict[str, Tensor]) -> Tensor:
        sigma = asked(plan.sigma, plan.entered, self._which)
        y = knobs.get("y")
        return ComfyUNet(model.diffusion_model).embedding(
            model.model_sampling.timestep(sigma).float(),
            None if y is None else self._cast(model, y),
            inference_dtype(model),
        )

    @staticmethod
    def _cast(model, tensor: Tensor) -> Tensor:
        return tensor.to(dtype=inference_dtype(model))
