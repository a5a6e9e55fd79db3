"""When a row runs the whole network, and when it goes on with what was kept of a frame before.

Numbers of the host only. A place meets the same noise level at every tick, and mostly nearly the
same picture, so what the inner blocks gave there is good for a few ticks. Every `interval` ticks a
place runs whole; which places do so goes round, so that there are as many in every tick, which then
costs the same. They go round against the frames: with an odd interval each frame is whole at about
as many of its levels. With an even one only every second frame is, and the others at none; that
cannot be evened out wholly, and what can be was measured to be no better (docs/reuse.md).
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..similarity import Sketch, correlation

DEPTHS = ("outermost block", "two blocks", "finest level")


@dataclass(frozen=True)
class Reuse:
    """What a row computes anew of a frame, and when.

    Attributes:
        interval: every how many ticks a place runs whole; 1 for always.
        depth: what every row runs, of DEPTHS.
        awake: how alike a frame has to be to the one whose features are kept
            (engine.similarity.correlation), or else it runs whole; 0 asks for nothing.
    """

    interval: int = 4
    depth: str = DEPTHS[2]
    awake: float = 0.5


class Spot(NamedTuple):
    """What features are kept for: a row of a tick, whatever frame is there.

    Attributes:
        ask: how often its side had been asked before in the same part of a tick.
        side, slot, index: see engine.coherence.neighbours.Row.
    """

    ask: int
    side: int
    slot: int
    index: int


@dataclass(eq=False)
class Coming:
    """How a frame looks that is on a device: the host learns it while the next tick begins.

    Attributes:
        sketch: until then that of the newest frame that is known, if there is one.
    """

    sketch: Sketch | None


class Guest(NamedTuple):
    """The frame that is at a slot and an index.

    Attributes:
        frame: its number in the stream.
        key: what its features depend on besides the picture: noise and its level, prompt.
        look: the sketch of the picture; None where nobody looks, and of one that is not finite.
    """

    frame: int
    key: Hashable
    look: Sketch | Coming | None = None

    @property
    def sketch(self) -> Sketch | None:
        """As far as it is known by now."""
        return self.look.sketch if isinstance(self.look, Coming) else self.look


At = tuple[int, int]  # slot and index


def due(beat: int, slot: int, index: int, slots: int, interval: int) -> bool:
    """Whether a place is to run whole.

    Any `interval` consecutive ticks have each place run whole once, and the numbers of places that
    do so in two ticks differ by one at most: the phases of all places are consecutive numbers.

    Args:
        beat: number of the tick.
        slots: n.
    """
    return (beat + slot + index * slots) % interval == 0


class Schedule:
    """Whose features are kept for each spot of a stream, and which rows may go on with them.

    Attributes:
        kept: the frame whose features a spot has.
    """

    def __init__(self) -> None:
        self.kept: dict[Spot, Guest] = {}
        self._guests: Mapping[At, Guest] = {}
        self._fresh: set[At] = set()
        self._awake = 0.0

    def meet(self, reuse: Reuse, guests: Mapping[At, Guest], beat: int, slots: int) -> None:
        """The frames of the tick that begins.

        Args:
            beat, slots: see due.
        """
        self._guests, self._awake = guests, reuse.awake
        self._fresh = {at for at in guests if due(beat, *at, slots, reuse.interval)}

    def whole(self, spots: Sequence[Spot | None]) -> list[bool]:
        """Which rows of a call run whole: none of the sides of a frame without the others.

        Args:
            spots: of the rows; None where nothing can be kept.
        """
        fresh = {spot[2:] for spot in spots if spot is not None and not self._holds(spot)}
        return [spot is None or spot[2:] in fresh for spot in spots]

    def keep(self, spots: Iterable[Spot]) -> dict[Spot, tuple[Guest, Guest | None]]:
        """What these rows had is kept from now on.

        Returns:
            whose they are, and whose could have stood for theirs until now, or None.
        """
        changed = {}
        for spot in spots:
            guest, known = self._guests[spot[2:]], self.kept.get(spot)
            stood = known if known is not None and known.key == guest.key else None
            changed[spot], self.kept[spot] = (guest, stood), guest
        return changed

    def put_back(self, spot: Spot, guest: Guest, before: Guest | None) -> None:
        """What a row of a guest had was not kept after all: it was not finite."""
        if self.kept.get(spot) is not guest:
            return  # there is a newer one's
        if before is None:
            del self.kept[spot]
        else:
            self.kept[spot] = before

    def forget(self, spots: Iterable[Spot] | None = None) -> None:
        """Nothing is kept there any more, or anywhere."""
        if spots is None:
            self.kept.clear()
        for spot in spots or ():
            self.kept.pop(spot, None)

    def _holds(self, spot: Spot) -> bool:
        """Whether what is kept may stand for what the row would compute."""
        guest, known = self._guests.get(spot[2:]), self.kept.get(spot)
        if guest is None or known is None or spot[2:] in self._fresh or known.key != guest.key:
            return False
        return self._awake <= 0 or self._alike(known, guest) >= self._awake

    def _alike(self, known: Guest, guest: Guest) -> float:
        if known.sketch is None or guest.sketch is None:
            return -1.0
        return 1.0 if known.frame == guest.frame else correlation(known.sketch, guest.sketch)
