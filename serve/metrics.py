"""Figures for Prometheus, through Ray's own exporter (`ray.util.metrics`).

Ray puts `ray_` before each name and adds labels of its own (node, deployment, replica). Ours have
one label, the replica, and no visitor: their number does not grow with visitors.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.066, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_WAITS = (1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Figure(NamedTuple):
    """One metric: gauge, histogram (with bounds) or counter."""

    kind: str
    name: str
    text: str
    of_replica: bool = False
    bounds: tuple[float, ...] = ()


FIGURES = tuple(Figure(kind, f"livediffusion_{name}", *rest) for kind, name, *rest in (
    ("gauge", "streams", "streams that run"),
    ("gauge", "waiting", "visitors who wait"),
    ("gauge", "slots", "streams that could start now"),
    ("gauge", "replicas", "replicas that are not draining"),
    ("gauge", "draining", "replicas that are draining"),
    ("histogram", "wait_seconds", "seconds from a visitor's wish to its start", False, _WAITS),
    ("counter", "moves", "streams that went on at another replica"),
    ("gauge", "fps", "pictures a second of the replica's stream", True),
    ("gauge", "stream_fps_asked", "frames a second that a stream is to keep", True),
    ("histogram", "tick_seconds", "seconds of a tick", True, _SECONDS),
    ("histogram", "latency_seconds", "seconds from a frame to its picture, at the page", True,
     _SECONDS),
    ("gauge", "replica_streams", "streams of the replica", True),
    ("gauge", "restarts", "times that the replica's ComfyUI was started again", True),
    ("gauge", "gpu_memory_bytes", "GPU memory that the replica's ComfyUI uses", True),
    ("gauge", "warm_seconds", "seconds from the replica's start to its first picture", True),
))  # fmt: skip


class Nothing:
    """Figures that nobody reads."""

    def load(self, load: Any) -> None: ...

    def waited(self, seconds: float) -> None: ...

    def moved(self) -> None: ...


def made(of_replica: bool) -> dict[str, Any]:
    """Ray's metrics of the table, of a replica or of the house, by name without prefix."""
    from ray.util import metrics

    kinds = {"gauge": metrics.Gauge, "histogram": metrics.Histogram, "counter": metrics.Counter}
    found = {}
    for figure in FIGURES:
        if figure.of_replica == of_replica:
            more = {"boundaries": list(figure.bounds)} if figure.bounds else {}
            tags = ("house_replica",) if of_replica else ()
            found[figure.name.removeprefix("livediffusion_")] = kinds[figure.kind](
                figure.name, description=figure.text, tag_keys=tags, **more
            )
    return found


class OfHouse(Nothing):
    """The lobby's."""

    def __init__(self):
        self._figures = made(of_replica=False)

    def load(self, load: Any) -> None:
        for name, value in load._asdict().items():
            self._figures[name].set(value)

    def waited(self, seconds: float) -> None:
        self._figures["wait_seconds"].observe(seconds)

    def moved(self) -> None:
        self._figures["moves"].inc()


class OfReplica:
    """A replica's.

    Args:
        replica: its name, the only label.
        fps: frames a second that a stream is to keep.
    """

    def __init__(self, replica: str, fps: float):
        self._tags = {"house_replica": replica}
        self._figures = made(of_replica=True)
        self._figures["stream_fps_asked"].set(fps, tags=self._tags)

    def warmed(self, seconds: float) -> None:
        self._figures["warm_seconds"].set(seconds, tags=self._tags)

    def report(self, said: Mapping[str, Any]) -> None:
        """What the gate says of itself (`Gate.report`)."""
        streams = said.get("streams") or {}
        self._set("replica_streams", len(streams))
        self._set("fps", sum(one.get("fps") or 0.0 for one in streams.values()))
        self._set("restarts", said.get("restarts"))
        self._set("gpu_memory_bytes", (said.get("memory") or {}).get("used"))
        for one in streams.values():
            if one.get("tick_s"):
                self._figures["tick_seconds"].observe(one["tick_s"], tags=self._tags)
            if one.get("latency_ms"):
                self._figures["latency_seconds"].observe(one["latency_ms"] / 1e3, tags=self._tags)

    def _set(self, name: str, value: float | None) -> None:
        if value is not None:
            self._figures[name].set(value, tags=self._tags)
