"""Where a network's weights lie, asked often enough that it has to be cheap."""

import itertools
import weakref

import torch
from torch import Tensor, nn

from .engine import WeightsAway

# what ComfyUI's dynamic VRAM lays on a part of which the weights come page by page: where the pages
# are, and the patches that are put in when they come
PAGED = ("_v", "weight_lowvram_function", "bias_lowvram_function")

_layouts: weakref.WeakKeyDictionary[nn.Module, "_Layout"] = weakref.WeakKeyDictionary()


def addresses(module: nn.Module) -> tuple[int, ...]:
    """Where the parameters and buffers of a module lie now, in the order of its parts.

    Parts and weights may be replaced by others between two calls; it is asked on every frame.
    """
    layout = _layouts.get(module)
    if layout is not None and layout.holds():
        try:
            return layout.read()
        except (KeyError, TypeError):  # a weight was there and is not any more
            pass
    layout = _layouts[module] = _Layout(module)
    return layout.read()


class _Layout:
    """The dicts in which the weights of a module are found, so that nothing has to be walked."""

    def __init__(self, module: nn.Module):
        parts = list(module.modules())
        self._parents = [part._modules for part in parts if part._modules]
        self._children = self._now()
        self._found = [
            (weights, name)
            for part in parts
            for weights in (part._parameters, part._buffers)
            for name, weight in weights.items()
            if weight is not None
        ]

    def holds(self) -> bool:
        """True while the module consists of the same parts."""
        return self._now() == self._children  # modules compare by identity

    def _now(self) -> list[nn.Module | None]:
        return list(itertools.chain.from_iterable(map(dict.values, self._parents)))

    def read(self) -> tuple[int, ...]:
        weights = [weights[name] for weights, name in self._found]
        at = tuple(map(Tensor.data_ptr, weights))
        if 0 in at:  # a quantised weight has no memory itself, but its parts have
            return tuple(map(_address, weights))
        return at


def _address(weight: Tensor) -> int:
    inner = getattr(weight, "__tensor_flatten__", None)
    if inner is None:
        return weight.data_ptr()
    return hash(tuple(getattr(weight, name).data_ptr() for name in inner()[0]))


def fixed(module: nn.Module, device: str | torch.device) -> None:
    """Weights whose addresses a graph may rely on.

    Raises:
        WeightsAway: some are elsewhere, or are cast and moved call by call.
    """
    device = torch.device(device)
    whole(module)
    for name, weight in module.named_parameters():
        if weight.device.type != device.type:
            raise WeightsAway(
                f"the weights are not all on {device} ({name} is on {weight.device}): start "
                "ComfyUI with --highvram, or free memory"
            )


def whole(module: nn.Module) -> None:
    """Weights that are what is computed with.

    Raises:
        WeightsAway: some are patched call by call, so they lie there without their patches, or come
            page by page.
    """
    for name, part in module.named_modules():
        if any(vars(part).get(paged) is not None for paged in PAGED):
            raise WeightsAway(
                f"{name}: its weights come page by page. Load the model with a stock loader, or "
                "start ComfyUI with --disable-dynamic-vram"
            )
        if getattr(part, "weight_function", None) or getattr(part, "bias_function", None):
            raise WeightsAway(
                f"{name}: some weights are not on the device and are patched call by call, for "
                "lack of memory. Free some, or start ComfyUI with --highvram"
            )
