"""An Apple GPU as far as it lacks operations, on a CPU."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_BILINEAR, _ZEROS = 0, 0  # of F.grid_sample


class Unsupported(RuntimeError):
    """What MPS raises, or worse."""


class _Lacking(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith("grid_sampler"):
            mode, padding = args[2:4]
            if (mode, padding) != (_BILINEAR, _ZEROS):
                raise Unsupported(f"grid_sample: mode {mode}, padding {padding}")
        if "adaptive_avg_pool" in name:
            sides = zip(args[0].shape[-2:], args[1], strict=True)
            if any(side % new for side, new in sides):
                raise Unsupported(f"adaptive_avg_pool: {tuple(args[0].shape)} to {args[1]}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def apple(monkeypatch):
    """While this lasts the CPU is one."""
    from livediffusion.engine import devices

    with monkeypatch.context() as patch, _Lacking(), torch.no_grad():
        patch.setattr(devices, "_LACKING", {"cpu"})
        yield
