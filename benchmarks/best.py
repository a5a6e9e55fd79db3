"""The sides as fast as their documentations make them without TensorRT.

Ours: Live Compile and Live Compile VAE. The public class and diffusers: channels_last and
torch.compile with CUDA graphs ("reduce-overhead"), for the UNet and both halves of the autoencoder,
one compilation per shape; of a copy of the networks, so that the plain sides keep theirs.
"""

import copy
import dataclasses
import functools
from typing import Any

import rivals
import torch

SECONDS = 75.0  # without which a compilation is not begun
COMPILED = "torch.compile, channels_last"


def ours(bench) -> dict[str, Any]:
    """What makes our side with both nodes, by name."""

    def make(kit, *how):
        return bench.ours(compiled_vae(kit, bench.recording), *how)

    return {"LiveDiffusion, cudagraph, compiled VAE": make}


def makers(bench, kit, mode: str, kept: dict[str, Any]) -> dict[str, Any]:
    """What makes the others that know the mode, by name.

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


def compiled_vae(kit, recording=None):
    """The same networks, the autoencoder as Live Compile VAE has it on NVIDIA.

    Args:
        recording: stands for CUDA graphs.
    """
    from livediffusion.compiled.cuda_half import CudaHalf
    from livediffusion.compiled.graph import CudaRecording
    from livediffusion.host.frames.compiled_vae import compiled

    new = recording or CudaRecording
    vae = compiled(kit.vae, lambda: CudaHalf(new), lambda text: None)
    return dataclasses.replace(kit, vae=vae)


def _frames(frames, pictures):
    # what the graphs gave for the last frame may be written over
    torch.compiler.cudagraph_mark_step_begin()
    return frames(pictures)
