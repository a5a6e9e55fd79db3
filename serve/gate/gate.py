"""The gate: a replica's port. Whoever has a ticket speaks the pack's live protocol through it.

A visitor's ticket opens one session of this replica and nothing else; an operator's opens the rest
of ComfyUI. The routes are the pack's own (docs/live.md, "On the wire"), with `ticket` in the query.
"""

import asyncio
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import aiohttp
from aiohttp import web

from trust import boundary, schema

from .. import tickets
from .doors import HEADERS, Doors, No, body, said
from .proxy import Proxy
from .stream import LARGEST, Log, Stream

_ROUTES = {
    "/livediffusion/start": "POST", "/livediffusion/update": "POST", "/livediffusion/stop": "POST",
    "/livediffusion/stats": "GET", "/livediffusion/frames": "GET",
}  # fmt: skip
_REQUEST = schema.Limits(bytes=2**18, depth=6, items=4000)
_VALUES = schema.table(schema.text(256), schema.anything, 256)
_PROMPT = schema.record({"values": _VALUES}, others=True)
_START = schema.record({"prompt": _PROMPT}, others=True)
_KEYS = {"session": schema.anything, "token": schema.anything}
_UPDATE = schema.record({"prompt": _PROMPT}, _KEYS, others=True)
_STOP = schema.record({}, _KEYS, others=True)
_ID = schema.text(64, r"[\w.-]+")
_KEPT_S = 600.0  # seconds that a turn that ended is known: longer than its tickets are good for
_MOST_KEPT = 10_000
_PREFLIGHT_S = "600"
_LOOK_S = 0.1
_NONE = {"fps": 0.0, "tick_s": None, "latency_ms": None, "frames": 0, "seconds": 0.0}


class Gate:
    """A replica's port.

    Args:
        comfyui: see comfyui.ComfyUI.
        exposed: what visitors may set, and the graph with it; see workflow.Exposed.
        house: reads tickets.
        replica_id: the one that tickets name.
        fps: frames a second that a stream is given.
        changed: called in the event loop after a change of what `report` says.
        log: called with an event's name and fields, for the operator.
    """

    def __init__(
        self, comfyui: Any, exposed: Any, house: tickets.Tickets, replica_id: str, fps: float,
        changed: Callable[[], None] = lambda: None, log: Log = lambda event, **fields: None,
    ):  # fmt: skip
        self.draining = False
        self._comfyui, self._exposed, self._house = comfyui, exposed, house
        self._id, self._fps, self._changed, self._log = replica_id, fps, changed, log
        self._stream: Stream | None = None
        self._starting = asyncio.Lock()
        self._renewing: tuple[str, Any] | None = None  # the visitor whose stream begins anew, turn
        self._spent: OrderedDict[tuple[str, Any], float] = OrderedDict()  # visitors and turns
        self._tick: float | None = None
        self._doors = Doors(self._answer, self._bug)
        self._http: aiohttp.ClientSession | None = None
        self._proxy: Proxy | None = None

    # -- what the replica asks --------------------------------------------------------------

    async def start(self, host: str, port: int = 0) -> int:
        """Listen; returns the port. Raises OSError where it is taken."""
        port = await self._doors.open(host, port)
        self._http = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        self._proxy = Proxy(self._comfyui, self._house)
        self._comfyui.changed.append(self._changed)
        return port

    async def stop(self) -> None:
        """End what runs, and listen no more."""
        if self._stream is not None:
            stream = self._stream
            stream.end("moved", tell=False, code=1001)
            await stream.ended()
        await self._doors.close()
        for one in (self._http, self._proxy):
            if one is not None:
                await one.close()
        if self._changed in self._comfyui.changed:
            self._comfyui.changed.remove(self._changed)

    async def drain(self, seconds: float) -> None:
        """Take nobody more and have the visitor go; returns when they are gone, or it is time."""
        self.draining = True
        self._changed()
        until = time.monotonic() + seconds
        if self._stream is not None:
            self._stream.drain()
        while self._stream is not None and time.monotonic() < until:
            await asyncio.sleep(_LOOK_S)

    async def end(self, visitor: str, turn: Any, reason: str) -> bool:
        """End the stream of a visitor's turn; its tickets open nothing more.

        Another turn of the same visitor goes on. Returns whether there was a stream.
        """
        self._spend((visitor, turn))
        stream = self._stream
        if stream is None or (stream.visitor, stream.turn) != (visitor, turn):
            return False
        stream.end(reason)
        await stream.ended()
        return True

    def report(self) -> dict[str, Any]:
        """How it stands.

        Returns:
            streams: of each visitor's stream its turn and its figures: fps, tick_s, latency_ms,
                frames, seconds.
            tick_s: the last that a stream took, None before the first. ready: a stream can begin.
            draining, restarts (of ComfyUI), failed (why there is no ComfyUI, or None), memory.
        """
        stream = self._stream
        streams = {}
        if stream is not None:
            streams = {stream.visitor: self._figures(stream)}
            self._tick = stream.tick_s or self._tick
        if self._renewing is not None:
            # a page that was reloaded: one that is reported to be gone would lose its place
            visitor, turn = self._renewing
            streams.setdefault(visitor, {**_NONE, "turn": turn})
        return {
            "streams": streams, "tick_s": self._tick, "draining": self.draining,
            "ready": self._comfyui.alive and not self.draining,
            "restarts": self._comfyui.restarts, "failed": self._comfyui.failed,
            "memory": self._comfyui.memory(),
        }  # fmt: skip

    def _figures(self, stream: Stream) -> dict[str, Any]:
        stats = stream.stats
        return {
            "turn": stream.turn, "fps": stats.get("fps", 0.0), "tick_s": stream.tick_s,
            "latency_ms": (stats.get("latency_ms") or {}).get("p50"),
            "frames": stats.get("frames", 0), "seconds": time.monotonic() - stream.began,
        }  # fmt: skip

    # -- who asks ---------------------------------------------------------------------------

    def _bug(self, path: str, reason: BaseException) -> None:
        self._log("bug", path=path[:100], why=repr(reason))

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        # an operator's page of ComfyUI asks for the same routes, without a ticket in the address
        if path in _ROUTES and "ticket" in request.query:
            return await self._visitor(request, path)
        return await self._proxy.answer(request)

    async def _visitor(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        given = request.query.getall("ticket")
        try:
            claims = self._house.read(given[0] if len(given) == 1 else None, tickets.STREAM)
            visitor = _ID(claims.get("id"), "id")
        except ValueError as reason:
            raise No(403, str(reason)) from None
        if claims.get("replica") != self._id:
            raise No(403, "This ticket is for another replica.")
        allowed = _origin(request, claims.get("origin"))
        try:
            if request.method == "OPTIONS":
                answer: web.StreamResponse = _preflight(_ROUTES[path])
            elif request.method != _ROUTES[path]:
                raise No(405, "This method is not taken.")
            else:
                turn = visitor, claims.get("turn")
                route = getattr(self, f"_{path.rpartition('/')[2]}")
                answer = await route(request, turn, claims.get("until"))
        except No as reason:
            answer = reason.answer()
        if allowed is not None and not answer.prepared:
            answer.headers["Access-Control-Allow-Origin"] = allowed
            answer.headers["Vary"] = "Origin"
        return answer

    # -- what a visitor may -----------------------------------------------------------------

    async def _start(self, request, turn, until) -> web.StreamResponse:
        data = _read(_START, await body(request, _REQUEST))
        values = self._checked(data["prompt"]["values"])
        left = _left(until)
        async with self._starting:
            if self._is_spent(turn):
                raise No(403, "This turn is over: open the house's page again.")
            if self.draining:
                raise No(503, "This replica is going. Ask for another.")
            if not self._comfyui.alive:
                raise No(503, "ComfyUI is not there at the moment. Try again.")
            before = self._stream
            if before is not None:
                if before.visitor != turn[0]:
                    raise No(409, "Somebody else's stream runs here. Ask for another replica.")
                self._renewing = turn
                before.end("again", tell=False)
            try:
                return await self._begin(before, turn, values, left)
            finally:
                self._renewing = None
                self._changed()

    async def _begin(self, before, turn, values, left) -> web.StreamResponse:
        """Another stream, when the one before is over."""
        if before is not None:
            await before.ended()
        stream = Stream(
            self._comfyui, self._http, self._exposed, *turn, values, self._fps, self._log,
            self._over, self._changed,
        )  # fmt: skip
        self._stream = stream
        try:
            begun = await stream.begin(left)
        except BaseException:
            self._stream = None
            raise
        self._log("started", visitor=stream.visitor)
        return said(begun)

    async def _update(self, request, turn, until) -> web.StreamResponse:
        data = _read(_UPDATE, await body(request, _REQUEST))
        stream = self._theirs(data, turn)
        whole = {**stream.values, **data["prompt"]["values"]}
        return said(await stream.update(self._checked(whole)))

    async def _stop(self, request, turn, until) -> web.StreamResponse:
        stream = self._theirs(_read(_STOP, await body(request, _REQUEST)), turn)
        stream.end("left", tell=False)
        return said({"state": "ended"})

    async def _stats(self, request, turn, until) -> web.StreamResponse:
        return said(self._theirs(request.query, turn).figures())

    async def _frames(self, request, turn, until) -> web.StreamResponse:
        stream = self._theirs(request.query, turn)
        # a frame that is too large is refused by itself, one that is much too large with its socket
        socket = web.WebSocketResponse(
            max_msg_size=2 * LARGEST, autoping=False, compress=False, timeout=2.0
        )
        if not socket.can_prepare(request):
            raise No(400, "A WebSocket is expected.")
        await socket.prepare(request)
        await stream.serve(socket, request)
        if not socket.closed:
            await socket.close()
        return socket

    def _theirs(self, data: Any, turn: tuple[str, Any]) -> Stream:
        """The stream that a request names, has the token of, and a ticket of its visitor for."""
        session, token = data.get("session"), data.get("token")
        if not (boundary.is_key(session) and boundary.is_key(token)):
            raise No(403, "session or token is missing")
        stream = self._stream
        if stream is None:
            raise No(410, "This live run is over.")
        known = hmac.compare_digest(stream.id, session) & hmac.compare_digest(stream.token, token)
        if not known or stream.visitor != turn[0] or self._is_spent(turn):
            raise No(403, "This is another live run's.")
        return stream

    def _checked(self, values: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._exposed.check(values)
        except ValueError as reason:
            raise No(400, str(reason)) from None

    # -- turns that are over ----------------------------------------------------------------

    def _over(self, stream: Stream) -> None:
        self._tick = stream.tick_s or self._tick
        if self._stream is stream:
            self._stream = None
        if stream.reason != "again":
            self._spend((stream.visitor, stream.turn))
            self._log(
                "ended", visitor=stream.visitor, reason=stream.reason,
                seconds=time.monotonic() - stream.began, frames=stream.stats.get("frames", 0),
            )  # fmt: skip
        self._changed()

    def _spend(self, turn: tuple[str, Any]) -> None:
        now = time.time()
        self._spent[turn] = now
        self._spent.move_to_end(turn)
        while self._spent and (
            len(self._spent) > _MOST_KEPT or now - next(iter(self._spent.values())) > _KEPT_S
        ):
            self._spent.popitem(last=False)

    def _is_spent(self, turn: tuple[Any, Any]) -> bool:
        since = turn[1]
        if since is not None and (isinstance(since, bool) or not isinstance(since, (int, float))):
            return True
        return turn in self._spent


def _read(check: schema.Schema, data: Any) -> Any:
    try:
        return check(data, "request")
    except schema.BadData as reason:
        raise No(400, str(reason)) from None


def _left(until: Any) -> float | None:
    """Seconds that a visitor has. Raises No."""
    if until is None:
        return None
    if isinstance(until, bool) or not isinstance(until, (int, float)):
        raise No(403, "This is not a ticket.")
    if (left := until - time.time()) <= 0:
        raise No(403, "The time of this turn is over.")
    return left


def _origin(request: web.BaseRequest, claimed: Any) -> str | None:
    """The page's origin if it is the one that the ticket was made for and another than this port's.

    Raises No for any other page's; a program that is no browser says none.
    """
    origin = request.headers.get("Origin")
    if origin is not None and origin == claimed:
        return origin
    if (reason := boundary.stranger(request.headers)) is not None:
        raise No(403, reason)
    return None


def _preflight(method: str) -> web.Response:
    headers = {
        **HEADERS,
        "Access-Control-Allow-Methods": method,
        "Access-Control-Allow-Headers": "content-type",
        "Access-Control-Max-Age": _PREFLIGHT_S,
    }
    return web.Response(status=204, headers=headers)
