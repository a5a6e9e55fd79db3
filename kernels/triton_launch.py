"""Launching a Triton kernel, also where a CUDA graph is captured on cudaMallocAsync."""

from collections.abc import Sequence
from typing import Any

import torch
import triton

from .choice import unmapped


def launch(kernel: triton.JITFunction, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options).

    Triton's launcher asks the driver about the address of every tensor that it is given, and what
    cudaMallocAsync gives out during a capture is a node of the graph that has no memory yet: the
    driver does not know it. An integer is taken for an address as it is (getPointer of
    triton/backends/nvidia, 3.2 to 3.8; the constants are among the arguments from 3.3 on).
    """
    if not unmapped():
        kernel[tuple(grid)](*args, **options)
        return
    compiled = kernel.warmup(*args, grid=tuple(grid), **options)
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    values = (given[name] for name in kernel.arg_names)
    places = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values]
    compiled[(*grid, 1, 1)[:3]](*places)
