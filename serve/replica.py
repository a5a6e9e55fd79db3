"""One replica: a ComfyUI with its gate, as an actor of Serve.

Its start is ComfyUI's start, the workflow's first pictures and the gate's port; only then does
Serve call it healthy. Its end begins with `__del__`: Serve calls that when it has taken the replica
out and no request runs there, and waits for it (graceful_shutdown_timeout_s). So no frame may be a
request of Serve's, and the drain starts at once: new streams are refused, pages are told, and the
lobby hears of it with the next report.
"""

import asyncio
import contextlib
import os
import pathlib
import time
from collections import deque
from typing import Any

import aiohttp

from . import capacity, scaling
from .comfyui.plain import within
from .comfyui.process import ComfyUI
from .metrics import OfReplica
from .settings import Settings
from .tickets import Tickets, decoded
from .workflow.exposed import Exposed

EVERY = 0.5  # seconds between two reports
LATE = 2.0  # seconds in which the lobby answers
_DOWN = 60.0  # seconds without a ComfyUI after which this replica is given up
THREADS = "LIVEDIFFUSION_THREADS"  # OMP_NUM_THREADS as the user has it
_EVENTS = 100  # that wait for the lobby


class Replica:
    """Args:
    settings: of the house.
    lobby: its handle.
    """

    async def __init__(self, settings: Settings, lobby: Any):
        import ray
        from ray import serve

        began = time.monotonic()
        self._settings, self._lobby = settings, lobby
        self.id = serve.get_replica_context().replica_id.unique_id
        self._gate: Any = None
        self._comfyui: ComfyUI | None = None
        self._loop: asyncio.Task | None = None
        self._draining = self._closing = self._over = False
        self._drained = ""
        self._answer: dict[str, Any] = {}
        self._news = asyncio.Event()
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        self._endings: set[asyncio.Task] = set()
        self._alive = began
        self._told = False
        context = ray.get_runtime_context()
        gpus = ray.get_gpu_ids()
        # replicas of one node that see the same GPU share its time
        self._device = f"{context.get_node_id()[:12]}:{gpus[0]}" if gpus else self.id
        self._figures = OfReplica(self.id, settings.fps)
        try:
            await self._start(ray.util.get_node_ip_address())
        except BaseException:
            await self._stop()
            raise
        self._figures.warmed(time.monotonic() - began)
        self._loop = asyncio.ensure_future(self._reporting())

    async def _start(self, node: str) -> None:
        from .gate.gate import Gate

        settings = self._settings
        for name, what in (("comfyui", "ComfyUI's folder"), ("python", "ComfyUI's Python")):
            if not getattr(settings, name):
                raise RuntimeError(
                    f"{what} is not known on this machine: set `{name}` or "
                    f"LIVEDIFFUSION_{name.upper()}."
                )
        self._comfyui = comfyui_of(settings)
        await self._comfyui.start()
        self._exposed = Exposed.load(
            settings.workflow, await object_info(self._comfyui.url), settings.inputs
        )
        graph = self._exposed.graph({})
        self._measured = await self._comfyui.warm(graph, settings.warm_s)
        self._house = {
            "version": version(settings, self._exposed), "inputs": self._exposed.inputs,
            "views": self._exposed.views, "camera": self._exposed.camera,
            "title": settings.title or self._exposed.title,
        }  # fmt: skip
        self._gate = Gate(
            self._comfyui, self._exposed, Tickets(decoded(settings.key)), self.id, settings.fps,
            self._changed, self._event,
        )  # fmt: skip
        local = settings.local()
        port = await self._listen("127.0.0.1" if local else "0.0.0.0")
        self._address = f"{'127.0.0.1' if local else node}:{port}"
        seen = settings.host if local else node
        self._direct = f"http://{seen}:{port}" if settings.direct and not settings.secure else None

    async def _listen(self, host: str) -> int:
        first, last = self._settings.ports
        for port in range(first, last + 1):
            with contextlib.suppress(OSError):
                return await self._gate.start(host, port)
        raise RuntimeError(f"Of the ports {first} to {last} none is free: choose others (--ports).")

    # what Serve calls

    async def check_health(self) -> None:
        """Raises RuntimeError when this replica is no use any more, so that Serve makes another."""
        if self._drained:
            raise RuntimeError(self._drained)
        if self._comfyui.alive:
            self._alive = time.monotonic()
        elif time.monotonic() - self._alive > _DOWN:
            raise RuntimeError(f"ComfyUI does not come back in {_DOWN:.0f} s.")
        if self._loop.done():
            raise RuntimeError("The replica does not report any more.")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the policy reads (scaling.py)."""
        said = self._gate.report()
        asked = self._answer.get("asked")
        return {
            scaling.STREAMS: float(len(said["streams"])),
            scaling.WAITING: float(self._answer.get("waiting", 0)),
            scaling.SLOTS: capacity.slots(
                said.get("tick_s") or self._measured.tick_s, self._settings.fps,
                0 if self._settings.cpu else self._settings.gpus_each,
            ),
            scaling.ASKED: scaling.NOT_ASKED if asked is None else float(asked),
        }  # fmt: skip

    async def wake(self) -> bool:
        """The request that Serve starts a first replica for."""
        return True

    async def __del__(self):
        """The start of draining, see above."""
        if self._gate is not None and not self._draining:
            await self._drain()
        await self._stop()

    # inside

    def _changed(self) -> None:
        self._news.set()

    def _event(self, event: str, **fields: Any) -> None:
        self._events.append({"event": event, **fields})

    async def _drain(self) -> None:
        self._draining = True
        self._news.set()
        if not self._closing:
            await self._gate.drain(self._settings.drain_s)

    async def _stop(self) -> None:
        self._over = True
        if self._loop is not None:
            # a cancel that comes with an answer is lost in wait_for: the loop looks itself, too
            self._loop.cancel()
            await asyncio.wait({self._loop}, timeout=LATE + 1)
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._lobby.lost.remote(self.id), LATE)
        if self._gate is not None:
            await self._gate.stop()
        if self._comfyui is not None:
            await self._comfyui.stop()
        self._gate = self._comfyui = self._loop = None

    async def _reporting(self) -> None:
        """Tell the lobby how it is, whether it is there or not."""
        # asked, too: before Python 3.12 wait_for loses a cancellation that comes with the answer
        while not self._over:
            self._news.clear()
            said = self._gate.report()
            self._figures.report(said)
            events = list(self._events)
            try:
                answer = await asyncio.wait_for(self._lobby.report.remote({
                    **said, "replica": self.id, "address": self._address, "direct": self._direct,
                    "device": self._device, "tick_s": said.get("tick_s") or self._measured.tick_s,
                    "draining": self._draining, "events": events,
                    "ready": bool(said.get("ready", True)) and not self._draining,
                    "house": None if self._told else self._house,
                }), LATE)  # fmt: skip
            except Exception:
                # it is not there; the next one knows nothing of the house
                self._told = False
            else:
                for _ in events:
                    self._events.popleft()
                self._told = True
                self._answer = answer
                self._closing = bool(answer.get("closing"))
                for visitor, (turn, reason) in answer["end"].items():
                    # a page and a ComfyUI that do not answer take seconds: reports do not wait
                    ending = asyncio.ensure_future(self._gate.end(visitor, turn, reason))
                    self._endings.add(ending)
                    ending.add_done_callback(self._ended)
                if answer["drain"] and not self._draining:
                    self._draining = True
                    self._leaving = asyncio.ensure_future(self._leave())
            # soon after a change, but not more often than ten times a second
            await asyncio.sleep(0.1)
            await within(self._news, EVERY - 0.1)

    def _ended(self, ending: asyncio.Task) -> None:
        self._endings.discard(ending)
        if not ending.cancelled() and (reason := ending.exception()) is not None:
            self._event("bug", why=repr(reason))

    async def _leave(self) -> None:
        """An operator's drain: when the streams are gone, Serve makes this replica anew."""
        await self._drain()
        self._drained = "Drained by an operator."


def comfyui_of(settings: Settings) -> ComfyUI:
    """The ComfyUI of this process's device."""
    # what is meant for this process: its modules have names that ComfyUI's have, too
    os.environ.pop("PYTHONPATH", None)
    # Ray gives as many threads as it counts cores for the actor; what the user said holds
    os.environ.pop("OMP_NUM_THREADS", None)
    if os.environ.get(THREADS):
        os.environ["OMP_NUM_THREADS"] = os.environ[THREADS]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ComfyUI(
        pathlib.Path(settings.comfyui), pathlib.Path(settings.python),
        pathlib.Path(settings.base or settings.comfyui),
        [*(["--cpu"] if settings.cpu else []), *settings.options],
        {"CUDA_VISIBLE_DEVICES": shown} if shown and not settings.cpu else {},
        pathlib.Path(settings.home) if settings.home else None,
        api_nodes=settings.api_nodes,
    )  # fmt: skip


async def object_info(url: str) -> dict[str, Any]:
    """What a ComfyUI says of its nodes."""
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as client, \
            client.get(f"{url}/object_info") as answer:  # fmt: skip
        answer.raise_for_status()
        return await answer.json()


def version(settings: Settings, exposed: Exposed) -> str:
    """Changes whenever what pages are shown does."""
    import hashlib
    import json

    shown = json.dumps([settings.title, exposed.inputs, exposed.views, exposed.camera], default=str)
    return hashlib.sha256(shown.encode()).hexdigest()[:12]
