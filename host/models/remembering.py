"""What engines are told where frames help each other in a MODEL."""

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from torch import Tensor

from ...compiled.engine import NotYet, Refused
from ...compiled.remembered import AMOUNT, BANK, SEEN, THRESHOLD, Layers, Remembered, named
from ...compiled.trt import files
from ...engine.coherence.neighbours import Exchange
from .coherence import Coherence, Place, coherence_of, places
from .walk import is_inner


def layers(coherence: Coherence, unet: torch.nn.Module) -> Layers:
    """Its layers as an engine has them."""
    names = [place.name for place in places(unet)]
    kinds = coherence.layers(unet)
    return Layers(*(tuple(name for name in names if name in kind) for kind in kinds))


def helps(patcher) -> bool:
    """Whether nodes have asked for it on a MODEL."""
    coherence = coherence_of(patcher)
    return coherence is not None and bool(layers(coherence, patcher.model.diffusion_model))


def frames(coherence: Coherence) -> int:
    """Keyframes that a layer remembers."""
    memory = coherence.memory
    return 1 if memory is None or memory.bank == "merged" else memory.frames


def remembered(
    name: str, remembers: bool, coherence: Coherence, exchange: Exchange, unet: torch.nn.Module,
    x: Tensor, by_plan: bool = False,
) -> Remembered | None:  # fmt: skip
    """What an engine is told of a call under way; None where its layers are as ever.

    Args:
        name: of the engine.
        remembers: see compiled.engine.Engine.
        by_plan: its rows run as the exchange's plan says.

    Raises:
        Refused: it does not take such calls.
        NotYet: not all is remembered yet.
    """
    known, inner = layers(coherence, unet), ()
    if by_plan:
        depth = exchange.plan.kept.depth
        inner = tuple(
            place.name for place in places(unet) if is_inner(place.name, depth, unet)
        )
        if not exchange.plan.kept.whole.shape[0]:
            known, inner = known.without(inner), ()
    if not known:
        return None
    if not remembers:
        raise Refused(
            f"{name} knows no Live Memory and no Live Future Attention ({known}): choose "
            "cudagraph, onnxruntime or openvino, or build an engine of TensorRT"
        )
    count = frames(coherence)
    told = Remembered.of(exchange, known, count, x.device, inner)
    full = told is not None and all(
        told.reads[named(BANK, "k", place.name)].shape[1] == count * place.tokens(x.shape[2:])
        for place in places(unet)
        if place.name in known.behind
    )
    if not full:
        raise NotYet("the memory is not full yet, which passes with the next frames")
    return told


def example(
    coherence: Coherence | None, unet: torch.nn.Module, x: Tensor, dtype: torch.dtype
) -> Remembered | None:
    """What an engine will be told of calls like x [R, C, H, W] once all is remembered; None where
    frames do not help each other."""
    known = None if coherence is None else layers(coherence, unet)
    if not known:
        return None
    count, reads = frames(coherence), {}
    rows, _, *size = x.shape
    if known.ahead:
        reads[f"{SEEN}0"] = torch.zeros((rows, rows), dtype=torch.int64)
    for place in places(unet):
        if place.name not in known.behind:
            continue
        shape = rows, count * place.tokens(size), _inner(unet, place).attn1.to_k.out_features
        fused = place.name in known.fused
        for kind in ("k", "v", "unit") if fused else ("k", "v"):
            reads[named(BANK, kind, place.name)] = torch.zeros(shape, dtype=dtype)
        if fused:
            reads[named(BANK, "norm", place.name)] = torch.zeros(shape[:2], dtype=dtype)
    if known.fused:
        reads[AMOUNT], reads[THRESHOLD] = torch.zeros(1), torch.zeros(1)
    return Remembered(known, count, reads)


def differs(coherence: Coherence | None, unet: torch.nn.Module, made: files.Made) -> str:
    """In words how an engine helps frames otherwise than a MODEL is to; empty where it is alike."""
    asked = example(coherence, unet, torch.zeros(1, 1, 8, 8), torch.float32)
    if asked is None:
        return ""  # nodes behind the loader may come to it
    has = "nothing of it" if made.layers is None else made.layers.words(made.frames, made.inputs)
    wants = asked.layers.words(asked.frames, asked.reads)
    if has == wants and made.layers == asked.layers:
        return ""
    return f"the MODEL has {wants}, and the engine was built with {has}"


def _inner(unet: torch.nn.Module, place: Place) -> torch.nn.Module:
    """The transformer block of a place."""
    side, number, i = place.key
    blocks = {
        "input": unet.input_blocks, "middle": [unet.middle_block], "output": unet.output_blocks,
    }  # fmt: skip
    part = next(p for p in blocks[side][number] if isinstance(p, SpatialTransformer))
    return part.transformer_blocks[i]
