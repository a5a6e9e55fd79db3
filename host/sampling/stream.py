"""A stream: the ring, and what it needs of ComfyUI, kept from one run to the next."""

import contextlib
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...engine.noise import Noise
from ...engine.ring import Ring, Tick
from ...engine.step_rules import STEP_RULES, Course
from ...engine.work import TickRows
from . import alone
from .coherence import Coherent
from .evaluate import evaluate
from .kept import Kept, Snapshot
from .noises import Brought, Noises, RunNoise
from .payload import Payload, payloads
from .recordings import Recordings
from .route import Road, Route, before, route, samples_itself
from .rows import Batch, Joints
from .settings import Settings
from .space import ModelSpace, scaled_in
from .visit import Calls, Received, Visit, check_batch, of_latents

Progress = Callable[[int, int, Tensor], None]
# what is done in the place of a sampler: (visit, latents in the model's scale, mask) to latents
Sampled = Callable[[Visit, Tensor, Tensor | None], Tensor]


class Apart(Exception):
    """The frames of a run must be sampled alone.

    Args:
        batch: their conditioning.
    """

    def __init__(self, batch: Batch):
        super().__init__("frames are sampled one by one")
        self.batch = batch


class Stream:
    """Frames in flight and the prepared model. One per LiveStreamSampler and workflow.

    Args:
        frames_per_slot: F.
        predictions: see engine.ring.Ring.

    Attributes:
        ends: the last predictions of the frames that the newest flow finished, oldest first.
        lag: runs since the newest frame of the last output came in.
        route: of the last run.
    """

    def __init__(self, frames_per_slot: int = 1, predictions: bool = False):
        self.ring = Ring(frames_per_slot, predictions)
        self.ends: list[Tensor] = []
        self.calls = Calls()
        self.recorded = Recordings(self.calls)
        self.coherent = Coherent()
        self.frames = 0
        self.ticks = 0
        self.lag = 0
        self.route: Route | None = None
        self._alone = Ring(1, predictions)  # of the frame that is sampled by itself
        self._joints = Joints()
        self._kept: Kept | None = None
        self._snapshot: Snapshot | None = None  # of the guider that was prepared last
        self._edition = 0  # grows with every guider, and with every change of one
        self._course: Course | None = None
        self._steered: tuple[Any, Any] = (None, None)
        self._linear = True  # the model, at the levels of the course
        self._noises = Noises()
        self._serial = 0
        self._sigmas: tuple[tuple[float, ...], Tensor | None] = ((), None)
        self._family: tuple | None = None
        self._met: Callable = lambda: None

    def stats(self) -> dict[str, Any]:
        """Counters since the stream began, and the road; reading them waits for the device."""
        return {
            "frames": self.frames,
            "ticks": self.ticks,
            "calls": self.calls.calls,
            "rows": self.calls.rows,
            "dropped": self.ring.dropped + self._alone.dropped,
            "overtaken": self.ring.overtaken,
            **self.roads(),
            **self.coherent.stats(),
        }

    def roads(self) -> dict[str, str]:
        """The road that the last run took, and why not a faster one."""
        known = self.route
        return {} if known is None else {"road": str(known.road), "why": known.why}

    @torch.inference_mode()
    def run(
        self,
        guider,
        latents: Tensor,
        settings: Settings,
        mask: Tensor | None = None,
        progress: Progress | None = None,
        brought: Brought | None = None,
    ) -> Tensor:
        """Put frames through the stream.

        Args:
            guider: a ComfyUI GUIDER.
            latents: B frames, oldest first, [B, C, H, W], as VAEs give them.
            settings: see Settings.
            mask: ComfyUI's noise_mask, or None.
            progress: called with (ticks done, ticks to do, estimate) after each tick.
            brought: by a NOISE; None has every frame meet the slots' fixed noise.

        Returns:
            [B, C, H, W] on the model's device. Draining: frame i of the output is frame i of the
            input. Else: the frames that left, or the best estimate so far while none does. Frames
            that are sampled alone (Road.PER_FRAME) leave in the run that they come in.

        Raises:
            ValueError: what cannot be right is wired; the text begins with an input's name.
        """
        if self._sigmas[0] != settings.sigmas:
            self._sigmas = settings.sigmas, torch.tensor(settings.sigmas, dtype=torch.float32)
        sigmas = self._sigmas[1]

        met = self._noises.of_run(guider.model_patcher.load_device, latents, settings, brought)

        def work(visit: Visit, clean: Tensor, mask: Tensor | None) -> Tensor:
            return self.flow(visit, clean, settings, mask=mask, progress=progress, met=met)

        if settings.drain:
            self.coherent.forget()
        kept, n = self._kept, len(settings.sigmas) - 1
        if kept is not None and mask is None and kept.holds(guider, latents, n):
            kept.options["transformer_options"]["sample_sigmas"] = sigmas
            return self._again(kept, guider, latents, settings.seed, work)
        self._kept = None
        if self._snapshot is None or not self._snapshot.fits(guider):
            self._snapshot, self._edition = Snapshot(guider), self._edition + 1
        noise, frames = torch.zeros_like(latents), self.frames
        known = before(guider) is not None
        if known:
            if latents.shape[0] > 1:
                return self._one_by_one(guider, latents, settings, None, mask, progress, met)
            noise = met.entered(0, latents, settings)
        inside = AsSampler(self, work, apart=not known)
        try:
            # a sampler inside the guider's own sample(): loading, hooks, wrappers are ComfyUI's
            out = guider.sample(
                noise, latents, inside, sigmas, denoise_mask=mask,
                callback=alone.heard_by_nobody, disable_pbar=True, seed=settings.seed,
            )  # fmt: skip
        except Apart as apart:
            batch = apart.batch
        else:
            self.frames = frames + latents.shape[0]  # what is wrapped around may sample again
            if mask is None:
                self._keep(inside.visit, n, tuple(latents.shape[1:]))
            return out
        return self._one_by_one(guider, latents, settings, batch, mask, progress, met)

    def flow(
        self,
        visit: Visit,
        clean: Tensor,
        settings: Settings,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        progress: Progress | None = None,
        met: RunNoise | None = None,
    ) -> Tensor:
        """The ticks of one run, inside a prepared guider.

        Args:
            visit: the prepared guider.
            clean: source latents in the model's scale, [B, C, H, W].
            noise: noise of each frame instead of slot 0's, [B, C, H, W].
            met: what else a NOISE has brought for them.
        """
        self._serial += 1
        self.ends = []
        self._meet(visit.model)
        own_noise = noise is not None
        if visit.received is not None and noise is None:
            settings = replace(settings, sigmas=alone.levels_of(visit, settings.sigmas))
            noise = visit.received.noise
        course = self._steer(visit.model, settings)
        slots = self._noises.fixed(settings.seed, tuple(clean.shape[1:]), clean.device)
        met = RunNoise() if met is None else met
        if noise is None and settings.add_noise and met.entry is not None:
            noise = met.entry.to(clean)
        if not self._linear:
            name = type(visit.model.model_sampling).__name__
            visit.route = visit.route.at_least(Road.PREPARED, f"{name} is not linear")
        self._take(visit.route)
        batch, f = clean.shape[0], self.ring.frames_per_slot
        self.coherent.settle(visit, clean, course.n, f)
        own = None
        if mask is not None:
            own = met.entry_of_all(slots).expand_as(clean) if noise is None else noise
            if not settings.add_noise and noise is None:
                own = torch.zeros_like(clean)
        first = self.coherent.number
        drawn = first if own_noise else met.drawn
        frames = payloads(visit.batch, batch, self._serial, mask, own, first, drawn)
        if visit.route.road is Road.PER_FRAME:
            slots = met.of(slice(1), slots)
            done = self._sampled_alone(visit, clean, frames[0], course, slots, noise, progress)
            self._noises.taken(met, slice(1))
            return done
        if settings.immediate:
            self._switch(frames[-1])
        total = -(-batch // f) + (course.n - 1 if settings.drain else 0)
        out: list[Tensor] = []
        road = self.coherent.around(self.recorded.road(visit))
        for done in range(total):
            comfy.model_management.throw_exception_if_processing_interrupted()
            at = slice(done * f, (done + 1) * f)
            entering = frames[at]
            tick = self.ring.tick(
                lambda rows: evaluate(visit, rows),
                clean[at] if entering else None,
                entering,
                course,
                met.of(at, slots),
                None if noise is None else noise[at],
                road,
            )
            self._noises.taken(met, at)
            self.ticks += 1
            self.ends += tick.predictions
            if settings.drain:
                out += [latents for _, latents in tick.finished]
            else:
                out.append(_as_many(tick, len(entering)))
                self.lag = self._serial - self._newest_out(tick)
            if progress is not None:
                progress(done + 1, total, tick.estimate)
        self.frames += batch
        return out[0] if len(out) == 1 else torch.cat(out)

    def _sampled_alone(
        self, visit: Visit, clean: Tensor, frame: Payload, course: Course, slots: Noise,
        noise: Tensor | None, progress: Progress | None,
    ) -> Tensor:  # fmt: skip
        """All steps of one frame, [1, C, H, W], in a sample() of its own."""
        # what is in flight would come out behind it
        self.ring.overtaken += sum(place.count for place in self.ring.in_flight)
        self.ring.clear()
        ring = self._alone
        ring.clear()
        tick = Tick()
        callback = None if visit.received is None else visit.received.callback

        def guide(rows: TickRows) -> Tensor:
            out = evaluate(visit, rows)
            if callback is not None:
                # the ring goes on in the same memory
                callback(k, out.clone(), rows.x.clone(), course.n)
            return out

        for k in range(course.n):
            comfy.model_management.throw_exception_if_processing_interrupted()
            enters = (clean, [frame]) if k == 0 else (None, ())
            tick = ring.tick(guide, *enters, course, slots, noise, self.coherent.around(None))
            self.ticks += 1
            if progress is not None:
                progress(k + 1, course.n, tick.estimate)
        self.frames += 1
        self.ends, self.lag = tick.predictions, 0
        return tick.finished[-1][1]

    def _one_by_one(
        self, guider, latents: Tensor, settings: Settings, batch: Batch | None,
        mask: Tensor | None, progress: Progress | None, met: RunNoise,
    ) -> Tensor:  # fmt: skip
        """Each frame in a sample() of its own, in order, [B, C, H, W].

        Args:
            batch: the conditioning of all of them, if it is processed already.
        """
        out: list[Tensor] = []
        count, frames = latents.shape[0], self.frames
        for i in range(count):

            def part(done: int, total: int, estimate: Tensor | None, i=i) -> None:
                if progress is not None:
                    progress(i * total + done, count * total, estimate)

            def work(visit: Visit, clean: Tensor, own: Tensor | None, i=i, part=part) -> Tensor:
                nonlocal batch
                if batch is None:
                    batch = self._together(visit, latents, mask, settings.seed)
                alone.tell_place(visit, batch, i, count)
                return self.flow(visit, clean, settings, mask=own, progress=part, met=met.only(i))

            frame, part_of_mask = latents[i : i + 1], alone.mask_of(mask, i, latents)
            out.append(guider.sample(
                met.entered(i, frame, settings), frame,
                AsSampler(self, work), self._sigmas[1], denoise_mask=part_of_mask,
                callback=alone.heard_by_nobody, disable_pbar=True, seed=settings.seed,
            ))  # fmt: skip
        self.frames = frames + count
        return torch.cat(out)

    def _together(
        self, visit: Visit, latents: Tensor, mask: Tensor | None, seed: int | None
    ) -> Batch:
        """The conditioning of all frames of a run, while the first is sampled alone.

        Raises:
            ValueError: a guider that processes its conditioning itself is to give frames their own.
        """
        guider, model = visit.guider, visit.model
        clean = scaled_in(model, latents.to(guider.model_patcher.load_device, torch.float32))
        if mask is not None:
            mask = comfy.sampler_helpers.prepare_mask(mask, clean.shape, clean.device)
        noise = torch.zeros_like(clean)
        sides = {side: [e.copy() for e in es] for side, es in guider.original_conds.items()}
        sides = comfy.samplers.process_conds(
            model, noise, sides, clean.device, clean, mask, seed, latent_shapes=[clean.shape]
        )
        batch = self._batch(model, sides, noise, clean, mask, seed)
        if not batch.shared and samples_itself(guider):
            raise ValueError(
                f"guider: {type(guider).__name__} samples in a way of its own, so frames of one "
                "run cannot be given a conditioning each. Send one frame per run, or give all the "
                "same."
            )
        return batch

    def _batch(self, model, sides, noise: Tensor, latents: Tensor, mask, seed) -> Batch:
        if latents.shape[0] > 1:
            check_batch(model, sides, noise, latents, mask, seed)
        taken = of_latents(model, sides, noise, latents, mask, seed)
        return Batch(sides, model, latents.shape, taken, self._edition)

    def visit(
        self, guider, extra_args: dict[str, Any], n: int, noise: Tensor, latents: Tensor,
        mask: Tensor | None,
    ) -> Visit:  # fmt: skip
        """A visit for a guider whose sample() is under way, with its calls counted here.

        Args:
            extra_args: as its sampler receives them.
            n: number of slots.
            noise, latents, mask: as its sampler receives them, [B, C, H, W].
        """
        model, options = guider.inner_model, extra_args["model_options"]
        seed = extra_args.get("seed")
        sides = {side: entries[:] for side, entries in guider.conds.items()}
        batch = self._batch(model, sides, noise, latents, mask, seed)
        rows = 2 * n * self.ring.frames_per_slot
        way = route(guider, model, options, batch, [rows, *latents.shape[1:]])
        self.calls.into(options)
        return Visit(guider, model, batch, options, seed, way, self._joints)

    def _keep(self, visit: Visit, n: int, shape: tuple[int, ...]) -> None:
        """Use the prepared guider again, where the road does without it and without the latents."""
        if visit.guidance is None or visit.batch.of_latents:
            return
        self._kept = Kept(
            weakref.ref(visit.guider), self._snapshot, shape, n, visit.batch, visit.options,
            visit.route,
        )  # fmt: skip

    def _again(self, kept: Kept, guider, latents: Tensor, seed: int, work) -> Tensor:
        """What guider.sample does around a sampler, for a guider that is prepared already."""
        patcher = guider.model_patcher
        model, device = patcher.model, patcher.load_device
        visit = Visit(guider, model, kept.batch, kept.options, seed, kept.route, self._joints)
        context = getattr(comfy.model_management, "cuda_device_context", contextlib.nullcontext)
        with contextlib.nullcontext() if device.type == "cpu" else context(device):
            patcher.pre_run()
            guider.inner_model, guider.conds = model, {}
            try:
                clean = scaled_in(model, latents.to(device, torch.float32))
                return model.process_latent_out(work(visit, clean, None).to(torch.float32))
            finally:
                patcher.cleanup()
                del guider.inner_model, guider.conds

    def _take(self, way: Route) -> None:
        """The run's road, told where it is another than before."""
        if way is not self.route and way != self.route:
            logging.debug("LiveDiffusion: road %s%s", way.road, f": {way.why}" if way.why else "")
        self.route = way

    def _meet(self, model) -> None:
        """Another model family cannot go on with the latents in flight."""
        if self._met() is model:
            return
        self._met = weakref.ref(model)
        self._joints.clear()
        config = getattr(model, "model_config", None)
        family = (type(model), repr(getattr(config, "unet_config", None)))
        if self._family not in (None, family):
            self.ring.clear()
        self._family = family

    def _steer(self, model, settings: Settings) -> Course:
        sampling = model.model_sampling
        asked = (settings.sigmas, settings.step_rule, settings.add_noise)
        before, steered = self._steered
        if before == asked and steered() is sampling:
            return self._course
        rule = STEP_RULES[settings.step_rule]
        course = Course(settings.sigmas, rule, ModelSpace(sampling), settings.add_noise)
        if self._course is None or not self._course.same_as(course):
            self._course = course
        self._linear = self.recorded.linear(model, course.levels)
        self._steered = (asked, weakref.ref(sampling))
        return self._course

    def _newest_out(self, tick: Tick) -> int:
        if tick.finished:
            return tick.finished[-1][0][-1].run
        # the estimate is of the most advanced frame
        return self.ring.in_flight[0].payloads[-1].run

    def _switch(self, newest: Payload) -> None:
        for place in self.ring.in_flight:
            place.payloads = [p.recondition(newest) for p in place.payloads]


class AsSampler(comfy.samplers.Sampler):
    """Runs `work` where ComfyUI runs a sampler: model loaded, conditioning processed.

    Args:
        apart: frames that must be sampled alone are not sampled here, in a batch or without their
            noise: raises Apart.
    """

    def __init__(self, stream: Stream, work: Sampled, apart: bool = False):
        self.stream = stream
        self.work = work
        self.apart = apart
        self.visit: Visit | None = None

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None,
        denoise_mask=None, disable_pbar=False,
    ):  # fmt: skip
        visit = self.visit = self.stream.visit(
            model_wrap, extra_args, len(sigmas) - 1, noise, latent_image, denoise_mask
        )
        if visit.route.road is Road.PER_FRAME:
            if self.apart:
                raise Apart(visit.batch)
            visit.received = Received(noise, sigmas, callback)
        return self.work(visit, latent_image, denoise_mask)


def _as_many(tick: Tick, wanted: int) -> Tensor:
    """As many frames as went in: the newest that left, else the best estimate so far."""
    out = tick.finished[-1][1] if tick.finished else tick.estimate
    if out.shape[0] >= wanted:
        return out[-wanted:]
    return torch.cat([out, out[-1:].expand(wanted - out.shape[0], *out.shape[1:])])
