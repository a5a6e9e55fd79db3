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
    straight = torch.lerp(a, b, weight)
    if method == "lerp":
        return straight
    length_a = a.norm(dim=-1, keepdim=True)
    length_b = b.norm(dim=-1, keepdim=True)
    unit_a, unit_b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    angle = (unit_a * unit_b).sum(-1, keepdim=True).clamp(-1, 1).acos()
    turned = ((1 - weight) * angle).sin() * unit_a + (weight * angle).sin() * unit_b
    arc = turned / angle.sin() * torch.lerp(length_a, length_b, weight)
    # no turn is defined between parallel, opposite or empty vectors
    return torch.where(angle.sin() > 1e-4, arc, straight)
