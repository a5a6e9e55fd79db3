"""Which files of a folder are films and pictures, and that a name stays inside it."""

import functools
import os
import pathlib

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


def inside(name: str, folder: str) -> pathlib.Path:
    """The file `name` in `folder`.

    Raises:
        Unreadable: there is no such file, or it lies elsewhere: .., absolute names, links out.
    """
    if name in ("", NONE):
        raise Unreadable("no file is chosen. Choose one of ComfyUI's input folder, or upload one.")
    base = os.path.realpath(folder)
    try:
        path = os.path.realpath(os.path.join(base, name))
        out = os.path.isabs(name) or os.path.splitdrive(name)[0] or "\0" in name
    except (OSError, TypeError, ValueError):
        # a number instead of a name, a null character
        path, out = "", True
    if out or not path.startswith(base + os.sep):
        raise Unreadable(f"{name} is not inside ComfyUI's input folder. Choose one there.")
    if not os.path.isfile(path):
        raise Unreadable(f"there is no {name} in ComfyUI's input folder. Upload it first.")
    return pathlib.Path(path)


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
