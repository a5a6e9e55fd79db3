"""The sound of a film, as it belongs to the pictures that are recorded."""

import contextlib
import logging
import pathlib

import numpy as np

from ..feeds import Place
from ..media.films import opened

RATE = 48_000  # samples per second
CHANNELS = 2
AHEAD = 0.045  # seconds of sound that are written before their picture: an encoder wants more first
_JUMP = 0.5  # seconds that pictures are off at once when the film has jumped, as when it loops
_DRIFT = 0.08  # seconds that pictures are off on average and that one begins to see
_SHARE = 0.2  # of the newest picture in that average
_NEAR = 1.0  # seconds that are read through rather than jumped over

_log = logging.getLogger(__name__)


class Track:
    """A film's sound, by the time of its pictures.

    Args:
        path: the film.

    Raises:
        ValueError: there is no sound in it.
        av.FFmpegError, OSError: it cannot be opened.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._film = opened(path)
        streams = [s for s in self._film.streams.audio if s.codec_context is not None]
        if not streams:
            self._film.close()
            raise ValueError("no sound")
        self._stream = streams[0]
        pictures = self._film.streams.video[0]
        # times of pictures are counted from the first
        self._zero = float((pictures.start_time or 0) * pictures.time_base)
        self._frames = iter(())
        self._at: float | None = None  # of the first sample in the buffer; None where nothing is
        self._buffer = _silence(0)

    def read(self, position: float, count: int) -> np.ndarray:
        """Samples from a time of the film on, [2, count] float32; silence where there are none."""
        end = None if self._at is None else self._at + self._buffer.shape[1] / RATE
        if end is None or position < self._at - 1 / RATE or position > end + _NEAR:
            self._seek(position)
        while self._at is None or self._at + self._buffer.shape[1] / RATE < position + count / RATE:
            if not self._more(position):
                break
        if self._at is None:
            return _silence(count)
        start = round((position - self._at) * RATE)
        before = _silence(min(count, max(0, -start)))
        first = max(0, start)
        found = self._buffer[:, first : first + count - before.shape[1]]
        after = _silence(count - before.shape[1] - found.shape[1])
        self._drop(first + found.shape[1])
        return np.concatenate((before, found, after), 1)

    def close(self) -> None:
        """No more is read."""
        self._film.close()

    def _seek(self, position: float) -> None:
        import av

        place = max(0.0, position + self._zero)
        with contextlib.suppress(av.FFmpegError):  # then from where it is
            self._film.seek(int(place / self._stream.time_base), stream=self._stream)
        self._frames = self._decoded()
        self._at, self._buffer = None, _silence(0)

    def _decoded(self):
        """Times and samples from here on."""
        import av

        resampler = av.AudioResampler(format="fltp", layout="stereo", rate=RATE)
        packets = self._film.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                frames = packet.decode()
            except av.FFmpegError:
                continue  # damaged: the sound after it is found by its own time
            for frame in frames:
                time = frame.time
                for even in resampler.resample(frame):
                    yield time, even.to_ndarray()
                    time = None

    def _more(self, position: float) -> bool:
        time, samples = next(self._frames, (None, None))
        if samples is None:
            return False
        if self._at is None:
            self._at = (time or 0.0) - self._zero
        self._buffer = np.concatenate((self._buffer, samples), 1)
        # what lies before is not asked for any more
        self._drop(min(self._buffer.shape[1], max(0, round((position - self._at) * RATE))))
        return True

    def _drop(self, count: int) -> None:
        self._buffer = self._buffer[:, count:]
        self._at += count / RATE


class Sound:
    """The sound of a recording: what its pictures say is where the film is.

    Between pictures the film is taken to go on at its pace. It is gone after when they say
    otherwise at once (it began again), or all by a little.

    Args:
        began: when the recording began, seconds.
    """

    def __init__(self, began: float):
        self._began = began
        self._count = 0  # samples so far
        self._track: Track | None = None
        self._without: pathlib.Path | None = None
        self._offset: float | None = None  # from time in the recording to time in the film
        self._off = 0.0

    def shown(self, at: float, place: Place | None) -> None:
        """A picture from this place of a film, or of none, is shown from the time `at` on."""
        if place is None or not self._opened(place.path):
            self._offset = None
            return
        offset = place.seconds - (at - self._began)
        if self._offset is None:
            self._offset, self._off = offset, 0.0
        off = offset - self._offset
        self._off += _SHARE * (off - self._off)
        if abs(off) > _JUMP:
            self._offset, self._off = offset, 0.0
        elif abs(self._off) > _DRIFT:
            self._offset, self._off = self._offset + self._off, 0.0

    @property
    def there(self) -> bool:
        """Whether a film with sound is playing."""
        return self._offset is not None

    def until(self, at: float) -> np.ndarray:
        """What has not been given yet before the time `at`, [2, count] float32."""
        count = max(0, round((at - self._began) * RATE) - self._count)
        position = self._count / RATE + (self._offset or 0.0)
        self._count += count
        if self._offset is None or not count:
            return _silence(count)
        return self._track.read(position, count)

    def end(self) -> None:
        """No more is asked for."""
        if self._track is not None:
            self._track.close()

    def _opened(self, path: pathlib.Path) -> bool:
        if self._track is not None and self._track.path == path:
            return True
        if path == self._without:
            return False
        self.end()
        self._track = None
        try:
            self._track = Track(path)
        except Exception as reason:
            # the pictures are what is recorded
            self._without = path
            _log.info("recorded without the sound of %s: %s", path.name, reason)
        return self._track is not None


def _silence(count: int) -> np.ndarray:
    return np.zeros((CHANNELS, count), np.float32)
