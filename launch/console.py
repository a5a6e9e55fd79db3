"""What the command says while it works, and processes that end with it. Standard library only."""

import contextlib
import os
import pathlib
import subprocess
import sys
import time
from typing import Any


class Stop(Exception):
    """Ends the command with one plain sentence."""


def say(text: str) -> None:
    print(text, flush=True)


class Spinner:
    """A line that says what takes long, and for how long already."""

    def __init__(self, what: str):
        self.what = what
        self.began = time.monotonic()
        self.live = sys.stdout.isatty()
        self._shown = 0.0

    def __enter__(self):
        say(f"- {self.what} ...")
        return self

    def update(self, detail: str) -> None:
        now = time.monotonic()
        if now - self._shown < (0.2 if self.live else 15):
            return
        self._shown = now
        line = f"  {now - self.began:4.0f} s  {detail}"[:100]
        print(f"\r{line:<100}" if self.live else line, end="" if self.live else "\n", flush=True)

    def __exit__(self, kind, error, trace):
        if self.live:
            print("\r" + " " * 100 + "\r", end="")
        if kind is None:
            say(f"  done in {time.monotonic() - self.began:.1f} s")


def watched(command: list[str], what: str, log: pathlib.Path, **kwargs) -> None:
    """Run a long command, its last line shown, its whole output in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with Spinner(what) as spinner, log.open("w", encoding="utf-8", errors="replace") as out:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            text=True, encoding="utf-8", errors="replace", **kwargs,
        )  # fmt: skip
        with ended(process):
            for line in process.stdout:
                out.write(line)
                if line.strip():
                    spinner.update(line.strip())
            if process.wait() != 0:
                out.flush()
                tail = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-15:])
                raise Stop(f"{what} failed. The end of {log}:\n{tail}")


def apart() -> dict[str, Any]:
    """For subprocess.Popen: Ctrl+C is for this process only, which ends that one in order."""
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


@contextlib.contextmanager
def ended(process: subprocess.Popen):
    """The process does not outlive the block, whatever happens in it."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
