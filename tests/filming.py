"""Small films and pictures as people have them, written by PyAV and Pillow or byte by byte."""

import functools
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np
from PIL import Image

os.environ.setdefault("SVT_LOG", "1")  # errors only, from an encoder that talks

# corners of a picture, clockwise from the upper left: which way up it is can be seen
CORNERS = np.array([[200, 60, 60], [60, 180, 60], [70, 70, 190], [190, 180, 70]], np.uint8)


def scene(width=48, height=32, shade=0):
    """[H, W, 3] uint8: four fields of a colour each, darker by `shade`."""
    picture = np.empty((height, width, 3), np.uint8)
    h, w = (height + 1) // 2, (width + 1) // 2
    for i, (rows, columns) in enumerate(
        [(slice(0, h), slice(0, w)), (slice(0, h), slice(w, None)),
         (slice(h, None), slice(w, None)), (slice(h, None), slice(0, w))]
    ):  # fmt: skip
        picture[rows, columns] = CORNERS[i] - np.uint8(min(shade, 56))
    return picture


def corners(picture):
    """[4, 3] the colours in the middle of the four fields, clockwise from the upper left."""
    h, w = picture.shape[:2]
    places = [(1, 1), (1, 3), (3, 3), (3, 1)]
    return np.array([picture[y * h // 4, x * w // 4] for y, x in places], float)


def apart(function):
    """Run in a thread of its own.

    SVT-AV1, where it may, gives the thread that opens it real-time priority (SCHED_FIFO, 99), and
    keeps it so. All that such a thread starts inherits that: servers, a browser with a hundred
    threads, of which two that wait for a third by looking again and again stop the machine.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function, *args, **kwargs).result()

    return run


@apart
def film(path, codec="mpeg4", pixels="yuv420p", size=(48, 32), times=None, frames=5, rate=10,
         format=None, options=None, container=None, last=None, sound=None, metadata=None,
         turn=0, offset=0.0):  # fmt: skip
    """Write a film; `times` in seconds give it a variable rate, `last` how long its last frame is.

    `turn`: stored so that it is upright once a player has turned it by so many degrees; mp4.
    Returns None where this PyAV has no such encoder.
    """
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        return None
    width, height = size
    with av.open(str(path), "w", format=format, options=container or {}) as out:
        out.metadata.update(metadata or {})
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.options = options or {}
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        tone = out.add_stream(sound, rate=48000) if sound else None
        count = frames if times is None else len(times)
        packets = []
        for i in range(count):
            picture = scene(*(size if turn % 180 == 0 else size[::-1]), 4 * i)
            picture = np.ascontiguousarray(unturned(picture, turn))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if pixels.endswith("a") or pixels.startswith(("yuva", "gbrap", "argb")):
                rgba = np.dstack([scene(width, height, 4 * i), np.full((height, width), 99)])
                frame = av.VideoFrame.from_ndarray(rgba.astype(np.uint8), format="rgba")
            frame = frame.reformat(format=pixels)
            if offset:
                frame.time_base = 1 / Fraction(rate)
                frame.pts = i + round(offset * rate)
            if times is not None:
                frame.time_base, frame.pts = Fraction(1, 1000), round(1000 * times[i])
            packets += stream.encode(frame)
        packets += stream.encode()
        if times is not None:
            max(packets, key=lambda packet: packet.pts).duration = round(1000 * (last or 0.1))
        out.mux(packets)
        if tone is not None:
            beep(out, tone, count / rate if times is None else times[-1] + (last or 0.1))
    return turned(path, turn) if turn else path


def beep(out, stream, seconds):
    """A tone into an audio stream that is open for writing."""
    rate, at = stream.rate, 0
    for start in range(0, round(rate * seconds), 1024):
        n = min(1024, round(rate * seconds) - start)
        wave = 0.3 * np.sin(2 * np.pi * 440 * (start + np.arange(n)) / rate)
        frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, at, Fraction(1, rate)
        at += n
        for fitting in av.AudioResampler(stream.format, stream.layout, rate).resample(frame):
            out.mux(stream.encode(fitting))
    out.mux(stream.encode())


QUARTERS = {
    0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1), "upside down": (1, 0, 0, -1),
}  # fmt: skip


def turned(path, degrees):
    """Write a display matrix into the track header of an mp4, as phones do."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    at += 40 if data[at] == 0 else 52
    a, b, c, d = QUARTERS[degrees]
    one, w = 1 << 16, 1 << 30
    data[at : at + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, w)
    path.write_bytes(data)
    return path


def unturned(picture, degrees):
    """What a camera stored so that a player that turns it by `degrees` shows `picture`."""
    if degrees == "mirrored":
        return picture[:, ::-1]
    if degrees == "upside down":
        return picture[::-1]
    return np.rot90(picture, degrees // 90)


def phone(path, degrees, **options):
    """A film whose picture is stored turned and shown upright, 32 x 48."""
    stored = np.ascontiguousarray(unturned(scene(32, 48), degrees))
    height, width = stored.shape[:2]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.options = {"qscale": "2", **options}
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        out.mux(stream.encode())
    return turned(path, degrees)


def exif(number):
    tags = Image.Exif()
    tags[0x0112] = number
    return tags


@functools.cache
def exif_stored(number):
    """`scene` as a camera stores it with this EXIF orientation."""
    picture = Image.fromarray(scene())
    method = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }[number]  # fmt: skip
    return picture if method is None else picture.transpose(method)


def animation(path, durations, size=(48, 32), mode="RGB", **options):
    """An animated picture with a duration in ms per frame."""
    pictures = [Image.fromarray(scene(*size, 8 * i)).convert(mode) for i in range(len(durations))]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **options
    )
    return path


def png(path, width, height, depth, kind, rows, interlace=0):
    """A PNG by hand, for what Pillow does not write: `rows` are its filtered bytes."""

    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlace)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def refers(path, other):
    """Write a mov like `other` whose pictures are said to lie in it, by QuickTime's alias."""
    data, name, full = bytearray(other.read_bytes()), other.name.encode(), str(other).encode()
    alias = bytes(10) + b"\x01" + b"v".ljust(27, b"\0") + bytes(12) + bytes([len(name)])
    alias += name.ljust(63, b"\0") + bytes(16) + struct.pack(">HH", 1, 1) + bytes(16)
    alias += struct.pack(">HH", 2, len(full)) + full + bytes(len(full) % 2)
    alias += struct.pack(">HH", 0xFFFF, 0)
    at = data.index(b"dref") + 12
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = data.index(kind) - 4
        length = struct.unpack_from(">I", data, place)[0] + len(alias)
        struct.pack_into(">I", data, place, length)
    data[at : at + 12] = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    # and are not in itself
    mdat = data.index(b"mdat") + 4
    length = struct.unpack_from(">I", data, mdat - 8)[0] - 8
    data[mdat : mdat + length] = bytes(length)
    path.write_bytes(data)
    return path


def bomb(path, side=13_000):
    """20 KB that are 169 million pixels: all black, of one bit each."""
    return png(path, side, side, 1, 0, bytes(side * (1 + (side + 7) // 8)))
