"""The weights of a tick, for models whose prediction is linear in what they return.

ComfyUI's denoisers are: the model sees x * input, and x0 = x * of_x + output * of_output, with
numbers that depend on the noise level alone. Residual guidance (engine.guidance), the step rules
(engine.step_rules) and re-noising are linear too, so the whole tick is one weighted sum per row.
Its weights are worked out here in double precision, once per layout of rows and setting of the
guider, by putting what each part is a sum of into the next.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .guidance import Guidance, Which, guided, residual_negative
from .plan import Plan
from .step_rules import Weights
from .sums import Sum
from .upload import uploaded

Levels = Callable[[float], "Level"]
_TERMS = {
    "off": (), "self-negative": ("reference",), "onetime-negative": ("reference",),
    "full": ("negative",),
}  # fmt: skip


class Level(NamedTuple):
    """A model at one noise level: what it sees, and what its output means."""

    input: float  # the model sees x * input
    of_x: float  # x0 = x * of_x + output * of_output
    of_output: float
    timestep: float

    def prediction(self, output: str = "output") -> Sum:
        """x0, as a sum of x and an output of that name."""
        return Sum({"x": self.of_x, output: self.of_output})


@dataclass
class Fold:
    """The weights of a tick in one tensor, the dial; the others are views of it.

    Folds of one `form` are put in each other's place by copying dial and base.
    """

    form: tuple[tuple[str, int], ...]
    which: Which
    dial: Tensor  # 1-D, float32
    base: Tensor | None  # noise of the step, [planes, R, C, H, W]; all but the last plane are 0
    dims: int
    key: tuple = ()
    holds: Any = None  # what the key names by id

    def __post_init__(self) -> None:
        parts, at = {}, 0
        for name, count in self.form:
            parts[name] = self.dial[at : at + count]
            at += count

        def columns(name: str, *lead: int) -> Tensor:
            return parts[name].view(*lead, -1, *[1] * self.dims)

        self.sigma = parts["sigma"]  # [R]
        self.timestep = parts["timestep"]  # [M]
        rows = self.sigma.shape[0]
        self.gain = columns("gain", parts["gain"].shape[0] // rows)  # [planes, R, 1, 1, 1]
        self.weights = {  # by target and term, each [R, 1, 1, 1]
            target: {
                name.split(".")[1]: columns(name) for name in parts if name.startswith(f"{target}.")
            }
            for target in ("after", "denoised", "kept", "entered", "carried")
        }
        # the same side by side, [terms, R], for the kernels
        self.after, self.kept, self.own = (self._block(p) for p in ("after", "kept", "entered"))
        # of the source in x, and in the source itself, [2, 1, 1, 1, 1]
        self.mix = columns("mix", 2) if "mix" in parts else None

    def _block(self, prefix: str) -> Tensor | None:
        counts = [count for name, count in self.form if name.startswith(f"{prefix}.")]
        if not counts:
            return None
        names = [name.startswith(f"{prefix}.") for name, _ in self.form]
        start = sum(count for _, count in self.form[: names.index(True)])
        return self.dial[start : start + sum(counts)].view(len(counts), -1)

    def at(self, dial: Tensor, base: Tensor | None) -> "Fold":
        """The same weights with their values elsewhere."""
        return Fold(self.form, self.which, dial, base, self.dims)


def fold(plan: Plan, guidance: Guidance, which: Which, levels: Levels) -> Fold:
    """The weights for a layout of rows; kept with it until the settings change.

    Args:
        which: negative rows in the call (engine.linear.Linear).
        levels: gives the Level of a sigma; the same object as long as the model means the same.
    """
    key = (id(levels), which, guidance.mode, guidance.cfg, guidance.delta)
    known = plan.fold
    if known is None or known.key != key:
        known = plan.fold = _fold(plan, guidance, which, levels, key)
    return known


def _fold(plan: Plan, guidance: Guidance, which: Which, levels: Levels, key: tuple) -> Fold:
    rows, entered = plan.steps, plan.entered
    known = [levels(sigma) for sigma, _ in rows]
    sums = [_sums(step, level, guidance) for (_, step), level in zip(rows, known, strict=True)]
    copies = 2 if which == "all" else 1
    timesteps = [level.timestep for level in known] * copies
    if which == "entered":
        timesteps += timesteps[entered]
    parts = {
        "sigma": [sigma for sigma, _ in rows],
        "timestep": timesteps,
        "gain": [level.input for level in known] * copies
        + [each["after"].get("x", 0.0) for each in sums],
    }
    past = [f"past{i}" for i in range(plan.history)]
    # full guidance of scale 1 asks for no negative
    plain = which == "none" and guidance.mode == "full"
    mine = ["output", *_TERMS["off" if plain else guidance.mode]]
    for target, names in (
        ("after", [*mine, *past]),
        ("denoised", ["x", *mine]),
        ("kept", ["x", *mine, *past[:1]] if past else []),
    ):
        for name in names:
            parts[f"{target}.{name}"] = [each[target].get(name, 0.0) for each in sums]
    # of a prediction, in the step and in what is remembered
    for name in ("after", "kept") if past else ("after",):
        parts[f"carried.{name}"] = [each["carried"][name] for each in sums]
    if which == "entered":
        for name in ("x", "output"):
            parts[f"entered.{name}"] = [level.prediction()[name] for level in known[entered]]
    if plan.mix is not None:
        parts["mix"] = [plan.mix.source, 1.0]
    base = None if plan.planes is None else plan.planes[-copies - 1 :]
    numbers = torch.tensor([value for part in parts.values() for value in part])
    form = tuple((name, len(part)) for name, part in parts.items())
    return Fold(form, which, uploaded(numbers, plan.device), base, plan.dims, key, levels)


def _sums(step: Weights, level: Level, guidance: Guidance) -> dict[str, Sum]:
    """Of one row: what x', the guided prediction and what is remembered take of each term.

    The negative is `negative`, another output of the model, or what `reference` stands for; both
    go through the very functions that guide predictions on the other roads.
    """
    denoised = level.prediction()
    if guidance.mode == "full":
        denoised = guided(denoised, level.prediction("negative"), guidance.cfg)
    elif guidance.mode != "off":
        negative = residual_negative(Sum(x=1.0), Sum(reference=1.0), guidance.delta)
        denoised = guided(denoised, negative, guidance.cfg)
    return {
        "after": step.after.put("denoised", denoised),
        "denoised": denoised,
        "kept": step.kept.put("denoised", denoised),
        "carried": {"after": step.denoised, "kept": step.keep.denoised},
    }
