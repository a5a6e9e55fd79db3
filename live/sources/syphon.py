"""What another program on the same Mac gives through Syphon."""

import time
from typing import Any

import numpy as np

from .. import syphon
from . import Lost, Shot, Wanted, needs

_FIND = 1.5  # seconds for a server to be heard of
_LIST = 1.0  # seconds to hear of all of them
_POLL = 0.002  # seconds between two looks for a new frame


class Kind:
    """See Source."""

    def __init__(self, wanted: Wanted):
        self._name = wanted.name.strip()
        self._syphon: Any = None
        self._client: Any = None

    @staticmethod
    def check(name: str) -> None:
        needs(isinstance(name, str) and bool(name.strip()), "sender", "choose a Syphon server.")
        syphon.there("sender")

    @staticmethod
    def listed() -> list[str]:
        library = syphon.library("sender")
        with syphon.pool():
            servers = syphon.Directory(library).look(_LIST)
            return sorted({syphon.called(server) for server in servers})

    def open(self) -> None:
        self._syphon = syphon.library("sender")
        with syphon.pool():
            servers = syphon.Directory(self._syphon).look(_FIND, self._name)
            if not servers:
                raise Lost(f"no Syphon server is called {self._name!r} now")
            self._client = self._syphon.SyphonMetalClient(servers[0])

    def newest(self, timeout: float) -> Shot | None:
        deadline = time.monotonic() + timeout
        while True:
            with syphon.pool():
                if (picture := self._picture()) is not None:
                    return Shot(picture, time.time())
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(_POLL, left))

    def _picture(self) -> np.ndarray | None:
        if not self._client.is_valid:
            raise Lost(f"the Syphon server {self._name!r} is gone")
        if not self._client.has_new_frame:
            return None
        texture = self._client.new_frame_image
        if texture is None:  # a server that has drawn nothing yet
            return None
        pixels = self._syphon.utils.numpy.copy_mtl_texture_to_image(texture)
        # BGRA, and the first row is the bottom, as OpenGL has it
        return np.ascontiguousarray(pixels[::-1, :, 2::-1])

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.stop()
