"""The FLOPs of a UNet's parts, counted once for a size on tensors that hold nothing."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...compiled.copies import emptied
from ...engine.blocks.cost import Cost
from .unet import plain_attention
from .walk import blocks, bodies

_SIZES = 8  # of a network that are kept
_known: weakref.WeakKeyDictionary[UNetModel, dict[tuple, "Cost | Uncountable"]]
_known = weakref.WeakKeyDictionary()


class Uncountable(ValueError):
    """Why a network's operations cannot be counted, for people."""


def cost_of(unet: UNetModel, shape: Sequence[int], tokens: int) -> Cost:
    """What a row costs.

    Args:
        unet: one that can be run by a plan (walk.why_not).
        shape: of a latent with whatever is concatenated to it, (C, H, W).
        tokens: of the prompt.

    Raises:
        Uncountable: the network runs code of its own that wants real weights; found out once.
    """
    known = _known.setdefault(unet, {})
    key = (*shape, tokens)
    if key not in known:
        while len(known) >= _SIZES:
            known.pop(next(iter(known)))
        with torch.inference_mode(False):
            known[key] = _tried(unet, tuple(shape), tokens)
    cost = known[key]
    if isinstance(cost, Uncountable):
        raise Uncountable(str(cost))
    return cost


def _tried(unet: UNetModel, shape: tuple[int, ...], tokens: int) -> "Cost | Uncountable":
    try:
        return _counted(unet, shape, tokens)
    # whatever a pack's code or a quantised layer's makes of weights that hold nothing
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:200]
        return Uncountable(
            f"the operations of {type(unet).__name__} cannot be counted "
            f"({type(error).__name__}: {first})"
        )


def _counted(unet: UNetModel, shape: tuple[int, ...], tokens: int) -> Cost:
    unet = _emptied(unet)
    names = {
        part: f"{side}.{number}.{i}"
        for side, number, block in blocks(unet)
        for i, part in enumerate(block)
    }
    shortcuts = {
        part.skip_connection: name for part, name in names.items() if isinstance(part, ResBlock)
    }
    counter = FlopCounterMode(display=False)
    counts: dict[torch.nn.Module, int] = {}

    def before(part: torch.nn.Module, args: Any) -> None:
        counts[part] = -counter.get_total_flops()

    def after(part: torch.nn.Module, args: Any, out: Any) -> None:
        counts[part] += counter.get_total_flops()

    for part in (*names, *shortcuts):
        part.register_forward_pre_hook(before)
        part.register_forward_hook(after)
    with torch.no_grad(), counter:
        _call(unet, shape, tokens)
    parts = {name: counts[part] for part, name in names.items()}
    shortcut = {name: counts[part] for part, name in shortcuts.items()}
    saved = {name: parts[name] - shortcut.get(name, 0) for name in bodies(unet)}
    return Cost(counter.get_total_flops(), parts, saved)


def _emptied(unet: UNetModel) -> UNetModel:
    """A copy whose weights hold nothing."""
    out = emptied(unet)
    vars(out).pop("forward", None)  # of a pack, which would call the network that was copied
    for part in out.modules():
        for name in ("weight_function", "bias_function"):
            if name in vars(part):  # a LoRA beside its weight, which costs nothing worth counting
                vars(part)[name] = []
        if hasattr(part, "comfy_cast_weights"):
            part.comfy_cast_weights = False
    return out.train(False)


def _call(unet: UNetModel, shape: tuple[int, ...], tokens: int) -> None:
    """One row."""
    def some(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    y, attentions = None, [p for p in unet.modules() if isinstance(p, SpatialTransformer)]
    if isinstance(unet.num_classes, int):
        y = some(1, dtype=torch.int64)
    elif unet.num_classes is not None:
        y = some(1, next(unet.label_emb.parameters()).shape[1])
    width = attentions[0].transformer_blocks[0].attn2.to_k.weight.shape[1] if attentions else 1
    unet(
        some(1, *shape), some(1), context=some(1, tokens, width), y=y,
        transformer_options={"optimized_attention_override": plain_attention},
    )  # fmt: skip
