"""Gives pictures to other programs on the same Mac through Syphon."""

from typing import Any

import numpy as np

from .. import syphon
from ..sources import Lost
from . import Target
from .rgba import canvas, draw

USUAL = "ComfyUI"  # the name of a server that was given none


class Kind:
    """See Sink. Two textures in turns: one may still be read by the GPU when the next is filled."""

    REPEATS = True

    def __init__(self, target: Target):
        self._name = target.name or USUAL
        self._syphon: Any = None
        self._server: Any = None
        self._textures: tuple[Any, ...] = ()
        self._canvas: np.ndarray = canvas(0, 0)
        self._turns = syphon.Turns()

    @staticmethod
    def check(target: Target) -> None:
        syphon.there("to")

    def open(self, width: int, height: int) -> None:
        self._syphon = library = syphon.library("to")
        with syphon.pool():
            self._server = library.SyphonMetalServer(self._name)
            if self._server.context is None:
                raise Lost("Syphon could not start a server")
            make, device = library.utils.raw.create_mtl_texture, self._server.device
            self._textures = make(device, width, height), make(device, width, height)
        self._canvas = canvas(width, height)

    def send(self, picture: np.ndarray, at: float) -> None:
        self._turns.ask()  # clients that come later ask who is there
        draw(self._canvas, picture)
        with syphon.pool():
            self._syphon.utils.numpy.copy_image_to_mtl_texture(self._canvas, self._textures[0])
            # the first row is the top here and the bottom there
            self._server.publish_frame_texture(self._textures[0], is_flipped=True)
        self._textures = self._textures[::-1]

    def close(self) -> None:
        server, self._server = self._server, None
        self._textures = ()
        if server is not None:
            server.stop()
