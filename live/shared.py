"""What the two halves of a live run share: slots, feeds, views and a few plain values.

The server's event loop and the prompt worker's thread meet here and nowhere else. Each value is
written by one of them; what both write is a slot, in which the latest wins.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from .faults import Faults, Refused
from .feeds import CameraFeed, Feed, FilmFeed
from .graph import GraphError, Split, constant, number
from .meters import Rate, Spread
from .pictures import checked_shape
from .view import View

BROWSER = "browser"
SIZES = {"width": 512, "height": 512, "fps": 30}  # LiveCamera's defaults
SHAPE = {"width": 512, "height": 512, "fit": "crop", "mirror": False}


class Shared:
    """Args:
        id: the run's.
        split: the graph that it begins with.
        open_film: gives a film's path by its name in the input folder; raises ValueError.
        tell: takes kind, reason and node of what went wrong.

    Attributes:
        id, prompt_id, extra: what the run is, and what came with its prompt; set before it begins.
        asked: written by the server's side: the graph asked for last, and its version.
        taken: written by the frames' side: the version of that which it looked at last.
        stopping: written by the server's side: no frame after this one.
        running: written by the frames' side: frames run, or have run.
        split, version: written by the frames' side: the graph that runs; 1 is the first.
        graphs: written by the frames' side: it and those that may run next. An edit is put here
            before it runs, and stays until no other can be gone back to.
        feeds, feed_of: written by the frames' side: by source, and by node.
        views: written by the server's side: by node, of `asked` and `graphs`.
        frame_rate, compute, counts, calls: written by the frames' side.
        faults: what went wrong and did not end the run.
    """

    def __init__(
        self,
        id: str,
        split: Split,
        open_film: Callable[[str], Any],
        tell: Callable[[str, str, str | None], None],
    ):
        self.id = id
        self.prompt_id = ""
        self.extra: dict[str, Any] = {}
        self.asked, self.taken = (1, split), 1
        self.stopping = self.running = False
        self.split, self.version = split, 1
        self.graphs: tuple[Split, ...] = (split,)
        self.feeds: dict[Any, Feed] = {}
        self.feed_of: dict[str, Feed] = {}
        self.views: dict[str, View] = {}
        self.frame_rate, self.compute = Rate(), Spread()
        self.counts = dict.fromkeys(("frames", "skipped", "lost"), 0)
        self.calls: dict[str, Any] = {"calls": 0, "rows": 0, "roads": []}
        self.faults = Faults(tell)
        self._open_film = open_film
        self._numbered = 0
        self.prepare(split)
        self.keep_views()

    def prepare(self, split: Split) -> None:
        """Feeds of a graph; those that stay the same go on.

        Raises:
            GraphError: a film cannot be opened; names its node.
        """
        feeds: dict[Any, Feed] = {}
        feed_of: dict[str, Feed] = {}
        for node in split.sources:
            inputs = split.graph[node]["inputs"]
            source = constant(inputs, "source", BROWSER, node)
            fps = number(inputs, "fps", SIZES["fps"])
            if source == BROWSER:
                key: Any = BROWSER
            else:
                key = (node, constant(inputs, "file", "", node))
            feed = feeds.get(key) or self.feeds.get(key)
            if feed is None:
                feed = CameraFeed() if key == BROWSER else FilmFeed(self.opened(*key), fps, True)
            if isinstance(feed, FilmFeed):
                # a film that plays goes on
                feed.fps, feed.loop = fps, inputs.get("loop", True) is True
            feeds[key] = feed_of[node] = feed
            with contextlib.suppress(Refused):  # a link, which is known once a frame runs
                feed.shapes[node] = checked_shape(*(inputs.get(n, d) for n, d in SHAPE.items()))
        gone = [feed for key, feed in self.feeds.items() if key not in feeds]
        self.feeds, self.feed_of = feeds, feed_of
        for feed in feeds.values():
            feed.shapes = {n: s for n, s in feed.shapes.items() if feed_of.get(n) is feed}
        for feed in gone:
            feed.end()

    def opened(self, node: str, file: str) -> Any:
        """The path of a Live Camera's film. Raises GraphError."""
        try:
            return self._open_film(file)
        except ValueError as reason:
            raise GraphError(str(reason), node) from None

    def keep_views(self) -> list[View]:
        """Views of the graphs that may run, made and let go of as needed; returns who is gone.

        In the server's loop, once `asked` or `graphs` is another.
        """
        wanted = [node for split in (*self.graphs, self.asked[1]) for node in split.views]
        views = {node: self.views.get(node) or self._view() for node in dict.fromkeys(wanted)}
        gone = [view for node, view in self.views.items() if node not in views]
        self.views = views
        return gone

    def _view(self) -> View:
        self._numbered += 1
        return View((self._numbered - 1) % 2**16)

    def release(self) -> list[threading.Event]:
        """The run is over: let go of feeds and views. Returns what is set when the recordings
        are whole."""
        for feed in self.feeds.values():
            feed.end()
        recordings = [event for view in self.views.values() for event in view.end()]
        self.feeds, self.feed_of, self.views = {}, {}, {}
        return recordings
