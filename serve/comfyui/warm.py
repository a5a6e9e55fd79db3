"""A live run that nobody watches: models are loaded, engines built, and a tick is measured."""

import asyncio
import contextlib
import json
import math
import os
import pathlib
import struct
import time
import uuid
from typing import Any, NamedTuple

import aiohttp

from . import tiles

HEADER = struct.Struct("<BBHIdII")  # docs/live.md, "On the wire"
CAMERA, JPEG = 1, 1
AWAY = 2  # camera frames that are not answered yet, as a page has it
MEASURED = 8  # pictures after the first: the ring is full, what was recorded or built is there
_REST = 0.5  # seconds between two statistics of a run
_AT_MOST = 4096  # pixels of a side


class NotWarm(RuntimeError):
    """The graph does not run; the message says at which node and why."""


class Measured(NamedTuple):
    """What a live run of a graph takes.

    Attributes:
        tick_s: median of one frame through the graph, asked for as fast as it goes, in seconds.
        memory_bytes: on a GPU what is in use of it, by all that run on it; else what ComfyUI has
            resident.
        device: its name as ComfyUI gives it; total_bytes: its memory.
        pictures: that were waited for.
    """

    tick_s: float
    memory_bytes: int
    device: str
    total_bytes: int
    pictures: int


async def warmed(
    url: str, graph: dict[str, Any], seconds: float = 600.0, pid: int | None = None
) -> Measured:
    """Run a graph live on moving tiles until it is warm, and measure a tick.

    Args:
        url: of a ComfyUI with the pack.
        graph: in API format, with a Live Camera and a Live View.
        seconds: that all of it may take: models are loaded and engines built.
        pid: of ComfyUI, for its memory where it has no GPU.

    Raises:
        NotWarm: it does not run, or takes longer.
    """
    try:
        async with aiohttp.ClientSession(url) as http:
            run = _Run(http)
            try:
                tick = await asyncio.wait_for(run.measure(graph), seconds)
            finally:
                with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError):
                    await asyncio.wait_for(run.stop(), 10)
            async with http.get("/system_stats") as reply:
                said = await reply.json()
    except asyncio.TimeoutError:
        raise NotWarm(f"The workflow is not warm after {seconds:g} seconds.") from None
    except (aiohttp.ClientError, OSError) as reason:
        raise NotWarm(f"ComfyUI was lost while the workflow warmed up ({reason}).") from None
    device = (said.get("devices") or [{}])[0]
    return Measured(tick, *used_memory(device, pid), run.pictures)


def used_memory(device: dict[str, Any], pid: int | None) -> tuple[int, str, int]:
    """Bytes in use, name and bytes in all, of a device as /system_stats has it.

    On a GPU all that is in use of it, whoever uses it; else what process `pid` has resident.
    """
    name, total = str(device.get("name", "cpu")), int(device.get("vram_total") or 0)
    if device.get("type", "cpu") != "cpu":
        return total - int(device.get("vram_free") or 0), name, total
    resident = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]
        resident = int(pages) * os.sysconf("SC_PAGE_SIZE")
    return resident, name, total


class _Run:
    """The page of this run."""

    def __init__(self, http: aiohttp.ClientSession):
        self._http = http
        self._keys: dict[str, str] = {}
        self.pictures = 0

    async def measure(self, graph: dict[str, Any]) -> float:
        """Seconds of one frame, once it is warm."""
        body = {"client_id": uuid.uuid4().hex, "prompt": graph, "workflow": None}
        async with self._http.post("/livediffusion/start", json=body) as reply:
            begun = await answered(reply)
            if reply.status != 200:
                raise NotWarm(f"ComfyUI refuses the workflow: {complaint(begun)}")
        self._keys = {key: begun[key] for key in ("session", "token")}
        cameras = [c for c in begun["cameras"] if c["source"] == "browser"]
        query = {**self._keys, "role": "owner"}
        async with self._http.ws_connect(
            "/livediffusion/frames", params=query, max_msg_size=2**26
        ) as socket:
            feeding = asyncio.create_task(self._feed(socket, cameras)) if cameras else None
            try:
                return await self._watch(socket)
            finally:
                if feeding is not None:
                    feeding.cancel()

    async def _feed(self, socket: aiohttp.ClientWebSocketResponse, cameras: list[dict]) -> None:
        sides = [max(int(camera[side]) for camera in cameras) for side in ("width", "height")]
        frames = await asyncio.to_thread(
            tiles.frames, *(min(_AT_MOST, max(8, side)) for side in sides)
        )
        self._room = asyncio.Semaphore(AWAY)
        sequence = 0
        while True:
            await self._room.acquire()
            head = HEADER.pack(CAMERA, JPEG, 0, sequence, time.time() * 1000, 0, 0)
            await socket.send_bytes(head + frames[sequence % len(frames)])
            sequence += 1

    async def _watch(self, socket: aiohttp.ClientWebSocketResponse) -> float:
        state: dict[str, Any] = {}
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                self.pictures += 1
                _, _, view, sequence, _, _, _ = HEADER.unpack_from(message.data)
                told = {"type": "shown", "view": view, "seq": sequence, "latency_ms": None}
                await socket.send_str(json.dumps(told))
                continue
            data = json.loads(message.data)
            if data["type"] == "received":
                self._room.release()
            elif data["type"] == "state":
                state = data
            # a receiver that is not there, or a full disk, is no fault of the workflow's
            elif data["type"] == "problem" and data.get("kind") not in ("send", "record"):
                raise NotWarm(f"node {data.get('node')}: {data.get('reason')}")
            elif data["type"] == "stats" and self.pictures > MEASURED:
                median = (data.get("compute_ms") or {}).get("p50")
                if median is not None and math.isfinite(median):
                    return median / 1000
        reason = state.get("reason") or "it ended before its first pictures"
        where = f"node {state['node']}: " if state.get("node") else ""
        raise NotWarm(f"The workflow does not run: {where}{reason}")

    async def stop(self) -> None:
        """End it, and wait until it has ended, so that the next run need not wait."""
        if not self._keys:
            return
        async with self._http.post("/livediffusion/stop", json=self._keys) as reply:
            await reply.read()
        while True:
            async with self._http.get("/livediffusion/stats", params=self._keys) as reply:
                if reply.status != 200 or (await reply.json())["state"] in ("ended", "failed"):
                    return
            await asyncio.sleep(0.05)


async def answered(reply: aiohttp.ClientResponse) -> dict[str, Any]:
    """The JSON of ComfyUI's answer; its error where it is none."""
    try:
        said = await reply.json(content_type=None)
    except ValueError:
        said = None
    return said if isinstance(said, dict) else {"error": {"message": f"it says {reply.status}"}}


def complaint(answer: dict[str, Any]) -> str:
    """What ComfyUI says of a graph that it does not take, with the nodes."""
    error = answer.get("error")
    lines = [error.get("message", "no reason given") if isinstance(error, dict) else str(error)]
    for node, what in (answer.get("node_errors") or {}).items():
        lines += [
            f"node {node} ({what.get('class_type')}): {one.get('message')} {one.get('details', '')}"
            for one in what.get("errors", [])
        ]
    return "; ".join(line.strip() for line in lines)
