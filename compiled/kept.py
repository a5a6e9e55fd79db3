"""Figures that were measured on this machine, kept for the next start."""

import contextlib
import json
import os
import pathlib
import tempfile
import threading

from ..trust import boundary, schema

MOST = 256  # measurements that are kept; the oldest go
_LIMITS = schema.Limits(bytes=1 << 18, depth=1, items=16 * MOST)
_FIGURES = schema.table(schema.text(1000), schema.number(0.0, 1e6), MOST)


class Kept:
    """Numbers by what they were measured for, in a JSON file.

    Args:
        path: of the file; None keeps them in memory.
    """

    def __init__(self, path: pathlib.Path | None = None):
        self._path, self._known = path, {}
        self._lock = threading.Lock()

    def get(self, key: str) -> float | None:
        """What was measured, or None."""
        with self._lock:
            return self._read().get(key)

    def put(self, key: str, value: float) -> None:
        """Keep a figure; a file that cannot be written loses it at the end of the process."""
        with self._lock:
            known = self._read()
            known.pop(key, None)
            known[key] = round(float(value), 4)
            while len(known) > MOST:
                known.pop(next(iter(known)))
            self._known = known
            if self._path is not None:
                with contextlib.suppress(OSError):
                    self._write(known)

    def _read(self) -> dict[str, float]:
        """What the file holds, if it is one of ours; what is in memory otherwise."""
        if self._path is None:
            return self._known
        try:
            data = boundary.contents(self._path, _LIMITS.bytes)
            return boundary.told(data, "measured", _LIMITS, _FIGURES)
        except (OSError, ValueError):
            return self._known

    def _write(self, known: dict[str, float]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=self._path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(known, file, indent=1)
            os.replace(part, self._path)
        finally:
            pathlib.Path(part).unlink(missing_ok=True)
