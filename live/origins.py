"""Which frames a picture that leaves the graph was made from, and as what the graph saw them."""

from collections import deque

import numpy as np

from ..host.graph import Graph, behind
from .feeds import Frame, Place
from .pictures import Shape, fitted

_MOST = 64  # frames between a camera and its picture


class Moment:
    """One run of the graph.

    Attributes:
        pace: the frame that the run was for.
        given: the frame that each LiveCamera gave in it, and as what, by node id.
        places: where in a film that frame is, by node id.
    """

    def __init__(self, pace: Frame):
        self.pace = pace
        self.given: dict[str, tuple[Frame, Shape]] = {}
        self.places: dict[str, Place | None] = {}

    def picture(self, graph: Graph, view: str) -> np.ndarray | None:
        """What a view's picture of this run was made from, in any thread.

        Args:
            view: node id of the LiveView in `graph`.

        Returns:
            [height, width, 3] uint8, of several cameras that of the first in the graph; None if
            the picture depends on no camera.
        """
        needed = behind(graph, [view])
        for node in graph:
            if node in needed and node in self.given:
                frame, shape = self.given[node]
                # a mirrored one is a view whose rows run backwards
                return np.ascontiguousarray(fitted(frame.picture, shape))
        return None


    def place(self, graph: Graph, view: str) -> Place | None:
        """Where in a film the picture is from; None where it is from none, or from several."""
        needed = behind(graph, [view])
        places = {place for node, place in self.places.items() if place and node in needed}
        return places.pop() if len({place.path for place in places}) == 1 else None


class Origins:
    """The latest runs of a graph whose stream gives each picture some runs later. One thread."""

    def __init__(self):
        self._now: Moment | None = None
        self._entered: deque[Moment] = deque(maxlen=_MOST)

    def begin(self, pace: Frame) -> None:
        """A run begins."""
        self._now = Moment(pace)

    def gave(self, node: str, frame: Frame, shape: Shape) -> None:
        """A LiveCamera gave this frame to the run."""
        self._now.given[node] = frame, shape
        self._now.places[node] = frame.place

    def shown(self, lag: int) -> Moment:
        """The run that a picture shown in this run was made from.

        Args:
            lag: runs that a picture spends in the stream; runs without a new picture do not count.
        """
        if not self._entered or self._entered[-1] is not self._now:
            self._entered.append(self._now)
        return self._entered[max(0, len(self._entered) - 1 - lag)]

    def clear(self) -> None:
        """Let go of all frames."""
        self._now = None
        self._entered.clear()
