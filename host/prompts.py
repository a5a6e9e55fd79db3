"""Blending ComfyUI's CONDITIONING."""

import math

from torch import Tensor

from ..engine.blend import Method, blend


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
        blended = None if tokens is None else blend(*_same_length(tokens, target), weight, method)
        settings = dict(settings)
        pooled, pooled_b = settings.get("pooled_output"), other.get("pooled_output")
        if pooled is not None and pooled_b is not None:
            settings["pooled_output"] = blend(pooled, pooled_b.to(pooled), weight, method)
        out.append([blended, settings])
    return out


def _same_length(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both [1, T, C] with T the least common multiple: attention to repeated tokens is the same."""
    b = b.to(a)
    length = math.lcm(a.shape[1], b.shape[1])
    return a.repeat(1, length // a.shape[1], 1), b.repeat(1, length // b.shape[1], 1)
