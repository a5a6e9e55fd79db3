"""The one door to ComfyUI's node API, tolerant of the fields that older versions lack."""

import dataclasses
import weakref

from comfy_api.latest import ComfyExtension, io, ui

from ..live.frames import current

__all__ = ["ComfyExtension", "io", "newer", "quick", "ui"]

_inputs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by live run, then by node
_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def newer(**fields) -> dict:
    """Schema fields younger than the oldest ComfyUI we run on, without those it does not know."""
    return {name: value for name, value in fields.items() if name in _FIELDS}


def quick(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """A node class whose inputs are described once per live run.

    ComfyUI asks a node for them several times in each frame, and builds them anew each time: a
    quarter of what a frame costs beside its nodes' work (docs/performance.md).
    """
    if "INPUT_TYPES" in vars(node):
        return node
    describe = node.INPUT_TYPES.__func__

    def input_types(cls) -> dict[str, dict]:
        run = current.get()
        if run is None:
            return describe(cls)
        known = _inputs.setdefault(run, {})
        if cls.__name__ not in known:
            known[cls.__name__] = describe(cls)
        return known[cls.__name__]

    node.INPUT_TYPES = classmethod(input_types)
    return node
