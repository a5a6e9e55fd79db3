"""A copy of a network: the one place of the pack that copies modules.

Of its parts and weights there are new ones; whatever else lies on a part stays the one object that
it is. ComfyUI's dynamic VRAM lays owners of memory there (a range of pages, pinned buffers), which
free it when they end: a second owner of the same pointer would free the first one's.
"""

import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .weights import PAGED

# a copy's weights are its own: with these it would go to the pages of the network it is of
_LEFT = {
    *PAGED, "_v_signature", "_v_weight", "_v_bias", "_v_block", "_v_block_faulted", "_prefetch",
    "_pins", "_pin", "_pin_state", "_pin_registered", "_pin_stack_index", "_pin_balancer_entry",
    "_pin_balancer_priority", "_comfy_graph", "_compiled_call_impl", "dynamic_vbars",
    "dynamic_pins", "dynamic_patchers",
}  # fmt: skip
_NEW = {"_parameters", "_buffers", "_modules"}


def cloned(weight: Tensor) -> Tensor:
    """A weight of the same values in memory of its own."""
    return weight.detach().clone()


def copied(network: nn.Module, weigh: Callable[[Tensor], Tensor] = cloned) -> nn.Module:
    """A copy of a network, which may be trained, moved and thrown away without a trace.

    Args:
        network: its weights are what they are, also where they are not whole
            (compiled.weights.whole).
        weigh: gives the copy's weight or buffer for one of the network's; asked once for each, so
            weights that parts share are shared in the copy.
    """
    # an object of the very class, whose __init__ would make weights, or take what nobody knows
    parts = {id(part): object.__new__(type(part)) for part in network.modules()}
    weights: dict[int, Tensor] = {}

    def own(weight: Tensor | None) -> Tensor | None:
        if weight is None:
            return None
        if id(weight) not in weights:
            new = weigh(weight)
            if isinstance(weight, nn.Parameter):
                new = nn.Parameter(new, requires_grad=weight.requires_grad)
            weights[id(weight)] = new
        return weights[id(weight)]

    for part in network.modules():
        new = vars(parts[id(part)])
        for name in ("_parameters", "_buffers"):
            kept = vars(part)[name]
            new[name] = type(kept)((key, own(weight)) for key, weight in kept.items())
        held = part._modules
        new["_modules"] = type(held)((k, m if m is None else parts[id(m)]) for k, m in held.items())
    instead = {**parts, **weights}
    for part in network.modules():
        new = vars(parts[id(part)])
        for name, value in vars(part).items():
            if name not in _LEFT and name not in _NEW:
                new[name] = _turned(value, instead)
    return parts[id(network)]


def _turned(value: Any, instead: dict[int, Any]) -> Any:
    """What lies on a part, for the copy: it names the copy's parts and weights.

    Containers, and calls that have arguments ready, are made anew around what they hold.

    Args:
        instead: by the ids of what is copied.
    """
    if id(value) in instead:
        return instead[id(value)]
    kind = type(value)
    if kind in (list, tuple, set, frozenset):
        return kind(_turned(one, instead) for one in value)
    if kind in (dict, OrderedDict):
        return kind((key, _turned(one, instead)) for key, one in value.items())
    if kind is types.MethodType:
        return kind(value.__func__, _turned(value.__self__, instead))
    if kind is functools.partial:
        bound = _turned(value.args, instead), _turned(value.keywords, instead)
        return functools.partial(_turned(value.func, instead), *bound[0], **bound[1])
    return value


def emptied(network: nn.Module) -> nn.Module:
    """A copy whose weights hold nothing: of float32, buffers of their own dtype."""

    def empty(weight: Tensor) -> Tensor:
        dtype = torch.float32 if isinstance(weight, nn.Parameter) else weight.dtype
        return torch.empty(weight.shape, dtype=dtype, device="meta")

    return copied(network, empty)
