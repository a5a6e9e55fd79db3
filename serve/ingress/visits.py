"""Visitors' sockets: what a page may say to the house, and what it hears.

One `Visit` is one socket. `Visits` are all of an ingress; it says to the lobby who is there
(`entries`) and hands out what the lobby answers (`apply`). It knows no socket: a visit's `send`
takes a message, `close` a code. Nothing is kept beyond a socket but the tickets that its page has.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trust import schema

from ..tickets import OPERATOR, STREAM, VISIT, Refused, Tickets, new_id

HELLO = 10.0  # seconds in which a socket must have said hello
RENEWED = 30.0  # seconds after which a page gets its tickets anew
KEPT_S = 120.0  # a page that is away longer has lost its place
VISIT_S = KEPT_S + RENEWED  # a visit's ticket: the last one that its page got may be that old
STREAM_S = 90.0  # a stream's ticket opens something for so long; what is open stays
MESSAGES = 20.0  # a second, of one socket
BURST = 60.0
LONGEST = 64 * 1024  # bytes of a message: values are checked by the gate that they are for
_REFUSED = 4008  # close code: too much, or not what is spoken here
_ELSEWHERE = 4409  # close code: the same visitor is here by another socket

_LIMITS = schema.Limits(bytes=LONGEST, depth=6, items=2000)
_TEXT = schema.text(2048)
_KIND = schema.one_of("hello", "want", "leave", "lost")
_MESSAGE = schema.record({"type": _KIND}, {
    "ticket": schema.either(schema.nothing, _TEXT),
    "values": schema.anything, "replica": schema.either(schema.nothing, schema.text(100)),
}, others=True)  # fmt: skip


class TooMuch(ValueError):
    """A message that is not taken, and its socket neither; in one sentence."""


class Full(TooMuch):
    """A socket that is not taken now, and may be later."""


@dataclass(eq=False)
class Visit:
    """A page's socket.

    Attributes:
        send: takes a message for the page.
        close: takes a WebSocket close code and why, in one sentence.
        origin: of the page.
        address: where it comes from, for counting; empty: not counted.
        operator: whether it came with an operator's ticket.
        secure: whether the page came by HTTPS.
        id, since: the visitor's, from its ticket; since is None while it wants nothing.
        had, until: the replica of its stream, and until when it may have it.
        told: what the page heard last, as the lobby said it.
    """

    send: Callable[[dict[str, Any]], None]
    close: Callable[[int, str], None]
    origin: str
    operator: bool = False
    secure: bool = False
    address: str = ""
    id: str | None = None
    since: float | None = None
    had: str | None = None
    until: float | None = None
    missed: str | None = None
    told: tuple[Any, ...] | None = None
    welcomed: str | None = None
    renewed: float = 0.0
    began: float = 0.0
    _room: float = BURST
    _spent: float = field(default=0.0)

    def spend(self, now: float) -> None:
        """One message more.

        Raises:
            TooMuch: there are too many.
        """
        self._room = min(BURST, self._room + (now - self._spent) * MESSAGES)
        self._spent = now
        if self._room < 1:
            raise TooMuch(f"A page may say {MESSAGES:.0f} things a second.")
        self._room -= 1


class Visits:
    """Args:
    tickets: of the house.
    title, fps, limit_s, direct: of its settings.
    most, most_each: sockets that may be open, altogether and from one address.
    clock: seconds since 1970.
    """

    def __init__(
        self, tickets: Tickets, title: str, fps: float, limit_s: float | None, direct: bool,
        most: int, most_each: int = 64, clock: Callable[[], float] = time.time,
    ):  # fmt: skip
        self._tickets, self._title, self._fps = tickets, title, fps
        self._limit_s, self._direct, self._most, self._clock = limit_s, direct, most, clock
        self._most_each = most_each
        self._open: dict[Visit, str] = {}  # with its address
        self._of: Counter[str] = Counter()
        self._new: set[Visit] = set()
        self._visits: dict[str, Visit] = {}
        self._leaves: dict[tuple[str, float], int] = {}  # visitor and since: still to be said
        self.house: dict[str, Any] = {}
        self.replicas: Mapping[str, tuple[str, str | None]] = {}

    def __len__(self) -> int:
        return len(self._new) + len(self._visits)

    # what a page says

    def opened(self, visit: Visit) -> None:
        """A socket is there.

        Raises:
            Full: too many are.
        """
        if len(self) >= self._most:
            raise Full("The house has as many visitors as it can hear: try again later.")
        if visit.address and self._of[visit.address] >= self._most_each:
            raise Full("There are too many visits from this address already.")
        self._open[visit] = visit.address
        self._of[visit.address] += 1
        visit.began = visit._spent = self._clock()
        self._new.add(visit)

    def closed(self, visit: Visit) -> None:
        """A socket is gone; its page may come back with its ticket."""
        self._new.discard(visit)
        if (address := self._open.pop(visit, None)) is not None:
            self._of[address] -= 1
            self._of += Counter()
        if visit.id is not None and self._visits.get(visit.id) is visit:
            del self._visits[visit.id]

    def heard(self, visit: Visit, data: bytes) -> None:
        """A page said something.

        Raises:
            TooMuch: what ends its socket.
        """
        now = self._clock()
        visit.spend(now)
        try:
            said = _MESSAGE(schema.parsed(data, "A message", _LIMITS), "message")
        except schema.BadData as error:
            raise TooMuch(str(error)) from None
        kind = said["type"]
        if (visit.id is None) != (kind == "hello"):
            raise TooMuch("A page says hello first, and once.")
        if kind == "hello":
            self._hello(visit, said.get("ticket"), now)
        elif kind == "want":
            if visit.since is None:
                visit.since = now
            # said again: the page has lost what it had, and gets it with a new ticket
            visit.told = None
            self._renew(visit, now)
        elif kind == "leave":
            if visit.since is not None:
                self._leaves[visit.id, visit.since] = 3
            self._ended(visit, "left", now)
        elif visit.since is not None and visit.had is not None:
            visit.missed = said.get("replica") or visit.had

    def _hello(self, visit: Visit, ticket: str | None, now: float) -> None:
        visit.id = new_id()
        if ticket:
            try:
                claims = self._tickets.read(ticket, VISIT)
                visit.id, visit.since = str(claims["id"]), claims.get("since")
                visit.had, visit.until = claims.get("replica"), claims.get("until")
                visit.operator = visit.operator or bool(claims.get("operator"))
            except Refused:
                pass  # too old: a new visitor
        before = self._visits.get(visit.id)
        if before is not None:
            before.send({"type": "over", "reason": "elsewhere"})
            before.close(_ELSEWHERE, "This visit goes on in another window.")
        self._new.discard(visit)
        self._visits[visit.id] = visit
        self._welcome(visit, now)

    # what it hears

    def entries(self) -> tuple[list[tuple[Any, ...]], list[tuple[str, float]]]:
        """Who wants something, for `Lobby.sync`, and which turns were left; a leave is said three
        times, as an answer may be lost."""
        here = []
        for visit in self._visits.values():
            if visit.since is not None:
                here.append((visit.id, visit.since, visit.operator, visit.had, visit.until,
                             visit.missed))  # fmt: skip
                visit.missed = None
        leaves = list(self._leaves)
        self._leaves = {turn: n - 1 for turn, n in self._leaves.items() if n > 1}
        return here, leaves

    def apply(self, answer: Mapping[str, Any], asked: Mapping[str, float]) -> None:
        """What the lobby answered.

        Args:
            answer: of `Lobby.sync`.
            asked: since when each wanted something when the lobby was asked: what is about another
                turn is not for this one.
        """
        now = self._clock()
        self.replicas = answer["replicas"]
        if answer.get("house"):
            self.house = answer["house"]
        for visitor, state in answer["visitors"].items():
            visit = self._visits.get(visitor)
            if visit is not None and visit.since is not None and visit.since == asked[visitor]:
                self._tell(visit, tuple(state), now)

    def tick(self) -> None:
        """What time alone brings: tickets anew, sockets that never said hello."""
        now = self._clock()
        for visit in [v for v in self._new if now - v.began > HELLO]:
            self._new.discard(visit)
            visit.close(_REFUSED, "A page says hello first.")
        for visit in self._visits.values():
            if visit.welcomed != self.house.get("version"):
                self._welcome(visit, now)
            elif now - visit.renewed >= RENEWED:
                self._renew(visit, now)

    def _tell(self, visit: Visit, state: tuple[Any, ...], now: float) -> None:
        if state == visit.told:
            return
        before, visit.told = visit.told, state
        if state[0] == "go":
            _, replica, until, moved = state
            if replica not in self.replicas:
                visit.told = before
                return
            if before is not None and before[:3] == state[:3]:
                return
            visit.had, visit.until = replica, until
            direct = self.replicas[replica][1] if self._direct and not visit.secure else None
            visit.send({
                "type": "go", "ticket": self._stream(visit), "replica": replica, "direct": direct,
                "relay": f"/relay/{replica}", "moved": moved,
                "left_s": None if until is None else round(max(0.0, until - now), 1),
            })  # fmt: skip
            self._renew(visit, now)
        elif state[0] == "wait":
            _, place, of, wait_s, warming, moving = state
            if moving is not None and (before is None or before[0] == "go"):
                visit.send({"type": "moving", "reason": moving})
            if before is not None and before[0] == "go":
                visit.had = None
            visit.send({
                "type": "place", "place": place, "of": of, "warming": warming,
                "wait_s": None if wait_s is None else round(wait_s),
            })  # fmt: skip
        else:
            self._ended(visit, "full" if state[0] == "full" else state[1], now)

    def _ended(self, visit: Visit, reason: str, now: float) -> None:
        visit.since = visit.had = visit.until = visit.missed = visit.told = None
        visit.send({"type": "over", "reason": reason})
        self._renew(visit, now)

    def _welcome(self, visit: Visit, now: float) -> None:
        visit.welcomed = self.house.get("version")
        visit.renewed = now
        visit.send({
            "type": "welcome", "ticket": self._visit(visit), "fps": self._fps,
            "title": self._title or self.house.get("title", ""), "limit_s": self._limit_s,
            "inputs": self.house.get("inputs", []), "views": self.house.get("views", []),
            "camera": self.house.get("camera", True),
        })  # fmt: skip

    def _renew(self, visit: Visit, now: float) -> None:
        visit.renewed = now
        message = {"type": "ticket", "ticket": self._visit(visit)}
        if visit.had is not None:
            message["stream"] = self._stream(visit)
        visit.send(message)

    def _visit(self, visit: Visit) -> str:
        return self._tickets.make(
            VISIT, VISIT_S, id=visit.id, since=visit.since, replica=visit.had, until=visit.until,
            operator=visit.operator,
        )  # fmt: skip

    def _stream(self, visit: Visit) -> str:
        return self._tickets.make(
            STREAM, STREAM_S, id=visit.id, replica=visit.had, origin=visit.origin,
            until=visit.until, turn=visit.since,
        )  # fmt: skip


def is_operator(tickets: Tickets, ticket: str | None) -> bool:
    """Whether a ticket is an operator's."""
    try:
        tickets.read(ticket, OPERATOR)
        return True
    except Refused:
        return False
