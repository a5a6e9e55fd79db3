"""A network that OpenVINO has compiled, with its buffers."""

from typing import Any

import torch
from torch import Tensor

from . import api

_TYPES = {"f32": torch.float32, "f16": torch.float16}


class Program:
    """A compiled network of fixed shapes, called with tensors on the CPU.

    Tensors are handed over where they lie: an input that lies where it lay is not touched, and the
    output is written into the tensor that is returned.

    Args:
        compiled: openvino.CompiledModel; what it has besides its first output are single numbers.
    """

    def __init__(self, compiled: Any):
        self._tensor = api.needed().Tensor
        self._request = compiled.create_infer_request()
        # by the node: a port may have gathered other names from what was optimised away
        self._inputs = {
            port.get_node().get_friendly_name(): (port, _TYPES[port.element_type.get_type_name()])
            for port in compiled.inputs
        }
        port = self._output = compiled.outputs[0]
        self._numbers = len(compiled.outputs) - 1
        self._shape = tuple(port.shape)
        self._type = _TYPES[port.element_type.get_type_name()]
        # OpenVINO keeps addresses, so what lies there must stay
        self._bound: dict[str, tuple[Tensor, Any]] = {}

    def __call__(self, named: dict[str, Tensor]) -> Tensor:
        """The output, a tensor of its own, for inputs by name."""
        for name, (port, dtype) in self._inputs.items():
            self._bind(name, port, named[name].to(dtype).contiguous())
        out = torch.empty(self._shape, dtype=self._type)
        self._bind("", self._output, out)
        self._request.infer(share_outputs=True)
        return out

    def _bind(self, name: str, port: Any, tensor: Tensor) -> None:
        known = self._bound.get(name)
        if known is not None and known[0] is tensor:
            return
        shared = self._tensor(tensor.detach().numpy(), shared_memory=True)
        self._request.set_tensor(port, shared)
        self._bound[name] = tensor, shared

    def more(self) -> list[float]:
        """The numbers beside the output of the newest call."""
        return [float(self._request.get_output_tensor(1 + i).data) for i in range(self._numbers)]
