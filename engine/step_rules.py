"""From one noise level to the next. Each rule is a row of weights, computed once per schedule.

Every rule here is linear in what the stream batch keeps with a frame: its x, the model's clean
prediction, what it remembers and the slot's noise. The weights depend on the noise levels alone, so
they are worked out in double precision on the CPU. `Weights.after` and `Weights.kept` are the step:
whoever takes one hands them to engine.sums, with tensors of those names or with what these are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from .space import Mix, NoiseSpace
from .sums import Sum


class Keep(NamedTuple):
    """What of a step is remembered; by default the prediction."""

    x: float = 0.0
    denoised: float = 1.0
    past: float = 0.0


class Weights(NamedTuple):
    """One step as a linear combination. `past[0]` weighs what the step before kept."""

    x: float
    denoised: float
    noise: float = 0.0
    past: tuple[float, ...] = ()
    keep: Keep = Keep()

    @property
    def after(self) -> Sum:
        """The x that a step leads to, of x, denoised, noise, past0 (the newest), past1, ..."""
        past = {f"past{i}": weight for i, weight in enumerate(self.past)}
        return Sum({"x": self.x, "denoised": self.denoised, "noise": self.noise, **past})

    @property
    def kept(self) -> Sum:
        """What becomes past0; what was it becomes past1, and so on."""
        keep = self.keep
        return Sum({"x": keep.x, "denoised": keep.denoised, "past0": keep.past})


class StepRule(Protocol):
    """How a frame goes through a schedule, one model call per step."""

    history: int  # how many kept tensors travel with a frame
    draws: bool  # noise at its steps

    def levels(self, sigmas: tuple[float, ...]) -> tuple[float, ...]:
        """The noise levels at which the model is called, one for each step."""

    def weights(self, sigmas: tuple[float, ...], k: int, space: NoiseSpace) -> Weights:
        """Weights of step k, 0 <= k < len(levels(sigmas))."""


class _EveryLevel:
    """One call at every noise level but the last."""

    draws = False

    def levels(self, sigmas: tuple[float, ...]) -> tuple[float, ...]:
        return sigmas[:-1]


class Lcm(_EveryLevel):
    """Latent consistency: the clean prediction, noised again (Luo et al. 2023)."""

    history = 0
    draws = True

    def weights(self, sigmas: tuple[float, ...], k: int, space: NoiseSpace) -> Weights:
        if sigmas[k + 1] == 0:
            return Weights(0.0, 1.0)
        mix = space.mix(sigmas[k + 1])
        return Weights(0.0, mix.source, mix.noise)


class Euler(_EveryLevel):
    """Euler on the probability flow ODE, which is DDIM (Karras et al. 2022, Algorithm 2)."""

    history = 0

    def weights(self, sigmas: tuple[float, ...], k: int, space: NoiseSpace) -> Weights:
        ratio = sigmas[k + 1] / sigmas[k]
        return Weights(ratio, 1.0 - ratio)


class DpmPP2M(_EveryLevel):
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


class UniPC(_EveryLevel):
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


class Deis(_EveryLevel):
    """DEIS of order 3 (Zhang & Chen 2023, equation 15): the noise is extrapolated by the Lagrange
    polynomial through its last values, in the time of a linear VP schedule.

    As ComfyUI's `deis` has it (comfy/k_diffusion/deis.py, `tab`), its sum over the same points in
    place of the integral included. It remembers the noise (x - denoised) / sigma.
    """

    history = 2
    _POINTS = 10_000
    _FIRST, _LOWEST, _HIGHEST = 1e-3, 0.002, 80.0  # time 0 and the levels of time 0 and 1

    def weights(self, sigmas: tuple[float, ...], k: int, space: NoiseSpace) -> Weights:
        now, then = sigmas[k], sigmas[k + 1]
        keep = Keep(1 / now, -1 / now)
        order = 1 if then <= 0 else min(3, k + 1)
        gains = [then - now]
        if order > 1:
            gains = self._gains(self._times(sigmas[: k + 2]), order)
        past = (*gains[1:], *[0.0] * (1 + self.history - order))
        return Weights(1 + gains[0] / now, -gains[0] / now, past=past, keep=keep)

    @property
    def _betas(self) -> tuple[float, float]:
        low, high = (math.log(level**2 + 1) for level in (self._LOWEST, self._HIGHEST))
        slope = 2 * (low / self._FIRST - high) / (self._FIRST - 1)
        return high - 0.5 * slope, slope

    def _times(self, sigmas: Sequence[float]) -> list[float]:
        first, slope = self._betas
        return [
            (math.sqrt(first**2 + 2 * slope * math.log(s**2 + 1)) - first) / slope for s in sigmas
        ]

    def _gains(self, times: list[float], order: int) -> list[float]:
        """Of the noise now and before, newest first."""
        first, slope = self._betas
        t = np.linspace(times[-2], times[-1], self._POINTS)
        alpha = np.exp(-0.5 * t**2 * slope - t * first)
        # d sigma / dt, from sigma^2 = 1 / alpha - 1
        rate = 0.5 * (t * slope + first) / np.sqrt(alpha * (1 - alpha))
        known = times[-2 : -2 - order : -1]
        gains = []
        for one in known:
            others = [other for other in known if other != one]
            lagrange = np.prod([(t - other) / (one - other) for other in others], axis=0)
            gains.append(float((rate * lagrange).sum() * (times[-1] - times[-2]) / self._POINTS))
        return gains


class PFDiff:
    """PFDiff-k_h over Euler (Wang et al. 2025, arXiv 2408.08822, Algorithm 1): k + 1 steps of the
    schedule share a call.

    The noise seen last, e, carries x over h steps to a springboard; the model is called there, and
    the noise that it sees carries x over k + 1 steps. The first step is an ordinary one. All steps
    along one noise lie on a line c + level * e. A frame's x is the springboard, and it remembers c,
    the line's end at level 0: it has a clean latent's size, so that float32 loses nothing of it
    where levels are in the thousands. With the prediction d at a springboard the noise turns to
    e' = e + (c - d) / call; both lines meet at the level `at`, so c' = c + at * (e - e').

    Args:
        k: steps skipped per call, at least 1.
        h: steps to the springboard, 1 to k.
    """

    history = 1
    draws = False

    def __init__(self, k: int, h: int):
        if not 1 <= h <= k:
            raise ValueError(f"h: {h} must lie in 1..k, and k is {k}.")
        self.k, self.h = k, h

    def _blocks(self, n: int) -> list[tuple[int, int, int]]:
        """Places in the schedule: where x is, where the model is called, where x goes."""
        blocks, at = [(0, 0, 1)], 1
        while at < n:
            to = min(at + self.k + 1, n)
            # the last call lies before the end: there is no noise left there
            blocks.append((at, min(at + self.h, to - 1), to))
            at = to
        return blocks

    def calls(self, n: int) -> list[int]:
        """Which of n + 1 levels the model is called at."""
        return [call for _, call, _ in self._blocks(n)]

    def levels(self, sigmas: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sigmas[call] for call in self.calls(len(sigmas) - 1))

    def weights(self, sigmas: tuple[float, ...], k: int, space: NoiseSpace) -> Weights:
        blocks = self._blocks(len(sigmas) - 1)
        at, call, to = (sigmas[i] for i in blocks[k])
        following = sigmas[blocks[k + 1][1]] if k + 1 < len(blocks) else to
        # c' = d * turn + c * (1 - turn), and x' = c' + following * e' with e' = (x - d) / call
        turn, ratio = at / call, following / call
        keep = Keep(0.0, turn, 1.0 - turn)
        return Weights(ratio, turn - ratio, past=(1.0 - turn,), keep=keep)


STEP_RULES: dict[str, StepRule] = {
    "lcm": Lcm(),
    "euler": Euler(),
    "dpmpp_2m": DpmPP2M(),
    "unipc": UniPC(),
    "deis": Deis(),
    "pfdiff-1_1": PFDiff(1, 1),
    "pfdiff-2_1": PFDiff(2, 1),
    "pfdiff-3_1": PFDiff(3, 1),
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
    levels: tuple[float, ...] = field(init=False)  # of the model calls
    steps: tuple[Weights, ...] = field(init=False)
    entry: Mix = field(init=False)
    unmix: float = field(init=False)

    def __post_init__(self) -> None:
        if len(self.sigmas) < 2:
            raise ValueError(f"a course needs at least two noise levels, not {len(self.sigmas)}")
        if min(self.sigmas[:-1]) <= 0:
            raise ValueError(f"noise levels before the last must be above 0, not {self.sigmas}")
        levels = self.rule.levels(self.sigmas)
        object.__setattr__(self, "levels", levels)
        steps = tuple(self.rule.weights(self.sigmas, k, self.space) for k in range(len(levels)))
        object.__setattr__(self, "steps", steps)
        entry = self.space.entry(self.sigmas[0]) if self.add_noise else Mix(1.0, 0.0)
        object.__setattr__(self, "entry", entry)
        object.__setattr__(self, "unmix", self.space.unmix(self.sigmas[-1]))

    @property
    def n(self) -> int:
        """Number of model calls, which is the number of slots."""
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
