"""Blending ComfyUI's CONDITIONING."""

import math

from torch import Tensor

from ...engine.blend import Method, blend


def blend_conditioning(a: list, b: list, weight: float, method: Method) -> list:
    """Each entry of `a` on its way to the first entry of `b`, pooled vectors included.

    Args:
        a: CONDITIONING at weight 0; its entries' settings are kept.
        b: CONDITIONING at weight 1.
        weight: 0..1.
        method: see engine.blend.

    Raises:
        ValueError: one of them is empty, or the two come from different text encoders.
    """
    for name, side in (("a", a), ("b", b)):
        if not side:
            raise ValueError(f"{name}: the conditioning is empty. Connect a text encoder node.")
    if weight <= 0:
        return a
    if weight >= 1:
        return b
    target, other = b[0]
    out = []
    for tokens, settings in a:
        if (tokens is None) != (target is None) or (
            tokens is not None and tokens.shape[-1] != target.shape[-1]
        ):
            raise ValueError("b: comes from another text encoder than a; use one CLIP for both.")
        settings = dict(settings)
        blended = None
        if tokens is not None:
            length = _length(tokens.shape[1], target.shape[1])
            pair = (_repeated(t.to(tokens), length) for t in (tokens, target))
            blended = blend(*pair, weight, method)
            masks = [s["attention_mask"] for s in (settings, other) if "attention_mask" in s]
            if len(masks) == 2:
                # a token counts if either prompt has one there
                mask, mask_b = (_repeated(m.to(masks[0]), length) for m in masks)
                settings["attention_mask"] = mask.maximum(mask_b)
        pooled, pooled_b = settings.get("pooled_output"), other.get("pooled_output")
        if pooled is not None and pooled_b is not None:
            settings["pooled_output"] = blend(pooled, pooled_b.to(pooled), weight, method)
        out.append([blended, settings])
    return out


def _length(a: int, b: int) -> int:
    # attention to tokens that are all repeated equally often is the same, so the least common
    # multiple changes neither prompt; ComfyUI repeats up to four times too (CONDCrossAttn)
    common = math.lcm(a, b)
    return common if common <= 4 * min(a, b) else max(a, b)


def _repeated(tokens: Tensor, length: int) -> Tensor:
    """[1, T, ...] to [1, length, ...] by starting over."""
    times = -(-length // tokens.shape[1])
    return tokens.repeat(1, times, *[1] * (tokens.ndim - 2))[:, :length]
