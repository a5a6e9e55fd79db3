"""What of ComfyUI's messages a visitor's page is told. Standard library only.

Built anew, field by field: what a later pack adds stays here until it is listed. What went wrong
is said in one sentence; paths, nodes and their words are for the operator's log.
"""

from collections.abc import Container
from typing import Any

NOT_TAKEN = "The workflow does not take these settings."
FAILED = "The workflow could not go on. Whoever runs this house finds the reason in its log."
_FRAME = "This frame of the camera is not taken."
_UNREADABLE = "This frame of the camera cannot be read."
# of a run's figures: nothing of what else is in the house
_COUNTS = (
    "fps", "camera_fps", "frames", "skipped", "dropped", "refused", "unsent", "version",
)  # fmt: skip
_SPREADS = ("latency_ms", "compute_ms")
_STATES = ("queued", "starting", "live", "stopping", "ended", "failed")


def figures(stats: dict[str, Any]) -> dict[str, Any]:
    """What a page may know of a run's figures."""
    told: dict[str, Any] = {"type": "stats"}
    if stats.get("state") in _STATES:
        told["state"] = stats["state"]
    told |= {name: _number(stats[name]) for name in _COUNTS if name in stats}
    for name in _SPREADS:
        if isinstance(spread := stats.get(name), dict):
            told[name] = {p: _number(spread.get(p)) for p in ("p50", "p95")}
    return told


def described(begun: dict[str, Any], shown: Container[str], fps: float) -> dict[str, Any]:
    """What a page is told of a run: what to send for each Live Camera, and where its views are.

    Args:
        begun: the answer of a start or an update; it has keys and addresses of ComfyUI's, too.
        shown: nodes whose views visitors see.
        fps: frames a second that the house gives.
    """
    cameras = [
        {
            "node": one["node"], "source": one["source"],
            "width": _number(one.get("width")), "height": _number(one.get("height")),
            "fps": min(fps, _number(one.get("fps")) or fps),
        }
        for one in begun.get("cameras", [])
    ]  # fmt: skip
    views = [
        {"node": one["node"], "index": one["index"]}
        for one in begun.get("views", []) if one["node"] in shown
    ]  # fmt: skip
    return {"version": begun.get("version", 1), "cameras": cameras, "views": views, "idle": []}


def for_log(said: dict[str, Any]) -> str | None:
    """The event that a message is for the operator's log; None for none."""
    if said.get("type") == "problem":
        return "problem"
    state = said.get("state") if said.get("type") == "state" else None
    return state if state in ("failed", "live") else None


def for_page(said: dict[str, Any], fps: float) -> dict[str, Any] | None:
    """What a page is told of a message; None for nothing.

    Args:
        said: docs/live.md, "On the wire".
        fps: frames a second that the house gives.

    Raises:
        ValueError, TypeError, AttributeError: it is none of the pack's.
    """
    kind = said.get("type")
    if kind == "received":
        refused = _FRAME if said.get("refused") else None
        numbers = {name: _number(said.get(name)) for name in ("seq", "camera")}
        return {"type": kind, **numbers, "refused": refused}
    if kind == "stats":
        return figures(said)
    if kind == "pace":
        least = 1000 / fps
        numbers = {name: _number(said.get(name)) for name in ("camera", "width", "height")}
        interval = max(least, float(said.get("interval_ms", least)))
        return {"type": kind, "interval_ms": interval, **numbers}
    if kind == "state":
        state = said.get("state")
        if state not in _STATES:
            return None
        reason = FAILED if state == "failed" else None
        ahead = _number(said.get("ahead"))
        return {"type": kind, "state": state, "ahead": ahead, "reason": reason, "node": None}
    if kind == "problem":
        about = said.get("kind")
        if about not in ("edit", "picture", "setting", "source", "task"):
            return None
        version = _number(said.get("version"))
        return {
            "type": kind, "kind": about, "reason": NOT_TAKEN, "node": None, "version": version
        }  # fmt: skip
    if kind == "unreadable":
        return {"type": kind, "seq": _number(said.get("seq")), "reason": _UNREADABLE}
    # of other pages, and of recordings, whose files are the operator's
    return None


def _number(value: Any) -> float | int | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
