"""The similarity filter across ComfyUI's lazy evaluation, which asks before it executes."""

from torch import Tensor

from ..engine.similarity import Decision, Measure, SimilarityFilter


class FrameSkip:
    """One decision per frame, however often ComfyUI asks; the last processed picture is kept.

    Args:
        seed: of the filter's chance decisions.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self._filter = SimilarityFilter(seed)
        self._asked: tuple[Tensor, Decision] | None = None
        self._last: Tensor | None = None

    def decide(self, image: Tensor, threshold: float, max_skip: int, measure: Measure) -> bool:
        """True if `image` [B, H, W, C] skips the pipeline. Asking again changes nothing."""
        if self._asked is None or self._asked[0] is not image:
            decision = self._filter.decide(image, threshold, max_skip, measure)
            self._asked = (image, decision)
        return self._asked[1].skip

    def carry_out(self, image: Tensor, processed: Tensor | None, settle: int) -> Tensor:
        """The picture to show for the frame decided on; ends its decision.

        Args:
            image: as given to `decide`.
            processed: the pipeline's output, None for a skipped frame.
            settle: see engine.similarity.SimilarityFilter.commit.
        """
        decision = self._asked[1]
        self._filter.commit(decision, image, settle)
        self._asked = None
        if not decision.skip:
            self._last = processed
        return self._last
