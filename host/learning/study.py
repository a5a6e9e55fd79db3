"""Finding where the steps go, inside ComfyUI's own sampling of the user's model."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ..models import skips
from ..models.time_shift import Dial
from ..sampling.space import ModelSpace, scaled_in

_ROWS = 16  # samples in one model call, at most


class Bench:
    """The user's model, ready to be called: Predict of schedules.pupil.

    Attributes:
        space: the model family's noise space.
        calls: evaluations of one sample so far.
    """

    def __init__(
        self, wrap, extra_args: dict, dials: tuple[Dial, skips.Dial],
        heard: Callable[[int], None],
    ):  # fmt: skip
        self._wrap, self._extra, self._heard = wrap, extra_args, heard
        self._time, self._skips = dials
        self._rows = _ROWS
        self._model = wrap.inner_model
        self.space = ModelSpace(self._model.model_sampling)
        self.calls = 0

    def __call__(
        self, x: Tensor, sigma: float, shift: float = 0.0, skipped: frozenset[str] = frozenset()
    ) -> Tensor:
        """Clean predictions, [S, ...], in as many calls as memory asks for.

        Args:
            skipped: bodies that the network passes by, for a subject that can.

        Raises:
            InterruptProcessingException: the user cancelled.
        """
        self._time.shift, self._skips.skipped = shift, skipped
        out, at = [], 0
        while at < len(x):
            comfy.model_management.throw_exception_if_processing_interrupted()
            part = x[at : at + self._rows]
            try:
                out.append(self._wrap(part, part.new_full((len(part),), sigma), **self._extra))
            except comfy.model_management.OOM_EXCEPTION:
                if self._rows == 1:
                    raise
                comfy.model_management.soft_empty_cache()
                self._rows //= 2
                logging.warning("LiveDiffusion: memory is short, %d samples at once", self._rows)
                continue
            at += len(part)
            self.calls += len(part)
            self._heard(self.calls)
        return torch.cat(out)

    def probe(self, x: Tensor, bodies: frozenset[str]) -> None:
        """Sees whether anything is passed by.

        Raises:
            ValueError: nothing is.
        """
        level = float(self._model.model_sampling.sigma_max)
        x = x * level
        if torch.equal(self(x, level), self(x, level, 0.0, bodies)):
            raise ValueError(
                "skip_up_to: something runs this model's network in a way of its own, so that "
                "nothing of it is left out. Set it to 0, or do without that node or pack."
            )

    def noised(self, clean: Tensor, noise: Tensor, top: float) -> Tensor:
        """What a run that begins at `top` starts from."""
        mix = self.space.entry(top)
        return clean * mix.source + noise * mix.noise

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents as VAEs give them, in the model's scale."""
        return scaled_in(self._model, latents.float())


@dataclass
class Subject:
    """What is sampled.

    Attributes:
        model: ComfyUI's MODEL.
        positive, negative: CONDITIONINGs; without a negative one there is no guidance.
        cfg: guidance scale.
        latents: the pictures that runs begin from, [B, C, H, W] as VAEs give them, or zeros.
        count: samples; latents repeat.
        seed: of their noise.
        bodies: of its network, that may be passed by.
    """

    model: Any
    positive: list
    negative: list | None
    cfg: float
    latents: Tensor
    count: int
    seed: int
    bodies: frozenset[str] = frozenset()

    def noise(self) -> Tensor:
        """[count, C, H, W], the same on every machine."""
        generator = torch.Generator().manual_seed(self.seed % 2**63)
        return torch.randn((self.count, *self.latents.shape[1:]), generator=generator)

    @torch.inference_mode()
    def study(self, work: Callable[[Bench, Tensor, Tensor], Any], heard: Callable[[int], None]):
        """Have `work` done where ComfyUI runs a sampler: model loaded, conditioning processed.

        Args:
            work: is given the bench, and for each sample the clean latent in the model's scale and
                the noise, both [count, C, H, W] on the model's device.
            heard: called with the evaluations so far.

        Returns:
            what `work` returned.
        """
        dials = Dial(), skips.Dial()
        model = dials[0].on(self.model)
        guider = comfy.samplers.CFGGuider(dials[1].on(model) if self.bodies else model)
        negative = self.negative
        guider.set_conds(self.positive, [] if negative is None else negative)
        guider.set_cfg(1.0 if negative is None else self.cfg)
        inside = _StudyAsSampler(self, work, dials, heard)
        # ComfyUI makes room for this many rows
        rows = self.latents[:1].expand(min(self.count, _ROWS), *self.latents.shape[1:])
        top = float(self.model.get_model_object("model_sampling").sigma_max)
        guider.sample(
            torch.zeros_like(rows), rows, inside, torch.tensor([top, 0.0]), disable_pbar=True,
            seed=self.seed,
        )  # fmt: skip
        return inside.result


class _StudyAsSampler(comfy.samplers.Sampler):
    def __init__(self, subject: Subject, work, dials, heard):
        self.subject, self.work, self.dials, self.heard = subject, work, dials, heard
        self.result: Any = None

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None,
        denoise_mask=None, disable_pbar=False,
    ):  # fmt: skip
        subject, device = self.subject, noise.device
        latents = subject.latents.to(device, torch.float32)
        clean = scaled_in(model_wrap.inner_model, latents)
        clean = clean[torch.arange(subject.count, device=device) % len(clean)]
        bench = Bench(model_wrap, extra_args, self.dials, self.heard)
        noise = subject.noise().to(device)
        if subject.bodies:
            bench.probe(noise[:1], subject.bodies)
        self.result = self.work(bench, clean, noise)
        return latent_image
