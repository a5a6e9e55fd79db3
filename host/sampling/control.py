"""ControlNet hints travel with their frame: the hints of a tick's rows, in row order."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_MODELS = ("control_model", "t2i_model")
_SETTINGS = ("strength", "timestep_percent_range", "strength_type", "global_average_pooling")
# what of a control, besides its network, is not a frame's own picture or made for a call
ASKS = (*_SETTINGS, "concat_mask", "vae", "extra_args", "extra_hooks")
# what AnimateDiff-Evolved, too, knows a control by that picks its own pictures by the place of a
# frame (alone.tell_place); and its pack may know it by identity
_PLACED = "sub_idxs"
_NEAR = 16  # pictures of one batch that are kept on the device
# a frame's hint is used by each of its ticks, so it goes to the device once
_there: WeakIdKeyDictionary = WeakIdKeyDictionary()


def chain(control) -> list:
    """A control and those before it, nearest first."""
    out = []
    while control is not None:
        out.append(control)
        control = control.previous_controlnet
    return out


def network(control) -> object:
    """The same object for all controls that run the same weights; None where nobody knows."""
    weights = getattr(control, "control_weights", None)
    if weights:
        return next(iter(weights.values()))  # of a ControlLora, which makes its network anew
    return next((n for m in _MODELS if (n := getattr(control, m, None)) is not None), None)


def same_for_every_frame(control) -> bool:
    """True for one with at most one picture."""
    pictures = [control.cond_hint_original, *control.extra_concat_orig]
    return all(picture is None or picture.shape[0] == 1 for picture in pictures)


def stack(controls: Sequence, indices: Sequence[int], model) -> object | None:
    """One control whose hint batch holds each row's own hint.

    Args:
        controls: the control of each row, R of them.
        indices: which picture of its hint batch belongs to the row.
        model: the loaded BaseModel; the result is ready for get_control.

    Returns:
        The stacked control, or None where the rows' controls differ in more than the hint.
    """
    chains = [chain(c) for c in controls]
    if len(controls) == 1 and all(hasattr(c, _PLACED) for c in chains[0]):
        return controls[0]
    if any(len(c) != len(chains[0]) for c in chains):
        return None
    previous, device = None, model.current_patcher.load_device
    for level in reversed(range(len(chains[0]))):
        merged = _stack_one([c[level] for c in chains], indices, device)
        if merged is None:
            return None
        previous = merged.set_previous_controlnet(previous)
    previous.pre_run(model, model.model_sampling.percent_to_sigma)
    return previous


def _stack_one(controls: Sequence, indices: Sequence[int], device: torch.device):
    first = controls[0]
    for other in controls[1:]:
        if type(other) is not type(first):
            return None
        if any(getattr(other, m, None) is not getattr(first, m, None) for m in _MODELS):
            return None
        if any(getattr(other, s) != getattr(first, s) for s in _SETTINGS):
            return None
        if other.vae is not first.vae or other.extra_args != first.extra_args:
            return None
    hints = [c.cond_hint_original for c in controls]
    if any(h is None or h.shape[1:] != hints[0].shape[1:] for h in hints):
        return None
    extras = [c.extra_concat_orig for c in controls]
    if any(len(e) != len(extras[0]) for e in extras):
        return None
    merged = first.copy()
    merged.cond_hint_original = _picked(hints, indices, device)
    merged.extra_concat_orig = [
        _picked([e[j] for e in extras], indices, device) for j in range(len(extras[0]))
    ]
    return merged


def _picked(batches: Sequence[Tensor], indices: Sequence[int], device: torch.device) -> Tensor:
    at = [i % b.shape[0] for b, i in zip(batches, indices, strict=True)]
    return torch.cat([_near(b, i, device) for b, i in zip(batches, at, strict=True)])


def _near(pictures: Tensor, index: int, device: torch.device) -> Tensor:
    picture = pictures[index : index + 1]
    if pictures.device == device:
        return picture
    known = _there.setdefault(pictures, OrderedDict())
    if index not in known or known[index].device != device:
        known[index] = picture.to(device)
        while len(known) > _NEAR:
            known.popitem(last=False)
    return known[index]
