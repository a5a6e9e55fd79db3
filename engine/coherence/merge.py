"""A bank that stays one frame large (StreamV2V, arXiv 2405.15757, section 4.3; token merging,
arXiv 2210.09461): the new frame's tokens and those that are kept are merged in pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor

_AT_ONCE = 2048  # sources whose cosines are worked out together


def dealt(tokens: int, generator: torch.Generator) -> Tensor:
    """A random order of 2N tokens: the first half are destinations, the second half sources.

    Args:
        tokens: N.
        generator: on the CPU, so that a seed means the same on every machine.
    """
    return torch.randperm(2 * tokens, generator=generator)


def merged(new: Sequence[Tensor], old: Sequence[Tensor], order: Tensor) -> list[Tensor]:
    """Each source is averaged into its nearest destination, by cosine of the keys.

    Args:
        new, old: keys [W, N, C] first, then whatever is paired as they are, [W, N, ...].
        order: see `dealt`, on the device.

    Returns:
        [W, N, C] each: the destinations.
    """
    n = new[0].shape[1]
    both = [torch.cat(pair, 1) for pair in zip(new, old, strict=True)]
    keys = torch.nn.functional.normalize(both[0].float(), dim=-1)
    kept = keys.index_select(1, order[:n]).transpose(1, 2)
    sources = keys.index_select(1, order[n:]).split(_AT_ONCE, 1)
    nearest = torch.cat([(part @ kept).argmax(2) for part in sources], 1)
    count = torch.ones(nearest.shape, device=nearest.device)
    count.scatter_add_(1, nearest, torch.ones_like(count))
    out = []
    for each in both:
        total = each.index_select(1, order[:n]).float()
        index = nearest[..., None].expand(total.shape)
        total.scatter_add_(1, index, each.index_select(1, order[n:]).float())
        out.append((total / count[..., None]).to(each.dtype))
    return out
