"""A CUDA device that lets nobody read what it has not come to, without one: what the host asks of a
tensor is an error, unless the tensor was sent to it and the device has come to it by then."""

import contextlib

import torch
from torch.overrides import TorchFunctionMode

_T = torch.Tensor
_ASKS = {
    _T.cpu, _T.numpy, _T.tolist, _T.item, _T.__float__, _T.__int__, _T.__bool__, _T.__index__,
    _T.__array__, _T.nonzero, torch.nonzero, _T.masked_select, torch.masked_select, torch.equal,
}  # fmt: skip


class Waited(AssertionError):
    """The host asks the device for what it has not come to."""


class Here(torch.Tensor):
    """Numbers that are the host's own, as is all that is made of them."""


class NoWaits(TorchFunctionMode):
    """While it lasts, on a CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        asks = func in _ASKS or (func is _T.to and _to_host(*args[1:], *kwargs.values()))
        if asks and not isinstance(args[0], Here):
            raise Waited(f"{func.__name__} of {tuple(args[0].shape)}")
        return func(*args, **kwargs)


def _to_host(*asked):
    # where the device is meant, it is a torch.device: the CPU that stands for it
    return "cpu" in [one for one in asked if isinstance(one, str)]


class Device:
    """In the place of engine.fetch.Fetched. The device is done with a tick when the next one has
    been launched, and has come to what enters when the tick before it is done.

    Attributes:
        tick: number of the newest tick that was begun.
    """

    def __init__(self, monkeypatch, *modules):
        self.tick = 0
        for module in modules:
            monkeypatch.setattr(module, "Fetched", self._fetched)

    def _fetched(self, values):
        return _Fetched(self, values)

    @contextlib.contextmanager
    def ticking(self, waits=False):
        """A tick; `waits` are allowed in it."""
        self.tick += 1
        with contextlib.nullcontext() if waits else NoWaits():
            yield


class _Fetched:
    late = True

    def __init__(self, device, values):
        self._device, self._values = device, values.clone()
        # what is told of rows is told behind their tick, pictures are sent before it
        self._from = device.tick + (2 if values.dtype == torch.bool else 1)

    def read(self):
        if self._device.tick < self._from:
            # allowed where waits are
            return self._values.cpu()
        return self._values.as_subclass(Here)
