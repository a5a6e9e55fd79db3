"""Spout, as the package SpoutGL brings it, for the source and the sink. Windows only.

OpenGL's context belongs to the thread that made it current: who opens a connection here uses it and
closes it in the same thread, which is the one that the loop around a source or sink has anyway.
"""

import importlib.util
import sys
from typing import Any

from .faults import Refused
from .sources import Lost

PACKAGE = "SpoutGL"
RGBA = 0x1908  # GL_RGBA; the package's own names for it are made when it is loaded


def there(name: str) -> None:
    """Raises Refused for the input `name` where there is no Spout. Loads nothing."""
    if sys.platform != "win32":
        raise Refused(f"{name}: Spout is for Windows. Choose ndi, or syphon on macOS.")
    if importlib.util.find_spec("SpoutGL") is None:
        raise Refused(
            f"{name}: Spout needs the package {PACKAGE}. Install it with: pip install {PACKAGE}"
        )


def library(name: str) -> Any:
    """The module SpoutGL. Raises Refused for the input `name`."""
    there(name)
    try:
        import SpoutGL
    except ImportError as reason:
        raise Refused(f"{name}: {PACKAGE} could not be loaded ({reason}).") from None
    return SpoutGL


def opened(make: Any) -> Any:
    """A SpoutSender or SpoutReceiver with a context of OpenGL of its own, in this thread.

    Raises:
        Lost: there is no screen with OpenGL, as in a session that is locked or run as a service.
    """
    made = make()
    if not made.createOpenGL():
        raise Lost("OpenGL could not be started: Spout needs a session with a screen")
    made.setAutoShare(True)  # through memory where the GPU cannot share with OpenGL
    return made
