"""What is remembered: keys, values and outputs of attention layers, from keyframes of before."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..upload import uploaded
from .attention import Read
from .fusion import unit
from .merge import dealt, merged

BANKS = ("merged", "queue")


@dataclass
class Staged:
    """What the writing rows of a call had in one layer, at fixed addresses.

    Attributes:
        k, v: [W, L, C].
        o: the layer's output, [W, S, C], or None.
    """

    k: Tensor
    v: Tensor
    o: Tensor | None = None

    def all(self) -> list[Tensor]:
        return [t for t in (self.k, self.v, self.o) if t is not None]

    def finite(self) -> Tensor:
        """Which rows are, [W]."""
        return sum(t.flatten(1).sum(1, dtype=torch.float32) for t in self.all()).isfinite()


@dataclass
class Layer:
    """What one layer remembers; B places of m frames each.

    Attributes:
        k, v: [B, m * L, C].
        unit, norm: of the outputs (engine.coherence.fusion), [B, m * S, C] and [B, m * S].
    """

    k: Tensor
    v: Tensor
    unit: Tensor | None
    norm: Tensor | None

    def all(self) -> list[Tensor]:
        return [t for t in (self.k, self.v, self.unit, self.norm) if t is not None]


class Banks:
    """A bank for each shape that layers have had: calls of a tick may differ in it (a node that
    makes pictures smaller at some noise levels). A place is in one of them, that of its newest
    keyframe; a bank that has none left is gone.

    Args:
        frames, kind: see Bank.
    """

    def __init__(self, frames: int, kind: str):
        self._asked = frames, kind
        self.clear()

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(bank.size for bank in self._banks)

    def clear(self) -> None:
        """Forget everything."""
        self._banks = [Bank(*self._asked)]  # the one that was put into last is the last
        self._home: dict[int, Bank] = {}

    def of(self, places: Sequence[int]) -> "Bank":
        """That in which most of these places are."""
        homes = Counter(id(self._home[p]) for p in places if p in self._home)
        ((most, _),) = homes.most_common(1) or [(id(self._banks[-1]), 0)]
        return next(bank for bank in self._banks if id(bank) == most)

    def put(self, places: Sequence[int], staged: dict[str, Staged]) -> None:
        """See Bank.put."""
        if not places or not staged:
            return
        bank = next((b for b in self._banks if b.alike(staged)), None) or Bank(*self._asked)
        bank.put(places, staged)
        for place in places:
            before = self._home.get(place)
            if bank.count(place) and before is not bank:
                self._home[place] = bank
                if before is not None:
                    before.leave(place)
        there = {id(home) for home in self._home.values()} | {id(bank)}
        self._banks = [b for b in self._banks if id(b) in there and b is not bank] + [bank]


class Bank:
    """The newest keyframes of every place, or one frame into which they are merged; all of one
    shape.

    A place is a slot and a side. What a place has not had yet is not read (Read.known).

    Args:
        frames: m, keyframes of a place.
        kind: "queue", or "merged", where m is 1.
        seed: of the random pairs of a merge.

    Attributes:
        layers: by name.
        filled: keyframes of each place so far, at most m.
    """

    def __init__(self, frames: int, kind: str, seed: int = 0):
        if kind not in BANKS:
            raise ValueError(f"bank: {kind!r} is none of {', '.join(BANKS)}")
        self.kind = kind
        self.frames = frames if kind == "queue" else 1
        self.layers: dict[str, Layer] = {}
        self.filled: list[int] = []
        self._at: Tensor | None = None  # where each place's next keyframe goes, int64 [B]
        self._had: Tensor | None = None  # whether it has had one, bool [B]
        self._generator = torch.Generator("cpu").manual_seed(seed)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(t.nbytes for layer in self.layers.values() for t in layer.all())

    def full(self, places: Sequence[int]) -> bool:
        """Whether every one of these places has all its keyframes."""
        return all(p < len(self.filled) and self.filled[p] == self.frames for p in places)

    def count(self, place: int) -> int:
        """Keyframes of a place; 0 of one that there is not."""
        return self.filled[place] if 0 <= place < len(self.filled) else 0

    def read(
        self, name: str, index: Tensor, known: Tensor | None = None, frames: int | None = None
    ) -> Read | None:
        """What a layer remembers for some rows.

        Args:
            index: the place of each row, int64 [R].
            known: see Read.
            frames: so many of each row's keyframes, those that came first; all by default.
        """
        layer = self.layers.get(name)
        if layer is None:
            return None
        kept = [layer.k, layer.v, layer.unit, layer.norm]
        if frames is not None and frames < self.frames:
            kept = [t if t is None else t[:, : t.shape[1] // self.frames * frames] for t in kept]
        return Read(*[t if t is None else t.index_select(0, index) for t in kept], known)

    def put(self, places: Sequence[int], staged: dict[str, Staged]) -> None:
        """The keyframes of some places, row w of what is staged for places[w]; more rows than
        places are left alone. A row that is not finite is not put.

        While a place is filled for the first time this waits for the device, to know which it is;
        never after that.
        """
        new = {name: _first(len(places), one) for name, one in staged.items()}
        self._fit(max(places) + 1, new)
        fine = torch.stack([one.finite() for one in new.values()]).all(0)
        index = uploaded(torch.tensor(places), fine.device)
        # where they go, and what is there: nothing yet, or the oldest keyframe
        at, had = self._at.index_select(0, index), self._had.index_select(0, index)
        rows = index * self.frames + at
        orders: dict[int, Tensor] = {}
        for name, one in new.items():
            layer = self.layers[name]
            values = [one.k, one.v] if layer.unit is None else [one.k, one.v, one.o]
            if self.kind == "merged":
                values = self._merge(layer, index, values, had, orders)
            if layer.unit is not None:
                values[2:] = unit(values[2])
            for kept, value in zip(layer.all(), values, strict=True):
                wide = kept.view(-1, *value.shape[1:])
                keep = _wide(~fine, value)
                wide.index_copy_(0, rows, torch.where(keep, wide.index_select(0, rows), value))
        self._at.index_copy_(0, index, (at + fine) % self.frames)
        self._had.index_copy_(0, index, had | fine)
        if not self.full(places):
            for place, good in zip(places, fine.tolist(), strict=True):
                self.filled[place] = min(self.frames, self.filled[place] + good)

    def leave(self, place: int) -> None:
        """Forget what a place had."""
        self.filled[place] = 0
        self._at[place] = 0
        self._had[place] = False

    def alike(self, new: dict[str, Staged]) -> bool:
        """Whether these are of the layers and shapes that are remembered, if any are."""
        if not self.layers:
            return True
        if new.keys() != self.layers.keys():
            return False
        for name, one in new.items():
            known, keys = self.layers[name], (self.frames * one.k.shape[1], one.k.shape[2])
            if tuple(known.k.shape[1:]) != keys or known.k.dtype != one.k.dtype:
                return False
            if known.unit is not None and (
                one.o is None or known.unit.shape[1] != self.frames * one.o.shape[1]
            ):
                return False
        return True

    def _merge(
        self, layer: Layer, index: Tensor, new: list[Tensor], had: Tensor, orders: dict[int, Tensor]
    ) -> list[Tensor]:
        """What is kept of new tokens and of those that are there; the new ones where none are."""
        tokens = new[0].shape[1]
        if tokens not in orders:
            orders[tokens] = uploaded(dealt(tokens, self._generator), index.device)
        old = [layer.k.index_select(0, index), layer.v.index_select(0, index)]
        if layer.unit is not None:
            norm = layer.norm.index_select(0, index)[..., None]
            old.append(layer.unit.index_select(0, index) * norm)
        both = merged(new, old, orders[tokens])
        return [torch.where(_wide(had, a), m, a) for m, a in zip(both, new, strict=True)]

    def _fit(self, places: int, new: dict[str, Staged]) -> None:
        """Room for as many places, and for these layers; what is there stays."""
        before = len(self.filled)
        if places <= before:
            return
        some = next(iter(new.values())).k
        more = places - before
        for name, one in new.items():
            known = self.layers.get(name)
            tokens, channels = one.k.shape[1:]
            # pairs of keys are pairs of outputs only where there are as many of both
            paired = one.o is not None and (self.kind == "queue" or one.o.shape[1] == tokens)
            shapes = [(self.frames * tokens, channels), (self.frames * tokens, one.v.shape[2])]
            if paired:
                shapes += [(self.frames * one.o.shape[1], one.o.shape[2])]
                shapes += [shapes[2][:1]]
            made = [one.k.new_zeros((more, *shape)) for shape in shapes]
            if known is not None:
                made = [torch.cat(pair) for pair in zip(known.all(), made, strict=True)]
            self.layers[name] = Layer(*made, *[None] * (4 - len(made)))
        self.filled += [0] * more
        at = torch.zeros(more, dtype=torch.int64, device=some.device)
        self._at = at if self._at is None else torch.cat([self._at, at])
        had = at.bool()
        self._had = had if self._had is None else torch.cat([self._had, had])


def _first(count: int, staged: Staged) -> Staged:
    return Staged(*[None if t is None else t[:count] for t in (staged.k, staged.v, staged.o)])


def _wide(per_row: Tensor, like: Tensor) -> Tensor:
    return per_row.view(-1, *[1] * (like.ndim - 1))
