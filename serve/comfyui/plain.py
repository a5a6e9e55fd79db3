"""A ComfyUI that is started anew each time: where there is no keeper (not Linux)."""

import asyncio
import contextlib
import json
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from typing import Any

from . import keeping

TIED = pathlib.Path(__file__).with_name("tied.py")
_TAIL = 25  # lines of a log that are told


class Plain:
    """One ComfyUI after the other, of this process: it ends with it. As holder.Held."""

    adopted = False

    def __init__(self, home: pathlib.Path, name: str, python, env: dict[str, str], **orders: Any):
        self.place = home / f"{name}-{secrets.token_hex(4)}"
        for part in ("output", "temp", "user"):
            (self.place / part).mkdir(parents=True)
        self._python, self._env, self._orders = python, env, orders
        self._process: asyncio.subprocess.Process | None = None
        self._over = asyncio.Event()
        self._answers = False
        self.first: dict[str, Any] = {}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        mute = 0
        while not self._over.is_set():
            self._answers, port = False, keeping.free_port()
            process = self._process = await self._start(port)
            yield {"event": "forked", "pid": process.pid, "port": port}
            status = await process.wait()
            self._kill()  # what it has started ends with it
            mute = 0 if self._answers else mute + 1
            wait = keeping.later(mute)
            yield {"event": "died", "pid": process.pid, "status": status, "again_s": wait}
            await within(self._over, wait)

    async def _start(self, port: int) -> asyncio.subprocess.Process:
        arguments = [one.replace("{place}", str(self.place)) for one in self._orders["arguments"]]
        orders = {**self._orders, "arguments": [*arguments, "--port", str(port)]}
        with (self.place / "log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                str(self._python), str(TIED), stdin=subprocess.PIPE, stdout=log, stderr=log,
                env=self._env, start_new_session=os.name == "posix",
            )  # fmt: skip
        # left open: its end is the process's
        process.stdin.write(json.dumps(orders).encode() + b"\n")
        return process

    def order(self, what: str, **more: Any) -> None:
        if what == "answers":
            self._answers = True
        if what == "again":
            self._kill()

    def _kill(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()

    async def end(self) -> None:
        self._over.set()
        self.order("again")
        if self._process is not None:
            await self._process.wait()
        shutil.rmtree(self.place, ignore_errors=True)

    def let_go(self) -> None:
        """Nobody else can have it."""
        self._over.set()
        self.order("again")


async def within(event: asyncio.Event, seconds: float) -> bool:
    """Whether an event comes in time.

    Not asyncio.wait_for: before Python 3.12 that loses a cancellation which comes with the event,
    and a loop around it would go on.
    """
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({waiting}, timeout=seconds)
    finally:
        waiting.cancel()
    return event.is_set()


def tail(log: pathlib.Path) -> str:
    """The end of a log."""
    try:
        text = log.read_bytes()[-20_000:].decode("utf-8", "replace")
    except OSError as reason:
        return f"(no log: {reason.strerror})"
    return "\n".join(text.splitlines()[-_TAIL:])
