"""What is told of a stream whose network computes changed tiles only."""

from ...engine.coherence.neighbours import Neighbours

_TOLD = 32  # ticks after which the node says anew how much was computed


class Patched:
    """Of one stream.

    Attributes:
        share: of the tiles that were computed in the newest ticks, 0 to 1.
    """

    def __init__(self) -> None:
        self.share = 1.0
        self._ticks = 0

    def done(self, neighbours: Neighbours) -> str:
        """The tick is done; returns what the node is to say from now on, if anything."""
        self._ticks += 1
        if neighbours.patching is None or self._ticks % _TOLD:
            return ""
        self.share = neighbours.patching.looked()
        return self.line(neighbours)

    def line(self, neighbours: Neighbours) -> str:
        """For people."""
        known = neighbours.patching
        share = self.share if self._ticks >= _TOLD else known.share
        line = f"{share:.0%} of the picture is computed, {known.size / 2**20:.0f} MB kept"
        why = known.why or neighbours.why
        return f"{line}: {why}" if why else line
