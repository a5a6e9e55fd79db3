"""What a stream keeps of a network between frames."""

from collections.abc import Sequence

import torch
from torch import Tensor

MOST = 4 << 30  # bytes


class Full(Exception):
    """More would be kept than MOST."""


class Kept:
    """Tensors by name, each with a place for each row that is known: [P, ...], zeros at first.

    Attributes:
        places: P.
        size: bytes.
        beside: bytes that are kept elsewhere and count towards MOST, too.
    """

    def __init__(self) -> None:
        self.places, self.size, self.beside = 0, 0, 0
        self._of: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name]

    def grow(self, places: int) -> None:
        """Room for more; what is there stays.

        Raises:
            Full: it would be too much; nothing has changed.
        """
        more = places - self.places
        if more <= 0:
            return
        if self.places:
            self._room(self.size // self.places * more)
        self._of = {
            name: torch.cat([t, t.new_zeros(more, *t.shape[1:])]) for name, t in self._of.items()
        }
        self.places = places

    def room(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """The tensor of a name, [P, *shape], made where there is none of that shape and dtype.

        Raises:
            Full: it would be too much.
        """
        shape = self.places, *shape
        known = self._of.get(name)
        if known is not None and known.shape == shape and known.dtype == like.dtype:
            return known
        if known is not None:
            self.size -= known.nbytes
            del self._of[name]
        fresh = torch.empty(shape, dtype=like.dtype, device="meta")
        self._room(fresh.nbytes)
        self._of[name] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self._of[name]

    def _room(self, more: int) -> None:
        if self.beside + self.size + more > MOST:
            raise Full
        self.size += more
