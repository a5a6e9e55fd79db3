"""What the two halves of a live run share: slots, feeds, views and a few plain values.

The server's event loop and the prompt worker's thread meet here and nowhere else. Each value is
written by one of them; what both write is a slot, in which the latest wins.
"""

from collections.abc import Callable
from typing import Any

from .feeds import CameraFeed, Feed, FilmFeed
from .graph import GraphError, Split, constant, number
from .meters import Rate, Spread
from .pictures import Shape
from .view import View

BROWSER = "browser"
SIZES = {"width": 512, "height": 512, "fps": 30}  # LiveCamera's defaults


class Shared:
    """Args:
        id: the run's.
        split: the graph that it begins with.
        open_film: gives a film's path by its name in the input folder; raises ValueError.

    Attributes:
        id, prompt_id, extra: what the run is, and what came with its prompt; set before it begins.
        pending: the server's side leaves an edited graph here, the frames' side takes it.
        stopping: written by the server's side: no frame after this one.
        running: written by the frames' side: frames run, or have run.
        split, version: written by the frames' side: the graph that runs; 1 is the first.
        feeds, feed_of: written by the frames' side: by source, and by node.
        views: by node; either side may add one, which then stays.
        frame_rate, compute, counts, calls: written by the frames' side, but for "refused".
    """

    def __init__(self, id: str, split: Split, open_film: Callable[[str], Any]):
        self.id = id
        self.prompt_id = ""
        self.extra: dict[str, Any] = {}
        self.pending: tuple[int, Split] | None = None
        self.stopping = self.running = False
        self.split, self.version = split, 1
        self.feeds: dict[Any, Feed] = {}
        self.feed_of: dict[str, Feed] = {}
        self.views: dict[str, View] = {}
        self.frame_rate, self.compute = Rate(), Spread()
        self.counts = dict.fromkeys(("frames", "skipped", "refused", "lost"), 0)
        self.calls: dict[str, Any] = {"calls": 0, "rows": 0, "roads": []}
        self._open_film = open_film
        self.prepare(split)

    def prepare(self, split: Split) -> None:
        """Feeds and views of a graph; those that stay the same go on.

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
            feed.shapes[node] = Shape(
                *(number(inputs, name, SIZES[name]) for name in ("width", "height")),
                str(inputs.get("fit", "crop")), inputs.get("mirror") is True,
            )  # fmt: skip
        gone = [feed for key, feed in self.feeds.items() if key not in feeds]
        self.feeds, self.feed_of = feeds, feed_of
        for feed in feeds.values():
            feed.shapes = {n: s for n, s in feed.shapes.items() if feed_of.get(n) is feed}
        for feed in gone:
            feed.end()
        for node in split.views:
            self.view(node)

    def opened(self, node: str, file: str) -> Any:
        """The path of a Live Camera's film. Raises GraphError."""
        try:
            return self._open_film(file)
        except ValueError as reason:
            raise GraphError(str(reason), node) from None

    def view(self, node: str) -> View:
        """The view of a LiveView, made when it is first asked for."""
        if node not in self.views:
            self.views[node] = View(len(self.views))
        return self.views[node]
