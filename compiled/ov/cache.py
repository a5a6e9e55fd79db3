"""Compiled networks on disk: what a second start need not compile again.

A file counts only as it was written here: OpenVINO reads what it is given without looking, so the
size and the SHA-256 stand in front of it.
"""

import contextlib
import hashlib
import os
import pathlib
import tempfile

from ...trust import boundary

FILES, BYTES = 24, 4 << 30  # the most that a folder keeps; the newest stay
_SUFFIX = ".openvino"
_DIGEST = 32  # bytes of a SHA-256


def key(*parts: object) -> str:
    """A name for what was made of all of this."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def digest(paths: list[pathlib.Path]) -> str:
    """Of the contents of files."""
    hashed = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while data := file.read(1 << 22):
                hashed.update(data)
    return hashed.hexdigest()


def read(folder: pathlib.Path, name: str) -> bytes | None:
    """What was kept under this name, or None where nothing whole was."""
    path = folder / f"{name}{_SUFFIX}"
    try:
        data = boundary.contents(path, BYTES)
    except (OSError, ValueError):
        return None
    held = memoryview(data)[_DIGEST:]
    if len(data) <= _DIGEST or hashlib.sha256(held).digest() != data[:_DIGEST]:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used, so it is the newest
    return bytes(held)


def write(folder: pathlib.Path, name: str, data: bytes) -> None:
    """Keep it; a folder that cannot be written to is no failure, as it is only a cache."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=folder, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(data).digest())
                file.write(data)
            os.replace(part, folder / f"{name}{_SUFFIX}")
        finally:
            pathlib.Path(part).unlink(missing_ok=True)
        _bound(folder)


def _bound(folder: pathlib.Path) -> None:
    """Only the newest stay, so many and of so many bytes."""
    found = [(path.stat(), path) for path in folder.glob(f"*{_SUFFIX}")]
    found.sort(key=lambda one: one[0].st_mtime, reverse=True)
    size = 0
    for i, (told, path) in enumerate(found):
        size += told.st_size
        if i >= FILES or (i and size > BYTES):
            path.unlink(missing_ok=True)
