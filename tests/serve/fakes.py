"""The house without Ray and without ComfyUI: an ingress and gates that speak its protocols.

`House` serves the visitor's page and the pack's own modules, has a line, and sends visitors to
gates (fake_gate.py). All of it runs in one thread with a loop of its own, so that a test can hold a
browser meanwhile; what a test asks of it goes through `call`.
"""

import asyncio
import contextlib
import itertools
import json
import pathlib
import threading
import time

from aiohttp import web
from fake_gate import TAKEN_OVER, Gate

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "serve" / "page"
LIVE = ROOT / "web" / "live"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self' http: https: ws: wss:; worker-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)

INPUTS = [
    {"name": "3.text", "label": "Prompt", "type": "text", "value": "a watercolour",
     "multiline": True, "tooltip": "What the picture is to become.",
     "node_type": "CLIPTextEncode", "input": "text"},
    {"name": "5.strength", "label": "strength", "type": "number", "value": 0.6, "min": 0.0,
     "max": 1.0, "step": 0.01, "node_type": "LiveStrength", "input": "strength"},
    {"name": "6.seed", "label": "Seed", "type": "integer", "value": 7, "min": 0, "max": 2**64 - 1,
     "step": 1, "node_type": "LiveSampler", "input": "seed"},
    {"name": "1.mirror", "label": "mirror", "type": "boolean", "value": True,
     "node_type": "LiveCamera", "input": "mirror"},
    {"name": "1.fit", "label": "fit", "type": "choice", "value": "crop",
     "options": ["crop", "pad", "stretch"], "node_type": "LiveCamera", "input": "fit"},
    {"name": "1.livediffusion_camera", "label": "Camera", "type": "camera", "value": None,
     "node": "Live Camera", "node_type": "LiveCamera", "input": "livediffusion_camera"},
]  # fmt: skip


def words() -> dict:
    """What ComfyUI's /i18n has of this pack."""
    told = {}
    for folder in sorted((ROOT / "locales").iterdir()):
        main = json.loads((folder / "main.json").read_text("utf-8"))
        defs = json.loads((folder / "nodeDefs.json").read_text("utf-8"))
        told[folder.name] = {**main, "nodeDefs": defs}
    return told


class Visitor:
    def __init__(self, name: str):
        self.name, self.since = name, time.monotonic()
        self.socket: web.WebSocketResponse | None = None
        self.wire: asyncio.Transport | None = None  # below the socket
        self.wants = False
        self.at: str | None = None
        self.moved = False
        self.until: float | None = None
        self.place: tuple | None = None
        self.said: list[dict] = []
        self.gone_at: float | None = None


class House:
    """One address: `url`.

    Args:
        colours: one gate for each.
        camera: whether the workflow has a browser's camera.
        direct: whether pages are told the gates' own ports.
        limit_s: how long a visitor has.
        keep_s: how long a place waits for a page that is away.
    """

    def __init__(self, colours=("red",), camera=True, direct=True, limit_s=None, keep_s=10.0,
                 title="Neon mirror", inputs=INPUTS, views=1):  # fmt: skip
        self.camera, self.direct, self.limit_s, self.keep_s = camera, direct, limit_s, keep_s
        self.title, self.inputs = title, inputs
        self.views = [{"node": str(9 + i), "title": f"View {i + 1}"} for i in range(views)]
        self.gates = {f"r{i}{colour}": Gate(self, f"r{i}{colour}", colour)
                      for i, colour in enumerate(colours)}  # fmt: skip
        self.visitors: dict[str, Visitor] = {}
        self.warming = self.away = self.full = False
        self.refuses = False  # sockets of pages
        self.many: dict | None = None  # what a page that is one too many is told
        self.notice_s = 1.0  # until a gate that is dead is known to be
        self.ahead = 0  # more of them in the line than there are pages
        self.requests: list[str] = []
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="house", daemon=True)

    def __enter__(self) -> "House":
        self._thread.start()
        self.call(self._open())
        return self

    def __exit__(self, *of) -> None:
        self.call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def call(self, work):
        """Run a coroutine in the house's own loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _open(self) -> None:
        app = web.Application(middlewares=[self._seen])
        app.add_routes(
            [web.get("/", self._index), web.static("/page", PAGE), web.static("/web/live", LIVE),
             web.get("/i18n", self._words), web.get("/visit", self._visit)]
        )  # fmt: skip
        for gate in self.gates.values():
            app.add_routes(gate.routes(f"/relay/{gate.name}"))
            await gate.open()
        self._site = web.AppRunner(app, shutdown_timeout=0.1)
        await self._site.setup()
        await web.TCPSite(self._site, "127.0.0.1", 0).start()
        # a page may use the camera on localhost only
        self.url = f"http://localhost:{self._site.addresses[0][1]}"
        self._turns = asyncio.create_task(self._look_after())

    async def _close(self) -> None:
        self._turns.cancel()
        for gate in self.gates.values():
            await gate.close()
        for visitor in self.visitors.values():
            if visitor.socket is not None:
                await visitor.socket.close()
        await self._site.cleanup()

    @web.middleware
    async def _seen(self, request: web.Request, handler) -> web.StreamResponse:
        self.requests.append(request.path)
        if self.away or (self.refuses and request.path == "/visit"):
            raise web.HTTPServiceUnavailable
        return await handler(request)

    async def _index(self, request: web.Request) -> web.Response:
        text = (PAGE / "index.html").read_text("utf-8")
        return web.Response(text=text, content_type="text/html",
                            headers={"Content-Security-Policy": POLICY,
                                     "Cache-Control": "no-cache"})  # fmt: skip

    async def _words(self, request: web.Request) -> web.Response:
        return web.json_response(words())

    # -- the line ------------------------------------------------------------------------------

    async def _visit(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=1 << 16)
        await socket.prepare(request)
        if self.many:
            await socket.send_json({"type": "refused", **self.many})
            await socket.close(code=4008)
            return socket
        visitor = None
        async for message in socket:
            data = json.loads(message.data)
            if data["type"] == "hello":
                visitor = await self._hello(socket, request.transport, data["ticket"])
                continue
            if visitor is None:
                break
            visitor.said.append(data)
            if data["type"] == "want":
                await self._wanted(visitor)
            elif data["type"] == "leave":
                await self._left(visitor)
        if visitor is not None and visitor.socket is socket:
            visitor.socket, visitor.gone_at = None, time.monotonic()
        return socket

    async def _hello(self, socket, wire, ticket: str | None) -> Visitor:
        name = (ticket or "").removeprefix("visit.")
        if name not in self.visitors:
            name = f"v{next(self._numbers)}"
            self.visitors[name] = Visitor(name)
        visitor = self.visitors[name]
        before, visitor.socket, visitor.gone_at = visitor.socket, socket, None
        visitor.wire = wire
        visitor.place = None
        if before is not None:
            await before.send_json({"type": "over", "reason": "elsewhere"})
            await before.close(code=TAKEN_OVER)
        await self.welcome(visitor)
        return visitor

    async def welcome(self, visitor: "Visitor") -> None:
        await self._send(
            visitor,
            {"type": "welcome", "ticket": f"visit.{visitor.name}", "title": self.title,
             "inputs": self.inputs, "views": self.views, "fps": 15, "limit_s": self.limit_s,
             "camera": self.camera},
        )  # fmt: skip

    async def _wanted(self, visitor: Visitor) -> None:
        if self.full:
            return await self._send(visitor, {"type": "over", "reason": "full"})
        if not visitor.wants:
            visitor.wants, visitor.since, visitor.until = True, time.monotonic(), None
        if visitor.at is not None:
            await self._go(visitor)

    async def _left(self, visitor: Visitor) -> None:
        await self.over(visitor, "left")

    async def over(self, visitor: Visitor, reason: str) -> None:
        if visitor.at is not None:
            gate = self.gates[visitor.at]
            for run in [run for run in gate.runs.values() if run.visitor == visitor.name]:
                await gate.end(run, reason)
        visitor.at, visitor.wants, visitor.moved = None, False, False
        await self._send(visitor, {"type": "over", "reason": reason})

    async def drain(self, replica: str) -> None:
        """The replica is to go: its pages are told, and move."""
        gate = self.gates[replica]
        gate.draining = True
        await gate.tell({"type": "moving", "reason": "draining"})
        await self._displace(replica, "draining")

    async def _displace(self, replica: str, reason: str) -> None:
        for visitor in self.visitors.values():
            if visitor.at == replica:
                visitor.at, visitor.moved, visitor.place = None, True, None
                await self._send(visitor, {"type": "moving", "reason": reason})

    async def leave_the_net(self, away: bool) -> None:
        """The ingress is gone, or back."""
        self.away = away
        for visitor in list(self.visitors.values()):
            if away and visitor.socket is not None:
                visitor.wire.abort()

    async def _send(self, visitor: Visitor, message: dict) -> None:
        if visitor.socket is not None and not visitor.socket.closed:
            with contextlib.suppress(ConnectionError):
                await visitor.socket.send_json(message)

    async def _go(self, visitor: Visitor) -> None:
        gate = self.gates[visitor.at]
        left = None if visitor.until is None else round(visitor.until - time.monotonic(), 1)
        await self._send(
            visitor,
            {"type": "go", "ticket": f"stream.{visitor.name}.{gate.name}", "replica": gate.name,
             "direct": f"http://127.0.0.1:{gate.port}" if self.direct else None,
             "relay": f"/relay/{gate.name}", "left_s": left, "moved": visitor.moved},
        )  # fmt: skip
        await self.renew(visitor)
        visitor.moved = False

    async def renew(self, visitor: Visitor, more: str = "") -> None:
        stream = f"stream.{visitor.name}.{visitor.at}{more}" if visitor.at else None
        await self._send(visitor, {"type": "ticket", "ticket": f"visit.{visitor.name}",
                                   **({"stream": stream} if stream else {})})  # fmt: skip

    async def _look_after(self) -> None:
        while True:
            await self._turn()
            await asyncio.sleep(0.05)

    async def _turn(self) -> None:
        now = time.monotonic()
        for gate in self.gates.values():
            if gate.dead and now - gate.dead > self.notice_s:
                await self._displace(gate.name, "lost")
        for visitor in list(self.visitors.values()):
            if visitor.gone_at is not None and now - visitor.gone_at > self.keep_s:
                await self.over(visitor, "left")
                del self.visitors[visitor.name]
            elif visitor.until is not None and visitor.at is not None and now >= visitor.until:
                await self.over(visitor, "time")
        waiting = [v for v in self.visitors.values() if v.wants and v.at is None]
        waiting.sort(key=lambda v: (not v.moved, v.since))
        taken = {v.at for v in self.visitors.values()}
        free = [g for g in self.gates.values()
                if g.name not in taken and not (g.draining or g.dead or self.warming)]  # fmt: skip
        if self.ahead:
            free = []
        for gate in free[: len(waiting)]:
            visitor = waiting.pop(0)
            visitor.at = gate.name
            if self.limit_s is not None and visitor.until is None:
                visitor.until = now + self.limit_s
            await self._go(visitor)
        for place, visitor in enumerate(waiting, 1 + self.ahead):
            told = place, len(waiting) + self.ahead, self.warming
            if told != visitor.place:
                visitor.place = told
                wait = None if self.warming else 20 * place
                await self._send(visitor, {"type": "place", "place": place, "of": told[1],
                                           "wait_s": wait, "warming": self.warming})  # fmt: skip
