"""Bad input, said in the node's own words before it reaches the stream."""

import inspect
import math
from itertools import pairwise

import comfy.model_sampling
import comfy.sample
from torch import Tensor


def checked_sigmas(sigmas: Tensor) -> tuple[float, ...]:
    """The noise levels as numbers.

    Raises:
        ValueError: fewer than two levels, not one row of finite numbers, or not descending to >= 0.
    """
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1:
        raise ValueError("sigmas: expected one row of noise levels. Connect a scheduler node.")
    if sigmas.shape[0] < 2:
        raise ValueError(
            f"sigmas: {sigmas.shape[0]} noise levels are too few, a stream needs at least 2 "
            "(n + 1 for n steps). Raise steps or strength in the scheduler."
        )
    levels = tuple(sigmas.tolist())
    if not all(map(math.isfinite, levels)):
        raise ValueError(f"sigmas: every level must be a finite number, not {levels}.")
    if any(a <= b for a, b in pairwise(levels)) or levels[-1] < 0:
        raise ValueError(
            f"sigmas: levels must fall from step to step and end at 0 or above, not {levels}. "
            "Do not flip them."
        )
    return levels


def checked_latent(patcher, latent: dict, finite: bool = True) -> Tensor:
    """The frames' latents, [B, C, H, W] (or [B, C, T, H, W] for video models).

    Args:
        patcher: the MODEL they will be denoised by.
        latent: ComfyUI's LATENT.
        finite: refuse values that are not finite, as far as a look costs no wait for a device. A
            live stream goes on without such a frame instead, everywhere: the ring replaces it.

    Raises:
        ValueError: empty batch, wrong rank or channels, or values that are not finite.
    """
    samples = latent["samples"]
    if not isinstance(samples, Tensor):
        # what ComfyUI's VAE gives for a batch without a frame
        raise ValueError("latent: the batch holds no frame. Check the node before this one.")
    if samples.is_nested:
        raise ValueError("latent: nested latents (audio with video) cannot be streamed.")
    form = patcher.get_model_object("latent_format")
    rank = 2 + form.latent_dimensions
    if samples.ndim != rank and not (samples.ndim == 4 and rank == 5):
        raise ValueError(
            f"latent: expected {rank} dimensions (frames, channels, height, width), got the shape "
            f"{tuple(samples.shape)}. Connect an encoder node."
        )
    if 0 in samples.shape:
        raise ValueError(f"latent: the batch holds no frame (shape {tuple(samples.shape)}).")
    ratios = [latent.get(f"downscale_ratio_{kind}") for kind in ("spacial", "temporal")]
    if samples.shape[1] != form.latent_channels or any(ratios) or samples.ndim != rank:
        samples = _fitted(patcher, samples, ratios)
    if samples.shape[1] != form.latent_channels:
        raise ValueError(
            f"latent: {samples.shape[1]} channels, but this model takes {form.latent_channels}. "
            "Encode with the VAE that belongs to the model."
        )
    # elsewhere the look would wait for the device. a sum is not finite where one of its values is
    # not, and far cheaper than looking at each
    if finite and samples.device.type == "cpu" and not math.isfinite(float(samples.sum())):
        bad = (~samples.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"latent: frame {', '.join(map(str, bad))} of {samples.shape[0]} holds values that "
                "are not finite (NaN or infinity). Check the VAE and its precision."
            )
    return samples


def _fitted(patcher, samples: Tensor, ratios: list) -> Tensor:
    """ComfyUI's own fit of an empty latent to the model; newer versions take the ratios too."""
    fit = comfy.sample.fix_empty_latent_channels
    extra = ratios if len(inspect.signature(fit).parameters) > 2 else []
    return fit(patcher, samples, *extra)


def noise_table(model) -> tuple[Tensor, bool]:
    """The noise levels a MODEL was trained on, rising, [T] on the CPU; and if it is a flow model.

    Raises:
        ValueError: the model brings no such table.
    """
    try:
        sampling = model.get_model_object("model_sampling")
        table = sampling.sigmas.detach().float().cpu()
    except AttributeError:
        raise ValueError(
            "model: has no table of noise levels (model_sampling). Connect a diffusion model."
        ) from None
    return table, isinstance(sampling, comfy.model_sampling.CONST)
