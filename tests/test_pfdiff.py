"""PFDiff where the exact answer is known, and its count of calls."""

import math

import analytic
import pytest
import torch
from livediffusion.engine.sequential import through
from livediffusion.engine.step_rules import STEP_RULES, Course

CALLS = range(4, 11)
GRID = [(n, f) for n in analytic.TARGETS for f in analytic.FAMILIES]


def solve(name, family, rule, sigmas):
    """A step rule on a closed-form denoiser: the end points and the number of calls."""
    course = Course(tuple(sigmas.tolist()), STEP_RULES[rule], analytic.Space(family))
    calls = list(through(analytic.predictor(name, family), analytic.start(name, family), course))
    return calls[-1].x, len(calls)


def error(name, family, rule, steps):
    exact = analytic.reference(name, family)
    x, calls = solve(name, family, rule, analytic.uniform_t(family, steps))
    return analytic.rmse(x, exact), calls


@pytest.mark.parametrize(("name", "family"), GRID)
def test_the_reference_is_known_well_enough(name, family):
    exact = analytic.reference(name, family)
    assert exact.isfinite().all()
    uncertain = analytic.rmse(exact, analytic.reference(name, family, steps=400))
    smallest = min(error(name, family, rule, 10)[0] for rule in ("euler", "pfdiff-1_1"))
    assert uncertain < 1e-4 * smallest


@pytest.mark.parametrize("name", analytic.TARGETS)
def test_the_denoiser_is_the_posterior_mean(name):
    """Against the definition, by sampling: E[x0 | x] minimises the squared error."""
    target, generator = analytic.TARGETS[name](), torch.Generator().manual_seed(1)
    count, sigma = 20_000, 0.8
    noise = torch.randn(count, target.dim, generator=generator, dtype=torch.float64)
    if isinstance(target, analytic.Gaussian):
        clean = noise * target.variance.sqrt() + target.mean
    else:
        pick = torch.randint(len(target.points), (count,), generator=generator)
        clean = target.points[pick] + target.width * noise
    x = clean + sigma * torch.randn(count, target.dim, generator=generator, dtype=torch.float64)
    best = target.denoise(x, sigma)
    # what is left is orthogonal to any function of x, its own prediction among them
    left = ((clean - best) * best).mean()
    assert abs(left) < 4 * ((clean - best) * best).std() / math.sqrt(count * target.dim) + 1e-3
    assert (clean - best).square().mean() < (clean - x).square().mean()


@pytest.mark.parametrize("rule", ["pfdiff-1_1", "pfdiff-2_1", "pfdiff-3_1"])
def test_calls_are_what_the_name_promises(rule):
    skipped = int(rule[7]) + 1
    for steps in range(1, 20):
        _, calls = error("mixture", "VP", rule, steps)
        assert calls == 1 + math.ceil((steps - 1) / skipped)


def test_it_beats_euler_with_as_many_calls():
    """At 4 to 10 calls, on every target and family: in 90 % of the cells, and on the whole."""
    ratios = {}
    for name, family in GRID:
        for calls in CALLS:
            ours, count = error(name, family, "pfdiff-1_1", 2 * calls - 1)
            plain, _ = error(name, family, "euler", calls)
            assert count == calls
            ratios[name, family, calls] = ours / plain
    better = sum(ratio < 1 for ratio in ratios.values())
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    assert better >= 0.9 * len(ratios), ratios
    assert mean < 0.8, mean


@pytest.mark.parametrize(("family", "least"), [("VP", 5), ("flow", 5), ("EDM", 8)])
def test_it_is_better_where_the_docs_say_so(family, least):
    """On mixtures that nothing was made on: in every cell from so many calls on, and not below."""

    def ratios(calls):
        return [
            error(name, family, "pfdiff-1_1", 2 * calls - 1)[0]
            / error(name, family, "euler", calls)[0]
            for name in analytic.OTHERS
        ]

    assert max(r for calls in range(least, 11) for r in ratios(calls)) < 1
    assert max(ratios(least - 3)) > 1.2
