"""The public class and diffusers as fast as their documentations make them without TensorRT.

channels_last and torch.compile with CUDA graphs ("reduce-overhead"), for the UNet and both halves
of the autoencoder, one compilation per shape. A copy of the networks, so that the plain sides keep
theirs; the same weights.
"""

import copy
import dataclasses
import functools
from typing import Any

import rivals
import torch

SECONDS = 75.0  # without which a compilation is not begun
COMPILED = "torch.compile, channels_last"


def makers(bench, kit, mode: str, kept: dict[str, Any]) -> dict[str, Any]:
    """What makes the sides that know the mode, by name.

    Args:
        kept: where the compiled networks are, once they are made.
    """

    def make(side, kit, *how):
        if "kit" not in kept:
            kept["kit"] = compiled(kit, "eager" if bench.rehearse else "inductor")
        made = side(kept["kit"], *how)
        made.frames = functools.partial(_frames, made.frames)
        return made

    sides = [side for side in (rivals.Public, rivals.AutoPipeline) if mode in side.modes]
    return {f"{side.title}, {COMPILED}": functools.partial(make, side) for side in sides}


def compiled(kit, backend: str = "inductor"):
    """The same networks, compiled."""
    unet, tiny_vae = copy.deepcopy(kit.unet), copy.deepcopy(kit.tiny_vae)
    mode = {"mode": "reduce-overhead"} if backend == "inductor" else {}
    for module in (unet, tiny_vae):
        module.to(memory_format=torch.channels_last)
    for module in (unet, tiny_vae.encoder, tiny_vae.decoder):
        module.compile(backend=backend, dynamic=False, **mode)
    return dataclasses.replace(kit, unet=unet, tiny_vae=tiny_vae)


def _frames(frames, pictures):
    # what the graphs gave for the last frame may be written over
    torch.compiler.cudagraph_mark_step_begin()
    return frames(pictures)
