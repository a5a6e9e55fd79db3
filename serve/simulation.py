"""A house in virtual time: visitors, replicas and failures, with the real admission and scaling.

Discrete events. Who runs where, who waits and how many replicas there are is decided by the code
that a real house runs (`admission.Admission`, `scaling.wanted`, `capacity.slots`); what is made up
is the world around it: when visitors come and how long they stay, how long a replica takes to be
there, which of them fail.
"""

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from . import capacity, scaling
from .admission import ABSENT, Admission, Go, Moving, Over, Report
from .arrivals import Trace, Visit, trace

_FIRST = 10_000.0  # the hour that a simulation begins at: seconds since 1970, as admission's times


@dataclass(frozen=True)
class World:
    """What a house meets, in seconds, measured where that can be.

    Attributes:
        tick_s: of one tick, of one stream alone.
        start_s: from the wish for a replica to its first tick, a machine's own start included.
        connect_s: from "go" to the page's first picture; the place is taken in it.
        interval_s: between two decisions of the lobby; 0: at once.
        fails_s: mean time between two losses of a replica; inf: none.
    """

    tick_s: float = 0.02
    start_s: float = 30.0
    connect_s: float = 0.5
    interval_s: float = 0.25
    fails_s: float = math.inf


@dataclass(frozen=True)
class Plan:
    """How a house is run; the names are those of `run.py serve`.

    Attributes:
        fps: frames a second that a stream keeps.
        limit_s: seconds that a visitor may have, None for no limit.
        low, high: the fewest and the most GPUs.
        per_gpu: replicas that share a GPU.
        spare, idle_s, to_zero_s: of autoscaling.
        most_waiting: visitors who may wait.
    """

    fps: float = 25.0
    limit_s: float | None = 300.0
    low: int = 1
    high: int = 1
    per_gpu: int = 1
    spare: int = 0
    idle_s: float = 120.0
    to_zero_s: float | None = None
    most_waiting: int = 1000


@dataclass
class Result:
    """What happened.

    Attributes:
        visits: visitors who came.
        waits: seconds from each one's arrival to its "go".
        refused: came to a full queue.
        gave_up: left the queue.
        busy, warm, paid: seconds of streams, of replicas that could have one, of GPUs that were
            there, starting and draining ones included.
        queued: seconds of waiting, of all visitors together.
        starts: replicas that were started after the first ones.
        moves: streams that went on elsewhere; `gaps` are their seconds without a place.
        losses: replicas that failed.
        most_streams, most_waiting, most_gpus: at any time.
        seconds: simulated.
    """

    visits: int = 0
    waits: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    refused: int = 0
    gave_up: int = 0
    busy: float = 0.0
    warm: float = 0.0
    paid: float = 0.0
    queued: float = 0.0
    starts: int = 0
    losses: int = 0
    most_streams: int = 0
    most_waiting: int = 0
    most_gpus: int = 0
    seconds: float = 0.0

    @property
    def moves(self) -> int:
        return len(self.gaps)

    @property
    def utilisation(self) -> float:
        """Of the time of replicas that could have had a stream, that in which they had one."""
        return self.busy / self.warm if self.warm else 0.0

    @property
    def mean_wait(self) -> float:
        return sum(self.waits) / len(self.waits) if self.waits else 0.0

    def wait(self, part: float) -> float:
        """The wait that `part` of those who started did not exceed."""
        return quantile(self.waits, part)


def quantile(values: list[float], part: float) -> float:
    """Of a list, nearest rank; 0 of nothing."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)] if values else 0.0


def replay(lines: Iterable[str], plan: Plan, world: World) -> tuple[Trace, Result]:
    """The visitors of a real house's log in a simulated one.

    Each stays as long as it stayed there: `connect_s` is in that already.
    """
    found = trace(lines)
    alike = World(**{**vars(world), "connect_s": 0.0})
    return found, simulate(found.visits, Plan(**{**vars(plan), "limit_s": None}), alike,
                           until=found.ended - found.began)  # fmt: skip


class _Stream:
    """A visitor: how much of its time is left, and since when it has or lacks a place."""

    __slots__ = ("came", "left", "moving", "replica", "since", "turn")

    def __init__(self, came: float, left: float):
        self.came, self.left = came, left
        self.replica: str | None = None
        self.since = came
        self.turn = 0
        self.moving: float | None = None


def simulate(
    visits: Iterable[Visit], plan: Plan, world: World, until: float, seed: int = 0,
    warm_up: float = 0.0,
) -> Result:  # fmt: skip
    """Run a house.

    Args:
        visits: in any order, times from 0.
        until: seconds after which it is looked at no more.
        seed: of failures.
        warm_up: seconds at the beginning that do not count.
    """
    return _House(plan, world, random.Random(seed)).run(sorted(visits), until, warm_up)


class _House:
    def __init__(self, plan: Plan, world: World, draw: random.Random):
        self.plan, self.world, self.draw = plan, world, draw
        # replicas report only changes here, and say themselves when they are lost
        self.admission = Admission(
            plan.fps, plan.limit_s, plan.most_waiting, settle_s=0.0, lost_s=math.inf
        )
        self.slots = capacity.slots(world.tick_s, plan.fps, 1 / plan.per_gpu)
        self.now = _FIRST
        self.events: list[tuple[float, int, str, Any]] = []
        self.numbers = itertools.count()
        self.streams: dict[str, _Stream] = {}
        self.replicas: dict[str, dict[str, Any]] = {}
        self.on: Counter[str] = Counter()  # replicas on each GPU
        self.shared: list[str] = []  # GPUs with room for another, as often as there is
        self.waiting: set[str] = set()
        self.count: Counter[str] = Counter()  # ready replicas, streams
        self.result = Result()
        self.counts_from = math.inf
        self.fewer_since: float | None = None
        self.deciding = False

    def run(self, visits: list[Visit], until: float, warm_up: float) -> Result:
        end = self.now + until
        self.counts_from = self.now + warm_up
        for _ in range(self.plan.low * self.plan.per_gpu):
            self._add(ready_in=0.0)
        if self.plan.high > self.plan.low:
            self._at(1.0, "look")
        self._at(ABSENT / 2, "beat")
        coming = iter(enumerate(visits))
        following = next(coming, None)
        while True:
            arrives = math.inf if following is None else _FIRST + following[1].at
            first = min(arrives, self.events[0][0] if self.events else math.inf)
            if first > end:
                break
            self._pass(first)
            if arrives <= first:
                assert following is not None
                # a queue sorts those of one instant by their names
                self._comes(f"{following[0]:09}", following[1])
                following = next(coming, None)
            else:
                _, _, kind, what = heapq.heappop(self.events)
                getattr(self, f"_{kind}")(what)
        self._pass(end)
        self.result.seconds = until - warm_up
        return self.result

    # time

    def _at(self, seconds: float, kind: str, what: Any = None) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.numbers), kind, what))

    def _pass(self, to: float) -> None:
        seconds = to - max(self.now, min(self.counts_from, to))
        self.now = to
        if seconds > 0:
            result, count = self.result, self.count
            result.busy += seconds * count["streams"]
            result.warm += seconds * max(count["ready"] * self.slots, count["streams"])
            result.paid += seconds * len(self.on)
            result.queued += seconds * len(self.waiting)

    def _soon(self) -> None:
        if not self.world.interval_s:
            self._decide(None)
        elif not self.deciding:
            self.deciding = True
            ticks = math.floor((self.now - _FIRST) / self.world.interval_s) + 1
            self._at(_FIRST + ticks * self.world.interval_s - self.now, "decide")

    # visitors

    def _comes(self, visitor: str, visit: Visit) -> None:
        counts = self.now >= self.counts_from
        self.result.visits += counts
        if not self.admission.wants(self.now, visitor, self.now):
            self.result.refused += counts
            return
        self.streams[visitor] = _Stream(self.now, visit.seconds)
        self._waits(visitor)
        if visit.patience < math.inf:
            self._at(visit.patience, "gives_up", visitor)
        self._soon()

    def _expires(self, _: None) -> None:
        self._soon()

    def _waits(self, visitor: str) -> None:
        self.waiting.add(visitor)
        self.result.most_waiting = max(self.result.most_waiting, len(self.waiting))

    def _gives_up(self, visitor: str) -> None:
        stream = self.streams.get(visitor)
        if stream is not None and stream.replica is None and stream.moving is None:
            self.result.gave_up += self.now >= self.counts_from
            self._leaves(visitor)

    def _stays(self, what: tuple[str, int]) -> None:
        """A visitor's own time is over, unless it is another turn by now."""
        visitor, turn = what
        if visitor in self.streams and self.streams[visitor].turn == turn:
            self._leaves(visitor)

    def _leaves(self, visitor: str) -> None:
        self.admission.leaves(self.now, visitor)
        self._left(visitor)

    def _left(self, visitor: str) -> None:
        stream = self.streams.pop(visitor)
        if stream.replica is None:
            self.waiting.discard(visitor)
        else:
            self.count["streams"] -= 1
            if stream.replica in self.replicas:  # else it was lost since
                self.replicas[stream.replica]["visitor"] = None
                self._report(stream.replica)
        self._soon()

    def _beat(self, _: None) -> None:
        """Pages that wait say that they are there."""
        for visitor in self.waiting:
            self.admission.wants(self.now, visitor, self.streams[visitor].came)
        self._at(ABSENT / 2, "beat")

    # the lobby

    def _decide(self, _: None) -> None:
        self.deciding = False
        for event in self.admission.decide(self.now):
            stream = self.streams.get(event.visitor)
            if stream is None:
                continue
            if isinstance(event, Go):
                self._goes(event, stream)
            elif isinstance(event, Moving):
                stream.left -= self.now - stream.since
                stream.replica, stream.moving, stream.since = None, self.now, self.now
                stream.turn += 1
                self.count["streams"] -= 1
                self._waits(event.visitor)
            elif isinstance(event, Over):
                self._left(event.visitor)

    def _goes(self, go: Go, stream: _Stream) -> None:
        self.waiting.discard(go.visitor)
        self.count["streams"] += 1
        self.result.most_streams = max(self.result.most_streams, self.count["streams"])
        if stream.moving is not None:
            if self.now >= self.counts_from:
                self.result.gaps.append(self.now - stream.moving)
        elif stream.came >= self.counts_from:
            self.result.waits.append(self.now - stream.came)
        stream.replica, stream.moving = go.replica, None
        stream.since = self.now + self.world.connect_s
        # seen there at once: that it arrives is not what is looked at here
        self.replicas[go.replica]["visitor"] = go.visitor
        self._report(go.replica)
        self._at(self.world.connect_s + max(0.0, stream.left), "stays", (go.visitor, stream.turn))
        if go.until is not None:
            self._at(max(0.0, go.until - self.now), "expires")

    # replicas

    def _add(self, ready_in: float) -> None:
        number = next(self.numbers)
        device = self.shared.pop() if self.shared else f"gpu{number}"
        if not self.on[device]:
            self.shared += [device] * (self.plan.per_gpu - 1)
        self.on[device] += 1
        name = f"r{number}"
        self.replicas[name] = {
            "device": device, "ready": False, "draining": False, "visitor": None,
        }  # fmt: skip
        self.result.most_gpus = max(self.result.most_gpus, len(self.on))
        self._at(ready_in, "warm", name)

    def _warm(self, name: str) -> None:
        if name not in self.replicas:
            return
        self.replicas[name]["ready"] = True
        self.count["ready"] += 1
        self._report(name)
        if self.world.fails_s < math.inf:
            self._at(self.draw.expovariate(1 / self.world.fails_s), "fails", name)
        self._soon()

    def _report(self, name: str) -> None:
        known = self.replicas.get(name)
        if known is not None:
            visitor = known["visitor"]
            self.admission.report(self.now, Report(
                name, "", None, known["device"], self.world.tick_s,
                frozenset((visitor,) if visitor else ()), known["ready"], known["draining"],
            ))  # fmt: skip

    def _gone(self, name: str) -> None:
        known = self.replicas.pop(name)
        self.count["ready"] -= known["ready"]
        device = known["device"]
        self.on[device] -= 1
        if self.on[device]:
            self.shared.append(device)
        else:
            del self.on[device]
            self.shared = [one for one in self.shared if one != device]

    def _fails(self, name: str) -> None:
        if name in self.replicas:
            self.result.losses += self.now >= self.counts_from
            self._gone(name)
            self.admission.lost(self.now, name)
            self._add(self.world.start_s)
            self._soon()

    def _look(self, _: None) -> None:
        """Serve's controller, once a second."""
        plan, there = self.plan, len(self.replicas)
        number = scaling.wanted(
            self.count["streams"], len(self.waiting), self.slots, there, plan.spare,
            plan.low * plan.per_gpu, plan.high * plan.per_gpu,
        )  # fmt: skip
        if number >= there:
            self.fewer_since = None
            for _ in range(number - there):
                self.result.starts += self.now >= self.counts_from
                self._add(self.world.start_s)
        else:
            if self.fewer_since is None:
                self.fewer_since = self.now
            idle = plan.idle_s
            if number == 0 and plan.to_zero_s is not None:
                idle = plan.to_zero_s
            if self.now - self.fewer_since >= idle:
                self.fewer_since = None
                # Serve stops the newest ones, busy or not
                for name in list(self.replicas)[number:]:
                    self.replicas[name]["draining"] = True
                    self._report(name)
                    self._gone(name)
                    self.admission.lost(self.now, name)
                self._soon()
        self._at(1.0, "look")
