"""Encode and decode on the VAE's device: ComfyUI's own methods, without the trip to the CPU."""

import copy

from torch import Tensor

from . import transfer


def _near(vae):
    # results go to output_device (comfy/sd.py); a copy leaves the user's VAE as it is
    near = copy.copy(vae)
    near.output_device = vae.device
    return near


def encode(vae, pixels: Tensor) -> Tensor:
    """IMAGE [B, H, W, C] in 0..1 to latents [B, C', H/f, W/f] on the VAE's device."""
    return _near(vae).encode(transfer.near(pixels, vae.device))


def decode(vae, latents: Tensor) -> Tensor:
    """Latents to IMAGE [B, H, W, C] in 0..1 on the VAE's device; a video's frames in a row."""
    if latents.is_nested:
        latents = latents.unbind()[0]
    images = _near(vae).decode(latents)
    if images.ndim == 5:
        images = images.reshape(-1, *images.shape[-3:])
    return images
