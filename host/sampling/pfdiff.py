"""PFDiff as a sampler of its own, called as k-diffusion calls samplers."""

import torch
from torch import Tensor

from ...engine.sequential import walk
from ...engine.space import AsItComes
from ...engine.step_rules import Course, PFDiff


@torch.no_grad()
def sample_pfdiff(
    model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None,
    k: int = 1, h: int = 1,
) -> Tensor:  # fmt: skip
    """PFDiff-k_h over Euler (engine.step_rules.PFDiff).

    n steps take 1 + ceil((n - 1) / (k + 1)) model calls.

    Args:
        model: gives the clean prediction of x at a noise level.
        x: [B, ...], noised to sigmas[0].
        sigmas: n + 1 descending noise levels.
        callback: called after each model call with x and denoised there, sigma and its place i.
        k: steps skipped per call, at least 1.
        h: steps to the springboard, 1 to k.
    """
    extra_args = {} if extra_args is None else extra_args
    ones, n = x.new_ones([x.shape[0]]), len(sigmas) - 1
    if n < 1:
        return x
    rule = PFDiff(k, h)
    calls = iter(rule.calls(n))

    def predict(point: Tensor, level: float) -> Tensor:
        i = next(calls)
        denoised = model(point, sigmas[i] * ones, **extra_args)
        if callback is not None:
            callback({"x": point, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i],
                      "denoised": denoised})  # fmt: skip
        return denoised

    *_, end = walk(predict, x, Course(tuple(sigmas.tolist()), rule, AsItComes()))
    return end.x
