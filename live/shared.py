"""What the two halves of a live run share: slots, feeds, views and a few plain values.

The server's event loop and the prompt worker's thread meet here and nowhere else. Each value is
written by one of them; what both write is a slot, in which the latest wins.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from . import webrtc
from .faults import Faults, Refused
from .feeds import CameraFeed, Feed, FilmFeed
from .graph import Graph, GraphError, Split, constant, number
from .meters import Rate, Spread
from .pictures import checked_shape
from .pulled import PulledFeed
from .sending import SendView
from .sinks import USUAL, checked_target
from .sources import PHONE, PULLED, SCREEN, WHIP, Wanted, kind
from .view import View

BROWSER, FILE = "browser", "file"
SIZES = {"width": 512, "height": 512, "fps": 30}  # LiveCamera's defaults
SHAPE = {"width": 512, "height": 512, "fit": "crop", "mirror": False}

# a source of each node's own, and the input that says which; what a page sends is one for all
_OWN = {FILE: "file", PHONE: None, WHIP: None, **{s: name for s, (_, name) in PULLED.items()}}


def key_of(inputs: Graph, node: str) -> Any:
    """What names the feed of a Live Camera among those of a run. Raises GraphError."""
    source = constant(inputs, "source", BROWSER, node)
    if source in (BROWSER, SCREEN):
        return source
    if source not in _OWN:
        raise GraphError(f"source: {source!r} is not known. Choose another.", node)
    name = _OWN[source]
    return (source, node) if name is None else (source, node, constant(inputs, name, "", node))


def look_at_target(inputs: Graph, node: str) -> None:
    """Raises GraphError for what a Live Send cannot send to; what comes by a link is not known."""
    plain = {name: inputs.get(name, value) for name, value in USUAL.items()}
    if any(isinstance(value, list) for value in plain.values()):
        return
    try:
        checked_target(**plain)
    except ValueError as reason:
        raise GraphError(str(reason), node, getattr(reason, "allow", None)) from None


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
            key = key_of(inputs, node)
            feed = feeds.get(key) or self.feeds.get(key) or self._feed(key, inputs)
            if isinstance(feed, FilmFeed):
                # a film that plays goes on
                feed.fps = number(inputs, "fps", SIZES["fps"])
                feed.loop = inputs.get("loop", True) is True
            feeds[key] = feed_of[node] = feed
            with contextlib.suppress(Refused):  # a link, which is known once a frame runs
                feed.shapes[node] = checked_shape(*(inputs.get(n, d) for n, d in SHAPE.items()))
        gone = [feed for key, feed in self.feeds.items() if key not in feeds]
        self.feeds, self.feed_of = feeds, feed_of
        for feed in feeds.values():
            feed.shapes = {n: s for n, s in feed.shapes.items() if feed_of.get(n) is feed}
        for feed in gone:
            feed.end()

    def _feed(self, key: Any, inputs: Graph) -> Feed:
        path = self.opened(key)
        sizes = [number(inputs, name, default) for name, default in SIZES.items()]
        if path is not None:
            return FilmFeed(path, sizes[-1], True)
        if len(key) == 3 and not isinstance(key, str):
            return PulledFeed(kind(key[0]), Wanted(key[2], *sizes))
        return CameraFeed()

    def opened(self, key: Any) -> Any:
        """Look whether a Live Camera's source can be, before it is wanted.

        Returns:
            The path of a film, else None.

        Raises:
            GraphError: it cannot.
        """
        try:
            match key:
                case "file", _, name:
                    return self._open_film(name)
                case source, _, name:
                    kind(source).check(name)
                case source, _ if source == WHIP:
                    webrtc.check("source")
        except ValueError as reason:
            raise GraphError(str(reason), key[1], getattr(reason, "allow", None)) from None
        return None

    def look_at(self, split: Split) -> None:
        """Raises GraphError for a source or a Live Send that cannot be, before it is wanted."""
        for node in split.sources:
            self.opened(key_of(split.graph[node]["inputs"], node))
        for node in split.sends:
            look_at_target(split.graph[node]["inputs"], node)

    def keep_views(self) -> list[View]:
        """Views of the graphs that may run, made and let go of as needed; returns who is gone.

        In the server's loop, once `asked` or `graphs` is another.
        """
        wanted = [node for split in (*self.graphs, self.asked[1]) for node in split.views]
        views = {node: self.views.get(node) or self._view(node) for node in dict.fromkeys(wanted)}
        gone = [view for node, view in self.views.items() if node not in views]
        self.views = views
        return gone

    def _view(self, node: str) -> View:
        self._numbered += 1
        sends = any(node in split.sends for split in (*self.graphs, self.asked[1]))
        return (SendView if sends else View)((self._numbered - 1) % 2**16)

    def release(self) -> list[threading.Event]:
        """The run is over: let go of feeds and views. Returns what is set when the recordings
        are whole."""
        for feed in self.feeds.values():
            feed.end()
        recordings = [event for view in self.views.values() for event in view.end()]
        self.feeds, self.feed_of, self.views = {}, {}, {}
        return recordings
