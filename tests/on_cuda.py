"""Where the tests marked cuda run: on a GPU, or in a rehearsal on a CPU (benchmarks/gpu.py)."""

import contextlib
import os

import tiny
import torch

REHEARSED = os.environ.get("LIVEDIFFUSION_CUDA") == "rehearse"
DEVICE = "cpu" if REHEARSED else "cuda"
# float16 rounding, grown over the steps of a stream
CLOSE = 1e-6 if REHEARSED else 2e-2


def model(seed=0):
    """A tiny model on the device, in float16 on a GPU."""
    patcher = tiny.model(seed=seed, prompt=1.0, device=DEVICE)
    if not REHEARSED:
        patcher.model.diffusion_model.half().dtype = torch.float16
    return patcher


def latents(i, size=8, n=1):
    return tiny.latents(n, i, size).to(DEVICE)


@contextlib.contextmanager
def no_waits():
    """Any wait of the host for the device is an error."""
    if REHEARSED:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
