"""What a call's layers read and write: the one door between a network and what is remembered."""

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from ..blocks.plan import BlockPlan
from .attention import Group, Read
from .bank import Bank, Staged
from .fusion import fuse


class Exchange:
    """Of a call.

    A tracer derives from this: it gives inputs where they read and keeps what they write.

    Attributes:
        rows: of the call.
        groups: who attends to whom (attention.attend), or None.
        amount, threshold: see fusion.fuse; None where nothing is fused.
        plan: which rows run which blocks; None where all run all of them.
        inner: the same for the rows that the layers of inner blocks have, where these are fewer.
        spots: what each row is to the stream, for what is kept of it from tick to tick.
    """

    def __init__(
        self, rows: int, groups: list[Group] | None, amount: Tensor | None = None,
        threshold: Tensor | None = None,
    ):  # fmt: skip
        self.rows, self.groups = rows, groups
        self.amount, self.threshold = amount, threshold
        self.plan: BlockPlan | None = None
        self.inner: Exchange | None = None
        self.spots: list[Hashable] = []

    def read(self, layer: str) -> Read | None:
        """What a layer remembers for the rows of the call."""

    def write(self, layer: str, k: Tensor, v: Tensor) -> None:
        """A layer's own keys and values, [R, L, C]; of some of the rows they are remembered."""

    def write_out(self, layer: str, o: Tensor) -> None:
        """Its output as it goes on, [R, S, C]; after `write`, in layers that are fused."""

    def fused(self, layer: str, o: Tensor) -> Tensor:
        """A layer's output with what is remembered of it, [R, S, C]; written, too."""
        read = None if self.amount is None else self.read(layer)
        if read is not None and read.unit is not None:
            o = fuse(o, read, self.amount, self.threshold)
        self.write_out(layer, o)
        return o


class Remembering(Exchange):
    """Of a stream's own bank.

    Args:
        bank: that its rows read from; None without memory.
        dial: amount and threshold, where features are fused.
        index: each row's place in the bank, int64 [R]; None where nothing is remembered for any.
        known, frames: see Bank.read.
        places: in the bank, of the rows that write, and the number of the frame there.
        writing: these rows, int64 [W], or more of any; None for none.

    Attributes:
        alike: of an `inner` call, what its groups are made from.
        wrote: the layers that did.
    """

    def __init__(
        self, bank: Bank | None, dial: tuple, rows: int, groups: list[Group] | None,
        index: Tensor | None = None, known: Tensor | None = None, frames: int = 0,
        places: Mapping[int, int] | None = None, writing: Tensor | None = None,
    ):  # fmt: skip
        super().__init__(rows, groups, *dial)
        self.bank, self._index, self._known = bank, index, known
        self._frames = frames
        self.places, self._writing = places or {}, writing
        self._staged: dict[str, Staged] = {}
        self.alike: tuple[int, ...] = ()
        self.wrote: dict[str, None] = {}  # layers, in their order: a merge draws for each in turn

    def read(self, layer: str) -> Read | None:
        if self._index is None:
            return None
        return self.bank.read(layer, self._index, self._known, self._frames)

    def write(self, layer: str, k: Tensor, v: Tensor) -> None:
        if self._writing is None:
            return
        self.wrote[layer] = None
        own = self._staged.get(layer)
        if own is None or not (_fits(own.k, k) and _fits(own.v, v)):
            self._staged[layer] = Staged(*[t.index_select(0, self._writing) for t in (k, v)])
            return
        torch.index_select(k, 0, self._writing, out=own.k)
        torch.index_select(v, 0, self._writing, out=own.v)

    def write_out(self, layer: str, o: Tensor) -> None:
        own = self._staged.get(layer)
        if self._writing is None or own is None:
            return
        if own.o is None or not _fits(own.o, o):
            own.o = o.index_select(0, self._writing)
        else:
            torch.index_select(o, 0, self._writing, out=own.o)

    def stage(self, staged: dict[str, Staged]) -> None:
        """Where what is written lies, from call to call."""
        self._staged = staged

    def narrow(self, inner: "Remembering") -> None:
        """`inner`, which writes to where this one does."""
        inner.wrote, inner._staged = self.wrote, self._staged
        self.inner = inner

    def staged(self) -> dict[str, Staged]:
        """What the layers wrote."""
        return {name: self._staged[name] for name in self.wrote}

    def addresses(self) -> list[int]:
        """Of what is read and written, but for the bank."""
        own = [self._index, self._writing]
        own += [t for one in self._staged.values() for t in one.all()]
        inner = [] if self.inner is None else self.inner.addresses()
        return [*inner, *[t.data_ptr() for t in own if t is not None]]


def _fits(staged: Tensor, values: Tensor) -> bool:
    return staged.shape[1:] == values.shape[1:] and staged.dtype == values.dtype
