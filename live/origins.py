"""Which frames a picture that leaves the graph was made from, and as what the graph saw them."""

from collections import deque

import numpy as np

from ..host.graph import Graph, behind
from .bounds import most
from .feeds import Frame, Origin, Place
from .pictures import Shape, fitted


class Moment:
    """One run of the graph.

    Attributes:
        origin: the number and time of the frame that the run was for.
        given: the picture, [H, W, 3] uint8, that each LiveCamera gave in it, and as what, by node
            id. Not the images made of it, which are four times as large.
        places: where in a film that picture is, by node id.
    """

    def __init__(self, origin: Origin):
        self.origin = origin
        self.given: dict[str, tuple[np.ndarray, Shape]] = {}
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
                picture, shape = self.given[node]
                # a mirrored one is a view whose rows run backwards
                return np.ascontiguousarray(fitted(picture, shape))
        return None


    def place(self, graph: Graph, view: str) -> Place | None:
        """Where in a film the picture is from; None where it is from none, or from several."""
        if not any(self.places.values()):
            return None
        needed = behind(graph, [view])
        places = {place for node, place in self.places.items() if place and node in needed}
        return places.pop() if len({place.path for place in places}) == 1 else None


class Origins:
    """The latest runs of a graph whose stream gives each picture some runs later. One thread.

    Only the runs are kept whose pictures are still to come: those in the stream, and this one.
    """

    def __init__(self):
        self._now: Moment | None = None
        self._lag = 0
        self._entered: deque[Moment] = deque(maxlen=most("origins.Origins._entered"))

    def begin(self, origin: Origin) -> None:
        """A run begins."""
        # not sooner: a view may ask before the stream has run, whose lag then is one more
        while len(self._entered) > self._lag + 1:
            self._entered.popleft()
        self._now = Moment(origin)

    def gave(self, node: str, frame: Frame, shape: Shape) -> None:
        """A LiveCamera gave this frame to the run."""
        self._now.given[node] = frame.picture, shape
        self._now.places[node] = frame.place

    def shown(self, lag: int) -> Moment:
        """The run that a picture shown in this run was made from.

        Args:
            lag: runs that a picture spends in the stream now; runs without a new picture do not
                count.
        """
        if not self._entered or self._entered[-1] is not self._now:
            self._entered.append(self._now)
        self._lag = lag
        return self._entered[max(0, len(self._entered) - 1 - lag)]

    def clear(self) -> None:
        """Let go of all frames."""
        self._now = None
        self._entered.clear()
