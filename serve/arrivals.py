"""Who comes to a house: by chance, when a show ends, or as a real house's log says."""

import json
import math
import random
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Visit(NamedTuple):
    """A visitor: when, for how long if nobody ends it, and how long it waits for a place."""

    at: float
    seconds: float
    patience: float = math.inf


def lengths(mean: float, sigma: float, draw: random.Random) -> Iterator[float]:
    """Lengths of visits: lognormal with this mean, `sigma` of the logarithm; 0: all alike."""
    mu = math.log(mean) - sigma**2 / 2
    while True:
        yield draw.lognormvariate(mu, sigma)


def poisson(
    rate: float, seconds: float, length: Iterator[float], draw: random.Random,
    patience: float = math.inf,
) -> list[Visit]:  # fmt: skip
    """Visitors who come independently of each other, `rate` a second.

    Args:
        patience: mean seconds, exponential, after which one who waits leaves.
    """
    visits, at = [], 0.0
    while (at := at + draw.expovariate(rate)) < seconds:
        visits.append(Visit(at, next(length), _patience(patience, draw)))
    return visits


def rush(
    count: int, at: float, within: float, length: Iterator[float], draw: random.Random,
    patience: float = math.inf,
) -> list[Visit]:  # fmt: skip
    """A show ends: `count` visitors from `at` on, fewer and fewer; most come `within` seconds."""
    return [Visit(at + draw.expovariate(2 / within), next(length), _patience(patience, draw))
            for _ in range(count)]  # fmt: skip


def _patience(mean: float, draw: random.Random) -> float:
    return math.inf if math.isinf(mean) else draw.expovariate(1 / mean)


class Trace(NamedTuple):
    """What a real house's log says: its visitors, and how they fared there."""

    visits: list[Visit]
    waits: list[float]
    busy: float
    began: float
    ended: float


def trace(lines: Iterable[str]) -> Trace:
    """A house's log, one JSON object a line (serve/logs.py).

    Raises:
        ValueError: there is no start of a stream in it, or a line is none of a log.
    """
    came: dict[str, float] = {}
    started: dict[str, float] = {}
    visits, waits, busy, latest = [], [], 0.0, 0.0
    for number, line in enumerate(lines, 1):
        try:
            said = json.loads(line)
            event, at, visitor = said["event"], float(said["at"]), said.get("visitor")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"Line {number} is none of a house's log.") from None
        latest = max(latest, at)
        if event == "start":
            came[visitor], started[visitor] = at - float(said.get("waited_s") or 0.0), at
        elif event == "end" and visitor in started:
            began = started.pop(visitor)
            waits.append(began - came[visitor])
            busy += at - began
            visits.append(Visit(came.pop(visitor), at - began))
        elif event == "end" and "replica" not in said and said.get("since_s") is not None:
            waited = float(said["since_s"])  # who never had a place
            visits.append(Visit(at - waited, 0.0, waited))
    for visitor, began in started.items():  # those who were there when it was cut off
        waits.append(began - came[visitor])
        busy += latest - began
        visits.append(Visit(came[visitor], latest - began))
    if not waits:
        raise ValueError("No stream starts in this log.")
    first = min(visit.at for visit in visits)
    visits = sorted(visit._replace(at=visit.at - first) for visit in visits)
    return Trace(visits, waits, busy, first, latest)
