"""What calm costs: ticks of the embedded model by the clock, SD-Turbo's layout in operations."""

import statistics
from typing import Any

import torch
from calm_clips import Clip
from calm_ways import OFF, Kit, Run, Way
from measure import Device, Times, in_turns
from torch.utils.flop_counter import FlopCounterMode

STEPS = 4
LATENT = 64  # of 512 x 512 pixels
# the published configuration, as ComfyUI's UNetModel takes it
TURBO = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3, "context_dim": 1024, "num_heads": -1,
    "num_head_channels": 64, "use_spatial_transformer": True, "use_linear_in_transformer": True,
    "legacy": False,
}  # fmt: skip


def ticks(kit: Kit, ways: list[Way], clip: Clip, frames: int) -> dict[str, dict[str, float]]:
    """A whole frame of each way, in turns: {way: ms, ratio to off, and off's own A/A}.

    The ratio is the median of those of each round, so that a busy machine slows both.

    Args:
        kit: of STEPS slots.
        clip: whose pictures go round and round.
    """
    times = taken({way.name: Run(kit, clip, way) for way in ways}, clip, frames)
    told = {}
    for name, own in times.items():
        pairs = zip(own.ms, times[OFF.name].ms, strict=True)
        told[name] = {"ms": own.median, "ratio": statistics.median(a / b for a, b in pairs),
                      "A/A": own.spread}  # fmt: skip
    return told


def taken(runs: dict[str, Run], clip: Clip, frames: int) -> dict[str, Times]:
    """Times of whole frames of each run, in turns.

    Args:
        clip: whose pictures go round and round.

    Raises:
        RuntimeError: a run failed.
    """
    pictures, at = clip.noisy.movedim(1, -1), dict.fromkeys(runs, 0)

    def frame(name: str) -> None:
        runs[name].frame(pictures[at[name] % clip.length][None])
        at[name] += 1

    turns = {name: lambda name=name: frame(name) for name in runs}
    times = in_turns(turns, Device("cpu"), frames, warm=4 * STEPS)
    for name, own in times.items():
        if own.failed is not None:
            raise RuntimeError(f"{name}: {own.failed}")
    return times


def turbo() -> torch.nn.Module:
    """SD-Turbo's UNet without numbers."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(**TURBO, device="meta", dtype=torch.float32)


def forward(unet: torch.nn.Module, rows: int = 1, latent: int = LATENT) -> int:
    """Operations of a forward without any of this, none of which is carried out."""
    from comfy.ldm.modules.attention import attention_pytorch

    def plain(other: Any, *args: Any, **named: Any) -> torch.Tensor:
        return attention_pytorch(*args, **named)

    counted, options = FlopCounterMode(display=False), {"optimized_attention_override": plain}
    # inference_mode would hand over convolutions and attention undivided
    with torch.inference_mode(False), torch.no_grad(), torch.device("meta"), counted:
        unet(
            torch.empty(rows, TURBO["in_channels"], latent, latent), torch.ones(rows),
            torch.empty(rows, 77, TURBO["context_dim"]), transformer_options=options,
        )  # fmt: skip
    return counted.get_total_flops()


def added(unet: torch.nn.Module, coherence: Any, n: int, latent: int = LATENT) -> float:
    """Operations that a row takes beside its forward, counted from the layers.

    Attention of N queries over M more keys: 4 N M C. Likeness of two frames' tokens, for fusion and
    for merging: 2 N^2 C; a frame is merged once in `interval` frames, at every slot.

    Args:
        coherence: a host.models.coherence.Coherence.
        n: slots.
    """
    from livediffusion.host.models.coherence import places

    ahead, behind, fused = coherence.layers(unet)
    total = 0.0
    for place in places(unet):
        tokens = (latent // place.scale) ** 2
        width = _block(unet, place.key).attn1.to_q.weight.shape[0]
        if place.name in ahead:
            total += 4 * tokens * (n - 1) * tokens * width
        if place.name in behind:
            asked = coherence.memory
            held = asked.frames if asked.bank == "queue" else 1
            total += 4 * tokens * held * tokens * width
            if place.name in fused:
                total += 2 * tokens * held * tokens * width
            if asked.bank == "merged":
                total += 2 * tokens * tokens * width / asked.interval
    return total


def _block(unet: torch.nn.Module, key: tuple[str, int, int]) -> torch.nn.Module:
    from comfy.ldm.modules.attention import SpatialTransformer

    side, number, inner = key
    blocks = {"input": unet.input_blocks, "middle": [unet.middle_block],
              "output": unet.output_blocks}[side]  # fmt: skip
    part = next(part for part in blocks[number] if isinstance(part, SpatialTransformer))
    return part.transformer_blocks[inner]


def shares(ways: list[Way], kit: Kit) -> dict[str, float]:
    """Operations of a tick of STEPS slots over those without, SD-Turbo's layout at 512 x 512."""
    from livediffusion.host.models.coherence import coherence_of

    unet = turbo()
    base, told = forward(unet), {}
    for way in ways:
        found = None if way.model is None else coherence_of(way.model(kit.model))
        told[way.name] = 1 + (added(unet, found, STEPS) / base if found else 0)
    return told
