"""Which files of a folder are films and pictures, and that a name stays inside it."""

import functools
import os
import pathlib
from typing import Any

from ...trust import boundary
from .still import Unreadable

PICTURES = (
    ".apng", ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff",
    ".webp",
)  # fmt: skip
FILMS = (
    ".3g2", ".3gp", ".asf", ".avi", ".flv", ".m1v", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov",
    ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".qt", ".ts", ".webm", ".wmv", ".y4m",
)  # fmt: skip
NONE = "none"  # the choice that is no file


def inside(name: Any, folder: str) -> pathlib.Path:
    """The file `name` in `folder`.

    Raises:
        ValueError: there is no such file, or it lies elsewhere: .., absolute names, links out.
    """
    if name in ("", NONE):
        raise Unreadable("no file is chosen. Choose one of ComfyUI's input folder, or upload one.")
    return boundary.inside(folder, name, "file", "ComfyUI's input folder")


def listed(folder: str) -> list[str]:
    """Names of the films and pictures in a folder, sorted."""
    if not os.path.isdir(folder):
        return []
    # ComfyUI asks a node for its choices with every frame
    return list(_listed(folder, os.stat(folder).st_mtime_ns))


@functools.lru_cache(maxsize=4)
def _listed(folder: str, changed: int) -> tuple[str, ...]:
    kinds = PICTURES + FILMS
    return tuple(sorted(e.name for e in os.scandir(folder) if e.name.lower().endswith(kinds)))
