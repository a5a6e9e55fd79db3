"""A network that OpenVINO has compiled, with its buffers."""

from typing import Any

import torch
from torch import Tensor

from ..remembered import OWN
from . import api

_TYPES = {"f32": torch.float32, "f16": torch.float16, "i64": torch.int64}


class Program:
    """A compiled network of a fixed output, called with tensors on the CPU.

    Tensors are handed over where they lie: an input that lies where it lay is not touched, and the
    output is written into the tensor that is returned.

    Args:
        compiled: openvino.CompiledModel; what it has besides its first output are single numbers,
            and outputs whose names begin with OWN.

    Attributes:
        own: these outputs of the newest call, by name; the next one writes over them.
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
        self._numbers, self._loose, self.own = [], {}, {}
        self._shape = tuple(port.shape)
        self._type = _TYPES[port.element_type.get_type_name()]
        # OpenVINO keeps addresses, so what lies there must stay
        self._bound: dict[str, tuple[Tensor, Any]] = {}
        for i, port in enumerate(compiled.outputs[1:], 1):
            name = next((name for name in port.get_names() if name.startswith(OWN)), None)
            if name is None:
                self._numbers.append(i)
                continue
            if port.partial_shape.is_dynamic:
                self._loose[name] = port
                continue
            dtype = _TYPES[port.element_type.get_type_name()]
            self.own[name] = torch.empty(tuple(port.shape), dtype=dtype)
            self._bind(name, port, self.own[name])

    def __call__(self, named: dict[str, Tensor]) -> Tensor:
        """The output, a tensor of its own, for inputs by name."""
        for name, (port, dtype) in self._inputs.items():
            self._bind(name, port, named[name].to(dtype).contiguous())
        out = torch.empty(self._shape, dtype=self._type)
        self._bind("", self._output, out)
        self._request.infer(share_outputs=True)
        for name, port in self._loose.items():
            self.own[name] = torch.from_numpy(self._request.get_tensor(port).data)
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
        return [float(self._request.get_output_tensor(i).data) for i in self._numbers]
