"""WebRTC by aiortc, which is there only where somebody installed it.

The modules of this room that need it are imported by `loaded`, when the first connection is made.
"""

import importlib
import importlib.util
import sys
from types import ModuleType

from ..faults import Refused

_OLDEST = (3, 11)  # the Python that aiortc needs


def available() -> bool:
    """Whether WebRTC can be had here; imports nothing."""
    return sys.version_info >= _OLDEST and importlib.util.find_spec("aiortc") is not None


def check(name: str) -> None:
    """Raises Refused, with the node's input `name`, where WebRTC cannot be had."""
    if available():
        return
    if sys.version_info < _OLDEST:
        here = ".".join(map(str, sys.version_info[:2]))
        raise Refused(f"{name}: WebRTC needs Python 3.11; this ComfyUI runs on {here}.")
    raise Refused(
        f"{name}: WebRTC needs the package aiortc. Install it into ComfyUI's Python "
        "(pip install aiortc) and start ComfyUI again."
    )


def loaded() -> ModuleType:
    """The connections, which import aiortc."""
    return importlib.import_module(".peers", __package__)
