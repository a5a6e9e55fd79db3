"""A gate without ComfyUI: it answers each camera frame with the same picture in its own colour."""

import asyncio
import contextlib
import io
import itertools
import json
import struct
import time
from typing import Any

from aiohttp import WSMsgType, web
from PIL import Image, ImageOps
from serving import served

messages = served("gate.messages")

HEADER = struct.Struct("<BBHIdII")
CAMERA, VIEW, COMPARED, JPEG = 1, 2, 3, 1
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (60, 90, 230)}
TAKEN_OVER, OVER = 4409, 4410
OWN = ("moving", "over", "refused")  # messages that a gate makes itself
LONGEST = 2000  # characters of a text


def wrong(given: dict, value) -> str | None:
    """What a gate says of a value that an input cannot take; None where it can."""
    kind, label = given["type"], given["label"]
    if kind == "text":
        if not isinstance(value, str) or len(value) > LONGEST:
            return f"{label}: a text of at most {LONGEST} characters is needed."
        if "forbidden" in value:
            return f"{label}: this is not a prompt for here; say something else."
    elif kind == "boolean" and not isinstance(value, bool):
        return f"{label}: on or off is needed."
    elif kind == "choice" and value not in given["options"]:
        return f"{label}: one of {', '.join(given['options'])} is needed."
    elif kind in ("number", "integer"):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"{label}: a number is needed."
        if not given["min"] <= value <= given["max"]:
            return f"{label}: a number from {given['min']} to {given['max']} is needed."
    return None


def coloured(jpeg: bytes, colour: tuple[int, int, int], size: tuple[int, int]) -> bytes:
    """A picture in one colour."""
    with Image.open(io.BytesIO(jpeg)) as picture:
        grey = ImageOps.fit(picture.convert("L"), size)
    return _jpeg(ImageOps.colorize(grey, (0, 0, 0), (255, 255, 255), mid=colour))


def _jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=85)
    return file.getvalue()


async def said(socket: web.WebSocketResponse, message: dict) -> None:
    """Send it as a real gate would: of ComfyUI's what a page may know, its own as they are."""
    told = message if message["type"] in OWN else messages.for_page(message, fps=1000)
    if told is not None:
        await socket.send_json(told)


class Run:
    """A stream at a gate."""

    def __init__(self, number: int, visitor: str, values: dict):
        self.session, self.token = f"s{number}", f"t{number}"
        self.visitor, self.values = visitor, dict(values)
        self.version, self.pictures, self.frames = 1, 0, 0
        self.socket: web.WebSocketResponse | None = None
        self.wire: asyncio.Transport | None = None  # below the socket
        self.compared: set[int] = set()
        self.latencies: list[float] = []


class Gate:
    """A replica's own port, or the same behind the ingress.

    Attributes:
        tickets: those that still open something; none for any.
        answers: False: it takes connections and says nothing, as behind a wall.
        start_s: what a start takes.
        first_s: from the start to the first picture.
    """

    def __init__(self, house: Any, name: str, colour: str):
        self.house, self.name, self.colour = house, name, COLOURS[colour]
        self.runs: dict[str, Run] = {}  # by session
        self.starts: list[dict] = []
        self.updates: list[dict] = []
        self.came: list[str] = []  # how each start came: direct or relay
        self.tickets: set[str] = set()
        self.draining = False
        self.dead = 0.0  # since when
        self.answers, self.start_s, self.first_s, self.size = True, 0.0, 0.0, (128, 128)
        self._numbers = itertools.count(1)
        self._site: web.AppRunner | None = None
        self.port = 0

    def routes(self, base: str = "") -> list[web.RouteDef]:
        return [
            web.post(f"{base}/livediffusion/{{what:start|update|stop}}", self._asked),
            web.options(f"{base}/livediffusion/{{what}}", self._preflight),
            web.get(f"{base}/livediffusion/stats", self._stats),
            web.get(f"{base}/livediffusion/frames", self._frames),
        ]

    async def open(self) -> None:
        app = web.Application(middlewares=[self._shared], client_max_size=1 << 20)
        app.add_routes(self.routes())
        self._site = web.AppRunner(app, shutdown_timeout=0.1)
        await self._site.setup()
        site = web.TCPSite(self._site, "127.0.0.1", 0)
        await site.start()
        self.port = self._site.addresses[0][1]

    async def close(self) -> None:
        for run in list(self.runs.values()):
            await self.end(run, "moved", tell=False, code=1001)
        if self._site is not None:
            await self._site.cleanup()

    async def kill(self) -> None:
        """As SIGKILL: sockets break without a word, and nothing answers any more."""
        self.dead = time.monotonic()
        for run in list(self.runs.values()):
            await self.cut(run)
        self.runs.clear()
        if self._site is not None:
            await self._site.cleanup()
            self._site = None

    async def cut(self, run: Run) -> None:
        """The page's connection breaks without a word."""
        if run.socket is not None and (transport := run.wire) is not None:
            transport.abort()

    async def tell(self, message: dict) -> None:
        for run in self.runs.values():
            if run.socket is not None:
                await said(run.socket, message)

    async def end(self, run: Run, reason: str, tell: bool = True, code: int = OVER) -> None:
        """As gate.stream's: no state, and its last word only for who has not ended it."""
        self.runs.pop(run.session, None)
        if run.socket is not None and not run.socket.closed:
            with contextlib.suppress(ConnectionError):
                if tell:
                    await said(run.socket, {"type": "over", "reason": reason})
            await run.socket.close(code=code)

    async def fail(self, run: Run, reason: str) -> None:
        """ComfyUI ends it by a failure."""
        await said(run.socket, {"type": "state", "state": "failed", "reason": reason})
        await self.end(run, "failed", tell=False)

    @web.middleware
    async def _shared(self, request: web.Request, handler) -> web.StreamResponse:
        """Another origin than the page's: what a browser wants to be told."""
        if not self.answers:
            await asyncio.sleep(30)
        try:
            reply = await handler(request)
        except web.HTTPException as failure:
            reply = failure
        if isinstance(reply, web.WebSocketResponse):
            return reply
        reply.headers.update({"Access-Control-Allow-Origin": self.house.url,
                              "Access-Control-Allow-Headers": "Content-Type",
                              "Vary": "Origin"})  # fmt: skip
        if isinstance(reply, web.HTTPException):
            raise reply
        return reply

    async def _preflight(self, request: web.Request) -> web.Response:
        return web.Response(status=204)

    def _visitor(self, request: web.Request) -> str:
        kind, _, rest = request.query.get("ticket", "").partition(".")
        visitor, replica, *_ = [*rest.split("."), ""]
        old = self.tickets and request.query["ticket"] not in self.tickets
        if kind != "stream" or replica != self.name or self.dead or old:
            raise web.HTTPForbidden(text='{"error": {"message": "This opens nothing here."}}')
        return visitor

    async def _asked(self, request: web.Request) -> web.Response:
        visitor, data = self._visitor(request), json.loads(await request.read())
        what = request.match_info["what"]
        if what == "start":
            return await self._start(request, visitor, data)
        run = self.runs.get(data["session"])
        if run is None or run.token != data["token"] or run.visitor != visitor:
            raise web.HTTPGone(text='{"error": {"message": "This live run is over."}}')
        if what == "stop":
            await self.end(run, "left", tell=False)
            return web.json_response({"state": "ended"})
        self.updates.append(data["prompt"]["values"])
        if refused := self._refused(data["prompt"]["values"]):
            return refused
        run.values |= data["prompt"]["values"]
        run.version += 1
        return web.json_response({"version": run.version, **self._described()})

    async def _start(self, request: web.Request, visitor: str, data: dict) -> web.Response:
        await asyncio.sleep(self.start_s)
        values = data["prompt"]["values"]
        self.starts.append(values)
        self.came.append("relay" if request.path.startswith("/relay/") else "direct")
        if refused := self._refused(values):
            return refused
        for run in [run for run in self.runs.values() if run.visitor == visitor]:
            await self.end(run, "again", tell=False)
        run = Run(next(self._numbers), visitor, values)
        self.runs[run.session] = run
        return web.json_response(
            {"session": run.session, "token": run.token, "prompt_id": "p", "version": 1, "ahead": 0,
             **self._described()}
        )  # fmt: skip

    def _refused(self, values: dict) -> web.Response | None:
        known = {given["name"]: given for given in self.house.inputs}
        for name, value in values.items():
            reason = wrong(known[name], value) if name in known else f"There is no input {name}."
            if reason:
                return web.json_response({"error": {"message": reason}}, status=400)
        return None

    def _described(self) -> dict:
        wide, high = self.size
        camera = {"node": "1", "source": "browser", "width": wide, "height": high, "fps": 15}
        return {
            "cameras": [camera] if self.house.camera else [],
            "views": [{"node": one["node"], "index": i} for i, one in enumerate(self.house.views)],
            "idle": [],
        }

    async def _stats(self, request: web.Request) -> web.Response:
        self._visitor(request)
        return web.json_response({})

    async def _frames(self, request: web.Request) -> web.WebSocketResponse:
        visitor = self._visitor(request)
        run = self.runs.get(request.query.get("session", ""))
        if run is None or run.visitor != visitor:
            raise web.HTTPGone(text='{"error": {"message": "This live run is over."}}')
        socket = web.WebSocketResponse(max_msg_size=1 << 22)
        await socket.prepare(request)
        run.socket, run.wire = socket, request.transport
        run.compared.clear()  # each socket of a page says its own
        await said(socket, {"type": "state", "state": "starting", "ahead": 0})
        wide, high = self.size
        pace = {"camera": 0, "interval_ms": 100, "width": wide, "height": high}
        await said(socket, {"type": "pace", **pace})
        began, beat = time.monotonic(), asyncio.create_task(self._beat(run))
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    self._hear(run, json.loads(message.data))
                elif time.monotonic() - began >= self.first_s:
                    await self._answer(run, message.data)
                else:
                    await said(socket, {"type": "received", "seq": 0, "camera": 0, "refused": None})
        except ConnectionError:
            pass
        finally:
            beat.cancel()
            if run.socket is socket:
                run.socket = None
        return socket

    def _hear(self, run: Run, message: dict) -> None:
        if message["type"] == "compare":
            change = run.compared.add if message["on"] else run.compared.discard
            change(message["view"])
        elif message["type"] == "shown":
            run.pictures += 1
            if message.get("latency_ms") is not None:
                run.latencies.append(message["latency_ms"])

    async def _answer(self, run: Run, data: bytes) -> None:
        """A camera's frame, as pictures."""
        sequence, captured = HEADER.unpack_from(data)[3:5]
        await said(run.socket, {"type": "received", "seq": sequence, "camera": 0, "refused": None})
        await self._pictures(run, data[HEADER.size :], sequence, captured)

    async def _pictures(self, run: Run, jpeg: bytes, sequence: int, captured: float) -> None:
        if run.frames == 0:
            await said(run.socket, {"type": "state", "state": "live", "ahead": 0})
        run.frames += 1
        made = coloured(jpeg, self.colour, self.size)
        for view in range(len(self.house.views)):
            both = view in run.compared
            head = HEADER.pack(COMPARED if both else VIEW, JPEG, view, run.frames, captured,
                               run.version, sequence)  # fmt: skip
            body = struct.pack("<I", len(made)) + made + self._cut(jpeg) if both else made
            await run.socket.send_bytes(head + body)

    def _cut(self, jpeg: bytes) -> bytes:
        with Image.open(io.BytesIO(jpeg)) as picture:
            return _jpeg(ImageOps.fit(picture.convert("RGB"), self.size))

    async def _beat(self, run: Run) -> None:
        """Figures twice a second, and pictures where there is no camera."""
        plain = _jpeg(Image.linear_gradient("L"))
        for turn in itertools.count():
            await asyncio.sleep(0.1)
            if not self.house.camera:
                await self._pictures(run, plain, turn, 1000 * time.time())
            if turn % 5 == 4:
                mid = sorted(run.latencies[-20:])[len(run.latencies[-20:]) // 2 :][:1]
                spread = {"p50": mid[0]} if mid else None
                figures = {"fps": 14.8, "latency_ms": spread, "skipped": 0, "dropped": 0}
                await said(run.socket, {"type": "stats", "state": "live", **figures})
