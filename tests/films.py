"""Small films for tests, each frame of one colour."""

import av
import numpy as np
from PIL import Image


def write_video(path, frames=12, rate=30, size=32):
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            picture = np.full((size, size, 3), 10 + 15 * i, np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        film.mux(stream.encode())
    return path


def write_gif(path, frames=4, each=50):
    pictures = [Image.new("RGB", (24, 16), (60 * i, 0, 0)) for i in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=each, loop=0)
    return path
