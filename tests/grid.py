"""Learned and searched steps where the exact answer is known: the grid that bars are set on."""

import functools
import math

import analytic
from livediffusion.engine.step_rules import STEP_RULES
from livediffusion.schedules.axis import Axis
from livediffusion.schedules.optimized import SOLVERS as OPTIMIZED
from livediffusion.schedules.optimized import from_optimized
from livediffusion.schedules.pupil import Contest, Pupil, Steps, Teacher
from livediffusion.schedules.timesteps import SPACINGS, from_strength

SOLVERS = ("euler", "dpmpp_2m", "unipc")
STEPS = (3, 4, 5, 6, 8)
FAMILIES = ("VP", "flow")
CELLS = [(t, f, r, n) for t in analytic.TARGETS for f in FAMILIES for r in SOLVERS for n in STEPS]
TEST = 4096  # noises that the bars are judged on


def axis(family):
    levels = analytic.FAMILIES[family]()
    return Axis(float(levels[-1]), float(levels[0]), family == "flow")


@functools.cache
def hands(family, steps):
    """ComfyUI's schedules and ours."""
    import comfy.model_sampling as ms
    from livediffusion.host.learning.hand_made import fitted, of_comfyui

    flow = family == "flow"
    kinds = (ms.ModelSamplingDiscreteFlow, ms.CONST) if flow else (ms.ModelSamplingDiscrete, ms.EPS)
    sampling = type("Sampling", kinds, {})()
    table = analytic.table(family)
    if family == "EDM":
        sampling.set_sigmas(table)
    ours = {}
    for spacing in SPACINGS:
        if not (flow and spacing.startswith("ays")):
            ours[spacing] = from_strength(table, steps, 1.0, spacing, flow)
    for solver in OPTIMIZED:
        ours[f"optimized {solver}"] = from_optimized(table, solver, steps, 1.0, flow)
    return fitted([*of_comfyui(sampling, flow, steps), *ours.items()], steps, float(table[-1]))


def pupil(name, family, rule, count, seed):
    return Pupil(
        analytic.predictor(name, family),
        analytic.start(name, family, count, seed),
        STEP_RULES[rule],
        analytic.Space(family),
        Teacher(analytic.reference(name, family, count, seed)),
    )


def contest(name, family, rule, steps, samples):
    """Noises 1 are learned on, noises 2 held out."""
    train, held = (pupil(name, family, rule, samples, seed) for seed in (1, 2))
    return Contest(train, held, hands(family, steps))


def _error(name, family, rule, steps, count):
    """RMSE on noises that nothing has seen."""
    return float(pupil(name, family, rule, count, 0).terms(steps).mean().sqrt())


@functools.cache
def _hand_errors(name, family, rule, steps, count):
    return {
        hand: _error(name, family, rule, Steps(levels), count)
        for hand, levels in hands(family, steps).items()
    }


def judged(name, family, rule, steps, found, count=TEST):
    """RMSE on noises that nothing has seen, relative to the hand-made schedule that is best there;
    and whose that is."""
    errors = _hand_errors(name, family, rule, steps, count)
    best = min(errors, key=errors.get)
    return _error(name, family, rule, found, count) / errors[best], best


def geometric(ratios):
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def samples(name):
    """The mixture's errors have a heavy tail: a hundredth of the noises, those that end in another
    cluster, carry two thirds of the squared error. So it takes more of them."""
    return 2048 if name == "mixture" else 256
