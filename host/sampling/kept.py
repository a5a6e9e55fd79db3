"""A prepared guider, for as long as nothing that it was prepared for has changed."""

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...engine.guidance import Guidance
from ..models import weights
from .route import Route
from .rows import Batch

# what a guider has for the time of a sample() only, and what is looked at by itself
_PASSING = frozenset({
    "inner_model", "conds", "loaded_models", "model_patcher", "rows", "_source", "_kept",
})  # fmt: skip
# what nodes hang on a MODEL
_HUNG = (
    "model_options", "object_patches", "wrappers", "callbacks", "injections", "additional_models",
)  # fmt: skip


class Snapshot:
    """What a guider and its MODEL are, to see whether anybody has changed either since.

    Everything nested is looked at, numbers by value and objects by identity; no object is held.
    """

    def __init__(self, guider):
        self._patcher = weakref.ref(guider.model_patcher)
        self._leaves = [_unheld(leaf) for leaf in _leaves(guider)]

    def fits(self, guider) -> bool:
        """Whether the guider and its MODEL are as they were. Asked for each frame."""
        if self._patcher() is not guider.model_patcher:
            return False
        now = _leaves(guider)
        if len(now) != len(self._leaves):
            return False
        for then, leaf in zip(self._leaves, now, strict=True):
            if then is leaf or (type(then) is weakref.ref and then() is leaf):
                continue
            if type(then) is not type(leaf) or type(leaf) not in _VALUES or then != leaf:
                return False
        return True


_VALUES = (str, int, float, bool, tuple)  # compared by value; a tuple is the keys of a dict


def _leaves(guider) -> list[Any]:
    out: list[Any] = []
    for name, value in vars(guider).items():
        if name not in _PASSING:
            out.append(name)
            _flatten(value, out)
    patcher = guider.model_patcher
    for name in _HUNG:
        _flatten(getattr(patcher, name), out)
    return out


def _flatten(value: Any, out: list[Any]) -> None:
    kind = type(value)
    if kind is dict:
        out.append(tuple(value))
        for inner in value.values():
            _flatten(inner, out)
    elif kind is list or kind is tuple:
        out.append(len(value))
        for inner in value:
            _flatten(inner, out)
    elif kind is Guidance:
        out += (value.mode, value.cfg, value.delta)
    else:
        out.append(value)


def _unheld(leaf: Any) -> Any:
    if type(leaf) in _VALUES:
        return leaf
    try:
        return weakref.ref(leaf)
    except TypeError:
        return leaf


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
