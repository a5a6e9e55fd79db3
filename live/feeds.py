"""Where frames come from: a camera in a browser, or a film that plays at its own pace."""

import contextlib
import pathlib
import threading
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..host.frames.transfer import send
from .codecs import CODECS
from .mailbox import Slot
from .media.pace import Pace
from .media.reader import Film
from .media.still import Damage, Unreadable
from .meters import Rate
from .pictures import Shape, fitted, to_image
from .wire import NotTaken, Packet

_PACED = 10  # frames over which a source's own pace is looked at
SILENT = 2.0  # seconds without a frame after which a source is called silent


class Origin(NamedTuple):
    """The frame that a picture comes from, as it travels with it to the screen."""

    sequence: int
    captured: float


class Place(NamedTuple):
    """Where in a film a frame is.

    Attributes:
        path: the film.
        seconds: from its first picture on.
    """

    path: pathlib.Path
    seconds: float


class Frame:
    """A picture of a source, and the images that nodes make of it.

    Attributes:
        sequence: counts the frames of its source.
        captured: seconds since the epoch, by the clock of whoever took it.
        arrived: seconds, by time.monotonic.
        picture: [H, W, 3] uint8.
        place: in a film, of a frame that is from one.
    """

    place: Place | None = None

    def __init__(self, sequence: int, captured: float, arrived: float, picture: np.ndarray):
        self.sequence = sequence
        self.captured = captured
        self.arrived = arrived
        self.picture = picture
        self._images: dict[Shape, Tensor] = {}

    @property
    def origin(self) -> Origin:
        """What is told of it, without its picture."""
        return Origin(self.sequence, self.captured)

    def image(self, shape: Shape) -> Tensor:
        """IMAGE [1, height, width, 3]."""
        if shape not in self._images:
            picture = fitted(self.picture, shape)
            image = self._images[shape] = to_image(picture)
            send(image, picture)
        return self._images[shape]

    def only(self, shapes: Collection[Shape]) -> None:
        """Let go of the images of other shapes: a still picture may outlive many edits."""
        if len(self._images) > len(shapes):
            self._images = {s: image for s, image in self._images.items() if s in shapes}


class Feed:
    """A source of frames; the latest is in `slot`.

    Attributes:
        shapes: how each node that shows this source wants its frames, by node id.
        rate: frames that came, whether or not they were taken.
        dark: stands in for the first frame until that comes.
        dropped: frames that were over before they could be left in the slot.
        damaged: parts of a file that could not be decoded and were left out.
        error: why no more frames come, if something went wrong.
    """

    damaged = 0

    def __init__(self):
        self.slot: Slot[Frame] = Slot()
        self.shapes: dict[str, Shape] = {}
        self.rate = Rate(_PACED)
        self.dark = Frame(0, 0.0, 0.0, np.zeros((16, 16, 3), np.uint8))
        self.dropped = 0
        self.error: Exception | None = None
        self._wanted: float | None = None

    def begin(self) -> None:
        """Frames are wanted from now on."""
        if self._wanted is None:
            self._wanted = time.monotonic()

    def end(self) -> None:
        """No more frames are wanted; threads are gone soon after."""
        self.slot.end()

    def silent(self, now: float) -> bool:
        """Whether no frames come where some are expected."""
        return self.slot.over or self._quiet(self.rate.last or self._wanted or now, now)

    def _quiet(self, since: float, now: float) -> bool:
        """Whether having nothing since then is more than the pace of this source."""
        return self.rate.last is None and now - since > SILENT

    def _ready(self, frame: Frame) -> Frame:
        """The frame with its images made, off the sampler's thread."""
        for shape in list(self.shapes.values()):
            frame.image(shape)
        self.rate.add(frame.arrived)
        return frame


class CameraFeed(Feed):
    """Frames that a browser sends. They wait encoded in `coded` for a thread to decode them."""

    def __init__(self):
        super().__init__()
        self.coded: Slot[tuple[Packet, float]] = Slot()
        self._numbered = 0

    def decoded(self, packet: Packet, arrived: float) -> Frame:
        """Decode in a worker thread. Raises NotTaken."""
        codec = CODECS.get(packet.codec)
        if codec is None:
            raise NotTaken(f"codec {packet.codec} is not known")
        picture = codec.decode(packet.payload)
        return self._ready(Frame(packet.sequence, packet.captured, arrived, picture))

    def given(self, picture: np.ndarray, captured: float, arrived: float) -> None:
        """Take one that comes decoded, [H, W, 3] uint8, numbered here. In a worker thread."""
        self._numbered += 1
        self.slot.put(self._ready(Frame(self._numbered, captured, arrived, picture)))

    def end(self) -> None:
        self.coded.end()
        super().end()

    def _quiet(self, since: float, now: float) -> bool:
        # a camera has no slow pictures; one that stops has been covered, or lost its page
        return now - since > SILENT


class FilmFeed(Feed):
    """A file that plays in a thread of its own.

    Args:
        path: the file.
        fps: the most frames per second; the film itself may have fewer.
        loop: start again at the end.

    Both may be changed while it plays.
    """

    def __init__(
        self,
        path: pathlib.Path,
        fps: float,
        loop: bool,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__()
        self.path, self.fps, self.loop = path, fps, loop
        self._clock = clock
        self._pace, self._damage = Pace(), Damage()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="livediffusion-film", daemon=True)

    @property
    def damaged(self) -> int:
        return self._damage.parts

    def begin(self) -> None:
        super().begin()
        # each edit begins all feeds anew; a thread that is over is begun no more
        if self._thread.ident is None and not self._over.is_set():
            self._thread.start()

    def end(self) -> None:
        self._over.set()
        super().end()

    def _run(self) -> None:
        sequence, film = 0, Film(self.path, self._damage)
        try:
            while not self._over.is_set():
                sequence = self._play(film, sequence)
                if not self.loop:
                    break
        except Exception as reason:
            # the run reports it with the node's name
            self.error = reason
        finally:
            self.slot.close()

    def _play(self, film: Film, sequence: int) -> int:
        refused = None
        with contextlib.closing(film.stills()) as stills:
            for i, still in enumerate(stills):
                if i == 0:
                    # not before it is open, which takes its time
                    self._pace.again(self._clock())
                wait = self._pace.wait(still.time, still.lasts, self._clock(), self.fps)
                self.dropped = self._pace.dropped
                if wait is None:
                    continue
                if self._over.wait(wait):
                    return sequence
                try:
                    picture = still.picture()
                except Unreadable as reason:
                    self._damage.parts += 1
                    refused = refused or reason
                    continue
                frame = Frame(sequence, time.time(), time.monotonic(), picture)
                frame.place = Place(self.path, still.time)
                self.slot.put(self._ready(frame))
                del frame, picture  # or they would be kept until the next is due
                sequence += 1
        if refused is not None and sequence == 0:
            raise refused
        self._over.wait(self._pace.left(self._clock()))
        return sequence
