"""The way to a replica's gate through the one address: `/relay/<replica>/...`, HTTP and WebSocket.

A plain ASGI application: what passes is not looked into, and each message waits until the far end
took the one before, so nothing piles up. Who may pass is asked twice, here and at the gate: a
stream's ticket opens the live routes of its own replica, an operator's all of ComfyUI.

Why a port of the gate behind it, and not a request of Serve's to the replica: a frame as a call of
a handle costs 5 to 7 ms more (benchmarks/serve_ways.py), and a replica with requests that never end
is cut at the end of its time instead of being told that it is to go. Why not Serve's routers,
`session_id` with ConsistentHashRouter or one of our own: a hash picks a replica without asking
whether it has room, and a router sees requests, not measured ticks. Admission picks, the ticket
names the replica, and there is nothing left to route.
"""

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, quote

import aiohttp

from ..access import COOKIE, cookie, words
from ..closing import GOING_AWAY, passed_on
from ..tickets import OPERATOR, STREAM, Refused, Tickets

LARGEST = 8 << 20  # bytes of a message; a frame has 4 MiB at most
BODY = 64 * 1024  # bytes of a visitor's request
_OPERATORS_BODY = 512 << 20
_SOCKETS = 4  # of a visitor at a time: frames, and while one is replaced another
_REQUESTS = 8
_CONNECT = 5.0  # seconds
_ANSWERED = 40.0  # seconds of a visitor's request; its page waits 35, the gate 30 for ComfyUI
_PATH = re.compile(r"/relay/([A-Za-z0-9_-]{1,64})(/.*)")
_LIVE = re.compile(r"/livediffusion/[a-z]{1,20}")
# headers that belong to one connection, and those that the far end must not believe; of what a
# proxy before this says, X-Forwarded-Host passes, or an operator behind one would be a stranger to
# the gate: another site's page cannot send it (trust/boundary.py)
_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"content-length", b"accept-encoding", b"cookie",
    b"x-forwarded-for", b"x-forwarded-proto", b"forwarded", b"x-real-ip",
    b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-extensions",
    b"sec-websocket-protocol", b"expect",
})  # fmt: skip
Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Answer(Exception):
    """A request that is answered here."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Relay:
    """Args:
    tickets: of the house.
    replicas: where the gate of each replica is, as host:port.
    most: sockets that may be open.
    """

    def __init__(self, tickets: Tickets, replicas: Callable[[str], str | None], most: int):
        self._tickets, self._replicas, self._most = tickets, replicas, most
        self._client: aiohttp.ClientSession | None = None
        self._sockets: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            address, who, operator = self._allowed(scope)
            passes, counted, most = (
                (self._socket, self._sockets, _SOCKETS) if scope["type"] == "websocket"
                else (self._request, self._requests, _REQUESTS)
            )  # fmt: skip
            # a page of ComfyUI's own has more open at a time than a visitor's
            if counted[who] >= most * (8 if operator else 1) or counted.total() >= self._most:
                raise Answer(429, "There are too many connections of this visitor already.")
            counted[who] += 1
            try:
                await passes(address, operator, scope, receive, send)
            finally:
                counted[who] -= 1
                counted += Counter()  # what is 0 is not kept
        except Answer as answer:
            await refuse(scope, receive, send, answer.status, answer.reason)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    def _allowed(self, scope: Scope) -> tuple[str, str, bool]:
        """Where it goes, whose it is, whether an operator's.

        Raises:
            Answer: it goes nowhere.
        """
        matched = _PATH.fullmatch(scope["path"])
        if matched is None:
            raise Answer(404, "There is nothing here.")
        replica, path = matched.groups()
        asked = parse_qs(scope.get("query_string", b"").decode("latin-1"), max_num_fields=50)
        ticket = asked.get("ticket", [""])[0]
        try:
            claims = self._tickets.read(ticket or cookie(scope), OPERATOR)
            operator = True
        except Refused as unopened:
            if not ticket and cookie(scope):
                raise Answer(403, words(unopened)) from None
            try:
                claims, operator = self._tickets.read(ticket, STREAM), False
            except Refused as reason:
                raise Answer(403, str(reason)) from None
        if not operator and (claims.get("replica") != replica or not _LIVE.fullmatch(path)):
            raise Answer(403, "This ticket opens something else.")
        address = self._replicas(replica)
        if address is None:
            raise Answer(503, "This replica is not there.")
        query = scope.get("query_string", b"").decode("latin-1")
        # a path as it was asked for: what is behind may tell %2F from /
        raw = scope.get("raw_path") or quote(path).encode()
        raw = raw.partition(b"?")[0].decode("latin-1")
        rest = raw[raw.index(replica) + len(replica):] if replica in raw else quote(path)
        return f"http://{address}{rest}{'?' + query if query else ''}", str(claims["id"]), operator

    def _headers(self, scope: Scope, operator: bool) -> list[tuple[str, str]]:
        kept = [(name.decode("latin-1"), value.decode("latin-1"))
                for name, value in scope["headers"] if name.lower() not in _HOP]  # fmt: skip
        if operator and (held := cookie(scope)):
            kept.append(("Cookie", f"{COOKIE}={held}"))
        return kept

    def _session(self) -> aiohttp.ClientSession:
        if self._client is None:
            self._client = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60),
                cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT),
            )  # fmt: skip
        return self._client

    async def _request(
        self, address: str, operator: bool, scope: Scope, receive: Receive, send: Send
    ) -> None:
        body = _body(receive, _OPERATORS_BODY if operator else BODY)
        if not operator:
            # small, so at once: too much is said before anything is passed on
            body = b"".join([part async for part in body])
        elif scope["method"] in ("GET", "HEAD"):
            body = None
        try:
            async with self._session().request(
                scope["method"], _as_is(address), data=body, allow_redirects=False,
                headers=self._headers(scope, operator), skip_auto_headers=["User-Agent"],
                timeout=aiohttp.ClientTimeout(
                    total=None if operator else _ANSWERED, sock_connect=_CONNECT
                ),
            ) as answer:  # fmt: skip
                head = [(name.lower(), value) for name, value in answer.raw_headers
                        if name.lower() not in _HOP or name.lower() == b"content-length"]
                await send({"type": "http.response.start", "status": answer.status,
                            "headers": head})  # fmt: skip
                async for part in answer.content.iter_any():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except (aiohttp.ClientConnectorError, asyncio.TimeoutError):
            raise Answer(503, "This replica cannot be reached.") from None

    async def _socket(
        self, address: str, operator: bool, scope: Scope, receive: Receive, send: Send
    ) -> None:
        await receive()  # websocket.connect
        try:
            far = await self._session().ws_connect(
                _as_is(address), headers=self._headers(scope, operator), max_msg_size=LARGEST,
                compress=0, autoclose=True, protocols=tuple(scope.get("subprotocols") or ()),
            )  # fmt: skip
        except aiohttp.WSServerHandshakeError as error:
            raise Answer(error.status, "The replica refused this connection.") from None
        except (aiohttp.ClientError, asyncio.TimeoutError):
            raise Answer(503, "This replica cannot be reached.") from None
        left: int | None = None
        try:
            await send({"type": "websocket.accept", "subprotocol": far.protocol})
            tasks = [asyncio.ensure_future(one) for one in (_up(receive, far), _down(far, send))]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                code = far.close_code if tasks[1].done() else None
                if tasks[0].done() and not tasks[0].exception():
                    left = tasks[0].result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(Exception):  # whoever left first hears no goodbye
                await send({"type": "websocket.close", "code": passed_on(code)})
        finally:
            # the gate keeps the stream of a page that was closed for less time than a lost one's
            await far.close(code=GOING_AWAY if left == GOING_AWAY else 1000)


async def _up(receive: Receive, far: aiohttp.ClientWebSocketResponse) -> int | None:
    """Until the page is gone; the code that it left with."""
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("bytes") is not None:
            await far.send_bytes(message["bytes"])
        else:
            await far.send_str(message["text"])
    return message.get("code")


async def _down(far: aiohttp.ClientWebSocketResponse, send: Send) -> None:
    async for message in far:
        if message.type is aiohttp.WSMsgType.BINARY:
            await send({"type": "websocket.send", "bytes": message.data})
        elif message.type is aiohttp.WSMsgType.TEXT:
            await send({"type": "websocket.send", "text": message.data})


async def _body(receive: Receive, most: int):
    """A request's body in parts.

    Raises:
        Answer: it is larger than `most` bytes.
    """
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Answer(400, "The connection broke.")
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise Answer(413, f"A request has {most} bytes at most.")
        if part:
            yield part
        if not message.get("more_body"):
            return


def _as_is(address: str) -> Any:
    from yarl import URL

    return URL(address, encoded=True)


async def refuse(scope: Scope, receive: Receive, send: Send, status: int, reason: str) -> None:
    """An answer in one sentence; a socket is not opened."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 4000 + status, "reason": reason[:120]})
        return
    head = [(b"content-type", b"text/plain; charset=utf-8"),
            (b"x-content-type-options", b"nosniff")]  # fmt: skip
    with contextlib.suppress(Exception):  # headers may have gone already
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": reason.encode()})
