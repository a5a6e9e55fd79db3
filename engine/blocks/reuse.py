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
class Bank:
    """Features of one shape, by place.

    Attributes:
        features: [P, C, h, w]; the first row is nobody's.
        lies: how their numbers lie.
    """

    features: Tensor
    lies: torch.memory_format

    def fits(self, new: Tensor) -> bool:
        """Whether features, [W, C, h, w], may go there."""
        here = self.features
        return here.shape[1:] == new.shape[1:] and here.dtype == new.dtype

    def grown(self, places: int) -> Tensor:
        """The features, with room for as many places as this besides nobody's."""
        here = self.features
        more = 1 + places - here.shape[0]
        if more > 0:
            both = torch.cat([here, here.new_zeros((more, *here.shape[1:]))])
            self.features = here = both.contiguous(memory_format=self.lies)
        return here


@dataclass(eq=False)
class Keeping:
    """Of one call (plan.Kept). Its tensors lie where they lay in the last call of as many rows.

    Attributes:
        depth, whole: see plan.Kept.
        at: where each row's feature is in the bank, int64 [R].
        to: where those of `whole` go, int64 [W].
        rows: `whole` as numbers.
        spots: of these; None for one of which nothing is kept.
        bank: what the other rows go on with is there; None where nothing is kept at all.
        finite: which of them were, [W]; there once they are kept.
    """

    depth: int
    whole: Tensor
    at: Tensor
    to: Tensor
    rows: list[int]
    spots: list[Spot | None]
    bank: Bank | None
    _of: "Reusing" = field(repr=False)
    finite: Tensor | None = None
    edition: int = -1  # of the banks that they were put into

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
        return laid(self.bank.grown(self._of.places), self.at)

    def put(self, new: Tensor) -> None:
        """Keep what the whole rows had, [W, C, h, w]; what is not finite is not kept."""
        bank = self._of.room(new, self)
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
        banks: one for each shape that features have: calls of a tick may differ in it (a node that
            makes pictures smaller inside of the network at some noise levels). A spot is at home in
            that of its newest features; one in which none is at home is gone.
        edition: grows whenever what is in the banks is lost.
        why: the calls of the newest tick ran as they are; empty where they did not.
    """

    def __init__(self, device: torch.device):
        self.reuse, self.depth = Reuse(), 0
        self.device = device
        self.banks: list[Bank] = []
        self.edition = 0
        self._ran = [0, 0]  # rows of calls since somebody looked, and those of them that ran whole
        self.why = ""
        self._key: Hashable = None
        self._slots = 1
        self._schedule = Schedule()
        self._home: dict[Spot, Bank] = {}
        self._places: dict[Spot, int] = {}  # in the bank
        self._index: dict[tuple[str, int], Tensor] = {}  # at fixed addresses, by use and length
        self._fine: dict[int, Tensor] = {}  # the same, by length
        self._pending: list[Keeping] = []
        self._unread: list[_Unread] = []

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(bank.features.nbytes for bank in self.banks)

    @property
    def places(self) -> int:
        """That there are in a bank, besides nobody's."""
        return len(self._places)

    def settle(self, reuse: Reuse, depth: int, slots: int, key: Hashable) -> None:
        """What holds from now on.

        Args:
            slots: n.
            key: whatever nothing survives a change of: weights, size, dtype, n and F.
        """
        self.reuse, self._slots = reuse, slots
        if (depth, key) != (self.depth, self._key):
            self.depth, self._key = depth, key
            self.edition += 1
            self.forget()
            self.banks = []
            self._places.clear()
            self._home.clear()

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
        resting = [self._home[spot] for spot, run in zip(spots, runs, strict=True) if not run]
        if any(bank is not resting[0] for bank in resting):
            runs, resting = [True] * len(spots), []  # a call goes on with features of one shape
        known = [self._home[spot] for spot in spots if spot in self._home]
        bank = next(iter(resting or known or self.banks), None)
        whole = [r for r, run in enumerate(runs) if run]
        at = [self._placed(spot) for spot in spots]
        keeping = Keeping(
            self.depth, self._numbers("whole", whole), self._numbers("at", at),
            self._numbers("to", [at[r] for r in whole]), whole, [spots[r] for r in whole],
            bank, self,
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
        not room for all of it in one bank."""
        (keeping,) = self._pending
        bank = keeping.bank
        if bank is None or bank.features.shape[0] <= self.places:
            return None
        if any(spot and self._home.get(spot) is not bank for spot in keeping.spots):
            return None
        own = [keeping.whole, keeping.at, keeping.to, *[one.features for one in self.banks]]
        own += [] if keeping.finite is None else [keeping.finite]
        return self.depth, *[(t.data_ptr(), tuple(t.shape)) for t in own]

    def replayed(self) -> None:
        """The call that was planned has been made, without Python."""
        self._pending[-1].taken()

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """What calls put into the banks while this lasts is gone after it."""
        before = [(bank, bank.features.clone()) for bank in self.banks]
        home = self._home.copy()
        try:
            yield
        finally:
            for bank, features in before:
                bank.features[: len(features)].copy_(features)
            self.banks, self._home = [bank for bank, _ in before], home

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
            # what was kept before may stand for what was not finite, but not if it was another's
            first = any(before is None for _, before in kept.values())
            if first or self.reuse.awake > 0:
                self._unread.append(_Unread(Fetched(keeping.finite), rows))
            if first:
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

    # -- the banks --------------------------------------------------------------------------------

    def room(self, new: Tensor, keeping: Keeping) -> Tensor:
        """The features of the bank of their shape, with a place for every spot that there is. The
        spots of a call are at home there from now on.

        Args:
            new: of the call's whole rows, [W, C, h, w].

        Raises:
            RuntimeError: features of another shape are kept for other rows of the call.
        """
        bank = next((bank for bank in self.banks if bank.fits(new)), None)
        if bank is not keeping.bank and len(keeping.rows) < keeping.count:
            here = list(keeping.bank.features.shape[1:])
            raise RuntimeError(
                f"features {list(new.shape[1:])} where {here} are kept: a node changes the size of "
                "what is inside the UNet. Set Live Reuse's interval to 1."
            )
        if bank is None:
            bank = Bank(new.new_zeros((0, *new.shape[1:])), layout(new))
            self.banks.append(bank)
        moved = [spot for spot in keeping.spots if spot and self._home.get(spot) is not bank]
        # what such a spot had stands for nothing any more, even where the new one is not finite
        self._schedule.forget(moved)
        self._home |= dict.fromkeys(moved, bank)
        if len(self.banks) > 1:
            there = {id(bank), *map(id, self._home.values())}
            self.banks = [one for one in self.banks if id(one) in there]
        return bank.grown(self.places)

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
