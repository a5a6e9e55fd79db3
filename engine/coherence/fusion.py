"""Feature fusion (StreamV2V, arXiv 2405.15757, section 4.2): alike tokens become more alike."""

import torch
from torch import Tensor

from .attention import Read


def unit(o: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and lengths of tokens [..., S, C]: [..., S, C] and [..., S], of o's dtype.

    A length that is beyond the dtype is its largest number: finite tokens stay finite.
    """
    length = torch.linalg.vector_norm(o, dim=-1, dtype=torch.float32)
    length = length.clamp(1e-12, torch.finfo(o.dtype).max)
    return (o / length[..., None]).to(o.dtype), length.to(o.dtype)


def fuse(o: Tensor, read: Read, amount: Tensor, threshold: Tensor) -> Tensor:
    """Each token with the remembered one of highest cosine, where that is above the threshold:

        (1 - amount) o + amount o_remembered

    Args:
        o: outputs of an attention, [R, S, C].
        read: what is remembered, with its outputs.
        amount, threshold: 0-dim, float32, on the device.
    """
    own, _ = unit(o)
    alike = own @ read.unit.transpose(1, 2)
    seen = read.seen(alike.shape[2])
    if seen is not None:
        alike = alike.masked_fill(~seen[:, None], -2.0)
    cosine, at = alike.max(2)
    nearest = read.unit.gather(1, at[..., None].expand(*at.shape, o.shape[2]))
    nearest = nearest * read.norm.gather(1, at)[..., None]
    # nothing is above the threshold in a row that is not finite
    weight = torch.where(cosine > threshold, amount, 0.0)[..., None].to(o.dtype)
    return torch.lerp(o, nearest, weight)
