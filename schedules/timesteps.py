"""Noise levels picked from a model's own table: a list of indices, or one dial."""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Spacing = Literal["uniform t", "log-snr", "karras"]
SPACINGS: tuple[Spacing, ...] = ("uniform t", "log-snr", "karras")
_RHO = 7.0  # Karras et al. 2022, equation 5


def parse_indices(text: str, grid: int) -> list[int]:
    """The numbers of an index list such as "18, 26, 35, 45".

    Raises:
        ValueError: no number, not a whole number, outside 0..grid-1, or not rising.
    """
    parts = [part for part in text.replace(";", ",").replace(" ", ",").split(",") if part]
    try:
        indices = [int(part) for part in parts]
    except ValueError:
        raise ValueError(
            f"indices: expected whole numbers separated by commas, such as 18, 26, 35, 45; "
            f"not {text!r}."
        ) from None
    if not indices:
        raise ValueError("indices: the list is empty; give at least one, such as 32.")
    if min(indices) < 0 or max(indices) >= grid:
        raise ValueError(f"indices: {indices} must lie in 0..{grid - 1} for a grid of {grid}.")
    if any(b <= a for a, b in pairwise(indices)):
        raise ValueError(f"indices: {indices} must rise from step to step (0 is the noisiest).")
    return indices


def from_indices(table: Tensor, indices: list[int], grid: int = 50) -> Tensor:
    """StreamDiffusion's t_index_list as noise levels.

    The grid is the LCM scheduler's: `grid` evenly spaced training timesteps, counted from the
    noisiest (999, 979, ..., 19 for 50 of 1000; diffusers, scheduling_lcm.py, set_timesteps).

    Args:
        table: the model's noise levels by training timestep, rising, [T].
        indices: rising, in 0..grid-1.
        grid: number of grid points, 1..T.

    Returns:
        n + 1 descending levels, the last 0, float32 on the CPU.
    """
    if not 1 <= grid <= len(table):
        raise ValueError(f"grid: {grid} must lie in 1..{len(table)}, the model's timesteps.")
    stride = len(table) // grid
    return _levels(table[[(grid - i) * stride - 1 for i in indices]].tolist())


def from_strength(
    table: Tensor, steps: int, strength: float, spacing: Spacing = "uniform t", flow: bool = False
) -> Tensor:
    """`steps` levels from `strength` down to 0.

    Args:
        table: the model's noise levels by training timestep, rising, [T].
        steps: n >= 1.
        strength: 0..1; 1 starts at the noisiest level, 0.5 at the middle timestep.
        spacing: `uniform t` even in training timesteps, `log-snr` even in the logarithm of the
            signal-to-noise ratio, `karras` (Karras et al. 2022, equation 5).
        flow: the model is a flow model: signal is 1 - sigma.

    Returns:
        steps + 1 descending levels, the last 0, float32 on the CPU.
    """
    if steps < 1:
        raise ValueError(f"steps: at least 1 step is needed, not {steps}.")
    if not 0 < strength <= 1:
        raise ValueError(
            f"strength: {strength} must be above 0 (0 would change nothing) and at most 1."
        )
    start = max(1, round(strength * len(table)))
    if steps > start:
        raise ValueError(
            f"steps: {steps} do not fit below strength {strength}: there are {start} noise levels. "
            "Lower steps or raise strength."
        )
    if spacing == "uniform t":
        at = [round(start * (steps - k) / steps) - 1 for k in range(steps)]
        return _levels(table[at].tolist())
    top, bottom = float(table[start - 1]), float(table[0])
    if spacing == "karras":
        levels = _spread(top, bottom, steps, lambda s: s ** (1 / _RHO), lambda u: u**_RHO)
    elif flow:
        # pure noise has no logarithm: there the spacing is that of the level below
        finite = min(top, float(table[-2]))
        levels = _spread(
            finite, bottom, steps, lambda s: math.log(s / (1 - s)), lambda u: 1 / (1 + math.exp(-u))
        )
        levels[0] = top
    else:
        levels = _spread(top, bottom, steps, math.log, math.exp)
    return _levels(levels)


def _spread(top: float, bottom: float, steps: int, into, back) -> list[float]:
    if steps == 1:
        return [top]
    a, b = into(top), into(bottom)
    inner = [back(a + (b - a) * k / (steps - 1)) for k in range(1, steps - 1)]
    return [top, *inner, bottom]


def _levels(levels: list[float]) -> Tensor:
    return torch.tensor([*levels, 0.0], dtype=torch.float32)
