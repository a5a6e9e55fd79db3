"""Threads that code pictures, and keep no process from ending."""

import atexit
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future

_GRACE = 1.0  # seconds that work in hand may take when the process ends
_working: set[threading.Thread] = set()


class Workers(Executor):
    """A pool of daemon threads. Those of ThreadPoolExecutor are waited for when Python ends, for
    as long as what they were given takes.

    Args:
        threads: how many; each begins with the first work that needs it.
        name: what theirs begin with.
    """

    def __init__(self, threads: int, name: str):
        self._most, self._name = threads, name
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = threading.Semaphore(0)
        self._over = False

    def submit(self, fn: Callable, /, *args, **kwargs) -> Future:
        """Raises RuntimeError after `shutdown`."""
        future: Future = Future()
        with self._lock:
            if self._over:
                raise RuntimeError("these workers are gone")
            self._work.put((future, fn, args, kwargs))
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._most:
                name = f"{self._name}_{len(self._threads)}"
                thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """No more work is taken; the threads end once what is in hand is done."""
        with self._lock:
            self._over = True
            with contextlib.suppress(queue.Empty):
                while cancel_futures:
                    item = self._work.get_nowait()
                    if item is not None:
                        item[0].cancel()
            for _ in self._threads:
                self._work.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _run(self) -> None:
        thread = threading.current_thread()
        while (item := self._work.get()) is not None:
            _working.add(thread)
            future, fn, args, kwargs = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn(*args, **kwargs))
                except BaseException as reason:
                    future.set_exception(reason)
            # nothing of the last work is held while the next is waited for
            del item, future, fn, args, kwargs
            _working.discard(thread)
            self._idle.release()


@atexit.register
def _leave() -> None:
    # what is in hand and short may be finished; no more is waited for
    deadline = time.monotonic() + _GRACE
    while _working and time.monotonic() < deadline:
        time.sleep(0.005)
