"""The one address: pages, visitors' sockets, the operator's page, the way to replicas.

FastAPI on Serve; as many processes as there are `ingresses`, each stateless: what it knows of a
visitor is in the ticket that the visitor's page has. All of its visitors are told to the lobby in
one call, four times a second.

Frames take the replica's own port where a page can reach it ("direct"), else they are relayed
(relay.py). Measured by benchmarks/serve_ways.py, 30 kB, there and back, p50: direct 0.3 ms, relayed
1 ms in Serve's HAProxy mode, where HAProxy hands a page's connection to this process, and 3.5 ms
through Serve's own proxy, which passes each message on as a call. So HAProxy mode is the default
where its binary is (main.py); with it, one address suffices.
"""

import asyncio
import contextlib
import functools
import json
import time
import urllib.parse
from typing import Any

from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
)

from trust import boundary

from ..access import Door, cookie, elsewhere, once_more
from ..settings import Settings
from ..tickets import Refused, Tickets, decoded
from .operators import from_form, operators_page
from .pages import files, headers
from .relay import Relay, refuse
from .visits import LONGEST, Full, TooMuch, Visit, Visits, is_operator

EVERY = 0.25  # seconds between two calls of the lobby
LATE = 2.0  # seconds in which it answers
SOCKETS = 4000  # of visitors, of one ingress
QUEUED = 100  # messages for a page that does not take them
_REFUSED = 4008


class Ingress:
    """Args:
    settings: of the house.
    lobby: its handle.
    """

    async def __init__(self, settings: Settings, lobby: Any):
        without_packing()
        self._settings = settings
        self._lobby = lobby
        self._tickets = Tickets(decoded(settings.key))
        self._door = Door(self._tickets, settings.secure)
        self._visits = Visits(self._tickets, settings.title, settings.fps, settings.limit_s,
                              settings.direct, SOCKETS, settings.per_address)  # fmt: skip
        self._relay = Relay(self._tickets, self._gate, 2 * SOCKETS)
        self._files = files()
        local = urllib.parse.urlsplit(f"//{settings.host}").hostname if settings.local() else ""
        self._headers = headers(settings.direct and not settings.secure, local or "")
        self._heard = 0.0  # when the lobby answered last
        self._loop = asyncio.ensure_future(self._syncing())

    def check_health(self) -> None:
        """Raises RuntimeError when nothing is told to the lobby any more."""
        if self._loop.done():
            raise RuntimeError("The ingress does not talk to the lobby any more.")

    def _gate(self, replica: str) -> str | None:
        known = self._visits.replicas.get(replica)
        return known[0] if known else None

    async def _syncing(self) -> None:
        while True:
            began = time.monotonic()
            here, leaves = self._visits.entries()
            asked = {entry[0]: entry[1] for entry in here}
            with contextlib.suppress(Exception):  # the lobby is not there: asked again
                answer = await asyncio.wait_for(
                    self._lobby.sync.remote(here, leaves, self._visits.house.get("version", "")),
                    LATE,
                )
                self._heard = time.monotonic()
                self._visits.apply(answer, asked)
            self._visits.tick()
            await asyncio.sleep(max(0.01, EVERY - (time.monotonic() - began)))

    # what the address answers

    def __serve_build_asgi_app__(self):
        """What Serve calls once this is made: FastAPI, and before it the way to the gates."""
        front = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        front.add_api_route("/healthz", self._health, methods=["GET"])
        front.add_api_route("/operator", self._operators, methods=["GET"])
        front.add_api_route("/operator/state", self._state, methods=["GET"])
        front.add_api_route("/operator/order", self._order, methods=["POST"])
        front.add_api_websocket_route("/visit", self._visitor)
        front.add_api_route("/{name:path}", self._file, methods=["GET", "HEAD"])

        async def asked(scope: Any, receive: Any, send: Any) -> None:
            relayed = scope["type"] != "lifespan" and scope["path"].startswith("/relay/")
            if scope["type"] == "http":
                send = self._door.renewing(scope, send)
            await (self._relay if relayed else front)(scope, receive, send)

        return asked

    async def _health(self):
        well = time.monotonic() - self._heard < 10
        return JSONResponse({"ok": well, "replicas": len(self._visits.replicas)},
                            status_code=200 if well else 503)  # fmt: skip

    async def _file(self, request: Request):
        found = self._files.get(request.url.path)
        if found is None:
            return PlainTextResponse("There is nothing here.", 404, headers=self._headers)
        head = {**self._headers, "ETag": found.tag, "Vary": "Accept-Encoding"}
        if request.headers.get("if-none-match") == found.tag:
            return Response(status_code=304, headers=head)
        packed = found.packed and "gzip" in request.headers.get("accept-encoding", "")
        if packed:
            head["Content-Encoding"] = "gzip"
        return Response(found.packed if packed else found.data, headers=head,
                        media_type=found.kind)  # fmt: skip

    # visitors

    async def _visitor(self, socket: WebSocket):
        if (reason := boundary.stranger(socket.headers)) is not None:
            await refuse(socket.scope, None, socket.send, 403, reason)
            return
        # also one too many: a socket that is not accepted tells a browser's page nothing
        await socket.accept()
        queue: asyncio.Queue[dict[str, Any] | tuple[int, str]] = asyncio.Queue(QUEUED)
        visit = Visit(
            functools.partial(_put, queue), lambda code, why: _put(queue, (code, why)),
            socket.headers.get("origin", ""), is_operator(self._tickets, cookie(socket.scope)),
            self._settings.secure or socket.headers.get("origin", "").startswith("https:"),
            self._address(socket),
        )  # fmt: skip
        writing = asyncio.ensure_future(_written(queue, socket))
        try:
            self._visits.opened(visit)
            reading = asyncio.ensure_future(self._read(socket, visit))
            await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            if reading.done() and not reading.cancelled() and (error := reading.exception()):
                raise error
        except TooMuch as reason:
            full = isinstance(reason, Full)
            _put(queue, {"type": "refused", "reason": str(reason), "full": full})
            _put(queue, (_REFUSED, str(reason)))
            with contextlib.suppress(Exception):
                await asyncio.wait_for(writing, 2)
        except WebSocketDisconnect:
            pass
        finally:
            writing.cancel()
            self._visits.closed(visit)

    async def _read(self, socket: Any, visit: Visit) -> None:
        while True:
            message = await socket.receive()
            if message["type"] != "websocket.receive":
                raise WebSocketDisconnect(message.get("code", 1000))
            text = message.get("text")
            if text is None or len(text) > LONGEST:
                raise TooMuch(f"A message is JSON text of {LONGEST} bytes at most.")
            self._visits.heard(visit, text.encode())

    def _address(self, socket: Any) -> str:
        """Who a visitor is for counting; empty for this machine itself, whoever that stands for."""
        if self._settings.address_header:
            # each proxy on the way adds whom it heard; the last one is ours
            host = socket.headers.get(self._settings.address_header, "").rpartition(",")[2].strip()
        else:
            host = socket.client.host if socket.client else ""
        return "" if host.startswith("127.") or host == "::1" else host

    # operators

    def _operator(self, request: Any) -> dict[str, Any]:
        """What the operator's ticket that a request came with says.

        Raises:
            Refused: there is none that opens this.
        """
        return self._door.opened(request.query_params.get("ticket"), cookie(request.scope))

    def _refused(self, reason: object):
        return PlainTextResponse(str(reason), 403, headers=self._headers)

    async def _operators(self, request: Request):
        try:
            claims = self._operator(request)
        except Refused as reason:
            if elsewhere(request.method, request.headers) and "ticket" not in request.query_params:
                return HTMLResponse(once_more("/operator"), headers=self._headers)
            return self._refused(reason)
        if "ticket" in request.query_params:
            # out of the address, and of whatever remembers addresses
            answer = RedirectResponse("/operator", 303, headers=self._headers)
            answer.headers["Set-Cookie"] = self._door.cookie(claims)
            answer.headers["Cache-Control"] = "no-store"
            return answer
        try:
            state = await asyncio.wait_for(self._lobby.state.remote(), LATE)
        except Exception:
            state = None
        return HTMLResponse(operators_page(state), headers=headers(False, styled=True))

    async def _state(self, request: Request):
        try:
            self._operator(request)
        except Refused as reason:
            return self._refused(reason)
        state = await asyncio.wait_for(self._lobby.state.remote(), LATE)
        return JSONResponse(json.loads(json.dumps(state, default=str)), headers=self._headers)

    async def _order(self, request: Request):
        try:
            self._operator(request)
        except Refused as reason:
            return self._refused(reason)
        if (reason := boundary.stranger(request.headers)) is not None:
            return self._refused(reason)
        data = b""
        async for part in request.stream():
            data += part
            if len(data) > 4096:
                return PlainTextResponse("An order has 4096 bytes at most.", 413)
        form = not data.lstrip().startswith(b"{")
        try:
            order = from_form(data) if form else json.loads(data)
            if not isinstance(order, dict):
                raise ValueError("An order is a JSON object.")
            done = await asyncio.wait_for(self._lobby.order.remote(order), LATE)
        except asyncio.TimeoutError:
            return PlainTextResponse("The lobby does not answer: try again.", 503)
        except Exception as reason:
            # Ray puts its own words around what the lobby raised
            said = str(getattr(reason, "cause", None) or reason).strip().splitlines()[-1]
            return PlainTextResponse(said, 400, headers=self._headers)
        if form:
            return RedirectResponse("/operator", 303, headers=self._headers)
        return PlainTextResponse(done, headers=self._headers)


def _put(queue: asyncio.Queue, message: Any) -> None:
    """For the page; one that does not take its messages is let go."""
    try:
        queue.put_nowait(message)
    except asyncio.QueueFull:
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait((_REFUSED, "This page does not take what it is told."))


async def _written(queue: asyncio.Queue, socket: Any) -> None:
    while True:
        message = await queue.get()
        if isinstance(message, tuple):
            await socket.close(message[0], message[1][:120])
            return
        await socket.send_text(json.dumps(message))


def without_packing() -> None:
    """Frames are JPEG: this process's web server is not to pack each again (permessage-deflate),
    which browsers ask for and uvicorn grants by default. Serve has no setting for it."""
    import uvicorn

    if not isinstance(uvicorn.Config, functools.partial):
        uvicorn.Config = functools.partial(uvicorn.Config, ws_per_message_deflate=False)
