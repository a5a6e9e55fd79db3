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
        self._turns: tuple[tuple[np.ndarray, Any], ...] = ()

    @staticmethod
    def check(target: Target) -> None:
        ndi.there("to")

    def open(self, width: int, height: int) -> None:
        self._ndi = library = ndi.library("to")
        self._sender = library.send_create(library.SendCreate(self._name, None, False, False))
        if self._sender is None:
            raise Lost(f"name: another NDI sender of this machine is called {self._name!r}")
        self._turns = self._made(width, height), self._made(width, height)

    def _made(self, width: int, height: int) -> tuple[np.ndarray, Any]:
        """Pixels, and the frame that is them."""
        pixels, frame = canvas(width, height), self._ndi.VideoFrameV2()
        frame.data = pixels  # without a copy; width, height and stride are taken from it
        frame.frame_rate_N, frame.frame_rate_D = self._rate, 1000
        return pixels, frame

    def send(self, picture: np.ndarray, at: float) -> None:
        (pixels, frame), other = self._turns
        draw(pixels, picture)
        opaque = self._ndi.FOURCC_VIDEO_TYPE_RGBX
        frame.FourCC = self._ndi.FOURCC_VIDEO_TYPE_RGBA if picture.shape[2] == 4 else opaque
        frame.timecode = round((time.time() + at - time.monotonic()) * 1e7)
        self._ndi.send_send_video_async_v2(self._sender, frame)
        self._turns = other, (pixels, frame)

    def close(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            self._ndi.send_send_video_async_v2(sender, None)  # it has read what it was given
            self._ndi.send_destroy(sender)
