"""What one run of a graph keeps under a name, for the runs after it.

The order of nodes inside a run does not matter: what a run keeps counts once that run has gone
well and another one has begun.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .check import checked_image

MOST_NAMES = 16
_MOST_NODES = 64  # that give what is kept under one name


class Turn(Protocol):
    """One run of the graph: a frame of a live run, or a queued prompt. Equal only to itself."""

    @property
    def well(self) -> bool:
        """Whether all of it ran; asked once the next one has begun."""


@dataclass
class _Name:
    """What is kept under one name; turns are told by their number."""

    kept: Any = None
    kept_at: int = 0
    # of the turn that kept last: itself, its number, the node, the value
    fresh: tuple[Turn, int, str, Any] | None = None
    used_at: int = 0
    # by node that gives it: the size of its `first`, and since when
    sizes: OrderedDict[str, tuple[Any, int]] = field(default_factory=OrderedDict)


class Kept:
    """All that one owner keeps: a live run, or a workflow from prompt to prompt."""

    def __init__(self):
        self._names: dict[str, _Name] = {}
        self._turn: Turn | None = None
        self._number = 0

    def keep(self, turn: Turn, node: str, name: str, value: Any) -> None:
        """Keep an IMAGE or a LATENT for the turns after this one.

        A frame with a value that is not finite is replaced by the one kept before, or such values
        by 0 where there is none of that size: feedback would not get rid of it again.

        Raises:
            ValueError: it is neither; another node has kept under the name in this turn; there are
                more names than MOST_NAMES.
        """
        checked(value, "value")
        found = self._found(turn, name)
        if found.fresh is not None and found.fresh[2] != node:
            raise ValueError(
                f"name: another Live Keep keeps under {name!r}, too. Give one of them another name."
            )
        found.fresh = turn, self._number, node, _finite(value, found.kept)

    def last(self, turn: Turn, node: str, name: str, first: Any) -> Any:
        """What was kept by the latest turn before this one that went well.

        A LATENT is given on the device of `first`: stock nodes of latents ask for one device, and
        a VAE Encode of the CPU beside what a sampler left on the GPU would end the run. An IMAGE
        stays where it is: stock nodes of pictures bring the other one to it or it to the other,
        and to do so here would wait for the GPU even where the graph does not.

        Args:
            first: given before anything is, and again when its size has become another: what
                was made of frames of the size before does not go on.

        Raises:
            ValueError: `first` is neither IMAGE nor LATENT, or what is kept is the other one.
        """
        checked(first, "first")
        found = self._found(turn, name)
        size, since = found.sizes.get(node, (None, 0))
        if size != (now := _size(first)):
            since = self._number if size is not None else 0
        found.sizes[node] = now, since
        found.sizes.move_to_end(node)
        if len(found.sizes) > _MOST_NODES:
            found.sizes.popitem(last=False)
        if found.kept is None or found.kept_at < since:
            return first
        if (mine := _kind(found.kept)) != (asked := _kind(first)):
            raise ValueError(
                f"first: expected {mine}, which is what is kept under {name!r}, got {asked}. Wire "
                f"{mine} into it, or choose another name."
            )
        return _beside(found.kept, first)

    def __len__(self) -> int:
        return len(self._names)

    def _found(self, turn: Turn, name: str) -> _Name:
        """What is kept under a name, as it stands for this turn."""
        if turn != self._turn:
            self._turn, self._number = turn, self._number + 1
        if name not in self._names:
            self._make_room()
            self._names[name] = _Name()
        found = self._names[name]
        found.used_at = self._number
        if found.fresh is not None and found.fresh[1] != self._number:
            before, number, _, value = found.fresh
            if before.well:
                found.kept, found.kept_at = value, number
            found.fresh = None
        return found

    def _make_room(self) -> None:
        """Forget the name that was used longest ago, if there are as many as may be."""
        if len(self._names) < MOST_NAMES:
            return
        oldest = min(self._names, key=lambda name: self._names[name].used_at)
        if self._names[oldest].used_at == self._number:
            raise ValueError(f"name: {MOST_NAMES} names are in use already. Use one of them.")
        del self._names[oldest]


def checked(value: Any, name: str) -> Any:
    """An IMAGE or a LATENT with at least one frame; raises ValueError that begins with the name."""
    if not isinstance(value, dict):
        return checked_image(name, value, "an IMAGE or a LATENT")
    samples = value.get("samples")
    if not isinstance(samples, Tensor) or samples.ndim < 2 or not samples.numel():
        raise ValueError(
            f"{name}: expected a latent of frames, at least one. Check the node before this one."
        )
    return value


def checked_name(name: Any) -> str:
    """A name, without spaces around it; raises ValueError if it is no text or nothing is left."""
    if not isinstance(name, str):
        raise ValueError(
            f"name: expected a word, got {type(name).__name__}. Write the same word on Live Keep "
            "and Live Last."
        )
    if not (name := name.strip()):
        raise ValueError("name: it is empty. Write the same word on Live Keep and Live Last.")
    return name


def _kind(value: Any) -> str:
    return "a LATENT" if isinstance(value, dict) else "an IMAGE"


def _tensor(value: Any) -> Tensor:
    return value["samples"] if isinstance(value, dict) else value


def _beside(kept: Any, first: Any) -> Any:
    """What is kept, on the device of `first` if it is a LATENT."""
    device = _tensor(first).device
    if not isinstance(kept, dict) or kept["samples"].device == device:
        return kept
    return {**kept, "samples": kept["samples"].to(device)}


def _size(value: Any) -> tuple:
    """Kind and size of the frames, however many there are."""
    return _kind(value), *_tensor(value).shape[1:]


def _finite(value: Any, before: Any) -> Any:
    """The value with each frame that is not finite replaced. Never waits for a GPU."""
    tensor = _tensor(value)
    if not tensor.is_floating_point() or (
        tensor.device.type == "cpu" and bool(tensor.isfinite().all())
    ):
        return value
    other = _tensor(before) if before is not None else None
    if other is not None and (other.shape, other.device) == (tensor.shape, tensor.device):
        good = tensor.flatten(1).isfinite().all(1).reshape(-1, *[1] * (tensor.ndim - 1))
        made = torch.where(good, tensor, other.to(tensor.dtype))
    else:
        made = torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0)
    return {**value, "samples": made} if isinstance(value, dict) else made
