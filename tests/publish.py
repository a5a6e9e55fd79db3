"""The counter film, published by FFmpeg in a process of its own until that is ended.

    python publish.py ADDRESS FORMAT FPS [OPTION=VALUE ...]

PyAV keeps the interpreter to itself while an output is opened, so the other end cannot be in it.
What listens for one who plays, listens again once that one has left.
"""

import os
import pathlib
import subprocess
import sys
import time

import av
from counting import counted

GOP = 10


def main(address, kind, fps, *options):
    begun = time.monotonic()
    while True:
        try:
            _publish(address, kind, int(fps), dict(one.split("=", 1) for one in options), begun)
        except av.FFmpegError:
            if os.getppid() == 1:
                return
            time.sleep(0.02)


def _publish(address, kind, fps, settings, begun):
    with av.open(address, "w", format=kind, options=settings) as out:
        stream = out.add_stream("libx264", rate=fps)
        stream.width = stream.height = 96
        stream.pix_fmt = "yuv420p"
        stream.options = {"tune": "zerolatency", "preset": "ultrafast", "g": str(GOP), "bf": "0"}
        first = number = int((time.monotonic() - begun) * fps)
        while True:
            frame = av.VideoFrame.from_ndarray(counted(number % 4096), format="rgb24")
            frame.pts = number - first
            for packet in stream.encode(frame):
                out.mux(packet)
            number += 1
            time.sleep(max(0.0, begun + number / fps - time.monotonic()))


class Publisher:
    """This program as a child; ended when the context is left."""

    def __init__(self, address, kind, fps=30, **options):
        here = pathlib.Path(__file__)
        pairs = [f"{name}={value}" for name, value in options.items()]
        self._command = [sys.executable, str(here), address, kind, str(fps), *pairs]

    def __enter__(self):
        self._child = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *error):
        self._child.kill()
        self._child.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
