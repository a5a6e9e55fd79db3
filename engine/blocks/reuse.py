"""Features that a stream keeps for its places, and what its calls take of them."""

import contextlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..fetch import Fetched
from ..upload import uploaded
from .plan import BlockPlan
from .rows import laid, layout
from .schedule import At, Guest, Reuse, Schedule, Spot


@dataclass(eq=False)
class Keeping:
    """Of one call (plan.Kept). Its tensors lie where they lay in the last call of as many rows.

    Attributes:
        depth, whole: see plan.Kept.
        at: where each row's feature is in the bank, int64 [R].
        to: where those of `whole` go, int64 [W].
        rows: `whole` as numbers.
        spots: of these; None for one of which nothing is kept.
        finite: which of them were, [W]; there once they are kept.
    """

    depth: int
    whole: Tensor
    at: Tensor
    to: Tensor
    rows: list[int]
    spots: list[Spot | None]
    _of: "Reusing" = field(repr=False)
    finite: Tensor | None = None
    edition: int = -1  # of the bank that they were put into

    @property
    def count(self) -> int:
        """R."""
        return self.at.shape[0]

    def take(self, new: Tensor | None) -> Tensor:
        """See plan.Kept.take."""
        if new is not None:
            self.put(new)
            if new.shape[0] == self.count:
                return new
        self.taken()
        out = self.features()
        return out if new is None else out.index_copy_(0, self.whole, new)

    def features(self) -> Tensor:
        """What is kept for each row, [R, C, h, w]; of a row that runs whole it means nothing.

        Only where not every row runs whole is there always something.
        """
        return laid(self._of.grown(), self.at)

    def put(self, new: Tensor) -> None:
        """Keep what the whole rows had, [W, C, h, w]; what is not finite is not kept."""
        bank = self._of.room(new, len(self.rows) == self.count)
        finite = new.flatten(1).sum(1, dtype=torch.float32).isfinite()
        wide = finite.view(-1, *[1] * (new.ndim - 1))
        bank.index_copy_(0, self.to, torch.where(wide, new, laid(bank, self.to)))
        self.finite = finite if self.finite is None else self.finite.copy_(finite)
        self.taken()

    def taken(self) -> None:
        """What is kept has been used, by whoever made the call."""
        self.edition = self._of.edition


@dataclass
class _Row:
    """Of one that ran whole: whose features it had, and whose stand if these were not finite."""

    spot: Spot
    guest: Guest
    before: Guest | None


@dataclass
class _Unread:
    """Of one call: which of its whole rows were finite, which the host has not learned yet.

    Attributes:
        newest: its tick may still be running.
    """

    finite: Fetched
    rows: list[_Row | None]
    newest: bool = True


class Reusing:
    """Of one stream; see Neighbours for the order of calls.

    Attributes:
        reuse, depth: what is asked for; depth as plan.Kept counts it.
        bank: [P, C, h, w], or None before the first call; its first row is nobody's.
        edition: grows whenever what is in the bank is lost.
        why: the calls of the newest tick ran as they are; empty where they did not.
    """

    def __init__(self, device: torch.device):
        self.reuse, self.depth = Reuse(), 0
        self.device = device
        self.bank: Tensor | None = None
        self.edition = 0
        self._layout = torch.contiguous_format  # of the bank
        self._ran = [0, 0]  # rows of calls since somebody looked, and those of them that ran whole
        self.why = ""
        self._key: Hashable = None
        self._slots = 1
        self._schedule = Schedule()
        self._places: dict[Spot, int] = {}  # in the bank
        self._index: dict[tuple[str, int], Tensor] = {}  # at fixed addresses, by use and length
        self._fine: dict[int, Tensor] = {}  # the same, by length
        self._pending: list[Keeping] = []
        self._unread: list[_Unread] = []

    @property
    def size(self) -> int:
        """Bytes."""
        return 0 if self.bank is None else self.bank.nbytes

    def settle(self, reuse: Reuse, depth: int, slots: int, key: Hashable) -> None:
        """What holds from now on.

        Args:
            slots: n.
            key: whatever nothing survives a change of: weights, size, dtype, n and F.
        """
        self.reuse, self._slots = reuse, slots
        if (depth, key) != (self.depth, self._key):
            self.depth, self._key = depth, key
            self.bank = None
            self._lose()

    def forget(self) -> None:
        """Nothing is kept from now on: what comes next has nothing to do with it."""
        self._schedule.forget()
        self._unread.clear()

    # -- a tick -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """A tick begins, or begins anew in another way."""
        self.why = ""
        for keeping in self._pending:
            if keeping.edition == self.edition:
                # a tick broke off behind it
                self._schedule.forget(spot for spot in keeping.spots if spot is not None)
        self._pending = []

    def meet(self, guests: Mapping[At, Guest], beat: int) -> None:
        """The frames of the tick that begins; see Schedule.meet. Where it looks at pictures this
        waits for the device, but on CUDA for no tick after the one before the last."""
        if self.reuse.awake > 0:
            running = [one for one in self._unread if one.finite.late and one.newest]
            self._read(len(self._unread) - len(running))
            for one in running:
                one.newest = False
        self._schedule.meet(self.reuse, guests, beat, self._slots)

    def planned(self, spots: Sequence[Spot | None], alone: bool) -> BlockPlan:
        """The plan of a call.

        Args:
            spots: of its rows; None for one of which nothing is kept.
            alone: it is the only call of its tick.
        """
        runs = self._schedule.whole(spots)
        whole = [r for r, run in enumerate(runs) if run]
        known = [self._placed(spot) for spot in spots]
        keeping = Keeping(
            self.depth, self._numbers("whole", whole), self._numbers("at", known),
            self._numbers("to", [known[r] for r in whole]), whole, [spots[r] for r in whole],
            self,
        )  # fmt: skip
        if alone and whole:
            fresh = torch.ones(len(whole), dtype=torch.bool, device=self.device)
            keeping.finite = self._fine.setdefault(len(whole), fresh)
        if alone:
            self._pending = []  # it may have been told before, on its way to a recording
        self._pending.append(keeping)
        return BlockPlan(keeping)

    def key(self) -> tuple | None:
        """What a recording of the tick whose only call is planned holds for; None while there is
        not room for all of it."""
        (keeping,) = self._pending
        if self.bank is None or self.bank.shape[0] <= max(self._places.values(), default=0):
            return None
        own = [keeping.whole, keeping.at, keeping.to, self.bank]
        own += [] if keeping.finite is None else [keeping.finite]
        return self.depth, *[(t.data_ptr(), tuple(t.shape)) for t in own]

    def replayed(self) -> None:
        """The call that was planned has been made, without Python."""
        self._pending[-1].taken()

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """What calls put into the bank while this lasts is gone after it."""
        before = None if self.bank is None else self.bank.clone()
        try:
            yield
        finally:
            if before is not None:
                self.bank.copy_(before)

    def as_ever(self, rows: int) -> None:
        """A call of so many rows that nobody can tell runs whole."""
        self._ran = [known + rows for known in self._ran]

    def finish(self) -> None:
        """The tick is done."""
        pending, self._pending = self._pending, []
        for keeping in pending:
            used = keeping.edition == self.edition
            self._ran[0] += keeping.count
            self._ran[1] += len(keeping.rows) if used else keeping.count
            if not used or not keeping.rows:
                continue
            kept = self._schedule.keep(spot for spot in keeping.spots if spot is not None)
            rows = [spot and _Row(spot, *kept[spot]) for spot in keeping.spots]
            self._unread.append(_Unread(Fetched(keeping.finite), rows))
            # what was kept before may stand for what was not finite, but not if it was another's
            if any(before is None for _, before in kept.values()):
                self._read(len(self._unread))
        if self.reuse.awake <= 0:
            self._unread.clear()

    @property
    def ran(self) -> tuple[int, int]:
        """Rows of calls since `looked`, and how many of them ran whole."""
        rows, whole = self._ran
        return rows, whole

    def looked(self) -> tuple[int, int]:
        """The same; they are counted anew from now on."""
        ran, self._ran = self.ran, [0, 0]
        return ran

    # -- the bank ---------------------------------------------------------------------------------

    def room(self, new: Tensor, all_rows: bool) -> Tensor:
        """The bank, with a place for every spot that there is.

        Args:
            new: features that go there, [W, C, h, w].
            all_rows: nothing that is in it is needed any more.

        Raises:
            RuntimeError: features of another shape are kept for other rows of the call.
        """
        bank = self.bank
        if bank is not None and (bank.shape[1:] != new.shape[1:] or bank.dtype != new.dtype):
            if not all_rows:
                raise RuntimeError(
                    f"features {list(new.shape[1:])} where {list(bank.shape[1:])} are kept: a node "
                    "changes the size of what is inside the UNet. Set Live Reuse's interval to 1."
                )
            bank = None
            self._lose(places=False)
        if bank is None:
            bank, self._layout = new.new_zeros((0, *new.shape[1:])), layout(new)
        self.bank = bank
        return self.grown()

    def grown(self) -> Tensor:
        """The bank that there is, with a place for every spot that there is."""
        bank = self.bank
        more = 1 + max(self._places.values(), default=0) - bank.shape[0]
        if more > 0:
            both = torch.cat([bank, bank.new_zeros((more, *bank.shape[1:]))])
            self.bank = bank = both.contiguous(memory_format=self._layout)
        return bank

    def _lose(self, places: bool = True) -> None:
        """What is in the bank is of no use any more."""
        self.edition += 1
        self.forget()
        if places:
            self._places.clear()

    def _placed(self, spot: Spot | None) -> int:
        return 0 if spot is None else self._places.setdefault(spot, 1 + len(self._places))

    def _read(self, count: int) -> None:
        """Learn which rows of the oldest calls were not finite, and so are not kept."""
        for _ in range(count):
            one = self._unread.pop(0)
            for good, row in zip(one.finite.read().tolist(), one.rows, strict=True):
                if good or row is None:
                    continue
                self._schedule.put_back(row.spot, row.guest, row.before)
                # nor can it stand for what came there since
                for later in (each for newer in self._unread for each in newer.rows if each):
                    if later.before is row.guest:
                        later.before = row.before

    def _numbers(self, use: str, values: list[int]) -> Tensor:
        """On the device, always at the same address."""
        fresh = uploaded(torch.tensor(values, dtype=torch.int64), self.device)
        known = self._index.setdefault((use, len(values)), fresh)
        if known is not fresh:
            known.copy_(fresh)
        return known
