"""The stream batch as a stateless SAMPLER, inside anybody's sampling."""

import copy

import comfy.samplers
import torch
from torch import Tensor

from . import alone
from .check import checked_sigmas
from .route import Road
from .stream import AsSampler, Settings, Stream
from .visit import Visit


class StreamSampler(comfy.samplers.Sampler):
    """The latent batch is a clip, its noise its own.

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
        """See comfy.samplers.Sampler.

        Raises:
            ValueError: the sigmas are none, or something wired cannot be right.
        """
        seed = extra_args.get("seed")
        settings = Settings(
            checked_sigmas(sigmas), self.step_rule, 0 if seed is None else seed, drain=True
        )
        # what ends at a noise level above 0 is not what its last step predicts
        stream = Stream(self.frames_per_slot, predictions=settings.sigmas[-1] > 0)
        n = len(sigmas) - 1
        visit = stream.visit(model_wrap, extra_args, n, noise, latent_image, denoise_mask)

        def report(done: int, total: int, estimate: Tensor) -> None:
            if callback is not None:
                callback(done - 1, estimate, estimate, total)

        if visit.route.road is Road.PER_FRAME and noise.shape[0] > 1:
            out, ends = _one_by_one(
                stream, visit, sigmas, settings, noise, latent_image, denoise_mask, report
            )
        else:
            out = stream.flow(visit, latent_image, settings, noise, denoise_mask, report)
            ends = stream.ends
        if callback is not None:
            callback(n - 1, torch.cat(ends) if ends else out, out, n)
        return out


def _one_by_one(
    stream: Stream, visit: Visit, sigmas: Tensor, settings: Settings, noise: Tensor,
    latents: Tensor, mask: Tensor | None, report,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Each frame in a sample() of its own inside the one that is under way; and Stream.ends."""
    model, count, out, ends = visit.model, noise.shape[0], {}, {}
    # the guider is busy; its options have been prepared for this sample() already
    twin = copy.copy(visit.guider)
    twin.model_options = twin.model_patcher.model_options
    for i in range(count):
        frame, own = latents[i : i + 1], noise[i : i + 1]

        def part(done: int, total: int, estimate: Tensor | None, i=i) -> None:
            report(i * total + done, count * total, estimate)

        def work(inner: Visit, clean, mask, i=i, frame=frame, own=own, part=part) -> Tensor:
            alone.tell_place(inner, visit.batch, i, count)
            # once more where what is wrapped around samples again
            out[i], ends[i] = stream.flow(inner, frame, settings, own, mask, part), stream.ends
            return out[i]

        twin.sample(
            own, model.process_latent_out(frame), AsSampler(stream, work), sigmas,
            denoise_mask=alone.mask_of(mask, i, latents), disable_pbar=True, seed=settings.seed,
        )  # fmt: skip
    return torch.cat([out[i] for i in range(count)]), [end for i in range(count) for end in ends[i]]
