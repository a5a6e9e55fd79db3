"""Predictions of the frame before, carried along the motion into those of the next frame.

At slot k a frame meets the noise level that the frame before met there, so their predictions differ
by what moved and by what flickers. As in motion-compensated temporal filters (Dubois and Sabri,
IEEE Trans. Commun. 1984) what was predicted for the frame before is moved to where it is now, and
taken in part instead of what is predicted now:

    d' = d + w (moved(d'_before) - d),    w = amount * confidence * exp(-(unlike / tolerance)^2)

`confidence` is the motion's (engine.flow), `unlike` how far the two are apart around a pixel. That
is done at the last two steps. At the first of them the model then draws the carried picture anew,
so it does not get softer; at the last less is carried where things move.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import flow
from ..devices import sampled
from ..flow import Motion
from ..plan import Place, Plan
from ..upload import uploaded

STEPS = 2  # the last ones, at which is carried; what is predicted before is noised again for them
_AROUND = 3  # latent positions on each side of what is compared, where they are single pixels
_STILL = (0.25, 1.0)  # pixels a frame: up to there it stands still, from there on it moves


@dataclass(frozen=True)
class Carry:
    """How much is carried, each 0 to 1.

    Attributes:
        early: at the step before the last.
        moving, still: at the last step, where things move and where they stand still.
        tolerance: how unlike the two predictions may be, in standard deviations of a prediction;
            there a third of it is carried.
    """

    early: float = 0.85
    moving: float = 0.3
    still: float = 0.7
    tolerance: float = 0.32

    @classmethod
    def of(cls, amount: float) -> "Carry | None":
        """By one number, 0 to 1: of the early steps, and the last one's in proportion. What moves
        is the first to be left alone. None for 0."""
        if amount <= 0:
            return None
        known = cls()
        share = amount / known.early
        return cls(amount, known.moving * share**2, known.still * share)


@dataclass
class _Slot:
    """Whose prediction a slot remembers: a frame's number, -1 for none, and n of its course."""

    number: int = -1
    steps: int = 0


@dataclass
class _Guest:
    """The frames of a place: their number, F to a place, and whether anything is known of where
    they come from."""

    number: int
    known: bool


class Carried:
    """What the slots of one ring remember. One stream, one thread.

    All that a tick reads and writes lies at fixed addresses, so that it can be recorded.

    Args:
        carry: the settings.
        n: places of the ring.
        f: rows of a place.
        shape: of a latent, (C, H, W).
        patch: pixels on each side of a latent's position, where its channels are the pixels of
            each colour (torch's pixel_unshuffle); 1 where they are none.

    Attributes:
        size: bytes.
    """

    def __init__(
        self, carry: Carry, n: int, f: int, shape: tuple[int, ...], device: torch.device,
        patch: int = 1,
    ):  # fmt: skip
        channels, h, w = shape
        self.made_of = carry, n, f, tuple(shape), device, patch
        self.carry, self._n, self._f, self._patch = carry, n, f, patch
        pixels = h * patch, w * patch
        self._bank = torch.zeros((n, channels // patch**2, *pixels), device=device)
        rows = n * f
        # of each row: where it reads, and how much it takes, early and at last
        self._grid = torch.zeros((rows, *pixels, 2), device=device)
        self._share = torch.zeros((rows, 2, h, w), device=device)
        # of the rows of a tick, slot by slot: which they are, and what counts of both shares
        self._order = torch.zeros(rows, dtype=torch.int64, device=device)
        self._dial = torch.zeros((2, rows), device=device)
        self._slot = torch.zeros(n, dtype=torch.int64, device=device)  # of its places
        self._slots = [_Slot() for _ in range(n)]
        self._guests: dict[int, _Guest] = {}
        self._newest = 0  # number of the frames that entered last
        self._entered: int | None = None
        self._set: tuple | None = None  # what the knobs are set to
        self._counts: list[int] = []  # of the tick's places, slot by slot
        self._under_way = self._touched = False
        self.size = sum(t.numel() * t.element_size() for t in self._own())

    def _own(self) -> list[Tensor]:
        return [self._bank, self._grid, self._share, self._order, self._dial, self._slot]

    @property
    def key(self) -> tuple:
        """What a recording of the tick holds for."""
        return self.made_of, tuple(self._counts), *[t.data_ptr() for t in self._own()]

    def begin(
        self, plan: Plan, places: Sequence[Place], entered: int | None, motion: Motion | None
    ) -> None:
        """Before a tick: what its rows read, and how much of it.

        Args:
            places: in the plan's order.
            entered: the ring's place that frames enter, or None.
            motion: of the frames that enter, each from the one before it, on a grid of any size;
                None where nothing is to be carried to them.
        """
        if self._under_way and self._touched:
            # the tick before broke off behind what is remembered
            self._slots = [_Slot() for _ in self._slots]
        self._under_way, self._touched, self._entered = True, False, entered
        if entered is not None:
            self._guests[entered] = _Guest(self._newest + 1, motion is not None)
            if motion is not None:
                self._enter(entered * self._f, motion)
        order, dial = [], ([], [])
        late = [i for i, place in enumerate(places) if _late(place)]
        by_slot = sorted(late, key=lambda i: places[i].k)
        for i in by_slot:
            place, guest = places[i], self._guests.get(plan.places[i])
            last = place.k + 1 == place.course.n
            for j in range(place.count):
                carried = guest is not None and guest.known
                if j == 0 and carried:
                    kept = self._slots[place.k]
                    carried = (kept.number, kept.steps) == (guest.number - 1, place.course.n)
                order.append(plan.spans[i].start + j)
                dial[0].append(float(carried and not last))
                dial[1].append(float(carried and last))
        self._counts = [places[i].count for i in by_slot]
        now = tuple(order), tuple(dial[0]), tuple(dial[1]), tuple(places[i].k for i in by_slot)
        if now != self._set and order:
            self._set = now
            device = self._slot.device
            self._order[: len(order)] = uploaded(torch.tensor(order), device)
            self._dial[:, : len(order)] = uploaded(torch.tensor(dial), device)
            self._slot[: len(by_slot)] = uploaded(torch.tensor(now[-1]), device)

    def _enter(self, row: int, motion: Motion) -> None:
        patch, carry = self._patch, self.carry
        rows = slice(row, row + len(motion.flow))
        h, w = self._share.shape[-2:]
        self._grid[rows] = flow.grid(flow.resized(motion, h * patch, w * patch).flow)
        flow_, confidence = flow.resized(motion, h, w)
        speed = flow_.square().sum(1, keepdim=True).sqrt() * patch
        slow, fast = _STILL
        stands = ((fast - speed) / (fast - slow)).clamp(0, 1)
        at_last = carry.moving + (carry.still - carry.moving) * stands
        self._share[rows] = torch.cat([confidence * carry.early, confidence * at_last], 1)

    def __call__(self, plan: Plan, denoised: Tensor) -> Tensor:
        """The predictions of a tick with what is carried to them, [R, C, H, W]; remembers them.

        Non-finite ones stay as they are, and are not remembered; none becomes so here.
        """
        if not self._counts:
            return denoised
        self._touched = True
        patch, counts, total = self._patch, self._counts, sum(self._counts)
        order, slots = self._order[:total], self._slot[: len(counts)]
        d = denoised.index_select(0, order)
        d = F.pixel_shuffle(d, patch) if patch > 1 else d
        grid, share = (own[plan.rows].index_select(0, order) for own in (self._grid, self._share))
        early, late = self._dial[:, :total].view(2, -1, 1, 1, 1)
        share = share[:, :1] * early + share[:, 1:] * late
        some = d[..., ::patch, ::patch].flatten(1)
        spread = some.var(1).sqrt().view(-1, 1, 1, 1) * self.carry.tolerance + 1e-12
        before = self._bank.index_select(0, slots)
        if max(counts) == 1:
            d, before = self._carried(d, before, grid, share, spread)
        else:
            for j in range(max(counts)):
                # the frames of a slot follow each other
                here = [i for i, count in enumerate(counts) if count > j]
                at = _picked([sum(counts[:i]) + j for i in here], d.device)
                mine = _picked(here, d.device)
                part = d[at], before[mine], grid[at], share[at], spread[at]
                d[at], before[mine] = self._carried(*part)
        self._bank.index_copy_(0, slots, before)
        d = F.pixel_unshuffle(d, patch) if patch > 1 else d
        return denoised.index_copy(0, order, d)

    def _carried(
        self, d: Tensor, before: Tensor, grid: Tensor, share: Tensor, spread: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predictions with what is carried to them, and what is remembered of that."""
        # read between pixels by a bilinear mean, frame after frame gets softer
        moved = sampled(before, grid, "bicubic")
        off = moved - d
        weight = share * torch.exp(-(self._unlike(off) / spread).square_())
        if self._patch > 1:
            weight = F.interpolate(weight, scale_factor=self._patch, mode="bilinear")
        new = torch.addcmul(d, off, weight)
        # behind this nothing looks any more: what spoils a prediction is not carried to it
        new = torch.where(new.isfinite(), new, d)
        return new, torch.where(new.isfinite(), new, moved)

    def _unlike(self, off: Tensor) -> Tensor:
        """How far two predictions are apart, [R, 1, H, W] of latents."""
        off = off.abs()
        if self._patch > 1:
            return F.avg_pool2d(off, self._patch).mean(1, keepdim=True)
        off = off.mean(1, keepdim=True)
        return F.avg_pool2d(off, _AROUND, 1, _AROUND // 2, count_include_pad=False)

    def done(self, plan: Plan, places: Sequence[Place]) -> None:
        """The tick is done; without this nothing that was remembered will be carried."""
        self._under_way = False
        if self._entered is not None:
            self._newest += 1
        for at, place in zip(plan.places, places, strict=True):
            if not _late(place):
                continue
            guest = self._guests.get(at)
            number = -1 if guest is None else guest.number
            self._slots[place.k] = _Slot(number, place.course.n)


def _late(place: Place) -> bool:
    return place.k >= place.course.n - STEPS


def _picked(values: list[int], device: torch.device) -> slice | Tensor:
    """As a slice where they are evenly spaced, as they are in a tick that is recorded."""
    step = values[1] - values[0] if len(values) > 1 else 1
    if list(range(values[0], values[-1] + 1, step)) == values:
        return slice(values[0], values[-1] + 1, step)
    return uploaded(torch.tensor(values), device)
