"""A prepared guider, for as long as nothing that it was prepared for has changed."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...engine.guidance import Guidance
from ..models import weights
from .route import Route
from .rows import Batch

_PLAIN = (str, int, float, bool, type(None))
# what a guider has for the time of a sample() only, and what is looked at by itself
_PASSING = frozenset({
    "inner_model", "conds", "loaded_models", "model_patcher", "rows", "_source", "_kept",
})  # fmt: skip
# what nodes hang on a MODEL
_HUNG = (
    "model_options", "object_patches", "wrappers", "callbacks", "injections", "additional_models",
)  # fmt: skip


class Snapshot:
    """What a guider and its MODEL are: equal to a later one if nobody has changed either.

    Everything nested is looked at, numbers by value and objects by identity; none is held on to.
    """

    def __init__(self, guider):
        patcher = guider.model_patcher
        own = {name: value for name, value in vars(guider).items() if name not in _PASSING}
        hung = {name: getattr(patcher, name) for name in _HUNG}
        self._leaves = [_kept(leaf) for leaf in _flat({"guider": own, "patcher": hung})]
        self._patcher = weakref.ref(patcher)

    def same(self, other: "Snapshot") -> bool:
        """Whether both saw the same."""
        mine, theirs = self._leaves, other._leaves
        return (
            self._patcher() is other._patcher()
            and len(mine) == len(theirs)
            and all(map(_same, mine, theirs))
        )


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield len(value)
        for key, inner in value.items():
            yield key
            yield from _flat(inner)
    elif isinstance(value, list | tuple):
        yield len(value)
        for inner in value:
            yield from _flat(inner)
    elif isinstance(value, Guidance):
        yield from (value.mode, value.cfg, value.delta)
    else:
        yield value


def _kept(leaf: Any) -> Any:
    if isinstance(leaf, _PLAIN):
        return leaf
    try:
        return weakref.ref(leaf)
    except TypeError:
        return leaf


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, weakref.ref) and isinstance(b, weakref.ref):
        return a() is b() and a() is not None
    return a is b or (type(a) is type(b) and isinstance(a, _PLAIN) and a == b)


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
            and self.snapshot.same(Snapshot(guider))
        )
