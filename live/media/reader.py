"""The front door: the frames of a file, shown as ComfyUI's own loaders show them."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from . import films, pictures
from .still import Damage, Still, Unreadable


def stills(path: pathlib.Path, damage: Damage | None = None) -> Iterator[Still]:
    """The frames of a film, or of a still or animated picture, from the beginning.

    What the file holds counts, not what it is called. Two frames are kept at most.

    Args:
        path: the file.
        damage: counts what was left out.

    Raises:
        Unreadable: the file is gone, is none that is read here, is too large, or holds no frame
            that can be decoded. What is wrong after the first frame is counted instead.
    """
    held = None
    for still in _all(path, damage or Damage()):
        if held is not None:
            yield held._replace(lasts=still.time - held.time)
        held = still
    if held is None:
        raise Unreadable(f"{path.name} holds no frame that can be decoded.")
    yield held


def look_at(path: pathlib.Path) -> None:
    """Raise Unreadable unless the file has a frame to show. Decodes two at most."""
    with contextlib.closing(stills(path)) as film:
        for still in film:
            with contextlib.suppress(Unreadable):
                still.picture()
                return
    raise Unreadable(f"{path.name} holds no frame that can be shown.")


def _all(path: pathlib.Path, damage: Damage) -> Iterator[Still]:
    _there(path)
    empty = True
    for kind in (pictures, films):
        try:
            for still in kind.stills(path, damage) or ():
                empty = False
                yield still
        except Unreadable:
            if empty:
                raise
            damage.parts += 1
        except Exception as reason:
            # whatever a decoder says of bytes that came from anywhere
            if not empty:
                damage.parts += 1
            elif kind is films:
                raise Unreadable(
                    f"{path.name} cannot be read: it is damaged or cut off, or no kind of film "
                    "or picture that is read here."
                ) from reason
        if not empty:
            return


def _there(path: pathlib.Path) -> None:
    """Raise Unreadable for what no decoder needs to look at."""
    name = path.name or str(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            # a pipe would be waited for, a device read for ever
            raise Unreadable(f"{name} is no file that can be read. Choose another.")
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError:
        raise Unreadable(f"{name} is not there, or not any more.") from None
    except IsADirectoryError:
        raise Unreadable(f"{name} is a folder. Choose a file.") from None
    except OSError as reason:
        if path.is_dir():  # Windows says that it may not be opened
            raise Unreadable(f"{name} is a folder. Choose a file.") from None
        raise Unreadable(f"{name} cannot be opened: {reason.strerror}.") from None
    if empty:
        raise Unreadable(f"{name} cannot be read: it is empty.")


class Film:
    """A file that is played again and again; a still picture is decoded once.

    Args:
        path: the file.
        damage: counts what was left out.

    Attributes:
        path: the same.
    """

    def __init__(self, path: pathlib.Path, damage: Damage):
        self.path = path
        self._damage = damage
        self._version = _version(path)
        self._only: Still | None = None

    def stills(self) -> Iterator[Still]:
        """The frames from the beginning, as `stills` gives them."""
        version = _version(self.path)
        if self._only is not None and version == self._version:
            yield self._only
            return
        self._only, self._version = None, version
        count, last = 0, None
        for still in stills(self.path, self._damage):
            count, last = count + 1, still
            yield still
        if count == 1:
            picture = last.picture()
            self._only = last._replace(picture=lambda: picture)

    def replaced(self) -> bool:
        """Whether the file holds something else than when it was read."""
        return _version(self.path) != self._version


class Reader:
    """A film one frame after the other, for a node that is run again and again.

    Args:
        path: the file.
        loop: start again at the end.

    Attributes:
        frame: the number of the frame given last, -1 before the first.
    """

    def __init__(self, path: pathlib.Path, loop: bool):
        self.path = path
        self.loop = loop
        self.frame = -1
        self._damage = Damage()
        self._film = Film(path, self._damage)
        self._stills: Iterator[Still] = iter(())
        self._last: np.ndarray | None = None

    def next(self) -> np.ndarray:
        """[H, W, 3] uint8. After the end: from the beginning, or the last frame again.

        A file that was replaced is begun anew.

        Raises:
            Unreadable: as `stills` does.
        """
        if self._last is not None and self._film.replaced():
            self.frame, self._last = -1, None
            self._stills = iter(())
        picture = self._next()
        if picture is None and (self.loop or self._last is None):
            self._stills = self._film.stills()
            picture = self._next()
            if picture is None:
                raise Unreadable(f"{self.path.name} holds no frame that can be shown.")
        if picture is not None:
            self._last = picture
            self.frame += 1
        return self._last

    def _next(self) -> np.ndarray | None:
        """The next frame that can be shown; None at the end."""
        for still in self._stills:
            try:
                return still.picture()
            except Unreadable:
                self._damage.parts += 1
        return None


def _version(path: pathlib.Path) -> tuple[int, int]:
    """Changes when a file is replaced; (0, 0) for one that is not there."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_mtime_ns, found.st_size
    return 0, 0
