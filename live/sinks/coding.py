"""Pictures to H.264 for streams: the hardware's encoder where there is one, and no picture waits.

Packets come in NAL units (H.264, Annex B), so that a stream of any kind can carry them.
"""

import contextlib
import re
from fractions import Fraction
from typing import NamedTuple

import numpy as np

CLOCK = 90_000  # ticks per second
KEY = 2.0  # seconds between two pictures that players can begin at
SOON = 0.5  # the same while it begins: a receiver may throw away the first, which came too late
BT709 = 1  # the number of primaries, transfer and matrix in H.273
SPS, PPS = 7, 8  # kinds of NAL units
_IDLE = (6, 9, 12)  # kinds that nobody needs: SEI, delimiters, filler
_START = re.compile(rb"\x00\x00\x01")
# how FFmpeg's encoders are told not to let a picture wait; the first that works here is taken.
# VA-API is not among them: it takes pictures that are on the GPU already.
ENCODERS = {
    "h264_nvenc": ("yuv420p", {"preset": "p4", "tune": "ull", "rc": "cbr", "zerolatency": "1",
                               "delay": "0", "forced-idr": "1"}),
    "h264_videotoolbox": ("nv12", {"realtime": "1", "allow_sw": "0"}),
    "h264_qsv": ("nv12", {"preset": "veryfast", "async_depth": "1", "forced_idr": "1"}),
    "h264_amf": ("nv12", {"usage": "ultralowlatency", "rc": "cbr"}),
    "libx264": ("yuv420p", {"preset": "veryfast", "tune": "zerolatency", "forced-idr": "1"}),
}  # fmt: skip


class Unit(NamedTuple):
    """A picture as it is sent.

    Attributes:
        nals: its NAL units, without start codes and without parameter sets.
        at: when it is shown, ticks since the first, always rising.
        key: players can begin here.
    """

    nals: list[bytes]
    at: int
    key: bool


def nals(data: bytes) -> list[bytes]:
    """The NAL units of a byte stream (H.264, Annex B)."""
    starts = [m.end() for m in _START.finditer(data)]
    ends = [m - 3 for m in starts[1:]] + [len(data)]
    return [data[a:b].rstrip(b"\0") for a, b in zip(starts, ends, strict=True) if b > a]


def frame(picture: np.ndarray, pixels: str):
    """An av.VideoFrame, BT.709, of a picture [H, W, 3 or 4] uint8; alpha is left out.

    Odd sides get a copy of their last column and row, because 4:2:0 wants even ones.
    """
    import av

    height, width = picture.shape[:2]
    picture = picture[:, :, :3]
    if height % 2 or width % 2:
        picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    made = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    return made.reformat(format=pixels, dst_colorspace=BT709)


class Encoder:
    """For pictures of one size.

    Args:
        fps: the most that come.
        bit_rate: bits per second.

    Attributes:
        name: FFmpeg's, of ENCODERS.
        width, height: of the coded pictures, even.
        sps, pps: the parameter sets that the units need.

    Raises:
        RuntimeError: there is none here that works.
    """

    def __init__(self, width: int, height: int, fps: float, bit_rate: float):
        self.width, self.height = width + width % 2, height + height % 2
        self._fps, self._rate = fps, bit_rate
        self._first: float | None = None
        self._at, self._key = -CLOCK // 1000, 0
        grey = np.full((self.height, self.width, 3), 128, np.uint8)
        for self.name in ENCODERS:
            # also what works nowhere else may be in FFmpeg: the only proof is a picture
            with contextlib.suppress(Exception):
                found = self._opened(grey)
                if found:
                    self.sps, self.pps = found
                    self._coder = self._made()
                    self._coder.open()
                    return
        raise RuntimeError("no H.264 encoder works here: FFmpeg came without libx264")

    def _made(self):
        import av

        pixels, options = ENCODERS[self.name]
        coder = av.CodecContext.create(self.name, "w")
        coder.width, coder.height, coder.pix_fmt = self.width, self.height, pixels
        coder.framerate, coder.time_base = Fraction(round(self._fps)), Fraction(1, CLOCK)
        coder.bit_rate = round(self._rate)
        # half a second's worth is the most that one picture may take at once
        size = {"maxrate": str(round(self._rate)), "bufsize": str(round(self._rate / 2))}
        coder.options = {**options, **size, "bf": "0"}
        coder.color_primaries = coder.color_trc = coder.colorspace = BT709
        coder.color_range = 1  # studio swing
        return coder

    def _opened(self, picture: np.ndarray) -> tuple[bytes, bytes] | None:
        """The parameter sets, by coding one picture."""
        coder = self._made()
        packets = coder.encode(self._frame(picture, 0, True))
        parts = [n for p in (packets or coder.encode(None)) for n in nals(bytes(p))]
        kinds = {n[0] & 31: n for n in parts}
        return (kinds[SPS], kinds[PPS]) if SPS in kinds and PPS in kinds else None

    def _frame(self, picture: np.ndarray, at: int, key: bool):
        from av.video.frame import PictureType

        made = frame(picture, ENCODERS[self.name][0])
        made.pts, made.time_base = at, Fraction(1, CLOCK)
        made.pict_type = PictureType.I if key else PictureType.NONE
        return made

    def code(self, picture: np.ndarray, at: float) -> list[Unit]:
        """A picture, [H, W, 3 or 4] uint8, that is shown from the time `at` (seconds) on."""
        self._first = at if self._first is None else self._first
        # a millisecond apart at least, the finest that RTMP can tell
        self._at = max(self._at + CLOCK // 1000, round((at - self._first) * CLOCK))
        between = SOON if self._at <= KEY * CLOCK else KEY
        key = self._at == 0 or self._at - self._key >= between * CLOCK
        self._key = self._at if key else self._key
        made = []
        for packet in self._coder.encode(self._frame(picture, self._at, key)):
            parts = nals(bytes(packet))
            for one in parts:
                # a hardware encoder may have others than for the first picture
                if one[0] & 31 == SPS:
                    self.sps = one
                elif one[0] & 31 == PPS:
                    self.pps = one
            kept = [n for n in parts if n[0] & 31 not in (SPS, PPS, *_IDLE)]
            made.append(Unit(kept, packet.pts, any(n[0] & 31 == 5 for n in kept)))
        return made
