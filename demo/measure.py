"""Figures that tell how near a picture is to another: (B, 3, H, W) in 0..1 each, (B,) results."""

import torch
import torch.nn.functional as F

from .filters import blur, grey


def edges(x, sigma=0.0):
    """Strength of the luminance's edges (B, 1, H, W), by Sobel's kernel, after a blur."""
    y = grey(x)
    y = blur(y, sigma) if sigma else y
    kernel = x.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]]) / 8
    y = F.pad(y, (1, 1, 1, 1), mode="reflect")
    d = F.conv2d(y, torch.stack([kernel, kernel.T])[:, None])
    return d.square().sum(1, keepdim=True).sqrt()


def correlation(a, b):
    """Pearson's."""
    a, b = a.flatten(1), b.flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-9)


def edge_correlation(a, b):
    """Whether the edges are at the same places: 1 where they are."""
    return correlation(edges(a, 1.0), edges(b, 1.0))


def sharpness(a, b):
    """Energy of the edges of a as a share of that of b."""
    energy = [edges(x).square().mean((1, 2, 3)) for x in (a, b)]
    return energy[0] / energy[1].clamp(min=1e-9)


def psnr(a, b):
    """Peak signal to noise ratio in dB."""
    return -10 * (a - b).square().mean((1, 2, 3)).clamp(min=1e-9).log10()


def ssim(a, b):
    """Structural similarity of the luminance (Wang et al. 2004), Gaussian window of 1.5 pixels."""
    a, b = grey(a), grey(b)
    mean_a, mean_b = blur(a, 1.5), blur(b, 1.5)
    var_a, var_b = blur(a * a, 1.5) - mean_a**2, blur(b * b, 1.5) - mean_b**2
    both = blur(a * b, 1.5) - mean_a * mean_b
    top = (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
    return (top / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))).mean((1, 2, 3))


def compare(output, target):
    """Means over the pictures; sharpness is the median, which one flat picture does not spoil."""
    return {
        "edge": float(edge_correlation(output, target).mean()),
        "sharpness": float(sharpness(output, target).median()),
        "psnr": float(psnr(output, target).mean()),
        "ssim": float(ssim(output, target).mean()),
    }
