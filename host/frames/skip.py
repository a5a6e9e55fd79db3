"""The similarity filter across ComfyUI's lazy evaluation, which asks before it executes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...engine.similarity import Decision, Measure, SimilarityFilter
from ..graph import behind, link


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
        self._recipe: dict | None = None

    def decide(
        self,
        image: Tensor,
        threshold: float,
        max_skip: int,
        measure: Measure,
        recipe: Callable[[], dict] = dict,
    ) -> bool:
        """True if `image` [B, H, W, C] skips the pipeline. Asking again changes nothing.

        Args:
            recipe: gives the settings of the pipeline, asked once per frame; a frame runs when
                they differ from the last ones.
        """
        if self._asked is None or self._asked[0] is not image:
            settings = recipe()
            if settings != self._recipe:
                self._recipe = settings
                self._filter.renew()
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


def pipeline_recipe(prompt: dict | None, node: str, processed: str, image: str) -> dict:
    """Settings of the nodes behind the input `processed` of a node, less those behind `image`.

    While the picture stands still nothing else tells the filter that a prompt or a scale was
    edited. Values that are no plain settings are known by their identity.

    Args:
        prompt: the graph in ComfyUI's API format.
        node: id of the node that has both inputs.
    """
    prompt = prompt or {}
    inputs = prompt.get(node, {}).get("inputs", {})

    def sources(name: str) -> set[str]:
        found = link(inputs.get(name))
        return behind(prompt, [found[0]] if found else [])

    ours = sources(processed) - sources(image) - {node}
    return {
        name: (prompt[name]["class_type"], _plain(prompt[name]["inputs"])) for name in sorted(ours)
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | None) else id(value)
