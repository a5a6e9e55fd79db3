"""Steps found by evolution, for goals that have no slope.

After AutoDiffusion (Li et al. 2023, arXiv 2309.10438, section 3.2): the fittest of a population are
crossed and mutated, generation after generation. Here a schedule is a row of lambdas, the first
population is the hand-made schedules, and mutations shrink with the generations.
"""

from collections.abc import Iterator

import numpy as np

from .axis import Axis
from .pupil import Contest, Found, Steps

_PARENTS = 0.3  # of the population
_WIDE, _NARROW = 0.5, 0.05  # mutations in the first and last generation, in gaps
_FRESH = 0.1  # of the children are the result of a wide mutation, always


def searched(
    contest: Contest,
    axis: Axis,
    population: int,
    generations: int,
    seed: int = 0,
    known: Steps | None = None,
) -> Iterator[Found]:
    """The best steps so far, after each generation.

    Args:
        contest: hand-made schedules, judged.
        axis: of the levels.
        population: schedules tried in a generation, at least 4.
        generations: at least 1.
        seed: of the chances taken.
        known: another member of the first population.
    """
    chance = np.random.default_rng(seed)
    keep = max(2, round(_PARENTS * population))
    alive = [(error, axis.lambdas(steps.levels[:-1])) for error, _, steps in contest.ranked]
    if known is not None:
        alive.append(_tried(contest, axis, axis.lambdas(known.levels[:-1])))
        contest.offer(known)
    yield contest.found(0, generations)
    for generation in range(generations):
        parents = _fittest(alive, keep)
        part = generation / max(generations - 1, 1)
        width = _WIDE * (_NARROW / _WIDE) ** part
        children = [
            _tried(contest, axis, _child(parents, axis, width, chance)) for _ in range(population)
        ]
        alive = _fittest([*parents, *children], keep)
        contest.offer(Steps(axis.levels(alive[0][1])))
        yield contest.found(generation + 1, generations)


def _tried(contest: Contest, axis: Axis, lambdas: np.ndarray) -> tuple[float, np.ndarray]:
    return float(contest.train.terms(Steps(axis.levels(lambdas))).mean()), lambdas


def _fittest(alive: list[tuple[float, np.ndarray]], keep: int) -> list[tuple[float, np.ndarray]]:
    """The best that are not the same."""
    chosen: list[tuple[float, np.ndarray]] = []
    for one in sorted(alive, key=lambda entry: entry[0]):
        if all(np.abs(one[1] - other[1]).max() > 1e-3 for other in chosen):
            chosen.append(one)
        if len(chosen) == keep:
            break
    return chosen


def _child(parents, axis: Axis, width: float, chance: np.random.Generator) -> np.ndarray:
    """Crossed from two parents, better ones more often, then moved."""
    n = len(parents[0][1])
    a, b = (parents[int(len(parents) * chance.random() ** 2)][1] for _ in range(2))
    # each step from either, or all of them in between and beyond
    mix = chance.random(n) < 0.5 if chance.random() < 0.5 else chance.uniform(-0.5, 1.0)
    child = np.sort(a + mix * (b - a))
    return moved(child, axis, width, chance, low=parents[0][1][0])


def moved(
    lambdas: np.ndarray, axis: Axis, width: float, chance: np.random.Generator,
    low: float | None = None,
) -> np.ndarray:  # fmt: skip
    """Steps near these.

    Args:
        lambdas: rising, [n].
        width: how far, in the gaps beside a step.
        low: where the first belongs; by default where it is.
    """
    n = len(lambdas)
    end = axis.lambdas([axis.bottom])[0]
    gaps = np.diff([*lambdas, end])
    # a step moves by a part of the gaps beside it
    reach = np.append(0.0, np.sqrt(np.maximum(gaps[:-1] * gaps[1:], 1e-4))) if n > 1 else gaps
    if chance.random() < _FRESH:
        width = _WIDE
    moving = chance.random(n) < 0.7
    child = lambdas + width * reach * moving * chance.standard_normal(n)
    return _ordered(child, lambdas[0] if low is None else low, end)


def _ordered(lambdas: np.ndarray, low: float, end: float) -> np.ndarray:
    """Rising, apart, between the ends, and the first where it belongs."""
    least = 1e-3 * (end - low) / len(lambdas)
    inner = np.sort(np.clip(lambdas[1:], low + least, end))
    places = np.array([low, *inner])
    for k in range(1, len(places)):
        places[k] = max(places[k], places[k - 1] + least)
    return places
