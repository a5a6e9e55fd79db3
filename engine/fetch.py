"""Small tensors on their way to the host, which does not wait for them before it must."""

import torch
from torch import Tensor


class Fetched:
    """What a tensor holds as of now, for the host.

    From CUDA it is copied into pinned memory when the stream comes to it; on another device it
    must stay as it is until it is read.

    Attributes:
        late: reading it at once would wait for all that the device has been given to do.
    """

    def __init__(self, values: Tensor):
        self.late = values.is_cuda
        self._values, self._event = values, None
        if self.late:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.current_stream(values.device).record_event()

    def read(self) -> Tensor:
        """On the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.cpu()
