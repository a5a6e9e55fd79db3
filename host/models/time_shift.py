"""A MODEL whose network is told another time than that of its noise (decoupled time)."""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

KEY = "model_sampling"


def shifted(model, levels: Sequence[float], shifts: Sequence[float]):
    """A clone of a MODEL that is told level * exp(shift) at these levels, and in between by
    interpolation over the logarithm of the level.

    Args:
        model: ComfyUI's MODEL.
        levels: of the model calls, descending.
        shifts: one for each.
    """
    places = torch.tensor([math.log(level) for level in reversed(levels)])
    values = torch.tensor(list(reversed(shifts)), dtype=torch.float32)

    def shift(log_sigma: Tensor) -> Tensor:
        at, amounts = places.to(log_sigma), values.to(log_sigma)
        out = amounts[0].expand_as(log_sigma)
        for k, (low, high) in enumerate(pairwise(at)):
            part = ((log_sigma - low) / (high - low)).clamp(0, 1)
            out = out + part * (amounts[k + 1] - amounts[k])
        return out

    return _patched(model, shift, f"{list(levels)} {list(shifts)}")


class Dial:
    """One shift for all levels, to be turned between two calls."""

    def __init__(self):
        self.shift = 0.0

    def on(self, model):
        """A clone of a MODEL that is told the time that the dial says."""
        return _patched(model, lambda log_sigma: log_sigma.new_tensor(self.shift), "dial")


def _patched(model, shift: Callable[[Tensor], Tensor], what: str):
    sampling = model.get_model_object(KEY)
    moved = copy.copy(sampling)
    # a fingerprint reads it
    moved.time_shift = f"{getattr(sampling, 'time_shift', '')} {what}"
    low, high = float(sampling.sigma_min), float(sampling.sigma_max)

    class Shifted(type(sampling)):
        def timestep(self, sigma):
            level = sigma * torch.exp(shift(sigma.log()))
            # the network knows no levels but these
            return super().timestep(level.clamp(low, high))

    moved.__class__ = Shifted
    clone = model.clone()
    clone.add_object_patch(KEY, moved)
    return clone
