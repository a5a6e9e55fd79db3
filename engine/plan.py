"""The rows of a tick: which frames they are, and the step that each takes."""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .noise import Noise
from .space import Mix
from .step_rules import Course, Weights
from .sums import Sum
from .upload import uploaded


@dataclass
class Place:
    """The frames that entered together and step together: at most F rows.

    Attributes:
        k: the slot it is in.
        referenced: it has a reference of its own, other than its source.
    """

    course: Course
    noise: Noise | None
    payloads: list[Any]
    age: int
    k: int = 0
    referenced: bool = False

    @property
    def count(self) -> int:
        return len(self.payloads)

    @property
    def sigma(self) -> float:
        return self.course.levels[self.k]

    @property
    def lasting(self) -> Noise | None:
        """The noise that other frames bring, too."""
        return None if self.noise is None or not self.noise.fixed else self.noise

    @property
    def finishes(self) -> bool:
        """Whether the next step is its last."""
        return self.k + 1 == self.course.n


@dataclass(eq=False)
class Plan:
    """Everything about a layout of rows that does not change from tick to tick."""

    places: list[int]
    spans: list[slice]  # the rows of each place
    rows: slice | Tensor  # in the ring's buffers
    entering: slice | Tensor | None  # those of the place in slot 0
    entered: slice | Tensor  # the same rows in the order of the call
    steps: list[tuple[float, Weights]]  # noise level and step of each row
    mix: Mix | None  # how the entering rows take in noise
    history: int  # tensors remembered with a frame
    planes: Tensor | None  # noise of the step, weighted, [3, R, C, H, W]; all but the last are 0
    renewed: list[tuple[int, slice, float]]  # places whose noise is another each time, its weight
    dims: int  # of a latent
    device: torch.device
    holds: list[Any] = field(default_factory=list)  # what the plan's key names by id
    fold: Any = None  # of the guider's latest settings (engine.fold.Fold)
    views: Any = None  # of the ring's buffers (engine.buffers.Views)

    @property
    def noise(self) -> Tensor | None:
        """Of the step, weighted, [R, C, H, W]."""
        return None if self.planes is None else self.planes[-1]

    def renew(self, places: list[Place]) -> None:
        """Take in the noise of frames that have their own.

        Args:
            places: the plan's, in order.
        """
        for i, span, weight in self.renewed:
            place = places[i]
            torch.mul(place.noise.slot(place.k + 1), weight, out=self.planes[-1][span])

    @cached_property
    def sigma(self) -> Tensor:
        """[R]."""
        return self._column([sigma for sigma, _ in self.steps]).flatten()

    @cached_property
    def after(self) -> dict[str, Tensor | None]:
        """Weights of the step (Weights.after) for all rows, for engine.sums.weighted.

        Columns [R, 1, 1, 1]; None where all are 1, and for the noise, which is weighted already. A
        term that has no weight in any row is left out.
        """
        columns = self._columns([step.after for _, step in self.steps])
        return {name: None if name == "noise" else column for name, column in columns.items()}

    @cached_property
    def kept(self) -> dict[str, Tensor | None]:
        """The same for what is remembered (Weights.kept)."""
        return self._columns([step.kept for _, step in self.steps])

    @cached_property
    def mix_weights(self) -> Tensor:
        """What an entering source weighs in x, and in the source kept, [2, 1, 1, 1, 1]."""
        return self._column([self.mix.source, 1.0])[:, None]

    @cached_property
    def index(self) -> Tensor:
        """`entering` as a tensor."""
        return torch.arange(self.entering.start, self.entering.stop, device=self.device)

    def at(self, entering: Tensor) -> "Plan":
        """The same layout with its entering rows told by a tensor; every place is full."""
        return dataclasses.replace(self, entering=entering, entered=entering, views=None)

    def _columns(self, sums: list[Sum]) -> dict[str, Tensor | None]:
        columns: dict[str, Tensor | None] = {}
        # in one order whatever the layout: a frame's rounding does not depend on its neighbours
        for name in dict.fromkeys(name for each in sums for name in each):
            weights = [each.get(name, 0.0) for each in sums]
            if any(weights):
                columns[name] = self._column(weights) if set(weights) != {1.0} else None
        return columns

    def _column(self, numbers: list[float]) -> Tensor:
        column = uploaded(torch.tensor(numbers, dtype=torch.float32), self.device)
        return column.view(-1, *[1] * self.dims)


def plan(
    places: list[Place | None], at: list[int], entered: int | None, f: int, history: int,
    shape: tuple[int, ...], device: torch.device,
) -> Plan:  # fmt: skip
    """The plan of a tick.

    Args:
        places: the ring's.
        at: which of them are occupied, in order.
        entered: which of them the new frames took.
        f: rows of a place.
    """
    taken = [places[i] for i in at]
    index = [i * f + j for i, p in zip(at, taken, strict=True) for j in range(p.count)]
    ends = [sum(p.count for p in taken[: i + 1]) for i in range(len(taken))]
    spans = [slice(e - p.count, e) for e, p in zip(ends, taken, strict=True)]
    per_row = [(p, p.course.steps[p.k]) for p in taken for _ in range(p.count)]
    entering, span, mix = None, slice(0, 0), None
    if entered is not None:
        place = places[entered]
        span, mix = spans[at.index(entered)], place.course.entry
        entering = slice(entered * f, entered * f + place.count)
    planes, renewed = None, []
    if any(w.noise for _, w in per_row):
        planes = torch.zeros(3, len(index), *shape, device=device)
        for i, (p, rows) in enumerate(zip(taken, spans, strict=True)):
            weight = p.course.steps[p.k].noise
            if weight and p.noise.fixed:
                planes[-1][rows] = p.noise.slot(p.k + 1) * weight
            elif weight:
                renewed.append((i, rows, weight))
    contiguous = index == list(range(index[0], index[0] + len(index)))
    rows = slice(index[0], index[-1] + 1)
    return Plan(
        places=at,
        spans=spans,
        rows=rows if contiguous else uploaded(torch.tensor(index), device),
        entering=entering,
        entered=span,
        steps=[(p.sigma, w) for p, w in per_row],
        mix=mix,
        history=history,
        planes=planes,
        renewed=renewed,
        dims=len(shape),
        device=device,
        holds=[(p.course, p.lasting) for p in taken],
    )
