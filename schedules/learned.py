"""Steps learned from the model itself, by distilling a fine solution.

After LD3 (Tong et al. 2024, arXiv 2405.15506): increments of lambda are a softmax, so steps always
descend, and what is minimised is the distance between the end of a few steps and the end of many,
from the same noise. The n unknowns (2n with shifts of the time that the model is told, section 3.3)
are so few that no gradient has to flow through the model: differences along each of them, which
share all model calls before the step they move, give the Jacobian, and Levenberg-Marquardt follows
it. That takes the memory of sampling, and works on whatever ComfyUI can sample.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

from .axis import Axis
from .pupil import Contest, Found, Pupil, Run, Steps

_SHIFT = 0.7  # the most that a shift may be: a factor of 2
_APART = 0.15  # starts nearer than this in lambda are the same
_STARTS = 2
_REACH, _NEAR = 0.8, 0.1  # in logarithms of gaps, how far to look around, first and last
_TRIES = 6  # dampings of one step
_GAIN = 1e-4  # a round that gains less is the last


def learned(
    contest: Contest,
    axis: Axis,
    iterations: int,
    shift: bool = False,
    probe: float = 1e-3,
    known: Steps | None = None,
) -> Iterator[Found]:
    """The best steps so far, after each round.

    Args:
        contest: hand-made schedules, judged; its pupils' goal is a Teacher.
        axis: of the levels.
        iterations: rounds from each start, at least 1.
        shift: also learn what time the model is told.
        probe: length of the differences in lambda; longer for a model that rounds.
        known: another start.
    """
    starts = _apart([steps for _, _, steps in contest.ranked], axis)
    if known is not None:
        starts = [known, *starts]
        contest.offer(known)
    # with shifts from the best so far, and from where the others began
    courses = [(steps, False) for steps in starts]
    courses += [(steps, True) for steps in (None, *starts)] if shift else []
    total, done = len(courses) * iterations, 0
    yield contest.found(done, total)
    for i, (start, shifting) in enumerate(courses):
        start = start or contest.steps
        for steps in _descent(contest.train, axis, start, iterations, shifting, probe):
            contest.offer(steps)
            done += 1
            yield contest.found(done, total)
        done = (i + 1) * iterations
    yield contest.found(total, total)


def _apart(ranked: list[Steps], axis: Axis) -> list[Steps]:
    """The first of them that differ."""
    starts: list[Steps] = []
    for steps in ranked:
        places = axis.lambdas(steps.levels[:-1])
        if all(np.abs(places - axis.lambdas(s.levels[:-1])).max() > _APART for s in starts):
            starts.append(steps)
        if len(starts) == _STARTS:
            break
    return starts


def _descent(
    pupil: Pupil, axis: Axis, start: Steps, rounds: int, shifting: bool, probe: float
) -> Iterator[Steps]:
    """Levenberg-Marquardt from a start; yields what each round improved."""
    n = len(start.levels) - 1
    if n == 1 and not shifting:
        return  # nothing to move
    shares = axis.shares(start.levels)
    calls = len(pupil.rule.levels(start.levels)) if shifting else 0
    z = np.concatenate([shares, np.zeros(calls)])
    if calls and start.shifts:
        z[n:] = np.arctanh(np.array(start.shifts) / _SHIFT)

    def steps_at(z: np.ndarray) -> Steps:
        shifts = tuple((_SHIFT * np.tanh(z[n:])).tolist())
        return Steps(axis.levels(axis.placed(z[:n])), shifts)

    def residual(steps: Steps, like: Run | None = None) -> tuple[Run, torch.Tensor, float]:
        run = pupil.run(steps, like)
        r = pupil.goal.residual(run.ends)
        loss = float(r.double().square().sum())
        return run, r, loss if math.isfinite(loss) else math.inf

    run, r, loss = residual(steps_at(z))
    damping, reach = 1e-2, _REACH
    for _ in range(rounds):
        steps, slopes, before = steps_at(z), _slopes(z, n, axis), loss
        columns = [
            (pupil.goal.residual(pupil.run(moved, run).ends) - r) / by
            for moved, by in _moves(steps, axis, probe)
        ]
        jacobian = torch.stack(columns, 1)
        normal = slopes.T @ (jacobian.T @ jacobian).double().numpy() @ slopes
        pull = slopes.T @ (jacobian.T @ r).double().numpy()
        scale = np.trace(normal) / len(normal)
        known = np.isfinite(normal).all() and np.isfinite(pull).all() and scale > 0
        for _ in range(_TRIES if known else 0):
            move = -np.linalg.solve(normal + damping * scale * np.eye(len(normal)), pull)
            move *= min(1.0, 1.0 / np.abs(move).max())
            tried, tried_r, tried_loss = residual(steps_at(z + move))
            if tried_loss < loss:
                z, run, r, loss = z + move, tried, tried_r, tried_loss
                break
            damping *= 5
        z[:n] -= z[:n].mean()
        damping = max(damping / 5, 1e-6)
        if loss > (1 - _GAIN) * before:
            # a rough or a flat place: look around, one unknown at a time
            damping, reach = 1e-2, reach / 2
            for move in np.concatenate([np.eye(len(z)), -np.eye(len(z))]) * reach:
                tried, tried_r, tried_loss = residual(steps_at(z + move), run)
                if tried_loss < loss:
                    z, run, r, loss = z + move, tried, tried_r, tried_loss
        if loss < before:
            yield steps_at(z)
        if reach < _NEAR and loss > (1 - _GAIN) * before:
            return


def _moves(steps: Steps, axis: Axis, probe: float) -> Iterator[tuple[Steps, float]]:
    """The steps with one lambda or one shift moved, and how far."""
    lambdas = axis.lambdas(steps.levels[:-1])
    end = axis.lambdas([axis.bottom])[0]
    for k in range(1, len(lambdas)):
        room = (lambdas[k + 1] if k + 1 < len(lambdas) else end) - lambdas[k]
        length = min(probe, 0.25 * room)
        moved = lambdas.copy()
        moved[k] += length
        yield Steps(axis.levels(moved), steps.shifts), length
    for k in range(len(steps.shifts)):
        shifts = list(steps.shifts)
        shifts[k] += probe
        yield Steps(steps.levels, tuple(shifts)), probe


def _slopes(z: np.ndarray, n: int, axis: Axis) -> np.ndarray:
    """d (lambdas but the first, shifts) / dz."""
    calls = len(z) - n
    slopes = np.zeros((n - 1 + calls, len(z)))
    slopes[: n - 1, :n] = axis.slopes(z[:n])[1:]
    slopes[n - 1 :, n:] = np.diag(_SHIFT / np.cosh(z[n:]) ** 2)
    return slopes
