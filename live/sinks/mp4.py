"""A video file that can be played while it is written, and after a kill at any moment."""

import contextlib
import os
from fractions import Fraction
from io import FileIO

import numpy as np

from .sound import AHEAD, CHANNELS, RATE, Sound

CLOCK = 90_000  # ticks per second, the usual one of videos
FRAGMENT = 0.25  # seconds after which what there is goes to the file
_KEY = 2.0  # seconds between two pictures that players can begin at
_LAST = 1 / 30  # seconds that the last picture is shown
_BLOCK = 1024  # samples that AAC takes at a time
_BT709 = 1  # the number of primaries, transfer and matrix in H.273


class Mp4:
    """H.264 in a fragmented mp4, each picture at its own time.

    Args:
        file: open for writing, unbuffered; closed by `end` and `abandon`.
        width, height: of the pictures. Odd ones get a copy of their last column and row, because
            players want 4:2:0.
        metadata: text by name.
        began: the time of the beginning, seconds.
        sound: there is sound, too.

    Attributes:
        size: [H, W] of the pictures that it takes.
        at: the time of its last picture.
    """

    def __init__(
        self,
        file: FileIO,
        width: int,
        height: int,
        metadata: dict[str, str],
        began: float,
        sound: bool = False,
    ):
        import av

        self.size = height, width
        self.at = began
        self._began, self._ticks, self._key = began, -1, None
        self._picture = None
        self._out = _Out(file)
        self._film = av.open(
            self._out, "w", format="mp4",
            # a moov at the front that holds the metadata, no index that a kill would lose
            options={"movflags": "empty_moov+default_base_moof+use_metadata_tags",
                     "frag_duration": str(round(FRAGMENT * 1e6)), "flush_packets": "1",
                     # pictures do not wait for sound longer than that
                     "max_interleave_delta": str(round(FRAGMENT * 1e6))},
        )  # fmt: skip
        self._film.metadata.update(metadata)
        self._stream = stream = self._film.add_stream("h264", rate=30)
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        # without it pictures wait in the encoder, seconds of them when they come slowly
        stream.options = {"preset": "veryfast", "crf": "20", "tune": "zerolatency",
                          "forced-idr": "1"}  # fmt: skip
        context = stream.codec_context
        stream.time_base = context.time_base = Fraction(1, CLOCK)
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = 1  # studio swing
        self._voice = self._film.add_stream("aac", rate=RATE, layout="stereo") if sound else None
        self._heard, self._waiting = 0, np.zeros((CHANNELS, 0), np.float32)

    def show(self, picture: np.ndarray, at: float) -> None:
        """A picture, [H, W, 3] uint8, from the time `at` on. Raises OSError."""
        import av

        height, width = self.size
        if height % 2 or width % 2:
            picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        self._picture = frame.reformat(format="yuv420p", dst_colorspace=_BT709)
        self.hold(at)

    def hold(self, at: float) -> None:
        """The last picture is still shown at the time `at`."""
        from av.video.frame import PictureType

        frame = self._picture
        self._ticks = max(self._ticks + 1, round((at - self._began) * CLOCK))
        frame.pts, frame.time_base = self._ticks, self._stream.time_base
        key = self._key is None or self._ticks - self._key >= _KEY * CLOCK
        frame.pict_type = PictureType.I if key else PictureType.NONE
        self._key = self._ticks if key else self._key
        self.at = at
        self._mux(self._stream.encode(frame))

    def hear(self, sound: Sound, at: float, ahead: float = AHEAD) -> None:
        """The sound that belongs to what is shown until the time `at`. Raises OSError."""
        if self._voice is not None:
            self._speak(sound.until(at + ahead))

    def _speak(self, samples: np.ndarray) -> None:
        import av

        self._waiting = np.concatenate((self._waiting, samples), 1)
        while self._waiting.shape[1] >= _BLOCK:
            block, self._waiting = self._waiting[:, :_BLOCK], self._waiting[:, _BLOCK:]
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), "fltp", "stereo")
            frame.sample_rate, frame.pts, frame.time_base = RATE, self._heard, Fraction(1, RATE)
            self._heard += _BLOCK
            self._film.mux(self._voice.encode(frame))

    def end(self, at: float) -> None:
        """The last picture was shown until the time `at`; the file is whole. Raises OSError."""
        try:
            if self._picture is not None:
                self.hold(at - _LAST)
            self._mux(self._stream.encode(None))
            if self._voice is not None:
                self._film.mux(self._voice.encode(None))
            self._film.close()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Write nothing more; the file plays as far as it is written."""
        self._out.broken = True
        with contextlib.suppress(Exception):
            self._film.close()
        self._out.file.close()

    def _mux(self, packets) -> None:
        for packet in packets:
            # of the last picture; those before it last until the next
            packet.duration = round(_LAST * CLOCK)
            self._film.mux(packet)


class _Out:
    """What av writes to. Only writing: nothing that is written is ever changed."""

    def __init__(self, file: FileIO):
        self.file = file
        self.broken = False
        self._linked = os.fstat(file.fileno()).st_nlink > 0

    def write(self, data: bytes) -> int:
        if self.broken:
            return len(data)
        # written to a file that has no name any more, everything would seem well
        if self._linked and os.fstat(self.file.fileno()).st_nlink == 0:
            raise FileNotFoundError("the file was removed while it was written")
        rest = memoryview(data)
        while rest:
            rest = rest[self.file.write(rest) :]
        return len(data)
