"""Films and GIFs, by FFmpeg's libraries through PyAV, as ComfyUI's loaders show them."""

import itertools
import pathlib
from collections.abc import Iterator

import numpy as np

from .still import MOST_PIXELS_MOVING, Damage, Still, Unreadable, animated, bounded
from .upright import AS_IT_IS, display

# FFmpeg's names of what is taken: the content is looked at, not the name of the file. No kind
# that names other files to be read (hls, dash, concat, sdp, image2, ...) is among them.
CONTAINERS = (
    "asf", "avi", "flv", "gif", "ivf", "matroska", "mov", "mpeg", "mpegts", "mpegvideo", "ogg",
    "yuv4mpegpipe",
)  # fmt: skip
# a film whose clock jumps by more than this, in seconds, was put together from several
_JUMP = 10.0
# SWS_BILINEAR, SWS_FULL_CHR_H_INT and SWS_ACCURATE_RND: colours between pixels, rounded, where
# FFmpeg's fast way is up to two levels off in the mean
_EXACT = 0x2 | 0x2000 | 0x40000
_DELAYED = 256  # more packets than a decoder keeps
_GIVE_UP = 32  # parts in a row that cannot be read from the file


def stills(path: pathlib.Path, damage: Damage) -> Iterator[Still]:
    """The frames of a film from its beginning; what cannot be decoded is left out and counted.

    Raises:
        Unreadable: there is no picture in it, or it is too large.
        av.FFmpegError: it cannot be opened.
    """
    with opened(path) as film:
        stream = pictures_of(film)
        if stream is None:
            raise Unreadable(f"{path.name} cannot be read: no film is found in it.")
        bounded(path.name, stream.width, stream.height, True)
        # a later part may say another size
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS_MOVING)}
        clock = Clock(rate_of(stream), jumping(film))
        empty = True
        for frame, lasts in frames(film, stream, damage):
            empty = False
            if film.format.name == "gif":
                # made of lengths, which are not all kept
                time, lasts = clock.place(None, animated(lasts))
            else:
                time, lasts = clock.place(frame.time, lasts)
            yield Still(time, lasts, lambda frame=frame: _rgb(frame, path.name))
        if empty and not (stream.width and stream.height):
            # FFmpeg forgets a size that it does not take
            raise Unreadable(
                f"{path.name} cannot be read: the size of its pictures is not to be found, or is "
                f"above {MOST_PIXELS_MOVING / 1e6:.0f} million pixels."
            )


def opened(path: pathlib.Path):
    """An av.container.InputContainer of one of CONTAINERS, which reads this file and no other.

    Raises:
        av.FFmpegError: it is none, or cannot be opened.
    """
    import av

    container = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
    # a large picture may be decoded to know its size. PyAV before 17.1 crashes on what it is told
    # of streams that a file does not name at its beginning.
    new = tuple(int(part) for part in av.__version__.split(".")[:2]) >= (17, 1)
    return av.open(
        f"file:{path}",
        container_options=container,
        options={"max_pixels": str(MOST_PIXELS_MOVING)} if new else None,
        # tags in another encoding must not keep a film from being shown
        metadata_errors="replace",
    )


def pictures_of(film):
    """The first stream of pictures that can be decoded, a cover only if there is no other."""
    import av

    streams = [s for s in film.streams.video if s.codec_context is not None]
    cover = av.stream.Disposition.attached_pic
    return next((s for s in streams if not s.disposition & cover), next(iter(streams), None))


def jumping(film) -> bool:
    """Whether the clock of this kind of film may go on at another time."""
    return bool(film.format.flags & 0x0200)  # AVFMT_TS_DISCONT


def rate_of(stream) -> float:
    """Pictures per second that a stream says it has."""
    return float(stream.average_rate or stream.guessed_rate or 25)


def frames(film, stream, damage: Damage) -> Iterator[tuple]:
    """Each frame, and the seconds that it lasts; 0 where the file does not say."""
    import av

    packets, failed = film.demux(stream), 0
    # by time stamp, of what is in the decoder: frames have no length in PyAV before 14.3
    lengths: dict[int | None, float] = {}
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            damage.parts += 1
            failed += 1
            if failed == _GIVE_UP:
                packet = None
            else:
                packets = film.demux(stream)
                continue
        else:
            failed = 0
        try:
            if packet is not None and packet.duration:
                lengths[packet.pts] = float(packet.duration * packet.time_base)
            frames = [] if packet is None else packet.decode()
        except av.FFmpegError:
            damage.parts += 1
            continue
        for frame in frames:
            yield frame, lengths.pop(frame.pts, 0.0)
        if len(lengths) > _DELAYED:
            lengths.clear()
        if packet is None:
            return


def _rgb(frame, name: str) -> np.ndarray:
    """Upright, [H, W, 3] uint8."""
    import av

    try:
        if frame.format.name.startswith("yuvj"):
            # as ComfyUI: what cameras and JPEG give goes the plain way
            picture = frame.to_ndarray(format="rgb24")
        else:
            even = _even(frame)
            picture = even.to_ndarray(format="rgb24", interpolation=_EXACT)
            picture = picture[: frame.height, : frame.width]
    except (av.FFmpegError, ValueError) as reason:
        raise Unreadable(f"a frame of {name} cannot be shown: {reason}") from None
    matrix = frame.side_data.get("DISPLAYMATRIX")
    turn = display(bytes(matrix)) if matrix is not None else AS_IT_IS
    return turn.upright(picture)


def _even(frame):
    """The frame, or one with a last column or row twice where it shares its colour with none.

    FFmpeg would stretch the coarser planes of colour over an odd size, which moves them.
    """
    import av

    coarse = frame.format.chroma_width(2) == 1 or frame.format.chroma_height(2) == 1
    right, bottom = frame.width % 2, frame.height % 2
    if not coarse or not (right or bottom):
        return frame
    graph = av.filter.Graph()
    parts = [
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format.name,
            time_base=frame.time_base,
        ),
        graph.add("pad", f"{frame.width + right}:{frame.height + bottom}:0:0"),
        graph.add("fillborders", f"right={right}:bottom={bottom}:mode=smear"),
        graph.add("buffersink"),
    ]  # fmt: skip
    for part, behind in itertools.pairwise(parts):
        part.link_to(behind)
    graph.configure()
    parts[0].push(frame)
    return parts[-1].pull()


class Clock:
    """Times that go forward from 0, whatever the file says.

    Args:
        rate: frames per second, for those without a time.
        jumps: whether this kind of film may go on at another time.

    Attributes:
        origin: what is taken off the file's own times now; None before the first.
    """

    def __init__(self, rate: float, jumps: bool):
        self._step = 1 / min(max(rate, 0.1), 1000)
        self._jumps = jumps
        self.origin: float | None = None
        self._expected = 0.0
        self._last = -1.0

    def place(self, time: float | None, lasts: float) -> tuple[float, float]:
        """Time and length of the next frame, from what the file says: None, 0 where nothing."""
        lasts = lasts if lasts > 0 else self._step
        if time is None:
            place = self._expected
        else:
            if self.origin is None:
                self.origin = time
            place = time - self.origin
            if place <= self._last or (self._jumps and place - self._expected > _JUMP):
                place = self._expected
                self.origin = time - place
        self._last, self._expected = place, place + lasts
        return place, lasts
