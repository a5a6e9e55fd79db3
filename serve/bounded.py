"""A log that does not fill a disk, for a house of weeks whose log nobody named a file for."""

import contextlib
import os
from collections.abc import Callable


class Bounded:
    """Lines at the end of a file, which begins anew at a size; the one before is kept as PATH.1.

    Args:
        path: of the file.
        most: bytes of it, to a line.
        write: takes a line for it, and opens it anew for each.
    """

    def __init__(self, path: str, most: int, write: Callable[[str], None]):
        self._path, self._most, self._write = path, most, write
        self._size = 0
        with contextlib.suppress(OSError):  # a lobby that follows another goes on with its log
            self._size = os.path.getsize(path)

    def __call__(self, line: str) -> None:
        if self._size >= self._most:
            # a file that somebody reads cannot be renamed on Windows: with one of the next lines
            with contextlib.suppress(OSError):
                os.replace(self._path, f"{self._path}.1")
                self._size = 0
        self._size += len(line.encode()) + 1
        self._write(line)

    @property
    def problem(self) -> str | None:
        """What is wrong with the log, if what writes it knows."""
        return getattr(self._write, "problem", None)
