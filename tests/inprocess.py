"""ComfyUI's queue, executor and routes in this process, and nodes that count what runs."""

import asyncio
import collections
import contextlib
import io
import json
import struct
import threading
import time
import types

import aiohttp
import execution
import numpy as np
from aiohttp import web
from clock import Limit
from livediffusion.live.routes import add_routes
from livediffusion.live.wire import CAMERA, COMPARED, Packet
from livediffusion.nodes import live as live_nodes
from PIL import Image

CLASSES = execution.nodes.NODE_CLASS_MAPPINGS


class Comfy:
    """A prompt queue with its worker and a web server with our routes, as main.py has them."""

    def __init__(self):
        self.client_id = self.last_node_id = self.last_prompt_id = None
        self.sockets_metadata = {}
        self.number = 0
        self.messages, self.on_prompt_handlers = [], []
        self.finished = collections.OrderedDict()
        self.routes = web.RouteTableDef()
        self.app = web.Application(client_max_size=2**26)
        self.loop = asyncio.new_event_loop()
        self.prompt_queue = execution.PromptQueue(self)
        self.sessions = add_routes(self)
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._serve, daemon=True),
            threading.Thread(target=self._work, daemon=True),
        ]
        self._up = threading.Event()

    def __enter__(self):
        self._before = live_nodes._sessions, getattr(live_nodes.PromptServer, "instance", None)
        live_nodes._sessions, live_nodes.PromptServer.instance = self.sessions, self
        for thread in self._threads:
            thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, *error):
        for session in list(self.sessions._all.values()):
            self.loop.call_soon_threadsafe(session.stop)
        self._over.set()
        self._threads[1].join(20)
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result(20)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._threads[0].join(10)
        live_nodes._sessions, live_nodes.PromptServer.instance = self._before

    async def _close(self):
        await self._runner.cleanup()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def add_on_prompt_handler(self, handler):
        self.on_prompt_handlers.append(handler)

    def trigger_on_prompt(self, data):
        for handler in self.on_prompt_handlers:
            data = handler(data)
        return data

    def send_sync(self, event, data, sid=None):
        self.messages.append((event, data))

    def queue_updated(self):
        pass

    def put(self, graph, outputs, extra=None):
        """Queue an ordinary prompt; returns its id."""
        self.number += 1
        name = f"ordinary-{self.number}"
        self.prompt_queue.put((self.number, name, graph, extra or {}, outputs, {}))
        return name

    def wait_for(self, prompt_id, seconds=20):
        """The history entry of a prompt, once it is there."""
        return until(lambda: self.prompt_queue.history.get(prompt_id), seconds)

    def _serve(self):
        asyncio.set_event_loop(self.loop)

        async def begin():
            self.app.add_routes(self.routes)
            self._runner = web.AppRunner(self.app, shutdown_timeout=1)
            await self._runner.setup()
            await web.TCPSite(self._runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
            self._up.set()

        self.loop.run_until_complete(begin())
        self.loop.run_forever()

    def _work(self):
        worker = execution.PromptExecutor(
            self, cache_args={"ram": 0.0, "ram_inactive": 0.0, "lru": 0}
        )
        queue = self.prompt_queue
        while not self._over.is_set():
            item = queue.get(timeout=0.05)
            if item is None:
                continue
            (_, prompt_id, graph, extra, outputs, _), item_id = item
            self.last_prompt_id = prompt_id
            worker.execute(graph, prompt_id, extra, outputs)
            status = execution.PromptQueue.ExecutionStatus(
                status_str="success" if worker.success else "error",
                completed=worker.success,
                messages=worker.status_messages,
            )
            queue.task_done(item_id, worker.history_result, status=status)


def until(condition, seconds=20):
    """The first true value of `condition`, looked at often."""
    limit = Limit(seconds)
    while not (value := condition()):
        assert not limit.over, "it did not happen"
        time.sleep(0.005)
    return value


class Client:
    """The page that owns a live run, without a browser."""

    def __init__(self, http, url, begun, socket):
        self.http, self.url, self.begun, self.socket = http, url, begun, socket
        self.views, self.states, self.stats = [], [], {}
        self.problems, self.refused, self.paces, self.answers = [], [], [], 0
        self.recorded = []
        self.acknowledge = True
        self.sequence = 0
        self.closed = None
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, http, url, graph, workflow="w", role="owner"):
        begun = await post(http, f"{url}/livediffusion/start", begin(graph, workflow))
        assert begun[0] == 200, begun
        return await cls.join(http, url, begun[1], role)

    @classmethod
    async def join(cls, http, url, begun, role="owner"):
        place = f"session={begun['session']}&token={begun['token']}&role={role}"
        socket = await http.ws_connect(f"{url}/livediffusion/frames?{place}")
        return cls(http, url, begun, socket)

    async def _read(self):
        async for message in self.socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                packet = unpacked(message.data)
                now = time.time()
                self.views.append((packet, now))
                if self.acknowledge:
                    await self.shown(packet, now)
                continue
            data = json.loads(message.data)
            kind = data["type"]
            if kind == "state":
                self.states.append(data)
            elif kind == "stats":
                self.stats = data
            elif kind == "problem":
                self.problems.append(data)
            elif kind == "recorded":
                self.recorded.append(data)
            elif kind == "pace":
                self.paces.append(data)
            elif kind == "received":
                self.answers += 1
                self.refused += [data["refused"]] if data["refused"] else []
            elif kind in ("refused", "unreadable"):
                self.refused.append(data["reason"])
        self.closed = self.socket.close_code

    async def shown(self, packet, now):
        latency = 1000 * (now - packet.captured)
        message = {"type": "shown", "view": packet.view, "seq": packet.sequence}
        await self.socket.send_json({**message, "latency_ms": latency})

    async def send(self, picture, captured=None):
        """A camera frame: a picture [H, W, 3] or bytes as they are."""
        data = picture if isinstance(picture, bytes) else jpeg(picture)
        at = time.time() if captured is None else captured
        packet = Packet(CAMERA, 1, 0, self.sequence, at, 0, 0, data)
        self.sequence += 1
        await self.socket.send_bytes(packet.packed())

    async def compare(self, view=0, on=True):
        """Ask for what the pictures of a view were made from."""
        await self.socket.send_json({"type": "compare", "view": view, "on": on})

    async def post(self, route, **data):
        keys = {name: self.begun[name] for name in ("session", "token")}
        return await post(self.http, f"{self.url}/livediffusion/{route}", {**keys, **data})

    async def stop(self):
        await self.post("stop")
        await self.wait(lambda: self.closed)

    async def wait(self, condition, seconds=20):
        limit = Limit(seconds)
        while not (value := condition()):
            assert not limit.over, (self.states, self.stats, self.problems)
            await asyncio.sleep(0.005)
        return value

    @property
    def state(self):
        return self.states[-1]["state"] if self.states else None


def unpacked(data):
    """A view frame out of its message, after docs/live.md."""
    head, rest = struct.unpack_from("<BBHIdII", data), data[24:]
    kind, codec, view, sequence, captured, version, source = head
    made_from = b""
    if kind == COMPARED:
        (length,) = struct.unpack_from("<I", rest)
        rest, made_from = rest[4 : 4 + length], rest[4 + length :]
    return Packet(kind, codec, view, sequence, captured / 1000, version, source, rest, made_from)


def begin(graph, workflow="w"):
    return {"client_id": "page", "prompt": graph, "workflow": {"id": workflow}}


async def post(http, url, data, **more):
    async with http.post(url, json=data, **more) as reply:
        text = await reply.text()
        return reply.status, json.loads(text) if text.startswith("{") else text


def jpeg(picture):
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=95)
    return out.getvalue()


def flat(value, size=32):
    """A picture of one grey, which survives JPEG."""
    return np.full((size, size, 3), value, np.uint8)


def grey(packet, part="payload"):
    """The grey of a shown picture, or with part "input" of what it was made from."""
    return round(float(np.asarray(Image.open(io.BytesIO(getattr(packet, part)))).mean()))


def live(work):
    """Run `work(http)` with an open HTTP client."""

    async def whole():
        async with aiohttp.ClientSession() as http:
            return await work(http)

    return asyncio.run(whole())


def nodes_for_tests():
    """Counting nodes, and the pack's own; returns what they count and do."""
    world = types.SimpleNamespace(calls=collections.Counter(), seconds=0.0, fail=None, seen=[])

    def add(name, inputs, returns, function, output=False, lazy=()):
        options = {n: (t, {"lazy": True} if n in lazy else {}) for n, t in inputs.items()}

        def go(self, **values):
            world.calls[name] += 1
            return function(**values)

        members = {
            "INPUT_TYPES": classmethod(lambda cls: {"required": options}),
            "RETURN_TYPES": returns,
            "FUNCTION": "go",
            "CATEGORY": "test",
            "OUTPUT_NODE": output,
            "go": go,
        }
        if lazy:
            members["check_lazy_status"] = lambda self, which, **values: [which]
        CLASSES[name] = type(name, (), members)

    def work(image, cond):
        world.seen.append((float(image.mean()), cond))
        if world.fail is not None and cond == world.fail:
            raise RuntimeError(f"{cond} does not work")
        time.sleep(world.seconds)
        # a prompt is a brightness, so that pictures tell which one made them
        return (image * 0 + float(cond) / 255 if cond.isdigit() else image,)

    def load(name):
        if name == world.fail:
            raise RuntimeError(f"{name} is no model")
        return (f"model {name}",)

    add("TestLoader", {"name": "STRING"}, ("MODEL",), load)
    add("TestEncode", {"model": "MODEL", "text": "STRING"}, ("COND",), lambda model, text: (text,))
    add("TestWork", {"image": "IMAGE", "cond": "COND"}, ("IMAGE",), work)
    add("TestSave", {"image": "IMAGE"}, (), lambda image: {"ui": {}}, output=True)
    choice = {"which": "STRING", "a": "COND", "b": "COND"}
    add("TestSwitch", choice, ("COND",), lambda which, a=None, b=None: (a if which == "a" else b,),
        lazy=("a", "b"))  # fmt: skip
    return world


@contextlib.contextmanager
def comfy():
    """A running Comfy with the test nodes and the pack's; yields (comfy, world)."""
    from livediffusion.nodes import compiled, flow, frames, models, sampling, schedules, send
    from livediffusion.nodes.compat import quick
    from livediffusion.nodes.ranges import checked

    before = dict(CLASSES)
    world = nodes_for_tests()
    for module in (live_nodes, send, compiled, flow, frames, models, sampling, schedules):
        for name in dir(module):
            if name.startswith("Live") and hasattr(getattr(module, name), "define_schema"):
                CLASSES[name] = quick(checked(getattr(module, name)))
    try:
        with Comfy() as running:
            yield running, world
    finally:
        CLASSES.clear()
        CLASSES.update(before)


def camera(**settings):
    values = {
        "source": "browser", "file": "none", "width": 32, "height": 32, "fit": "crop", "fps": 30,
        "mirror": False, "loop": True,
    }  # fmt: skip
    return {"class_type": "LiveCamera", "inputs": values | settings}


def view(image, **settings):
    values = {"image": image, "quality": 95, "record": False, "filename_prefix": "live/test"}
    return {"class_type": "LiveView", "inputs": values | settings}


def graph(text="keep", **settings):
    """loader -> prompt -> work on the camera's frames -> view."""
    return {
        "1": {"class_type": "TestLoader", "inputs": {"name": "m"}},
        "2": {"class_type": "TestEncode", "inputs": {"model": ["1", 0], "text": text}},
        "3": camera(**settings),
        "4": {"class_type": "TestWork", "inputs": {"image": ["3", 0], "cond": ["2", 0]}},
        "5": view(["4", 0]),
    }
