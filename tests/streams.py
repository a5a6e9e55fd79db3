"""The other end of a stream: ffmpeg as the server that takes it, decodes it and is in hand."""

import contextlib
import shutil
import signal
import socket
import subprocess
import threading
import time

import numpy as np
import pytest
from ends import SIDE, count

FFMPEG = shutil.which("ffmpeg")
needed = pytest.mark.skipif(FFMPEG is None, reason="the other end is ffmpeg")
LISTEN = {
    "rtmp": ["-listen", "1", "-i", "rtmp://127.0.0.1:{port}/live/key"],
    "rtsp": ["-rtsp_flags", "listen", "-i", "rtsp://127.0.0.1:{port}/live/film"],
    "srt": ["-f", "mpegts", "-i", "srt://127.0.0.1:{port}?mode=listener{query}"],
}
PATHS = {"rtmp": "/live/key", "rtsp": "/live/film", "srt": ""}


def free_port(kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_INET, kind) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """Listens for one connection at a time.

    Args:
        prompt: what is read to know what is in the stream is thrown away, so nothing is late.

    Attributes:
        address: of what it listens to.
        seen: (number of the picture, when it was decoded), in order.
    """

    def __init__(self, scheme, query="", size=(SIDE, SIDE), port=None, prompt=False):
        kind = socket.SOCK_DGRAM if scheme == "srt" else socket.SOCK_STREAM
        self.scheme, self.query, self.size = scheme, query, size
        self.port = port or free_port(kind)
        self.address = f"{scheme}://127.0.0.1:{self.port}{PATHS[scheme]}"
        self.address += f"?{query}" if query else ""
        self.seen, self._frozen = [], False
        self._more = ["-fflags", "nobuffer"] if prompt else []
        self.begin()

    def begin(self):
        """Listen, as a process of its own; again after `kill` or a connection's end."""
        given = [
            part.format(port=self.port, query=f"&{self.query}" if self.query else "")
            for part in LISTEN[self.scheme]
        ]
        self.process = subprocess.Popen(
            [FFMPEG, "-nostdin", "-v", "error", "-threads", "1", "-flags", "low_delay",
             "-probesize", "5000", "-analyzeduration", "0", *self._more, *given, "-an",
             "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "gray", "pipe:1"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, pipe):
        height, width = self.size
        while len(data := pipe.read(height * width)) == height * width:
            picture = np.frombuffer(data, np.uint8).reshape(height, width, 1)
            self.seen.append((count(picture), time.monotonic()))

    @property
    def numbers(self):
        return [number for number, _ in self.seen]

    def freeze(self):
        """Half open: nobody answers, nothing is said."""
        self.process.send_signal(signal.SIGSTOP)
        self._frozen = True

    def kill(self):
        if self._frozen:
            self.process.send_signal(signal.SIGCONT)
            self._frozen = False
        self.process.kill()
        self.process.wait(10)
        self._reader.join(10)
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(ProcessLookupError):
            self.kill()
