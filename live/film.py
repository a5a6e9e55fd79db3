"""A video or animated picture from ComfyUI's input folder, frame by frame."""

import functools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..trust import boundary

PICTURES = (".gif", ".webp", ".png", ".apng", ".jpg", ".jpeg")
VIDEOS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ogv", ".y4m")


class Still(NamedTuple):
    """One frame of a film.

    Attributes:
        time: its place in the film, seconds.
        lasts: how long it is shown, seconds.
        picture: gives it, [H, W, 3] uint8; not called for a frame that is left out.
    """

    time: float
    lasts: float
    picture: Callable[[], np.ndarray]


def inside(name: Any, folder: str) -> pathlib.Path:
    """The file `name` in `folder`.

    Raises:
        ValueError: there is no such file, or it lies elsewhere: .., absolute names, links out.
    """
    return boundary.inside(folder, name, "file", "ComfyUI's input folder")


def listed(folder: str) -> list[str]:
    """Names of the films and pictures in a folder, sorted."""
    if not os.path.isdir(folder):
        return []
    # ComfyUI asks a node for its choices with every frame
    return list(_listed(folder, os.stat(folder).st_mtime_ns))


@functools.lru_cache(maxsize=4)
def _listed(folder: str, changed: int) -> tuple[str, ...]:
    kinds = PICTURES + VIDEOS
    return tuple(sorted(e.name for e in os.scandir(folder) if e.name.lower().endswith(kinds)))


def stills(path: pathlib.Path) -> Iterator[Still]:
    """The frames of a film from its beginning.

    Raises:
        ValueError: the file cannot be read as a film.
    """
    kind = _pictures if path.suffix.lower() in PICTURES else _video
    empty = True
    try:
        for still in kind(path):
            empty = False
            yield still
    except (OSError, ValueError) as reason:
        raise ValueError(f"file: {path.name} cannot be read: {reason}") from reason
    if empty:
        raise ValueError(f"file: {path.name} holds no frame.")


def _pictures(path: pathlib.Path) -> Iterator[Still]:
    with Image.open(path) as film:
        time = 0.0
        for i in range(getattr(film, "n_frames", 1)):
            film.seek(i)
            # browsers give frames without a duration a tenth of a second too
            lasts = (film.info.get("duration") or 100) / 1000
            # made at once, because the next seek changes the picture
            picture = np.asarray(film.convert("RGB"))
            yield Still(time, lasts, lambda picture=picture: picture)
            time += lasts


def _video(path: pathlib.Path) -> Iterator[Still]:
    import av

    with av.open(str(path)) as film:
        if not film.streams.video:
            raise ValueError("there is no picture in it")
        stream = film.streams.video[0]
        lasts = 1 / float(stream.average_rate or 25)
        first = None
        for i, frame in enumerate(film.decode(stream)):
            time = i * lasts if frame.time is None else frame.time
            first = time if first is None else first

            def picture(frame=frame) -> np.ndarray:
                return frame.to_ndarray(format="rgb24")

            yield Still(time - first, lasts, picture)


class Reader:
    """A film one frame after the other, for a node that is run again and again."""

    def __init__(self, path: pathlib.Path, loop: bool):
        self.path = path
        self.loop = loop
        self.frame = -1
        self._film = stills(path)
        self._last: np.ndarray | None = None

    def next(self) -> np.ndarray:
        """[H, W, 3] uint8. After the end: from the beginning, or the last frame again."""
        still = next(self._film, None)
        if still is None and self.loop:
            self._film = stills(self.path)
            still = next(self._film)
        if still is not None:
            self._last = still.picture()
            self.frame += 1
        return self._last
