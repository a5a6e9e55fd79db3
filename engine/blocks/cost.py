"""What a call costs, in floating point operations, by a plan of blocks per row."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from .plan import BlockPlan


@dataclass(frozen=True)
class Cost:
    """FLOPs of one row of a network: a multiplication and an addition are two.

    Those of matrix products and convolutions, which are what torch.utils.flop_counter counts.

    Attributes:
        whole: of all the network.
        parts: of the parts of its blocks, by name (host.models.walk), the bodies among them.
        bodies: what a row saves that passes one by, by name, in the order of a call.
    """

    whole: int
    parts: Mapping[str, int]
    bodies: Mapping[str, int]

    def of(self, plan: BlockPlan, rows: int, inner: Callable[[str], bool]) -> int:
        """Of a call of this many rows.

        Args:
            inner: whether a part is one of the inner blocks' (host.models.walk.is_inner); asked
                only where the plan has such.
        """
        total, kept = self.whole * rows, plan.kept
        if kept is not None:
            away = rows - kept.whole.shape[0]
            total -= away * sum(flops for name, flops in self.parts.items() if inner(name))
        return total - sum(
            self.bodies[name] * split.rest.shape[0] for name, split in plan.splits.items()
        )

    def share(self, skips: Collection[Collection[str]]) -> float:
        """What runs of a few calls, each without these bodies, in parts of all of it."""
        saved = sum(self.bodies[name] for skipped in skips for name in skipped)
        return 1 - saved / (self.whole * max(len(skips), 1))
