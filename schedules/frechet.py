"""How far pictures are from other pictures as distributions: the Frechet distance of features.

Features are those of a small convolutional network with random weights: Naeem et al. 2020 (arXiv
2002.09797, section 3.2) find that such embeddings rank as well as a trained classifier's where
pictures are far from the classifier's own, and latents are. They need no download. Distances
compare with each other only if they are of the same latent format and number of samples.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURES = 64
_SEED = 2002
_WIDTHS = (32, 64, FEATURES)


@torch.no_grad()
def features(latents: Tensor) -> Tensor:
    """Of latents [S, C, H, W] (or [S, C, T, H, W]), [S, 64] in float64 on the CPU."""
    if latents.ndim == 5:
        latents = latents.movedim(2, 1).flatten(0, 1)
    x = latents.float().cpu()
    for i, weight in enumerate(_weights(x.shape[1])):
        x = F.conv2d(x, weight, stride=1 if i == 0 else 2, padding=1)
        x = F.leaky_relu(x, 0.2)
    return x.mean((-2, -1)).double()


@functools.lru_cache(maxsize=8)
def _weights(channels: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    weights = []
    for width in _WIDTHS:
        scale = (2 / (channels * 9)) ** 0.5  # keeps the variance (He et al. 2015)
        weights.append(torch.randn(width, channels, 3, 3, generator=generator) * scale)
        channels = width
    return weights


def moments(points: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of points [S, D], S >= 2."""
    mean = points.mean(0)
    away = points - mean
    return mean, away.T @ away / (len(points) - 1)


def frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Squared Frechet distance of two Gaussians, each a mean and a covariance (Dowson & Landau
    1982, equation 4): |m - n|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)."""
    root = _root(a[1])
    between = torch.linalg.eigvalsh(root @ b[1] @ root).clamp_min(0).sqrt().sum()
    distance = (a[0] - b[0]).square().sum() + a[1].trace() + b[1].trace() - 2 * between
    return max(float(distance), 0.0)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


class Pictures:
    """A goal of searched steps: the feature Frechet distance of the ends to pictures.

    Args:
        latents: of the pictures, in the model's scale, [P, C, H, W], P >= 2.
    """

    def __init__(self, latents: Tensor):
        self._moments = moments(features(latents))

    def terms(self, ends: Tensor) -> Tensor:
        if not bool(ends.isfinite().all()):
            return torch.tensor([torch.inf], dtype=torch.float64)
        return torch.tensor([frechet(moments(features(ends)), self._moments)], dtype=torch.float64)
