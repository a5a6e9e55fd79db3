"""A clip with its input's own times and sound: a film put together without coding it again."""

import pathlib
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np

from .packed import pack_module

TICKS = 90_000  # per second
RATES = (8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)  # what AAC takes as it is
_GAP = 0.05  # seconds of missing sound that are kept as silence
_JUMP = 0.1  # seconds by which the times of sound do not differ from one frame to the next
_AROUND = 1.0  # seconds that sound may begin before its pictures, or go on after them


class _Piece(NamedTuple):
    """A part of a film in which its clock goes on, by the file's own times in seconds.

    Attributes:
        first, last: of its pictures.
        origin: what is taken off them, and off the times of its sound.
    """

    first: float
    last: float
    origin: float


def write(made: pathlib.Path, source: pathlib.Path, times: list[float], out: pathlib.Path) -> None:
    """The pictures of one film at the times and with the sound of another.

    Args:
        made: a film of n frames at a constant rate.
        source: the input; one without sound, or a picture, adds none.
        times: n + 1 places in seconds from 0, of each frame and of the end.
        out: the film to be written, mp4.
    """
    options = {"movflags": "use_metadata_tags+faststart"}
    part = out.with_name(f"{out.stem}.part{out.suffix}")
    try:
        with av.open(str(made)) as pictures, av.open(str(part), "w", options=options) as film:
            # the workflow is in there
            film.metadata.update(pictures.metadata)
            video = film.add_stream_from_template(pictures.streams.video[0])
            video.time_base = Fraction(1, TICKS)
            tone, sound = None, _sound(source, times[-1])
            first = next(sound, None)
            if first is not None:
                tone = film.add_stream("aac", rate=first.sample_rate, layout=first.layout)
            for packet in _retimed(pictures, times):
                packet.stream = video
                film.mux(packet)
            if tone is not None:
                film.mux(tone.encode(first))
                for frame in sound:
                    film.mux(tone.encode(frame))
                film.mux(tone.encode())
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def _retimed(film, times: list[float]) -> Iterator:
    packets = [p for p in film.demux(film.streams.video[0]) if p.dts is not None]
    place = {pts: i for i, pts in enumerate(sorted(p.pts for p in packets))}
    # frames that are decoded before the first is shown
    ahead = sum(p.dts < min(place) for p in packets)
    ticks = [round(TICKS * time) for time in times]
    step = max(1, ticks[1] - ticks[0])
    for k, packet in enumerate(packets):
        i = place[packet.pts]
        packet.pts = ticks[i]
        packet.dts = ticks[k - ahead] if k >= ahead else ticks[0] - (ahead - k) * step
        packet.duration = ticks[i + 1] - ticks[i]
        packet.time_base = Fraction(1, TICKS)
        yield packet


def _pieces(source: pathlib.Path, seconds: float) -> list[_Piece]:
    """The pieces of a film's first seconds: several where its clock starts again or jumps."""
    films, pieces = pack_module("live.media.films"), []
    with films.opened(source) as film:
        stream = films.pictures_of(film)
        clock = films.Clock(films.rate_of(stream), films.jumping(film))
        damage = pack_module("live.media.still").Damage()
        for frame, lasts in films.frames(film, stream, damage):
            place, _ = clock.place(frame.time, lasts)
            if frame.time is None:
                continue
            if pieces and pieces[-1].origin == clock.origin:
                pieces[-1] = pieces[-1]._replace(last=frame.time)
            else:
                pieces.append(_Piece(frame.time, frame.time, clock.origin))
            if place > seconds + _AROUND:
                break
    return pieces


class _Origins:
    """Which piece sound is of, told from its times: they come in the order of the file.

    Args:
        pieces: one at least.
    """

    def __init__(self, pieces: list[_Piece]):
        self._pieces, self._last = pieces, None

    def of(self, time: float) -> float:
        """What is taken off the time of the next frame of sound; both in seconds."""
        last, self._last = self._last, time
        back = last is not None and time < last - _JUMP
        on = last is not None and time > last + _JUMP and time > self._pieces[0].last
        if back or on:
            for k, piece in enumerate(self._pieces[1:], 1):
                if piece.first - _AROUND <= time <= piece.last + _AROUND:
                    del self._pieces[:k]
                    break
        return self._pieces[0].origin


def _sound(source: pathlib.Path, seconds: float) -> Iterator[av.AudioFrame]:
    """The sound of a film's first seconds, from its first picture on, without gaps."""
    films = pack_module("live.media.films")
    try:
        film = films.opened(source)
    except av.FFmpegError:
        return
    with film:
        stream = next((s for s in film.streams.audio if s.codec_context is not None), None)
        pictures = films.pictures_of(film)
        if stream is None or pictures is None:
            return
        begin = float((pictures.start_time or 0) * pictures.time_base)
        origins = _Origins(_pieces(source, seconds) or [_Piece(begin, begin, begin)])
        layout = "mono" if stream.layout.nb_channels == 1 else "stereo"
        rate = stream.rate if stream.rate in RATES else RATES[-1]
        resampler = av.AudioResampler("fltp", layout, rate)
        at, whole = 0, round(seconds * rate)
        for packet in film.demux(stream):
            try:
                frames = [f for frame in packet.decode() for f in resampler.resample(frame)]
            except av.FFmpegError:
                # damaged: silence
                continue
            for frame in frames:
                wave = frame.to_ndarray()
                time = frame.time
                start = at if time is None else round((time - origins.of(time)) * rate)
                if start < at - _GAP * rate:
                    wave = wave[:, max(0, at - start) :]
                elif start > at + _GAP * rate or at == 0 < start:
                    quiet = np.zeros((len(wave), max(0, min(start, whole) - at)), np.float32)
                    wave = np.concatenate([quiet, wave], 1)
                wave = wave[:, : whole - at]
                if wave.shape[1]:
                    yield _frame(wave, layout, rate, at)
                    at += wave.shape[1]
                if at >= whole:
                    return


def _frame(wave: np.ndarray, layout: str, rate: int, at: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave, np.float32), "fltp", layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, at, Fraction(1, rate)
    return frame
