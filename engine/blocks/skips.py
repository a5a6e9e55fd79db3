"""Bodies of blocks that rows pass by, by the noise level they are at.

After AutoDiffusion (Li et al., ICCV 2023, arXiv 2309.10438); what is left out at which level is
searched by schedules.architecture.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..upload import uploaded
from .plan import Split

_LAYOUTS = 64  # whose indices are kept


class Choice(Protocol):
    """What is left out where."""

    def at(self, level: float) -> frozenset[str]:
        """Names of the bodies that a row passes by at a noise level (host.models.walk.bodies)."""


@dataclass(frozen=True)
class Rule:
    """A choice for a few noise levels, each of which speaks for those that are nearest to it.

    Near is by ratio; from the middle between two levels the noisier one speaks. So whoever calls
    the network at just these levels gets just these choices, and any other sampler something in
    between.

    Args:
        levels: falling, above 0.
        skips: for each, names of bodies.
    """

    levels: tuple[float, ...]
    skips: tuple[frozenset[str], ...]
    _bounds: tuple[float, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not self.levels or len(self.levels) != len(self.skips):
            raise ValueError(f"{len(self.skips)} choices of bodies for {len(self.levels)} levels")
        pairs = list(pairwise(self.levels))
        if self.levels[-1] <= 0 or any(a <= b for a, b in pairs):
            raise ValueError("levels of choices are to fall, and to be above 0")
        object.__setattr__(self, "_bounds", tuple(math.sqrt(a * b) for a, b in pairs))

    def at(self, level: float) -> frozenset[str]:
        return self.skips[sum(level < bound for bound in self._bounds)]


class Splits:
    """The splits of a stream's calls by a choice, at fixed addresses.

    Attributes:
        key: of the newest call's: where they lie, and how many rows each has.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.key: tuple = ()
        self._kept: dict[tuple, tuple[Tensor, list[int], dict[str, Split]]] = {}

    def of(
        self, skipped: Sequence[frozenset[str]], whole: Sequence[int] | None = None,
        inner: Callable[[str], bool] = lambda name: False,
    ) -> dict[str, Split]:  # fmt: skip
        """BlockPlan.splits of a call.

        Args:
            skipped: for each of its R rows, the bodies that it passes by.
            whole: the rows that run the inner blocks; None for all.
            inner: whether a body is in one of these.
        """
        values: list[int] = []
        form: list[tuple[str, int, int]] = []
        for name in sorted(frozenset().union(*skipped)):
            narrow = whole is not None and inner(name)
            rows = [name in skipped[r] for r in (whole if narrow else range(len(skipped)))]
            rest = [i for i, past in enumerate(rows) if past]
            if rest:
                run = [i for i, past in enumerate(rows) if not past]
                at = {row: i for i, row in enumerate([*run, *rest])}
                values += [*run, *rest, *(at[i] for i in range(len(rows)))]
                form.append((name, len(run), len(rest)))
        layout = tuple(form)
        if not layout:
            self.key = ()
            return {}
        known = self._kept.get(layout)
        if known is None:
            while len(self._kept) >= _LAYOUTS:
                self._kept.pop(next(iter(self._kept)))
            packed = uploaded(torch.tensor(values, dtype=torch.int64), self.device)
            known = self._kept[layout] = packed, values, _parted(packed, layout)
        elif known[1] != values:
            known[0].copy_(uploaded(torch.tensor(values, dtype=torch.int64), self.device))
            known = self._kept[layout] = known[0], values, known[2]
        self.key = layout, known[0].data_ptr()
        return known[2]


def _parted(packed: Tensor, layout: Sequence[tuple[str, int, int]]) -> dict[str, Split]:
    sizes = [size for _, run, rest in layout for size in (run, rest, run + rest)]
    parts = iter(packed.split(sizes))
    return {name: Split(next(parts), next(parts), next(parts)) for name, _, _ in layout}
