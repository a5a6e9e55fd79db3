"""Who the rows of a tick are to each other, and what frames before have left for them."""

import collections
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..blocks.plan import BlockPlan
from ..blocks.reuse import Reusing
from ..blocks.schedule import Reuse, Spot
from ..blocks.skips import Choice, Splits
from ..patchwork.mask import Patchwork
from ..patchwork.patching import Patching
from ..upload import uploaded
from .attention import Group, grouped
from .bank import Banks, Staged
from .exchange import Exchange, Remembering

LEVELS = ("all but the finest", "all", "deepest")
_LAYOUTS = 32  # of rows that are kept; a steady stream has one


@dataclass(frozen=True)
class Future:
    """Frames of a tick attend to each other.

    Attributes:
        levels: where, of LEVELS.
    """

    levels: str = LEVELS[0]


@dataclass(frozen=True)
class Memory:
    """Frames attend to keyframes before them, and take on features of theirs.

    Attributes:
        frames: keyframes of a queue.
        interval: every how many frames one is remembered.
        bank: a kind of engine.coherence.bank.BANKS.
        fuse: how much of a remembered feature is taken, 0 to 1; 0 fuses nothing.
        threshold: cosine above which it is, 0 to 1.
        levels: where frames attend to what is remembered, of LEVELS.
    """

    frames: int = 1
    interval: int = 4
    bank: str = "merged"
    fuse: float = 0.8
    threshold: float = 0.98
    levels: str = LEVELS[0]


class Row(NamedTuple):
    """A row of a network call.

    Attributes:
        side: 0 for the prompt; 1 and on for the others.
        slot: k.
        steps: n of its course.
        index: its place among the F of its slot.
        frame: its number in the stream.
        level: sigma of the slot.
    """

    side: int
    slot: int
    steps: int
    index: int
    frame: int
    level: float


class Neighbours:
    """The rows of one stream's ticks, and its bank. One stream, one thread.

    A tick begins with `begin`; each call of the network is told with `tell`, or its rows are worked
    out from those of `among` (`call`); `finish` puts what its keyframes had into the bank. Without
    `finish` nothing has happened.

    Args:
        network: gives the network whose calls are told, for as long as it lives.

    Attributes:
        shape: height and width of a latent.
        future, memory: the settings, or None.
        bank: None without memory.
        reusing: what is kept of inner blocks; None where every row runs whole.
        skips: what rows pass by at which noise level, or None.
        patching: what is kept where only changed tiles are computed, or None.
        why: the rows of a call of this tick could not be told; empty where they could.
    """

    def __init__(self, device: torch.device, network: Callable[[], Any]):
        self.device, self.network = device, network
        self.shape: tuple[int, ...] = ()
        self.future: Future | None = None
        self.memory: Memory | None = None
        self.bank: Banks | None = None
        self.reusing: Reusing | None = None
        self.skips: Choice | None = None
        self.patching: Patching | None = None
        self._splits = Splits(device)
        self.dial: tuple[Tensor | None, Tensor | None] = (None, None)
        self.why = ""
        self._key: tuple | None = None
        self._n, self._f, self._origin = 1, 1, 0
        self._dialled: tuple[float, float] | None = None
        self._layouts: OrderedDict[tuple, list[Group] | None] = OrderedDict()
        self._index: dict[tuple[str, int], Tensor] = {}  # at fixed addresses, by use and length
        self._staged: dict[int, dict[str, Staged]] = {}  # the same, by width
        self._newest: dict[int, int] = {}  # frame that each place of the bank has had last
        self._told: Remembering | None = None
        self._among: tuple[list[Row], slice] | None = None
        self._spoken: collections.Counter[int] = collections.Counter()
        self._pending: list[Remembering] = []
        self._steady = False

    @property
    def size(self) -> int:
        """Bytes of what is remembered, and of where keyframes lie before they are."""
        staged = [t for own in self._staged.values() for one in own.values() for t in one.all()]
        return sum(t.nbytes for t in staged) + (0 if self.bank is None else self.bank.size)

    # -- settings ---------------------------------------------------------------------------------

    def settle(
        self, future: Future | None, memory: Memory | None, n: int, f: int, frame: int,
        shape: tuple[int, ...], key: tuple,
    ) -> None:  # fmt: skip
        """What holds from now on; the bank goes on where it can.

        Args:
            n: slots of the frames that enter.
            f: frames of a slot.
            frame: number of the next frame to enter.
            shape: of a latent, (C, H, W).
            key: whatever else a bank cannot survive a change of.
        """
        self.future, self.memory, self.shape = future, memory, shape[-2:]
        self._n, self._f = n, f
        if memory is None:
            self.bank, self._key = None, None
            self.dial, self._dialled = (None, None), None
            self._staged.clear()
            return
        # outputs are remembered where they are fused
        kind = memory.bank, memory.frames if memory.bank == "queue" else 1, memory.levels
        now = (n, f, shape, kind, memory.fuse > 0, key)
        if self._key != now:
            self._key, self._origin = now, frame
            self._newest.clear()
            self.bank = Banks(memory.frames, memory.bank)
            self._staged.clear()
        dial = memory.fuse, memory.threshold
        if dial != self._dialled:
            self._dialled = dial
            fresh = uploaded(torch.tensor(dial, dtype=torch.float32), self.device)
            if self.dial[0] is None:
                self.dial = tuple(fresh.unbind())
            else:
                for kept, value in zip(self.dial, fresh, strict=True):
                    kept.copy_(value)

    def settle_reuse(self, reuse: Reuse | None, depth: int, key: tuple) -> None:
        """What holds of inner blocks from now on; after `settle`.

        Args:
            depth: see engine.blocks.plan.Kept.
            key: whatever else what is kept cannot survive a change of.
        """
        if reuse is None:
            self.reusing = None
            return
        if self.reusing is None:
            self.reusing = Reusing(self.device)
        self.reusing.settle(reuse, depth, self._n, (self._n, self._f, self.shape, key))

    def settle_skips(
        self, skips: Choice | None, inner: Callable[[str, int, Any], bool]
    ) -> None:  # fmt: skip
        """What rows pass by from now on.

        Args:
            inner: whether a body is an inner one at a depth of the network.
        """
        self.skips, self.inner = skips, inner

    def settle_patchwork(self, patchwork: Patchwork | None, key: tuple, off: str) -> None:
        """What holds of changed tiles from now on.

        Args:
            key: whatever nothing that is kept survives a change of.
            off: see Patching.
        """
        if patchwork is None:
            self.patching = None
            return
        if self.patching is None:
            self.patching = Patching(self.device)
        self.patching.settle(patchwork, key, off)

    # -- a tick -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """A tick begins."""
        if self.reusing is not None:
            self.reusing.begin()
        self._told, self._among, self._pending = None, None, []
        self.why, self._steady = "", False

    def tell(self, rows: Sequence[Row]) -> tuple | None:
        """The rows of the one call that the tick makes.

        Returns:
            What a recording of the tick holds for: calls of equal keys read and write at the same
            addresses. None where none can be made, since not all is remembered yet.
        """
        call = self._prepared(rows, fixed=True)
        self._told, self._pending = call, [call]
        # which tiles have changed is not known before
        if not self._steady or self.patching is not None:
            return None
        kept = ()
        if self.reusing is not None:
            kept = self.reusing.key()
            if kept is None:
                return None
        if self.skips is not None:
            kept = kept, self._splits.key
        layout = self._layout(rows), call.inner and call.inner.alike
        if self.bank is None:
            return layout, self.future, kept
        at = [t.data_ptr() for layer in call.bank.layers.values() for t in layer.all()]
        at += [*call.addresses(), *[t.data_ptr() for t in self.dial]]
        return layout, self.future, kept, (self._key, tuple(at))

    def read_as_is(self) -> list[Group]:
        """What the call that was told reads and nobody ever writes. A recording of it has to keep
        this, since it holds for a layout and not for addresses."""
        calls = self._told, self._told.inner
        return [group for call in calls if call is not None for group in call.groups or ()]

    def replayed(self) -> None:
        """The call that was told has been made, without Python."""
        bank = self._told.bank
        self._told.wrote = dict.fromkeys(bank.layers if bank is not None else ())
        if self.reusing is not None:
            self.reusing.replayed()

    def untouched(self) -> contextlib.AbstractContextManager[None]:
        """Calls made while this lasts leave nothing behind."""
        return contextlib.nullcontext() if self.reusing is None else self.reusing.untouched()

    def among(self, rows: Sequence[Row], entered: slice, several: bool = False) -> None:
        """The rows whose calls come next, as the prompt's side has them; who they are in a call is
        to be seen by ComfyUI's labels.

        Args:
            entered: those that may come a second time, as the other side's.
            several: a side has several parts, which may be calls of their own.
        """
        self._told = None
        self._spoken.clear()
        self._among = None if several else (list(rows), entered)
        if several:
            self.why = "a prompt has several parts"

    def ours(self, rows: Sequence[Row]) -> None:
        """The rows of the next call."""
        self._told = self._prepared(rows, fixed=False)
        self._pending.append(self._told)

    def call(self, shape: Sequence[int], labels: Sequence[int] | None) -> Exchange | None:
        """The exchange of a call that is under way, or None where its rows cannot be told.

        Args:
            shape: of the call's latents, [R, C, H, W].
            labels: ComfyUI's cond_or_uncond.
        """
        out = self._exchange_of(shape, labels)
        if out is None and self.reusing is not None:
            self.reusing.as_ever(shape[0])
        return out

    def _exchange_of(
        self, shape: Sequence[int], labels: Sequence[int] | None
    ) -> Remembering | None:  # fmt: skip
        rows = shape[0]
        if tuple(shape[-2:]) != tuple(self.shape):
            self.why = "a call is about a part of the picture"
            return None
        if self._told is not None:
            if self._told.rows == rows:
                return self._told
            self.why = f"a call has {rows} rows where {self._told.rows} are known"
            return None
        found = self._labelled(rows, labels or [])
        if found is None:
            return None
        sides = {row.side for row in found}
        # a side may be asked twice (perturbed attention): the first time counts
        ask = max(self._spoken[side] for side in sides)
        out = self._prepared(found, fixed=False, ask=ask)
        self._spoken.update(sides)
        self._pending.append(out)
        return out

    def finish(self) -> None:
        """The tick is done.

        Raises:
            Whatever keeps it from being remembered, as too little memory for a keyframe; the bank
            is empty then, and nothing of inner blocks is kept.
        """
        pending, self._pending, self._told, self._among = self._pending, [], None, None
        try:
            for call in pending:
                if call.places:
                    self.bank.put([*call.places], call.staged())
                    self._newest.update(call.places)
            if self.reusing is not None:
                self.reusing.finish()
        except BaseException:
            # half of it may be there
            self._newest.clear()
            if self.bank is not None:
                self.bank.clear()
            if self.reusing is not None:
                self.reusing.forget()
            raise

    # -- rows -------------------------------------------------------------------------------------

    def _labelled(self, rows: int, labels: Sequence[int]) -> list[Row] | None:
        """The rows of a call by its labels; None, and why, where they do not tell."""
        if self._among is None:
            return None
        known, entered = self._among
        again = known[entered]
        if len(set(labels)) == len(labels) and labels:
            if rows == len(labels) * len(known):
                return [row._replace(side=side) for side in labels for row in known]
            if rows == len(labels) * len(again) and 0 not in labels:
                return [row._replace(side=side) for side in labels for row in again]
            if list(labels) == [0] and rows == len(known) + len(again):
                return [*known, *[row._replace(side=1) for row in again]]
        self.why = f"a call has {rows} rows where {len(known)} are known"
        return None

    def _layout(self, rows: Sequence[Row]) -> tuple:
        return tuple((row.side, row.index) for row in rows)

    def _alike(self, rows: Sequence[Row]) -> tuple[int, ...]:
        """For each row, the first that it sees: calls of equal ones have equal groups."""
        layout = self._layout(rows) if self.future is not None else ()
        return tuple(layout.index(one) for one in layout)

    def _groups(self, rows: Sequence[Row]) -> list[Group] | None:
        if self.future is None:
            return None
        layout = self._layout(rows)
        if layout not in self._layouts:
            alone = len(set(layout)) == len(layout)
            self._layouts[layout] = None if alone else grouped(layout, self.device)
            while len(self._layouts) > _LAYOUTS:
                self._layouts.popitem(last=False)
        self._layouts.move_to_end(layout)
        return self._layouts[layout]

    def _prepared(self, rows: Sequence[Row], fixed: bool, ask: int = 0) -> Remembering:
        """An exchange for these rows.

        Args:
            fixed: what it reads and writes lies where it lay last time.
            ask: how often one of their sides was asked before.
        """
        plan, whole = None, None
        if self.reusing is not None:
            spots = [
                Spot(ask, row.side, row.slot, row.index) if row.steps == self._n else None
                for row in rows
            ]
            plan = self.reusing.planned(spots, fixed)
            whole = plan.kept.rows
        call = self._remembering(rows, whole, fixed, writes=not ask)
        call.plan = plan if self.skips is None else self._skipping(rows, plan)
        call.spots = [(ask, row.side, row.slot, row.steps, row.index) for row in rows]
        return call

    def _skipping(self, rows: Sequence[Row], plan: BlockPlan | None) -> BlockPlan:
        """A call's plan with the bodies that its rows pass by."""
        kept = None if plan is None else plan.kept
        skipped = [self.skips.at(row.level) for row in rows]
        if kept is None:
            return BlockPlan(None, self._splits.of(skipped))
        network, depth = self.network(), kept.depth
        splits = self._splits.of(skipped, kept.rows, lambda name: self.inner(name, depth, network))
        return BlockPlan(kept, splits)

    def _remembering(
        self, rows: Sequence[Row], whole: list[int] | None, fixed: bool, writes: bool
    ) -> Remembering:
        """Args:
            whole: the rows that run the inner blocks; None for all.
        """
        self._steady = True
        writers = self._writers(rows, whole) if writes and self.memory is not None else {}
        width = len(writers)
        if fixed and self.memory is not None:
            most = self._width(rows, whole)
            self._steady, width = width <= most, max(width, most)
        call = self._exchange(rows, writers, width, fixed)
        if fixed and self.memory is not None:
            call.stage(self._staged.setdefault(width, {}))
        if whole is not None and 0 < len(whole) < len(rows):
            at = {r: i for i, r in enumerate(whole)}
            inner = {place: at[r] for place, r in writers.items()}
            narrow = [rows[r] for r in whole]
            call.narrow(self._exchange(narrow, inner, width, fixed, "inner"))
            call.inner.alike = self._alike(narrow)
        return call

    def _exchange(
        self, rows: Sequence[Row], writers: dict[int, int], width: int, fixed: bool, use: str = ""
    ) -> Remembering:
        """Of some rows of a call.

        Args:
            writers: of the places that are written, the row.
            width: how many rows may write, where they are told at a fixed address.
            use: tells what lies at fixed addresses from that of others.
        """
        groups, memory = self._groups(rows), self.memory
        if memory is None:
            return Remembering(None, (), len(rows), groups)
        own = [row.slot + self._n * row.side if row.steps == self._n else -1 for row in rows]
        bank = self.bank.of(own)
        self._steady &= -1 not in own and bank.full(own)
        index = known = writing = None
        had = [bank.count(p) for p in own]
        most = max(had)
        if most:
            reads = [p if n else 0 for p, n in zip(own, had, strict=True)]
            index = self._placed(f"read {use}", reads)
            if min(had) < most:
                known = [[i < count for i in range(most)] for count in had]
                known = uploaded(torch.tensor(known), self.device)
        if writers or fixed:
            at = [*writers.values()]
            writing = self._placed(f"write {use}", at + [0] * (width - len(at)))
        dial = self.dial if memory.fuse > 0 else ()
        places = {place: rows[r].frame for place, r in writers.items()}
        return Remembering(bank, dial, len(rows), groups, index, known, most, places, writing)

    def _writers(self, rows: Sequence[Row], whole: list[int] | None) -> dict[int, int]:
        """The last keyframe of each place's frames.

        Of rows that run whole alone, it is the first of them after a frame that was to be one: all
        that is remembered of a frame is to be its own.
        """
        found: dict[int, int] = {}

        def turn(frame: int) -> int:
            return (frame - self._origin) // self.memory.interval

        for r in range(len(rows)) if whole is None else whole:
            row = rows[r]
            place = row.slot + self._n * row.side
            before = rows[found[place]].frame if place in found else self._newest.get(place)
            keyframe = (row.frame - self._origin) % self.memory.interval == 0
            if whole is not None:
                keyframe = before is None or turn(row.frame) > turn(before)
            if keyframe and row.steps == self._n:
                found[place] = r
        return found

    def _width(self, rows: Sequence[Row], whole: list[int] | None) -> int:
        """The most rows of such a call that may write, where frames follow each other."""
        if whole is not None:
            return len({rows[r][:2] for r in whole})
        most = -(-self._n * self._f // self.memory.interval)
        slots = {(row.side, row.slot) for row in rows}
        of_side = collections.Counter(side for side, _ in slots)
        return sum(min(most, count) for count in of_side.values())

    def _placed(self, use: str, values: list[int]) -> Tensor:
        """Numbers on the device, always at the same address."""
        fresh = uploaded(torch.tensor(values, dtype=torch.int64), self.device)
        known = self._index.setdefault((use, len(values)), fresh)
        if known is not fresh:
            known.copy_(fresh)
        return known
