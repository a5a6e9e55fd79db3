"""In what numbers an engine computes, and how far that is from float32."""

import functools

import torch
from torch import Tensor

from .engine import Call, UNet

DEFAULT, FLOAT16, BFLOAT16, INT8 = "default", "float16", "bfloat16", "int8"
PRECISIONS = (DEFAULT, FLOAT16, BFLOAT16, INT8)  # in the order of LiveCompile's list


def relative(a: Tensor, b: Tensor) -> float:
    """Relative RMS of a against b; nan where either is, 0 where both are zero."""
    a, b = a.detach().double(), b.detach().double()
    off, size = (a - b).square().mean().sqrt(), b.square().mean().sqrt()
    return float(off / size) if off else 0.0


class Against:
    """The error of an engine against the UNet itself, on the first call that it runs.

    Args:
        unet: what is right; let go after that.
    """

    def __init__(self, unet: UNet):
        self._unet: UNet | None = unet
        self.error: float | None = None

    def look(self, call: Call, out: Tensor) -> bool:
        """True if that was the first call; it costs one call of the UNet."""
        if self._unet is None:
            return False
        self.error = relative(out, self._unet(call))
        self._unet = None
        return True


@functools.cache
def missing_bfloat16() -> str | None:
    """Why torch had better not compute in bfloat16 on this processor; None where it multiplies it.

    Elsewhere torch converts each number, and is slower than in float32.
    """
    if not hasattr(torch.cpu, "get_capabilities"):
        return f"torch {torch.__version__} cannot say whether this processor multiplies bfloat16"
    told = torch.cpu.get_capabilities()
    if told.get("avx512_bf16") or told.get("amx_bf16") or told.get("bf16"):
        return None
    return (
        "this processor does not multiply bfloat16 (AVX512-BF16 or AMX), so it would be slower "
        "than float32"
    )
