"""Sends over NDI, to everybody in the local network who asks for it by name."""

import time
from typing import Any

import numpy as np

from .. import ndi
from ..sources import Lost
from . import Target
from .rgba import canvas, draw

USUAL = "ComfyUI"  # the name of a sender that was given none


class Kind:
    """See Sink. A frame is handed over at once and compressed in a thread of the library's, which
    reads it until the next one is handed over: so two are kept in turns."""

    REPEATS = True

    def __init__(self, target: Target):
        self._name, self._rate = target.name or USUAL, round(1000 * target.fps)
        self._ndi: Any = None
        self._sender: Any = None
        self._canvases: list[np.ndarray] = []
        self._frames: list[Any] = []

    @staticmethod
    def check(target: Target) -> None:
        ndi.there("to")

    def open(self, width: int, height: int) -> None:
        self._ndi = library = ndi.library("to")
        self._sender = library.send_create(library.SendCreate(self._name, None, False, False))
        if self._sender is None:
            raise Lost(f"name: another NDI sender of this machine is called {self._name!r}")
        self._canvases = [canvas(width, height) for _ in range(2)]
        self._frames = [self._frame(pixels) for pixels in self._canvases]

    def _frame(self, pixels: np.ndarray) -> Any:
        frame = self._ndi.VideoFrameV2()
        frame.data = pixels  # without a copy; width, height and stride are taken from it
        frame.frame_rate_N, frame.frame_rate_D = self._rate, 1000
        return frame

    def send(self, picture: np.ndarray, at: float) -> None:
        draw(self._canvases[0], picture)
        frame = self._frames[0]
        alpha = picture.shape[2] == 4
        frame.FourCC = getattr(self._ndi, f"FOURCC_VIDEO_TYPE_RGB{'A' if alpha else 'X'}")
        frame.timecode = round((time.time() + at - time.monotonic()) * 1e7)
        self._ndi.send_send_video_async_v2(self._sender, frame)
        self._canvases.reverse()
        self._frames.reverse()

    def close(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            self._ndi.send_send_video_async_v2(sender, None)  # it has read what it was given
            self._ndi.send_destroy(sender)
