"""Between two prompts."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Method = Literal["slerp", "lerp"]
METHODS: tuple[Method, ...] = ("slerp", "lerp")


def blend(a: Tensor, b: Tensor, weight: float, method: Method = "slerp") -> Tensor:
    """The vectors of `a` (weight 0) on their way to those of `b` (weight 1).

    Args:
        a: [..., C].
        b: the same shape.
        weight: 0..1; the ends give a and b themselves.
        method: `slerp` turns each vector at an even pace (Shoemake 1985) and blends its length,
            `lerp` takes the straight line, which shortens vectors half-way.
    """
    if weight <= 0:
        return a
    if weight >= 1:
        return b
    kind, a, b = a.dtype, a.float(), b.float()
    straight = torch.lerp(a, b, weight)
    if method == "lerp":
        return straight.to(kind)
    length_a = a.norm(dim=-1, keepdim=True)
    length_b = b.norm(dim=-1, keepdim=True)
    unit_a, unit_b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    cosine = (unit_a * unit_b).sum(-1, keepdim=True)
    # no turn is defined between parallel, opposite or empty vectors
    turns = (cosine.abs() < 1 - 1e-5) & (length_a > 0) & (length_b > 0)
    angle = cosine.where(turns, 0.0).acos()
    turned = ((1 - weight) * angle).sin() * unit_a + (weight * angle).sin() * unit_b
    arc = turned / angle.sin() * torch.lerp(length_a, length_b, weight)
    return torch.where(turns, arc, straight).to(kind)
