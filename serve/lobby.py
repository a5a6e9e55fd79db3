"""The lobby: one for the house; knows who waits and who runs where, forgets nothing that matters.

It wraps `Admission` and keeps nothing on disk. If it is lost, the next one is told all of it again:
replicas report the streams that they have, ingresses say four times a second who is there, and
visitors' tickets say since when. Calls are idempotent: an ingress names all its visitors each time
and gets the state of each, so an answer that was lost is not missed.

A visitor comes again, with another turn, before all that is on its way about the last one is there.
So whatever ends something names the turn: since when the visitor wanted it, as its ticket says.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .admission import Admission, Away, Go, Moving, Over, Report
from .logs import Log
from .metrics import Nothing
from .options import bounds

SILENT = 3.0  # seconds without a report after which a replica is lost
_KEPT = 20_000  # turns whose end is remembered
_WAKES = 5.0  # seconds between two calls for a first replica
_OFTEN = 0.1  # seconds between two decisions that reports lead to
_SWEEPS = 30.0  # seconds between two looks for visitors who are gone without a word
_SHOWN = 200  # latest problems of replicas, for the operator
# events of a gate that say what went wrong
_PROBLEMS = frozenset({
    "problem", "failed", "start refused", "edit refused", "edit lost", "not started", "given up",
    "not understood", "bug",
})  # fmt: skip


class Lobby:
    """Args:
    settings: fps, limit_s, most_waiting of `Settings`; replicas as "N" or "MIN:MAX", what Serve
        was told.
    log: where sessions' events go.
    figures: the house's gauges.
    wake: called with the number of visitors who wait when no replica is there.
    clock: seconds since 1970.
    """

    def __init__(
        self, settings: Any, log: Log, figures: Any = None,
        wake: Callable[[int], None] = lambda waiting: None, clock: Callable[[], float] = time.time,
    ):  # fmt: skip
        self._admission = Admission(
            settings.fps, settings.limit_s, settings.most_waiting, lost_s=SILENT
        )
        self._log, self._figures, self._wake, self._clock = log, figures or Nothing(), wake, clock
        self._turns: dict[str, float] = {}  # since of the turn that a visitor is in
        self._gone: dict[str, Go] = {}  # where each was sent last
        self._moving: dict[str, str] = {}  # why one who waits had to leave
        self._over: OrderedDict[tuple[str, Any], str] = OrderedDict()  # visitor, turn: why it ended
        self._last: dict[str, dict[str, Any]] = {}  # latest figures of each visitor's stream
        self._said: dict[str, dict[str, Any]] = {}  # each replica's latest report, whole
        self._drain: set[str] = set()
        self._asked: int | None = None
        self._low, self._high = bounds(settings.replicas, 1)
        self._closing = False
        self._problems: deque[dict[str, Any]] = deque(maxlen=_SHOWN)
        self._house: dict[str, Any] | None = None
        self._woken = -_WAKES
        self._swept = self._decided = 0.0
        self._waiting = 0

    # ingresses

    def sync(
        self, visitors: Iterable[Sequence[Any]], leaves: Iterable[Sequence[Any]] = (),
        known: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        """An ingress says who is there, and is told how it is with each.

        Args:
            visitors: of each that wants a stream or has one: id, since, whether an operator, the
                replica that it says to have, until when it may have it, the replica that it could
                not reach.
            leaves: who wants nothing any more, and since when that had wanted something.
            known: the version of the house's description that the ingress has.

        Returns:
            `visitors`: of each ("go", replica, until, moved), ("wait", place, of, wait_s, warming,
            why it had to leave or None), ("over", reason) or ("full",); `replicas`: address and
            direct address of each; `house`: its description if it is not the known one.
        """
        now, here = self._clock(), list(visitors)
        for visitor, turn in leaves:
            if self._turns.get(visitor) == turn:
                self._leave(now, visitor, "left")
            else:
                # of a turn before this one, or of a stream that this lobby has not heard of yet
                self._is_over(visitor, turn, "left")
        full = set()
        for visitor, since, operator, had, until, missed in here:
            if (visitor, since) in self._over:
                continue
            if self._turns.get(visitor, since) != since:
                self._leave(now, visitor, "left")  # whoever wants anew has left before
            self._turns[visitor] = since
            if not self._admission.wants(now, visitor, since, operator, had, until):
                full.add(visitor)
                self._turns.pop(visitor)
            elif missed is not None and self._admission.where(visitor) == missed:
                self._admission.missed(now, visitor)
        self._decide(now)
        places = self._admission.places(now)
        answers = {}
        for visitor, since, _, _, until, _ in here:
            over = self._over.get((visitor, since))
            replica = self._admission.where(visitor)
            if self._closing:
                answers[visitor] = ("over", "closed")
            elif visitor in full:
                answers[visitor] = ("full",)
            elif over is not None:
                answers[visitor] = ("over", over)
            elif replica is not None:
                went = self._gone.get(visitor)
                # after a loss nobody was sent: what the ticket says holds
                sent = went if went is not None and went.replica == replica else None
                until = sent.until if sent else until
                answers[visitor] = ("go", replica, until, bool(sent and sent.moved))
            elif visitor in places:
                answers[visitor] = ("wait", *places[visitor], self._moving.get(visitor))
        house = self._house
        return {
            "visitors": answers,
            "replicas": {r.replica: (r.address, r.direct) for r in self._admission.replicas},
            "house": house if house is not None and house.get("version") != known else None,
        }

    def _leave(self, now: float, visitor: str, reason: str) -> None:
        """A visitor's turn ends because somebody says so."""
        went = self._gone.get(visitor)
        if reason == "left" and went and went.until is not None and went.until <= now:
            reason = "time"  # its page has heard it first
        self._admission.leaves(now, visitor)
        self._end(now, visitor, reason)

    # replicas

    def report(self, said: dict[str, Any]) -> dict[str, Any]:
        """A replica says how it is, and is told what to do.

        Args:
            said: `replica`, `address`, `direct`, `device`, `tick_s`, `ready`, `draining`; `streams`
                with the figures of each visitor's, and its `turn`; `events` of its gate; `house`,
                what visitors may see and change (`version`, `inputs`, `views`, `camera`, `title`).

        Returns:
            `end`: by visitor the turn that is over, and why; `drain`; `closing`: the house ends,
            nothing is waited for; `waiting`: visitors who wait; `asked`: the number of replicas
            that an operator asked for, or None.
        """
        now, name = self._clock(), said["replica"]
        for event in said.pop("events", ()):
            self._log.event(replica=name, **event)
            if event.get("event") in _PROBLEMS:
                self._problems.append({"at": now, "replica": name, **event})
        if said.get("house"):
            self._house = said["house"]
        turns = {visitor: one.get("turn") for visitor, one in said["streams"].items()}
        for visitor, turn in turns.items():
            if (visitor, turn) not in self._over and self._turns.setdefault(visitor, turn) != turn:
                self._is_over(visitor, turn, "left")  # whoever wants anew has left before
        # one that is over still takes its place until it is gone, but is nobody's
        streams = frozenset(v for v, turn in turns.items() if (v, turn) not in self._over)
        for visitor in streams:
            self._last[visitor] = {k: v for k, v in said["streams"][visitor].items() if k != "turn"}
        self._said[name] = said
        self._admission.report(now, Report(
            name, said["address"], said.get("direct"), said.get("device") or name,
            float(said.get("tick_s") or 0.0), streams, bool(said["ready"]),
            bool(said["draining"]), len(streams) < len(turns),
        ))  # fmt: skip
        # hundreds of replicas report twice a second each, and a decision is about everybody
        if now - self._decided >= _OFTEN:
            self._decide(now)
        return {
            "end": {v: (turn, self._over[v, turn]) for v, turn in turns.items()
                    if (v, turn) in self._over},
            "drain": name in self._drain, "asked": self._asked,
            "closing": self._closing, "waiting": self._waiting,
        }  # fmt: skip

    def lost(self, name: str) -> None:
        """A replica says goodbye."""
        self._admission.lost(self._clock(), name)
        self._decide(self._clock())

    # operators

    def close(self) -> None:
        """The house ends: visitors are told, and no stream is waited for."""
        self._closing = True
        self._log.event("closed")

    def state(self) -> dict[str, Any]:
        """The house as its operator sees it."""
        now = self._clock()
        self._decide(now)
        load = self._admission.load()
        problems = list(self._problems)
        if self._log.problem:
            problems.append({"at": now, "event": "problem", "why": self._log.problem})
        return {
            **load._asdict(), "asked": self._asked, "problems": problems,
            "replica": {name: {**said, "house": None, "drain": name in self._drain}
                        for name, said in self._said.items()},
            "queue": [{"visitor": v, **p._asdict()}
                      for v, p in list(self._admission.places(now).items())[:_SHOWN]],
        }  # fmt: skip

    def order(self, order: dict[str, Any]) -> str:
        """What an operator wants: `{"end": visitor}`, `{"drain": replica}` or `{"replicas": n}`.

        Returns:
            What was done, in one sentence.

        Raises:
            ValueError: it cannot be; in one sentence.
        """
        now = self._clock()
        if "end" in order:
            visitor = str(order["end"])
            if self._admission.where(visitor) is None and visitor not in self._turns:
                raise ValueError(f"There is no visitor {visitor[:40]}.")
            self._leave(now, visitor, "operator")
            return f"The turn of {visitor} is over."
        if "drain" in order:
            name = str(order["drain"])
            if self._admission.at(name) is None:
                raise ValueError(f"There is no replica {name[:40]}.")
            self._drain.add(name)
            return f"Replica {name} lets its streams go, and starts anew."
        if "replicas" in order:
            asked = order["replicas"]
            if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int)):
                raise ValueError("The number of replicas is a whole one, or null for as needed.")
            if self._low == self._high:
                raise ValueError(
                    f"The number of replicas is fixed, {self._low}: start with --replicas MIN:MAX."
                )
            if asked is not None and not self._low <= asked <= self._high:
                raise ValueError(
                    f"The number of replicas is {self._low} to {self._high} here, or null for as "
                    "needed: start with another --replicas MIN:MAX."
                )
            self._asked = asked
            return f"Replicas: {'as needed' if asked is None else asked}."
        raise ValueError("An order is end, drain or replicas.")

    # inside

    def _decide(self, now: float) -> None:
        """What follows from what was heard."""
        self._decided = now
        for event in self._admission.decide(now):
            if isinstance(event, Go):
                # after the loss of a lobby one goes on that this one did not see begin
                began = event.visitor not in self._gone and not event.moved
                self._gone[event.visitor] = event
                self._moving.pop(event.visitor, None)
                since = self._turns.get(event.visitor, now)
                if began:
                    self._figures.waited(max(0.0, now - since))
                else:
                    self._figures.moved()
                self._log.event("start" if began else "move", visitor=event.visitor,
                                replica=event.replica, waited_s=round(now - since, 1),
                                until=event.until)  # fmt: skip
            elif isinstance(event, Moving):
                self._moving[event.visitor] = event.reason
                self._log.event("moving", visitor=event.visitor, reason=event.reason)
            elif isinstance(event, Over):
                self._end(now, event.visitor, event.reason)
            elif isinstance(event, Away) and event.visitor in self._gone:
                self._end(now, event.visitor, "absent")  # who was sent and never came
        for name in [n for n in self._said if self._admission.at(n) is None]:
            del self._said[name]
            self._drain.discard(name)
            self._log.event("replica_lost", replica=name)
        if now - self._swept > _SWEEPS:
            self._swept = now
            self._sweep(now)
        load = self._admission.load()
        self._waiting = load.waiting
        self._figures.load(load)
        if load.waiting and not load.replicas and now - self._woken >= _WAKES:
            self._woken = now
            self._wake(load.waiting)

    def _sweep(self, now: float) -> None:
        """Forget whom admission has let go without a word: pages that never came back."""
        waiting = self._admission.places(now)
        for visitor in [*self._turns, *self._gone, *self._moving]:
            if visitor not in waiting and self._admission.where(visitor) is None:
                self._end(now, visitor, "absent")
        there = {visitor for said in self._said.values() for visitor in said["streams"]}
        for visitor in [v for v in self._last if v not in there and v not in self._gone]:
            del self._last[visitor]

    def _is_over(self, visitor: str, turn: Any, reason: str) -> None:
        """A turn is over: its page is told, and whichever replica says to have its stream."""
        self._over.setdefault((visitor, turn), reason)
        while len(self._over) > _KEPT:
            self._over.popitem(last=False)

    def _end(self, now: float, visitor: str, reason: str) -> None:
        turn = self._turns.pop(visitor, None)
        went = self._gone.pop(visitor, None)
        figures = self._last.pop(visitor, {})
        self._moving.pop(visitor, None)
        if turn is None and went is None:
            return
        if turn is not None and reason != "absent":
            self._is_over(visitor, turn, reason)
        self._log.event("end", visitor=visitor, reason=reason,
                        replica=went.replica if went else None,
                        since_s=None if turn is None else round(now - turn, 1),
                        **figures)  # fmt: skip
