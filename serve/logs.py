"""What happened, one JSON object a line: sessions' starts, moves and ends, replicas' problems.

No picture, no prompt and no address of a visitor is in it. What visitors write is only with
`log_prompts`, as `values`.
"""

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

_LONGEST = 4000  # characters of one value
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

    def event(self, event: str, **fields: Any) -> None:
        """One line: its time (UTC, seconds since 1970), the event, its fields that are known."""
        line = {"at": round(self._clock(), 3), "event": event}
        for name, value in fields.items():
            if value is None or name in _NEVER or (name in _ASKED and not self._prompts):
                continue
            line[name] = value[:_LONGEST] if isinstance(value, str) else value
        self._write(json.dumps(line, default=str, separators=(",", ":")))


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


def to_file(path: str) -> Callable[[str], None]:
    """Lines at the end of a file; each is written at once, so that no crash keeps one back."""

    def write(line: str) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    return write
