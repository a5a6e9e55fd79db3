"""Gives pictures to other programs on the same Windows machine through Spout."""

from typing import Any

import numpy as np

from .. import spout
from ..sources import Lost
from . import Target
from .rgba import canvas, draw

USUAL = "ComfyUI"  # the name of a sender that was given none


class Kind:
    """See Sink. OpenGL's context is made, used and closed in the thread that sends, as it must."""

    REPEATS = True

    def __init__(self, target: Target):
        self._name = target.name or USUAL
        self._sender: Any = None
        self._canvas = canvas(0, 0)

    @staticmethod
    def check(target: Target) -> None:
        spout.there("to")

    def open(self, width: int, height: int) -> None:
        self._sender = spout.opened(spout.library("to").SpoutSender)
        self._sender.setSenderName(self._name)
        self._canvas = canvas(width, height)

    def send(self, picture: np.ndarray, at: float) -> None:
        height, width = picture.shape[:2]
        draw(self._canvas, picture)
        # the first row is the top, as in the texture that is shared: nothing is turned over
        if not self._sender.sendImage(self._canvas, width, height, spout.RGBA, False, 0):
            raise Lost(f"Spout took no picture from {self._name!r}")

    def close(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.releaseSender()
            sender.closeOpenGL()
