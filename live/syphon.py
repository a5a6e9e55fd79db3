"""Syphon, as the package syphon-python brings it, for the source and the sink. macOS only.

Metal is used, not OpenGL: its servers and clients may be used from any thread (as the header
SyphonMetalServer.h says), and need no context that is current in one.

Servers and clients find each other by distributed notifications, which macOS delivers to the main
thread of a process that turns its run loop (NSDistributedNotificationCenter in Apple's
documentation). ComfyUI's main thread runs asyncio and never does: so it is asked to, for a moment,
as long as something here wants to hear of others or be found by them.
"""

import importlib.util
import sys
import threading
import time
from contextlib import AbstractContextManager
from typing import Any

from .faults import Refused

PACKAGE = "syphon-python"
_TURN = 0.1  # seconds between two turns of the run loop
_ASK = 0.05  # seconds that a look at the directory turns the looking thread's own run loop


def there(name: str) -> None:
    """Raises Refused for the input `name` where there is no Syphon. Loads nothing."""
    if sys.platform != "darwin":
        raise Refused(f"{name}: Syphon is for macOS. Choose ndi, or spout on Windows.")
    if importlib.util.find_spec("syphon") is None:
        raise Refused(
            f"{name}: Syphon needs the package {PACKAGE}. Install it with: pip install {PACKAGE}"
        )


def library(name: str) -> Any:
    """The module syphon. Raises Refused for the input `name`."""
    there(name)
    try:
        import syphon
        import syphon.utils.numpy
        import syphon.utils.raw
    except ImportError as reason:
        raise Refused(f"{name}: {PACKAGE} could not be loaded ({reason}).") from None
    return syphon


def pool() -> AbstractContextManager:
    """Lets go of what Objective-C made within: a thread of Python's has nobody who does."""
    import objc

    return objc.autorelease_pool()


class Turns:
    """Has the main thread's run loop turned, now and then."""

    def __init__(self):
        self._next = 0.0

    def ask(self) -> None:
        """To be called often; never waits."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _TURN
        from server import PromptServer

        PromptServer.instance.loop.call_soon_threadsafe(_turn)


def _turn() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    from Cocoa import NSDate, NSDefaultRunLoopMode, NSRunLoop

    with pool():
        NSRunLoop.currentRunLoop().runMode_beforeDate_(NSDefaultRunLoopMode, NSDate.date())


def called(server: Any) -> str:
    """What a server is called among others: the program, and its own name where it has one."""
    return f"{server.app_name}: {server.name}" if server.name else server.app_name


def fits(name: str, server: Any) -> bool:
    """Whether a name is a server's: all of it, its own, or its program's."""
    return name in (called(server), server.name, server.app_name)


class Directory:
    """The servers that there are."""

    def __init__(self, syphon: Any):
        self._directory = syphon.SyphonServerDirectory()
        self._directory.run_loop_interval = _ASK
        self._turns = Turns()

    def look(self, timeout: float, name: str | None = None) -> list[Any]:
        """Those of a name, as soon as there is one; without a name, all that are heard of."""
        deadline = time.monotonic() + timeout
        while True:
            self._turns.ask()
            servers = self._directory.servers  # turns this thread's run loop meanwhile
            fitting = [s for s in servers if name is None or fits(name, s)]
            if (fitting and name is not None) or time.monotonic() >= deadline:
                return fitting
