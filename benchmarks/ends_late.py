"""What each way in and out of a live run adds: the counter film through it, beside the WebSocket.

The part `ends` of `run.py bench`. Each way has a run of its own of a graph that computes nothing,
in this process; the other end is ffmpeg, aiortc or a library's own receiver, on this machine. Ways
out are measured beside a Live View's WebSocket, the same frames; ways in one after the other, with
the WebSocket before them. Late is a picture from the moment it is made (in: handed to who sends it;
out: handed to the page's WebSocket) until its number is read at the other end.
"""

import asyncio
import contextlib
import importlib.util
import io
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from measure import Bar, Report

SIDE, FPS = 256, 30
WARM = 30  # frames that are not counted
LIMIT = 15  # seconds that a way may take longer than its frames do
WALL = time.time() - time.monotonic()  # what some tell times by


class Seen(dict):
    """When the number of each picture was read first, by time.monotonic.

    Attributes:
        wrong: pictures that were there before, came in another order or cannot be read.
    """

    def __init__(self):
        super().__init__()
        self.wrong, self._last = 0, -1

    def add(self, number: int | None, at: float | None = None) -> None:
        if number == self._last:
            return  # a still picture is sent again
        if number is None or number < self._last:
            self.wrong += 1
            return
        self._last = number
        self[number] = time.monotonic() if at is None else at


class Out(NamedTuple):
    """A way out.

    Attributes:
        name: for the table.
        here: what it needs is here.
        open: a context that gives Live Send's settings (None for a way of a Live View) and a Seen.
        play: for a way of a Live View: reads it, given (http, comfy, begun, seen).
    """

    name: str
    here: Callable[[], bool]
    open: Callable[[], Any]
    play: Callable[..., Any] | None = None


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _ffmpeg() -> bool:
    import streams

    return streams.FFMPEG is not None


# -- ways out ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _streamed(scheme: str, query: str = "") -> Iterator[tuple[dict, Seen]]:
    import streams

    seen = Seen()
    with streams.Server(scheme, query, (SIDE, SIDE), prompt=True) as server:
        server.seen = _Told(lambda pair: seen.add(*pair))
        yield {"to": "stream", "address": server.address}, seen


class _Told(list):
    """A list that tells what is put into it."""

    def __init__(self, tell: Callable[[Any], None]):
        super().__init__()
        self._tell = tell

    def append(self, item: Any) -> None:
        super().append(item)
        self._tell(item)


@contextlib.contextmanager
def _ndi_out() -> Iterator[tuple[dict, Seen]]:
    from ends import count
    from livediffusion.live.sources import Wanted
    from livediffusion.live.sources.ndi import Kind

    seen, name, over = Seen(), f"bench {os.getpid()}", threading.Event()

    def read() -> None:
        while not over.is_set():
            source = Kind(Wanted(name, SIDE, SIDE, FPS))
            try:
                source.open()
                while not over.is_set():
                    if (shot := source.newest(0.1)) is not None:
                        seen.add(count(shot.picture))
            except Exception:  # not there yet
                over.wait(0.2)
            finally:
                source.close()

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield {"to": "ndi", "name": name}, seen
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _whip_out() -> Iterator[tuple[dict, Seen]]:
    import rtc

    seen = Seen()
    with rtc.Taker() as taker:
        taker.numbers = _Told(seen.add)
        yield {"to": "whip", "address": f"http://127.0.0.1:{taker.port}/whip"}, seen


@contextlib.contextmanager
def _of_view() -> Iterator[tuple[None, Seen]]:
    yield None, Seen()


async def _mjpeg(http, comfy, begun: dict, seen: Seen) -> None:
    async with http.get(comfy.url + begun["views"][0]["mjpeg"]) as reply:
        while True:
            length = 0
            while line := (await reply.content.readline()).strip() or not length:
                if isinstance(line, bytes) and line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            seen.add(_number(await reply.content.readexactly(length)))


async def _whep(http, comfy, begun: dict, seen: Seen) -> None:
    import rtc

    end = rtc.End(http, comfy.url + begun["views"][0]["whep"])
    end.numbers = _Told(seen.add)
    try:
        if await end.open() != 201:
            raise RuntimeError(f"WHEP answers {end.status}")
        await asyncio.Event().wait()
    finally:
        await end.close()


OUT = [
    Out("MJPEG address of a Live View", lambda: True, _of_view, _mjpeg),
    Out("WHEP of a Live View", lambda: _has("aiortc"), _of_view, _whep),
    Out("Live Send, whip", lambda: _has("aiortc"), _whip_out),
    Out("Live Send, ndi", lambda: _has("NDIlib"), _ndi_out),
    Out("Live Send, stream, RTMP", _ffmpeg, lambda: _streamed("rtmp")),
    Out("Live Send, stream, RTSP", _ffmpeg, lambda: _streamed("rtsp")),
    Out("Live Send, stream, SRT (latency 120 ms)", _ffmpeg, lambda: _streamed("srt")),
    Out("Live Send, stream, SRT (latency 20 ms)", _ffmpeg,
        lambda: _streamed("srt", "latency=20000")),
]  # fmt: skip


def _number(jpeg: bytes) -> int | None:
    from ends import count
    from PIL import Image

    return count(np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")))


def _jpeg(number: int) -> bytes:
    import inprocess
    from ends import counted

    return inprocess.jpeg(counted(number, SIDE, SIDE))


async def _shown(client, seen: Seen) -> None:
    """What the WebSocket of a Live View brings."""
    while True:
        while client.views:
            packet, at = client.views.pop(0)
            seen.add(_number(packet.payload), at - WALL)
        await asyncio.sleep(0.001)


async def leave(comfy, way: Out | None, frames: int) -> tuple[dict[int, float], Seen, Seen]:
    """The film through a run: when each was sent, seen at the WebSocket's end, and at the way's."""
    import aiohttp
    import inprocess

    made = inprocess.graph(width=SIDE, height=SIDE, fps=120)
    made["5"]["inputs"]["quality"] = 85
    with way.open() if way else _of_view() as (settings, seen):
        if settings is not None:
            usual = {"name": "", "address": "", "fps": 120, "bit_rate": 6.0}
            made["6"] = {
                "class_type": "LiveSend", "inputs": {"image": ["4", 0], **usual, **settings},
            }  # fmt: skip
        pictures = [_jpeg(number) for number in range(frames + FPS * LIMIT)]
        async with aiohttp.ClientSession() as http:
            client = await inprocess.Client.start(http, comfy.url, made)
            sent, shown = {}, Seen()
            tasks = [asyncio.create_task(_shown(client, shown))]
            if way is not None and way.play is not None:
                tasks.append(asyncio.create_task(way.play(http, comfy, client.begun, seen)))
            begun = time.monotonic()
            for number, picture in enumerate(pictures):
                if len(seen if way else shown) >= frames:
                    break
                await asyncio.sleep(max(0.0, begun + number / FPS - time.monotonic()))
                sent[number] = time.monotonic()
                await client.send(picture)
            await asyncio.sleep(0.5)
            await client.stop()
            for task in tasks:
                task.cancel()
            for done in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(done, Exception) and not isinstance(done, asyncio.CancelledError):
                    raise done
    return sent, shown, seen


# -- ways in ----------------------------------------------------------------------------------


class In(NamedTuple):
    """A way in: `open` gives Live Camera's settings, when each picture was made, and who begins."""

    name: str
    here: Callable[[], bool]
    open: Callable[[int], Any]


@contextlib.contextmanager
def _from_ffmpeg(kind: str, frames: int) -> Iterator[tuple[dict, dict[int, float], None]]:
    """ffmpeg sends what it gets by a pipe; it listens, or publishes to a small RTSP server."""
    import rtsp_server
    import streams
    from ends import counted

    port = streams.free_port()
    server = rtsp_server.RtspServer() if kind == "rtsp" else None
    h264 = ["-c:v", "libx264", "-preset", "veryfast", "-tune", "zerolatency", "-g", "30",
            "-b:v", "6M"]  # fmt: skip
    address, to = {
        "rtsp": (server.url if server else "", [*h264, "-f", "rtsp", "-rtsp_transport", "tcp"]),
        "rtmp": (f"rtmp://127.0.0.1:{port}/live/film", [*h264, "-f", "flv", "-listen", "1"]),
        "srt": (f"srt://127.0.0.1:{port}", [*h264, "-f", "mpegts"]),
        "mjpeg": (f"http://127.0.0.1:{port}/film", [
            "-c:v", "mjpeg", "-q:v", "3", "-f", "mpjpeg", "-boundary_tag", "film", "-content_type",
            "multipart/x-mixed-replace;boundary=film", "-listen", "1"]),
    }[kind]  # fmt: skip
    there = f"{address}?mode=listener" if kind == "srt" else address
    process = subprocess.Popen(
        [streams.FFMPEG, "-nostdin", "-v", "error", "-fflags", "nobuffer", "-probesize", "32",
         "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{SIDE}x{SIDE}", "-r", str(FPS),
         "-i", "pipe:0", "-flush_packets", "1", *to, there],
        stdin=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    made, over = {}, threading.Event()

    def feed() -> None:
        begun = time.monotonic()
        with contextlib.suppress(OSError, ValueError):
            for number in range(4096):
                if over.wait(max(0.0, begun + number / FPS - time.monotonic())):
                    return
                made[number] = time.monotonic()
                process.stdin.write(counted(number, SIDE, SIDE).tobytes())
                process.stdin.flush()

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield {"source": "address", "address": address}, made, None
    finally:
        over.set()
        process.kill()
        process.wait()
        thread.join()
        if server is not None:
            server.close()


@contextlib.contextmanager
def _from_ndi(frames: int) -> Iterator[tuple[dict, dict[int, float], None]]:
    from ends import counted
    from livediffusion.live.sinks import Target
    from livediffusion.live.sinks.ndi import Kind

    name, made, over = f"bench in {os.getpid()}", {}, threading.Event()

    def feed() -> None:
        sink = Kind(Target("ndi", name, "", FPS, 6.0))
        try:
            sink.open(SIDE, SIDE)
            begun = time.monotonic()
            for number in range(4096):
                if over.wait(max(0.0, begun + number / FPS - time.monotonic())):
                    return
                made[number] = time.monotonic()
                sink.send(counted(number, SIDE, SIDE), made[number])
        finally:
            sink.close()

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield {"source": "ndi", "sender": name}, made, None
    finally:
        over.set()
        thread.join()


class _Stamps(dict):
    """Times of the wall clock, kept as those of time.monotonic."""

    def __setitem__(self, number: int, at: float) -> None:
        super().__setitem__(number, at - WALL)


@contextlib.contextmanager
def _from_whip(frames: int) -> Iterator[tuple[dict, dict[int, float], Any]]:
    import rtc

    film = rtc.Film(FPS, SIDE)
    film.times = _Stamps()

    async def publish(http, comfy, begun):
        end = rtc.End(http, comfy.url + begun["cameras"][0]["whip"]["url"], film)
        if await end.open() != 201:
            raise RuntimeError(f"WHIP answers {end.status}")
        return end

    yield {"source": "whip"}, film.times, publish


IN = [
    In("whip", lambda: _has("aiortc"), _from_whip),
    In("ndi", lambda: _has("NDIlib"), _from_ndi),
    In("address, MJPEG", _ffmpeg, lambda frames: _from_ffmpeg("mjpeg", frames)),
    In("address, RTMP", _ffmpeg, lambda frames: _from_ffmpeg("rtmp", frames)),
    In("address, RTSP", _ffmpeg, lambda frames: _from_ffmpeg("rtsp", frames)),
    In("address, SRT", _ffmpeg, lambda frames: _from_ffmpeg("srt", frames)),
]  # fmt: skip


async def enter(comfy, way: In, frames: int) -> tuple[dict[int, float], Seen]:
    """The film through a run: when each picture was made, and seen at a Live View's WebSocket."""
    import aiohttp
    import inprocess

    with way.open(frames) as (settings, made, publish):
        graph = inprocess.graph(width=SIDE, height=SIDE, fps=120, **settings)
        graph["5"]["inputs"]["quality"] = 85
        async with aiohttp.ClientSession() as http:
            client = await inprocess.Client.start(http, comfy.url, graph)
            shown = Seen()
            task = asyncio.create_task(_shown(client, shown))
            end = await publish(http, comfy, client.begun) if publish is not None else None
            limit = time.monotonic() + frames / FPS + LIMIT
            while len(shown) < frames and time.monotonic() < limit:
                await asyncio.sleep(0.02)
            await client.stop()
            task.cancel()
            if end is not None:
                await end.close()
    return made, shown


# -- the part ---------------------------------------------------------------------------------


def late(sent: dict[int, float], seen: Seen, besides: Seen | None = None) -> list[float]:
    """Milliseconds of each picture after the first ones, sorted; of those seen on both ways."""
    numbers = [n for n in sorted(seen) if n in sent and (besides is None or n in besides)]
    return sorted(1000 * (seen[n] - sent[n]) for n in numbers[WARM:])


def _row(name: str, ms: list[float], base: float, seen: Seen) -> dict[str, Any]:
    if not ms:
        return {"way": name, "failed": f"{len(seen)} pictures came"}
    median = statistics.median(ms)
    return {
        "way": name, "ms": round(median, 1), "p95": round(ms[int(0.95 * (len(ms) - 1))], 1),
        "added": round(median - base, 1), "x WebSocket": round(median / base, 2),
        "pictures": len(ms), "out of order": seen.wrong,
    }  # fmt: skip


def _allow(folder: str) -> None:
    """Everything on this machine, as its own ComfyUI's user folder says."""
    import folder_paths

    rules = pathlib.Path(folder) / "livediffusion" / "allowed.json"
    rules.parent.mkdir()
    schemes = "rtmp", "rtsp", "srt", "http"
    rules.write_text(json.dumps({"addresses": [f"{s}://127.0.0.1:*/*" for s in schemes]}))
    folder_paths.get_user_directory = lambda: folder


def part(report: Report, quick: bool) -> None:
    """Every way that is here, one after the other."""
    import inprocess

    frames = WARM + (60 if quick else 200)
    with tempfile.TemporaryDirectory() as folder, inprocess.comfy() as (comfy, _):
        _allow(folder)
        sent, shown, _ = asyncio.run(leave(comfy, None, frames))
        ms = late(sent, shown)
        base = statistics.median(ms)
        rows, absent, bases = [_row("WebSocket", ms, base, shown)], [], [base]
        for way in OUT:
            if not way.here():
                absent.append(way.name)
                continue
            with report.part(f"ends, out: {way.name}"):
                sent, shown, seen = asyncio.run(leave(comfy, way, frames))
                beside = late(sent, shown, seen)
                own = statistics.median(beside) if beside else base
                row = _row(way.name, late(sent, seen, shown), own, seen)
                rows.append(row | {"WebSocket beside it": round(own, 1)})
                bases.append(own)
                report.bars.append(Bar(f"out of order, {way.name}", seen.wrong, 0, counted=True))
        report.add("ways out", rows, f"{SIDE} x {SIDE} at {FPS} fps, ms")
        base = statistics.median(bases)
        rows = [{"way": "WebSocket, the median of the above", "ms": round(base, 1)}]
        for way in IN:
            if not way.here():
                absent.append(way.name)
                continue
            with report.part(f"ends, in: {way.name}"):
                made, seen = asyncio.run(enter(comfy, way, frames))
                rows.append(_row(way.name, late(made, seen), base, seen))
                report.bars.append(Bar(f"out of order, {way.name}", seen.wrong, 0, counted=True))
        report.add("ways in", rows, f"{SIDE} x {SIDE} at {FPS} fps, ms")
    if absent:
        print(f"\nnot here: {', '.join(absent)}")
