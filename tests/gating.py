"""A gate in this process, a ComfyUI of a few lines behind it, and pages that talk to it."""

import asyncio
import contextlib
import json
import struct
import time

import aiohttp
from aiohttp import WSMsgType, web
from clock import Limit
from serving import served

gate = served("gate.gate")
messages = served("gate.messages")
stream = served("gate.stream")
tickets = served("tickets")

HEADER = struct.Struct("<BBHIdII")
ORIGIN = "http://house.example"
SECRET = "/secret/folder"  # what a page must never be told


class Exposed:
    """One text, one number; stands for what workflow.Exposed does."""

    views = ({"node": "9", "title": "Picture"},)

    def check(self, values):
        for name, value in values.items():
            if name not in ("3.text", "5.cfg"):
                raise ValueError(f"There is no input {name}.")
            if not isinstance(value, str if name == "3.text" else (int, float)):
                raise ValueError(f"{name}: this is not what it takes.")
        return dict(values)

    def graph(self, values):
        return {"3": {"class_type": "Text", "inputs": dict(values)}}


class ComfyUI:
    """Speaks the pack's protocol: each camera frame comes back as a picture of view 0.

    Attributes:
        asked: method and address of each request.
        graphs: of starts and updates.
        frames, heard: what its page's socket has sent.
        refuse: it takes no graph; hold: it answers no frame.
    """

    def __init__(self):
        self.alive, self.generation, self.restarts, self.failed = False, 0, 0, None
        self.url, self.changed = None, []
        self.asked, self.graphs, self.frames, self.heard = [], [], [], []
        self.refuse = self.hold = False
        self.headers, self.sockets, self.stopped = [], [], 0
        self._runner = None
        self._up = asyncio.Event()

    async def rise(self):
        """A new one, at another port."""

        async def note(request):
            self.asked.append((request.method, request.raw_path))
            self.headers.append(dict(request.headers))
            route = request.path.removeprefix("/livediffusion/")
            return await getattr(self, f"_{route}", self._any)(request)

        self._runner = web.ServerRunner(web.Server(note, access_log=None), shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self.generation += 1
        self.restarts = self.generation - 1
        self.alive = True
        self._up.set()
        for call in self.changed:
            call()

    async def die(self):
        """As a kill does: connections break, nobody listens."""
        self.alive = False
        self._up.clear()
        for socket, request in self.sockets:
            if request.transport is not None and not socket.closed:
                request.transport.abort()
        self.sockets.clear()
        await self._runner.cleanup()

    async def ready(self, seconds):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._up.wait(), seconds)
        return self.alive

    def memory(self):
        return {"used": 1, "total": 2, "device": "cpu"}

    async def tell(self, data):
        """A message, or bytes, to whoever listens to the frames."""
        for socket, _ in self.sockets:
            if isinstance(data, bytes):
                await socket.send_bytes(data)
            else:
                await socket.send_str(data if isinstance(data, str) else json.dumps(data))

    async def _start(self, request):
        data = await request.json() if request.can_read_body else {}
        self.graphs.append(data["prompt"])
        if self.refuse:
            error = {"message": f"no such file {SECRET}", "details": ""}
            return web.json_response({"error": error, "node_errors": {}}, status=400)
        camera = {"node": "1", "source": "browser", "width": 64, "height": 64, "fps": 60,
                  "send": SECRET, "whip": {"url": SECRET, "token": SECRET},
                  "phone": {"url": SECRET, "qr": [SECRET], "trouble": None}}  # fmt: skip
        hidden = {"node": "10", "index": 1, "mjpeg": "x"}
        view = {"node": "9", "index": 0, "mjpeg": f"/livediffusion/mjpeg/{SECRET}"}
        return web.json_response({
            "session": "comfy-session", "token": "comfy-token", "prompt_id": SECRET, "version": 1,
            "ahead": 0, "cameras": [camera], "views": [view, hidden],
            "idle": [{"node": "7", "type": SECRET}],
        })  # fmt: skip

    _update = _start

    async def _stop(self, request):
        self.stopped += 1
        return web.json_response({"state": "ended"})

    async def _stats(self, request):
        return web.json_response({"state": "live"})

    async def _frames(self, request):
        socket = web.WebSocketResponse(max_msg_size=2**25)
        await socket.prepare(request)
        listed = socket, request
        self.sockets.append(listed)
        await socket.send_json({"type": "state", "state": "live", "ahead": 0})
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                self.heard.append(json.loads(message.data))
            elif message.type is WSMsgType.BINARY:
                self.frames.append(message.data)
                if not self.hold:
                    await socket.send_json({"type": "received", "seq": 0, "refused": None})
                    await socket.send_bytes(b"\x02" + message.data[1:])
        if listed in self.sockets:
            self.sockets.remove(listed)
        return socket

    async def _any(self, request):
        if request.headers.get("Upgrade") == "websocket":
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            async for message in socket:
                if message.data.isdecimal():  # the code that it is to end with
                    await socket.close(code=int(message.data))
                else:
                    await socket.send_str(f"echo {message.data}")
            return socket
        return web.Response(text=SECRET, headers={"X-Of": "ComfyUI"})


class House:
    """A gate with its ComfyUI; an asynchronous context."""

    def __init__(self, fps=1000.0, **more):
        self.comfyui, self.events, self.changes = ComfyUI(), [], 0
        self.tickets = tickets.Tickets(b"k" * 32)
        self._fps, self._more = fps, more

    async def __aenter__(self):
        await self.comfyui.rise()
        self.gate = gate.Gate(
            self.comfyui, Exposed(), self.tickets, "r1", self._fps, self._change,
            lambda event, **fields: self.events.append((event, fields)),
        )  # fmt: skip
        self.port = await self.gate.start("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = aiohttp.ClientSession()
        return self

    async def __aexit__(self, *error):
        await self.gate.stop()
        await self.http.close()
        await self.comfyui.die()

    def _change(self):
        self.changes += 1

    def ticket(self, kind="stream", seconds=60.0, **claims):
        """A good one; claims change it."""
        good = {"id": "v1", "replica": "r1", "origin": ORIGIN, "until": None, "turn": 1.0}
        return self.tickets.make(kind, seconds, **{**good, **claims})

    async def post(self, route, data, ticket=None, **more):
        params = {"ticket": ticket or self.ticket()}
        url = f"{self.url}/livediffusion/{route}"
        async with self.http.post(url, params=params, json=data, **more) as reply:
            text = await reply.text()
            return reply.status, json.loads(text) if text.startswith("{") else text

    async def page(self, values=None, **claims):
        """A page whose stream runs."""
        made = Page(self, self.ticket(**claims))
        status, made.begun = await self.post(
            "start", {"client_id": "x", "prompt": {"values": values or {}}, "workflow": None},
            made.ticket,
        )  # fmt: skip
        assert status == 200, made.begun
        await made.join()
        return made


class Page:
    """What a page does, without a browser."""

    def __init__(self, house, ticket):
        self.house, self.ticket, self.begun = house, ticket, {}
        self.messages, self.pictures, self.closed, self.reading = [], [], None, None
        self.patient = True

    @property
    def keys(self):
        return {key: self.begun[key] for key in ("session", "token")}

    async def join(self, **more):
        params = {**self.keys, "role": "owner", "ticket": self.ticket}
        self.socket = await self.house.http.ws_connect(
            f"{self.house.url}/livediffusion/frames", params=params, max_msg_size=2**25, **more
        )
        self.closed = None
        self.reading = asyncio.create_task(self._read())

    async def _read(self):
        async for message in self.socket:
            if message.type is WSMsgType.BINARY:
                self.pictures.append(message.data)
                if self.patient:
                    await self.socket.send_json({"type": "shown", "view": 0, "latency_ms": 1.0})
            else:
                self.messages.append(json.loads(message.data))
        self.closed = self.socket.close_code

    async def send(self, payload=b"jpeg", sequence=0):
        head = HEADER.pack(1, 1, 0, sequence, time.time() * 1000, 0, 0)
        await self.socket.send_bytes(head + payload)

    async def post(self, route, **data):
        return await self.house.post(route, {**self.keys, **data}, self.ticket)

    def heard(self, kind):
        return [message for message in self.messages if message["type"] == kind]

    async def away(self, code=1000):
        """Its connection ends."""
        await self.socket.close(code=code)
        await self.reading


async def until(condition, seconds=5):
    """The first true value of `condition`."""
    limit = Limit(seconds)
    while not (value := condition()):
        assert not limit.over, "it did not happen"
        await asyncio.sleep(0.005)
    return value


def run(test):
    """Run a coroutine function with a house; nothing of it is left."""

    async def whole():
        async with House() as house:
            await test(house)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(whole())
