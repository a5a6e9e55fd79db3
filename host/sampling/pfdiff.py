"""PFDiff as a sampler of its own, written as k-diffusion writes samplers."""

import torch
from torch import Tensor


@torch.no_grad()
def sample_pfdiff(
    model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None,
    k: int = 1, h: int = 1,
) -> Tensor:  # fmt: skip
    """PFDiff-k_h over Euler (Wang et al. 2025, arXiv 2408.08822, Algorithm 1).

    n steps take 1 + ceil((n - 1) / (k + 1)) model calls.

    Args:
        model: gives the clean prediction of x at a noise level.
        x: [B, ...], noised to sigmas[0].
        sigmas: n + 1 descending noise levels.
        k: steps skipped per call, at least 1.
        h: steps to the springboard, 1 to k.
    """
    extra_args = {} if extra_args is None else extra_args
    ones, n = x.new_ones([x.shape[0]]), len(sigmas) - 1

    def noise_at(point: Tensor, i: int) -> Tensor:
        denoised = model(point, sigmas[i] * ones, **extra_args)
        if callback is not None:
            callback({"x": point, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i],
                      "denoised": denoised})  # fmt: skip
        return (point - denoised) / sigmas[i]

    # the first step is an ordinary one
    noise, at = noise_at(x, 0), min(1, n)
    x = x + (sigmas[at] - sigmas[0]) * noise
    while at < n:
        to = min(at + k + 1, n)
        call = min(at + h, to - 1)
        springboard = x + (sigmas[call] - sigmas[at]) * noise
        noise = noise_at(springboard, call)
        x = x + (sigmas[to] - sigmas[at]) * noise
        at = to
    return x
