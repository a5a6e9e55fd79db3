"""A recording of a view, as it was shown, in ComfyUI's output folder."""

import atexit
import contextlib
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from ..bounds import most
from ..feeds import Place
from .mp4 import FRAGMENT, Mp4
from .names import Wish, Written, reserve
from .sound import Sound

# at more frames the disk or the encoder is too slow, and frames are left out
_WAITING = most("sinks.record.Recorder._frames")
_LEAVING = 5.0  # seconds that a server that goes down waits for its recordings

# when it was shown, the picture, and where in a film it is from
_Entry = tuple[float, np.ndarray, Place | None]

_log = logging.getLogger(__name__)
_running: "weakref.WeakSet[Recorder]" = weakref.WeakSet()


class Recorder:
    """Writes pictures to mp4 files in a thread of its own: a new file for each new size.

    A file has its name from its first picture on and can be played at any moment.

    Args:
        wish: name and contents of the files; a later one is of the next file.
        tell: called in the thread with each thing that the page is to know: `type` "recorded"
            with file, subfolder, seconds and left_out, or "problem" with reason.

    Attributes:
        over: set when nothing more will be written.
    """

    def __init__(self, wish: Wish, tell: Callable[[dict[str, Any]], None]):
        self.wish = wish
        self.over = threading.Event()
        self._tell = tell
        self._left_out = 0
        self._ended: float | None = None
        self._frames: queue.Queue[_Entry | None] = queue.Queue(_WAITING)
        self._film: Mp4 | None = None
        self._place: Written | None = None
        self._thread = threading.Thread(target=self._run, name="livediffusion-record", daemon=True)
        _running.add(self)
        self._thread.start()

    def put(self, picture: np.ndarray, place: Place | None = None) -> None:
        """Never waits.

        Args:
            picture: [H, W, 3] uint8, shown now.
            place: in a film, of what it was made from; its sound is recorded, too.
        """
        if self._ended is None and not self.over.is_set():
            try:
                self._frames.put_nowait((time.monotonic(), picture, place))
            except queue.Full:
                self._left_out += 1

    def end(self) -> None:
        """The recording ends now; the file is whole a moment later, at `over`."""
        if self._ended is None:
            self._ended = time.monotonic()
            with contextlib.suppress(queue.Full):  # the thread finds the end by itself then
                self._frames.put_nowait(None)

    def _run(self) -> None:
        try:
            self._record()
        except Exception as reason:
            self._complain(reason)
        finally:
            self.over.set()

    def _record(self) -> None:
        while (entry := self._next()) is not None:
            at, picture, place = entry
            if self._film is not None and self._film.size != picture.shape[:2]:
                self._close(at)
            if self._film is None:
                self._open(picture, at, place)
            self._sound.shown(at, place)
            self._film.hear(self._sound, at)
            self._film.show(picture, at)
        if self._film is not None:
            self._close(self._ended)

    def _next(self) -> _Entry | None:
        """A picture and its time; None at the end. The last one is held meanwhile."""
        while True:
            try:
                entry = self._frames.get(timeout=FRAGMENT / 2)
            except queue.Empty:
                entry = None
            if entry is not None or self._ended is not None:
                return entry
            now = time.monotonic()
            # a still scene has its time, too, and a kill is to lose little of it
            if self._film is not None and now - self._film.at >= FRAGMENT:
                self._film.hear(self._sound, now)
                self._film.hold(now)

    def _open(self, picture: np.ndarray, at: float, place: Place | None) -> None:
        self._sound = Sound(at)
        self._sound.shown(at, place)
        wish, (height, width) = self.wish, picture.shape[:2]
        self._place, file = reserve(wish.prefix, width, height, ".mp4")
        self._film = Mp4(file, width, height, wish.metadata(), at, self._sound.there)
        self._began = at

    def _close(self, at: float) -> None:
        film, self._film = self._film, None
        film.hear(self._sound, at, ahead=0)
        film.end(at)
        self._sound.end()
        left_out, self._left_out = self._left_out, 0
        seconds = round(at - self._began, 2)
        _log.info("recorded %s, %.2f s, %d frames left out", self._place.path, seconds, left_out)
        self._tell({"type": "recorded", "file": self._place.path.name,
                    "subfolder": self._place.subfolder, "seconds": seconds,
                    "left_out": left_out})  # fmt: skip

    def _complain(self, reason: Exception) -> None:
        if self._film is not None:
            self._film.abandon()
            self._sound.end()
        if self._place is not None:
            with contextlib.suppress(OSError):
                if self._place.path.stat().st_size == 0:
                    self._place.path.unlink()  # nothing to keep
        where = f" {self._place.shown}:" if self._place else ""
        _log.warning("recording%s ended early: %s", where, reason)
        self._tell({"type": "problem", "reason": f"record:{where} {reason}"})


@atexit.register
def _finish() -> None:
    """The server goes down: recordings end as if they had been switched off."""
    running = list(_running)
    for recorder in running:
        recorder.end()
    deadline = time.monotonic() + _LEAVING
    for recorder in running:
        recorder.over.wait(max(0.0, deadline - time.monotonic()))
