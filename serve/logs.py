"""What happened, one JSON object a line: sessions' starts, moves and ends, replicas' problems.

No picture, no prompt and no address of a visitor is in it. What visitors write is only with
`log_prompts`, as `values`.

Whoever tells an event does not wait for it and does not fail by it, whatever disk it goes to.
"""

import contextlib
import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_LONGEST = 4000  # characters of one value
_HELD = 10_000  # lines that wait for a disk
_AGAIN_S = 1.0  # between two attempts
# what never stands in a line, whoever says it
_NEVER = frozenset({"ticket", "token", "session", "origin", "ip", "picture", "frame"})
_ASKED = frozenset({"values", "prompt", "prompts"})


class Log:
    """Args:
    write: takes a line without its end; None: the logger `livediffusion.serve`, to stdout.
    prompts: whether what visitors write is in it.
    clock: seconds since 1970.
    """

    def __init__(
        self, write: Callable[[str], None] | None = None, prompts: bool = False,
        clock: Callable[[], float] = time.time,
    ):  # fmt: skip
        self._write = write or to_stdout()
        self._prompts, self._clock = prompts, clock
        self._lost, self._why = 0, ""

    def event(self, event: str, **fields: Any) -> None:
        """One line: its time (UTC, seconds since 1970), the event, its fields that are known.

        Raises nothing; what cannot be written is counted.
        """
        try:
            self._write(self._line(event, fields))
        except Exception as reason:
            self._lost += 1
            self._why = str(reason)

    @property
    def problem(self) -> str | None:
        """What is wrong with the log, in a sentence or two; None if nothing is."""
        if self._lost:
            return f"{self._lost} lines of the log are lost: {self._why}"
        return getattr(self._write, "problem", None)

    def _line(self, event: str, fields: dict[str, Any]) -> str:
        line = {"at": round(self._clock(), 3), "event": event}
        for name, value in fields.items():
            if value is None or name in _NEVER or (name in _ASKED and not self._prompts):
                continue
            line[name] = value[:_LONGEST] if isinstance(value, str) else value
        return json.dumps(line, default=str, separators=(",", ":"))


def to_stdout() -> Callable[[str], None]:
    """A logger of lines, nothing before them."""
    logger = logging.getLogger("livediffusion.serve")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger.info


def to_file(path: str, again_s: float = _AGAIN_S) -> Callable[[str], None]:
    """See `_File`."""
    return _File(path, again_s)


class _File:
    """Lines at the end of a file, each as soon as it is there, so that no crash keeps one back.

    A thread writes them: a disk that is full or away holds up nothing. It tries again every second,
    and goes on where it was; beyond 10,000 lines that wait, further ones are counted only.

    Args:
        path: of the file; opened anew for each line, so it may be moved away.
        again_s: seconds between two attempts.

    Attributes:
        problem: why lines wait, and how many were lost, in a sentence or two; None if nothing is.
    """

    def __init__(self, path: str, again_s: float):
        self._path, self._again_s = path, again_s
        self._lines: queue.Queue[str] = queue.Queue(_HELD)
        self._why, self._lost = "", 0
        threading.Thread(target=self._run, name="livediffusion-log", daemon=True).start()

    def __call__(self, line: str) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost += 1

    @property
    def problem(self) -> str | None:
        said = []
        if why := self._why:
            said.append(f"The log cannot be written and is tried again: {why}.")
        if lost := self._lost:
            said.append(f"{lost} of its lines are lost.")
        return " ".join(said) or None

    def _run(self) -> None:
        while True:
            rest = self._lines.get().encode() + b"\n"
            while rest:
                try:
                    with open(self._path, "ab", buffering=0) as file:
                        while rest:
                            # a disk that is nearly full takes a part of it
                            rest = rest[file.write(rest) :]
                    self._why = ""
                except OSError as reason:
                    if not self._why:
                        with contextlib.suppress(OSError):
                            sys.stderr.write(f"The log cannot be written: {reason}\n")
                    self._why = str(reason)
                    time.sleep(self._again_s)
