"""Small tensors on their way to the device, without waiting for it."""

import torch
from torch import Tensor


def uploaded(values: Tensor, device: torch.device) -> Tensor:
    """A tensor made on the CPU, on the device.

    CUDA copies pageable memory only after everything that was queued before, and the host waits
    for that; pinned memory it copies when the stream comes to it. The pinned copy may be dropped
    at once: torch's host allocator notes the stream of a non-blocking copy and hands the memory
    out again only when that copy is done. After the first few, no pinned memory is allocated.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
