"""Which rows of a call a tensor has been narrowed to.

What a recording has computed beforehand for all rows (compiled.graph.Folded) takes the place of a
layer that is given only some of them: the tensor tells which.
"""

import torch
from torch import Tensor

_NAME = "_livediffusion_rows"


def pick(tensor: Tensor, index: Tensor) -> Tensor:
    """These rows of a tensor of a call.

    Args:
        index: rows, int64, of those that the tensor has.
    """
    before = of(tensor)
    out = tensor.index_select(0, index)
    setattr(out, _NAME, index if before is None else before.index_select(0, index))
    return out


def of(tensor: Tensor) -> Tensor | None:
    """The rows of the call that it has, int64; None for all of them."""
    return getattr(tensor, _NAME, None)


def layout(tensor: Tensor) -> torch.memory_format:
    """How the numbers of features, [R, C, h, w], lie."""
    last = torch.channels_last
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=last):
        return torch.contiguous_format if tensor.is_contiguous() else last
    return torch.contiguous_format


def laid(tensor: Tensor, index: Tensor) -> Tensor:
    """These rows, lying as they lay: torch's own index_select gives contiguous ones, which a CPU's
    convolutions would have to lay out anew (about a tenth of a call of the bundled model)."""
    if layout(tensor) is torch.contiguous_format:
        return tensor.index_select(0, index)
    return tensor.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)


def lying_as(tensor: Tensor, other: Tensor) -> Tensor:
    """The same numbers, channels_last where another's are."""
    last = layout(other) is torch.channels_last
    return tensor.contiguous(memory_format=torch.channels_last) if last else tensor
