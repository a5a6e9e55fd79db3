"""The one door to ComfyUI's node API, tolerant of the fields that older versions lack."""

import dataclasses

from comfy_api.latest import ComfyExtension, io, ui

__all__ = ["ComfyExtension", "io", "newer", "ui"]

_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def newer(**fields) -> dict:
    """Schema fields younger than the oldest ComfyUI we run on, without those it does not know."""
    return {name: value for name, value in fields.items() if name in _FIELDS}
