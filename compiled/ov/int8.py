"""int8 for a network of float32: what flows into its inner convolutions is rounded to 256 steps,
and their weights to 255 for each output.

The ranges are those of the first frames, observed while these run in float32. OpenVINO makes
integer arithmetic of it where the device has it. What is at the picture's own resolution stays as
it is, and so do attention and embeddings: in the embedded model they made nearly all of the error
(docs/engines.md) and hold a small part of the work.
"""

from typing import Any

import numpy as np
from torch import Tensor

from . import api
from .program import Program

FRAMES = 4  # calls whose ranges are observed

Ranges = dict[str, tuple[float, float]]


def _layers(model: Any) -> list[Any]:
    """What is rounded: convolutions of more than one position, inside the network."""
    every = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    widest = max((node.output(0).get_shape()[-1] for node in every), default=0)
    found = []
    for node in every:
        fed, weights = (node.input_value(i).get_node() for i in (0, 1))
        inner = node.output(0).get_shape()[-1] < widest and fed.get_type_name() != "Parameter"
        plain = weights.get_type_name() == "Constant" and weights.get_output_shape(0)[-1] > 1
        if inner and plain and not _ends(node):
            found.append(node)
    return found


def _ends(node: Any) -> bool:
    """Whether its output, with its bias, is the network's."""
    targets = list(node.output(0).get_target_inputs())
    kinds = [target.get_node().get_type_name() for target in targets]
    if kinds == ["Add"]:
        node = targets[0].get_node()
        kinds = [one.get_node().get_type_name() for one in node.output(0).get_target_inputs()]
    return "Result" in kinds


def observe(model: Any) -> list[str]:
    """Give a network the least and the greatest of what flows into each layer as outputs.

    Returns:
        The layers' names, in the order of these pairs of outputs.
    """
    opset = api.needed().opset13
    names, more = [], []
    for node in _layers(model):
        source = node.input_value(0)
        axes = np.arange(len(source.get_partial_shape()), dtype=np.int64)
        more += [opset.reduce_min(source, axes, False), opset.reduce_max(source, axes, False)]
        names.append(node.get_friendly_name())
    model.add_outputs([node.output(0) for node in more])
    return names


def quantise(model: Any, ranges: Ranges) -> None:
    """Round what flows into each layer that has a range, and its weights."""
    opset = api.needed().opset13
    rounded: dict[tuple[Any, int], Any] = {}
    for node in _layers(model):
        low, high = ranges.get(node.get_friendly_name(), (0.0, 0.0))
        if not np.isfinite([low, high]).all() or not high > low:
            continue
        source = node.input_value(0)
        at = source.get_node().get_friendly_name(), source.get_index()
        if at not in rounded:
            # symmetric where it has two signs: without a zero point the arithmetic is plain
            low, high = (0.0, high) if low >= 0 else _around(max(-low, high))
            ends = [np.float32(low), np.float32(high)] * 2
            rounded[at] = opset.fake_quantize(source, *ends, levels=256)
        weights = node.input_value(1)
        values = weights.get_node().data
        most = np.abs(values).max(axis=(1, 2, 3), keepdims=True).astype(np.float32)
        most = np.maximum(most, np.finfo(np.float32).tiny)
        node.input(0).replace_source_output(rounded[at].output(0))
        node.input(1).replace_source_output(
            opset.fake_quantize(weights, -most, most, -most, most, levels=255).output(0)
        )


def _around(most: float) -> tuple[float, float]:
    return -most, most * 127 / 128


class Observer:
    """A network in float32 that looks at what flows through it.

    Args:
        compiled: openvino.CompiledModel of a network after `observe`.
        names: of its layers.

    Attributes:
        ranges: of each layer's input so far.
        frames: calls that were looked at.
        own: see Program.
    """

    def __init__(self, compiled: Any, names: list[str]):
        self._program = Program(compiled)
        self._names, self.own = names, self._program.own
        self.ranges: Ranges = {}
        self.frames = 0

    def __call__(self, named: dict[str, Tensor]) -> Tensor:
        """The output in float32."""
        out = self._program(named)
        ends = self._program.more()
        for name, low, high in zip(self._names, ends[::2], ends[1::2], strict=True):
            known = self.ranges.get(name, (low, high))
            self.ranges[name] = min(known[0], low), max(known[1], high)
        self.frames += 1
        return out
