"""Noise levels that minimise a bound on the solver's error; no model is called.

Xue et al. 2024, "Accelerating Diffusion Sampling with Optimized Time Steps" (arXiv 2402.17376):
an exponential-integrator solver's last x is a linear combination of the model's predictions; how
far each of them may be off at its noise level is modelled, and the sum of the errors so weighted is
minimised over the steps in between. Everything is in lambda = log(alpha / sigma), minus the
logarithm of the noise-to-signal ratio, so it holds for every noise family.
"""

import functools
import itertools
import math

import numpy as np
import torch
from torch import Tensor

from .axis import Axis
from .timesteps import levels_below

SOLVERS = {"unipc": 3, "dpmpp_2m": 2, "euler": 1}  # the order of each
# terms of the first steps are added by themselves, which keeps the bound from cancelling itself
# away there (the authors' code, truncNum)
_ALONE = 3
_SMOOTHING = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 1e-4)


def error_bound(lambdas: np.ndarray, order: int, power: float = 2.0, smooth: float = 0.0) -> float:
    """The objective (Xue et al. 2024, equation 16), as the authors' code has it.

    Args:
        lambdas: n + 1 rising half log-SNRs, the ends included.
        order: of the solver, 1 to 3; lower in the first and last steps.
        power: the model's error at a level is sigma^power / alpha: 2 for latents, 1 for pixels.
        smooth: rounds off the corners of the absolute values, 0 for none.
    """
    n = len(lambdas) - 1
    error = (1 + np.exp(2 * lambdas)) ** (-power / 2) * np.sqrt(1 + np.exp(-2 * lambdas))
    growth, h = np.exp(lambdas), np.diff(lambdas)
    used = np.minimum(np.minimum(np.arange(n) + 1, n - np.arange(n)), order)
    alone, weights = 0.0, np.zeros(n)
    for count in range(1, order + 1):
        steps = np.flatnonzero(used == count)
        if len(steps) == 0:
            continue
        terms = _coefficients(h, growth, steps, count)
        places = steps[:, None] + np.arange(1 - count, 1)
        terms = terms * error[places]
        apart = np.ones(len(steps), bool) if count == 1 else steps < _ALONE
        alone += float(np.sqrt((terms[apart] ** 2).sum(1)).sum())
        np.add.at(weights, places[~apart], terms[~apart])
    return alone + float(np.sqrt(weights**2 + smooth**2).sum())


def _coefficients(h: np.ndarray, growth: np.ndarray, steps: np.ndarray, count: int) -> np.ndarray:
    """Weights of the last `count` predictions in each of these steps, oldest first, [S, count]:
    the integral of exp(lambda) times the Lagrange polynomials through them (equation 11)."""
    last, scale = h[steps], growth[steps]
    h0 = np.expm1(last)
    if count == 1:
        return (scale * h0)[:, None]
    h1 = np.exp(last) * last - h0
    b = h[steps - 1]
    if count == 2:
        return (scale / b)[:, None] * np.stack([-h1, h1 + b * h0], 1)
    h2 = np.exp(last) * last * last - 2 * h1
    a = h[steps - 2]
    terms = [
        (h2 + b * h1) / (a * (a + b)),
        -(h2 + (a + b) * h1) / (a * b),
        (h2 + (2 * b + a) * h1 + b * (a + b) * h0) / (b * (a + b)),
    ]
    return scale[:, None] * np.stack(terms, 1)


def optimized(start: np.ndarray, order: int, power: float = 2.0) -> np.ndarray:
    """The steps between two ends that minimise the bound.

    The bound has corners, on which the paper's constrained trust region stops early and at a place
    that depends on rounding. Here the corners are rounded off less and less while L-BFGS follows
    the minimum, in the logarithms of the gaps, so that steps always rise.

    Args:
        start: n + 1 rising half log-SNRs to begin with; the ends stay.
        order: of the solver, 1 to 3.
        power: see error_bound.

    Returns:
        n + 1 strictly rising half log-SNRs, whose bound is at most that of `start`.
    """
    from scipy.optimize import minimize

    start = np.asarray(start, np.float64)
    low, span = start[0], start[-1] - start[0]

    def placed(gaps: np.ndarray) -> np.ndarray:
        # a gap below a thousandth of an even one is none
        shares = np.exp(gaps - gaps.max()) + 1e-3
        inner = low + span * np.cumsum(shares / shares.sum())[:-1]
        return np.concatenate([[low], inner, [start[-1]]])

    best, bound = start, error_bound(start, order, power)
    gaps, scale = np.log(np.diff(start) / span), bound / len(start)
    for smooth in _SMOOTHING:
        found = minimize(
            lambda g, s=smooth: error_bound(placed(g), order, power, s * scale), gaps,
            method="L-BFGS-B", options={"maxiter": 40},
        )  # fmt: skip
        gaps = found.x - found.x.mean()
        value = error_bound(placed(gaps), order, power)
        if value < bound:
            best, bound = placed(gaps), value
    return best


def from_optimized(
    table: Tensor, solver: str, steps: int, strength: float = 1.0, flow: bool = False
) -> Tensor:
    """Optimised levels of a model from `strength` down to 0.

    Args:
        table: the model's noise levels by training timestep, rising, [T].
        solver: a name in SOLVERS.
        steps: n >= 1.
        strength: 0..1; 1 starts at the noisiest level, 0.5 at the middle timestep.
        flow: the model is a flow model: signal is 1 - sigma.

    Returns:
        steps + 1 strictly descending levels, the last 0, float32 on the CPU.
    """
    start = levels_below(strength, steps, len(table))
    top = float(table[start - 1])
    if steps == 1:
        return torch.tensor([top, 0.0])
    axis = Axis(top, float(table[0]), flow)
    # even in timesteps to begin with, as the paper has it for latents
    places = np.linspace(start - 1, 0, steps + 1)
    begin = np.interp(places, np.arange(start), axis.lambdas(table[:start].double()))
    lambdas = np.array(_solved(tuple(np.round(begin, 9)), SOLVERS[solver]))
    return torch.tensor(axis.levels(lambdas[:-1]), dtype=torch.float32)


def bound(table: Tensor, levels: Tensor, solver: str, flow: bool = False) -> float:
    """The error bound of any levels, n + 1 down to 0, for comparing them."""
    axis = Axis(float(levels[0]), float(table[0]), flow)
    lowest = min(axis.bottom, float(levels[-2]) * 0.99)
    return error_bound(axis.lambdas([*levels[:-1].tolist(), lowest]), SOLVERS[solver])


@functools.lru_cache(maxsize=256)
def _solved(start: tuple[float, ...], order: int) -> tuple[float, ...]:
    if math.isclose(start[0], start[-1]) or any(b <= a for a, b in itertools.pairwise(start)):
        return start
    return tuple(optimized(np.array(start), order).tolist())
