"""Small films for tests, each frame of one colour."""

from fractions import Fraction

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


BEEPS_LAST = 2.0  # seconds
_RATE = 48_000


def write_beeps(path, audio="pcm_s16le", begins=0.0, sound=True):
    """White while it is loud: in the second quarter of each second. Returns its samples."""
    times = np.arange(round(BEEPS_LAST * _RATE)) / _RATE
    loud = (times % 1 >= 0.25) & (times % 1 < 0.5)
    # low and rising, so that every place is unlike any other
    samples = (0.1 + 0.6 * loud) * np.sin(2 * np.pi * (300 + 100 * times) * times)
    samples = np.stack((samples, -samples / 2)).astype(np.float32)
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        voice = film.add_stream(audio, rate=_RATE, layout="stereo") if sound else None
        for i in range(round(BEEPS_LAST * 25)):
            white = 0.25 <= i / 25 % 1 < 0.5
            picture = np.full((32, 32, 3), 230 if white else 20, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i + round(begins * 25), Fraction(1, 25)
            film.mux(stream.encode(frame))
        film.mux(stream.encode(None))
        if sound:
            kind = voice.codec_context.format.name
            data = samples if kind == "fltp" else np.round(samples.T.reshape(1, -1) * 32767)
            data = data if kind == "fltp" else data.astype(np.int16)
            for at in range(0, samples.shape[1], 1024):
                width = slice(at, at + 1024) if kind == "fltp" else slice(2 * at, 2 * at + 2048)
                frame = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(data[:, width]), kind, "stereo"
                )
                frame.sample_rate, frame.time_base = _RATE, Fraction(1, _RATE)
                frame.pts = at + round(begins * _RATE)
                film.mux(voice.encode(frame))
            film.mux(voice.encode(None))
    return samples
