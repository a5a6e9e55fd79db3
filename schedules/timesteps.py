"""Noise levels picked from a model's own table: a list of indices, or one dial."""

import math
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

Spacing = Literal["uniform t", "log-snr", "karras", "lcm", "fast-ddpm", "ays", "ays sdxl"]
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
_RHO = 7.0  # Karras et al. 2022, equation 5
_LCM_GRID = 50  # training timesteps that LCM models were distilled on
# Sabour et al. 2024, Align Your Steps: ten steps for SD1.5 and SDXL, as its web page has them
_AYS = {
    "ays": (14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092,
            0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582),
    "ays sdxl": (14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945,
                 0.8620721141, 0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177,
                 0.0291671582),
}  # fmt: skip


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
            signal-to-noise ratio, `karras` (Karras et al. 2022, equation 5), `lcm` evenly chosen
            from the 50 timesteps of LCM distillation (diffusers, scheduling_lcm.py,
            set_timesteps), `fast-ddpm` 60 % of the steps in the noisiest 30 % of the timesteps
            (Jiang et al. 2024, non-uniform), `ays` and `ays sdxl` along the curves of Align Your
            Steps (Sabour et al. 2024).
        flow: the model is a flow model: signal is 1 - sigma.

    Returns:
        steps + 1 descending levels, the last 0, float32 on the CPU.
    """
    start = levels_below(strength, steps, len(table))
    if spacing == "uniform t":
        at = [round(start * (steps - k) / steps) - 1 for k in range(steps)]
        return _levels(table[at].tolist())
    if spacing == "lcm":
        return _levels(table[_lcm_grid(len(table), strength, steps)].tolist())
    if spacing == "fast-ddpm":
        return _levels(table[_fast_ddpm(start, steps, strength)].tolist())
    if spacing in _AYS:
        if flow:
            raise ValueError(
                f"spacing: {spacing} was made for Stable Diffusion's noise levels, and this is a "
                "flow model. Choose uniform t, log-snr or karras."
            )
        if table[start - 1] > _AYS[spacing][-1]:
            return _levels(_along(_AYS[spacing], float(table[start - 1]), steps))
        spacing = "log-snr"  # below the curve's end
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


def levels_below(strength: float, steps: int, count: int) -> int:
    """How many of a table's `count` levels lie at or below a strength; checks both settings.

    Raises:
        ValueError: no step, a strength outside 0..1, or more steps than levels.
    """
    if steps < 1:
        raise ValueError(f"steps: at least 1 step is needed, not {steps}.")
    if not 0 < strength <= 1:
        raise ValueError(
            f"strength: {strength} must be above 0 (0 would change nothing) and at most 1."
        )
    start = max(1, round(strength * count))
    if steps > start:
        raise ValueError(
            f"steps: {steps} do not fit below strength {strength}: there are {start} noise levels. "
            "Lower steps or raise strength."
        )
    return start


def _lcm_grid(count: int, strength: float, steps: int) -> list[int]:
    stride = count // _LCM_GRID
    known = max(1, int(_LCM_GRID * strength))
    if steps > known:
        raise ValueError(
            f"steps: {steps} do not fit below strength {strength}: the LCM grid has {known} levels "
            "there. Lower steps or raise strength."
        )
    return [(known - k * known // steps) * stride - 1 for k in range(steps)]


def _fast_ddpm(start: int, steps: int, strength: float) -> list[int]:
    few, top = int(0.4 * steps), start - 1
    knee, many = int(0.7 * top), steps - few
    low = [math.ceil(knee * k / few) for k in range(few)]
    high = [math.ceil(knee + (top - knee) * k / (many - 1)) for k in range(many - 1)]
    places = sorted({*low, *high, top}, reverse=True)
    if len(places) < steps:
        raise ValueError(
            f"steps: {steps} do not fit below strength {strength} with spacing fast-ddpm. "
            "Lower steps or raise strength."
        )
    return places


def _along(curve: tuple[float, ...], top: float, steps: int) -> list[float]:
    """Evenly along a falling curve of noise levels, log-linear between its points, from `top`."""
    logs, last = [math.log(level) for level in curve], len(curve) - 1

    def level(place: float) -> float:
        i = min(int(place), last - 1)
        return math.exp(logs[i] + (place - i) * (logs[i + 1] - logs[i]))

    goal = math.log(top)
    after = next((i for i in range(1, last + 1) if logs[i] < goal), last)
    begin = after - 1 + (logs[after - 1] - goal) / (logs[after - 1] - logs[after])
    begin = min(max(begin, 0.0), last - 1e-3)
    return [top, *(level(begin + (last - begin) * k / steps) for k in range(1, steps))]


def _spread(top: float, bottom: float, steps: int, into, back) -> list[float]:
    if steps == 1:
        return [top]
    a, b = into(top), into(bottom)
    inner = [back(a + (b - a) * k / (steps - 1)) for k in range(1, steps - 1)]
    return [top, *inner, bottom]


def _levels(levels: list[float]) -> Tensor:
    return torch.tensor([*levels, 0.0], dtype=torch.float32)
