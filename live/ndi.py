"""NDI's own library, as the package ndi-python brings it, for the source and the sink.

Of the two packages there are it is the one whose waits let other threads run: cyndilib 0.1.3 waits
for a frame with the interpreter's lock held, and the frame synchronizer that each of its receivers
has takes three frames of four away from who reads them directly (docs/sinks.md has the figures).
"""

import importlib.util
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .faults import Refused

PACKAGE = "ndi-python"
HERE = "127.0.0.1"  # asked, too, so that senders of this machine are found without Avahi or Bonjour
_lock = threading.Lock()  # the library is begun once


def there(name: str) -> None:
    """Raises Refused for the input `name` where the package is missing. Loads nothing."""
    if importlib.util.find_spec("NDIlib") is None:
        raise Refused(
            f"{name}: NDI needs the package {PACKAGE}. Install it with: pip install {PACKAGE}"
        )


def library(name: str) -> Any:
    """The module NDIlib, begun. Raises Refused for the input `name`."""
    there(name)
    try:
        import NDIlib
    except ImportError as reason:
        # on Linux the wheel takes Avahi's client from the system
        raise Refused(
            f"{name}: NDI's library could not be loaded ({reason}). On Linux, install "
            "libavahi-common3 and libavahi-client3."
        ) from None
    with _lock:
        begun = NDIlib.initialize()
    if not begun:
        raise Refused(f"{name}: NDI's library does not run on this processor.")
    return NDIlib


@contextmanager
def looking(ndi: Any) -> Iterator[Any]:
    """Something that hears of senders, as long as it is wanted."""
    finder = ndi.find_create_v2(ndi.FindCreate(True, None, HERE))
    try:
        yield finder
    finally:
        ndi.find_destroy(finder)


def senders(ndi: Any, finder: Any, timeout: float) -> Iterator[list[Any]]:
    """Those that are known, again whenever that may have changed, for so many seconds."""
    deadline = time.monotonic() + timeout
    while True:
        yield ndi.find_get_current_sources(finder)
        left = deadline - time.monotonic()
        if left <= 0:
            return
        ndi.find_wait_for_sources(finder, int(1000 * min(left, 0.25)) + 1)


def found(ndi: Any, finder: Any, name: str, timeout: float) -> Any:
    """The sender of a name, `MACHINE (Sender)` or only `Sender`; None where there is none.

    To be used while the finder is: older packages keep its text there.
    """
    for known in senders(ndi, finder, timeout):
        for sender in known:
            if fits(name, sender.ndi_name):
                return sender
    return None


def fits(name: str, full: str) -> bool:
    """Whether a name is a sender's: all of it, or what stands in its brackets."""
    own = full.partition(" (")[2].removesuffix(")")
    return name.casefold() in (full.casefold(), own.casefold())
