"""Stages of the tests: each ends in time, and leaves no process behind. Standard library only."""

import contextlib
import os
import pathlib
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator

from .console import say

OVERDUE = 124  # what a stage that did not end in time ends with
_MARK = "LIVEDIFFUSION_STAGE"  # in the environment of all that a stage starts
_GRACE = 5.0  # seconds to end by itself


@contextlib.contextmanager
def compiled_once() -> Iterator[dict[str, str]]:
    """An environment in which Python keeps what it has compiled, at the most until the end.

    Where it is told to keep nothing (PYTHONDONTWRITEBYTECODE), each of the many processes of the
    suite would compile ComfyUI and the tests anew: 5 seconds of one core.
    """
    with tempfile.TemporaryDirectory(prefix="livediffusion-pyc-") as folder:
        env = dict(os.environ)
        if env.pop("PYTHONDONTWRITEBYTECODE", ""):
            env["PYTHONPYCACHEPREFIX"] = folder
        yield env


class Stages:
    """Args:
    each: seconds that a stage may take.
    all: seconds that all of them together may take.
    """

    def __init__(self, each: float, all: float):
        self._each, self._all = each, all
        self._began = time.monotonic()

    def run(self, what: str, command: list[str], **how) -> int:
        """A stage's exit code; OVERDUE if it had to be ended, or there was no time left for it.

        Args:
            what: names it.
            how: for subprocess.Popen.
        """
        left = self._began + self._all - time.monotonic()
        if left <= 0:
            say(f"{what}: left out, all together took longer than {self._all / 60:.0f} minutes")
            return OVERDUE
        seconds = min(left, self._each)
        how["env"] = {**how.get("env", os.environ), _MARK: (mark := secrets.token_hex(8))}
        # a group of its own, so that it can be ended as one
        process = subprocess.Popen(command, start_new_session=True, **how)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            say(f"\n{what}: ended, it took longer than {seconds / 60:.0f} minutes")
            return OVERDUE
        except KeyboardInterrupt:
            # Ctrl+C reaches this group only
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_GRACE)
            raise
        finally:
            over = process.poll() is not None
            # what is on its way out may take a moment
            there = left = _left(process, mark, _GRACE if over else 0)
            for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
                for pid in left:
                    with contextlib.suppress(OSError):
                        os.kill(pid, number)
                left = left and _left(process, mark, _GRACE)
            if over and there:
                names = ", ".join(f"{name} ({pid})" for pid, name in there.items())
                say(f"{what}: ended what it left running: {names}")


def _left(process: subprocess.Popen, mark: str, seconds: float) -> dict[int, str]:
    """What still runs of a stage after so long, if it does not end before: number and name."""
    deadline = time.monotonic() + seconds
    while True:
        left = _marked(mark)
        if process.poll() is None:
            left[process.pid] = "the stage itself"
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(0.1)


def _marked(mark: str) -> dict[int, str]:
    """Processes with the mark in their environment, whoever their parent is by now. On Linux."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{_MARK}={mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found[int(path.name)] = (path / "comm").read_text(encoding="utf-8").strip()
    return found
