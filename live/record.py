"""A recording of a view, as it was shown, in ComfyUI's output folder."""

import fractions
import os
import pathlib
import queue
import threading
import time

import numpy as np

_WAITING = 8  # frames; at more the disk or the encoder is too slow, and frames are left out
_CLOCK = 90_000  # ticks per second, the usual one of videos


class Recorder:
    """Writes frames to an mp4 in a thread of its own; the file has its name once it is whole.

    Args:
        path: the file to be.

    Attributes:
        left_out: frames that came faster than they could be written.
        error: why the recording ended early, if it did.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.left_out = 0
        self.error: Exception | None = None
        self._frames: queue.Queue[tuple[float, np.ndarray] | None] = queue.Queue(_WAITING)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="livediffusion-record", daemon=True)
        self._thread.start()

    def put(self, picture: np.ndarray) -> None:
        """[H, W, 3] uint8. Never waits."""
        try:
            self._frames.put_nowait((time.monotonic(), picture))
        except queue.Full:
            self.left_out += 1

    def end(self) -> None:
        """The recording is over; the file is whole a moment later."""
        self._over.set()

    def join(self, timeout: float) -> None:
        """Wait for the file."""
        self._thread.join(timeout)

    def _run(self) -> None:
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            if self._write(part):
                os.replace(part, self.path)
        except Exception as reason:
            self.error = reason
        finally:
            part.unlink(missing_ok=True)

    def _write(self, part: pathlib.Path) -> bool:
        import av

        first = self._next()
        if first is None:
            return False
        began, picture = first
        # the codec takes even sizes only
        height, width = (side - side % 2 for side in picture.shape[:2])
        with av.open(str(part), "w", format="mp4") as film:
            stream = film.add_stream("h264", rate=30)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.time_base = stream.codec_context.time_base = fractions.Fraction(1, _CLOCK)
            stream.options = {"preset": "veryfast", "crf": "20"}
            entry, last = first, -1
            while entry is not None:
                at, picture = entry
                if picture.shape[0] >= height and picture.shape[1] >= width:
                    cut = np.ascontiguousarray(picture[:height, :width])
                    frame = av.VideoFrame.from_ndarray(cut, format="rgb24")
                    # frames come as they were shown, so they keep their own times
                    last = max(last + 1, round((at - began) * _CLOCK))
                    frame.pts, frame.time_base = last, stream.time_base
                    film.mux(stream.encode(frame))
                entry = self._next()
            film.mux(stream.encode())
        return True

    def _next(self) -> tuple[float, np.ndarray] | None:
        while True:
            try:
                return self._frames.get(timeout=0.1)
            except queue.Empty:
                if self._over.is_set():
                    return None
