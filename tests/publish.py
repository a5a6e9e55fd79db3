"""The counter film, published by FFmpeg in a process of its own until that is ended.

    python publish.py ADDRESS FORMAT FPS [OPTION=VALUE ...]

PyAV keeps the interpreter to itself while an output is opened, so the other end cannot be in it.
"""

import sys
import time

import av
from ends import counted


def main(address, kind, fps, *options):
    settings = dict(one.split("=", 1) for one in options)
    out = av.open(address, "w", format=kind, options=settings)
    stream = out.add_stream("libx264", rate=int(fps))
    stream.width = stream.height = 96
    stream.pix_fmt = "yuv420p"
    stream.options = {"tune": "zerolatency", "preset": "ultrafast", "g": "10", "bf": "0"}
    begun, number = time.monotonic(), 0
    while True:
        frame = av.VideoFrame.from_ndarray(counted(number), format="rgb24")
        for packet in stream.encode(frame):
            out.mux(packet)
        number = (number + 1) % 4096
        time.sleep(max(0.0, begun + number / int(fps) - time.monotonic()))


if __name__ == "__main__":
    main(*sys.argv[1:])
