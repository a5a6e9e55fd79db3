"""Encode and decode on the VAE's device: ComfyUI's own methods, without the trip to the CPU."""

import copy

from torch import Tensor

from . import transfer
from .check import checked_image


def _near(vae):
    # results go to output_device (comfy/sd.py); a copy leaves the user's VAE as it is
    near = copy.copy(vae)
    near.output_device = vae.device
    return near


def encode(vae, pixels: Tensor) -> Tensor:
    """IMAGE [B, H, W, C] in 0..1 to latents [B, C', H/f, W/f] on the VAE's device.

    Raises:
        ValueError: pixels are no IMAGE, or hold no frame.
    """
    return _near(vae).encode(transfer.near(checked_image("pixels", pixels), vae.device))


def decode(vae, latents: Tensor) -> Tensor:
    """Latents to IMAGE [B, H, W, C] in 0..1 on the VAE's device; a video's frames in a row.

    Raises:
        ValueError: there are no latents.
    """
    if not isinstance(latents, Tensor) or 0 in latents.shape:
        raise ValueError("samples: the batch holds no frame. Check the node before this one.")
    if latents.is_nested:
        latents = latents.unbind()[0]
    images = _near(vae).decode(latents)
    if images.ndim == 5:
        images = images.reshape(-1, *images.shape[-3:])
    return images
