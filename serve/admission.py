"""Who waits, who runs, and where: admission without clock, network or Ray.

The lobby feeds it with what replicas and visitors say and does what `decide` says; the simulation
in plan.py runs this same code in virtual time. All times are seconds since 1970.

A ComfyUI runs one live run at a time, so a replica has one slot. Replicas that share a GPU share
its time: a device has room for another stream while the measured ticks of all of them fit into
the asked frame rate (`BUSY`), and the first one always has.
"""

import bisect
import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

BUSY = 0.9  # of a device's time that streams may take together
ARRIVES = 15.0  # seconds in which a page that got a place is to be seen there
ABSENT = 10.0  # seconds without a word after which a visitor who waits is left out
QUIET = 2.0  # the same of one who does not arrive: whose page is there is heard more often
HUSH = 0.4  # of `lost_s` without a report, after which a replica may be lost
_REMEMBERED = 20_000  # visitors whose turn was: an old ticket is not the front of the queue again
_LEARNS = 0.1  # weight of the newest stream in the mean length


@dataclass
class Report:
    """What a replica says of itself.

    Attributes:
        replica: its name.
        address: where its gate is reached from inside of the house.
        direct: where a visitor's page reaches it, or None.
        device: what its ticks share with other replicas; its own name if nothing.
        tick_s: seconds of one tick, measured.
        streams: the visitors that it has now.
        ready: it may get one.
        draining: it is to go, and so are its streams.
        busy: it has a stream besides that is over: nobody's, but not gone yet.
    """

    replica: str
    address: str
    direct: str | None = None
    device: str = ""
    tick_s: float = 0.0
    streams: frozenset[str] = frozenset()
    ready: bool = True
    draining: bool = False
    busy: bool = False


class Go(NamedTuple):
    """A visitor is to start at a replica; `until` is when the time is over, None for never."""

    visitor: str
    replica: str
    until: float | None
    moved: bool


class Moving(NamedTuple):
    """A visitor's replica is draining or lost; a Go follows when there is another place."""

    visitor: str
    reason: str


class Over(NamedTuple):
    """A visitor's turn is over: "time", "gone" (the stream ended there) or "nowhere"."""

    visitor: str
    reason: str


class Away(NamedTuple):
    """A visitor is not heard any more, and left out of the queue.

    Nothing is kept of it: its page's ticket says since when it waited, so if it comes back with
    that, it is where it would be.
    """

    visitor: str


class Place(NamedTuple):
    """A place in the queue, from 1; `wait_s` is None where nothing tells how long it takes."""

    place: int
    of: int
    wait_s: float | None
    warming: bool


class Load(NamedTuple):
    """What autoscaling looks at: `slots` is how many more streams could start now."""

    streams: int
    waiting: int
    slots: int
    replicas: int
    draining: int


@dataclass
class _Replica:
    report: Report
    seen: float
    # visitors that were sent there and not seen there yet, with when
    expected: dict[str, float] = field(default_factory=dict)
    doubted: float = -math.inf  # when a page could not reach it


@dataclass
class _Visitor:
    since: float
    operator: bool
    seen: float
    replica: str | None = None
    started: float | None = None
    until: float | None = None
    moved: bool = False
    confirmed: bool = False
    missed: int = 0
    left: str | None = None  # the draining replica that it is to leave


class Admission:
    """Args:
    fps: frames a second that each stream is to keep.
    limit_s: seconds that a visitor may have; None for no limit. Operators have none.
    most_waiting: visitors who may wait.
    settle_s: seconds after its start in which nobody is admitted, so that the replicas of a house
        whose lobby was lost can say whom they have.
    lost_s: seconds without a report after which a replica is lost.
    """

    def __init__(
        self, fps: float, limit_s: float | None = None, most_waiting: int = 1000,
        settle_s: float = 2.0, lost_s: float = 3.0,
    ):  # fmt: skip
        self.fps, self.limit_s, self.most_waiting = fps, limit_s, most_waiting
        self._settle_s, self._lost_s = settle_s, lost_s
        self._began: float | None = None
        self._replicas: dict[str, _Replica] = {}
        self._visitors: dict[str, _Visitor] = {}
        self._queue: list[tuple[bool, bool, float, str]] = []
        self._events: list[Go | Moving | Over | Away] = []
        self._had: OrderedDict[str, float] = OrderedDict()
        self._mean: float | None = None

    # what is heard

    def report(self, now: float, report: Report) -> None:
        """A replica says how it is."""
        self._begin(now)
        replica = self._replicas.setdefault(report.replica, _Replica(report, now))
        before, replica.report, replica.seen = replica.report, report, now
        for visitor in report.streams:
            replica.expected.pop(visitor, None)
            known = self._visitors.get(visitor)
            if known is None:
                # the house goes on, this lobby is new: whose it is says the page when it comes
                self._visitors[visitor] = _Visitor(
                    now, False, now, report.replica, now, confirmed=True
                )
            elif known.replica == report.replica:
                known.confirmed = True
            elif known.replica is None and known.left != report.replica and not report.draining:
                # this lobby is new, or the replica was silent and is not lost after all
                self._unqueue(visitor)
                known.replica, known.confirmed = report.replica, True
                known.started = now if known.started is None else known.started
                self._events.append(Go(visitor, report.replica, known.until, True))
        for visitor in before.streams - report.streams:
            known = self._visitors.get(visitor)
            if known and known.replica == report.replica:
                elsewhere = [r.report.replica for r in self._replicas.values()
                             if visitor in r.report.streams]  # fmt: skip
                if elsewhere:
                    known.replica = elsewhere[0]
                else:
                    self._finish(now, visitor, "gone")
        if report.draining:
            self._displace(now, report.replica, "draining")

    def lost(self, now: float, replica: str) -> None:
        """A replica is not there any more."""
        if replica in self._replicas:
            self._displace(now, replica, "lost")
            del self._replicas[replica]

    def wants(
        self, now: float, visitor: str, since: float, operator: bool = False,
        had: str | None = None, until: float | None = None,
    ) -> bool:  # fmt: skip
        """A visitor wants a stream, or has one; said again while the page is there.

        Args:
            since: when that began, of its ticket.
            had: the replica that it says it has a stream at, and until when it may have one, if
                it has had a place: so learns it a lobby that was lost, or has left it out.

        Returns:
            False: too many wait already, and it is not taken.
        """
        self._begin(now)
        known = self._visitors.get(visitor)
        if known is not None:
            known.seen = now
            if known.operator != operator:
                waits = known.replica is None
                if waits:
                    self._unqueue(visitor)
                known.operator = operator
                if waits:
                    self._enqueue(visitor)
            if known.until is None and until is not None and not operator:
                known.until = until
            return True
        placed = had is not None or until is not None
        # one that was away is no newcomer
        newest = not self._queue or since >= self._queue[-1][2]
        if len(self._queue) >= self.most_waiting and newest and not (operator or placed):
            return False
        # a ticket from before its last turn has had its turn
        since = now if since <= self._had.get(visitor, -math.inf) else min(since, now)
        known = _Visitor(since, operator, now, moved=placed)
        if until is not None:
            known.until, known.started = until, now
        self._visitors[visitor] = known
        self._enqueue(visitor)
        return True

    def leaves(self, now: float, visitor: str) -> None:
        """A visitor wants nothing any more."""
        self._finish(now, visitor, None)

    def missed(self, now: float, visitor: str) -> None:
        """A visitor's page could not reach the place that it got."""
        known = self._visitors.get(visitor)
        if known is None or known.replica is None or known.confirmed:
            return
        self._forget_expected(visitor, known)
        if known.replica in self._replicas:
            # nobody else is sent there before it has said that it is there
            self._replicas[known.replica].doubted = now
        known.replica = None
        known.missed += 1
        if known.missed > 2:
            self._finish(now, visitor, "nowhere")
        else:
            known.moved = True
            self._enqueue(visitor)

    # what follows from it

    def decide(self, now: float) -> list[Go | Moving | Over | Away]:
        """What is to be done now, in order."""
        self._begin(now)
        for name in [n for n, r in self._replicas.items() if now - r.seen > self._lost_s]:
            self.lost(now, name)
        for name, known in list(self._visitors.items()):
            late = False
            if known.replica is not None and not known.confirmed:
                late = now - self._replicas[known.replica].expected.get(name, now) > ARRIVES
            quiet = now - known.seen
            if quiet > (QUIET if late else ABSENT) and (late or known.replica is None):
                self._forget(name)
                self._events.append(Away(name))
            elif known.until is not None and known.until <= now:
                self._finish(now, name, "time")
            elif late:
                self.missed(now, name)
        if now - self._began >= self._settle_s:
            self._admit(now)
        events, self._events = self._events, []
        return events

    def places(self, now: float) -> dict[str, Place]:
        """The place of each visitor who waits."""
        warming = not any(self._usable(r) for r in self._replicas.values())
        ends = self._ends(now)
        length = self.limit_s if self._mean is None else self._mean
        places = {}
        for i, (_, _, _, visitor) in enumerate(self._queue):
            wait = None
            if ends:
                wait = max(0.0, ends[0])
                if length is None:
                    heapq.heappop(ends)
                else:
                    heapq.heapreplace(ends, wait + length)
            places[visitor] = Place(i + 1, len(self._queue), wait, warming)
        return places

    def load(self) -> Load:
        """How full the house is."""
        here = [r for r in self._replicas.values() if not r.report.draining]
        streams = sum(1 for v in self._visitors.values() if v.replica is not None)
        return Load(
            streams, len(self._queue), len(list(self._free())), len(here),
            len(self._replicas) - len(here),
        )  # fmt: skip

    def where(self, visitor: str) -> str | None:
        """The replica that a visitor has, or is sent to."""
        known = self._visitors.get(visitor)
        return known.replica if known else None

    def at(self, replica: str) -> Report | None:
        """The latest report of a replica."""
        known = self._replicas.get(replica)
        return known.report if known else None

    @property
    def replicas(self) -> list[Report]:
        return [known.report for known in self._replicas.values()]

    # inside

    def _begin(self, now: float) -> None:
        if self._began is None:
            self._began = now

    def _admit(self, now: float) -> None:
        free = list(self._free())
        # one that is killed is there again sooner than its silence tells: what comes meanwhile is
        # for its streams, not for the next in line
        quiet = HUSH * self._lost_s
        held = sum(len(r.report.streams) for r in self._replicas.values() if now - r.seen > quiet)
        for i, replica in enumerate(free):
            if not self._queue:
                break
            known = self._visitors[self._queue[0][3]]
            if not known.moved and len(free) - i <= held:
                break
            visitor = self._queue.pop(0)[3]
            if known.started is None:
                known.started = now
                if self.limit_s is not None and not known.operator:
                    known.until = now + self.limit_s
            known.replica, known.confirmed = replica, False
            self._replicas[replica].expected[visitor] = now
            self._events.append(Go(visitor, replica, known.until, known.moved))
            known.moved = False

    def _usable(self, replica: _Replica) -> bool:
        report = replica.report
        return report.ready and not report.draining and replica.seen > replica.doubted

    def _free(self) -> Iterable[str]:
        """Replicas that could take a stream, the emptiest device first; each counts as taken."""
        taken: dict[str, list[float]] = {}
        for replica in self._replicas.values():
            report = replica.report
            if report.streams or report.busy or replica.expected:
                taken.setdefault(report.device or report.replica, []).append(
                    self.fps * report.tick_s
                )
        free = [
            (sum(taken.get(r.report.device or name, ())), r.report.tick_s, name)
            for name, r in self._replicas.items()
            if self._usable(r) and not (r.report.streams or r.report.busy or r.expected)
        ]
        heapq.heapify(free)
        while free:
            load, tick_s, name = heapq.heappop(free)
            ticks = taken.setdefault(self._replicas[name].report.device or name, [])
            if load != sum(ticks):
                heapq.heappush(free, (sum(ticks), tick_s, name))
            elif not ticks or load + self.fps * tick_s <= BUSY:
                ticks.append(self.fps * tick_s)
                yield name

    def _ends(self, now: float) -> list[float]:
        """Seconds until each place that there is, is free: a heap."""
        ends = [0.0 for _ in self._free()]
        ends += [0.0 for r in self._replicas.values() if self._usable(r) and r.report.busy]
        for known in self._visitors.values():
            if known.replica is None:
                continue
            left = [] if known.until is None else [known.until - now]
            if self._mean is not None:
                # of what has lasted t seconds nothing is known but the mean: that long again
                left.append(self._mean)
            if left:
                ends.append(min(left))
        heapq.heapify(ends)
        return ends

    def _displace(self, now: float, replica: str, reason: str) -> None:
        """All visitors of a replica are to go on elsewhere, before others who wait."""
        for name, known in list(self._visitors.items()):
            if known.replica == replica:
                known.replica, known.moved, known.confirmed = None, True, False
                known.left = replica if reason == "draining" else None
                known.seen = max(known.seen, now)
                self._enqueue(name)
                self._events.append(Moving(name, reason))
        self._replicas[replica].expected.clear()

    def _finish(self, now: float, visitor: str, reason: str | None) -> None:
        known = self._forget(visitor)
        if known is None:
            return
        self._had[visitor] = now
        self._had.move_to_end(visitor)
        while len(self._had) > _REMEMBERED:
            self._had.popitem(last=False)
        if known.started is not None and not known.operator:
            length = now - known.started
            self._mean = length if self._mean is None else (
                (1 - _LEARNS) * self._mean + _LEARNS * length
            )  # fmt: skip
        if reason is not None:
            self._events.append(Over(visitor, reason))

    def _forget(self, visitor: str) -> _Visitor | None:
        known = self._visitors.pop(visitor, None)
        if known is not None:
            self._forget_expected(visitor, known)
            self._unqueue(visitor, known)
        return known

    def _forget_expected(self, visitor: str, known: _Visitor) -> None:
        if known.replica in self._replicas:
            self._replicas[known.replica].expected.pop(visitor, None)

    def _key(self, visitor: str, known: _Visitor) -> tuple[bool, bool, float, str]:
        return not known.operator, not known.moved, known.since, visitor

    def _enqueue(self, visitor: str) -> None:
        bisect.insort(self._queue, self._key(visitor, self._visitors[visitor]))

    def _unqueue(self, visitor: str, known: _Visitor | None = None) -> None:
        known = known or self._visitors[visitor]
        key = self._key(visitor, known)
        i = bisect.bisect_left(self._queue, key)
        if i < len(self._queue) and self._queue[i] == key:
            del self._queue[i]
