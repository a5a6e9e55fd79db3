"""A camera at the server, through PyAV: Video4Linux, DirectShow, AVFoundation."""

import contextlib
import glob
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from ..decoding import decoded
from ..faults import Refused
from ..reading import Reading, Seen
from ..wires import allowed
from . import Lost, Shot, Wanted, needs

_BEGINS = 8.0  # seconds that a camera has to begin
_SILENCE = 2.0  # seconds in which a picture has to come, then
_OLD = "cameras are listed by PyAV 17 or newer. pip install -U av"
_SYSTEMS = {"linux": "v4l2", "win32": "dshow", "darwin": "avfoundation"}


class Kind:
    """See Source. What a camera gives is waited for in a thread; one that hangs in its driver can
    not be left before it gives something or is unplugged."""

    patience = _BEGINS

    def __init__(self, wanted: Wanted):
        self._wanted = wanted
        self._reading: Reading | None = None

    @staticmethod
    def check(name: str) -> None:
        needs(bool(name.strip()), "device", "choose a camera at the server.")
        needs(_system() is not None, "device", "cameras are not read on this system.")
        needs(_listable(), "device", _OLD)
        allowed().device(name.strip())

    @staticmethod
    def listed() -> list[str]:
        return list(_devices())

    def open(self) -> None:
        self.check(self._wanted.name)
        name = self._wanted.name.strip()
        self._reading = Reading(lambda reading: self._read(reading, name), name, _BEGINS)

    def newest(self, timeout: float) -> Shot | None:
        return self._reading.newest(timeout)

    def close(self) -> None:
        if self._reading is not None:
            self._reading.close()

    def _read(self, reading: Reading, name: str) -> Iterator[Seen]:
        place = _devices().get(name)
        if place is None:
            raise Lost(f"the camera {name} is not plugged in")

        def opened():
            container = self._opened(place, name)
            reading.came()
            reading.silence = _SILENCE
            return container

        gone = f"the camera {name} is unplugged, or another program has taken it"
        try:
            yield from decoded(reading, opened, f"the camera {name}", lambda: None)
        except Lost as reason:
            if "cut the connection" in str(reason):
                raise Lost(gone) from None
            raise

    def _opened(self, place: str, name: str) -> Any:
        """The camera as near to what is wanted as it goes."""
        import av

        wanted = self._wanted
        rate = {"framerate": f"{wanted.fps:g}"}
        size = {"video_size": f"{wanted.width}x{wanted.height}"}
        # drivers take what they have, and some say no to all else
        for options in (size | rate, rate, {"framerate": "30"}, {}):
            try:
                return av.open(place, format=_system(), container_options=options)
            except PermissionError:
                raise Lost(
                    f"the camera {name} may not be opened by who runs ComfyUI; on Linux add that "
                    "user to the group video, on macOS allow it in the settings"
                ) from None
            except OSError as reason:
                # Linux says "busy" to the second who asks
                if reason.errno == 16:
                    raise Lost(f"another program uses the camera {name}") from None
            except (av.FFmpegError, ValueError):
                continue
        raise Lost(f"the camera {name} does not open")


def _system() -> str | None:
    return _SYSTEMS.get(sys.platform)


def _devices() -> dict[str, str]:
    """The cameras that there are now: what a person calls each, and what FFmpeg opens."""
    import av

    system = _system()
    found: list[tuple[str, str]] = []
    if system is not None and hasattr(av, "enumerate_input_devices"):
        with contextlib.suppress(av.FFmpegError, ValueError, OSError):
            found = [
                (one.description or one.name, one.name)
                for one in av.enumerate_input_devices(system)
                if not one.media_types or "video" in one.media_types
            ]
    elif system == "v4l2":
        found = _of_linux()
    elif system is not None:
        raise Refused(f"device: {_OLD}")
    names = [name for name, _ in found]
    return {
        (name if names.count(name) == 1 else f"{name} ({place})"): _opens(place, system)
        for name, place in found
    }


def _listable() -> bool:
    """Whether this system's cameras have names: without PyAV where Linux tells them itself."""
    if _system() == "v4l2":
        return True
    import av

    return hasattr(av, "enumerate_input_devices")


def _opens(place: str, system: str | None) -> str:
    return {"dshow": f"video={place}", "avfoundation": f"{place}:none"}.get(system, place)


def _of_linux() -> list[tuple[str, str]]:
    found = []
    for folder in sorted(glob.glob("/sys/class/video4linux/video*")):
        with contextlib.suppress(OSError, ValueError):
            path = pathlib.Path(folder)
            # those after the first of a camera give what is no picture
            if int((path / "index").read_text(encoding="utf-8")) == 0:
                name = (path / "name").read_text(encoding="utf-8").strip()
                found.append((name, f"/dev/{path.name}"))
    return found
