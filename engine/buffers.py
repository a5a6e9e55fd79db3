"""The tensors of a stream batch, and what is done to some rows of them.

All lie at fixed addresses from one change of size or steps to the next, so that a recorded tick can
read and write them. `rows` is a slice, or a tensor of indices, of the n * F rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.choice import place_unfit
from .plan import Place, Plan
from .space import Mix
from .sums import weighted

_COUNTED = 256  # ticks after which bad rows are counted, if nobody asks before
Indices = slice | Tensor


class Views(NamedTuple):
    """Where a plan's rows lie in the buffers; None where only a copy has them side by side."""

    x: Tensor | None  # [R, C, H, W]
    source: Tensor | None
    entering: Tensor | None  # x and source of the rows that enter, [2, b, C, H, W]
    sources: Tensor | None  # the source alone


class Buffers:
    """The buffers of a ring.

    Args:
        n: places.
        f: rows of a place.
        shape: of a latent, (C, H, W).
        history: tensors remembered with a frame.
        before: buffers of the same f and shape whose places go on, and where these lie there; they
            take the first places.
        dropped: rows with a non-finite value that were counted before.

    Attributes:
        state: x and source of every row, [2, n * F, C, H, W]; `x` and `source` are views of it.
        past: what is remembered of every row, newest first.
        reference: what residual guidance points at, once it has been another than the source.
        unfused: why the kernels do not run on these tensors; empty where they do.
    """

    def __init__(
        self, n: int, f: int, shape: tuple[int, ...], device: torch.device, history: int,
        before: "tuple[Buffers, list[int]] | None" = None, dropped: Tensor | int = 0,
    ):  # fmt: skip
        self.f, self.shape, self.device = f, shape, device
        old, at = before or (None, [])

        def moved(buffer: Tensor | None) -> Tensor:
            fresh = torch.zeros((n, f, *shape), device=device)
            for new, place in enumerate(at if buffer is not None else []):
                fresh[new] = buffer.unflatten(0, (-1, f))[place]
            return fresh.flatten(0, 1)

        # x and source side by side: a frame is written into both at once
        self.state = torch.stack([moved(old and old.x), moved(old and old.source)])
        self.x, self.source = self.state
        past = old.past if old else []
        self.past = [moved(past[i] if i < len(past) else None) for i in range(history)]
        kept = None if old is None else old.reference
        self.reference: Tensor | None = None if kept is None else moved(kept)
        self._last = torch.zeros(shape, device=device) if old is None else old._last
        self.bad_rows = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_rows += dropped.to(device) if isinstance(dropped, Tensor) else dropped
        self.bad = torch.zeros(n * f, dtype=torch.int32, device=device)  # since the last tick
        self.unfused = place_unfit(self.state)
        self._sums = torch.zeros(_COUNTED, n * f, device=device)
        self._sum_of = self._sums.unbind()
        self._sum_now = torch.zeros(n * f, device=device)
        self._summed = 0
        self._entry: tuple | None = None

    def all(self) -> list[Tensor]:
        """Every tensor that a recorded tick reads and writes."""
        own = [self.state, self.bad_rows, self.bad, self._sum_now, *self.past]
        return own if self.reference is None else [*own, self.reference]

    @property
    def dropped(self) -> Tensor:
        """Rows with a non-finite value so far, int64 on the device."""
        return self.bad_rows + (~self._sums.isfinite()).sum() + (self.bad != 0).sum()

    def views(self, plan: Plan) -> Views:
        """Kept with the plan: making one takes as long as some operations."""
        if plan.views is None:
            x = source = target = sources = None
            if isinstance(plan.rows, slice):
                x, source = self.x[plan.rows], self.source[plan.rows]
            if isinstance(plan.entering, slice):
                target = self.state[:, plan.entering]
                sources = target[1]
            plan.views = Views(x, source, target, sources)
        return plan.views

    def take(self, buffer: Tensor, rows: Indices) -> Tensor:
        """Rows of a tensor: a view, or a copy for a tensor of indices."""
        return buffer[rows] if isinstance(rows, slice) else buffer.index_select(0, rows)

    def put(self, buffer: Tensor, rows: Indices, values: Tensor) -> None:
        if isinstance(rows, slice):
            buffer[rows].copy_(values)
        else:
            buffer.index_copy_(0, rows, values)

    def references(self, places: list[Place], plan: Plan) -> Tensor:
        """The references of all rows of the ring; a frame that has none points at its source."""
        if self.reference is None:
            self.reference = torch.zeros_like(self.x)
        for at, place in zip(plan.places, places, strict=True):
            if not place.referenced:
                rows = slice(at * self.f, at * self.f + place.count)
                self.reference[rows].copy_(self.source[rows])
                place.referenced = True
        return self.reference

    def push(self, rows: Indices, kept: Tensor) -> None:
        """Remember a tensor of each row; what is remembered already grows older."""
        for newer, older in zip(self.past[-2::-1], self.past[:0:-1], strict=True):
            older.copy_(newer)
        self.put(self.past[0], rows, kept)

    # -- linear ticks: in few operations, a bad value becomes 0 -----------------------------------

    def entry(self, noise: Tensor, mix: Mix) -> Tensor | None:
        """What `admit` adds for the noise of entering frames, [2, b or 1, C, H, W]."""
        if not mix.noise:
            return None
        known = self._entry
        if known is None or known[0] is not noise or known[1] != mix.noise:
            wide = noise.reshape(-1, *self.shape)
            weighted = torch.stack([wide * mix.noise, torch.zeros_like(wide)])
            self._entry = known = (noise, mix.noise, weighted)
        return known[2]

    def admit(self, plan: Plan, source: Tensor, entry: Tensor | None, mix: Tensor) -> None:
        """Frames enter at the noise level of slot 0.

        Args:
            source: [b, C, H, W].
            entry: see `entry`.
            mix: of the source in x, and 1, [2, 1, 1, 1, 1].
        """
        target = self.views(plan).entering
        if target is None:
            both = source[None] * mix
            self.state.index_copy_(1, plan.entering, both if entry is None else both.add_(entry))
        elif entry is None:
            torch.mul(source[None], mix, out=target)
        else:
            torch.addcmul(entry, source[None], mix, out=target)

    def count(self, rows: Tensor, recorded: bool) -> None:
        """Count the non-finite ones of [R, C, H, W], at once where a recording does not come back.

        A sum is not finite where one of its values is not.
        """
        r = rows.shape[0]
        if recorded:
            torch.sum(rows.flatten(1), 1, out=self._sum_now[:r])
            self.bad_rows += (~self._sum_now.isfinite()).sum()
            return
        here = self._sum_of[self._summed]
        torch.sum(rows.flatten(1), 1, out=here if r == here.shape[0] else here[:r])
        self._summed += 1
        if self._summed == _COUNTED:
            self.bad_rows += (~self._sums.isfinite()).sum()
            self._sums.zero_()
            self._summed = 0

    def heal(self, buffer: Tensor, plan: Plan) -> None:
        """Non-finite values of the rows that entered become 0."""
        rows, views = plan.entering, self.views(plan)
        if buffer is self.source and views.sources is not None:
            views.sources.nan_to_num_(0.0, 0.0, 0.0)
        elif isinstance(rows, slice):
            buffer[rows].nan_to_num_(0.0, 0.0, 0.0)
        else:
            self.put(buffer, rows, self.take(buffer, rows).nan_to_num_(0.0, 0.0, 0.0))

    # -- ticks of any guide: a bad row is replaced as a whole -------------------------------------

    def clean(self, source: Tensor) -> Tensor:
        """A frame with a non-finite value is replaced by the frame before it, on the device."""
        finite = source.flatten(1).sum(1).isfinite()
        clean = torch.where(self._wide(finite), source, self._last)
        self._last.copy_(clean[-1])
        self.bad_rows += source.shape[0] - finite.sum()
        return clean

    def finite(self, denoised: Tensor, source: Tensor) -> Tensor:
        """A non-finite prediction is replaced by the row's source and never reaches the state."""
        finite = denoised.flatten(1).sum(1).isfinite()
        self.bad_rows += denoised.shape[0] - finite.sum()
        return torch.where(self._wide(finite), denoised, source)

    def enter(self, plan: Plan, source: Tensor, noise: Tensor) -> None:
        """`admit`, for a plan's own weights and frames that may be bad."""
        self.admit(plan, self.clean(source), self.entry(noise, plan.mix), plan.mix_weights)

    def step(self, plan: Plan, x: Tensor, denoised: Tensor) -> Tensor:
        """Every row takes its step; returns the new x, which is here too."""
        terms = {"x": x, "denoised": denoised, "noise": plan.noise}
        terms |= {f"past{i}": self.take(past, plan.rows) for i, past in enumerate(self.past)}
        after = weighted(plan.after, terms)
        if self.past:
            self.push(plan.rows, weighted(plan.kept, terms))
        self.put(self.x, plan.rows, after)
        return after

    def _wide(self, per_row: Tensor) -> Tensor:
        return per_row.view(-1, *[1] * len(self.shape))
