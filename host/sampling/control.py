"""ControlNet hints travel with their frame: the hints of a tick's rows, in row order."""

from collections.abc import Sequence

import torch

_MODELS = ("control_model", "t2i_model")
_SETTINGS = ("strength", "timestep_percent_range", "strength_type", "global_average_pooling")


def chain(control) -> list:
    """A control and those before it, nearest first."""
    out = []
    while control is not None:
        out.append(control)
        control = control.previous_controlnet
    return out


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
    if any(len(c) != len(chains[0]) for c in chains):
        return None
    previous = None
    for level in reversed(range(len(chains[0]))):
        merged = _stack_one([c[level] for c in chains], indices)
        if merged is None:
            return None
        previous = merged.set_previous_controlnet(previous)
    previous.pre_run(model, model.model_sampling.percent_to_sigma)
    return previous


def _stack_one(controls: Sequence, indices: Sequence[int]):
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
    merged.cond_hint_original = _picked(hints, indices)
    merged.extra_concat_orig = [
        _picked([e[j] for e in extras], indices) for j in range(len(extras[0]))
    ]
    return merged


def _picked(batches: Sequence[torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
    at = [i % b.shape[0] for b, i in zip(batches, indices, strict=True)]
    return torch.cat([b[i : i + 1] for b, i in zip(batches, at, strict=True)])
