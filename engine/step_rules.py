"""From one noise level to the next. Each rule is a row of weights, computed once per schedule.

Every rule here is linear in what the stream batch keeps with a frame: its x, the model's clean
prediction, past predictions and the slot's noise. The weights depend on the noise levels alone, so
they are worked out in double precision on the CPU, and the ring applies any rule by the same line:

    x' = x * w.x + denoised * w.denoised + sum_i past[i] * w.past[i] + noise * w.noise
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from .space import Mix, NoiseSpace


class Weights(NamedTuple):
    """One step as a linear combination. `past[0]` weighs the prediction one step ago."""

    x: float
    denoised: float
    noise: float = 0.0
    past: tuple[float, ...] = ()


class StepRule(Protocol):
    """How a frame goes from `sigmas[k]` to `sigmas[k + 1]`."""

    history: int  # how many past predictions travel with a frame

    def weights(self, sigmas: tuple[float, ...], k: int, space: NoiseSpace) -> Weights:
        """Weights of step k, 0 <= k < len(sigmas) - 1."""


class Lcm:
    """Latent consistency: the clean prediction, noised again (Luo et al. 2023)."""

    history = 0

    def weights(self, sigmas: tuple[float, ...], k: int, space: NoiseSpace) -> Weights:
        if sigmas[k + 1] == 0:
            return Weights(0.0, 1.0)
        mix = space.mix(sigmas[k + 1])
        return Weights(0.0, mix.source, mix.noise)


class Euler:
    """Euler on the probability flow ODE, which is DDIM (Karras et al. 2022, Algorithm 2)."""

    history = 0

    def weights(self, sigmas: tuple[float, ...], k: int, space: NoiseSpace) -> Weights:
        ratio = sigmas[k + 1] / sigmas[k]
        return Weights(ratio, 1.0 - ratio)


class DpmPP2M:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2), with ComfyUI's lambda = -log sigma."""

    history = 1

    def weights(self, sigmas: tuple[float, ...], k: int, space: NoiseSpace) -> Weights:
        now, then = sigmas[k], sigmas[k + 1]
        ratio = then / now
        if k == 0 or then == 0:
            return Weights(ratio, 1.0 - ratio, past=(0.0,))
        h, h_last = math.log(now / then), math.log(sigmas[k - 1] / now)
        extra = h / (2 * h_last)
        return Weights(ratio, (1 - ratio) * (1 + extra), past=(-(1 - ratio) * extra,))


class UniPC:
    """UniPC of order 3 on predictions (Zhao et al. 2023, Algorithms 1 and 2), variant B(h) = -h.

    A step first corrects x with the prediction made there, then predicts the next x; both are
    linear in the predictions, so together they are one row of weights. As ComfyUI's `uni_pc` has
    it (comfy/extra_samplers/uni_pc.py): lambda = -log sigma, orders rise at the beginning and fall
    at the end. A last level of 0 is reached exactly, where ComfyUI stops at 0.001.
    """

    history = 3
    _ORDER = 3

    def weights(self, sigmas: tuple[float, ...], k: int, space: NoiseSpace) -> Weights:
        n = len(sigmas) - 1
        if sigmas[k + 1] == 0:
            return Weights(0.0, 1.0, past=(0.0,) * self.history)
        # of the predictions, the one made now first
        terms = np.zeros(self.history + 1)
        if k > 0:
            order = self._order(k, n)
            h, ratios = self._ratios(sigmas, k, order)
            predictor, corrector = self._rhos(h, ratios)
            terms[0] += h * corrector[-1]
            terms[1] -= h * corrector[-1]
            for i, ratio in enumerate(ratios):
                gain = h * (corrector[i] - predictor[i]) / ratio
                terms[i + 2] += gain
                terms[1] -= gain
        step = sigmas[k + 1] / sigmas[k]
        terms *= step
        terms[0] += 1 - step
        h, ratios = self._ratios(sigmas, k + 1, self._order(k + 1, n))
        predictor, _ = self._rhos(h, ratios)
        for i, ratio in enumerate(ratios):
            gain = h * predictor[i] / ratio
            terms[i + 1] += gain
            terms[0] -= gain
        return Weights(step, float(terms[0]), past=tuple(float(t) for t in terms[1:]))

    def _order(self, k: int, n: int) -> int:
        """Order of the update that leads to level k, 1 <= k <= n."""
        most = max(1, min(self._ORDER, n - 1))
        return k if k < most else min(most, n + 1 - k)

    def _ratios(self, sigmas: Sequence[float], k: int, order: int) -> tuple[float, list[float]]:
        """h of the update that leads to level k, and the places of its older predictions in h."""
        h = math.log(sigmas[k - 1] / sigmas[k])
        return h, [math.log(sigmas[k - 1] / sigmas[k - 1 - i]) / h for i in range(1, order)]

    def _rhos(self, h: float, ratios: list[float]) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients of predictor and corrector (Zhao et al. 2023, equations 5 and 9)."""
        order = len(ratios) + 1
        phi, factorial = math.expm1(-h) / -h - 1, 1
        b = np.zeros(order)
        for i in range(order):
            b[i] = phi * factorial / -h
            factorial *= i + 2
            phi = phi / -h - 1 / factorial
        matrix = np.vander([*ratios, 1.0], order, increasing=True).T
        predictor = np.array([0.5]) if order == 2 else np.linalg.solve(matrix[:-1, :-1], b[:-1])
        corrector = np.array([0.5]) if order == 1 else np.linalg.solve(matrix, b)
        return predictor, corrector


STEP_RULES: dict[str, StepRule] = {
    "lcm": Lcm(),
    "euler": Euler(),
    "dpmpp_2m": DpmPP2M(),
    "unipc": UniPC(),
}


@dataclass(frozen=True, eq=False)
class Course:
    """The way of a frame through the stream batch: its noise levels and the weights of each step.

    A frame keeps the course it entered with, so the schedule and the rule may change between two
    ticks without disturbing the frames in flight.

    Args:
        sigmas: n + 1 descending noise levels, all but the last above 0.
        rule: the step rule.
        space: the model family's noise space.
        add_noise: False lets frames enter as they are (they carry their noise already).
    """

    sigmas: tuple[float, ...]
    rule: StepRule
    space: NoiseSpace
    add_noise: bool = True
    steps: tuple[Weights, ...] = field(init=False)
    entry: Mix = field(init=False)
    unmix: float = field(init=False)

    def __post_init__(self) -> None:
        n = len(self.sigmas) - 1
        if n < 1:
            raise ValueError(f"a course needs at least two noise levels, not {len(self.sigmas)}")
        steps = tuple(self.rule.weights(self.sigmas, k, self.space) for k in range(n))
        object.__setattr__(self, "steps", steps)
        entry = self.space.entry(self.sigmas[0]) if self.add_noise else Mix(1.0, 0.0)
        object.__setattr__(self, "entry", entry)
        object.__setattr__(self, "unmix", self.space.unmix(self.sigmas[-1]))

    @property
    def n(self) -> int:
        """Number of steps, which is the number of slots."""
        return len(self.steps)

    def same_as(self, other: "Course") -> bool:
        """True if a frame would take exactly the same way."""
        return (
            self.sigmas == other.sigmas
            and self.rule is other.rule
            and self.steps == other.steps
            and self.entry == other.entry
            and self.unmix == other.unmix
        )
