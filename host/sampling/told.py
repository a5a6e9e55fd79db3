"""What an entry of a conditioning asks of the network, told from what others ask.

Rows under equal ones may stand for each other (Live Reuse). ComfyUI, its nodes and packs put things
into an entry by name: all of it counts but for OF_ONE_FRAME, and what cannot be compared is another
as soon as it is another object.
"""

import hashlib
import weakref
from typing import Any

import comfy.hooks
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import control as controls

# pictures that are the frame's own as its latent is, like a ControlNet's hint
OF_ONE_FRAME = frozenset({"concat_latent_image", "concat_image"})
# nodes, or ComfyUI before each run, make these anew of the same
_MASKS = frozenset({"mask", "concat_mask"})
# what ComfyUI makes of the rest, and the name of an entry
_MADE = frozenset({"model_conds", "uuid", *_MASKS, "control", *OF_ONE_FRAME})
_MADE_OF_REST = frozenset({"c_concat", "y", "c_crossattn", "crossattn_controlnet"})
_digests: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Is:
    """Equal to what holds the same object. Only tensors live on in it."""

    __slots__ = ("_hash", "_of")

    def __init__(self, of: Any):
        self._hash = id(of)
        try:
            self._of = (lambda: of) if isinstance(of, Tensor) else weakref.ref(of)
        except TypeError:
            self._of = lambda: of

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Is) and self._of() is not None and self._of() is other._of()

    def __hash__(self) -> int:
        return self._hash


def asked(entry: dict[str, Any]) -> tuple:
    """What an entry, processed or not, asks for."""
    out = {name: told(value) for name, value in entry.items() if name not in _MADE}
    out |= {name: _digest(entry[name]) for name in _MASKS if entry.get(name) is not None}
    out["control"] = tuple(map(_of_control, controls.chain(entry.get("control"))))
    own = entry.get("model_conds", {})
    out["model_conds"] = tuple(
        (name, told(getattr(own[name], "cond", own[name])))
        for name in sorted(own.keys() - _MADE_OF_REST)
    )
    return tuple(sorted(out.items(), key=lambda one: one[0]))


def rows(entry: dict[str, Any]) -> int:
    """Of how many frames it is."""
    values = [value for name, value in entry.items() if name not in OF_ONE_FRAME]
    return max((len(v) for v in values if isinstance(v, Tensor) and v.ndim), default=1)


def told(value: Any) -> Any:
    """Equal for equal words and numbers, however deep they lie, and for the same objects."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(told, value))
    if isinstance(value, comfy.hooks.HookGroup):
        # ComfyUI clones groups and their hooks from run to run
        return tuple((Is(hook.hook_ref), Is(hook.hook_keyframe)) for hook in value.hooks)
    if isinstance(value, dict):
        pairs = ((str(name), told(inner)) for name, inner in value.items())
        return tuple(sorted(pairs, key=lambda one: one[0]))
    return Is(value)


def _of_control(control: Any) -> tuple:
    settings = [told(getattr(control, name, None)) for name in controls.ASKS]
    return type(control), Is(controls.network(control)), *settings


def _digest(mask: Tensor) -> tuple:
    """Of its values, which come from the device for it once."""
    known = _digests.get(mask)
    if known is None:
        values = mask.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.blake2b(values, digest_size=16).digest()
        known = _digests[mask] = (tuple(mask.shape), mask.dtype, digest)
    return known
