"""Who holds a keeper: finds one that nobody holds any more, or starts one, and hears from it."""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from typing import Any

from .plain import tail

KEEPER = pathlib.Path(__file__).with_name("keeper.py")
_ANSWERS = 2.0  # seconds in which a keeper says whether it can be held
_BEGINS = 300.0  # seconds that the imports of a new one may take


class Lost(RuntimeError):
    """A keeper that could not be started, or is gone; the message has the end of its log."""


def fingerprint(*parts: Any) -> str:
    """What two replicas share that may have each other's ComfyUI."""
    text = json.dumps([*parts, KEEPER.read_text(encoding="utf-8")], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Taken(Exception):
    """Another replica was faster."""


class Held:
    """A keeper that is held: as long as this process is there, or until `let_go`.

    Attributes:
        place: its private folder; `place / "log"` is what ComfyUI and the keeper say.
        adopted: it was there before.
        first: its first message: pid and port of ComfyUI, pid of the keeper.
    """

    def __init__(self, place, reader, writer, first: dict[str, Any], adopted: bool):
        self.place, self.first, self.adopted = place, first, adopted
        self._reader, self._writer = reader, writer

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """What it tells, until it is gone."""
        with contextlib.suppress(OSError, ValueError):
            while line := await self._reader.readline():
                yield json.loads(line)

    def order(self, what: str, **more: Any) -> None:
        """`end` all of it; kill ComfyUI and have it forked `again`; `answers`: this `pid` does."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write(json.dumps({"do": what, **more}).encode() + b"\n")

    async def end(self, seconds: float = 10.0) -> None:
        """End keeper and ComfyUI, and wait until nothing is left of them."""
        self.order("end")
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._gone(), seconds)
        self.let_go()
        sweep(self.place.parent)

    async def _gone(self) -> None:
        # the connection ends with the keeper's process, when all else of it is removed
        with contextlib.suppress(OSError):
            while await self._reader.read(4096):
                pass

    def let_go(self) -> None:
        """Hold it no more: whoever comes within its `linger_s` has it."""
        self._writer.close()


async def adopted(home: pathlib.Path, name: str) -> Held | None:
    """Hold a keeper with this fingerprint that nobody holds, if there is one."""
    for place in sorted(home.glob(f"{name}-*")):
        if not (place / "held").exists():  # whoever started it has not come yet
            continue
        with contextlib.suppress(OSError, ValueError, asyncio.TimeoutError):
            held = await asyncio.wait_for(_held(place, True), _ANSWERS)
            if held is not None:
                return held
    return None


async def started(
    home: pathlib.Path, name: str, python: pathlib.Path, env: dict[str, str], **orders: Any
) -> Held:
    """Start a keeper and hold it.

    Args:
        home: a folder of this user's, in which it gets one of its own.
        python: ComfyUI's.
        env: all of the environment that it has.
        orders: see keeper.Keeper.

    Raises:
        Lost: it did not come up.
        Taken: another replica holds it.
    """
    sweep(home)
    place = home / f"{name}-{secrets.token_hex(4)}"
    place.mkdir(mode=0o700)
    whole = {**orders, "place": str(place)}
    whole["arguments"] = [one.replace("{place}", str(place)) for one in orders["arguments"]]
    beginning = asyncio.create_task(_begun(place, python, env, whole))
    try:
        held = await asyncio.wait_for(beginning, _BEGINS)
        sweep(home)  # a lock is free a moment after its keeper's connections have ended
        return held
    except (OSError, asyncio.TimeoutError, Lost) as reason:
        said = tail(place / "log")
        if not (place / "lock").exists():  # it never got so far
            shutil.rmtree(place, ignore_errors=True)
        sweep(home)
        words = f"ComfyUI could not be started ({reason}). The end of its log:\n{said}"
        raise Lost(words) from None


async def _begun(place, python, env, orders) -> Held:
    # a file, not a pipe: with uvloop, which Ray has, the keeper inherits the pipe's end twice, and
    # who waits for the end of what it says waits for the end of it
    with (place / "begun").open("w+b") as words:
        process = await asyncio.create_subprocess_exec(
            str(python), str(KEEPER), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env,
            cwd=place, stderr=words,
        )  # fmt: skip
        # it goes on as a process of its own, and this one ends
        with contextlib.suppress(OSError, RuntimeError):  # it may be gone: its words are told
            process.stdin.write(json.dumps(orders).encode() + b"\n")
            await process.stdin.drain()
            process.stdin.close()
        await process.wait()
        words.seek(0)
        said = words.read()
    if process.returncode != 0:
        raise Lost(said.decode("utf-8", "replace")[-2000:] or f"it ended with {process.returncode}")
    while True:
        with contextlib.suppress(OSError, ValueError):
            held = await _held(place, False)
            if held is not None:
                return held
            raise Taken
        if _free(place):
            raise Lost("its keeper ended")
        await asyncio.sleep(0.05)


async def _held(place: pathlib.Path, adopted: bool) -> Held | None:
    """Hold the keeper in a folder; None where another does. Raises OSError where there is none."""
    key = (place / "key").read_text(encoding="ascii")
    here = os.open(place, os.O_RDONLY)
    try:
        reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{here}/s")
    finally:
        os.close(here)
    done = False
    try:
        writer.write(json.dumps({"key": key}).encode() + b"\n")
        line = await reader.readline()
        if not line:
            raise ConnectionError("it is gone")
        first = json.loads(line)
        done = first["event"] == "held"
    finally:
        if not done:
            writer.close()
    return Held(place, reader, writer, first, adopted) if done else None


def sweep(home: pathlib.Path) -> None:
    """Remove what keepers have left that were killed."""
    for place in home.glob("*-*"):
        with contextlib.suppress(OSError):
            begins = time.time() - place.stat().st_mtime < _BEGINS
            if _free(place) if (place / "lock").exists() else not begins:
                shutil.rmtree(place, ignore_errors=True)


def _free(place: pathlib.Path) -> bool:
    try:
        with (place / "lock").open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
