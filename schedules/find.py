"""From a model, noise and hand-made schedules to the best steps: learned or searched; and, if asked
for, to what of the network each step can do without."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..engine.sequential import walk
from ..engine.space import NoiseSpace
from ..engine.step_rules import STEP_RULES, Course
from .architecture import Network, even, pruned
from .axis import Axis
from .frechet import Pictures
from .learned import learned
from .pupil import Contest, Found, Goal, Predict, Pupil, Steps, Teacher
from .searched import searched
from .timesteps import from_strength, levels_below

# every rule but lcm, which draws fresh noise: its end is no solution of anything
SOLVERS = tuple(name for name in STEP_RULES if name != "lcm")
TEACHER, PICTURES = "teacher", "pictures"
FINE = 100  # steps of the solution that is matched
_FINE_RULE = "dpmpp_2m"
_PROBE = 0.05  # networks are told whole timesteps, so that smaller differences are rounded away


@dataclass(frozen=True)
class Ask:
    """What is to be found.

    Attributes:
        method: `learned` or `searched`.
        solver: in SOLVERS.
        steps: n.
        strength: where runs begin, see timesteps.from_strength.
        samples: to learn on; as many again are held out.
        rounds: iterations from each start, or generations.
        seed: of noise and chance.
        population: of a generation, if searched.
        shift: also learn what time the model is told.
        goal: `teacher` or `pictures`; learned steps have a teacher.
        skip: share of the network's FLOPs that the steps leave out, if searched; below 1.
    """

    method: str
    solver: str
    steps: int
    strength: float
    samples: int
    rounds: int
    seed: int
    population: int = 0
    shift: bool = False
    goal: str = TEACHER
    skip: float = 0.0

    def top(self, table: Tensor) -> float:
        """The first level.

        Raises:
            ValueError: steps or strength out of range.
        """
        return float(table[levels_below(self.strength, self.steps, len(table)) - 1])


class Model(NamedTuple):
    """A model as schedules see it.

    Attributes:
        predict: see pupil.Predict.
        space: its family's.
        table: noise levels it was trained on, rising, [T].
        flow: whether it is a flow model.
        network: what can be left out, or None.
    """

    predict: Predict
    space: NoiseSpace
    table: Tensor
    flow: bool
    network: Network | None = None


def fine(model: Model, x: Tensor, strength: float) -> Tensor:
    """The fine solution: DPM-Solver++ 2M over 100 of the model's own timesteps.

    Args:
        x: at the first level, [S, ...].
    """
    steps = min(FINE, levels_below(strength, 1, len(model.table)))
    levels = tuple(from_strength(model.table, steps, strength).tolist())
    course = Course(levels, STEP_RULES[_FINE_RULE], model.space)
    ends = x
    for state in walk(model.predict, x, course):
        ends = state.x
    return ends


def find(
    model: Model,
    x: Tensor,
    ask: Ask,
    hands: dict[str, tuple[float, ...]],
    pictures: Tensor | None = None,
    known: Steps | None = None,
    heard: Callable[[Found, dict[str, tuple[float, float]]], None] = lambda found, errors: None,
) -> tuple[Found, dict[str, tuple[float, float]]]:
    """The best steps for a model.

    Args:
        x: noise, or noised pictures, at ask.top, [2 * samples, ...]; the second half is held out.
        hands: hand-made schedules from ask.top.
        pictures: clean latents in the model's scale, [P, ...], to tell a Frechet distance to.
        known: found before, to go on from.
        heard: is told the best so far after each round.

    Returns:
        what was found; and by goal its error on held-out noise beside that of the best hand-made
        schedule: the RMSE to the fine solution in parts of its size, and the Frechet distance.
        Where a share is to be left out, both are of steps that leave it out, and the best made by
        hand is the best of architecture.even.
    """
    if not hands:
        raise ValueError("no schedule to begin with")
    train, held = x[: ask.samples], x[ask.samples :]
    # learning for pictures needs no teacher, but is told how far from it the best ends
    ends = fine(model, x if ask.goal == TEACHER else held, ask.strength)
    goals: dict[str, Goal] = {TEACHER: Teacher(ends[-len(held) :])}
    if pictures is not None:
        goals[PICTURES] = Pictures(pictures)
    made_on = Teacher(ends[: len(train)]) if ask.goal == TEACHER else goals[ask.goal]
    rule = STEP_RULES[ask.solver]
    contest = Contest(
        Pupil(model.predict, train, rule, model.space, made_on),
        Pupil(model.predict, held, rule, model.space, goals[ask.goal]),
        hands,
    )
    size = float(ends[-len(held) :].double().square().mean().sqrt())

    def errors(found: Found) -> dict[str, tuple[float, float]]:
        def of(name: str, ends: Tensor) -> float:
            root = float(goals[name].terms(ends).mean().sqrt())
            return root / size if name == TEACHER else root

        return {name: (of(name, found.ends), of(name, found.hand_ends)) for name in goals}

    axis = Axis(ask.top(model.table), float(model.table[0]), model.flow)

    def followed(rounds: Iterator[Found], stage: int = 0) -> tuple[Found, dict]:
        for found in rounds:
            if ask.skip:
                done = found.done + stage * found.total
                found = found._replace(done=done, total=2 * found.total)
            told = errors(found)
            heard(found, told)
        return found, told

    pruned_before = known if known is not None and known.skips else None
    if pruned_before is not None:
        steps = pruned_before._replace(skips=())
    else:
        more: dict[str, Any] = {"known": known}
        if ask.method == "learned":
            rounds = learned(contest, axis, ask.rounds, ask.shift, _PROBE, **more)
        else:
            rounds = searched(contest, axis, ask.population, ask.rounds, ask.seed, **more)
        found, told = followed(rounds)
        if not ask.skip:
            return found, told
        steps = found.steps
    calls = len(rule.levels(steps.levels))
    rules = {
        name: steps._replace(skips=(skipped,) * calls)
        for name, skipped in even(model.network, ask.skip).items()
    }
    rounds = pruned(
        Contest(contest.train, contest.held, rules), axis, model.network, ask.skip,
        ask.population, ask.rounds, ask.seed, pruned_before,
    )  # fmt: skip
    return followed(rounds, 1)


def evaluations(ask: Ask, hands: int) -> int:
    """About how many sample evaluations `find` makes, for a progress bar."""
    n, per_sample = ask.steps, ask.steps * hands
    if ask.method == "learned":
        courses = 2 + 3 * ask.shift
        per_sample += courses * ask.rounds * n * (n // 2 + 2)
    else:
        per_sample += ask.population * ask.rounds * n * (1 + (ask.skip > 0))
    return ask.samples * (per_sample + 2 * FINE + n * (4 + ask.rounds))
