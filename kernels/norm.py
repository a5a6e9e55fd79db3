"""GroupNorm and SiLU in one op, for a UNet that torch.compile does not fuse."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .choice import INDEX, op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUP = 2**24  # elements of a group at most: float32 counts them


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of a result for [N, C, H, W]: channels_last where x is that and nothing else."""
    last = torch.channels_last
    is_last = x.is_contiguous(memory_format=last) and not x.is_contiguous()
    return last if is_last else torch.contiguous_format


def _unfit(x, groups, weight, bias, eps, silu) -> str:
    if x.dtype not in DTYPES or weight.dtype not in DTYPES or bias.dtype not in DTYPES:
        return f"the kernel takes {DTYPES}, not {x.dtype}, {weight.dtype} and {bias.dtype}"
    if x.ndim != 4 or x.numel() == 0:
        return "the input is empty or not [N, C, H, W]"
    channels = x.shape[1]
    if groups < 1 or channels % groups or weight.shape != (channels,) or bias.shape != (channels,):
        return "the arguments are wrong"
    if not x.is_contiguous(memory_format=memory_format(x)):
        return "the input is neither contiguous nor channels_last"
    if not (weight.is_contiguous() and bias.is_contiguous()):
        return "weight or bias is not contiguous"
    if x.numel() >= INDEX or x[0].numel() // groups > GROUP:
        return "the input is too large"
    return ""


@op("triton_norm", unfit=_unfit)
def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    """F.group_norm, and F.silu behind it; computed in float32, rounded once.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16.
        groups: divides C.
        weight, bias: [C], any of these types.
        eps: added to the variance.
        silu: whether the SiLU follows.

    Returns:
        as x, in its type; channels_last when x is that, else contiguous.

    Raises:
        RuntimeError: the shapes do not fit each other.
    """
    # torch sums less exactly over channels_last
    y = F.group_norm(x.float().contiguous(), groups, weight.float(), bias.float(), eps)
    y = F.silu(y) if silu else y
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))
