"""Every buffer that a live run keeps, and how much it may hold: the one table.

A buffer is named by where it is kept, `module.Class.attribute`. Who keeps it takes the bound from
here, and tests/live/test_memory.py walks the table both ways: a buffer that is not in it is found
in the source, and one that holds more than it says is found in a run.
"""

from typing import NamedTuple

from ..trust.boundary import (
    MOST_KEPT,
    MOST_LISTENERS,
    MOST_PEERS,
    MOST_PEERS_OF_RUN,
    MOST_VIEWS,
)
from ..trust.offers import MOST_SECTIONS


class Bound(NamedTuple):
    """How much a buffer holds.

    Attributes:
        most: things of the kind `of`, for each `each`.
        of: what is counted.
        each: of what there may be several: "" where there is one, else view, source, node
            (of the graph that runs and the one to go back to), listener, run.
    """

    most: int
    of: str
    each: str = ""


KEPT = {
    # on the way from a source to the graph
    "mailbox.Slot._item": Bound(1, "latest item"),
    "mailbox.Slot._waiting": Bound(8, "who waits for it"),
    "feeds.Frame._images": Bound(1, "image of a picture", "node"),
    "feeds.Feed.shapes": Bound(1, "shape", "node"),
    "frames.Frames._latest": Bound(1, "frame", "source"),
    "frames.Frames._lent": Bound(1, "name", "view"),
    "frames.Frames._without": Bound(1, "name", "node"),
    "shared.Shared.feeds": Bound(1, "feed", "source"),
    "shared.Shared.feed_of": Bound(1, "feed", "source"),
    # between the graph and a picture that left it
    "origins.Origins._entered": Bound(64, "runs of the graph, no more than the stream's lag + 1"),
    "origins.Moment.given": Bound(1, "picture", "source"),
    "origins.Moment.places": Bound(1, "place in a film", "node"),
    "executor.FrontierCache.entries": Bound(1, "frozen value", "node"),
    "shared.Shared.views": Bound(1, "view", "view"),
    "view.View._taps": Bound(MOST_PEERS_OF_RUN, "connections"),
    "view.View._recorders": Bound(4, "recordings that are not whole yet"),
    "sinks.record.Recorder._frames": Bound(8, "pictures"),
    "workers.Workers._threads": Bound(3, "threads"),
    "workers.Workers._work": Bound(200, "calls, three at most of a task"),
    "cameras.Cameras.senders": Bound(1, "who sends it", "source"),
    "cameras.Cameras._told": Bound(1, "pace", "source"),
    "phones.Phones._places": Bound(16, "keys of phones"),
    "session.Session._troubles": Bound(2, "words", "node"),
    # on the way to listeners
    "session.Session.viewers": Bound(MOST_LISTENERS + 1, "listeners and the owner"),
    "session.Session._tasks": Bound(64, "tasks"),
    "viewer.Viewer._messages": Bound(64, "messages"),
    "viewer.Viewer._packets": Bound(1, "coded picture", "view"),
    "viewer.Viewer._away": Bound(1, "number", "view"),
    "viewer.Viewer.inputs": Bound(1, "number", "view"),
    # on the way between FFmpeg and a server
    "relay.Relay._waiting": Bound(2, "directions, each of 1 MB and a chunk", "source"),
    "reading.Reading._held": Bound(4, "connections", "source"),
    "rtsp.Conversation._open": Bound(16, "questions without an answer", "source"),
    "rtsp.Conversation._bases": Bound(2, "names", "source"),
    # of a connection over SRT
    "srt.Srt._sent": Bound(8192, "packets of 1.3 KB", "node"),
    "srt.Srt._parked": Bound(8192, "packets of 1.3 KB", "source"),
    "srt.Srt._ready": Bound(8192, "packets of 1.3 KB", "source"),
    "srt_keys.Keys._known": Bound(2, "keys", "node"),
    # of a stream that is sent
    "sinks.rtmp._Chunks._streams": Bound(64, "messages of the server that are not whole", "node"),
    "sinks.ts.Muxer._counts": Bound(3, "numbers", "node"),
    "viewer.Viewer.elsewhere": Bound(MOST_VIEWS, "numbers"),
    # figures
    "meters.Rate._times": Bound(30, "times"),
    "meters.Spread._values": Bound(300, "values"),
    "faults.Faults.counts": Bound(6, "numbers"),
    "faults.Faults._told": Bound(6, "kinds of faults", "node"),
    "faults.Restarts._times": Bound(4, "times"),
    # of the server, beyond a run
    "rtc.Rtc._held": Bound(MOST_PEERS, "connections"),
    "rtc._Held.ufrags": Bound(MOST_SECTIONS, "texts"),
    "webrtc.peers.Peer._tasks": Bound(3, "tasks"),
    "webrtc.peers.Reports._gaps": Bound(10, "times", "node"),
    "sessions.Sessions._all": Bound(8, "runs that are over, beside those that are not", "run"),
    "listing.Listing._asked": Bound(5, "question, of each source that is pulled"),
    "concealed.Concealed._known": Bound(256, "secrets of addresses"),
    "concealed.Concealed._kept": Bound(1000, "secrets of addresses that were allowed"),
    "still.Stills._pictures": Bound(8, "coded pictures"),
    "keeper.Keeper._runs": Bound(MOST_KEPT, "runs without a page"),
    "kept.Lines._counts": Bound(16, "kinds of failures"),
    "kept.Lines._times": Bound(20, "times"),
}


def most(name: str) -> int:
    """The bound of a buffer, by where it is kept."""
    return KEPT[name].most
