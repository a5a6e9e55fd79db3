"""An event loop in a thread of its own, for WebRTC's connections.

They are not in the server's loop: each packet of each picture is work in Python, and ComfyUI's own
answers, some of which hold that loop for a second, would be heard as a stutter.
"""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_CODERS = 4  # threads in which pictures are coded


class Loop:
    """Runs until `close`; then none of its threads is left."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="livediffusion-webrtc", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Have work done in the loop. In any thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T], timeout: float) -> T:
        """The same, waited for; never in a loop's own thread. Raises TimeoutError."""
        future = self.start(work)
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TimeoutError from None

    def close(self, wait: float = 0.0) -> None:
        """End the loop and its threads.

        Args:
            wait: seconds that the thread is waited for.
        """
        with contextlib.suppress(RuntimeError):  # closed before
            self._loop.call_soon_threadsafe(self._loop.stop)
        if wait:
            self._thread.join(wait)

    def _run(self) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        loop.set_default_executor(ThreadPoolExecutor(_CODERS, "livediffusion-webrtc"))
        try:
            loop.run_forever()
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()
