"""A zoo of small films and pictures, of every kind that people have, made by PyAV and Pillow."""

import io
import pathlib
import random
import struct
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from filming import animation, beep, bomb, exif, exif_stored, film, phone, png, scene
from PIL import Image


class Animal(NamedTuple):
    """A file and what is known of it.

    Attributes:
        path: where it lies.
        shown: whether it must be shown; None where it may be refused as well.
        size: width and height upright, None where unknown.
        times: of its frames in seconds, None where unknown.
        ends: seconds that it lasts, None where unknown.
        upright: whether its corners are CORNERS.
    """

    path: pathlib.Path
    shown: bool | None = True
    size: tuple[int, int] | None = None
    times: list[float] | None = None
    ends: float | None = None
    upright: bool = False


# encoders that do not like small pictures; without their threads and talk
LARGE = {
    "libx265": ((128, 96), {"x265-params": "log-level=none:pools=none"}),
    "libsvtav1": ((128, 96), {"preset": "12", "svtav1-params": "lp=1"}),
}


# container: codec and pixels, ...
KINDS = """
mp4: mpeg4 yuv420p, libx264 yuv420p, libx264 yuv444p, libx264 yuv422p10le, libx265 yuv420p
mp4: libsvtav1 yuv420p, mjpeg yuvj420p, libx264 yuvj420p, libx264 gray, libx264rgb rgb24
m4v: mpeg4 yuv420p
mov: libx265 yuv420p10le, prores_ks yuv422p10le, prores_ks yuva444p10le, qtrle argb, png rgba
mov: libx264 yuv420p, rawvideo uyvy422
qt: mjpeg yuvj422p
mkv: libx264 yuv420p, ffv1 bgr0, ffv1 gray16le, ffv1 yuv420p10le, ffv1 yuva444p
mkv: mjpeg yuvj444p, mpeg2video yuv420p
avi: huffyuv rgb24, utvideo gbrp, mpeg4 yuv420p, mjpeg yuvj420p, rawvideo bgr24
avi: msmpeg4v2 yuv420p, cinepak rgb24, ffvhuff yuv420p
webm: libvpx yuv420p, libvpx-vp9 yuv420p, libvpx-vp9 yuva420p, libvpx-vp9 yuv444p
webm: libsvtav1 yuv420p
mpg: mpeg1video yuv420p
mpeg: mpeg2video yuv420p
ts: mpeg2video yuv420p, libx264 yuv420p
mts: libx264 yuv420p
m2ts: libx264 yuv420p
flv: flv yuv420p, libx264 yuv420p
wmv: wmv1 yuv420p, wmv2 yuv420p
asf: msmpeg4 yuv420p
ogv: libtheora yuv420p
3gp: mpeg4 yuv420p
3g2: libx264 yuv420p
y4m: wrapped_avframe yuv420p, wrapped_avframe yuv444p
"""


def films(folder):
    """Films of every container and codec that this PyAV writes."""
    kinds = [
        (ending, *kind.split())
        for ending, line in (line.split(": ") for line in KINDS.split("\n") if line)
        for kind in line.split(", ")
    ]
    formats = {"y4m": "yuv4mpegpipe", "ogv": "ogg", "qt": "mov", "mts": "mpegts", "m2ts": "mpegts",
               "m1v": "mpeg1video", "mpg": "mpeg"}  # fmt: skip
    for i, (ending, codec, pixels) in enumerate(kinds):
        path = folder / f"film{i:02}_{codec}_{pixels}.{ending}"
        # MPEG-1 and 2 know film's own rates only
        rate = 25 if codec.startswith("mpeg") and codec != "mpeg4" else 10
        size, options = LARGE.get(codec, ((48, 32), None))
        if film(path, codec, pixels, size, rate=rate, format=formats.get(ending), options=options):
            raw = ending in ("mpg", "mpeg")  # no time for each frame
            times = None if raw else [n / rate for n in range(5)]
            colours = codec != "cinepak" and "gray" not in pixels
            yield Animal(path, True, size, times, upright=colours)
    path = folder / "h263.3gp"
    if film(path, "h263", size=(128, 96), rate=Fraction(30000, 1001)):
        yield Animal(path, True, (128, 96), [n * 1001 / 30000 for n in range(5)], upright=True)
    film(folder / "es.m1v", "mpeg1video", rate=25, format="mpeg1video")
    yield Animal(folder / "es.m1v", True, (48, 32))


def turns(folder):
    """Phones' films, and photos with EXIF."""
    for ending in ("mp4", "mov", "3gp", "m4v"):
        for degrees in (0, 90, 180, 270):
            path = phone(folder / f"phone{degrees}.{ending}", degrees)
            yield Animal(path, True, (32, 48), [0, 0.1, 0.2], 0.3, True)
    for degrees in ("mirrored", "upside down"):
        path = phone(folder / f"phone_{degrees.split()[0]}.mp4", degrees)
        yield Animal(path, True, (32, 48), [0, 0.1, 0.2], 0.3, True)
    for number in range(1, 9):
        for kind in ("jpg", "png", "webp", "tiff") if number in (1, 6) else ("jpg",):
            path = folder / f"exif{number}.{kind}"
            exif_stored(number).save(path, exif=exif(number), quality=95)
            yield Animal(path, True, (48, 32), [0], upright=True)


def pictures(folder):
    """Still pictures by kind, depth and alpha."""
    base = Image.fromarray(scene())
    alpha = base.copy()
    alpha.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 48).astype(np.uint8), (32, 1))))
    ramp = np.tile(np.linspace(0, 65535, 48).astype(np.uint16), (32, 1))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        picture = alpha.convert(mode) if mode.endswith("A") else base.convert(mode)
        path = folder / f"png_{mode}.png"
        picture.save(path)
        yield Animal(path, True, (48, 32), [0], upright=mode[0] == "R")
    palette = base.convert("P")
    palette.save(folder / "png_P_transparent.png", transparency=0)
    yield Animal(folder / "png_P_transparent.png", True, (48, 32), [0])
    Image.fromarray(ramp).save(folder / "png_16.png")
    yield Animal(folder / "png_16.png", True, (48, 32), [0])
    Image.fromarray(np.full((32, 48), 32896, np.uint16)).save(folder / "png_16_grey.png")
    yield Animal(folder / "png_16_grey.png", True, (48, 32), [0])
    deep = (scene().astype(np.uint16) * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    yield Animal(png(folder / "png_48.png", 48, 32, 16, 2, rows), True, (48, 32), [0], upright=True)
    for size in ((1, 1), (2, 2), (33, 17), (641, 3), (3, 641)):
        path = folder / f"odd_{size[0]}x{size[1]}.png"
        Image.fromarray(scene(*size)).save(path)
        yield Animal(path, True, size, [0])
    for name, mode, options in (
        ("grey", "L", {}), ("colour", "RGB", {}), ("inks", "CMYK", {}),
        ("progressive", "RGB", {"progressive": True}), ("full", "RGB", {"subsampling": 0}),
    ):  # fmt: skip
        path = folder / f"jpeg_{name}.jpg"
        base.convert(mode).save(path, quality=95, **options)
        yield Animal(path, True, (48, 32), [0], upright=mode != "L")
    base.save(folder / "two.mpo", "MPO", save_all=True, append_images=[base.rotate(180)])
    (folder / "two.mpo").rename(folder / "two.jpeg")
    yield Animal(folder / "two.jpeg", True, (48, 32), [0], upright=True)
    for name, picture, options in (
        ("lossy", base, {"quality": 95}), ("lossless", base, {"lossless": True}),
        ("alpha", alpha, {"lossless": True, "exact": True}),
    ):  # fmt: skip
        picture.save(folder / f"webp_{name}.webp", **options)
        yield Animal(folder / f"webp_{name}.webp", True, (48, 32), [0], upright=True)
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        picture = alpha if mode == "RGBA" else base.convert(mode)
        picture.save(folder / f"bmp_{mode}.bmp")
        yield Animal(folder / f"bmp_{mode}.bmp", True, (48, 32), [0], upright=mode[0] == "R")
    for name, picture, options in (
        ("grey", base.convert("L"), {}), ("16", Image.fromarray(ramp), {}),
        ("colour", base, {"compression": "tiff_lzw"}), ("alpha", alpha, {}),
        ("inks", base.convert("CMYK"), {}), ("bits", base.convert("1"), {}),
        ("float", Image.fromarray(np.tile(np.linspace(0, 1, 48, dtype=np.float32), (32, 1))), {}),
        ("pages", base, {"save_all": True, "append_images": [base.rotate(180)]}),
    ):  # fmt: skip
        picture.save(folder / f"tiff_{name}.tif", **options)
        yield Animal(folder / f"tiff_{name}.tif", True, (48, 32), [0])
    if ".avif" in Image.registered_extensions():
        base.save(folder / "still.avif", quality=95)
        yield Animal(folder / "still.avif", True, (48, 32), [0], upright=True)


def paces(folder):
    """Variable rates, single frames, long and short ones."""
    uneven = [0.0, 0.04, 0.3, 0.317, 1.0]
    for ending, codec in (("mp4", "libx264"), ("mov", "mpeg4"), ("mkv", "libx264"),
                          ("webm", "libvpx-vp9")):  # fmt: skip
        path = folder / f"uneven.{ending}"
        if film(path, codec, times=uneven, last=0.5):
            # matroska does not say how long its last frame is
            ends = 1.5 if ending in ("mp4", "mov") else None
            yield Animal(path, True, (48, 32), uneven, ends)
    for name in ("one.mp4", "one.mkv", "one.webm", "one.avi"):
        codec = "libvpx" if name.endswith("webm") else "mpeg4"
        if film(folder / name, codec, frames=1):
            yield Animal(folder / name, True, (48, 32), [0])
    film(folder / "late.mp4", times=[3.0, 3.1, 3.2])
    yield Animal(folder / "late.mp4", True, (48, 32), [0, 0.1, 0.2])
    film(folder / "thousand.mp4", rate=1000, frames=8)
    yield Animal(folder / "thousand.mp4", True, (48, 32), [i / 1000 for i in range(8)], 0.008)
    film(folder / "slow.mp4", rate=Fraction(1, 2), frames=3)
    yield Animal(folder / "slow.mp4", True, (48, 32), [0, 2, 4], 6)
    film(folder / "ntsc.mp4", rate=Fraction(30000, 1001), frames=8)
    yield Animal(folder / "ntsc.mp4", True, (48, 32), [i * 1001 / 30000 for i in range(8)])
    for name, given, seen in (
        ("slow.gif", [2000] * 4, [2000] * 4), ("uneven.gif", [20, 500, 100, 30], None),
        ("fast.gif", [10] * 4, [100] * 4), ("none.gif", [0] * 4, [100] * 4),
        ("mixed.gif", [10, 20, 0, 50], [100, 20, 100, 50]), ("one.gif", [40], None),
        ("uneven.webp", [35, 500, 41, 30], None), ("fast.webp", [10, 10, 12], [100, 100, 12]),
        ("uneven.png", [35, 500, 41, 30], None), ("uneven.avif", [35, 500, 41, 30], None),
        ("two.apng", [100, 200], None),
    ):  # fmt: skip
        if name.endswith("avif") and ".avif" not in Image.registered_extensions():
            continue
        more = {"format": "PNG"} if name.endswith("apng") else {}
        more |= {"quality": 95} if name.endswith(("webp", "avif")) else {}
        animation(folder / name, given, **more)
        lasts = [ms / 1000 for ms in seen or given]
        times = [sum(lasts[:i]) for i in range(len(lasts))]
        ends = None if len(given) == 1 else sum(lasts)
        yield Animal(folder / name, True, (48, 32), times, ends, True)
    animation(folder / "cover.png", [50, 60], default_image=True)
    # its first picture is for those who cannot show the others
    yield Animal(folder / "cover.png", None, (48, 32))
    for name, options in (("kept", {"disposal": 1}), ("cleared", {"disposal": 2}),
                          ("undone", {"disposal": 3})):  # fmt: skip
        frames = [Image.fromarray(scene(48, 32, 8 * i)).convert("P") for i in range(3)]
        path = folder / f"{name}.gif"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, transparency=5,
                       **options)  # fmt: skip
        yield Animal(path, True, (48, 32))


def oddities(folder):
    """Odd sizes, names, tags, streams."""
    for ending, codec, size in (("mp4", "libx264", (34, 18)), ("mkv", "ffv1", (33, 17)),
                                ("webm", "libvpx-vp9", (47, 31)), ("avi", "rawvideo", (31, 5)),
                                ("mov", "png", (7, 5)), ("mkv", "mjpeg", (51, 39))):  # fmt: skip
        pixels = {"ffv1": "yuv444p", "rawvideo": "bgr24", "png": "rgb24", "mjpeg": "yuvj444p"}
        path = folder / f"odd_{codec}.{ending}"
        if film(path, codec, pixels.get(codec, "yuv420p"), size=size):
            yield Animal(path, True, size)
    film(folder / "with sound.mp4", sound="aac")
    yield Animal(folder / "with sound.mp4", True, (48, 32), [i / 10 for i in range(5)])
    film(folder / "tone.mkv", sound="ac3")
    yield Animal(folder / "tone.mkv", True, (48, 32), [i / 10 for i in range(5)])
    film(folder / "100% #1; [b] 'c'.mp4")
    yield Animal(folder / "100% #1; [b] 'c'.mp4", True, (48, 32))
    film(folder / "tags.mkv", metadata={"title": "XXXX"})
    tagged = (folder / "tags.mkv").read_bytes().replace(b"XXXX", b"\xe4\xf6\xfc\xff")
    (folder / "tags.mkv").write_bytes(tagged)
    yield Animal(folder / "tags.mkv", True, (48, 32))
    for name, source in (("really_a_gif.mp4", "slow.gif"), ("really_an_mp4.gif", "ntsc.mp4"),
                         ("really_a_png.jpg", "png_RGB.png")):  # fmt: skip
        (folder / name).write_bytes((folder / source).read_bytes())
        yield Animal(folder / name, True, (48, 32))


def broken(folder, seed=0):
    """Cut off and with wrong bytes, at random places: shown as far as it goes, or refused."""
    rng = random.Random(seed)
    whole = folder / "whole"
    whole.mkdir(exist_ok=True)
    film(whole / "a.mp4", "libx264", frames=20, container={"movflags": "faststart"})
    film(whole / "fragments.mp4", "libx264", frames=20,
         container={"movflags": "frag_keyframe+empty_moov"}, options={"g": "4"})  # fmt: skip
    film(whole / "end.mov", "mpeg4", frames=20)
    film(whole / "a.mkv", "libx264", frames=20)
    film(whole / "a.webm", "libvpx", frames=20)
    film(whole / "a.avi", "mpeg4", frames=20)
    film(whole / "a.ts", "mpeg2video", frames=20, rate=25)
    film(whole / "a.flv", "flv", frames=20)
    film(whole / "a.wmv", "wmv2", frames=20)
    film(whole / "a.mpg", "mpeg1video", frames=20, rate=25, format="mpeg")
    for name in ("a.gif", "a.webp", "a.png"):
        animation(whole / name, [50] * 6)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8))
    for ending in ("jpg", "bmp", "tif", "webp", "png"):
        noise.save(whole / f"still.{ending}")
    for path in sorted(whole.iterdir()):
        data = path.read_bytes()
        for i in range(2):
            cut = folder / f"cut{i}_{path.name}"
            cut.write_bytes(data[: rng.randrange(1, len(data))])
            yield Animal(cut, None)
        wrong = bytearray(data)
        for _ in range(max(3, len(data) // 300)):
            wrong[rng.randrange(len(wrong))] = rng.randrange(256)
        (folder / f"wrong_{path.name}").write_bytes(wrong)
        yield Animal(folder / f"wrong_{path.name}", None)


def strangers(folder):
    """What is no film and no picture, or too large a one; nothing of it may be shown."""
    film(folder / "shown.mp4")
    for name in ("nothing.mp4", "nothing.gif", "nothing.ts"):
        (folder / name).write_bytes(b"")
        yield Animal(folder / name, False)
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\nshown.mp4\n#EXT-X-ENDLIST\n"
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
        '<AdaptationSet><Representation id="1" mimeType="video/mp4"><BaseURL>shown.mp4</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>"
    )
    for name, text in (
        ("playlist.mp4", playlist), ("playlist.m3u8", playlist), ("playlist.ts", playlist),
        ("list.mp4", "ffconcat version 1.0\nfile 'shown.mp4'\n"),
        ("call.mp4", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=-\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 "
         "RTP/AVP 96\na=rtpmap:96 H264/90000\n"),
        ("dash.mp4", dash), ("dash.mpd", dash), ("text.mp4", "no film at all\n" * 40),
        ("drawing.png", "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"),
        ("page.gif", "<html><body>404</body></html>"),
    ):  # fmt: skip
        (folder / name).write_text(text, encoding="utf-8")
        yield Animal(folder / name, False)
    with av.open(str(folder / "only_sound.mp4"), "w") as out:
        beep(out, out.add_stream("aac", rate=44100), 0.2)
    yield Animal(folder / "only_sound.mp4", False)
    (folder / "noise.mkv").write_bytes(random.Random(3).randbytes(5000))
    yield Animal(folder / "noise.mkv", False)
    yield Animal(bomb(folder / "bomb.png"), False)
    huge = io.BytesIO()
    Image.new("P", (2, 2)).save(huge, "GIF")
    data = bytearray(huge.getvalue())
    data[6:10] = struct.pack("<HH", 9000, 9000)
    (folder / "huge.gif").write_bytes(data)
    yield Animal(folder / "huge.gif", False)


def everything(folder, seed=0):
    """All of them, written into a folder."""
    for part in (films, turns, pictures, paces, oddities):
        yield from part(folder)
    yield from broken(folder, seed)
    yield from strangers(folder)
