"""Denoisers in closed form: distributions whose exact answer is known.

Everything in float64 and in ComfyUI's x = x0 + sigma * noise; a flow model's sigma s / (1 + s) and
x / (1 + s) are the same path in other units (Karras et al. 2022, equation 4; Lipman et al. 2023).
"""

import functools
import itertools
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

DIM = 144


class Gaussian:
    """N(mean, diag(variance)): D(x, s) = mean + C (C + s^2)^-1 (x - mean)."""

    def __init__(self, mean, variance):
        self.mean, self.variance = mean, variance
        self.dim = len(mean)

    def denoise(self, x, sigma):
        gain = self.variance / (self.variance + sigma**2)
        return self.mean + gain * (x - self.mean)


class Points:
    """A mixture of equal Gaussians N(points[i], width^2): the posterior mean by log-sum-exp."""

    def __init__(self, points, width):
        self.points, self.width = points, width
        self.dim = points.shape[1]

    def denoise(self, x, sigma):
        total = sigma**2 + self.width**2
        likely = torch.softmax(-torch.cdist(x, self.points).square() / (2 * total), -1)
        nearest = likely @ self.points
        return nearest + self.width**2 / total * (x - nearest)


def power_law():
    """Variances that fall with frequency as those of natural pictures do, 12 x 12."""
    f = torch.fft.fftfreq(12, dtype=torch.float64) * 12
    radius = (f[:, None] ** 2 + f[None] ** 2).sqrt().clamp_min(0.5).flatten()
    variance = radius**-2
    return Gaussian(torch.zeros(DIM, dtype=torch.float64), variance / variance.mean() * 0.25)


def mixture():
    """Twelve wide clusters in 16 dimensions."""
    generator = torch.Generator().manual_seed(5)
    points = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    return Points(points, 0.35)


def digits():
    """A kernel density over the ten digits, drawn in several places and sizes, 8 x 8."""
    pictures = []
    font = ImageFont.load_default(size=40)
    for digit in "0123456789":
        for dx in (-3, 0, 3):
            for scale in (0.85, 1.0, 1.15):
                side = round(48 / scale)
                image = Image.new("L", (side, side))
                place = (side / 2 + dx, side / 2)
                ImageDraw.Draw(image).text(place, digit, 255, font, anchor="mm")
                small = image.resize((8, 8), Image.Resampling.BOX)
                pictures.append(np.asarray(small, np.float64).flatten() / 127.5 - 1)
    return Points(torch.tensor(np.array(pictures)), 0.15)


TARGETS = {"power law": power_law, "mixture": mixture, "digits": digits}


def vp_levels():
    """Stable Diffusion's noise levels by training timestep, rising, [1000]."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)
    return np.sqrt((1 - kept) / kept)


def flow_levels():
    """Rectified flow's, as noise-to-signal ratios; its first is cut where noise is almost all."""
    t = np.arange(1, 1001) / 1001
    return t / (1 - t)


FAMILIES = {"VP": vp_levels, "flow": flow_levels}


@functools.cache
def start(name, family, count=64, seed=0):
    """Held-out noise at the highest level, [count, dim]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, TARGETS[name]().dim, generator=generator, dtype=torch.float64)
    return noise * float(FAMILIES[family]()[-1])


@functools.cache
def reference(name, family, steps=1200):
    """End points of the probability flow ODE from `start`, by Heun's method in log sigma.

    Returns:
        [count, dim]; how far half the steps are from them, as an RMSE.
    """
    return _heun(name, family, steps), rmse(
        _heun(name, family, steps // 2), _heun(name, family, steps)
    )


@functools.cache
def _heun(name, family, steps):
    target, levels = TARGETS[name](), FAMILIES[family]()
    x = start(name, family)
    path = np.exp(np.linspace(math.log(levels[-1]), math.log(levels[0] / 20), steps + 1))
    for now, then in itertools.pairwise(path):
        slope = (x - target.denoise(x, now)) / now
        guess = x + (then - now) * slope
        x = x + (then - now) * 0.5 * (slope + (guess - target.denoise(guess, then)) / then)
    return target.denoise(x, path[-1])


def rmse(a, b):
    return float((a - b).square().mean().sqrt())


def uniform_t(family, steps):
    """Even in timesteps, from the noisiest, then 0: what streams use."""
    levels = FAMILIES[family]()
    places = np.linspace(len(levels) - 1, 0, steps + 1)[:-1]
    return torch.tensor([*np.interp(places, np.arange(len(levels)), levels), 0.0])
