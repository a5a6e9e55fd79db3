"""The ComfyUI of one replica: started or adopted, looked after, warmed up, ended."""

import asyncio
import contextlib
import logging
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp

from launch import server

from . import keeping, plain
from .warm import Measured, NotWarm, used_memory, warmed

_NO_API = "--disable-api-nodes"
LINGER_S = 30.0  # that a keeper waits for the next replica
_STARTS = 300.0  # seconds that a ComfyUI may take to answer, with many packs
_DEATHS = 3  # that it may die before it answers for the first time
_ASKED = 10.0  # seconds between two looks whether it answers
_PATIENCE = 5.0  # seconds that an answer may take
_SILENT = 90.0  # seconds without an answer after which it is taken to hang: loading blocks it

_log = logging.getLogger(__name__)


class NotStarted(RuntimeError):
    """ComfyUI does not come up; the message says why, with the end of its log."""


class ComfyUI:
    """One ComfyUI on loopback that is there again when it dies.

    Args:
        folder: of ComfyUI's main.py.
        python: that runs it.
        base: its base directory: models, custom nodes, input. The pack is linked into it unless it
            is there. Output, temporary files and what it keeps of users are this replica's own,
            below `home`, and gone at the end.
        options: more of ComfyUI's own.
        device_env: environment that says which device is this replica's. A ComfyUI is adopted by
            replicas with the same folder, python, base, options and device_env only.
        home: a folder of this user's for what keepers need, the same for all replicas of a node.
        api_nodes: have ComfyUI's own nodes for paid services elsewhere, too. Their import is more
            than half of the time that a fork takes to answer (docs/serve.md).

    Attributes:
        url: of the one that runs; None before the first.
        pid: its process, None while there is none.
        alive: it answers.
        generation: counts the ComfyUIs; restarts: those after the first that this object saw.
        adopted: the first was there before.
        failed: why there is none and none will be soon, in one sentence; None else.
        changed: called after each change of these, in the event loop.
    """

    imports = keeping.PRELOADED  # what the keeper imports
    linger_s = LINGER_S

    def __init__(
        self,
        folder: pathlib.Path,
        python: pathlib.Path,
        base: pathlib.Path,
        options: Sequence[str] = (),
        device_env: dict[str, str] | None = None,
        home: pathlib.Path | None = None,
        api_nodes: bool = False,
    ):
        self.folder, self.python, self.base = (pathlib.Path(one) for one in (folder, python, base))
        self.options = [str(one) for one in options]
        if not api_nodes and _NO_API not in self.options:
            self.options.append(_NO_API)
        self.device_env = {k: str(v) for k, v in (device_env or {}).items()}
        self.home = pathlib.Path(home or server.setup.CACHE / "replicas")
        self.changed: list[Callable[[], None]] = []
        self.url: str | None = None
        self.pid: int | None = None
        self.generation = self.restarts = 0
        self.adopted = False
        self.device: dict[str, Any] = {}
        self._held: Any = None
        self._up, self._news = asyncio.Event(), asyncio.Event()
        self._deaths = 0
        self.failed: str | None = None
        self._task: asyncio.Task | None = None
        self._http: aiohttp.ClientSession | None = None

    @property
    def alive(self) -> bool:
        return self._up.is_set()

    @property
    def log(self) -> pathlib.Path | None:
        """What it says; bounded, and gone with it."""
        return self._held.place / "log" if self._held is not None else None

    # -- its course -------------------------------------------------------------------------

    async def start(self) -> None:
        """Adopt or start a ComfyUI; returns when it answers. Raises NotStarted."""
        link(self.base)
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_PATIENCE))
        try:
            self._held = await self._hold()
            self._task = asyncio.create_task(self._look_after())
            await self._answered(_STARTS)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End ComfyUI and all that is its own."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._held is not None:
            await self._held.end()
        if self._http is not None:
            await self._http.close()
        self._task = self._held = self._http = None
        self._fell()

    def let_go(self) -> None:
        """End without ComfyUI: the next replica on this node adopts it, if one comes in time."""
        if self._held is not None:
            self._held.let_go()

    async def ready(self, seconds: float) -> bool:
        """Whether it answers, waited for."""
        return await plain.within(self._up, seconds)

    def again(self) -> None:
        """Kill it; another is there soon."""
        if self._held is not None:
            self._held.order("again")

    async def warm(self, graph: dict[str, Any], seconds: float = 600.0) -> Measured:
        """Run a graph live for some frames, which loads its models; see warm.warmed."""
        if self.url is None:
            raise NotWarm("ComfyUI does not run.")
        return await warmed(self.url, graph, seconds, self.pid)

    def memory(self) -> dict[str, Any]:
        """Bytes in use and in all, of the device that ComfyUI runs on, as of the last look."""
        used, device, total = used_memory(self.device, self.pid)
        return {"used": used, "total": total, "device": device}

    async def _hold(self) -> Any:
        # what only says where this process is does not keep another from adopting
        name = None
        if sys.platform == "linux":
            from . import holder

            name = holder.fingerprint(
                str(self.folder), str(self.python), str(self.base), self.options,
                self.device_env, list(self.imports), self.linger_s,
            )  # fmt: skip
            for _ in range(3):
                if (held := await holder.adopted(self.home, name)) is not None:
                    self.adopted = True
                    return held
                with contextlib.suppress(holder.Taken):
                    return await holder.started(
                        self.home, name, self.python, self._environment(),
                        comfyui=str(self.folder), arguments=self._arguments(),
                        probe="--cpu" not in self.options, imports=list(self.imports),
                        linger_s=self.linger_s,
                    )  # fmt: skip
            raise NotStarted("Other replicas hold each ComfyUI that this one starts.")
        arguments = self._arguments()
        if "--cpu" not in arguments and not await asyncio.to_thread(server.has_gpu, self.python):
            arguments.append("--cpu")
        return plain.Plain(
            self.home, "plain", self.python, self._environment(),
            comfyui=str(self.folder), arguments=arguments,
        )  # fmt: skip

    def _arguments(self) -> list[str]:
        return [
            "--listen", "127.0.0.1", "--base-directory", str(self.base),
            "--output-directory", "{place}/output", "--temp-directory", "{place}",
            "--user-directory", "{place}/user", "--disable-auto-launch",
            "--database-url", "sqlite:///:memory:", *self.options,
        ]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.device_env, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}

    # -- looking after it -------------------------------------------------------------------

    async def _look_after(self) -> None:
        """Hear of deaths, see when it answers, have what hangs killed; a keeper anew if it dies."""
        while True:
            if self._held.first:
                self._forked(self._held.first)
            watching = asyncio.create_task(self._watch())
            try:
                async for event in self._held.events():
                    if event["event"] == "forked":
                        self._forked(event)
                    elif event["event"] == "died":
                        self._died(event)
            finally:
                watching.cancel()
            _log.warning("the keeper of ComfyUI is gone; another is started")
            if self.pid is not None and os.name == "posix":
                # ComfyUI ends with its keeper; what it has started would not
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
            self._fell()
            self._held.let_go()
            try:
                self._held = await self._hold()
            except Exception as reason:
                self.failed = str(reason)
                _log.error("%s", reason)
                await asyncio.sleep(5)

    def _forked(self, event: dict[str, Any]) -> None:
        if event["pid"] is None:
            return
        self.pid, self.url = event["pid"], f"http://127.0.0.1:{event['port']}"
        self.restarts += self.generation > 0
        self.generation += 1
        self._news.set()
        self._tell()

    def _died(self, event: dict[str, Any]) -> None:
        self._deaths += not self.alive
        if self._deaths >= _DEATHS:
            self.failed = f"ComfyUI died {self._deaths} times before it answered."
        _log.warning(
            "ComfyUI %s ended with %s; the next one in %s s", event["pid"], event["status"],
            event["again_s"],
        )  # fmt: skip
        self._fell()

    def _fell(self) -> None:
        self._up.clear()
        self._news.set()
        self.pid = None
        self._tell()

    def _tell(self) -> None:
        for call in self.changed:
            call()

    async def _watch(self) -> None:
        answered = time.monotonic()
        seen = 0
        while True:
            generation = self.generation
            if generation != seen:
                seen, answered = generation, time.monotonic()
            if await self._answers() and generation == self.generation and self.pid is not None:
                answered, self._deaths, self.failed = time.monotonic(), 0, None
                if not self.alive:
                    self._held.order("answers", pid=self.pid)
                    self._up.set()
                    self._tell()
            elif self.alive and time.monotonic() - answered > _SILENT:
                _log.warning("ComfyUI has not answered for %s s and is killed", _SILENT)
                self.again()
                answered = time.monotonic()
            await plain.within(self._news, _ASKED if self.alive else 0.05)
            self._news.clear()

    async def _answers(self) -> bool:
        if self.url is None or self.pid is None:
            return False
        try:
            async with self._http.get(f"{self.url}/system_stats") as reply:
                said = await reply.json()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError):
            return False
        self.device = (said.get("devices") or [{}])[0]
        return reply.status == 200

    async def _answered(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not await self.ready(0.2):
            if self.failed or time.monotonic() > until:
                why = self.failed or f"it has not answered for {seconds:g} seconds."
                said = plain.tail(self.log) if self.log is not None else ""
                raise NotStarted(f"ComfyUI does not start: {why} The end of its log:\n{said}")


def link(base: pathlib.Path) -> None:
    """The pack in a base folder's custom nodes, unless it is there under any name."""
    nodes = base / "custom_nodes"
    if nodes.is_dir() and any(one.resolve() == server.ROOT for one in nodes.iterdir()):
        return
    with server.setup.setting_up():
        server.link_pack(base)
