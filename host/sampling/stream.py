"""A stream: the ring, and what it needs of ComfyUI, kept from one prompt to the next."""

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ...engine.guidance import Guidance
from ...engine.noise import SlotNoise
from ...engine.ring import Ring, Tick
from ...engine.step_rules import STEP_RULES, Course
from .conditioning import Conds, Payload, payloads
from .evaluate import Calls, Visit, count_into, evaluate, fast_guidance
from .space import ModelSpace, scaled_in
from .ticks import Recordings

Progress = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Settings:
    """The knobs of a stream that are not the guider's. All may change between two runs.

    Attributes:
        sigmas: n + 1 descending noise levels.
        step_rule: a name in engine.step_rules.STEP_RULES.
        seed: of the slots' fixed noise.
        drain: True treats the frames as a clip: the ring is driven until the last one has left.
        immediate: True puts frames in flight under the newest conditioning at once.
        add_noise: False lets source latents enter as they are.
    """

    sigmas: tuple[float, ...]
    step_rule: str = "lcm"
    seed: int = 0
    drain: bool = False
    immediate: bool = False
    add_noise: bool = True


@dataclass
class _Kept:
    """A prepared guider, for as long as nothing it was prepared for has changed.

    It holds neither the guider nor the model: ComfyUI may drop both between two runs.
    """

    guider: weakref.ref
    shape: tuple[int, ...]
    n: int  # slots that memory was asked for
    patches: Any
    conds: Conds
    options: dict[str, Any]
    guidance: Guidance
    batches: dict[tuple, tuple]


class Stream:
    """Frames in flight and the prepared model. One per LiveStreamSampler and workflow.

    Args:
        frames_per_slot: F.

    Attributes:
        lag: runs since the newest frame of the last output came in.
    """

    def __init__(self, frames_per_slot: int = 1):
        self.ring = Ring(frames_per_slot)
        self.calls = Calls()
        self.recorded = Recordings(self.calls)
        self.frames = 0
        self.ticks = 0
        self.lag = 0
        self._kept: _Kept | None = None
        self._course: Course | None = None
        self._steered: tuple[Any, Any] = (None, None)
        self._noise: SlotNoise | None = None
        self._serial = 0
        self._sigmas: tuple[tuple[float, ...], Tensor | None] = ((), None)
        self._family: tuple | None = None
        self._met: Callable = lambda: None

    def stats(self) -> dict[str, int]:
        """Counters since the stream began; reading them waits for the device."""
        return {
            "frames": self.frames,
            "ticks": self.ticks,
            "calls": self.calls.calls,
            "rows": self.calls.rows,
            "dropped": self.ring.dropped,
            "overtaken": self.ring.overtaken,
        }

    @torch.inference_mode()
    def run(
        self,
        guider,
        latents: Tensor,
        settings: Settings,
        mask: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Put frames through the stream.

        Args:
            guider: a ComfyUI GUIDER.
            latents: B frames, oldest first, [B, C, H, W], as VAEs give them.
            settings: see Settings.
            mask: ComfyUI's noise_mask, or None.
            progress: called with (ticks done, ticks to do, estimate) after each tick.

        Returns:
            [B, C, H, W] on the model's device. Draining: frame i of the output is frame i of the
            input. Else: the frames that left, or the best estimate so far while none does.
        """
        if self._sigmas[0] != settings.sigmas:
            self._sigmas = settings.sigmas, torch.tensor(settings.sigmas, dtype=torch.float32)
        sigmas = self._sigmas[1]

        def work(visit: Visit, clean: Tensor, mask: Tensor | None) -> Tensor:
            return self.through(visit, clean, settings, mask=mask, progress=progress)

        kept = self._kept
        if kept is not None and mask is None and self._holds(kept, guider, latents, settings):
            kept.options["transformer_options"]["sample_sigmas"] = sigmas
            return self._again(kept, guider, latents, settings.seed, work)
        self._kept = None
        # a sampler inside the guider's own sample(): loading, hooks, wrappers are all ComfyUI's
        return guider.sample(
            torch.zeros_like(latents), latents, _Inside(self, work), sigmas, denoise_mask=mask,
            disable_pbar=True, seed=settings.seed,
        )  # fmt: skip

    def through(
        self,
        visit: Visit,
        clean: Tensor,
        settings: Settings,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """The ticks of one run, inside a prepared guider.

        Args:
            visit: the prepared guider.
            clean: source latents in the model's scale, [B, C, H, W].
            noise: noise of each frame instead of slot 0's, [B, C, H, W].
        """
        self._serial += 1
        self._meet(visit.model)
        course = self._steer(visit.model, settings)
        slots = self._slot_noise(settings.seed, clean)
        batch = clean.shape[0]
        frames = payloads(visit.conds, batch, visit.traits, self._serial)
        if mask is not None:
            own = slots.slot(0).expand_as(clean) if noise is None else noise
            frames = _with_mask(frames, mask, own)
        if settings.immediate:
            self._switch(frames[-1])
        f = self.ring.frames_per_slot
        total = -(-batch // f) + (course.n - 1 if settings.drain else 0)
        out: list[Tensor] = []
        through = self.recorded.through(visit)
        for done in range(total):
            comfy.model_management.throw_exception_if_processing_interrupted()
            at = slice(done * f, (done + 1) * f)
            entering = frames[at]
            tick = self.ring.tick(
                lambda rows: evaluate(visit, rows),
                clean[at] if entering else None,
                entering,
                course,
                slots,
                None if noise is None else noise[at],
                through,
            )
            self.ticks += 1
            if settings.drain:
                out += [latents for _, latents in tick.finished]
            else:
                out.append(_as_many(tick, len(entering)))
                self.lag = self._serial - self._newest_out(tick)
            if progress is not None:
                progress(done + 1, total, tick.estimate)
        self.frames += batch
        return out[0] if len(out) == 1 else torch.cat(out)

    def visit(self, guider, extra_args: dict[str, Any], n: int, shape: tuple[int, ...]) -> Visit:
        """A visit for a guider whose sample() is under way, with its calls counted here.

        Args:
            n: number of slots.
            shape: of one latent, (C, H, W).
        """
        model, options = guider.inner_model, extra_args["model_options"]
        conds = {side: entries[:] for side, entries in guider.conds.items()}
        guidance = fast_guidance(guider, conds, options)
        rows = 2 * n * self.ring.frames_per_slot
        if not _one_call_fits(model, guider.model_patcher, rows, shape):
            guidance = None  # ComfyUI's own evaluation knows how to split a batch
        count_into(self.calls, options)
        return Visit(guider, model, conds, options, extra_args.get("seed"), guidance)

    def keep(self, visit: Visit, n: int, shape: tuple[int, ...]) -> None:
        """Use the prepared guider again, if the fast path holds for it."""
        if visit.guidance is None:
            return
        guider = visit.guider
        self._kept = _Kept(
            weakref.ref(guider), shape, n, guider.model_patcher.patches_uuid, visit.conds,
            visit.options, visit.guidance, visit.batches,
        )  # fmt: skip

    def _holds(self, kept: _Kept, guider, latents: Tensor, settings: Settings) -> bool:
        patcher = guider.model_patcher
        return (
            kept.guider() is guider
            and kept.shape == tuple(latents.shape[1:])
            and kept.n >= len(settings.sigmas) - 1
            and kept.patches == patcher.patches_uuid
            and _resident(patcher)
        )

    def _again(self, kept: _Kept, guider, latents: Tensor, seed: int, work) -> Tensor:
        """What guider.sample does around a sampler, for a guider that is prepared already."""
        patcher = guider.model_patcher
        model, device = patcher.model, patcher.load_device
        visit = Visit(
            guider, model, kept.conds, kept.options, seed, kept.guidance, kept.batches
        )  # fmt: skip
        context = getattr(comfy.model_management, "cuda_device_context", contextlib.nullcontext)
        with contextlib.nullcontext() if device.type == "cpu" else context(device):
            patcher.pre_run()
            guider.inner_model, guider.conds = model, kept.conds
            try:
                clean = scaled_in(model, latents.to(device, torch.float32))
                return model.process_latent_out(work(visit, clean, None).to(torch.float32))
            finally:
                patcher.cleanup()
                del guider.inner_model, guider.conds

    def _meet(self, model) -> None:
        """Another model family cannot go on with the latents in flight."""
        if self._met() is model:
            return
        self._met = weakref.ref(model)
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
        self._steered = (asked, weakref.ref(sampling))
        return self._course

    def _slot_noise(self, seed: int, clean: Tensor) -> SlotNoise:
        shape = tuple(clean.shape[1:])
        known = self._noise
        if known is None or (known.seed, known.shape, known.device) != (seed, shape, clean.device):
            self._noise = SlotNoise(seed, shape, clean.device)
        return self._noise

    def _newest_out(self, tick: Tick) -> int:
        if tick.finished:
            return tick.finished[-1][0][-1].run
        # the estimate is of the most advanced frame
        return self.ring.in_flight[0].payloads[-1].run

    def _switch(self, newest: Payload) -> None:
        for place in self.ring.in_flight:
            place.payloads = [p.recondition(newest) for p in place.payloads]


class _Inside(comfy.samplers.Sampler):
    """Runs `work` where ComfyUI runs a sampler: model loaded, conditioning processed."""

    def __init__(self, stream: Stream, work: Callable[[Visit, Tensor, Tensor | None], Tensor]):
        self.stream = stream
        self.work = work

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None,
        denoise_mask=None, disable_pbar=False,
    ):  # fmt: skip
        n, shape = len(sigmas) - 1, tuple(latent_image.shape[1:])
        visit = self.stream.visit(model_wrap, extra_args, n, shape)
        out = self.work(visit, latent_image, denoise_mask)
        if denoise_mask is None:
            self.stream.keep(visit, n, shape)
        return out


class StreamSampler(comfy.samplers.Sampler):
    """The stream batch as a stateless SAMPLER: the latent batch is a clip, its noise its own.

    Args:
        step_rule: a name in engine.step_rules.STEP_RULES.
        frames_per_slot: F.
    """

    def __init__(self, step_rule: str, frames_per_slot: int):
        self.step_rule = step_rule
        self.frames_per_slot = frames_per_slot

    @torch.no_grad()
    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None,
        denoise_mask=None, disable_pbar=False,
    ):  # fmt: skip
        seed = extra_args.get("seed")
        settings = Settings(
            tuple(sigmas.tolist()), self.step_rule, 0 if seed is None else seed, drain=True
        )
        stream = Stream(self.frames_per_slot)
        shape = tuple(latent_image.shape[1:])
        visit = stream.visit(model_wrap, extra_args, len(sigmas) - 1, shape)

        def report(done: int, total: int, estimate: Tensor) -> None:
            if callback is not None:
                callback(done - 1, estimate, estimate, total)

        out = stream.through(visit, latent_image, settings, noise, denoise_mask, report)
        if callback is not None:
            callback(len(sigmas) - 2, out, out, len(sigmas) - 1)
        return out


def _resident(patcher) -> bool:
    """True if exactly this patcher's weights are loaded, so that ComfyUI has nothing to do."""
    loaded = comfy.model_management.current_loaded_models
    return (
        patcher.model.current_weight_patches_uuid == patcher.patches_uuid
        and patcher.current_loaded_device() == patcher.load_device
        and any(entry.model is patcher for entry in loaded)
    )


def _one_call_fits(model, patcher, rows: int, shape: tuple[int, ...]) -> bool:
    """ComfyUI's own estimate (comfy.samplers._calc_cond_batch) for a tick's most rows."""
    free = comfy.model_management.get_free_memory(patcher.load_device)
    return model.memory_required([rows, *shape]) * 1.5 < free


def _with_mask(frames: list[Payload], mask: Tensor, noise: Tensor) -> list[Payload]:
    return [
        replace(p, mask=mask[i % mask.shape[0]][None], noise=noise[i : i + 1])
        for i, p in enumerate(frames)
    ]


def _as_many(tick: Tick, wanted: int) -> Tensor:
    """As many frames as went in: the newest that left, else the best estimate so far."""
    out = tick.finished[-1][1] if tick.finished else tick.estimate
    if out.shape[0] >= wanted:
        return out[-wanted:]
    return torch.cat([out, out[-1:].expand(wanted - out.shape[0], *out.shape[1:])])
