"""What a stream tells of its rows where nodes let frames help each other, and its bank."""

import logging
import weakref
from collections.abc import Sequence
from typing import Any

import comfy.model_management
from torch import Tensor

from ...engine.coherence.neighbours import Neighbours, Row
from ...engine.plan import Place
from ...engine.work import Guide, Way, Work
from ..models.coherence import Coherence, coherence_of, depth_of
from ..models.engines import reason_of
from ..models.looks import NEIGHBOURS
from ..models.unet import inference_dtype
from ..models.walk import is_inner
from .carry import Carrying
from .patched import Patched
from .reusing import Looking
from .route import Road
from .visit import Visit

_ALONE = {
    Road.PER_LEVEL: "frames at different noise levels are in calls of their own",
    Road.PER_FRAME: "each frame is sampled by itself",
}


_NOT_PLAIN = "a prompt has an area, a mask, hooks, a range of steps or a ControlNet"


def rows_of(places: Sequence[Place]) -> list[Row]:
    """The rows of a tick on the prompt's side, in their order."""
    return [
        Row(0, place.k, place.course.n, j, payload.number, place.sigma)
        for place in places
        for j, payload in enumerate(place.payloads)
    ]


def asked_rows(rows: Sequence[Row], entered: slice, which: str) -> list[Row]:
    """Those of a call that also asks for negative rows (evaluate.asked)."""
    again = [row._replace(side=1) for row in rows]
    if which == "all":
        return [*again, *rows]
    return [*rows, *again[entered]] if which == "entered" else list(rows)


def told(visit: Visit, work: Work, which: str) -> tuple | None:
    """Says who the rows of a direct call are (Neighbours.tell)."""
    if visit.neighbours is None:
        return ()
    rows = asked_rows(rows_of(work.places), work.plan.entered, which)
    return visit.neighbours.tell(rows)


class Coherent:
    """Of one stream.

    Attributes:
        number: frames that have entered so far.
        neighbours: while the MODEL has what needs them.
    """

    def __init__(self):
        self.number = 0
        self.neighbours: Neighbours | None = None
        self.carrying = Carrying()
        self.looking = Looking()
        self.patched = Patched()
        self._alone = False  # frames are sampled by themselves
        self._wanted: Coherence | None = None
        self._why = ""
        self._line = ""
        self._lost = ""  # why the newest keyframe is not remembered

    def forget(self) -> None:
        """The frames that come next do not go on with those before."""
        if self.neighbours is not None and self.neighbours.reusing is not None:
            self.neighbours.reusing.forget()
        if self.neighbours is not None and self.neighbours.patching is not None:
            self.neighbours.patching.forget()

    def settle(self, visit: Visit, clean: Tensor, n: int, f: int) -> None:
        """What holds for the ticks of a run; the visit knows it from now on.

        Args:
            clean: what enters, [B, C, H, W].
            n: slots.
            f: frames of a slot.
        """
        wanted = self._wanted = coherence_of(visit.guider.model_patcher)
        self.carrying.settle(visit, None if wanted is None else wanted.carry)
        network = visit.model.diffusion_model
        reuse = None if wanted is None else wanted.reuse
        depth = 0 if reuse is None else depth_of(network, reuse.depth)
        self.looking.settle(reuse, visit.model.latent_format)
        options = visit.options.setdefault("transformer_options", {})
        if wanted is None:
            self.neighbours = visit.neighbours = None
            options.pop(NEIGHBOURS, None)
            return
        known = self.neighbours
        if known is None or known.network() is not network or known.device != clean.device:
            known = self.neighbours = Neighbours(clean.device, weakref.ref(network))
        version = getattr(visit.model, "current_weight_patches_uuid", None)
        key = version, inference_dtype(visit.model), wanted.layers(network)[1]
        shape = tuple(clean.shape[1:])
        known.settle(wanted.future, wanted.memory, n, f, self.number, shape, key)
        # another clone may have other patches
        made_of = version, inference_dtype(visit.model), weakref.ref(visit.guider.model_patcher)
        known.settle_reuse(reuse, depth, (shape, made_of))
        known.settle_skips(wanted.skips, is_inner)
        off = "" if visit.batch.plain else _NOT_PLAIN
        known.settle_patchwork(wanted.patchwork, (shape, made_of), off)
        visit.neighbours = options[NEIGHBOURS] = known
        road = visit.route.road
        self._alone = road is Road.PER_FRAME
        self._why = _ALONE.get(road, "") if wanted.future is not None else ""

    def around(self, road: Way | None) -> Way | None:
        """Ticks of a road, with what comes before and after each."""
        neighbours = self.neighbours
        if neighbours is None:
            return road

        def go(work: Work, guide: Guide) -> tuple[Tensor, Tensor | None]:
            neighbours.begin()
            self.carrying.begin(work)
            self.looking.begin(neighbours, work, self._alone)
            done = work(guide) if road is None else road(work, guide)
            # an interrupt or an error above leaves everything as it was; below the rows have taken
            # their step, and whatever fails must not have them take it again
            self.number += 0 if work.source is None else work.source.shape[0]
            self.carrying.done(work)
            self._remember(neighbours)
            try:
                self._tell_all(neighbours)
            except Exception:
                logging.debug("LiveDiffusion: nothing is told of a tick", exc_info=True)
            return done

        return go

    def _remember(self, neighbours: Neighbours) -> None:
        before = self._lost
        try:
            neighbours.finish()
        except Exception as reason:
            # its own text tells how much was free, another number each time
            short = isinstance(reason, comfy.model_management.OOM_EXCEPTION)
            self._lost = "memory is short" if short else reason_of(reason)
            if self._lost != before:
                logging.warning("LiveDiffusion: a frame is not remembered: %s", self._lost)
        else:
            if neighbours.bank is None or neighbours.bank.size:
                self._lost = ""

    def _tell_all(self, neighbours: Neighbours) -> None:
        line = self.looking.done(neighbours)
        if line and self._wanted.tell_reuse is not None:
            self._wanted.tell_reuse(line)
        line = self.patched.done(neighbours)
        if line and self._wanted.tell_patchwork is not None:
            self._wanted.tell_patchwork(line)
        self._tell(neighbours)

    def stats(self) -> dict[str, Any]:
        """For the stream's; empty without."""
        known, wanted = self.neighbours, self._wanted
        if known is None:
            return {}
        told: dict[str, Any] = {}
        ahead, behind, _ = wanted.layers(known.network())
        if wanted.future is not None:
            told["future_attention"] = f"{len(ahead)} layers"
            if self._why:
                told["future_attention"] += f", without neighbours: {self._why}"
        if known.bank is not None:
            told["memory"] = f"{len(behind)} layers, {known.size / 2**20:.1f} MB"
            if self._lost:
                told["memory"] += f", forgotten: {self._lost}"
            told["memory_mb"] = round(known.size / 2**20, 3)
        carried = self.carrying.carried
        if carried is not None:
            told["carried_mb"] = round(carried.size / 2**20, 3)
        if known.reusing is not None:
            told["reuse"] = self.looking.told
            if known.reusing.why or known.why:
                told["reuse"] += f", {known.reusing.why or known.why}"
            told["kept_mb"] = round(known.reusing.size / 2**20, 3)
        if known.patching is not None:
            told["patchwork"] = self.patched.line(known)
            told["patchwork_mb"] = round(known.patching.size / 2**20, 3)
        if known.why:
            told["coherence_off"] = known.why
        return told

    def _tell(self, neighbours: Neighbours) -> None:
        """The size on the node, whenever it is another."""
        tell = self._wanted.tell
        carried = self.carrying.carried
        if tell is None or (neighbours.bank is None and carried is None):
            return
        size = neighbours.size + (0 if carried is None else carried.size)
        line = f"memory: {size / 2**20:.1f} MB"
        if neighbours.why:
            line += f"; features are not in use: {neighbours.why}"
        if self._lost:
            line += f"; forgotten, since it could not be kept: {self._lost}"
        if line != self._line:
            self._line = line
            tell(line)
