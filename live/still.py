"""The camera's latest picture for an ordinary queued prompt, as the page sent it."""

import threading
from collections import OrderedDict

from .bounds import most

_KEPT = most("still.Stills._pictures")


class Stills:
    """Encoded pictures by (client, node); the oldest are forgotten. Thread-safe."""

    def __init__(self):
        self._lock = threading.Lock()
        self._pictures: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    def put(self, place: tuple[str, str], picture: bytes) -> None:
        with self._lock:
            self._pictures[place] = picture
            self._pictures.move_to_end(place)
            while len(self._pictures) > _KEPT:
                self._pictures.popitem(last=False)

    def get(self, place: tuple[str, str]) -> bytes | None:
        with self._lock:
            return self._pictures.get(place)


stills = Stills()
