"""Pictures to packets of video, in place of aiortc's own encoders. Imported when aiortc is there.

Those are made for 30 pictures a second at 0.5 to 3 Mbit/s: their clock ticks in thirtieths, so that
two pictures of a faster run would have one time, and x264 is left at its slow preset.
"""

import fractions

import av
from aiortc.codecs.base import Encoder
from aiortc.codecs.h264 import H264Encoder
from aiortc.codecs.vpx import Vp8Encoder

CLOCK = 90_000  # ticks per second of video in RTP (RFC 6184, RFC 7741)
LEAST = 150_000  # bit per second that a codec is asked for at the least
_APART = 0.25  # how far the wish is from what is set before an encoder is set anew
_NOMINAL = 30  # pictures per second that the encoders plan their bits for
_SELDOM = 300  # pictures between two whole ones that nobody asked for

H264, VP8 = "H264", "VP8"
# the options are libx264's and libvpx's, see FFmpeg's codecs documentation
_SPEED = {
    H264: {"preset": "superfast", "tune": "zerolatency", "forced-idr": "1"},
    VP8: {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "static-thresh": "1",
          "undershoot-pct": "100", "overshoot-pct": "15"},
}  # fmt: skip


class Coder(Encoder):
    """Encodes for one connection, in the threads of its loop, one picture at a time.

    Args:
        name: H264 or VP8.
        bit_rate: bit per second at the most.

    Attributes:
        rate: bit per second that it encodes for now.
        coded: pictures that it made.
    """

    def __init__(self, name: str, bit_rate: float):
        self._name, self._most = name, max(LEAST, int(bit_rate))
        self.rate, self.coded = self._most, 0
        self._codec: av.VideoCodecContext | None = None
        self._packer = H264Encoder() if name == H264 else Vp8Encoder()

    @property
    def target_bitrate(self) -> int:
        """Bit per second; set by aiortc to what the other end says that it can take (REMB)."""
        return self.rate

    @target_bitrate.setter
    def target_bitrate(self, wish: int) -> None:
        self.rate = max(LEAST, min(int(wish), self._most))

    def encode(self, frame: av.VideoFrame, force_keyframe: bool = False):
        """Payloads of RTP packets, and the picture's time in ticks of CLOCK."""
        picture = frame.reformat(format="yuv420p")
        picture.pts, picture.time_base = frame.pts, frame.time_base
        codec = self._fitting(frame.width, frame.height)
        kinds = av.video.frame.PictureType
        picture.pict_type = kinds.I if force_keyframe else kinds.NONE
        payloads: list[bytes] = []
        for packet in codec.encode(picture):
            payloads += self._packer.pack(packet)[0]
        self.coded += 1
        return payloads, frame.pts

    def pack(self, packet: av.Packet):
        return self._packer.pack(packet)

    def _fitting(self, width: int, height: int) -> "av.VideoCodecContext":
        codec = self._codec
        same = codec is not None and (codec.width, codec.height) == (width, height)
        if same and abs(self.rate - codec.bit_rate) <= _APART * codec.bit_rate:
            return codec
        codec = av.CodecContext.create("libx264" if self._name == H264 else "libvpx", "w")
        codec.width, codec.height, codec.pix_fmt = width, height, "yuv420p"
        codec.bit_rate = self.rate
        codec.time_base = fractions.Fraction(1, CLOCK)
        codec.framerate = fractions.Fraction(_NOMINAL, 1)
        codec.gop_size = _SELDOM
        # a quarter of a second may be saved up: more is heard as delay at the other end
        limits = {"maxrate": str(self.rate), "bufsize": str(self.rate // 4)}
        if self._name == VP8:
            limits["minrate"] = str(self.rate)
            codec.thread_count = 2
        else:
            codec.profile = "Baseline"
        codec.options = {**_SPEED[self._name], **limits}
        self._codec = codec
        return codec
