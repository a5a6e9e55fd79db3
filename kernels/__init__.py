"""Fused operations beside their plain torch reference. Pure torch; triton where it can run."""

from .compare import likeness
from .norm import group_norm_silu
from .pictures import picture_in, picture_out
from .stream import stream_enter, stream_step

__all__ = [
    "group_norm_silu", "likeness", "picture_in", "picture_out", "stream_enter", "stream_step",
]  # fmt: skip
