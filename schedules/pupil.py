"""A few steps of a solver on given noise, and how far from its goal they end."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..engine.sequential import State, stepped
from ..engine.space import NoiseSpace
from ..engine.step_rules import Course, StepRule

# the clean prediction of x at a noise level, where the model is told level * exp(shift), and if
# there is a fourth argument, without these bodies of its network
Predict = Callable[..., Tensor]
Skips = tuple[frozenset[str], ...]


class Steps(NamedTuple):
    """Where the steps go.

    Attributes:
        levels: n + 1 descending noise levels, the last 0.
        shifts: for each model call, what is added to the logarithm of the level that the model is
            told (the decoupled time of Tong et al. 2024, section 3.3); () for none.
        skips: for each model call, names of the bodies that the network passes by; () for none.
    """

    levels: tuple[float, ...]
    shifts: tuple[float, ...] = ()
    skips: Skips = ()


class Goal(Protocol):
    """What the ends are compared with."""

    def terms(self, ends: Tensor) -> Tensor:
        """Whose mean is the error: one for each sample if they can be told apart, float64."""


class Teacher:
    """The fine solution from the same noise: terms are squared distances.

    Args:
        ends: [S, ...].
    """

    def __init__(self, ends: Tensor):
        self.ends = ends

    def residual(self, ends: Tensor) -> Tensor:
        """[S * D], on the CPU."""
        return (ends - self.ends).flatten().cpu()

    def terms(self, ends: Tensor) -> Tensor:
        return (ends - self.ends).double().square().flatten(1).mean(1).cpu()


class Run(NamedTuple):
    """A run with all that another one of the same beginning can take over."""

    course: Course
    calls: list[tuple]
    states: list[State]
    denoised: list[Tensor]

    @property
    def ends(self) -> Tensor:
        return self.states[-1].x


@dataclass
class Pupil:
    """A model, a solver and the noise it starts from.

    Args:
        predict: see Predict.
        x: [S, ...] at the first level of every schedule that is tried.
        rule: without fresh noise.
        space: the model family's.
        goal: for these samples.

    Attributes:
        calls: model evaluations so far, per sample.
    """

    predict: Predict
    x: Tensor
    rule: StepRule
    space: NoiseSpace
    goal: Goal
    calls: int = 0

    def run(self, steps: Steps, like: Run | None = None) -> Run:
        """Through the steps; model calls that `like` has made already are not made again."""
        course = Course(steps.levels, self.rule, self.space)
        shifts = steps.shifts or (0.0,) * course.n
        if len(shifts) != course.n:
            raise ValueError(f"{len(shifts)} shifts for {course.n} model calls")
        calls: list[tuple] = list(zip(course.levels, shifts, strict=True))
        if steps.skips:
            if len(steps.skips) != course.n:
                raise ValueError(f"{len(steps.skips)} choices of bodies for {course.n} model calls")
            # a call that skips nothing is the same call as ever
            calls = [
                (*call, skipped) if skipped else call
                for call, skipped in zip(calls, steps.skips, strict=True)
            ]
        same, states, denoised = 0, [State(self.x)], []
        if like is not None:
            before = like.calls
            while same < course.n and (
                calls[same] == before[same] and course.steps[same] == like.course.steps[same]
            ):
                same += 1
            states, denoised = like.states[: same + 1], like.denoised[:same]
            if same < course.n and calls[same] == before[same]:
                denoised = like.denoised[: same + 1]
        for k in range(same, course.n):
            if len(denoised) == k:
                denoised.append(self.predict(states[k].x, *calls[k]))
                self.calls += 1
            states.append(stepped(states[k], denoised[k], course, k))
        return Run(course, calls, states, denoised)

    def terms(self, steps: Steps) -> Tensor:
        """The goal's terms at the end of the steps; infinite where the solver runs away."""
        return self.judged(self.run(steps).ends)

    def judged(self, ends: Tensor) -> Tensor:
        terms = self.goal.terms(ends)
        return torch.where(terms.isfinite(), terms, torch.inf)


class Found(NamedTuple):
    """The best so far.

    Attributes:
        steps: never worse on held-out noise than the best hand-made ones.
        error: of the steps on held-out noise: the root of the mean term.
        hand_made: name and error of the best hand-made schedule on that noise.
        ends, hand_ends: of the held-out samples, [S, ...].
        done, total: rounds.
    """

    steps: Steps
    error: float
    hand_made: tuple[str, float]
    ends: Tensor
    hand_ends: Tensor
    done: int
    total: int


class Contest:
    """Hand-made schedules and their challengers, judged on held-out noise.

    A challenger must be ahead of the best hand-made one so far that luck with the noise does not
    decide, see `surely_ahead`; with few samples nobody may be.

    Args:
        train: what challengers are made on.
        held: the same with other noise.
        hands: levels of each hand-made schedule, all from the same first level; or its steps.
    """

    _FINALISTS = 4  # hand-made ones that are run on held-out noise too

    def __init__(self, train: Pupil, held: Pupil, hands: Mapping[str, Sequence[float] | Steps]):
        self.train, self.held = train, held
        made = {
            name: hand if isinstance(hand, Steps) else Steps(tuple(hand))
            for name, hand in hands.items()
        }
        trained = {name: train.terms(steps) for name, steps in made.items()}
        self.ranked = sorted(
            ((float(trained[name].mean()), name, steps) for name, steps in made.items()),
            key=lambda entry: entry[0],
        )
        finals = []
        for error, name, steps in self.ranked[: self._FINALISTS]:
            run = held.run(steps)
            terms = held.judged(run.ends)
            # they were made on neither noise, so both count
            finals.append((error + float(terms.mean()), name, steps, terms, run.ends))
        _, self.name, self.steps, self._hand, self._ends = min(finals, key=lambda entry: entry[0])
        self._best, self._hand_ends = self._hand, self._ends
        self._trained = trained[self.name]

    def offer(self, steps: Steps) -> bool:
        """Whether these steps are the best now."""
        run = self.held.run(steps)
        terms = self.held.judged(run.ends)
        if not terms.mean() < self._best.mean():
            return False
        if not surely_ahead(terms, self._hand, self._trained):
            return False
        self.steps, self._best, self._ends = steps, terms, run.ends
        return True

    def found(self, done: int, total: int) -> Found:
        error, hand = (float(terms.mean().sqrt()) for terms in (self._best, self._hand))
        return Found(self.steps, error, (self.name, hand), self._ends, self._hand_ends, done, total)


_LOST = 2  # noises that a challenger is taken to have lost unseen


def surely_ahead(terms: Tensor, hand: Tensor, elsewhere: Tensor) -> bool:
    """Whether a challenger that has the smaller mean is ahead by more than luck.

    Where paths part, a few noises carry most of the squared error, and few samples miss them. So
    what was not seen counts against the challenger. It must be ahead by a standard error of the
    difference with two more noises, on each of which it loses the most that the two differ by on
    any; and it must be ahead with one more noise on which it is as bad as the worst that was seen,
    and the hand-made one without fault. Chosen on tests/grid.py; docs/schedules.md has the figures.

    Args:
        terms: the challenger's on held-out noise, [S].
        hand: the hand-made one's there, [S].
        elsewhere: the hand-made one's on other noise, [any].
    """
    seen = torch.cat([terms, hand, elsewhere])
    if len(terms) == 1 or not seen.isfinite().all():
        return True  # samples cannot be told apart, or the hand-made one runs away
    gains = hand - terms
    lost = torch.cat([gains, -gains.abs().max().expand(_LOST)])
    luck = lost.mean() <= lost.std() / len(lost) ** 0.5
    return not luck and bool(gains.sum() > seen.max())
