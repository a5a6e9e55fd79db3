"""The figures of a run, as listeners are told them and `stats` answers."""

import time
from typing import Any

from ..host.models import engines
from .cameras import Cameras
from .feeds import CameraFeed
from .meters import Spread
from .pulled import GIVING, PulledFeed
from .sending import SendView
from .shared import Shared


def of(
    shared: Shared, since: float, cameras: Cameras, latency: Spread, unsent: int
) -> dict[str, Any]:
    """What is known of a run so far. In any thread.

    Args:
        since: when it was made, by time.monotonic.
        cameras: what is sent to it.
        latency: ms from capture to screen.
        unsent: pictures that a newer one replaced on their way to a listener.
    """
    now, faults = time.monotonic(), shared.faults.counts
    feeds, feed_of = list(shared.feeds.values()), dict(shared.feed_of)
    dropped = sum(feed.slot.replaced + feed.dropped for feed in feeds)
    dropped += sum(f.coded.replaced for f in feeds if isinstance(f, CameraFeed))
    return {
        "fps": round(shared.frame_rate.value(now), 2),
        "camera_fps": round(cameras.rate.value(now), 2),
        "silent": [n for n, f in feed_of.items() if f.silent(now) and not shared.stopping],
        "latency_ms": _spread(latency, 1),
        "compute_ms": _spread(shared.compute, 1000),
        "frames": shared.counts["frames"],
        "skipped": shared.counts["skipped"],
        "dropped": shared.counts["lost"] + dropped,
        "refused": faults["frame"] + sum(feed.damaged for feed in feeds),
        "faults": {kind: n for kind, n in faults.items() if n},
        "unsent": unsent + sum(view.slot.replaced for view in list(shared.views.values())),
        "sources": {n: _source(f, now) for n, f in feed_of.items() if isinstance(f, PulledFeed)}
        | _sent(shared, cameras, now),
        "sends": sends(shared),
        **shared.calls,
        "engines": engines.in_use(since),
    }


def _source(feed: PulledFeed, now: float) -> dict[str, Any]:
    rate = round(feed.rate.value(now), 2)
    return {"state": feed.state, "reason": feed.trouble, "fps": rate, "losses": feed.losses}


def _sent(shared: Shared, cameras: Cameras, now: float) -> dict[str, dict[str, Any]]:
    """Of what others than the page send: "waiting" for them, "connected", or GIVING."""
    found = {}
    for (source, node), feed in _others(shared):
        rate, there = round(feed.rate.value(now), 2), (source, node) in cameras.senders
        state = "connected" if there else "waiting"
        state = state if feed.silent(now) or not rate else GIVING
        found[node] = {"state": state, "reason": None, "fps": rate, "losses": 0}
    return found


def _others(shared: Shared) -> list[tuple[tuple[str, str], CameraFeed]]:
    feeds = list(shared.feeds.items())
    return [(key, feed) for key, feed in feeds if isinstance(key, tuple) and len(key) == 2]


def sends(shared: Shared) -> dict[str, dict[str, Any]]:
    """Of each Live Send: its state, what was sent and dropped, and what is wrong."""
    found = {}
    for node, view in list(shared.views.items()):
        sender = view.sender if isinstance(view, SendView) else None
        if sender is not None:
            found[node] = {
                "state": sender.state, "reason": sender.trouble, "sent": sender.sent,
                "dropped": sender.dropped + view.slot.replaced, "losses": sender.losses,
            }  # fmt: skip
    return found


def troubles(shared: Shared) -> dict[tuple[str, str], str | None]:
    """What is wrong with each source and each Live Send, by kind of fault and node, or None."""
    feeds = [(n, f) for n, f in list(shared.feed_of.items()) if isinstance(f, PulledFeed)]
    found = {("source", n): f.trouble for n, f in feeds if f.state != "refused"}
    return found | {("send", node): one["reason"] for node, one in sends(shared).items()}


def _spread(spread: Spread, scale: float) -> dict[str, float] | None:
    p50, p95 = spread.percentile(50), spread.percentile(95)
    if p50 is None:
        return None
    return {"p50": round(p50 * scale, 2), "p95": round(p95 * scale, 2)}
