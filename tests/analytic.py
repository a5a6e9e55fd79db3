"""Denoisers in closed form: distributions whose exact answer is known.

Everything in float64. A target is told x = x0 + s * noise; a family puts it in ComfyUI's units, and
its models are told their time as ComfyUI tells it. A flow model's sigma is s / (1 + s) and its x is
x / (1 + s): the same path in other units (Lipman et al. 2023).
"""

import functools
import itertools
import math

import numpy as np
import torch
from livediffusion.engine.space import Mix
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


def mixture(clusters=12, dim=16, width=0.35, seed=5):
    """Equal clusters at drawn places."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(clusters, dim, generator=generator, dtype=torch.float64)
    return Points(points, width)


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
# mixtures that nothing was made on: clusters, dimensions, width, seed
_OTHERS = (
    (2, 2, 0.3, 11), (5, 8, 0.25, 12), (12, 16, 0.35, 13), (8, 32, 0.2, 14), (30, 32, 0.35, 15),
    (60, 64, 0.3, 16), (3, 4, 0.1, 17), (20, 8, 0.5, 18),
)  # fmt: skip
OTHERS = {
    f"{clusters} clusters in {dim}": functools.partial(mixture, clusters, dim, width, seed)
    for clusters, dim, width, seed in _OTHERS
}
target = functools.cache(lambda name: (TARGETS | OTHERS)[name]())


def vp_levels():
    """Stable Diffusion's noise levels by training timestep, rising, [1000]."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)
    return np.sqrt((1 - kept) / kept)


def edm_levels():
    """Those of EDM, Karras et al. 2022, table 1, as ComfyUI puts them in a table."""
    return np.exp(np.linspace(math.log(0.002), math.log(80), 1000))


FAMILIES = {"VP": vp_levels, "EDM": edm_levels, "flow": lambda: np.arange(1, 1001) / 1000}


class Space:
    """NoiseSpace of a family."""

    def __init__(self, family):
        self.flow = family == "flow"

    def mix(self, sigma):
        return Mix(1 - sigma if self.flow else 1.0, sigma)

    entry = mix

    def unmix(self, sigma):
        return 1 / (1 - sigma) if self.flow else 1.0


def table(family):
    return torch.tensor(FAMILIES[family]())


def predictor(name, family):
    """The clean prediction of (x, sigma, shift), through what a network would give: the noise, or
    the velocity of a flow model, at the time of sigma * exp(shift)."""
    one = target(name)
    if family != "flow":

        def predict(x, sigma, shift=0.0):
            told = sigma * math.exp(shift)
            # the network's input has unit variance at either level
            y = x * math.sqrt((1 + told**2) / (1 + sigma**2))
            return x - sigma * (y - one.denoise(y, told)) / told

        return predict

    def predict_flow(x, sigma, shift=0.0):
        told = min(sigma * math.exp(shift), 1.0)
        left = max(1 - told, 1e-6)  # pure noise says nothing: the prediction is the mean
        return x - sigma * (x - one.denoise(x / left, told / left)) / told

    return predict_flow


@functools.cache
def start(name, family, count=64, seed=0):
    """Noise at the highest level, [count, dim]; seed 0 is held out from all learning."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, target(name).dim, generator=generator, dtype=torch.float64)
    return noise * float(FAMILIES[family]()[-1])


@functools.cache
def reference(name, family, count=64, seed=0, steps=200):
    """End points of the probability flow ODE from `start`, by Runge-Kutta's fourth order.

    dx / dlog(sigma) = x - D(x, sigma) in every family (Karras et al. 2022, equation 3).

    Returns:
        [count, dim].
    """
    predict, levels = predictor(name, family), FAMILIES[family]()
    low, high = levels[0] / 20, levels[-1]
    if family == "flow":
        ratio = np.exp(np.linspace(math.log(1e4), math.log(low), steps))
        path = np.array([1.0, *ratio / (1 + ratio)])
    else:
        path = np.exp(np.linspace(math.log(high), math.log(low), steps + 1))
    x = start(name, family, count, seed)
    for now, then in itertools.pairwise(path):
        h, middle = math.log(then / now), math.sqrt(now * then)
        a = x - predict(x, now)
        b = (y := x + 0.5 * h * a) - predict(y, middle)
        c = (y := x + 0.5 * h * b) - predict(y, middle)
        d = (y := x + h * c) - predict(y, then)
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return predict(x, path[-1])


def rmse(a, b):
    return float((a - b).square().mean().sqrt())


def uniform_t(family, steps):
    """Even in timesteps, from the noisiest, then 0: what streams use."""
    levels = FAMILIES[family]()
    places = np.linspace(len(levels) - 1, 0, steps + 1)[:-1]
    return torch.tensor([*np.interp(places, np.arange(len(levels)), levels), 0.0])


def karras(family, steps):
    """Karras et al. 2022, equation 5, between the first and last noise level, then 0."""
    levels = FAMILIES[family]()
    roots = np.linspace(levels[-1] ** (1 / 7), levels[0] ** (1 / 7), steps)
    return torch.tensor([*roots**7, 0.0])


def exact_frechet(family, solve):
    """Squared Frechet distance of a solver's ends to the power law itself, without sampling.

    Args:
        solve: from x at the highest level, [1, dim], to the end; linear for a Gaussian target.
    """
    gaussian = target("power law")
    top = torch.full((1, gaussian.dim), float(FAMILIES[family]()[-1]), dtype=torch.float64)
    # C is diagonal, so each coordinate of the noise is scaled by itself
    spread = solve(top)[0].abs()
    return float((spread - gaussian.variance.sqrt()).square().sum())
