"""Noise levels of every family of models, for tests."""

import math

import torch


def discrete_table():
    """Stable Diffusion's noise levels by training timestep, as its paper defines them."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    return ((1 - kept) / kept).sqrt().float()


def flow_table(shift=1.0, count=1000):
    t = torch.arange(1, count + 1) / count
    return shift * t / (1 + (shift - 1) * t)


TABLES = {
    "discrete": (discrete_table(), False),
    "flow": (flow_table(), True),
    "flow shifted": (flow_table(3.0), True),
    "flow fine": (flow_table(1.15, 10000), True),
    "edm": (torch.linspace(math.log(0.002), math.log(120), 1000).exp(), False),
}
