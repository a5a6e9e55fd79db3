"""Learned and searched steps where the exact answer is known: one column of the grid.

The whole grid is in benchmarks/schedules.py; its figures are in docs/schedules.md.
"""

import math
import os
import types
from itertools import pairwise

import analytic
import grid
import numpy as np
import pytest
import torch
from livediffusion.engine.sequential import walk
from livediffusion.engine.step_rules import STEP_RULES, Course
from livediffusion.schedules.axis import Axis
from livediffusion.schedules.frechet import Pictures, features, frechet, moments
from livediffusion.schedules.learned import learned
from livediffusion.schedules.pupil import Contest, Pupil, Steps, Teacher
from livediffusion.schedules.searched import searched

# every two of them together, in half of the cells; all of them with LIVEDIFFUSION_LONG set
CELLS = [(name, family, rule) for i, name in enumerate(analytic.TARGETS)
         for j, family in enumerate(grid.FAMILIES) for k, rule in enumerate(grid.SOLVERS)
         if (i + j + k) % 2 == 0 or "LIVEDIFFUSION_LONG" in os.environ]  # fmt: skip
# heavier tails take more noises, see grid.samples
SAMPLES = {"power law": 48, "mixture": 512, "digits": 256}
LEVELS = (14.6, 5.0, 1.5, 0.4, 0.0)


def column(find, n=4):
    """Held-out RMSE in each cell, relative to the best hand-made schedule."""
    ratios = {}
    for name, family, rule in CELLS:
        contest = grid.contest(name, family, rule, n, SAMPLES[name])
        *_, found = find(contest, grid.axis(family))
        assert contest.train.calls <= 2500
        ratios[name, family, rule] = grid.judged(name, family, rule, n, found.steps, 512)[0]
    return ratios


@pytest.mark.comfy
@pytest.mark.slow
def test_learned_steps_beat_the_best_hand_made(comfyui):
    ratios = column(lambda contest, axis: learned(contest, axis, 15))
    assert grid.geometric(ratios.values()) <= 0.9, ratios
    assert max(ratios.values()) <= 1.02, ratios


@pytest.mark.comfy
@pytest.mark.slow
def test_searched_steps_beat_the_best_hand_made(comfyui):
    ratios = column(lambda contest, axis: searched(contest, axis, 20, 12))
    assert grid.geometric(ratios.values()) <= 0.92, ratios
    assert max(ratios.values()) <= 1.02, ratios


@pytest.mark.comfy
@pytest.mark.slow
@pytest.mark.parametrize("family", ["VP", "EDM", "flow"])
def test_a_learned_time_shift_gains_again(family, comfyui):
    def error(shift):
        contest = grid.contest("digits", family, "dpmpp_2m", 4, 128)
        *_, found = learned(contest, grid.axis(family), 15, shift)
        return grid.judged("digits", family, "dpmpp_2m", 4, found.steps, 512)[0], found.steps

    (plain, steps), (shifted, told) = error(False), error(True)
    assert steps.shifts == () and len(told.shifts) == 4
    assert shifted < 0.9 * plain < 0.9 * 1.02


@pytest.mark.comfy
def test_nothing_worse_than_the_best_hand_made_is_returned(comfyui):
    """A pupil that learns on noise which says nothing about the noise it is judged on."""
    train, held = (grid.pupil("mixture", "VP", "unipc", 2, seed) for seed in (1, 2))
    hands = grid.hands("VP", 3)
    best = min(
        float((train.terms(s).mean() + held.terms(s).mean()) / 2)
        for s in (Steps(levels) for levels in hands.values())
    )
    for find in (lambda c, a: learned(c, a, 3, True), lambda c, a: searched(c, a, 6, 3)):
        contest = Contest(train, held, hands)
        for found in find(contest, grid.axis("VP")):
            assert found.error <= found.hand_made[1]
            both = [float(p.terms(Steps(hands[found.hand_made[0]])).mean()) for p in (train, held)]
            assert sum(both) / 2 == pytest.approx(best)


class Judge:
    """A pupil whose terms are given: those of one schedule, and those of all others."""

    def __init__(self, levels, one, others):
        self.levels, self.one, self.others = levels, one, others

    def run(self, steps):
        terms = self.one if steps.levels == self.levels else self.others
        return types.SimpleNamespace(ends=terms)

    def judged(self, ends):
        return ends

    def terms(self, steps):
        return self.run(steps).ends


@pytest.mark.parametrize(
    ("gains", "wins"),
    [
        pytest.param([0.1] * 16, True, id="a tenth on all of many"),
        pytest.param([0.1] * 8, False, id="a tenth on all of few"),
        pytest.param([0.01] * 128, True, id="a little on all of very many"),
        pytest.param([0.01] * 64, False, id="a little on all of many"),
        pytest.param([9.0] * 2 + [-0.05] * 30, False, id="much on two, nothing on the rest"),
        pytest.param([9.0] * 20 + [-0.05] * 300, True, id="much on many"),
        pytest.param([0.5] * 15 + [-2.0], False, id="one shows that much can be lost"),
        pytest.param([-0.01] * 16, False, id="behind"),
        pytest.param([math.inf] + [-0.01] * 15, True, id="the hand-made one runs away"),
        pytest.param([0.01], True, id="one term for all"),
    ],
)
def test_luck_with_the_noise_does_not_win(gains, wins):
    challenger = Steps((2.0, 0.9, 0.0))
    gains = torch.tensor(gains, dtype=torch.float64)
    judge = Judge(challenger.levels, torch.ones_like(gains), 1 + gains)
    contest = Contest(judge, judge, {"hand": (2.0, 1.0, 0.0)})
    assert contest.offer(challenger) is wins
    assert (contest.steps == challenger) is wins


@pytest.mark.comfy
@pytest.mark.parametrize(("rule", "samples"), [("dpmpp_2m", 16), ("unipc", 16), ("unipc", 64)])
def test_few_samples_do_no_harm(rule, samples, comfyui):
    """On noise that nothing has seen, beside the hand-made steps that would else be taken."""
    contest = grid.contest("mixture", "VP", rule, 8, samples)
    *_, found = learned(contest, grid.axis("VP"), 15)
    hand = Steps(grid.hands("VP", 8)[found.hand_made[0]])
    unseen = grid.pupil("mixture", "VP", rule, 1024, 0)
    assert unseen.terms(found.steps).mean() <= 1.02**2 * unseen.terms(hand).mean()


def test_a_solver_that_runs_away_does_not_win():
    """Non-finite ends are infinitely far."""
    x = torch.ones(4, 3, dtype=torch.float64)

    def predict(x, sigma, shift=0.0):
        return x * (math.nan if sigma < 0.5 else 0.5)

    def pupil():
        return Pupil(predict, x, STEP_RULES["euler"], analytic.Space("VP"), Teacher(x * 0))

    good = (2.0, 1.0, 0.6, 0.0)
    contest = Contest(pupil(), pupil(), {"bad": (2.0, 1.0, 0.1, 0.0), "good": good})
    assert contest.name == "good"
    *_, found = learned(contest, Axis(2.0, 0.01), 3)
    assert all(level >= 0.5 for level in found.steps.levels[:-1])
    assert math.isfinite(found.error)


def test_calls_made_before_are_not_made_again():
    pupil = grid.pupil("mixture", "VP", "unipc", 4, 1)
    base = pupil.run(Steps(LEVELS))
    assert pupil.calls == 4
    for changed, more in ((3, 1), (2, 2), (1, 3)):
        levels = list(LEVELS)
        levels[changed] *= 0.9
        before = pupil.calls
        again = pupil.run(Steps(tuple(levels)), base)
        assert pupil.calls - before == more
        assert torch.equal(again.ends, pupil.run(Steps(tuple(levels))).ends)
    before = pupil.calls
    assert torch.equal(pupil.run(Steps(LEVELS), base).ends, base.ends)
    assert pupil.calls == before


def test_a_rule_with_fresh_noise_is_refused():
    course = Course(LEVELS, STEP_RULES["lcm"], analytic.Space("VP"))
    with pytest.raises(ValueError, match="fresh noise"):
        list(walk(lambda x, sigma: x, torch.ones(1, 2), course))


@pytest.mark.parametrize("flow", [False, True])
def test_shares_and_levels_are_each_others_inverse(flow):
    levels = (0.999, 0.8, 0.5, 0.2, 0.0) if flow else LEVELS
    axis = Axis(levels[0], 0.02, flow)
    shares = axis.shares(levels)
    assert axis.levels(axis.placed(shares)) == pytest.approx(levels, rel=2e-3)
    slopes, step = axis.slopes(shares), 1e-6
    for k in range(4):
        moved = shares.copy()
        moved[k] += step
        by = (axis.placed(moved) - axis.placed(shares)) / step
        assert by == pytest.approx(slopes[:, k], abs=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_any_shares_make_falling_levels(seed):
    shares = np.random.default_rng(seed).normal(0, 20, 8)
    levels = Axis(14.6, 0.03).levels(Axis(14.6, 0.03).placed(shares))
    assert all(a > b for a, b in pairwise(levels))
    assert levels[0] == 14.6 and levels[-1] == 0 and levels[-2] > 0.03


def test_the_frechet_distance_is_the_exact_one():
    """Of Gaussians, where it is known in closed form; by samples it comes near."""
    levels = analytic.uniform_t("VP", 4)
    course = Course(tuple(levels.tolist()), STEP_RULES["euler"], analytic.Space("VP"))

    def solve(x):
        *_, last = walk(analytic.predictor("power law", "VP"), x, course)
        return last.x

    exact = analytic.exact_frechet("VP", solve)
    ends = solve(analytic.start("power law", "VP", 10_000, 7))
    variance = analytic.target("power law").variance
    truth = (torch.zeros_like(variance), torch.diag(variance))
    assert frechet(moments(ends), truth) == pytest.approx(exact, rel=0.05)
    assert frechet(truth, truth) == pytest.approx(0, abs=1e-9)
    # more steps come nearer
    fine = Course(tuple(analytic.uniform_t("VP", 16).tolist()), STEP_RULES["euler"],
                  analytic.Space("VP"))  # fmt: skip
    *_, last = walk(
        analytic.predictor("power law", "VP"), analytic.start("power law", "VP", 10_000, 7), fine
    )
    assert frechet(moments(last.x), truth) < 0.5 * exact


def test_features_tell_pictures_apart():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(128, 4, 16, 16, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    goal = Pictures(smooth[:64])
    near, far = goal.terms(smooth[64:]), goal.terms(noise[64:])
    assert 0 < near < 0.2 * far
    assert torch.equal(features(noise[:2]), features(noise[:2]))
    assert features(noise[:, :, None]).shape == (128, 64)
    assert goal.terms(noise * math.nan).isinf().all()


@pytest.mark.comfy
def test_a_search_may_have_pictures_as_its_goal(comfyui):
    """Where RMSE and distance disagree, it follows the one it was given."""
    real = analytic.target("digits").points
    real = real + 0.15 * torch.randn(real.shape, generator=torch.Generator().manual_seed(1))
    pictures = Pictures(real.reshape(-1, 1, 8, 8))

    class Digits:
        def terms(self, ends):
            return pictures.terms(ends.reshape(-1, 1, 8, 8))

    train, held = (grid.pupil("digits", "VP", "unipc", 128, seed) for seed in (1, 2))
    train.goal = held.goal = Digits()
    contest = Contest(train, held, grid.hands("VP", 4))
    *_, found = searched(contest, grid.axis("VP"), 16, 8)
    assert found.error < 0.95 * found.hand_made[1]
