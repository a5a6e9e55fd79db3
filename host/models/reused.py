"""What engines are told where rows go on with kept features (Live Reuse)."""

from collections.abc import Sequence
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel
from torch import Tensor

from ...compiled.engine import Refused
from ...compiled.reused import GIVEN, Reused
from ...compiled.trt import files
from ...engine.blocks.plan import BlockPlan
from ...engine.blocks.schedule import Reuse
from ...engine.coherence.neighbours import Exchange
from .coherence import Coherence, coherence_of, depth_of
from .walk import why_not

ALONE = "each frame is sampled by itself"  # of calls that no ring makes


def reused(name: str, takes: bool, exchange: Exchange, unet: torch.nn.Module, x: Tensor) -> Reused:
    """What an engine is told of a call under way that goes by a plan.

    Args:
        name: of the engine.
        takes: see compiled.engine.Engine.remembers.
        x: the call's latents, [R, C, H, W].

    Raises:
        Refused: it does not take such calls, or such plans.
    """
    if not takes:
        raise Refused(
            f"{name} knows no Live Reuse: choose cudagraph, onnxruntime or openvino, or build an "
            "engine of TensorRT"
        )
    plan: BlockPlan = exchange.plan
    if plan.splits:
        raise skipping(name)
    kept = plan.kept
    if kept.whole.shape[0] < x.shape[0]:
        return Reused.of(kept.depth, kept.whole, kept.features())
    # nothing may have been kept yet, and nothing is read
    shape = x.shape[0], *feature(unet, kept.depth, x.shape[2:])
    return Reused.of(kept.depth, kept.whole, x.new_zeros(shape))


def skipping(name: str) -> Refused:
    """What an engine says of a MODEL that passes blocks by (host.models.skips)."""
    return Refused(
        f"which blocks run depends on the noise level, and {name} has one network for all: take "
        "the MODEL from before Live Searched Steps"
    )


def patching(name: str) -> Refused:
    """What an engine says of a MODEL of which only changed tiles are computed."""
    return Refused(
        f"how much is computed changes with every frame (Live Patchwork), and {name} has one "
        "network for all: take the MODEL from before one of the two nodes"
    )


def aside(
    name: str, why: str, coherence: Coherence, exchange: Exchange, options: dict[str, Any],
    unet: torch.nn.Module,
) -> str:  # fmt: skip
    """What an engine that records whole ticks says of a call whose tick is not recorded.

    Args:
        why: it never is; empty where it may be later, of which nothing is said.
        options: the call's transformer_options.
    """
    if coherence.patchwork is not None:
        return str(patching(name))
    keeps = bool(exchange.plan) and exchange.plan.kept is not None
    if keeps and not why and not coherence.goes_by_plan(exchange, options, unet):
        why = "Live Reuse can keep nothing here, as its node says"
    if not why:
        return ""
    asked = {
        "Live Future Attention": coherence.future, "Live Memory": coherence.memory,
        "Live Reuse": coherence.reuse, "Live Searched Steps": coherence.skips,
    }  # fmt: skip
    nodes = " and ".join(node for node, wish in asked.items() if wish is not None)
    return (
        f"with {nodes} {name} records whole ticks of a stream and nothing else, and {why}. For a "
        f"graph of the UNet alone take the MODEL from before {nodes}"
    )


def feature(unet: UNetModel, depth: int, size: Sequence[int]) -> tuple[int, ...]:
    """Shape of what is kept of a row, (C, h, w), of latents of this height and width."""
    for block in list(unet.input_blocks)[: depth + 1]:
        if any(isinstance(p, Downsample) or (isinstance(p, ResBlock) and p.updown) for p in block):
            size = [-(-side // 2) for side in size]
    outer = unet.output_blocks[len(unet.output_blocks) - 1 - depth][0]
    skip = unet.input_blocks[depth]
    return outer.channels - _channels(skip), *size


def _channels(block: Sequence[torch.nn.Module]) -> int:
    """That come out of a block."""
    known = (getattr(part, "out_channels", None) for part in reversed(block))
    return next(channels for channels in known if channels is not None)


def tell(reuse: Reused, exchange: Exchange, dtype: torch.dtype) -> None:
    """Hand on what the network gave, as if it had given it there."""
    kept = exchange.plan.kept
    if GIVEN in reuse.wrote:
        kept.put(reuse.wrote[GIVEN].to(dtype))
    kept.taken()


def example(
    coherence: Coherence | None, unet: torch.nn.Module, x: Tensor, dtype: torch.dtype
) -> Reused | None:
    """What an engine will be told of calls like x [R, C, H, W]; None where every row runs whole."""
    depth = _depth(coherence, unet)
    if depth is None:
        return None
    rows = x.shape[0]
    features = torch.zeros((rows, *feature(unet, depth, x.shape[2:])), dtype=dtype)
    # whatever the interval is now: an engine takes every number of rows that run whole
    return Reused.of(depth, torch.arange(-(-rows // Reuse().interval)), features)


def reuses(patcher) -> bool:
    """Whether a node has asked for it on a MODEL, and nothing keeps all rows whole."""
    return _depth(coherence_of(patcher), patcher.model.diffusion_model) is not None


def differs(coherence: Coherence | None, unet: torch.nn.Module, made: files.Made) -> str:
    """In words how an engine goes on with kept features otherwise than a MODEL is to; empty where
    it is alike."""
    asked = _depth(coherence, unet)
    if asked is None or asked == made.depth:
        return ""  # a node behind the loader may come to it
    has = "none" if made.depth is None else f"it at depth {made.depth}"
    return f"the MODEL has Live Reuse at depth {asked}, and the engine was built with {has}"


def _depth(coherence: Coherence | None, unet: torch.nn.Module) -> int | None:
    """See engine.blocks.plan.Kept; None where every row runs whole."""
    if coherence is None or coherence.reuse is None or why_not(unet):
        return None
    if coherence.memory is not None or coherence.future is not None:
        return None
    return depth_of(unet, coherence.reuse.depth)
