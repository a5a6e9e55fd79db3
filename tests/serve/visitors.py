"""Visitors of a house, as its page is one, without a browser: all that they do is bounded.

A visitor sends frames of a colour of its own, light on the left and dark on the right, and looks
whether each picture that comes back is of that colour; which side is light shows its setting.
"""

import asyncio
import colorsys
import contextlib
import io
import json
import struct
import time
import uuid

import aiohttp
import numpy as np
from PIL import Image

HEADER = struct.Struct("<BBHIdII")  # docs/live.md, "On the wire"
SIZE = 64
AWAY = 2  # camera frames that may be unanswered
PATIENCE = 8.0  # seconds in which a gate says something
AGAIN, GIVE_UP = 0.25, 2.0  # seconds between attempts to come back to a run, and for all of them
FINAL = (1000, 4409, 4410)  # codes after which a run is not come back to
MOST = 100_000  # pictures and messages that a visitor keeps
HUE = 0.06  # that a picture may be off, of a whole turn


def frame(hue: float, size: int = SIZE, noise: int = 0) -> bytes:
    """A JPEG of a colour, light on the left; with noise it is as large as a real one."""
    light, dark = (np.array(colorsys.hsv_to_rgb(hue, 0.9, v)) * 255 for v in (1.0, 0.5))
    picture = np.empty((size, size, 3))
    picture[:, : size // 2], picture[:, size // 2 :] = light, dark
    if noise:
        picture += np.random.default_rng(0).normal(0, noise, (size, size, 1))
    coded = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(coded, "JPEG", quality=85)
    return coded.getvalue()


def seen(jpeg: bytes) -> tuple[float, bool]:
    """The hue of a picture's mean, 0 to 1, and whether its right side is the light one."""
    picture = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), float) / 255
    half = picture.shape[1] // 2
    right = picture[:, half:].mean() > picture[:, :half].mean()
    return colorsys.rgb_to_hsv(*picture.mean((0, 1)))[0], bool(right)


class Visitor:
    """One visitor: a place in the house, and a stream when it is its turn.

    Args:
        url: of the house. hue: of its frames, 0 to 1. fps: that it sends. values: its settings.
        setting: the name of the input that mirrors, if the workflow shows one.
        relay: goes through the one address only.

    Attributes:
        phase: new, waiting, running, moving or over. place, of: in the queue. places: all that it
            was told, (when, place, of). moves: (when, reason). overs: reasons.
        pictures: when each came. wrong: what is not its own. lights: of the last picture, whether
            its right side is the light one. replica: where it is. ways: how it went there.
        delays: seconds from a frame to its picture.
    """

    def __init__(self, url, hue, fps=8.0, values=None, relay=False, setting="1.mirror",
                 jpeg=None, check=True):  # fmt: skip
        self.url, self.hue, self.fps = url, hue, fps
        self.values = dict(values or {})
        self.setting, self._relay, self._check = setting, relay, check
        self._jpeg = jpeg or frame(hue)
        self.client = uuid.uuid4().hex
        self.ticket = None
        self.welcome = {}
        self.phase, self.place, self.of, self.replica = "new", None, None, None
        self.places, self.moves, self.overs, self.errors, self.wrong = [], [], [], [], []
        self.pictures, self.delays, self.ways, self.went = [], [], [], []
        self.lights = None
        self.stats = {}
        self._wanting = self._closed = False
        self._house = None
        self._places, self._now = set(), None
        self._tasks = []

    async def __aenter__(self):
        self._http = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        self._tasks.append(asyncio.create_task(self._visit()))
        return self

    async def __aexit__(self, *error):
        self._closed = True
        for task in [*self._tasks, *(one.task for one in self._places)]:
            task.cancel()
        await asyncio.gather(
            *self._tasks, *(one.task for one in self._places), return_exceptions=True
        )
        await self._http.close()

    # what a visitor does

    async def want(self):
        """Asks for a stream."""
        self._wanting = True
        self.phase = "waiting"
        await self._say({"type": "want"})

    async def leave(self):
        """Wants nothing any more."""
        self._wanting = False
        self.phase = "over"
        await self._say({"type": "leave"})
        self._end()

    async def change(self, **values):
        """Sets inputs, now and wherever the stream goes on; names with _ for the dot."""
        self.values |= {name.replace("_", ".", 1): value for name, value in values.items()}
        if self._now is not None:
            await self._now.update()

    def gap(self, since=0.0, until=None):
        """The longest time without a picture, from the first one after `since` on, in seconds."""
        until = time.monotonic() if until is None else until
        times = [t for t in self.pictures if since <= t <= until]
        return max(b - a for a, b in zip(times, [*times[1:], until], strict=True)) if times else (
            until - since)  # fmt: skip

    # its place in the house

    async def _visit(self):
        headers = {"Origin": self.url}
        while not self._closed:
            try:
                address = self.url.replace("http", "ws", 1) + "/visit"
                async with self._http.ws_connect(address, headers=headers, timeout=PATIENCE) as ws:
                    self._house = ws
                    await ws.send_json({"type": "hello", "ticket": self.ticket})
                    async for message in ws:
                        if message.type is aiohttp.WSMsgType.TEXT:
                            await self._hear(json.loads(message.data))
            except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as reason:
                self._note(f"house: {reason}")
            self._house = None
            await asyncio.sleep(0.25)

    async def _say(self, message):
        # without a socket it is said when there is one again
        if self._house is not None and self.welcome:
            with contextlib.suppress(ConnectionError, aiohttp.ClientError):
                await self._house.send_json(message)

    async def _hear(self, said):
        now, kind = time.monotonic(), said["type"]
        if kind in ("welcome", "ticket"):
            self.ticket = said["ticket"]
        if kind == "welcome":
            self.welcome = said
            if self._wanting:
                await self._say({"type": "want"})
        elif kind == "ticket" and said.get("stream") and self._now is not None:
            self._now.ticket = said["stream"]
        elif kind == "place":
            self.place, self.of = said["place"], said["of"]
            self.places.append((now, self.place, self.of))
            if self.phase == "running":
                self.phase = "moving"
        elif kind == "go" and self._wanting:
            self.went.append((now, said["replica"], said["moved"]))
            self._go(said)
        elif kind == "moving":
            self._moving(said["reason"])
        elif kind == "over":
            self.overs.append(said["reason"])
            self._wanting, self.phase = False, "over"
            self._end()
        elif kind == "refused":
            self._note(f"refused: {said['reason']}")
        del self.places[:-MOST], self.went[:-MOST]

    def _moving(self, reason):
        self.moves.append((time.monotonic(), reason))
        if self.phase == "running":
            self.phase = "moving"

    # its stream

    def _go(self, said):
        if self._now is not None and not self._now.over and self._now.replica == said["replica"]:
            self._now.ticket = said["ticket"]
            return
        before = self._now
        self._now = _Place(self, said, before)
        self._places.add(self._now)
        self._now.task = asyncio.create_task(self._now.run())
        self._now.task.add_done_callback(lambda _, one=self._now: self._places.discard(one))

    def _end(self):
        for one in list(self._places):
            one.end()
        self._now = self.replica = None

    async def _lost(self, place):
        """A gate that cannot be reached any more: the house says what comes."""
        if place is self._now and self._wanting and not self._closed:
            self._now = None
            self._moving("lost")
            await asyncio.sleep(0.25)
            await self._say({"type": "lost", "replica": place.replica})
            await self._say({"type": "want"})

    def _took(self, place, data):
        """A picture came."""
        now = time.monotonic()
        if place is not self._now:
            return
        if self.replica != place.replica or self.phase != "running":
            self.replica, self.phase = place.replica, "running"
            if place.before is not None:
                place.before.end()
        self.pictures.append(now)
        self.delays.append(time.time() - HEADER.unpack_from(data)[4] / 1000)
        del self.pictures[:-MOST], self.delays[:-MOST]
        if self._check:
            hue, self.lights = seen(data[HEADER.size :])
            off = abs((hue - self.hue + 0.5) % 1 - 0.5)
            if off > HUE:
                self.wrong.append((now, round(hue, 3), place.replica))

    def _note(self, text):
        self.errors.append((round(time.monotonic(), 1), text[:300]))
        del self.errors[:-1000]


class _Place:
    """A stream at one gate."""

    def __init__(self, visitor, said, before):
        self.of, self.before = visitor, before
        self.ticket, self.replica = said["ticket"], said["replica"]
        relay = visitor.url + said["relay"]
        own = None if visitor._relay else said["direct"]
        self._ways = [way for way in (own, relay) if way]
        self.over, self.task = False, None
        self._keys, self._base, self._sequence = {}, "", 0
        self._room = asyncio.Semaphore(AWAY)

    def end(self):
        self.over = True
        if self.task is not asyncio.current_task():
            self.task.cancel()

    async def run(self):
        try:
            for way in self._ways:
                if await self._at(way):
                    return
        except asyncio.CancelledError:
            await asyncio.shield(self._stop())
            raise
        finally:
            self.over = True
        await self.of._lost(self)

    async def _stop(self):
        if self._keys:
            with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
                await self._post("stop", self._keys, seconds=1)

    async def _post(self, route, body, seconds=PATIENCE):
        timeout = aiohttp.ClientTimeout(total=seconds)
        async with self.of._http.post(
            f"{self._base}/livediffusion/{route}", params={"ticket": self.ticket}, json=body,
            headers={"Origin": self.of.url}, timeout=timeout,
        ) as reply:  # fmt: skip
            return reply.status, await reply.json(content_type=None)

    async def update(self):
        """The visitor's values; a stream that is on its way begins with them anyway."""
        if self._keys:
            body = {**self._keys, "prompt": {"values": dict(self.of.values)}}
            status, answer = await self._post("update", body)
            if status != 200:
                self.of._note(f"update: {status} {answer}")

    async def _at(self, way) -> bool:
        """Whether the stream was there, until it was over in order."""
        self._base = way
        body = {"client_id": self.of.client, "prompt": {"values": dict(self.of.values)},
                "workflow": None}  # fmt: skip
        try:
            status, begun = await self._post("start", body, 30)
            if status != 200:
                self.of._note(f"start at {way}: {status} {begun}")
                return False
            self._keys = {key: begun[key] for key in ("session", "token")}
            self.of.ways.append(way)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError) as reason:
            self.of._note(f"at {way}: {type(reason).__name__} {reason}")
            return False
        # as web/live/worker.mjs: a connection that breaks is made anew for a while
        lost = time.monotonic()
        while time.monotonic() - lost < GIVE_UP:
            try:
                params = {**self._keys, "role": "owner", "ticket": self.ticket}
                address = f"{way}/livediffusion/frames".replace("http", "ws", 1)
                async with self.of._http.ws_connect(
                    address, params=params, headers={"Origin": self.of.url}, max_msg_size=2**24,
                    timeout=PATIENCE,
                ) as ws:  # fmt: skip
                    sending = asyncio.create_task(self._send(ws))
                    try:
                        if (done := await self._take(ws)) is not None:
                            return done
                    finally:
                        sending.cancel()
                        lost = time.monotonic()
                    if ws.close_code in FINAL:
                        return False
            except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError) as reason:
                self.of._note(f"at {way}: {type(reason).__name__} {reason}")
            await asyncio.sleep(AGAIN)
        return False

    async def _take(self, ws) -> bool | None:
        """Whether the stream is over in order; None where only the connection is."""
        async for message in ws:
            if message.type is aiohttp.WSMsgType.BINARY:
                view = HEADER.unpack_from(message.data)[2]
                await ws.send_json({"type": "shown", "view": view, "latency_ms": None})
                self.of._took(self, message.data)
            elif message.type is aiohttp.WSMsgType.TEXT:
                said = json.loads(message.data)
                if said["type"] == "received":
                    self._room.release()
                elif said["type"] == "stats":
                    self.of.stats = said
                elif said["type"] == "moving" and self is self.of._now:
                    self.of._moving(said["reason"])
                elif said["type"] == "over":
                    # the house says why, or where it goes on
                    return said["reason"] != "moved"
        return None

    async def _send(self, ws):
        due = time.monotonic()
        with contextlib.suppress(ConnectionError, aiohttp.ClientError):
            while True:
                # a gate that died with a frame of ours answers it never
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._room.acquire(), 1.0)
                due = max(due + 1 / self.of.fps, time.monotonic())
                await asyncio.sleep(due - time.monotonic())
                head = HEADER.pack(1, 1, 0, self._sequence, time.time() * 1000, 0, self._sequence)
                self._sequence += 1
                await ws.send_bytes(head + self.of._jpeg)


async def until(true, seconds, what):
    """Waits until it is so; how long that took. Raises AssertionError with what it was about."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {what()}"
        await asyncio.sleep(0.02)
    return time.monotonic() - began
