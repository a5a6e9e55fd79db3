"""What an engine is told where rows go on with a kept feature, and what it tells: tensors by name.

A row that does not run the inner blocks of a network (engine.blocks.plan) goes on with what they
gave a frame before. For an engine that is an input, and what the rows that run them come out with
is an output. One graph serves every number of rows that run them but none: without its inner blocks
a network is another graph, and a small one.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

KEPT = "kept_"  # what names of inputs begin with
FEATURES, WHOLE, PICK = f"{KEPT}features", f"{KEPT}whole", f"{KEPT}pick"
GIVEN = "own_features"
INDICES = frozenset({WHOLE, PICK})


@dataclass(frozen=True)
class Reused:
    """Of one call.

    Attributes:
        depth: see engine.blocks.plan.Kept.
        reads: inputs by name. `kept_features` [R, C, h, w]: what is kept for each row; of one that
            runs the inner blocks it means nothing. Unless none does: `kept_whole` [W], int64: those
            that do, ascending; `kept_pick` [R], int64: where each row's feature is among theirs
            followed by `kept_features`.
        wrote: outputs by name, `own_features` [W, C, h, w]: put there by whoever runs the call.
    """

    depth: int
    reads: dict[str, Tensor]
    wrote: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, depth: int, whole: Tensor, features: Tensor) -> "Reused":
        """What a call is to be told.

        Args:
            whole: rows that run the inner blocks, int64 [W].
            features: of all rows, [R, C, h, w].
        """
        rows, runs = features.shape[0], whole.shape[0]
        if not runs:
            return cls(depth, {FEATURES: features})
        pick = torch.arange(runs, runs + rows, device=whole.device)
        pick = pick.index_copy(0, whole, torch.arange(runs, device=whole.device))
        return cls(depth, {FEATURES: features, WHOLE: whole, PICK: pick})

    @property
    def whole(self) -> Tensor:
        """Rows that run the inner blocks (plan.Kept)."""
        features = self.reads[FEATURES]
        return self.reads.get(WHOLE, torch.empty(0, dtype=torch.int64, device=features.device))

    def take(self, new: Tensor | None) -> Tensor:
        """See plan.Kept.take."""
        kept = self.reads[FEATURES]
        if new is None:
            return kept.clone()
        self.wrote[GIVEN] = new
        return torch.cat([new, kept.to(new.dtype)]).index_select(0, self.reads[PICK])

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what a graph gives besides its result."""
        return (GIVEN,) if WHOLE in self.reads else ()

    def shape(self) -> tuple[int, ...]:
        """Of `own_features`."""
        return self.reads[WHOLE].shape[0], *self.reads[FEATURES].shape[1:]
