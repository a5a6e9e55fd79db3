"""A prepared guider, for as long as nothing that it was prepared for has changed."""

import weakref
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...engine.guidance import Guidance
from ..models import weights
from .route import Route, way_of
from .rows import Batch

# what a guider has for the time of a sample() only, and what is looked at by itself
_PASSING = frozenset({
    "inner_model", "conds", "loaded_models", "model_patcher", "rows", "_source", "_kept",
})  # fmt: skip
# what nodes hang on a MODEL; and what holds models, so that it is not held here
_HUNG = ("model_options", "object_patches", "wrappers", "callbacks")
_BESIDE = ("injections", "additional_models")


class Snapshot:
    """What a guider and its MODEL are, to see whether anybody has changed either since.

    Everything nested is looked at: containers and numbers by value, objects by identity. What is
    held on to is what a prepared guider's options and conditioning hold anyway.
    """

    def __init__(self, guider):
        patcher = guider.model_patcher
        self._patcher = weakref.ref(patcher)
        self._own = _copied(_own(guider))
        self._hung = _copied([getattr(patcher, name) for name in _HUNG])
        self._way = way_of(guider)
        self._beside = [[id(part) for part in _parts(getattr(patcher, n))] for n in _BESIDE]

    def fits(self, guider) -> bool:
        """Whether the guider and its MODEL are as they were. Asked for each frame."""
        patcher = guider.model_patcher
        if self._patcher() is not patcher or self._way != way_of(guider):
            return False
        try:
            # compares element by element, and an element first by identity
            if self._own != _own(guider):
                return False
            if self._hung != [getattr(patcher, name) for name in _HUNG]:
                return False
        except (RuntimeError, ValueError):
            return False  # two tensors in one place
        return self._beside == [[id(part) for part in _parts(getattr(patcher, n))] for n in _BESIDE]


def _own(guider) -> dict[str, Any]:
    own = {name: value for name, value in vars(guider).items() if name not in _PASSING}
    if own.get("model_options") is guider.model_patcher.model_options:
        del own["model_options"]  # looked at there
    return own


def _copied(value: Any) -> Any:
    """The containers anew, and in them the same objects."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_copied(inner) for inner in value])
    return replace(value) if isinstance(value, Guidance) else value


def _parts(by_key: dict[str, list]) -> list:
    return [part for parts in by_key.values() for part in parts] if by_key else []


@dataclass
class Kept:
    """A prepared guider. It holds neither the guider nor the model: ComfyUI may drop both.

    Attributes:
        shape: of a latent, (C, H, W).
        n: slots that memory was asked for.
        batch, options, route: see Visit.
    """

    guider: weakref.ref
    snapshot: Snapshot
    shape: tuple[int, ...]
    n: int
    batch: Batch
    options: dict[str, Any]
    route: Route

    def holds(self, guider, latents: Tensor, n: int) -> bool:
        """Whether it can be used again as it is, and ComfyUI has nothing to load.

        Args:
            latents: [B, C, H, W].
            n: slots.
        """
        return (
            self.guider() is guider
            and self.shape == tuple(latents.shape[1:])
            and self.n >= n
            and weights.loaded(guider.model_patcher)
            and self.snapshot.fits(guider)
        )
