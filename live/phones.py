"""Phones of a run: for each Live Camera a one-time key, and the one phone that has come with it."""

import hmac
import secrets
from collections.abc import Collection
from typing import Any

from .bounds import most
from .sources import PHONE
from .viewer import Viewer

GONE, TAKEN = 4410, 4409  # codes that a phone's socket is closed with; it does not come back


class _Place:
    """Attributes:
    key: in the phone's address.
    mark: what the phone that came first calls itself; nobody else knows it.
    viewer: what it is told, while it is connected.
    """

    def __init__(self):
        self.key = secrets.token_urlsafe(18)
        self.mark: str | None = None
        self.viewer: Viewer | None = None


class Phones:
    """In the server's loop. A key sends pictures to one Live Camera and does nothing else."""

    def __init__(self):
        self._places: dict[str, _Place] = {}

    def key(self, node: str) -> str | None:
        """The key of a Live Camera, made when it is asked for; None where there are too many."""
        if node not in self._places:
            if len(self._places) >= most("phones.Phones._places"):
                return None
            self._places[node] = _Place()
        return self._places[node].key

    def node(self, key: str) -> str | None:
        """The Live Camera that a key is of."""
        found = [
            node
            for node, place in self._places.items()
            if hmac.compare_digest(place.key.encode(), key.encode())
        ]
        return found[0] if found else None

    def join(self, node: str, mark: str, viewer: Viewer) -> Viewer | None:
        """A phone is connected; the first that comes is the only one.

        Args:
            mark: what it calls itself: the same after its connection broke.

        Returns:
            Its connection before, which is over.

        Raises:
            PermissionError: another phone came first.
        """
        place = self._places[node]
        if place.mark is not None and not hmac.compare_digest(place.mark, mark):
            raise PermissionError("Another phone has come with this code. Make a new code.")
        before, place.mark, place.viewer = place.viewer, mark, viewer
        return before

    def leave(self, node: str, viewer: Viewer) -> None:
        """A phone's connection is gone; it may come back."""
        place = self._places.get(node)
        if place is not None and place.viewer is viewer:
            place.viewer = None

    def only(self, nodes: Collection[str]) -> None:
        """Keys of other Live Cameras are over."""
        for node in self._places.keys() - set(nodes):
            self.drop(node)

    def tell(self, state: str) -> None:
        """How the run is; of anything else a phone is not told."""
        for place in self._places.values():
            if place.viewer is not None:
                place.viewer.tell({"type": "state", "state": state})

    def drop(self, node: str) -> None:
        """The key of a Live Camera is over, and the phone that has come with it is let go."""
        place = self._places.pop(node, None)
        if place is not None and place.viewer is not None:
            place.viewer.close(GONE, "This code is over.")


def with_phones(graphs: Collection[Any]) -> set[str]:
    """Live Cameras of these graphs that show a phone."""
    return {
        node
        for graph in graphs
        for node in graph.sources
        if graph.graph[node]["inputs"].get("source") == PHONE
    }
