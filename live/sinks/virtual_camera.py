"""A webcam that is none: what is sent to it, other programs choose as their camera."""

import importlib.util
import re
import sys
from typing import Any

import numpy as np

from ..faults import Refused
from ..sources import Lost
from . import Target

PACKAGE = "pyvirtualcam"
_WITH_ALPHA = "unitycapture"  # the one backend of the package that takes a fourth channel
_NONE_THERE = {
    "linux": "Load one with: sudo modprobe v4l2loopback exclusive_caps=1",
    "win32": "Install OBS, which brings one.",
    "darwin": "Install OBS and start its virtual camera once.",
}


class Kind:
    """See Sink."""

    REPEATS = True

    def __init__(self, target: Target):
        self._name, self._fps = target.name or None, target.fps
        self._size = 0, 0
        self._camera: Any = None

    @staticmethod
    def check(target: Target) -> None:
        if importlib.util.find_spec("pyvirtualcam") is None:
            raise Refused(
                f"to: a virtual camera needs the package {PACKAGE}. Install it with: "
                f"pip install {PACKAGE}"
            )
        # a name is opened as a file before it is looked at
        if sys.platform == "linux" and target.name:
            if not re.fullmatch(r"/dev/video\d{1,3}", target.name):
                raise Refused("name: a virtual camera is named like /dev/video10 on Linux.")

    def open(self, width: int, height: int) -> None:
        # with colour at half the resolution, as cameras have it
        self._size = width - width % 2, height - height % 2
        if not all(self._size):
            raise Refused("image: a virtual camera needs at least 2 x 2 pixels.")
        self._camera = self._made("RGB")

    def _made(self, form: str, backend: str | None = None) -> Any:
        try:
            import pyvirtualcam
        except ImportError as reason:
            raise Refused(f"to: {PACKAGE} could not be loaded ({reason}).") from None
        form = pyvirtualcam.PixelFormat[form]
        try:
            return pyvirtualcam.Camera(
                *self._size, self._fps, fmt=form, device=self._name, backend=backend
            )
        except RuntimeError as reason:
            hint = _NONE_THERE.get(sys.platform, "")
            raise Lost(f"no virtual camera could be opened. {hint} ({reason})") from None

    def send(self, picture: np.ndarray, at: float) -> None:
        width, height = self._size
        channels = picture.shape[2] if self._camera.backend == _WITH_ALPHA else 3
        if channels != (4 if self._camera.fmt.name == "RGBA" else 3):
            self.close()
            self._camera = self._made("RGBA" if channels == 4 else "RGB", _WITH_ALPHA)
        self._camera.send(np.ascontiguousarray(picture[:height, :width, :channels]))

    def close(self) -> None:
        camera, self._camera = self._camera, None
        if camera is not None:
            camera.close()
