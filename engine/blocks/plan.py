"""Which rows of a network call run which of its blocks.

A row that does not run the inner blocks goes on with a feature that was kept of a frame before (Ma
et al., DeepCache, CVPR 2024, arXiv 2312.00858, there within one picture). A row that does not run
the body of a block passes it by (Li et al., AutoDiffusion, ICCV 2023, arXiv 2309.10438).

All that says which rows is a tensor of indices, so a recording of a call, or an engine, holds for
every choice of as many rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


class Kept(Protocol):
    """What stands for the inner blocks where a row does not run them.

    Attributes:
        depth: of a network with N input and N output blocks, every row runs input blocks 0 to
            `depth` and the last `depth` + 1 output blocks: the outer ones. The others and the
            middle are the inner ones. 0 to N - 1.
        whole: rows that run the inner blocks, too, ascending, int64 [W], W from 0 to R.
    """

    depth: int
    whole: Tensor

    def take(self, new: Tensor | None) -> Tensor:
        """What enters the outer output blocks.

        Args:
            new: of the rows that ran the inner blocks, in their order, [W, C, h, w]; None where
                none did.

        Returns:
            of all rows, [R, C, h, w], in memory that may be written to.
        """


@dataclass(frozen=True)
class Split:
    """The rows of a batch by whether they run a body.

    Attributes:
        run, rest: those that do, and that do not, int64 [r] and [R - r].
        order: where each row is in run's followed by rest's, int64 [R].
    """

    run: Tensor
    rest: Tensor
    order: Tensor


@dataclass(frozen=True)
class BlockPlan:
    """Of one call.

    Attributes:
        kept: None where every row runs the inner blocks and nothing is kept.
        splits: bodies that not every row runs, by name (host.models.walk.bodies). Rows are those
            of the batch that comes there: in inner blocks the rows of `kept.whole`, counted anew.
    """

    kept: Kept | None = None
    splits: Mapping[str, Split] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.kept is not None or bool(self.splits)
