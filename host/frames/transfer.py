"""Pictures to a GPU and back: as bytes, through pinned memory, on streams of their own.

A live run has two frames in flight. A camera's picture goes up while the frame before it is
computed, and a finished picture comes down while the next is: neither waits for the other's work,
and only the thread that fetches a finished picture waits at all. On other devices pictures go the
ordinary way.
"""

import threading
from collections import OrderedDict
from typing import Protocol

import comfy.model_management
import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...kernels import picture_in, picture_out

_SPARE = 4  # pinned buffers kept for each size
_SIZES = 4  # sizes that have any, those used last: edits may change the size again and again


class Ticket(Protocol):
    """A copy under way."""

    def over(self) -> bool:
        """Whether it is done."""

    def wait(self) -> None:
        """Wait for it here."""

    def join(self, tensor: Tensor) -> None:
        """Have the current stream wait for it, which uses the tensor from now on."""


class Fetched:
    """A picture on its way from the device."""

    def __init__(self, lanes: "Lanes", buffer: Tensor, ticket: Ticket):
        self._lanes, self._buffer, self._ticket = lanes, buffer, ticket

    def picture(self) -> np.ndarray:
        """[H, W, 3] uint8; waits for this picture only. Once."""
        self._ticket.wait()
        picture = self._buffer.numpy().copy()
        self._lanes.give(self._buffer)
        return picture


class Lanes:
    """The copy streams of one device. Any thread.

    Attributes:
        made: pinned buffers so far.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.made = 0
        self._lock = threading.Lock()
        self._free: OrderedDict[tuple[int, ...], list[Tensor]] = OrderedDict()
        self._rising: list[tuple[Tensor, Ticket]] = []

    def send(self, picture: np.ndarray) -> tuple[Tensor, Ticket]:
        """Begin to bring [H, W, 3] uint8 to the device; gives where it will be."""
        buffer = self._take(picture.shape)
        np.copyto(buffer.numpy(), picture)
        there, ticket = self._up(buffer)
        with self._lock:
            self._rising.append((buffer, ticket))
        return there, ticket

    def fetch(self, picture: Tensor) -> Fetched:
        """Begin to bring [H, W, 3] uint8 from the device, after what computes it."""
        buffer = self._take(tuple(picture.shape))
        return Fetched(self, buffer, self._down(picture, buffer))

    def give(self, buffer: Tensor) -> None:
        """A buffer is free again."""
        with self._lock:
            spare = self._free.setdefault(tuple(buffer.shape), [])
            self._free.move_to_end(tuple(buffer.shape))
            if len(spare) < _SPARE:
                spare.append(buffer)
            while len(self._free) > _SIZES:
                self._free.popitem(last=False)

    def _take(self, shape: tuple[int, ...]) -> Tensor:
        with self._lock:
            over = [(ticket.over(), buffer, ticket) for buffer, ticket in self._rising]
            self._rising = [(buffer, ticket) for done, buffer, ticket in over if not done]
        for done, buffer, _ in over:
            if done:
                self.give(buffer)
        with self._lock:
            spare = self._free.get(tuple(shape))
            if spare:
                return spare.pop()
            self.made += 1
        return self._pinned(tuple(shape))

    def _pinned(self, shape: tuple[int, ...]) -> Tensor:
        raise NotImplementedError

    def _up(self, buffer: Tensor) -> tuple[Tensor, Ticket]:
        raise NotImplementedError

    def _down(self, picture: Tensor, buffer: Tensor) -> Ticket:
        raise NotImplementedError


class CudaLanes(Lanes):
    """With CUDA streams and events."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._rise, self._fall = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def _pinned(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)

    def _up(self, buffer: Tensor) -> tuple[Tensor, Ticket]:
        with torch.cuda.stream(self._rise):
            # memory of this stream: it waits for nobody else's work
            there = buffer.to(self.device, non_blocking=True)
            return there, _CudaTicket(self._rise)

    def _down(self, picture: Tensor, buffer: Tensor) -> Ticket:
        self._fall.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._fall):
            buffer.copy_(picture, non_blocking=True)
            picture.record_stream(self._fall)
            return _CudaTicket(self._fall)


class _CudaTicket:
    def __init__(self, stream: torch.cuda.Stream):
        # a thread that waits for it sleeps
        self._event = torch.cuda.Event(blocking=True)
        self._event.record(stream)

    def over(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.synchronize()

    def join(self, tensor: Tensor) -> None:
        stream = torch.cuda.current_stream(tensor.device)
        stream.wait_event(self._event)
        tensor.record_stream(stream)


_made: dict[torch.device, Lanes] = {}
_sent: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by IMAGE: where its picture is on the device


def lanes(device: torch.device) -> Lanes | None:
    """The copy streams of a device, where there are any."""
    if device.type != "cuda":
        return None
    if device not in _made:
        _made[device] = CudaLanes(device)
    return _made[device]


def send(image: Tensor, picture: np.ndarray) -> None:
    """Begin to bring a picture to where models run, beside the IMAGE that was made of it.

    Args:
        image: [1, H, W, 3] on the CPU, as any node takes it; `near` finds the picture by it. Made
            in inference_mode, it does not count what is written into it, and goes the ordinary way.
        picture: [H, W, 3] uint8.
    """
    way = lanes(comfy.model_management.get_torch_device())
    if way is not None and not image.is_inference():
        _sent[image] = (image._version, *way.send(picture))


def near(image: Tensor, device: torch.device) -> Tensor:
    """An IMAGE on a device if its picture was sent there, else as it is."""
    version, there, ticket = _sent.get(image, (None, None, None))
    if there is None or there.device != torch.device(device) or image._version != version:
        return image  # a node may have written into it
    ticket.join(there)
    height, width = there.shape[:2]
    return picture_in(there, height, width, "stretch", False, torch.float32, "BHWC", 1 / 255, 0.0)


def fetch(image: Tensor) -> Fetched | None:
    """Begin to bring the newest frame of an IMAGE [B, H, W, C] down; None where that is no way."""
    way = lanes(image.device)
    if way is None:
        return None
    return way.fetch(picture_out(image[-1:], "BHWC", 255.0, 0.0)[0])
