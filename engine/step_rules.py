"""From one noise level to the next. Each rule is a row of weights, computed once per schedule.

Every rule here is linear in what the stream batch keeps with a frame: its x, the model's clean
prediction, past predictions and the slot's noise. The weights depend on the noise levels alone, so
they are worked out in double precision on the CPU, and the ring applies any rule by the same line:

    x' = x * w.x + denoised * w.denoised + sum_i past[i] * w.past[i] + noise * w.noise
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

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


STEP_RULES: dict[str, StepRule] = {"lcm": Lcm(), "euler": Euler(), "dpmpp_2m": DpmPP2M()}


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
